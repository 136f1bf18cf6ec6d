import { once } from "node:events";
import { create } from "@bufbuild/protobuf";
import type { DesiredEnvironment } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  type EnvironmentSpec,
  EnvironmentStatus_Machine_VersionsSchema,
  EnvironmentStatus_MachineSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import { classSettings } from "./classes.ts";
import { writeLauncher } from "./launcher.ts";
import {
  adoptSupervisor,
  baseVariables,
  changeOwner,
  makeFolders,
  makeRoot,
  markContained,
  prepareGroup,
  startSupervisor,
  writeToken,
  writeVariables,
} from "./machine.ts";
import { allOf, SideWork } from "./side-work.ts";
import { type EnvironmentSite, textOf } from "./site.ts";
import { enabledAgents, enabledRules, startedStatus } from "./status.ts";
import { isWornOut, LOST_TOO_OFTEN, recentRestarts } from "./supervision.ts";
import { ANOTHER_SERVES, SupervisorStartError } from "./supervisor/launch.ts";
import type { SupervisorState } from "./supervisor/private-http.ts";
import { bootId, isAlive, userOf } from "./supervisor/processes.ts";
import { distinctUid, ensureUser, type Inhabitant, type UnixUser } from "./users.ts";

// Steps that bring the machine of an environment up and keep it up.

/** Begins the start that the specification asks for; what an earlier one left running ends. */
export async function beginStart(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  mayRun: boolean,
  signal: AbortSignal,
): Promise<void> {
  if (mayRun) await site.endProcesses(false, signal);
  await makeRoot(site.paths);
  site.onDisk = true;
  site.supervision.reset();
  site.sections.endAll(LogSectionOutcome.CANCELLED);
  site.log.live = true;
  site.sections.open("machine");
  await site.edit((record) => {
    record.status = startedStatus(record.status, spec, record.content.session);
    record.restarts = [];
    record.gatesPassedSession = "";
    record.secretVariables = "";
    delete record.supervisor;
  });
}

/** What is to be done about a machine besides bringing it up. */
export interface MachineWork {
  onState(state: SupervisorState): void;
  /**
   * Needs the user, its folders and its variables, and not the supervisor: it is done while that one starts. What it
   * throws is not the machine's failure.
   */
  meanwhile(signal: AbortSignal): Promise<void>;
}

/** Brings the machine up, or finds it up; false if it has failed for good. */
export async function keepMachine(
  site: EnvironmentSite,
  desired: DesiredEnvironment,
  spec: EnvironmentSpec,
  work: MachineWork,
  signal: AbortSignal,
): Promise<boolean> {
  const wasUp = site.machinePhase === MachinePhase.RUNNING;
  if (wasUp && ((await site.supervision.isPresent(work.onState)) || (await adopt(site)))) return true;
  if (wasUp && !(await recover(site, signal))) return false;
  const [token, user] = await allOf(
    environmentToken(site, spec, signal),
    attempt(site, () => prepareMachine(site), signal),
  );
  if (!user) return false;
  let meanwhile: SideWork | undefined;
  const isUp = await attempt(
    site,
    async () => {
      await endow(site, desired, user, token);
      signal.throwIfAborted();
      if (site.sections.isOpen("machine")) site.log.hold();
      const view = Promise.withResolvers<void>();
      // What it runs as the environment's user must see what that may see.
      meanwhile = new SideWork(async (ends) => {
        if (!ends.aborted) await Promise.race([view.promise, once(ends, "abort")]);
        ends.throwIfAborted();
        await work.meanwhile(ends);
      }, signal);
      await startMachine(site, spec, user, meanwhile, view.resolve, signal);
      return true;
    },
    signal,
  );
  await meanwhile?.done;
  return isUp ?? false;
}

/** Undefined if the machine has failed for good with it. */
async function attempt<T>(site: EnvironmentSite, work: () => Promise<T>, signal: AbortSignal): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    // A machine that was up has more tries. One that an earlier runner process has begun to start is found the next time.
    const isStarted = error instanceof SupervisorStartError && error.code === ANOTHER_SERVES;
    if (signal.aborted || isStarted || site.machinePhase === MachinePhase.RUNNING) throw error;
    await site.endProcesses(false, signal);
    site.sections.endAll(LogSectionOutcome.FAILURE);
    await site.failMachine(`the machine could not be started: ${textOf(error)}`);
    return undefined;
  }
}

