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
  supervisorSocket,
  trashFolder,
} from "./paths.ts";
import type { RecordedProcess, RecordedSupervisor } from "./record.ts";
import { makeScratch, removeScratch, type Sandbox } from "./sandbox/sandbox.ts";
import { connectSupervisor, type SupervisorClient } from "./supervisor/client.ts";
import { CONTAINED, type SupervisorConfig } from "./supervisor/config.ts";
import type { Enclosed } from "./supervisor/enclosure.ts";
import { endWaiting, type LaunchOptions, launchSupervisor, PROGRAM } from "./supervisor/launch.ts";
import { hasOwnView, Namespaces, type RunAs } from "./supervisor/namespaces.ts";
import {
  bootId,
  environmentProcesses,
  isAlive,
  killEnvironmentProcesses,
  type ProcessEntry,
  type ProcessRef,
  readProcess,
} from "./supervisor/processes.ts";
import { liveSupervisor } from "./supervisor/record.ts";
import { distinctUid, type Inhabitant, loginShell, removeUser, type UnixUser } from "./users.ts";

// The machine of an environment on a plain Linux host: a user, folders, and a supervisor process with all it starts.

/** How long a supervisor may take to end what it runs; beyond that everything is killed. */
// Services have two minutes to end by their own rules.
const SUPERVISOR_GRACE_MS = 150_000;
const KILL_DEADLINE_MS = 60_000;
const OWNER_DEADLINE_MS = 5 * 60_000;
const COMPILE_MS = 60_000;
const ARRANGE_MS = 10_000;
const POLL_MS = 50;

/** A supervisor that answers. */
export interface Supervisor {
  process: RecordedSupervisor;
  client: SupervisorClient;
  /** What it runs in, if that is not the host as it is. */
  namespaces?: Namespaces | undefined;
}

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

/**
 * Starts the supervisor, inside the limits that were set and apart from other environments. `onView` is given what it
 * runs in before it serves.
 */
export async function startSupervisor(
  host: Host,
  environmentId: string,
  paths: EnvironmentPaths,
  user: Inhabitant,
  workspaceFolder: string,
  onView: (namespaces: Namespaces | undefined) => void,
): Promise<Supervisor> {
  const socketPath = await supervisorSocket(paths);
  const config: SupervisorConfig = {
    environmentId,
    root: paths.root,
    socketPath,
    workspaceFolder,
    ...ownerOf(user),
    userName: user.name,
    shell: loginShell(),
    envFile: paths.variables,
    version: host.program.version,
  };
  let namespaces: Namespaces | undefined;
  const { record, client } = await launchApart(host, paths, user, config, (process) => {
    namespaces = Namespaces.of(process);
    onView(namespaces);
  });
  // It has started nothing yet, so all that it ever starts is limited.
  await host.controlGroups?.add(environmentId, record.pid);
  const { pid, startTime } = record;
  return { process: { pid, startTime, bootId: bootId(), apart: host.sandbox !== undefined }, client, namespaces };
}

/**
 * Compiles what supervisors run, for those of an ordinary user: what one of them wrote would be run by the others, so
 * that they can read the result only. Never throws.
 */
export async function compileAhead(host: Host): Promise<void> {
  if (isRoot() || !host.sandbox) return;
  const env = { NODE_COMPILE_CACHE: compiledFolder(host.config.dataDir) };
  // Without a configuration it ends once everything is loaded.
  await runCommand(process.execPath, [PROGRAM], { env, timeoutMs: COMPILE_MS }).catch(() => undefined);
}

/** Launches a supervisor apart from other environments, where that can be done. */
async function launchApart(
  host: Host,
  paths: EnvironmentPaths,
  user: Inhabitant,
  config: SupervisorConfig,
  onEntered: (process: ProcessRef) => void,
) {
  const compiled = compiledFolder(host.config.dataDir);
  const launch = (more: LaunchOptions) =>
    launchSupervisor(paths.supervisorConfig, config, compiled, { onEntered, ...more });
  const waiting = user.own ? host.waitingSupervisor?.take() : undefined;
  if (!host.sandbox) return await launch({ waiting });
  await makeScratch(paths, ownerOf(user));
  const arranged = waiting && (await arrange(host.sandbox, waiting, paths, config));
  if (arranged) onEntered(arranged);
  // A user namespace keeps those outside from looking at what an earlier supervisor has left in another one.
  const left = user.own || user.inside ? undefined : await survivor(config.environmentId);
  try {
    const enclosure = await host.sandbox.enclosure(paths, config.socketPath, user.inside ?? left);
    return await launch({ waiting: arranged && waiting, enclosure });
  } finally {
    left?.close();
  }
}

/** Gives a waiting supervisor the view of its environment; undefined if it cannot be had, and it has ended then. */
async function arrange(
  sandbox: Sandbox,
  waiting: Enclosed,
  paths: EnvironmentPaths,
  config: SupervisorConfig,
): Promise<ProcessRef | undefined> {
  const found = readProcess((await waiting.entered) ?? 0);
  const inside = found && Namespaces.of(found);
  try {
    const { file, args } = await sandbox.arrangement(paths, config.socketPath);
    const isDone = inside && (await runCommand(file, args, { user: { inside }, timeoutMs: ARRANGE_MS })).code === 0;
    if (isDone) return found;
  } catch {
    // One that is started for its environment may do.
  } finally {
    inside?.close();
  }
  await endWaiting(waiting);
  return undefined;
}

/** Namespaces of the process that has run longest of those that an earlier supervisor has left. */
async function survivor(environmentId: string): Promise<Namespaces | undefined> {
  const left = (await environmentProcesses({ environmentId })).sort((a, b) => a.startTime - b.startTime);
  for (const each of left) {
    const namespaces = Namespaces.of(each);
    if (namespaces) return namespaces;
  }
  return undefined;
}

/**
 * The supervisor that an earlier runner process left, if it still answers as the one of this environment. That process
 * may have died before it could tell the folder.
 */
export async function adoptSupervisor(
  environmentId: string,
  paths: EnvironmentPaths,
  user: UnixUser,
  workspaceFolder: string,
  recorded: RecordedSupervisor | undefined,
): Promise<Supervisor | undefined> {
  const known = recorded?.bootId === bootId() && isAlive(recorded) ? recorded : undefined;
  const found = known ?? liveSupervisor(paths.root, user.own ? user.uid : undefined);
  if (!found) return undefined;
  const client = connectSupervisor(await supervisorSocket(paths), environmentId, ownerOf(user));
  try {
    const state = await client.health();
    if (state.environmentId !== environmentId || state.pid !== found.pid) return undefined;
    if (state.workspaceFolder !== workspaceFolder) await client.setWorkspaceFolder(workspaceFolder);
  } catch {
    return undefined;
  }
  const namespaces = Namespaces.of(found);
  // A view that its user has made must not be joined.
  if (!namespaces && hasOwnView(found.pid)) return undefined;
  // The runner may have a view of its own as well, and another one each time.
  const apart = known ? known.apart : namespaces !== undefined;
  const { pid, startTime } = found;
  return { process: { pid, startTime, bootId: bootId(), apart }, client, namespaces };
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
