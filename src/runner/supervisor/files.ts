import { createHash, randomBytes } from "node:crypto";
import { constants, type Dirent } from "node:fs";
import {
  access,
  chmod,
  type FileHandle,
  link,
  lstat,
  mkdir,
  open,
  opendir,
  readlink,
  realpath,
  rename,
  rm,
  stat,
} from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  type FileInfo,
  FileInfoSchema,
  type ReadFileRequest,
  type ReadFileResponseSchema,
  type WriteFileRequest,
  WriteMode,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { inBatches } from "./batches.ts";
import { errnoOf, failedPrecondition, invalidArgument, withDeadline } from "./errors.ts";

/** Most bytes one ReadFile returns and one WriteFile takes. */
export const MAX_FILE_BYTES = 32 * 1024 * 1024;
/** Most entries of one directory listing or search. */
export const MAX_ENTRIES = 65_536;
const MAX_LINKS = 40;
const DIRECTORY_DEADLINE_MS = 30_000;
// Never block on a FIFO, never make a terminal the controlling one.
const CAREFULLY = constants.O_NONBLOCK | constants.O_NOCTTY;

/** Absolute form of a path of a request; relative ones start at the workspace folder. */
export function resolvePath(workspaceFolder: string, path: string): string {
  if (path === "" || path.includes("\0")) throw invalidArgument("path is empty or contains NUL");
  return resolve(workspaceFolder, path);
}

/** A directory that a command can start in; INVALID_ARGUMENT for anything else, system errors if it cannot be entered. */
export async function checkDirectory(path: string): Promise<void> {
  const check = async () => {
    if (!(await stat(path)).isDirectory()) throw invalidArgument(`${path} is not a directory`);
    await access(path, constants.X_OK);
  };
  await withDeadline(check(), DIRECTORY_DEADLINE_MS, "looking up the directory");
}

/** Whether a path leads to a file that may be started. */
export async function isExecutable(path: string): Promise<boolean> {
  try {
    await access(path, constants.X_OK);
    return (await stat(path)).isFile();
  } catch {
    return false;
  }
}

const notAFile = (path: string) => failedPrecondition(`${path} is not a regular file`);
const byName = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0);

/** Size of a file for listings; 0 for what is no file or vanished. */
export async function fileInfo(path: string, isDirectory: boolean): Promise<FileInfo> {
  const entry = isDirectory ? undefined : await lstat(path).catch(() => undefined);
  return create(FileInfoSchema, { path, isDirectory, size: BigInt(entry?.isFile() ? entry.size : 0) });
}

// Links are listed as what they lead to, so that a client can open a linked directory.
async function listed(directory: string, entry: Dirent): Promise<FileInfo> {
  const path = join(directory, entry.name);
  if (!entry.isSymbolicLink()) return await fileInfo(path, entry.isDirectory());
  const target = await stat(path).catch(() => undefined);
  const size = BigInt(target?.isFile() ? target.size : 0);
  return create(FileInfoSchema, { path, isDirectory: target?.isDirectory() ?? false, size });
}

/** The entries of a directory by name, the first 65536 of them, in bounded memory however many there are. */
export async function sortedEntries(directory: string, limit: number): Promise<{ entries: Dirent[]; more: boolean }> {
  let entries: Dirent[] = [];
  let more = false;
  const keepFirst = () => {
    entries.sort((a, b) => byName(a.name, b.name));
    more ||= entries.length > limit;
    entries = entries.slice(0, limit);
  };
  for await (const entry of await opendir(directory, { bufferSize: 256 })) {
    entries.push(entry);
    if (entries.length >= limit * 2) keepFirst();
  }
  keepFirst();
  return { entries, more };
}

async function readAt(file: FileHandle, offset: number, length: number): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for (let read = 0; read < length; ) {
    const chunk = Buffer.allocUnsafe(Math.min(length - read, 1024 * 1024));
    const { bytesRead } = await file.read(chunk, 0, chunk.length, offset + read);
    if (bytesRead === 0) break;
    chunks.push(chunk.subarray(0, bytesRead));
    read += bytesRead;
  }
  return Buffer.concat(chunks);
}

