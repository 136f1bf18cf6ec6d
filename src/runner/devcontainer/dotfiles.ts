import { ScmError } from "../../scm/errors.ts";
import type { AdmittedUrl, Guard } from "../../scm/guard.ts";
import { remoteUriProblem } from "../../scm/initializer.ts";
import { asUrl } from "../clone-plan.ts";
import { ContentError, movedTo, pins, sshOptions } from "../git.ts";
import { shellQuoted } from "../supervisor/shell.ts";
import type { LifecycleCommand } from "./lifecycle.ts";

/** Name of their installation among the commands of a dev container. */
export const DOTFILES = "dotfiles";

const INSTALLERS = [
  "install.sh",
  "install",
  "bootstrap.sh",
  "bootstrap",
  "script/bootstrap",
  "setup.sh",
  "setup",
  "script/setup",
];

/** A repository that may be contacted, under the address that it has now. */
interface Source {
  repository: string;
  admitted: AdmittedUrl;
}

const MAX_REDIRECTS = 3;
const REDIRECT_MS = 10_000;

const ssh = (pinned: readonly AdmittedUrl[]) => shellQuoted(["ssh", ...sshOptions(pinned)].join(" "));

/** Settings of a clone that goes to the addresses that were checked, wherever a host sends it. */
const settings = ({ admitted }: Source) =>
  [...pins([admitted]), "http.followRedirects=false"].map((setting) => `-c ${shellQuoted(setting)}`).join(" ");

// What somebody has changed in the clone of before is set aside. Files of the home stay; links of before are renewed.
// Submodules are for those who wrote the repository to choose, as is what its script does.
const script = (source: Source, protocols: readonly string[]) => `cd -- "$HOME" || exit 1
export GIT_TERMINAL_PROMPT=0 GIT_ALLOW_PROTOCOL=${shellQuoted(protocols.join(":"))}
rm -rf -- .dotfiles.partial
GIT_SSH_COMMAND=${ssh([source.admitted])} git ${settings(source)} clone --origin origin \\
  -- ${shellQuoted(source.repository)} .dotfiles.partial || exit 1
GIT_SSH_COMMAND=${ssh([])} git -C .dotfiles.partial submodule --quiet update --init --recursive || exit 1
unset GIT_TERMINAL_PROMPT GIT_ALLOW_PROTOCOL
if [ -e dotfiles ] || [ -L dotfiles ]; then
  changes=$(git -C dotfiles status --porcelain && git -C dotfiles log --oneline --branches --not --remotes \\
    && git -C dotfiles stash list) || changes=unknown
  if [ -z "$changes" ]; then rm -rf -- dotfiles; else
    mv --backup=numbered -T -- dotfiles dotfiles.before || exit 1
    echo 'The dotfiles of before were changed: they are in dotfiles.before now'
  fi
fi
mv -T -- .dotfiles.partial dotfiles && cd dotfiles || exit 1
for each in ${INSTALLERS.join(" ")}; do
  if [ -f "$each" ] && [ -x "$each" ]; then
    echo "Running $each"
    exec "./$each"
  fi
done
echo 'There is no executable install script: linking what begins with a dot'
for each in .*; do
  case $each in .|..|.git) continue ;; esac
  if [ -L "../$each" ]; then
    case $(readlink -- "../$each") in dotfiles/*) ;; *) echo "$each is there already"; continue ;; esac
  elif [ -e "../$each" ]; then echo "$each is there already"; continue; fi
  ln -sfn -- "dotfiles/$each" "../$each"
done`;

/** Where a repository may be cloned from; a host that has moved it on itself is followed. */
async function admittedSource(repository: string, guard: Guard): Promise<Source> {
  const signal = AbortSignal.timeout(REDIRECT_MS);
  const admitted = await guard.admit(asUrl(repository));
  let source = { repository, admitted };
  for (let redirects = 0; redirects < MAX_REDIRECTS && /^https?:$/.test(admitted.url.protocol); redirects++) {
    const moved = await movedTo(source.admitted, signal);
    if (!moved) break;
    source = { repository: moved.href, admitted: { ...admitted, url: moved } };
  }
  return source;
}

/** The installation of somebody's dotfiles. ContentError if the repository is none to clone from. */
export async function dotfilesCommand(repository: string, guard: Guard): Promise<LifecycleCommand> {
  const { schemes } = guard;
  const problem = remoteUriProblem(repository, schemes);
  if (problem) throw new ContentError(`the dotfiles were not installed: their repository ${problem}`);
  try {
    const source = await admittedSource(repository, guard);
    const protocols = [...new Set(["https", "ssh", ...schemes])];
    return { name: DOTFILES, parts: [{ label: "", text: script(source, protocols) }] };
  } catch (error) {
    throw error instanceof ScmError ? new ContentError(`the dotfiles were not installed: ${error.message}`) : error;
  }
}
