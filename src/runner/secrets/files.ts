import { join } from "node:path";
import { runCommand } from "../commands.ts";
import { writeAtomically } from "../files.ts";
import { commandUser, ownerOf } from "../machine.ts";
import type { EnvironmentPaths } from "../paths.ts";
import type { Inhabitant } from "../users.ts";

// A value lies in one file in the environment's folder for secrets, mode 0600, and nowhere else: what stands at a path is
// a link to it, so that a new value replaces the old one in place, and copies of a tree hold no value. That folder lies in
// one of the runner's, but its content is in the hands of the environment's user; everything beyond the folder itself is
// done by commands that run as that user, and can do no more than it could.

const DEADLINE_MS = 20_000;
const OUTSIDE = 3;
const FOLDER_IN_THE_WAY = 4;

// Arguments: folder that the link must lie in, link, target. Says so if something was moved out of the way.
const PLACE = `set -eu
umask 077
mkdir -p -- "\${2%/*}"
cd -P -- "\${2%/*}"
case "$(pwd -P)/" in "$1"/*) ;; *) exit ${OUTSIDE} ;; esac
name=./\${2##*/}
if [ "$(readlink -- "$name" || :)" = "$3" ]; then exit 0; fi
if [ -d "$name" ] && [ ! -L "$name" ]; then exit ${FOLDER_IN_THE_WAY}; fi
if [ -e "$name" ] || [ -L "$name" ]; then
  mv --backup=numbered -T -- "$name" "$name.berth-backup"
  echo moved
fi
ln -s -T -- "$3" "$name"`;
// The same arguments. Takes away the link alone, not what somebody else has put in its place.
const REMOVE = `cd -P -- "\${2%/*}" || exit 0
case "$(pwd -P)/" in "$1"/*) ;; *) exit 0 ;; esac
name=./\${2##*/}
if [ "$(readlink -- "$name")" = "$3" ]; then rm -f -- "$name"; fi`;

/** Whose files they are, and where. */
export interface Place {
  environmentId: string;
  paths: EnvironmentPaths;
  user: Inhabitant;
}

/** Name of the file with the variables, a JSON object that the supervisor reads before it starts a process. */
export const VARIABLES_FILE = "env";

/** The file with the value of an entry of the specification. */
export const valueFile = (paths: EnvironmentPaths, entryId: string) => join(paths.secrets, entryId);

export async function asUser({ environmentId, paths, user }: Place, file: string, args: readonly string[]) {
  return await runCommand(file, args, {
    env: { HOME: paths.home, BERTH_ENVIRONMENT_ID: environmentId },
    user: commandUser(user),
    timeoutMs: DEADLINE_MS,
  });
}

/** Writes a file directly in the folder for secrets, which replaces the one that was there as a whole. */
export async function writeSecretFile({ paths, user }: Place, name: string, content: string): Promise<void> {
  await writeAtomically(join(paths.secrets, name), content, ownerOf(user));
}

/** Removes files directly in the folder for secrets. */
export async function removeSecretFiles(place: Place, names: readonly string[]): Promise<void> {
  if (names.length === 0) return;
  await asUser(place, "rm", ["-rf", "--", ...names.map((name) => join(place.paths.secrets, name))]);
}

/** Lets a path in a folder lead to the value of an entry; returns a warning if something else was there. */
export async function placeLink(place: Place, root: string, link: string, entryId: string): Promise<string> {
  const args = ["-c", PLACE, "sh", root, link, valueFile(place.paths, entryId)];
  const { code, stdout } = await asUser(place, "sh", args);
  if (code === OUTSIDE) throw new Error("its path leads out of the environment");
  if (code === FOLDER_IN_THE_WAY) throw new Error("there is a folder at its path");
  if (code !== 0) throw new Error("its file could not be put in place");
  return stdout.includes("moved") ? `the file that was at ${link} is ${link}.berth-backup now` : "";
}

export async function removeLink(place: Place, root: string, link: string, entryId: string): Promise<void> {
  await asUser(place, "sh", ["-c", REMOVE, "sh", root, link, valueFile(place.paths, entryId)]);
}
