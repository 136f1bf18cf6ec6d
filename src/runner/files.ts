import { randomBytes } from "node:crypto";
import {
  closeSync,
  constants,
  fchmodSync,
  fchownSync,
  fdatasync,
  lstatSync,
  mkdirSync,
  openSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { chmod, lstat, open } from "node:fs/promises";
import { dirname } from "node:path";
import { promisify } from "node:util";
import { runCommand } from "./commands.ts";

const REMOVE_DEADLINE_MS = 10 * 60_000;

const toDisk = promisify(fdatasync);

/** The `code` of a system error, for example `ENOENT`. */
export const errnoOf = (error: unknown): string | undefined =>
  error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;

/** Who owns a file that is not the runner's own. */
export interface Owner {
  uid: number;
  gid: number;
}

/**
 * Writes a file that readers and crashes see whole or not at all; mode 0600. The folder may belong to somebody hostile:
 * nothing is followed, and what had the name before is replaced. The disk alone is waited for: the other calls are over
 * sooner than a process with much to do comes round to the next one.
 */
export async function writeAtomically(path: string, content: string, owner?: Owner): Promise<void> {
  const partial = `${path}.${randomBytes(6).toString("hex")}`;
  const file = openSync(partial, "wx", 0o600);
  try {
    writeFileSync(file, content);
    if (owner) fchownSync(file, owner.uid, owner.gid);
    await toDisk(file);
  } catch (error) {
    rmSync(partial, { force: true });
    throw error;
  } finally {
    closeSync(file);
  }
  renameSync(partial, path);
}

/**
 * Content of a regular file of at most `maxBytes`, never through a link; undefined if there is none. With `uid`, only one
 * of that user.
 */
export async function readSmall(path: string, maxBytes: number, uid?: number): Promise<string | undefined> {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const file = await open(path, flags).catch((error: unknown) => {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw error;
  });
  if (!file) return undefined;
  try {
    const found = await file.stat();
    if (!found.isFile() || found.size > maxBytes) throw new Error(`${path} is not a file of at most ${maxBytes} bytes`);
    if (uid !== undefined && found.uid !== uid) throw new Error(`${path} belongs to somebody else`);
    return await file.readFile("utf8");
  } finally {
    await file.close();
  }
}

/**
 * Makes a folder with exactly this mode; one that exists is given it. The parent must be the runner's own. All at once: a
 * start makes a dozen, and handing each of these calls to another thread takes ten times as long.
 */
export function makeFolder(path: string, mode: number, owner?: Owner): void {
  try {
    mkdirSync(path);
  } catch (error) {
    if (errnoOf(error) !== "EEXIST") throw error;
  }
  if (!lstatSync(path).isDirectory()) throw new Error(`${path} is not a folder`);
  const folder = openSync(path, constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW);
  try {
    if (owner) fchownSync(folder, owner.uid, owner.gid);
    fchmodSync(folder, mode);
  } finally {
    closeSync(folder);
  }
}

export async function exists(path: string): Promise<boolean> {
  return await lstat(path).then(
    () => true,
    (error: unknown) => {
      if (errnoOf(error) === "ENOENT" || errnoOf(error) === "ENOTDIR") return false;
      throw error;
    },
  );
}

/** Removes a tree whatever its depth and modes; links in it are not followed. The parent must be the runner's own. */
export async function removeTree(path: string): Promise<void> {
  if (!(await exists(path))) return;
  await chmod(dirname(path), (await lstat(dirname(path))).mode | 0o700).catch(() => undefined);
  const { code, stderr } = await runCommand("rm", ["-rf", "--", path], { timeoutMs: REMOVE_DEADLINE_MS });
  if (code !== 0) throw new Error(`${path} could not be removed: ${stderr.slice(0, 300)}`);
}
