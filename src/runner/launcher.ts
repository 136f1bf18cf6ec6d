import { chmod } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { runCommand } from "./commands.ts";
import { makeFolder, readSmall, writeAtomically } from "./files.ts";
import type { EnvironmentPaths } from "./paths.ts";
import { shellQuoted } from "./supervisor/shell.ts";
import type { UnixUser } from "./users.ts";

// The `berth` of an environment's processes: this program, in a folder at the end of their PATH that is the runner's.

const MAX_BYTES = 16 * 1024;
const CHECK_MS = 10_000;
const isSource = import.meta.url.endsWith(".ts");
const PROGRAM = fileURLToPath(new URL(isSource ? "../main.ts" : "../main.js", import.meta.url));

// Users of environments are in no group of the host's, so that what one of them can read all of them can.
let isReadable: Promise<boolean> | undefined;

async function canRun({ own, uid, gid }: UnixUser): Promise<boolean> {
  const args = ["-c", 'test -x "$1" && test -r "$2"', "sh", process.execPath, PROGRAM];
  const { code } = await runCommand("/bin/sh", args, { timeoutMs: CHECK_MS, ...(own && { user: { uid, gid } }) });
  return code === 0;
}

/** Puts the program where the environment finds it; false if its user cannot run it, for example from root's home. */
export async function writeLauncher({ bin }: EnvironmentPaths, user: UnixUser): Promise<boolean> {
  makeFolder(bin, 0o755);
  isReadable ??= canRun(user).catch((error: unknown) => {
    isReadable = undefined;
    throw error;
  });
  const path = join(bin, "berth");
  const script = `#!/bin/sh\nexec ${shellQuoted(process.execPath)} ${shellQuoted(PROGRAM)} "$@"\n`;
  if ((await readSmall(path, MAX_BYTES)) !== script) {
    await writeAtomically(path, script);
    await chmod(path, 0o755);
  }
  return await isReadable;
}