/** Bytes of a file or one level of a directory. FIFOs, sockets and devices are refused, never read. */
export async function readFile(
  { offset, length }: ReadFileRequest,
  path: string,
): Promise<MessageInitShape<typeof ReadFileResponseSchema>> {
  if (offset < 0n || length < 0n) throw invalidArgument("offset or length is negative");
  const found = await stat(path);
  if (found.isDirectory()) {
    const { entries } = await sortedEntries(path, MAX_ENTRIES);
    const infos = await inBatches(entries, (entry) => listed(path, entry));
    return { result: { case: "directory", value: { entries: infos } } };
  }
  if (!found.isFile()) throw notAFile(path);
  await using file = await open(path, constants.O_RDONLY | CAREFULLY);
  const opened = await file.stat();
  if (!opened.isFile()) throw notAFile(path);
  const wanted = length === 0n || length > MAX_FILE_BYTES ? MAX_FILE_BYTES : Number(length);
  const data =
    offset > Number.MAX_SAFE_INTEGER - MAX_FILE_BYTES ? Buffer.alloc(0) : await readAt(file, Number(offset), wanted);
  const contentHash = createHash("sha256").update(data).digest("hex");
  return { result: { case: "content", value: { data, totalSize: BigInt(opened.size), contentHash } } };
}

/** Where a path leads: through links, also those whose target does not exist yet. */
async function followLinks(path: string): Promise<string> {
  let current = path;
  for (let links = 0; links <= MAX_LINKS; links++) {
    const entry = await lstat(current).catch((error) => {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    });
    if (!entry?.isSymbolicLink()) return entry ? await realpath(current) : current;
    current = resolve(dirname(current), await readlink(current));
  }
  throw invalidArgument(`${path}: too many symbolic links`);
}

/**
 * Writes a file. Creating modes make parent directories; existing files keep their mode and are replaced as a whole,
 * so that a reader sees the old or the new content.
 */
export async function writeFile({ mode, content }: WriteFileRequest, path: string): Promise<void> {
  if (content.length > MAX_FILE_BYTES) {
    throw new ConnectError(`content is larger than ${MAX_FILE_BYTES} bytes`, Code.ResourceExhausted);
  }
  if (WriteMode[mode] === undefined) throw invalidArgument(`unknown write mode ${mode}`);
  const creates = mode !== WriteMode.TRUNCATE && mode !== WriteMode.APPEND;
  if (creates) await makeParents(path);
  const target = mode === WriteMode.CREATE ? path : await followLinks(path);
  const existing = await lstat(target).catch((error) => {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw error;
  });
  if (existing?.isDirectory()) throw failedPrecondition(`${path} is a directory`);
  if (mode === WriteMode.CREATE) return await createFile(target, content);
  if (existing && !existing.isFile()) throw notAFile(path);
  if (!existing && !creates) throw new ConnectError(`${path} does not exist`, Code.NotFound);
  if (mode === WriteMode.APPEND) return await writeInPlace(target, constants.O_APPEND, content);
  await replaceFile(target, existing ? existing.mode & 0o777 : undefined, content);
}

async function makeParents(path: string): Promise<void> {
  try {
    await mkdir(dirname(path), { recursive: true, mode: 0o755 });
  } catch (error) {
    if (["EEXIST", "ENOTDIR"].includes(errnoOf(error) ?? "")) throw failedPrecondition("a parent is not a directory");
    throw error;
  }
}

async function writeInPlace(path: string, flag: number, content: Uint8Array): Promise<void> {
  await using file = await open(path, constants.O_WRONLY | CAREFULLY | flag, 0o644);
  if (!(await file.stat()).isFile()) throw notAFile(path);
  await file.writeFile(content);
}

/** Puts the content beside `path` and lets `place` move it there; nothing is left behind on failure. */
async function viaTemporary(
  path: string,
  content: Uint8Array,
  mode: number,
  place: (temporary: string) => Promise<void>,
): Promise<void> {
  const temporary = join(dirname(path), `.berth-write-${randomBytes(8).toString("hex")}`);
  try {
    await writeInPlace(temporary, constants.O_CREAT | constants.O_EXCL, content);
    await chmod(temporary, mode);
    await place(temporary);
  } finally {
    await rm(temporary, { force: true });
  }
}

async function createFile(path: string, content: Uint8Array): Promise<void> {
  try {
    // A hard link, unlike a rename, refuses an existing name.
    await viaTemporary(path, content, 0o644, (temporary) => link(temporary, path));
  } catch (error) {
    // Some file systems have no hard links.
    if (!["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"].includes(errnoOf(error) ?? "")) throw error;
    await writeInPlace(path, constants.O_CREAT | constants.O_EXCL, content);
  }
}

async function replaceFile(path: string, mode: number | undefined, content: Uint8Array): Promise<void> {
  // A rename asks only for the directory's permission, but a read-only file must stay as it is.
  if (mode !== undefined) await access(path, constants.W_OK);
  try {
    await viaTemporary(path, content, mode ?? 0o644, (temporary) => rename(temporary, path));
  } catch (error) {
    // A writable file in a directory that is not, or one that is a mount point, can only be written in place.
    if (mode === undefined || !["EACCES", "EPERM", "EROFS", "EBUSY", "EXDEV"].includes(errnoOf(error) ?? ""))
      throw error;
    await writeInPlace(path, constants.O_TRUNC, content);
  }
}
