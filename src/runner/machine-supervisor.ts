import { runCommand } from "./commands.ts";
import type { Host } from "./host.ts";
import { ownerOf } from "./machine.ts";
import { compiledFolder, type EnvironmentPaths, supervisorSocket } from "./paths.ts";
import type { RecordedSupervisor } from "./record.ts";
import { makeScratch } from "./sandbox/sandbox.ts";
import { connectSupervisor, type SupervisorClient } from "./supervisor/client.ts";
import type { SupervisorConfig } from "./supervisor/config.ts";
import type { Enclosed } from "./supervisor/enclosure.ts";
import { endWaiting, type LaunchOptions, launchSupervisor, PROGRAM } from "./supervisor/launch.ts";
import { hasOwnView, Namespaces } from "./supervisor/namespaces.ts";
import { bootId, environmentProcesses, isAlive, type ProcessRef, readProcess } from "./supervisor/processes.ts";
import { liveSupervisor } from "./supervisor/record.ts";
import { type Inhabitant, loginShell, type UnixUser } from "./users.ts";

// The supervisor of a machine: started apart from other environments, or found again.

const ARRANGE_MS = 10_000;
const COMPILE_MS = 60_000;

/** A supervisor that answers. */
export interface Supervisor {
  process: RecordedSupervisor;
  client: SupervisorClient;
  /** What it runs in, if that is not the host as it is. */
  namespaces?: Namespaces | undefined;
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
  arranged?: ArrangedSupervisor,
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
  let namespaces = arranged?.namespaces;
  const { record, client } = await launchApart(host, paths, user, config, arranged, (process) => {
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
  if (process.getuid?.() === 0 || !host.sandbox) return;
  const env = { NODE_COMPILE_CACHE: compiledFolder(host.config.dataDir) };
  // Without a configuration it ends once everything is loaded.
  await runCommand(process.execPath, [PROGRAM], { env, timeoutMs: COMPILE_MS }).catch(() => undefined);
}

/** A supervisor that waits in the view of its environment, for `startSupervisor`. */
export interface ArrangedSupervisor {
  waiting: Enclosed;
  namespaces: Namespaces;
}

/** Gives a supervisor that waits the view of an environment whose folders are there; undefined if that cannot be. */
export async function arrangeSupervisor(
  { sandbox, waitingSupervisor }: Host,
  paths: EnvironmentPaths,
  user: UnixUser,
): Promise<ArrangedSupervisor | undefined> {
  const waiting = sandbox && user.own ? waitingSupervisor?.take() : undefined;
  if (!sandbox || !waiting) return undefined;
  const found = readProcess((await waiting.entered) ?? 0);
  const namespaces = found && Namespaces.of(found);
  try {
    await makeScratch(paths, ownerOf(user));
    const { file, args } = await sandbox.arrangement(paths, await supervisorSocket(paths));
    const run = () => runCommand(file, args, { user: { inside: namespaces }, timeoutMs: ARRANGE_MS });
    if (namespaces && (await run()).code === 0) return { waiting, namespaces };
  } catch {
    // One that is started for its environment may do.
  }
  namespaces?.close();
  await endWaiting(waiting);
  return undefined;
}

/** Launches a supervisor apart from other environments, where that can be done. */
async function launchApart(
  host: Host,
  paths: EnvironmentPaths,
  user: Inhabitant,
  config: SupervisorConfig,
  arranged: ArrangedSupervisor | undefined,
  onEntered: (process: ProcessRef) => void,
) {
  const compiled = compiledFolder(host.config.dataDir);
  const launch = (more: LaunchOptions) =>
    launchSupervisor(paths.supervisorConfig, config, compiled, { onEntered, ...more });
  if (!host.sandbox) return await launch({ waiting: user.own ? host.waitingSupervisor?.take() : undefined });
  await makeScratch(paths, ownerOf(user));
  // A user namespace keeps those outside from looking at what an earlier supervisor has left in another one.
  const left = user.own || user.inside ? undefined : await survivor(config.environmentId);
  try {
    const enclosure = await host.sandbox.enclosure(paths, config.socketPath, user.inside ?? left);
    return await launch({ waiting: arranged?.waiting, enclosure });
  } finally {
    left?.close();
  }
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
