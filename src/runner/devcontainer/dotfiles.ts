import { remoteUriProblem } from "../../scm/initializer.ts";
import { shellQuoted } from "../commands.ts";
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

// What somebody has changed in the clone of before is set aside. Files of the home stay; links of before are renewed.
const script = (repository: string, protocols: readonly string[]) => `cd -- "$HOME" || exit 1
export GIT_TERMINAL_PROMPT=0 GIT_ALLOW_PROTOCOL=${shellQuoted(protocols.join(":"))}
export GIT_SSH_COMMAND='ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=20'
rm -rf -- .dotfiles.partial
git clone --origin origin --recurse-submodules -- ${shellQuoted(repository)} .dotfiles.partial || exit 1
unset GIT_TERMINAL_PROMPT GIT_ALLOW_PROTOCOL GIT_SSH_COMMAND
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

/** The installation of somebody's dotfiles. Throws with a text for people if the repository is none to clone from. */
export function dotfilesCommand(repository: string, schemes: readonly string[]): LifecycleCommand {
  const problem = remoteUriProblem(repository, schemes);
  if (problem) throw new Error(`the dotfiles were not installed: their repository ${problem}`);
  const protocols = [...new Set(["https", "ssh", ...schemes])];
  return { name: DOTFILES, parts: [{ label: "", text: script(repository, protocols) }] };
}
