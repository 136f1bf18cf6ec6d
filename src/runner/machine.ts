import { chmod, mkdir, realpath, rename, rm, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { gitAuthorities } from "../scm/git.ts";
import type { Limits } from "./classes.ts";
import { commandPath, runCommand } from "./commands.ts";
import { exists, makeFolder, type Owner, removeTree, writeAtomically } from "./files.ts";
import type { Host } from "./host.ts";
import {
  compiledFolder,
  type EnvironmentPaths,
  environmentPaths,
  environmentsFolder,
  forgetSocket,
  quarantineFolder,
  runtimeFolder,
  trashFolder,
} from "./paths.ts";
import type { RecordedProcess } from "./record.ts";
import { removeScratch } from "./sandbox/sandbox.ts";
import { CONTAINED } from "./supervisor/config.ts";
import type { RunAs } from "./supervisor/namespaces.ts";
import { bootId, isAlive, killEnvironmentProcesses, type ProcessEntry } from "./supervisor/processes.ts";
import { distinctUid, type Inhabitant, loginShell, removeUser, type UnixUser } from "./users.ts";

// The machine of an environment on a plain Linux host: a user, folders, and a supervisor process with all it starts.

/** How long a supervisor may take to end what it runs; beyond that everything is killed. */
// Services have two minutes to end by their own rules.
const SUPERVISOR_GRACE_MS = 150_000;
const KILL_DEADLINE_MS = 60_000;
const OWNER_DEADLINE_MS = 5 * 60_000;
const POLL_MS = 50;

const isRoot = () => process.getuid?.() === 0;

/** Owner of files that are the environment's; undefined if that is the runner. */
export const ownerOf = (user: UnixUser): Owner | undefined => (user.own ? { uid: user.uid, gid: user.gid } : undefined);

/** How commands of an environment are run. */
export const commandUser = (user: Inhabitant): RunAs => ({ ...ownerOf(user), inside: user.inside, shell: user.shell });

/**
 * Makes the folders of the runner and returns the real path of the data folder. As root, users of environments pass
 * through them and see nothing.
 */
export async function prepareDataDir(path: string): Promise<string> {
  const passable = isRoot() ? 0o711 : 0o700;
  await mkdir(path, { recursive: true, mode: passable });
  const dataDir = await realpath(path);
  makeFolder(dataDir, passable);
  if (isRoot()) await makePassable(dataDir);
  makeFolder(environmentsFolder(dataDir), passable);
  makeFolder(quarantineFolder(dataDir), 0o700);
  makeFolder(trashFolder(dataDir), 0o700);
  makeFolder(compiledFolder(dataDir), 0o700);
  makeFolder(runtimeFolder(dataDir), 0o755);
  return dataDir;
}

/**
 * Lets users of environments through to the data folder. The folder around it is opened for passing, which shows
 * nothing of what is in it; any other one further up is not the runner's to change.
 */
async function makePassable(dataDir: string): Promise<void> {
  const around = dirname(dataDir);
  for (let folder = around; ; folder = dirname(folder)) {
    const { mode, uid } = await stat(folder);
    if ((mode & 0o001) === 0) {
      if (folder !== around || uid !== 0) {
        throw new Error(`${folder} cannot be passed by the users of environments: choose another data folder`);
      }
      await chmod(folder, (mode & 0o7777) | 0o011);
    }
    if (folder === dirname(folder)) return;
  }
}

/** Folder of one environment, still without what belongs to its user. */
export function makeRoot(paths: EnvironmentPaths): void {
  makeFolder(paths.root, 0o700);
}

export function makeFolders(paths: EnvironmentPaths, user: UnixUser): void {
  makeFolder(paths.root, user.own ? 0o710 : 0o700, user.own ? { uid: 0, gid: user.gid } : undefined);
  const folders = [paths.workspace, paths.home, paths.secrets, paths.logs, paths.run, paths.ssh];
  for (const folder of folders) makeFolder(folder, 0o700, ownerOf(user));
}

/**
 * Gives everything that belongs to the environment's user to another user, links themselves instead of their targets.
 * A hard link to somebody else's file stays theirs.
 */
export async function changeOwner(paths: EnvironmentPaths, before: UnixUser, { uid, gid }: UnixUser): Promise<void> {
  const own = [paths.workspace, paths.home, paths.secrets, paths.logs, paths.run, paths.ssh];
  const scratch = await Promise.all(
    [paths.tmp, paths.varTmp, paths.shm].map(async (path) => ((await exists(path)) ? [path] : [])),
  );
  const folders = [...own, ...scratch.flat()];
  const args = ["-R", "-P", "-h", `--from=${before.uid}`, "--", `${uid}:${gid}`, ...folders];
  const { code, stderr } = await runCommand("chown", args, { timeoutMs: OWNER_DEADLINE_MS });
  if (code !== 0) throw new Error(`files could not be given to their user: ${stderr.slice(0, 300)}`);
}

/** Tells the supervisor whether the dev container has to have a container of its own, in a folder that it only reads. */
export async function markContained(paths: EnvironmentPaths, inContainer: boolean): Promise<void> {
  const mark = join(paths.root, CONTAINED);
  if (!inContainer) return await rm(mark, { force: true });
  makeFolder(paths.container, 0o755);
  await writeAtomically(mark, "");
}

/** Variables that every process of an environment starts with. */
export async function baseVariables(
  host: Host,
  environmentId: string,
  paths: EnvironmentPaths,
  user: UnixUser,
  token: string,
): Promise<Record<string, string>> {
  const api = `${host.publicApiUrl}/api`;
  return {
    HOME: paths.home,
    USER: user.name,
    LOGNAME: user.name,
    SHELL: loginShell(),
    PATH: `${commandPath()}:${paths.bin}`,
    LANG: "C.UTF-8",
    ...gitAuthorities(),
    BERTH_ENVIRONMENT_ID: environmentId,
    GITPOD_ENVIRONMENT_ID: environmentId,
    ONA_API_KEY: token,
    GITPOD_API_KEY: token,
    ONA_BASE_URL: api,
    GITPOD_BASE_URL: api,
  };
}

export async function writeVariables(
  paths: EnvironmentPaths,
  user: UnixUser,
  variables: Readonly<Record<string, string>>,
): Promise<void> {
  await writeAtomically(paths.variables, JSON.stringify(variables), ownerOf(user));
}

export async function writeToken(paths: EnvironmentPaths, user: UnixUser, token: string): Promise<void> {
  await writeAtomically(paths.token, token, ownerOf(user));
}

/** Sets the limits of the class for all processes to come, where they can be enforced. */
export async function prepareGroup(host: Host, environmentId: string, limits: Limits): Promise<void> {
  await host.controlGroups?.prepare(environmentId, limits);
}

function kill(supervisor: RecordedProcess): void {
  try {
    if (supervisor.bootId === bootId() && isAlive(supervisor)) process.kill(supervisor.pid, "SIGKILL");
  } catch {
    // Gone meanwhile.
  }
}

/** Asks the supervisor to end what it runs; returns when it is gone, the time is over or the signal fires. */
async function endGracefully(supervisor: RecordedProcess, signal: AbortSignal): Promise<void> {
  const deadline = Date.now() + SUPERVISOR_GRACE_MS;
  const present = () => supervisor.bootId === bootId() && isAlive(supervisor);
  if (!present()) return;
  try {
    process.kill(supervisor.pid, "SIGTERM");
  } catch {
    return;
  }
  while (present() && Date.now() < deadline && !signal.aborted) await delay(POLL_MS);
}

/**
 * Ends every process of an environment, gracefully first if so asked and there is a supervisor to do it, then its
 * container. Returns those that could not be ended: empty on success.
 */
export async function stopProcesses(
  host: Host,
  environmentId: string,
  user: UnixUser | undefined,
  supervisor: RecordedProcess | undefined,
  gracefully: boolean,
  endContainer: () => Promise<void>,
  signal: AbortSignal,
): Promise<ProcessEntry[]> {
  if (supervisor && gracefully) await endGracefully(supervisor, signal);
  await endContainer();
  const uid = await distinctUid(environmentId, user);
  // One that has waited for its environment shows whose it is by its user alone.
  if (uid === undefined && supervisor) kill(supervisor);
  const left = await killEnvironmentProcesses({ environmentId, uid, deadlineMs: KILL_DEADLINE_MS });
  if (left.length > 0) return left;
  await host.controlGroups?.remove(environmentId);
  // What cannot be removed now is with the next start, or with the environment.
  await removeScratch(environmentPaths(host.config.dataDir, environmentId)).catch((error: unknown) => {
    host.log.warn({ environmentId, error: String(error) }, "temporary files of an environment could not be removed");
  });
  return left;
}

/** Takes the folder of an environment out of the way at once, then erases it and its user. */
export async function eraseEnvironment(
  host: Host,
  environmentId: string,
  paths: EnvironmentPaths,
  user: UnixUser | undefined,
): Promise<void> {
  await forgetSocket(paths);
  const trash = join(trashFolder(host.config.dataDir), environmentId);
  if (await exists(paths.root)) {
    await removeTree(trash);
    await rename(paths.root, trash);
  }
  // The folder goes last: whatever a crash leaves is found by it.
  await removeUser(environmentId, user);
  await removeTree(trash);
}

/** Sets the folder of an environment that the control plane does not know aside. */
export async function quarantine(host: Host, environmentId: string, paths: EnvironmentPaths): Promise<void> {
  await forgetSocket(paths);
  if (!(await exists(paths.root))) return;
  const aside = join(quarantineFolder(host.config.dataDir), `${environmentId}.${Date.now()}`);
  await rename(paths.root, aside);
  host.log.warn(
    { environmentId, folder: basename(aside) },
    "files of an unknown environment were set aside for 24 hours",
  );
}
