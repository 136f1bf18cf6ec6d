import { clone, create, equals } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { DesiredEnvironment } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentPhase,
  type EnvironmentSpec,
  EnvironmentSpec_AutomationsFileSchema,
  EnvironmentSpec_ContentSchema,
  EnvironmentSpec_DevContainerSchema,
  type EnvironmentStatus,
  EnvironmentStatus_ContentSchema,
  EnvironmentStatus_Machine_VersionsSchema,
  EnvironmentStatus_MachineSchema,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import { classSettings } from "./classes.ts";
import { initializerProblem } from "./clone-plan.ts";
import { configureGit, contentGitStatus, gitIdentity, initializeContent, type Workspace } from "./content.ts";
import { describe } from "./control-plane.ts";
import { ContentError } from "./git.ts";
import type { Host } from "./host.ts";
import { EnvironmentLog, LogSections } from "./logs.ts";
import {
  adoptSupervisor,
  baseVariables,
  eraseEnvironment,
  makeFolders,
  makeRoot,
  quarantine,
  type Supervisor,
  startSupervisor,
  stopProcesses,
  writeToken,
  writeVariables,
} from "./machine.ts";
import { type EnvironmentPaths, environmentPaths } from "./paths.ts";
import { type ContentFacts, type EnvironmentRecord, newRecord, readRecord, writeRecord } from "./record.ts";
import { redact } from "./redact.ts";
import { automationsFile, devContainerHash, hostDevContainer } from "./repository-files.ts";
import {
  acknowledgement,
  courseOf,
  enabledRules,
  environmentUrl,
  isReady,
  type Refusal,
  reportOf,
  setUnserved,
  startedStatus,
  stoppedStatus,
} from "./status.ts";
import type { SupervisorClient } from "./supervisor/client.ts";
import { bootId, isAlive, terminateSession, userOf } from "./supervisor/processes.ts";
import { ensureUser, type UnixUser } from "./users.ts";

/** What is to become of an environment. `halt` ends its processes and keeps everything else as it is. */
export type Goal =
  | { kind: "keep"; desired: DesiredEnvironment }
  | { kind: "halt" }
  | { kind: "erase" }
  | { kind: "quarantine" };

/** Whom an environment tells. */
export interface EnvironmentEvents {
  /** The complete status, to be sent to the control plane. */
  report(environmentId: string, status: EnvironmentStatus): void;
  /** Nothing of it is left here. */
  gone(environmentId: string): void;
}

const LOOK_INTERVAL_MS = 1_000;
const HEALTH_INTERVAL_MS = 10_000;
const HEALTH_TIMEOUT_MS = 5_000;
const MISSED_HEALTH_CHECKS = 3;
const LOST_AFTER_MS = 30_000;
const RESTARTS = 3;
const RESTART_WINDOW_MS = 10 * 60_000;
const RETRY_MIN_MS = 500;
const RETRY_MAX_MS = 30_000;
const GIT_REFRESH_MS = 30_000;
const GIT_REFRESH_QUIET_MS = 5 * 60_000;
const AFTER_OPERATION_MS = 1_000;
const ACTIVITY_INTERVAL_MS = 60_000;
const MESSAGE_CHARACTERS = 500;
const MAX_VARIABLES_CHARACTERS = 64 * 1024;

/** A step failed for a reason that only people can act on. */
class MachineError extends Error {}

const textOf = (error: unknown) => redact(error instanceof Error ? error.message : String(error)).slice(0, MESSAGE_CHARACTERS);

/**
 * One environment on this host: a loop that compares what should be with what is and takes the next step, one pass at
 * a time. Every step is written to disk before it is reported, and each pass starts from the disk and the processes,
 * so that the runner may die anywhere. A new goal cuts a pass short where waiting would be pointless.
 */
export class ManagedEnvironment {
  readonly id: string;
  readonly log: EnvironmentLog;
  readonly #host: Host;
  readonly #paths: EnvironmentPaths;
  readonly #events: EnvironmentEvents;
  readonly #sections: LogSections;
  readonly #record: EnvironmentRecord;
  #onDisk: boolean;
  #goal: Goal | undefined;
  #pass: { controller: AbortController; course: string } | undefined;
  #dirty = true;
  #wake: (() => void) | undefined;
  #closed = false;
  readonly #ended: Promise<void>;