/** Makes the user and its folders. */
async function prepareMachine(site: EnvironmentSite): Promise<Inhabitant> {
  const user: Inhabitant = { ...(await keepUser(site)), inside: site.supervision.inside };
  await makeFolders(site.paths, user);
  const hasLauncher = await writeLauncher(site.paths, user);
  if (site.machinePhase === MachinePhase.CREATING) {
    site.log.write(user.own ? `User ${user.name} and folders are ready` : "Folders are ready");
    if (!hasLauncher) site.log.write(`Without the command berth: ${user.name} cannot read the program of the runner`);
    await site.edit(({ status }) => {
      if (status.machine) status.machine.phase = MachinePhase.STARTING;
    });
  }
  await site.endStrayGit();
  return user;
}

/** What processes of the environment find, and the limits that they will have. */
async function endow(
  site: EnvironmentSite,
  { environmentClass }: DesiredEnvironment,
  user: UnixUser,
  token: string,
): Promise<void> {
  const { host, id, paths } = site;
  const { limits, inContainer } = classSettings(host.schema, environmentClass);
  await allOf(
    writeToken(paths, user, token),
    writeEnvironmentVariables(site, user, token),
    prepareGroup(host, id, limits),
    markContained(paths, inContainer),
  );
}

async function startMachine(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  user: Inhabitant,
  meanwhile: SideWork,
  onView: () => void,
  signal: AbortSignal,
): Promise<void> {
  const { host, id, paths, folder, record } = site;
  try {
    const supervisor = await host.startGate(async () => {
      signal.throwIfAborted();
      const known = await adoptSupervisor(id, paths, user, folder, record.supervisor);
      if (known) return known;
      if (!host.sandbox) onView();
      return await startSupervisor(host, id, paths, user, folder, (namespaces) => {
        site.supervision.enter(namespaces);
        onView();
      });
    });
    site.supervision.use(supervisor);
    onView();
    site.log.release(() => {
      if (site.sections.isOpen("machine")) site.log.write("The supervisor answers");
      site.sections.end("machine", LogSectionOutcome.SUCCESS);
    });
    await site.edit((record) => {
      record.supervisor = supervisor.process;
      const { version: supervisorVersion, commit: supervisorCommit } = host.program;
      const versions = create(EnvironmentStatus_Machine_VersionsSchema, { supervisorVersion, supervisorCommit });
      const machine = record.status.machine ?? create(EnvironmentStatus_MachineSchema);
      const warningMessage = machineWarnings(site, user, spec);
      record.status.machine = { ...machine, phase: MachinePhase.RUNNING, versions, warningMessage };
    });
    // The content may have come while nobody could be told.
    if (site.folder !== folder) await site.supervision.setWorkspaceFolder(site.folder);
  } catch (error) {
    await meanwhile.cancel();
    const outcome = signal.aborted ? LogSectionOutcome.CANCELLED : LogSectionOutcome.FAILURE;
    site.log.release(() => site.sections.end("machine", outcome));
    throw error;
  }
}

/** The user of the environment. Where its account was lost and its id given away, its files get the new owner. */
async function keepUser(site: EnvironmentSite): Promise<UnixUser> {
  const before = site.record.user;
  const user = await ensureUser(site.id, site.paths.home, site.host.reservedUids(site.id), before);
  const isSame = before?.uid === user.uid && before.gid === user.gid && before.unlisted === user.unlisted;
  if (isSame) return user;
  if (before?.own && before.uid !== user.uid) await changeOwner(site.paths, before, user);
  await site.edit((record) => {
    record.user = user;
  });
  return user;
}

export async function writeEnvironmentVariables(site: EnvironmentSite, user: UnixUser, token: string): Promise<void> {
  const base = await baseVariables(site.host, site.id, site.paths, user, token);
  await writeVariables(site.paths, user, { ...site.record.variables, ...base });
}

