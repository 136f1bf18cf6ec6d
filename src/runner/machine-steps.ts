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
  startSupervisor,
  writeToken,
  writeVariables,
} from "./machine.ts";
import { type EnvironmentSite, textOf } from "./site.ts";
import { enabledRules, startedStatus } from "./status.ts";
import { isWornOut, LOST_TOO_OFTEN, recentRestarts } from "./supervision.ts";
import { ANOTHER_SERVES, SupervisorStartError } from "./supervisor/launch.ts";
import type { SupervisorState } from "./supervisor/private-http.ts";
import { bootId, isAlive, userOf } from "./supervisor/processes.ts";
import { distinctUid, ensureUser, type UnixUser } from "./users.ts";

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

/** Brings the machine up, or finds it up; false if it has failed for good. */
export async function keepMachine(
  site: EnvironmentSite,
  desired: DesiredEnvironment,
  spec: EnvironmentSpec,
  onState: (state: SupervisorState) => void,
  signal: AbortSignal,
): Promise<boolean> {
  const wasUp = site.machinePhase === MachinePhase.RUNNING;
  if (wasUp && ((await site.supervision.isPresent(onState)) || (await adopt(site)))) return true;
  if (wasUp && !(await recover(site, signal))) return false;
  const token = await environmentToken(site, spec, signal);
  try {
    await site.host.startGate(() => bringUp(site, desired, spec, token, signal));
    return true;
  } catch (error) {
    // A machine that was up has more tries. One that an earlier runner process has begun to start is found the next time.
    const isStarted = error instanceof SupervisorStartError && error.code === ANOTHER_SERVES;
    if (signal.aborted || isStarted || site.machinePhase === MachinePhase.RUNNING) throw error;
    await site.endProcesses(false, signal);
    site.sections.endAll(LogSectionOutcome.FAILURE);
    await site.failMachine(`the machine could not be started: ${textOf(error)}`);
    return false;
  }
}

async function bringUp(
  site: EnvironmentSite,
  desired: DesiredEnvironment,
  spec: EnvironmentSpec,
  token: string,
  signal: AbortSignal,
): Promise<void> {
  const { host, id, paths } = site;
  signal.throwIfAborted();
  const user = await keepUser(site);
  await makeFolders(paths, user);
  const hasLauncher = await writeLauncher(paths, user);
  if (site.machinePhase === MachinePhase.CREATING) {
    site.log.write(user.own ? `User ${user.name} and folders are ready` : "Folders are ready");
    if (!hasLauncher) site.log.write(`Without the command berth: ${user.name} cannot read the program of the runner`);
    await site.edit(({ status }) => {
      if (status.machine) status.machine.phase = MachinePhase.STARTING;
    });
  }
  await site.endStrayGit();
  await writeToken(paths, user, token);
  await writeEnvironmentVariables(site, user, token);
  signal.throwIfAborted();
  const { limits } = classSettings(host.schema, desired.environmentClass);
  const supervisor =
    (await adoptSupervisor(id, paths, user, site.folder, site.record.supervisor)) ??
    (await startSupervisor(host, id, paths, user, site.folder, limits));
  site.supervision.use(supervisor);
  if (site.sections.isOpen("machine")) site.log.write("The supervisor answers");
  site.sections.end("machine", LogSectionOutcome.SUCCESS);
  await site.edit((record) => {
    record.supervisor = supervisor.process;
    const { version: supervisorVersion, commit: supervisorCommit } = host.program;
    const versions = create(EnvironmentStatus_Machine_VersionsSchema, { supervisorVersion, supervisorCommit });
    const machine = record.status.machine ?? create(EnvironmentStatus_MachineSchema);
    const warningMessage = machineWarnings(site, user, spec);
    record.status.machine = { ...machine, phase: MachinePhase.RUNNING, versions, warningMessage };
  });
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
export function machineWarnings({ host, ssh }: EnvironmentSite, user: UnixUser, spec: EnvironmentSpec): string {
  const rules = enabledRules(spec.kernelControlsConfig);
  const warnings = [
    user.own ? "" : "no isolation between environments: the runner does not run as root",
    user.unlisted ? "the user of the environment has no name on this host: no account could be made" : "",
    host.controlGroups ? "" : "CPU and memory limits are not enforced on this host",
    rules.length > 0 ? `kernel controls are not enforced: ${rules.join(", ")}` : "",
    spec.sshPublicKeys.length > 0 ? ssh.problem : "",
  ];
  return warnings.filter(Boolean).join("; ");
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