  #supervisor: Supervisor | undefined;
  #healthAt = 0;
  #missed = 0;
  #lostSince: number | undefined;
  #knownStopped = false;
  #gitAt = 0;
  #gitCostMs = 0;
  #gitInterval = GIT_REFRESH_MS;
  #isGitDue = false;
  #gitTimer: NodeJS.Timeout | undefined;
  #signaledAt = 0;
  #signaled = 0;
  #halted = Promise.withResolvers<void>();

  private constructor(host: Host, id: string, record: EnvironmentRecord | undefined, events: EnvironmentEvents) {
    this.id = id;
    this.#host = host;
    this.#events = events;
    this.#paths = environmentPaths(host.config.dataDir, id);
    this.#onDisk = record !== undefined;
    this.#record = record ?? newRecord();
    this.log = new EnvironmentLog(this.#paths.log);
    this.log.live = this.#machinePhase !== MachinePhase.STOPPED && record !== undefined;
    this.#sections = new LogSections(this.log, this.#record.sections);
    this.#ended = this.#work();
  }

  /** Takes up what is on disk; does nothing but look for a living supervisor until a goal is set. */
  static async open(host: Host, id: string, events: EnvironmentEvents): Promise<ManagedEnvironment> {
    return new ManagedEnvironment(host, id, await readRecord(environmentPaths(host.config.dataDir, id)), events);
  }

  get #status(): EnvironmentStatus {
    return this.#record.status;
  }

