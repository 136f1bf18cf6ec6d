import { create } from "@bufbuild/protobuf";
import { ConnectError } from "@connectrpc/connect";
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
  baseVariables,
  changeOwner,
  makeFolders,
  makeRoot,
  markContained,
  prepareGroup,
  writeToken,
  writeVariables,
} from "./machine.ts";
import { adoptSupervisor, arrangeSupervisor, type Supervisor, startSupervisor } from "./machine-supervisor.ts";
import { allOf, SideWork, unheard, unlessOver } from "./side-work.ts";
import { type EnvironmentSite, textOf } from "./site.ts";
import { enabledAgents, enabledRules, startedStatus } from "./status.ts";
import { isWornOut, LOST_TOO_OFTEN, recentRestarts } from "./supervision.ts";
import { ANOTHER_SERVES, endWaiting, SupervisorStartError } from "./supervisor/launch.ts";
import type { Namespaces } from "./supervisor/namespaces.ts";
import type { SupervisorState } from "./supervisor/private-http.ts";
import { bootId, isAlive, userOf } from "./supervisor/processes.ts";
import { claimUser, distinctUid, type UnixUser, UserTakenError } from "./users.ts";

// Steps that bring the machine of an environment up and keep it up.

/** Begins the start that the specification asks for; what an earlier one left running ends. */
export async function beginStart(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  mayRun: boolean,
  signal: AbortSignal,
): Promise<void> {
  if (mayRun) await site.endProcesses(false, signal);
  makeRoot(site.paths);
  site.onDisk = true;
  site.supervision.reset();
  site.sections.endAll(LogSectionOutcome.CANCELLED);
  site.log.live = true;
  site.sections.open("machine");
  site.note((record) => {
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
   * Needs the folders of the user, and not the supervisor: it is done while that one starts. What needs the account or
   * its variables waits for `endowed`. What it throws is not the machine's failure.
   */
  meanwhile(endowed: Promise<void>, signal: AbortSignal): Promise<void>;
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
  const token = unheard(environmentToken(site, spec, signal));
  const claimed = await attempt(site, () => prepareMachine(site), signal);
  if (!claimed) return false;
  if (site.sections.isOpen("machine")) site.log.hold();
  const start = new MachineStart(site, desired, spec, { ...claimed, token });
  const meanwhile = new SideWork((ends) => start.accompany(work, ends), signal);
  const bringUp = async () => {
    try {
      signal.throwIfAborted();
      await start.run();
      return true;
    } catch (error) {
      await meanwhile.cancel();
      await Promise.allSettled([token, claimed.settled]);
      const outcome = signal.aborted ? LogSectionOutcome.CANCELLED : LogSectionOutcome.FAILURE;
      // With the next attempt the machine goes on, and the rest is told after it.
      if (signal.aborted || !isPassing(error)) site.log.release(() => site.sections.end("machine", outcome));
      // Nothing of it may run on as a user that is somebody else.
      if (error instanceof UserTakenError) await site.endProcesses(false, signal);
      throw error;
    }
  };
  const isUp = await attempt(site, () => site.host.startGate(bringUp), signal);
  await meanwhile.done;
  return isUp ?? false;
}

/** What says nothing about the machine, and is tried again. */
const isPassing = (error: unknown) => error instanceof ConnectError || error instanceof UserTakenError;

/** Undefined if the machine has failed for good with it. */
async function attempt<T>(site: EnvironmentSite, work: () => Promise<T>, signal: AbortSignal): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    // A machine that was up has more tries. One that an earlier runner process has begun to start is found the next time.
    const isStarted = error instanceof SupervisorStartError && error.code === ANOTHER_SERVES;
    if (signal.aborted || isStarted || isPassing(error) || site.machinePhase === MachinePhase.RUNNING) throw error;
    await site.endProcesses(false, signal);
    site.sections.endAll(LogSectionOutcome.FAILURE);
    await site.failMachine(`the machine could not be started: ${textOf(error)}`);
    return undefined;
  }
}

/** Makes the user, whose account may be on its way, and its folders. */
async function prepareMachine(site: EnvironmentSite): Promise<MachineUser> {
  const machineUser = await keepUser(site);
  const { user } = machineUser;
  if (site.machinePhase === MachinePhase.CREATING) {
    site.log.write(user.own ? `User ${user.name} and folders are ready` : "Folders are ready");
    site.note(({ status }) => {
      if (status.machine) status.machine.phase = MachinePhase.STARTING;
    });
  }
  await site.endStrayGit();
  return machineUser;
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
  const [hasLauncher] = await allOf(
    writeLauncher(paths, user),
    writeToken(paths, user, token),
    writeEnvironmentVariables(site, user, token),
    prepareGroup(host, id, limits),
    markContained(paths, inContainer),
  );
  const isNews = !hasLauncher && site.sections.isOpen("machine");
  if (isNews) site.log.write(`Without the command berth: ${user.name} cannot read the program of the runner`);
}

