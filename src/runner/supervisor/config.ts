import { randomBytes } from "node:crypto";
import { closeSync, constants, fstatSync, openSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { isAbsolute } from "node:path";

/** What a runner hands to the supervisor of one environment; paths are absolute. */
export interface SupervisorConfig {
  /** UUID of the environment. */
  environmentId: string;
  /** Directory of the environment, with `workspace/ home/ secrets/ logs/ run/`. */
  root: string;
  /** Folder below `run/` and `logs/` for what it keeps and writes; those folders themselves if left out. */
  part?: string;
  /** Unix socket it listens on, at most 107 bytes (a kernel limit), usually `<root>/run/supervisor.sock`. */
  socketPath: string;
  /** Primary checkout; relative paths start here. */
  workspaceFolder: string;
  /** User and group it becomes. Required when started as root, refused as root itself; else left out. */
  uid?: number;
  gid?: number;
  userName: string;
  /** Login shell, for SHELL; `/bin/sh` takes its place where it is missing. */
  shell: string;
  /** JSON object of variable names and values (0600), read again before each process starts. */
  envFile: string;
  /** Version reported in health answers and `run/supervisor.json`. */
  version: string;
}

/** File below `root` that is there where the dev container has to have a container of its own. */
export const CONTAINED = "container/contained";
/** Program below `root` that runs a command in that container. */
export const ENTRANCE = "container/enter";
/** Program below `root` that people who log in get there by. */
export const LOGIN = "container/login";

/** What a supervisor is started with when the path of its configuration comes later, as a line of its input. */
export const WAIT = "--wait";

/** A configuration the supervisor cannot start with; exit code 2. */
export class SupervisorConfigError extends Error {}

const MAX_SOCKET_PATH_BYTES = 107;
const MAX_CONFIG_BYTES = 64 * 1024;
const PART = /^[a-z]{1,32}$/;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** Checks every field; throws SupervisorConfigError naming the first bad one. */
export function parseSupervisorConfig(value: unknown): SupervisorConfig {
  if (typeof value !== "object" || value === null) throw new SupervisorConfigError("configuration is not an object");
  const fields = new Map<string, unknown>(Object.entries(value));
  const text = (name: string): string => {
    const field = fields.get(name);
    if (typeof field !== "string" || field === "" || field.includes("\0")) {
      throw new SupervisorConfigError(`${name} must be a non-empty string`);
    }
    return field;
  };
  const path = (name: string): string => {
    const field = text(name);
    if (!isAbsolute(field)) throw new SupervisorConfigError(`${name} must be an absolute path`);
    return field;
  };
  const id = (name: string): number | undefined => {
    const field = fields.get(name);
    if (field === undefined) return undefined;
    if (typeof field !== "number" || !Number.isInteger(field) || field < 1 || field > 0xffff_fffe) {
      throw new SupervisorConfigError(`${name} must be a numeric id other than root's`);
    }
    return field;
  };
  const environmentId = text("environmentId");
  if (!UUID.test(environmentId)) throw new SupervisorConfigError("environmentId must be a UUID");
  const socketPath = path("socketPath");
  if (Buffer.byteLength(socketPath) > MAX_SOCKET_PATH_BYTES) {
    throw new SupervisorConfigError(`socketPath is longer than ${MAX_SOCKET_PATH_BYTES} bytes`);
  }
  const [uid, gid] = [id("uid"), id("gid")];
  if ((uid === undefined) !== (gid === undefined)) throw new SupervisorConfigError("uid and gid come together");
  const part = fields.get("part") === undefined ? undefined : text("part");
  if (part !== undefined && !PART.test(part)) throw new SupervisorConfigError("part must be a plain name");
  return {
    environmentId,
    root: path("root"),
    ...(part !== undefined && { part }),
    socketPath,
    workspaceFolder: path("workspaceFolder"),
    uid,
    gid,
    userName: text("userName"),
    shell: path("shell"),
    envFile: path("envFile"),
    version: text("version"),
  };
}

/** Reads a regular file of at most `maxBytes`, never through a link or from a device. */
export function readSmallFile(path: string, maxBytes: number): string {
  const file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  try {
    const { size } = fstatSync(file);
    if (!fstatSync(file).isFile() || size > maxBytes)
      throw new Error(`${path} is not a file of at most ${maxBytes} bytes`);
    return readFileSync(file, "utf8");
  } finally {
    closeSync(file);
  }
}

/** Writes a file of mode 0600 that readers see whole or not at all. */
export function writeFileAtomically(path: string, content: string): void {
  const temporary = `${path}.${randomBytes(6).toString("hex")}`;
  try {
    writeFileSync(temporary, content, { flag: "wx", mode: 0o600 });
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
}

export function readSupervisorConfig(path: string): SupervisorConfig {
  let value: unknown;
  try {
    value = JSON.parse(readSmallFile(path, MAX_CONFIG_BYTES));
  } catch (error) {
    throw new SupervisorConfigError(`configuration cannot be read: ${error instanceof Error ? error.message : error}`);
  }
  return parseSupervisorConfig(value);
}

export function writeSupervisorConfig(path: string, config: SupervisorConfig): void {
  writeFileAtomically(path, JSON.stringify(parseSupervisorConfig(config)));
}