  get #machinePhase(): MachinePhase {
    return this.#status.machine?.phase ?? MachinePhase.UNSPECIFIED;
  }

  get #passed(): boolean {
    const session = this.#status.machine?.session;
    return Boolean(session) && this.#record.gatesPassedSession === session;
  }

  /** Its machine has been reported, so there is a log to read. */
  get hasMachine(): boolean {
    return this.#machinePhase !== MachinePhase.UNSPECIFIED;
  }

  /** Its operations are offered; for a moment there may be no supervisor to serve them. */
  get #isServing(): boolean {
    return this.#machinePhase === MachinePhase.RUNNING && this.#passed;
  }

  /** The supervisor of a running environment; undefined in any other state. */
  get operations(): SupervisorClient | undefined {
    return this.#isServing ? this.#supervisor?.client : undefined;
  }

  setGoal(goal: Goal): void {
    const before = this.#goal;
    // A removal is final; what arrives later about the same id was sent before.
    if (this.#closed || before?.kind === "erase") return;
    if (before?.kind === "keep" && goal.kind === "keep") {
      const [old, next] = [before.desired.environment?.spec, goal.desired.environment?.spec];
      if (old && next && next.specVersion < old.specVersion) return;
    }
    this.#goal = goal;
    if (this.#pass && cutsShort(this.#pass.course, course(goal))) this.#pass.controller.abort(new Error("superseded"));
    this.wake();
  }

  /** Looks again soon. */
  wake(): void {
    this.#dirty = true;
    this.#wake?.();
  }

  /** Something was changed through the operations, so the git status is worth another look. */
  touched(): void {
    if (this.#gitTimer) return;
    // A slow repository is looked at less often.
    const pause = Math.max(AFTER_OPERATION_MS, this.#gitCostMs * 10);
    this.#gitTimer = setTimeout(() => {
      this.#gitTimer = undefined;
      this.#isGitDue = true;
      this.wake();
    }, pause);
    this.#gitTimer.unref();
  }

  /** Reports the present state once more. */
  publish(): void {
    if (this.#goal?.kind !== "keep") return;
    const base = environmentUrl(this.#host.config.publicUrl, this.id);
    this.#events.report(this.id, reportOf(this.#status, base, this.#isServing));
  }

  /** Resolves when the processes have ended after the goal `halt`, or nothing is left of the environment. */
  async halted(): Promise<void> {
    await Promise.race([this.#halted.promise, this.#ended]);
  }

  /** Ends the loop; the environment and its supervisor stay as they are. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#gitTimer);
    this.#pass?.controller.abort(new Error("the runner stops"));
    this.#wake?.();
    await this.#ended;
  }

  async #work(): Promise<void> {
    let failures = 0;
    let pause: number | undefined;
    while (!this.#closed) {
      await this.#rest(pause);
      if (this.#closed) return;
      this.#dirty = false;
      const controller = new AbortController();
      this.#pass = { controller, course: course(this.#goal) };
      try {
        pause = await this.#reconcile(controller.signal);
        failures = 0;
      } catch (error) {
        pause = controller.signal.aborted ? 0 : Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** failures++);
        if (!controller.signal.aborted) {
          this.#host.log.warn({ environmentId: this.id, error: describe(error) }, "a step for an environment failed");
        }
      } finally {
        this.#pass = undefined;
      }
    }
  }

  #rest(pause: number | undefined): Promise<void> {
    if (this.#dirty) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = pause === undefined ? undefined : setTimeout(() => this.#wake?.(), pause);
      this.#wake = () => {
        clearTimeout(timer);
        this.#wake = undefined;
        resolve();
      };
    });
  }

  /** One pass; answers after how many milliseconds to look again, undefined to wait for an event. */
  async #reconcile(signal: AbortSignal): Promise<number | undefined> {
    const goal = this.#goal;
    switch (goal?.kind) {
      case undefined:
        if (this.#machinePhase === MachinePhase.RUNNING) await this.#adopt();
        return undefined;
      case "keep":
        return await this.#keep(goal.desired, signal);
      case "halt":
        await this.#endProcesses(true, signal);
        await this.#edit((record) => {
          record.status = stoppedStatus(record.status);
        });
        this.#halted.resolve();
        return undefined;
      case "erase":
        await this.#endProcesses(false, signal);
        await eraseEnvironment(this.#host, this.id, this.#paths, this.#record.user);
        return this.#leave();
      case "quarantine":
        await this.#endProcesses(false, signal);
        await quarantine(this.#host, this.id, this.#paths);
        return this.#leave();
    }
  }

  #leave(): undefined {
    this.#closed = true;
    this.log.live = false;
    this.#events.gone(this.id);
  }

  async #keep(desired: DesiredEnvironment, signal: AbortSignal): Promise<number | undefined> {
    const spec = desired.environment?.spec;
    switch (spec?.desiredPhase) {
      case EnvironmentPhase.RUNNING:
        return await this.#keepRunning(desired, spec, signal);
      case EnvironmentPhase.STOPPED:
        await this.#stop(spec, signal);
        return undefined;
      case EnvironmentPhase.DELETED:
        await this.#stop(spec, signal);
        await this.#delete(spec);
        return undefined;
      default:
        return undefined;
    }
  }

  /** Applies a change, writes it to disk, then reports it; nothing happens if it changes nothing. */
  async #edit(change: (record: EnvironmentRecord) => void): Promise<void> {
    change(this.#record);
    if (this.#onDisk) await writeRecord(this.#paths, this.#record);
    this.publish();
  }

  async #acknowledge(spec: EnvironmentSpec, refusal?: Refusal): Promise<void> {
    const ack = acknowledgement(spec, refusal);
    const { runnerAck } = this.#status;
    const isKnown = runnerAck?.specVersion === ack.specVersion && runnerAck.statusCode === ack.statusCode;
    if (isKnown && runnerAck.message === ack.message) return;
    await this.#edit(({ status }) => {
      status.runnerAck = ack;
    });
  }

  #refusal({ environmentClass }: DesiredEnvironment, spec: EnvironmentSpec): Refusal | undefined {
    const { config, schema } = this.#host;
    const invalid = initializerProblem(spec.content?.initializer, config.scm.schemes);
    const problem = classSettings(schema, environmentClass).problem ?? invalid;
    if (problem) return { code: AckCode.INVALID_RESOURCE, message: problem };
    const rules = enabledRules(spec.kernelControlsConfig);
    if (rules.length === 0 || config.allowUnenforced) return undefined;
    return {
      code: AckCode.FAILED_PRECONDITION,
      message: `this runner cannot enforce the kernel control ${rules.join(", ")}`,
    };
  }

  async #keepRunning(desired: DesiredEnvironment, spec: EnvironmentSpec, signal: AbortSignal): Promise<number | undefined> {
    const session = spec.machine?.session ?? "";
    const isCurrent = this.#status.machine?.session === session && this.hasMachine;
    const refusal = this.#refusal(desired, spec);
    if (refusal && !(isCurrent && this.#passed)) {
      await this.#acknowledge(spec, refusal);
      return undefined;
    }
    if (!isCurrent || this.#machinePhase === MachinePhase.STOPPED) {
      if (this.#host.isDraining()) return undefined;
      await this.#beginStart(spec, signal);
    }
    await this.#acknowledge(spec, refusal);
    if (this.#status.machine?.failureMessage) return undefined;
    if (!(await this.#keepMachine(desired, spec, signal))) return undefined;
    // A specification that is refused while the environment runs changes nothing.
    if (!refusal) {
      if (!(await this.#keepContent(spec, signal))) return undefined;
      await this.#keepRepositoryFiles(spec, signal);
    }
    await this.#observe(spec);
    return LOOK_INTERVAL_MS;
  }

  // Machine.

  async #beginStart(spec: EnvironmentSpec, signal: AbortSignal): Promise<void> {
    await this.#endProcesses(false, signal);
    await makeRoot(this.#paths);
    this.#onDisk = true;
    this.#knownStopped = false;
    this.#lostSince = undefined;
    this.#sections.endAll(LogSectionOutcome.CANCELLED);
    this.log.live = true;
    this.#sections.open("machine");
    await this.#edit((record) => {
      record.status = startedStatus(record.status, spec, record.content.session);
      record.restarts = [];
      record.gatesPassedSession = "";
      delete record.supervisor;
    });
  }

  /** Brings the machine up and keeps it up; false if it has failed for good. */
  async #keepMachine(desired: DesiredEnvironment, spec: EnvironmentSpec, signal: AbortSignal): Promise<boolean> {
    if (this.#machinePhase === MachinePhase.RUNNING) {
      if (await this.#isPresent()) return true;
      if (await this.#adopt()) return true;
      if (!(await this.#recover(signal))) return false;
    }
    const token = await this.#token(spec, signal);
    try {
      await this.#host.startGate(() => this.#bringUp(desired, spec, token, signal));
      return true;
    } catch (error) {
      // A machine that was up has more tries.
      if (signal.aborted || this.#machinePhase === MachinePhase.RUNNING) throw error;
      const failureMessage = `the machine could not be started: ${textOf(error)}`;
      await this.#endProcesses(false, signal);
      this.#sections.endAll(LogSectionOutcome.FAILURE);
      this.log.write(failureMessage);
      await this.#edit(({ status }) => {
        if (status.machine) status.machine.failureMessage = failureMessage;
      });
      return false;
    }
  }

  async #bringUp(desired: DesiredEnvironment, spec: EnvironmentSpec, token: string, signal: AbortSignal): Promise<void> {
    const host = this.#host;
    signal.throwIfAborted();
    const user = this.#record.user ?? (await ensureUser(this.id, this.#paths.home));
    if (!this.#record.user) {
      await this.#edit((record) => {
        record.user = user;
      });
    }
    await makeFolders(this.#paths, user);
    if (this.#machinePhase === MachinePhase.CREATING) {
      this.log.write(user.own ? `User ${user.name} and folders are ready` : "Folders are ready");
      await this.#edit(({ status }) => {
        if (status.machine) status.machine.phase = MachinePhase.STARTING;
      });
    }
    await this.#endStrayGit();
    await writeToken(this.#paths, user, token);
    await this.#writeVariables(user, token);
    signal.throwIfAborted();
    const { limits } = classSettings(host.schema, desired.environmentClass);
    const supervisor =
      (await adoptSupervisor(this.id, this.#paths, user, this.#record.supervisor)) ??
      (await startSupervisor(host, this.id, this.#paths, user, this.#folder, limits));
    this.#use(supervisor);
    const warningMessage = this.#machineWarnings(user, spec);
    if (this.#sections.isOpen("machine")) this.log.write("The supervisor answers");
    this.#sections.end("machine", LogSectionOutcome.SUCCESS);
    await this.#edit((record) => {
      record.supervisor = supervisor.process;
      const { version: supervisorVersion, commit: supervisorCommit } = host.program;
      const versions = create(EnvironmentStatus_Machine_VersionsSchema, { supervisorVersion, supervisorCommit });
      const machine = record.status.machine ?? create(EnvironmentStatus_MachineSchema);
      record.status.machine = { ...machine, phase: MachinePhase.RUNNING, versions, warningMessage };
    });
  }

  get #folder(): string {
    return this.#record.content.folder || this.#paths.workspace;
  }

  #machineWarnings(user: UnixUser, spec: EnvironmentSpec): string {
    const rules = enabledRules(spec.kernelControlsConfig);
    const warnings = [
      user.own ? "" : "no isolation between environments: the runner does not run as root",
      this.#host.controlGroups ? "" : "CPU and memory limits are not enforced on this host",
      rules.length > 0 ? `kernel controls are not enforced: ${rules.join(", ")}` : "",
      spec.sshPublicKeys.length > 0 ? "SSH keys cannot be used: there is no SSH server on this runner" : "",
    ];
    return warnings.filter(Boolean).join("; ");
  }

  /** Token of this start. Whatever keeps the control plane from giving one is tried again later. */
  async #token(spec: EnvironmentSpec, signal: AbortSignal): Promise<string> {
    const machineSession = spec.machine?.session ?? "";
    if (this.#record.token?.session === machineSession) return this.#record.token.text;
    const request = { environmentId: this.id, machineSession };
    const { token } = await this.#host.controlPlane.control.createEnvironmentToken(request, { signal });
    await this.#edit((record) => {
      record.token = { session: machineSession, text: token };
    });
    return token;
  }

  async #writeVariables(user: UnixUser, token: string): Promise<void> {
    const base = await baseVariables(this.#host, this.id, this.#paths, user, token);
    await writeVariables(this.#paths, user, { ...this.#record.variables, ...base });
  }

  #use(supervisor: Supervisor): void {
    this.#supervisor = supervisor;
    this.#healthAt = Date.now();
    this.#missed = 0;
    this.#lostSince = undefined;
  }

  async #adopt(): Promise<boolean> {
    const { user, supervisor } = this.#record;
    if (!user) return false;
    const found = await adoptSupervisor(this.id, this.#paths, user, supervisor);
    if (!found) return false;
    this.#use(found);
    await this.#edit((record) => {
      record.supervisor = found.process;
    });
    return true;
  }

  /** The supervisor lives, and has answered lately. */
  async #isPresent(): Promise<boolean> {
    const supervisor = this.#supervisor;
    if (!supervisor || !isAlive(supervisor.process)) return false;
    if (Date.now() - this.#healthAt < HEALTH_INTERVAL_MS) return true;
    const state = await supervisor.client.health(HEALTH_TIMEOUT_MS).catch(() => undefined);
    this.#missed = state ? 0 : this.#missed + 1;
    this.#healthAt = Date.now();
    if (state?.activity) this.#signalActivity(state.activity.source, state.activity.at);
    return this.#missed < MISSED_HEALTH_CHECKS;
  }

  /**
   * The supervisor is gone without having been asked. A new one takes over what still runs; if none comes up within
   * 30 s, or the host was restarted, the machine is lost and starts anew. False after too many attempts.
   */
  async #recover(signal: AbortSignal): Promise<boolean> {
    const now = Date.now();
    const recent = this.#record.restarts.filter((at) => now - at < RESTART_WINDOW_MS);
    const { supervisor } = this.#record;
    const sameBoot = supervisor?.bootId === bootId();
    if (sameBoot && isAlive(supervisor)) {
      const uid = this.#record.user?.own ? this.#record.user.uid : undefined;
      killHung(supervisor.pid, uid);
    }
    const isFirstLook = this.#lostSince === undefined;
    this.#lostSince ??= now;
    this.#supervisor = undefined;
    this.#host.log.warn({ environmentId: this.id, restarts: recent.length }, "the supervisor of an environment is gone");
    if (isFirstLook && recent.length >= RESTARTS) {
      const failureMessage = `the machine was lost more than ${RESTARTS} times within ${RESTART_WINDOW_MS / 60_000} minutes`;
      await this.#endProcesses(false, signal);
      await this.#edit(({ status }) => {
        if (status.machine) status.machine.failureMessage = failureMessage;
      });
      return false;
    }
    if (isFirstLook) {
      await this.#edit((record) => {
        record.restarts = [...recent, now];
      });
    }
    if (sameBoot && now - this.#lostSince < LOST_AFTER_MS) return true;
    await this.#endProcesses(false, signal);
    await this.#edit(({ status }) => {
      if (status.machine) status.machine.phase = MachinePhase.STARTING;
    });
    return true;
  }

  #signalActivity(source: string, at: Date): void {
    const now = Date.now();
    const token = this.#record.token?.text;
    if (!token || at.getTime() <= this.#signaled || now - this.#signaledAt < ACTIVITY_INTERVAL_MS) return;
    this.#signaledAt = now;
    this.#signaled = at.getTime();
    const request = { environmentId: this.id, activitySignal: { source, timestamp: timestampFromDate(at) } };
    this.#host.controlPlane
      .environments(token)
      .markEnvironmentActive(request)
      .catch((error: unknown) => {
        this.#host.log.info({ environmentId: this.id, error: describe(error) }, "activity could not be reported");
      });
  }

  // Content.

  #workspace(user: UnixUser, signal: AbortSignal): Workspace {
    return {
      ...{ host: this.#host, environmentId: this.id, paths: this.#paths, user, signal },
      write: (line) => this.log.write(line),
      save: (facts: ContentFacts) =>
        this.#edit((record) => {
          record.content = facts;
        }),
    };
  }

  /** Git that a runner before this one started goes on writing into a folder that nobody wants any more. */
  async #endStrayGit(): Promise<void> {
    const { process: stray, ...content } = this.#record.content;
    if (!stray) return;
    if (stray.bootId === bootId()) await terminateSession(stray, 0);
    await this.#edit((record) => {
      record.content = content;
    });
  }

  /** Puts the content of the specification in place; false if the first attempt has failed. */
  async #keepContent(spec: EnvironmentSpec, signal: AbortSignal): Promise<boolean> {
    const content = spec.content ?? create(EnvironmentSpec_ContentSchema);
    const { user, content: facts } = this.#record;
    const reported = this.#status.content;
    if (!user) throw new MachineError("the machine has no user");
    const isSettled = reported?.session === content.session && facts.session === content.session;
    if (isSettled && reported.phase === ContentPhase.READY) {
      await this.#keepIdentity(spec, user, signal);
      return true;
    }
    if (reported?.session === content.session && reported.phase === ContentPhase.FAILED) return false;
    const isFirst = facts.session === "";
    this.#sections.open("content");
    await this.#edit(({ status }) => {
      const phase = isFirst ? ContentPhase.INITIALIZING : ContentPhase.UPDATING;
      const location = status.content?.contentLocationInMachine ?? "";
      status.content = create(EnvironmentStatus_ContentSchema, {
        ...{ session: content.session, phase, git: status.content?.git },
        contentLocationInMachine: location,
      });
    });
    try {
      const workspace = this.#workspace(user, signal);
      const placed = await initializeContent(workspace, content.session, content.initializer, facts);
      await configureGit(workspace, content, placed.facts);
      await this.#contentReady(spec, user, placed.facts, placed.warnings.join("; "));
      this.#sections.end("content", LogSectionOutcome.SUCCESS);
      return true;
    } catch (error) {
      if (signal.aborted) {
        this.#sections.end("content", LogSectionOutcome.CANCELLED);
        throw error;
      }
      if (!(error instanceof ContentError)) {
        this.#host.log.error({ environmentId: this.id, error: textOf(error) }, "content could not be initialized");
      }
      this.log.write(textOf(error));
      this.#sections.end("content", LogSectionOutcome.FAILURE);
      if (!isFirst) {
        const warning = `the content was not replaced: ${textOf(error)}`;
        await this.#contentReady(spec, user, { ...facts, session: content.session }, warning);
        return true;
      }
      await this.#edit(({ status }) => {
        if (status.content) Object.assign(status.content, { phase: ContentPhase.FAILED, failureMessage: textOf(error) });
      });
      return false;
    }
  }

  async #contentReady(spec: EnvironmentSpec, user: UnixUser, facts: ContentFacts, warningMessage: string): Promise<void> {
    const git = await contentGitStatus(this.id, this.#paths, user, facts);
    const folder = facts.folder || this.#paths.workspace;
    await this.#supervisor?.client.setWorkspaceFolder(folder);
    if (warningMessage) this.log.write(`Warning: ${warningMessage}`);
    await this.#edit((record) => {
      record.content = facts;
      record.gitIdentity = gitIdentity(spec.content ?? create(EnvironmentSpec_ContentSchema), facts);
      record.status.content = create(EnvironmentStatus_ContentSchema, {
        ...{ session: spec.content?.session ?? "", phase: ContentPhase.READY, git, warningMessage },
        contentLocationInMachine: folder,
      });
      // Its files may have changed with the checkout.
      const { devcontainer, automationsFile: automations } = record.status;
      if (devcontainer) devcontainer.phase = DevContainerPhase.CREATING;
      if (automations) automations.phase = ContentPhase.CREATING;
    });
    this.#gitAt = Date.now();
  }

  async #keepIdentity(spec: EnvironmentSpec, user: UnixUser, signal: AbortSignal): Promise<void> {
    const content = spec.content ?? create(EnvironmentSpec_ContentSchema);
    const identity = gitIdentity(content, this.#record.content);
    if (identity === this.#record.gitIdentity) return;
    await configureGit(this.#workspace(user, signal), content, this.#record.content);
    await this.#edit((record) => {
      record.gitIdentity = identity;
    });
  }

  // Files of the repository, and the end of a start.

  /** Dev container, automations file, secrets and keys; the last of them opens the operations in the same report. */
  async #keepRepositoryFiles(spec: EnvironmentSpec, signal: AbortSignal): Promise<void> {
    const { user, token } = this.#record;
    if (!user || !token) throw new MachineError("the machine has no user");
    const checkout = { folder: this.#folder, user };
    const { devcontainer: reported, automationsFile: reportedFile } = this.#status;
    const wanted = spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);
    const wantedFile = spec.automationsFile ?? create(EnvironmentSpec_AutomationsFileSchema);

    const redo =
      !reported ||
      reported.session !== wanted.session ||
      ![DevContainerPhase.RUNNING, DevContainerPhase.FAILED].includes(reported.phase);
    const redoFile =
      reportedFile?.session !== wantedFile.session ||
      ![ContentPhase.READY, ContentPhase.FAILED].includes(reportedFile.phase);
    const container = redo ? await this.#devContainer(checkout, spec) : undefined;
    const file = redoFile ? await automationsFile(checkout, wantedFile) : undefined;
    signal.throwIfAborted();
    if (container && JSON.stringify(container.variables) !== JSON.stringify(this.#record.variables)) {
      this.#record.variables = container.variables;
      await this.#writeVariables(user, token.text);
    }
    if (file?.failureMessage) this.log.write(`Automations: ${file.failureMessage}`);
    const next = create(EnvironmentStatusSchema);
    setUnserved(next, spec);
    const unserved = create(EnvironmentStatusSchema, {
      secrets: this.#status.secrets,
      sshPublicKeys: this.#status.sshPublicKeys,
    });
    const passes =
      !this.#passed &&
      isReady({ ...this.#status, devcontainer: container?.status ?? reported }, spec);
    if (!container && !file && !passes && equals(EnvironmentStatusSchema, next, unserved)) return;
    if (passes) {
      this.#sections.endAll(LogSectionOutcome.SUCCESS);
      this.#sections.open("system");
      this.log.write("The environment is running");
    }
    await this.#edit((record) => {
      if (container) {
        record.status.devcontainer = container.status;
        record.devcontainerHash = container.hash;
      }
      if (file) record.status.automationsFile = file;
      setUnserved(record.status, spec);
      if (passes) record.gatesPassedSession = spec.machine?.session ?? "";
    });
  }

  async #devContainer(checkout: { folder: string; user: UnixUser }, spec: EnvironmentSpec) {
    this.#sections.open("devcontainer");
    const wanted = spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);
    const container = await hostDevContainer(checkout, wanted, this.#host.config.hostDevcontainer);
    const { failureMessage, warningMessage } = container.status;
    if (failureMessage || warningMessage) this.log.write(failureMessage || `Warning: ${warningMessage}`);
    this.#sections.end("devcontainer", failureMessage ? LogSectionOutcome.FAILURE : LogSectionOutcome.SUCCESS);
    if (JSON.stringify(container.variables).length <= MAX_VARIABLES_CHARACTERS) return container;
    return { ...container, variables: {} };
  }

  // While it runs.

  /** Refreshes what people change: git status, and whether the dev container file is still the one in use. */
  async #observe(spec: EnvironmentSpec): Promise<void> {
    const now = Date.now();
    const { user, content } = this.#record;
    if (!user || !(this.#isGitDue || now - this.#gitAt > this.#gitInterval)) return;
    this.#isGitDue = false;
    const git = await contentGitStatus(this.id, this.#paths, user, content);
    const checkout = { folder: this.#folder, user };
    const hash = await devContainerHash(checkout, spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema));
    this.#gitAt = Date.now();
    this.#gitCostMs = this.#gitAt - now;
    const next = clone(EnvironmentStatusSchema, this.#status);
    if (next.content) next.content = { ...next.content, git };
    if (next.devcontainer) {
      next.devcontainer = { ...next.devcontainer, devcontainerconfigInSync: hash === this.#record.devcontainerHash };
    }
    const isChanged = !equals(EnvironmentStatusSchema, next, this.#status);
    this.#gitInterval = isChanged ? GIT_REFRESH_MS : GIT_REFRESH_QUIET_MS;
    if (!isChanged) return;
    await this.#edit((record) => {
      record.status = next;
    });
  }

  // The end.

  /** Ends every process; throws while one is left, so that it is tried again. */
  async #endProcesses(gracefully: boolean, signal: AbortSignal): Promise<void> {
    const { user, supervisor } = this.#record;
    this.#supervisor = undefined;
    if (!this.#onDisk) return;
    const left = await stopProcesses(this.#host, this.id, user, gracefully ? supervisor : undefined, signal);
    if (left.length > 0) throw new MachineError(`${left.length} processes cannot be ended`);
    await this.#endStrayGit();
  }

  async #stop(spec: EnvironmentSpec, signal: AbortSignal): Promise<void> {
    const phase = this.#machinePhase;
    if ([MachinePhase.UNSPECIFIED, MachinePhase.STOPPED, MachinePhase.DELETING, MachinePhase.DELETED].includes(phase)) {
      if (!this.#knownStopped) await this.#endProcesses(false, signal);
      this.#knownStopped = true;
      return await this.#acknowledge(spec);
    }
    await this.#edit(({ status }) => {
      status.runnerAck = acknowledgement(spec);
      if (status.machine) status.machine.phase = MachinePhase.STOPPING;
    });
    await this.#endProcesses(true, signal);
    this.#knownStopped = true;
    this.#sections.endAll(this.#passed ? LogSectionOutcome.SUCCESS : LogSectionOutcome.CANCELLED);
    await this.#edit((record) => {
      record.status = stoppedStatus(record.status);
      delete record.supervisor;
      delete record.token;
    });
    this.log.live = false;
  }

  async #delete(spec: EnvironmentSpec): Promise<void> {
    const session = this.#status.machine?.session ?? "";
    const machine = (phase: MachinePhase) => create(EnvironmentStatus_MachineSchema, { session, phase });
    if (this.#onDisk) {
      await this.#edit(({ status }) => {
        status.machine = machine(MachinePhase.DELETING);
      });
      await eraseEnvironment(this.#host, this.id, this.#paths, this.#record.user);
      this.#onDisk = false;
    }
    this.#record.status = create(EnvironmentStatusSchema, {
      runnerAck: acknowledgement(spec),
      machine: machine(MachinePhase.DELETED),
    });
    this.log.live = false;
    this.publish();
  }
}

/** Ends a supervisor that lives but does not answer, if its pid is still that of a process of the environment. */
function killHung(pid: number, uid: number | undefined): void {
  try {
    if (uid === undefined || userOf(pid) === uid) process.kill(pid, "SIGKILL");
  } catch {
    // Gone meanwhile.
  }
}

function course(goal: Goal | undefined): string {
  if (goal?.kind !== "keep") return goal?.kind ?? "";
  const spec = goal.desired.environment?.spec;
  return spec ? courseOf(spec) : "";
}

/** Whether work towards one course is pointless once there is another; a stop is also the first part of a deletion. */
function cutsShort(present: string, next: string): boolean {
  return present !== next && !(present === "STOPPED" && next === "DELETED");
}