/** What a start needs besides folders. */
type Given = MachineUser & { token: Promise<string> };

/** One attempt to bring a machine up whose folders are there. */
class MachineStart {
  readonly #site: EnvironmentSite;
  readonly #desired: DesiredEnvironment;
  readonly #spec: EnvironmentSpec;
  readonly #given: Given;
  readonly #view = Promise.withResolvers<void>();
  readonly #endowed = Promise.withResolvers<void>();

  constructor(site: EnvironmentSite, desired: DesiredEnvironment, spec: EnvironmentSpec, given: Given) {
    this.#site = site;
    this.#desired = desired;
    this.#spec = spec;
    this.#given = given;
  }

  /** What is done meanwhile: run as the environment's user, it must see what that may see. */
  async accompany(work: MachineWork, ends: AbortSignal): Promise<void> {
    await unlessOver(this.#view.promise, ends);
    await work.meanwhile(unheard(unlessOver(this.#endowed.promise, ends)), ends);
  }

  async run(): Promise<void> {
    const { host, id, paths, folder, record } = this.#site;
    const { user, settled, token } = this.#given;
    const present = await adoptSupervisor(id, paths, user, folder, record.supervisor);
    const arranged = present ? undefined : await arrangeSupervisor(host, paths, user);
    if (arranged || !host.sandbox) this.#enter(arranged?.namespaces);
    try {
      const [text] = await allOf(token, settled);
      await endow(this.#site, this.#desired, user, text);
      this.#endowed.resolve();
    } catch (error) {
      if (arranged) await endWaiting(arranged.waiting);
      throw error;
    }
    const known = await settled;
    const inhabitant = { ...known, inside: this.#site.supervision.inside };
    const enter = (namespaces: Namespaces | undefined) => this.#enter(namespaces);
    await this.#use(present ?? (await startSupervisor(host, id, paths, inhabitant, folder, enter, arranged)), known);
    // The content may have come while nobody could be told.
    if (this.#site.folder !== folder) await this.#site.supervision.setWorkspaceFolder(this.#site.folder);
  }

  /** Its processes run there from now on. */
  #enter(namespaces: Namespaces | undefined): void {
    this.#site.supervision.enter(namespaces);
    this.#view.resolve();
  }

  async #use(supervisor: Supervisor, user: UnixUser): Promise<void> {
    const { host, sections, log } = this.#site;
    this.#site.supervision.use(supervisor);
    this.#view.resolve();
    log.release(() => {
      if (sections.isOpen("machine")) log.write("The supervisor answers");
      sections.end("machine", LogSectionOutcome.SUCCESS);
    });
    await this.#site.edit((record) => {
      record.supervisor = supervisor.process;
      const { version: supervisorVersion, commit: supervisorCommit } = host.program;
      const versions = create(EnvironmentStatus_Machine_VersionsSchema, { supervisorVersion, supervisorCommit });
      const machine = record.status.machine ?? create(EnvironmentStatus_MachineSchema);
      const warningMessage = machineWarnings(this.#site, user, this.#spec);
      record.status.machine = { ...machine, phase: MachinePhase.RUNNING, versions, warningMessage };
    });
  }
}

/** The user of a machine, and when its account is there. */
interface MachineUser {
  user: UnixUser;
  settled: Promise<UnixUser>;
}

/** The user of the environment. Where its account was lost and its id given away, its files get the new owner. */
async function keepUser(site: EnvironmentSite): Promise<MachineUser> {
  const before = site.record.user;
  const keep = (user: UnixUser) =>
    site.edit((record) => {
      record.user = user;
    });
  const { user, settle } = await claimUser(site.id, site.paths.home, site.host.reservedUids(site.id), before);
  if (before?.own && before.uid !== user.uid) await changeOwner(site.paths, before, user);
  const isSame = before?.uid === user.uid && before.gid === user.gid && before.unlisted === user.unlisted;
  // Its files must be known by its id before there are any; folders are made anew.
  const written = isSame ? undefined : keep(user);
  // All this takes as long as the disk does.
  makeFolders(site.paths, user);
  if (!site.host.sandbox) site.shell?.prepare();
  const settled = settle().then(async (final) => {
    if (final.unlisted !== user.unlisted) await keep(final);
    return final;
  });
  unheard(settled);
  await written;
  return { user, settled };
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
  site.note((record) => {
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