/** Everything about the machine that people should know. */
export function machineWarnings(site: EnvironmentSite, user: UnixUser, spec: EnvironmentSpec): string {
  const { host, ssh } = site;
  const [rules, agents] = [enabledRules(spec.kernelControlsConfig), enabledAgents(host.policies)];
  const warnings = [
    isolationWarning(site, user),
    user.unlisted ? "the user of the environment has no name on this host: no account could be made" : "",
    host.controlGroups ? "" : "CPU and memory limits are not enforced on this host",
    rules.length > 0 ? `kernel controls are not enforced: ${rules.join(", ")}` : "",
    agents.length > 0 ? `security agents do not run here: ${agents.join(", ")}` : "",
    spec.sshPublicKeys.length > 0 ? ssh.problem : "",
  ];
  return warnings.filter(Boolean).join("; ");
}

/** What other environments can see or do, and why. */
function isolationWarning({ host, record }: EnvironmentSite, user: UnixUser): string {
  const started = "it was started without bubblewrap, until its next start";
  const reason = record.supervisor?.apart ? "" : host.sandboxProblem || started;
  if (!user.own && reason) return `no isolation between environments: the runner does not run as root, and ${reason}`;
  if (!user.own) {
    return "little isolation between environments: the runner does not run as root, so that their processes see each other's command lines, can end each other, and read what its user can read";
  }
  if (reason) return `files in /tmp and command lines are shared between environments: ${reason}`;
  return host.sandbox?.hidesProcesses === false
    ? "command lines are shared between environments: this host cannot hide processes"
    : "";
}

/** Token of this start. Whatever keeps the control plane from giving one is tried again later. */
async function environmentToken(site: EnvironmentSite, spec: EnvironmentSpec, signal: AbortSignal): Promise<string> {
  const machineSession = spec.machine?.session ?? "";
  if (site.record.token?.session === machineSession) return site.record.token.text;
  const request = { environmentId: site.id, machineSession };
  const { token } = await site.host.controlPlane.control.createEnvironmentToken(request, { signal });
  await site.edit((record) => {
    record.token = { session: machineSession, text: token };
  });
  return token;
}

/** Takes over the supervisor that an earlier runner process left. */
export async function adopt(site: EnvironmentSite): Promise<boolean> {
  const { user, supervisor } = site.record;
  if (!user) return false;
  const found = await adoptSupervisor(site.id, site.paths, user, site.folder, supervisor);
  if (!found) return false;
  site.supervision.use(found);
  await site.edit((record) => {
    record.supervisor = found.process;
  });
  return true;
}

/**
 * The supervisor is gone without having been asked. A new one takes over what still runs; if none comes up within
 * 30 s, or the host was restarted, the machine is lost and starts anew. False after too many attempts.
 */
async function recover(site: EnvironmentSite, signal: AbortSignal): Promise<boolean> {
  const { supervisor, restarts } = site.record;
  const now = Date.now();
  const { isNews, isLost } = site.supervision.missed();
  const sameBoot = supervisor?.bootId === bootId();
  if (sameBoot && isAlive(supervisor)) killHung(supervisor.pid, await distinctUid(site.id, site.record.user));
  if (isNews) {
    site.host.log.warn(
      { environmentId: site.id, restarts: restarts.length },
      "the supervisor of an environment is gone",
    );
    if (isWornOut(restarts, now)) {
      await site.endProcesses(false, signal);
      await site.failMachine(LOST_TOO_OFTEN);
      return false;
    }
    await site.edit((record) => {
      record.restarts = [...recentRestarts(restarts, now), now];
    });
  }
  if (sameBoot && !isLost) return true;
  await site.endProcesses(false, signal);
  await site.edit(({ status }) => {
    if (status.machine) status.machine.phase = MachinePhase.STARTING;
  });
  return true;
}

/** Ends a supervisor that lives but does not answer, if its pid is still that of a process of the environment. */
function killHung(pid: number, uid: number | undefined): void {
  try {
    if (uid === undefined || userOf(pid) === uid) process.kill(pid, "SIGKILL");
  } catch {
    // Gone meanwhile.
  }
}
