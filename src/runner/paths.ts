import { createHash } from "node:crypto";
import { lstat, mkdir, readlink, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { errnoOf } from "./files.ts";

// The folder of an environment belongs to the runner, so that its user cannot exchange what lies directly in it; the
// folders below belong to the user, and nothing of the runner's may be read or written through them unguarded.

const MAX_SOCKET_PATH_BYTES = 107;

/** Where an environment keeps what. */
export interface EnvironmentPaths {
  root: string;
  /** The environment's user's own. */
  workspace: string;
  home: string;
  secrets: string;
  /** Files whose own path lies outside of the environment. */
  secretFiles: string;
  logs: string;
  run: string;
  ssh: string;
  /** Stand in for folders that everybody on the host shares, while the environment runs. */
  tmp: string;
  varTmp: string;
  shmRoot: string;
  shm: string;
  hostKey: string;
  authorizedKeys: string;
  sshLog: string;
  /** What the SSH server reads; belongs to the user, in a folder that does not. */
  sshConfig: string;
  sshSession: string;
  /** The runner's own. */
  /** A folder for each container, which only the environment's user fills. */
  containers: string;
  bin: string;
  record: string;
  log: string;
  supervisorConfig: string;
  /** Variables of its processes; belongs to the user, in a folder that does not. */
  variables: string;
  /** The environment token. */
  token: string;
  /** What a dev container sees of the runner's own. */
  container: string;
}

export const environmentsFolder = (dataDir: string) => join(dataDir, "environments");
export const quarantineFolder = (dataDir: string) => join(dataDir, "quarantine");
export const trashFolder = (dataDir: string) => join(dataDir, "trash");
/** What dev containers in containers see of the product. */
export const runtimeFolder = (dataDir: string) => join(dataDir, "container-runtime");
/** Code of the product as Node.js has compiled it; nothing is lost with it. */
export const compiledFolder = (dataDir: string) => join(dataDir, "compiled");

/** What the program of a container engine keeps. */
export const engineFolder = (dataDir: string) => join(dataDir, "engine");

export function environmentPaths(dataDir: string, environmentId: string): EnvironmentPaths {
  const root = join(environmentsFolder(dataDir), environmentId);
  const run = join(root, "run");
  // Memory, which a folder on a disk is not.
  const shmRoot = join("/dev/shm", `berth-${environmentId}`);
  return {
    root,
    workspace: join(root, "workspace"),
    home: join(root, "home"),
    secrets: join(root, "secrets"),
    secretFiles: join(root, "secrets", "files"),
    logs: join(root, "logs"),
    run,
    ssh: join(root, "ssh"),
    tmp: join(root, "tmp"),
    varTmp: join(root, "var-tmp"),
    shmRoot,
    shm: join(shmRoot, "shm"),
    hostKey: join(root, "ssh", "host_key"),
    authorizedKeys: join(root, "ssh", "authorized_keys"),
    sshLog: join(root, "logs", "sshd.log"),
    sshConfig: join(root, "sshd_config"),
    sshSession: join(root, "ssh-session"),
    containers: join(root, "containers"),
    bin: join(root, "bin"),
    record: join(root, "state.json"),
    log: join(root, "environment.log"),
    supervisorConfig: join(root, "supervisor.json"),
    variables: join(root, "variables.json"),
    token: join(run, "token"),
    container: join(root, "container"),
  };
}

/** A short folder for links to long paths, which only the runner can write. */
async function aliasFolder(): Promise<string> {
  const uid = process.getuid?.() ?? 0;
  const path = uid === 0 ? "/run/berth" : join(process.env.XDG_RUNTIME_DIR || tmpdir(), `berth-${uid}`);
  await mkdir(path, { mode: 0o711 }).catch((error: unknown) => {
    if (errnoOf(error) !== "EEXIST") throw error;
  });
  const found = await lstat(path);
  if (!found.isDirectory() || found.uid !== uid || (found.mode & 0o022) !== 0) {
    throw new Error(`${path} does not belong to the runner alone`);
  }
  return path;
}

/** A second place in a dev container of the folder with the socket, since the path of a socket must be short. */
export const CONTAINER_RUN_FOLDER = "/run/berth";
/** Name of the socket of the supervisor in a dev container. */
export const CONTAINER_SOCKET = "container.sock";

/**
 * Path of a supervisor's socket on the host: the kernel takes 107 bytes at most, so a deep data folder is reached by a
 * link.
 */
export async function supervisorSocket({ run }: EnvironmentPaths, name = "supervisor.sock"): Promise<string> {
  const direct = join(run, name);
  if (Buffer.byteLength(direct) <= MAX_SOCKET_PATH_BYTES) return direct;
  const alias = join(await aliasFolder(), createHash("sha256").update(run).digest("hex").slice(0, 16));
  if ((await readlink(alias).catch(() => undefined)) !== run) {
    await rm(alias, { force: true });
    await symlink(run, alias);
  }
  return join(alias, name);
}

/** Removes the link that a deep data folder needed. */
export async function forgetSocket({ run }: EnvironmentPaths): Promise<void> {
  if (Buffer.byteLength(join(run, "supervisor.sock")) <= MAX_SOCKET_PATH_BYTES) return;
  await rm(join(await aliasFolder(), createHash("sha256").update(run).digest("hex").slice(0, 16)), { force: true });
}
