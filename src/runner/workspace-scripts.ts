// Work in a workspace, done in few processes: each script runs as the environment's user, in the workspace, and names
// everything below it as `./name`, so that no name is taken for an option.

/** Exit code of PLACE when a name stays occupied; the name is printed. */
export const IN_THE_WAY = 9;

/** What LOOK_AFTERWARDS prints for a checkout that has submodules. */
export const HAS_SUBMODULES = "submodules";

/** Arguments: patterns of names to remove, `--`, folders to make. */
export const PREPARE = `set -eu
while [ "$1" != -- ]; do
  for each in $1; do
    if [ -e "$each" ] || [ -L "$each" ]; then rm -rf -- "./$each"; fi
  done
  shift
done
shift
if [ $# -gt 0 ]; then mkdir -p -- "$@"; fi`;

/** Patterns for PREPARE that match every name. */
export const EVERYTHING = ["*", ".[!.]*", "..?*"];

/**
 * Moves what was made ready to its place, what is in the way to the backup; can be repeated after a crash. Arguments:
 * folder with what is ready, folder for the backup, old names, `--`, new names with outer folders first.
 */
export const PLACE = `set -eu
ready=$1 backup=$2
shift 2
is_there() { [ -e "$1" ] || [ -L "$1" ]; }
move() {
  if [ ! -d "\${2%/*}" ]; then mkdir -p -- "\${2%/*}"; fi
  mv -T -- "$1" "$2"
}
set_aside() {
  if is_there "$1" && ! is_there "$backup/$1"; then move "$1" "$backup/$1"; fi
}
while [ "$1" != -- ]; do
  set_aside "$1"
  shift
done
shift
for each in "$@"; do
  is_there "$ready/$each" || continue
  set_aside "$each"
  if is_there "$each"; then
    printf '%s' "$each"
    exit ${IN_THE_WAY}
  fi
  move "$ready/$each" "$each"
done
rm -rf -- "$ready"`;

/** Runs a command; when it has succeeded, looks for submodules in the checkout $0. */
export const LOOK_AFTERWARDS = `"$@" || exit
if [ -e "$0/.gitmodules" ] || [ -L "$0/.gitmodules" ]; then echo ${HAS_SUBMODULES}; fi`;

/** A configuration of git's with just these values. */
export function gitConfiguration(name: string, email: string, trusted: readonly string[]): string {
  const quoted = (text: string) =>
    `"${text.replace(/[\\"]/g, "\\$&").replaceAll("\n", "\\n").replaceAll("\t", "\\t")}"`;
  const user = [name && `\tname = ${quoted(name)}\n`, email && `\temail = ${quoted(email)}\n`].join("");
  const safe = trusted.map((folder) => `\tdirectory = ${quoted(folder)}\n`).join("");
  return [user && `[user]\n${user}`, safe && `[safe]\n${safe}`].join("");
}

/**
 * Arguments: what `gitConfiguration` says where there is no configuration yet, who commits, their address, and the
 * folders that git trusts.
 */
export const CONFIGURE_GIT = `set -eu
file=$HOME/.gitconfig
if [ ! -e "$file" ] && [ ! -L "$file" ] && [ ! -e "$HOME/.config/git/config" ]; then
  umask 022
  printf '%s' "$1" >"$file"
  exit
fi
shift
set_one() {
  if [ -n "$2" ]; then git config --global --replace-all -- "$1" "$2"; return; fi
  # 5: the value to remove was not there.
  git config --global --unset-all -- "$1" || [ $? -eq 5 ]
}
set_one user.name "$1"
set_one user.email "$2"
set_one safe.directory "\${3-}"
shift 2
while [ $# -gt 1 ]; do
  shift
  git config --global --add -- safe.directory "$1"
done`;
