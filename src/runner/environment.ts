import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ConnectError } from "@connectrpc/connect";
import type { DesiredEnvironment } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  EnvironmentPhase,
  type EnvironmentSpec,
  type EnvironmentSpec_EnvironmentPort,
  type EnvironmentStatus,
  EnvironmentStatus_MachineSchema,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import { portOf } from "../domain/environment-ports.ts";
import { keepAutomationsFile } from "./automations/file.ts";
import { AutomationRelay } from "./automations/relay.ts";
import type { AutomationReports } from "./automations/reports.ts";
import { classSettings } from "./classes.ts";
import { initializerProblem } from "./clone-plan.ts";
import { keepContent, keepRepositoryFiles, observeFiles } from "./content-steps.ts";
import { describe } from "./control-plane.ts";
import { keepCredentials } from "./credential-steps.ts";
import { adoptContainer, keepContainer } from "./devcontainer/container-keeper.ts";
import { GitWatch } from "./git-watch.ts";
import type { Host } from "./host.ts";
import type { EnvironmentLog } from "./logs.ts";
import { eraseEnvironment, quarantine } from "./machine.ts";
import { adopt, beginStart, keepMachine } from "./machine-steps.ts";
import { environmentPaths } from "./paths.ts";
import { portUrl } from "./ports/route.ts";
import { type EnvironmentRecord, readRecord } from "./record.ts";
import { forgetSecretValues, hideDelivered, keepSecrets } from "./secret-steps.ts";
import { allOf } from "./side-work.ts";
import { EnvironmentSite, textOf } from "./site.ts";
import { forgetSsh, keepSsh, sshUrl } from "./ssh-steps.ts";
import {
  acknowledgement,
  courseOf,
  enabledAgents,
  enabledRules,
  environmentUrl,
  type Refusal,
  reportOf,
  stoppedStatus,
} from "./status.ts";
import type { SupervisorClient } from "./supervisor/client.ts";
import type { SupervisorState } from "./supervisor/private-http.ts";
import type { EnvironmentSelector } from "./supervisor/processes.ts";

/** What is to become of an environment. `halt` ends its processes and keeps everything else as it is. */
export type Goal =
  | { kind: "keep"; desired: DesiredEnvironment }
  | { kind: "halt" }
  | { kind: "erase" }
  | { kind: "quarantine" };

/** A port that clients may reach. */
export interface OpenPort {
  entry: EnvironmentSpec_EnvironmentPort;
  creatorId: string;
  /** Whose processes may answer. */
  owner: EnvironmentSelector;
}

/** Whom an environment tells. */
export interface EnvironmentEvents {
  /** The complete status, to be sent to the control plane. */
  report(environmentId: string, status: EnvironmentStatus): void;
  /** Nothing of it is left here. */
  gone(environmentId: string): void;
  /** Takes how its services and executions fare. */
  automations: AutomationReports;
}

const LOOK_INTERVAL_MS = 1_000;
const RETRY_MIN_MS = 500;
const RETRY_MAX_MS = 30_000;
/** After so many failures of one step in a row, some seconds apart, a start has failed. */
const FAILURES_ALLOWED = 5;
const ACTIVITY_INTERVAL_MS = 60_000;
const REPORT_AGAIN_MS = 5_000;
const LAST_WORDS_MS = 5_000;

const UP_PHASES: ReadonlySet<MachinePhase> = new Set([
  MachinePhase.CREATING,
  MachinePhase.STARTING,
  MachinePhase.RUNNING,
  MachinePhase.STOPPING,
]);

/**
 * One environment on this host: a loop that compares what should be with what is and takes the next step, one pass at
 * a time. Every step is written to disk before it is reported, and each pass starts from the disk and the processes,
 * so that the runner may die anywhere. A new goal cuts a pass short where waiting would be pointless.
 */
export class ManagedEnvironment {
  readonly id: string;
  readonly #host: Host;
  readonly #events: EnvironmentEvents;
  readonly #site: EnvironmentSite;
  readonly #gitWatch = new GitWatch(() => this.wake());
  /** Its services and executions. */
  readonly automations: AutomationRelay;
  #goal: Goal | undefined;
  #pass: { controller: AbortController; course: string } | undefined;
  #dirty = true;
  #wake: (() => void) | undefined;
  #closed = false;
  /** Processes may be left of it; false once that was looked at. */
  #mayRun: boolean;
  #signaledAt = 0;
  #signaled = 0;
  readonly #halted = Promise.withResolvers<void>();
  readonly #ended: Promise<void>;

  private constructor(host: Host, id: string, record: EnvironmentRecord | undefined, events: EnvironmentEvents) {
    this.id = id;
    this.#host = host;
    this.#events = events;
    this.#site = new EnvironmentSite(
      host,
      id,
      record,
      () => this.publish(),
      () => this.wake(),
    );
    this.automations = relayFor(this.#site, events.automations);
    this.#mayRun = record !== undefined && this.#site.machinePhase !== MachinePhase.STOPPED;
    this.log.live = this.#mayRun;
    this.#ended = this.#work();
  }

  /** Takes up what is on disk; does nothing but look for a living supervisor until a goal is set. */
  static async open(host: Host, id: string, events: EnvironmentEvents): Promise<ManagedEnvironment> {
    return new ManagedEnvironment(host, id, await readRecord(environmentPaths(host.config.dataDir, id)), events);
  }

  get log(): EnvironmentLog {
    return this.#site.log;
  }

  /** Its supervisor is there, or will be: it knows which containers are in use. */
  get isUp(): boolean {
    return this.#site.machinePhase === MachinePhase.RUNNING;
  }

  /** User id that its files belong to, if that is not the runner's. */
  get ownUid(): number | undefined {
    const { user } = this.#site.record;
    return user?.own ? user.uid : undefined;
  }

  /** Image of its container, if it has one. */
  get containerImage(): string | undefined {
    return this.#site.record.container?.image;
  }

  get #hasMachine(): boolean {
    return this.#site.machinePhase !== MachinePhase.UNSPECIFIED;
  }

  /** Its log can be read: the supervisor has come up, or never will. */
  get hasLog(): boolean {
    const isComing = [MachinePhase.UNSPECIFIED, MachinePhase.CREATING, MachinePhase.STARTING];
    const { machine } = this.#site.status;
    return this.log.started && (!isComing.includes(this.#site.machinePhase) || Boolean(machine?.failureMessage));
  }

  /** Its operations are offered; for a moment there may be no supervisor to serve them. */
  get #isServing(): boolean {
    return this.#site.machinePhase === MachinePhase.RUNNING && this.#site.passed;
  }

  /** Who serves the operations of a running environment; undefined in any other state. */
  get operations(): SupervisorClient | undefined {
    return this.#isServing ? this.#site.operations : undefined;
  }

  /** A port that the specification lists, while the environment runs. */
  openPort(number: number): OpenPort | undefined {
    const environment = this.#goal?.kind === "keep" ? this.#goal.desired.environment : undefined;
    const entry = environment?.spec && portOf(environment.spec, number);
    if (!entry || !this.#isServing) return undefined;
    const owner = { environmentId: this.id, uid: this.ownUid };
    return { entry, creatorId: environment.metadata?.creator?.id ?? "", owner };
  }

  setGoal(goal: Goal): void {
    // A removal is final; what arrives later about the same id was sent before.
    if (this.#closed || this.#goal?.kind === "erase") return;
    this.#goal = goal;
    if (this.#pass && cutsShort(this.#pass.course, courseTo(goal))) {
      this.#pass.controller.abort(new Error("superseded"));
    }
    this.wake();
  }

  /** Looks again soon. */
  wake(): void {
    this.#dirty = true;
    this.#wake?.();
  }

  /** Something was done through the operations, so the files are worth another look. */
  touched(): void {
    this.#gitWatch.touched();
  }

  /** Reports the present state once more. */
  publish(): void {
    if (this.#goal?.kind !== "keep" || this.#closed) return;
    const { publicUrl, portDomain } = this.#host.config;
    const base = environmentUrl(publicUrl, this.id);
    const ports = (this.#goal.desired.environment?.spec?.ports ?? []).map(({ port }) => ({
      port,
      url: portUrl(publicUrl, portDomain, this.id, port),
    }));
    this.#events.report(this.id, reportOf(this.#site.writtenStatus, base, this.#isServing, ports, sshUrl(this.#site)));
  }

  /** A report has been judged. Readers of the log end once the control plane knows of the stop. */
  reported(status: EnvironmentStatus, isAccepted: boolean): void {
    const phase = status.machine?.phase ?? MachinePhase.UNSPECIFIED;
    const isOver = phase === MachinePhase.STOPPED || phase === MachinePhase.DELETED;
    if (isOver && this.#site.machinePhase === phase) this.log.live = false;
    if (!isAccepted) setTimeout(() => this.publish(), REPORT_AGAIN_MS).unref();
  }

  /** Resolves when the processes have ended after the goal `halt`, or nothing is left of the environment. */
  async halted(): Promise<void> {
    await Promise.race([this.#halted.promise, this.#ended]);
  }

  /** Ends the loop; the environment and its supervisor stay as they are. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#gitWatch.close();
    this.#pass?.controller.abort(new Error("the runner stops"));
    this.#wake?.();
    await this.#ended;
    this.#site.letGo();
    this.#site.supervision.leave();
  }

  async #work(): Promise<void> {
    let failures = 0;
    let pause: number | undefined;
    await hideDelivered(this.#site);
    while (!this.#closed) {
      await this.#rest(pause);
      if (this.#closed) return;
      this.#dirty = false;
      const controller = new AbortController();
      this.#pass = { controller, course: courseTo(this.#goal) };
      try {
        pause = await this.#reconcile(controller.signal);
        failures = 0;
      } catch (error) {
        pause = controller.signal.aborted ? 0 : Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** failures++);
        if (!controller.signal.aborted) this.#stepFailed(error, failures);
      } finally {
        this.#pass = undefined;
        this.#site.closeShell();
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

  /** A start whose steps keep failing, for example on a full disk, ends in a failure that people see. */
  #stepFailed(error: unknown, failures: number): void {
    const { log } = this.#host;
    log.warn({ environmentId: this.id, error: describe(error) }, "a step for an environment failed");
    // What the control plane does not grant at the moment is not the machine's failure.
    if (failures < FAILURES_ALLOWED || error instanceof ConnectError || this.#site.passed) return;
    const spec = this.#goal?.kind === "keep" ? this.#goal.desired.environment?.spec : undefined;
    if (spec?.desiredPhase !== EnvironmentPhase.RUNNING) return;
    const session = spec.machine?.session ?? "";
    const isCurrent = this.#hasMachine && this.#site.status.machine?.session === session;
    const machine = isCurrent ? this.#site.status.machine : undefined;
    this.#site.status.machine = create(EnvironmentStatus_MachineSchema, {
      ...{ session, phase: machine?.phase ?? MachinePhase.CREATING },
      failureMessage: machine?.failureMessage || `the machine could not be started: ${textOf(error)}`,
    });
    this.publish();
  }

  /** One pass; answers after how many milliseconds to look again, undefined to wait for an event. */
  async #reconcile(signal: AbortSignal): Promise<number | undefined> {
    const goal = this.#goal;
    const { record, paths } = this.#site;
    switch (goal?.kind) {
      case undefined:
        if (this.#site.machinePhase !== MachinePhase.RUNNING) return undefined;
        await adopt(this.#site);
        await adoptContainer(this.#site);
        return undefined;
      case "keep":
        return await this.#keep(goal.desired, signal);
      case "halt":
        return await this.#halt(signal);
      case "erase":
        await this.#endProcesses(false, signal);
        await this.#site.forgetContainer();
        await eraseEnvironment(this.#host, this.id, paths, record.user);
        return this.#leave();
      case "quarantine":
        await this.#endProcesses(false, signal);
        signal.throwIfAborted();
        await this.#site.forgetContainer();
        await quarantine(this.#host, this.id, paths);
        return this.#leave();
    }
  }

  #leave(): undefined {
    this.#closed = true;
    this.#gitWatch.close();
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

  #refusal({ environmentClass }: DesiredEnvironment, spec: EnvironmentSpec): Refusal | undefined {
    const { config, schema, policies } = this.#host;
    const invalid = initializerProblem(spec.content?.initializer, config.scm.schemes);
    const problem = classSettings(schema, environmentClass).problem ?? invalid;
    if (problem) return { code: AckCode.INVALID_RESOURCE, message: problem };
    const [rules, agents] = [enabledRules(spec.kernelControlsConfig), enabledAgents(policies)];
    const unenforced = [
      ...(rules.length > 0 ? [`cannot enforce the kernel control ${rules.join(", ")}`] : []),
      ...(agents.length > 0 ? [`cannot run the security agent ${agents.join(", ")}`] : []),
    ];
    if (unenforced.length === 0 || config.allowUnenforced) return undefined;
    return { code: AckCode.FAILED_PRECONDITION, message: `this runner ${unenforced.join(" and ")}` };
  }

  async #keepRunning(
    desired: DesiredEnvironment,
    spec: EnvironmentSpec,
    signal: AbortSignal,
  ): Promise<number | undefined> {
    const site = this.#site;
    site.settings = classSettings(this.#host.schema, desired.environmentClass);
    const isCurrent = this.#hasMachine && site.status.machine?.session === spec.machine?.session;
    const refusal = this.#refusal(desired, spec);
    if (refusal && !(isCurrent && site.passed)) {
      await site.acknowledge(spec, refusal);
      return undefined;
    }
    if (!isCurrent || !UP_PHASES.has(site.machinePhase)) {
      if (this.#host.isDraining()) return undefined;
      await beginStart(site, spec, this.#mayRun, signal);
      this.#mayRun = true;
    }
    await site.acknowledge(spec, refusal);
    if (site.status.machine?.failureMessage) return undefined;
    const work = {
      onState: ({ activity }: SupervisorState) => this.#signalActivity(activity),
      // A specification that is refused while the environment runs changes nothing.
      meanwhile: async (endowed: Promise<void>, ends: AbortSignal) =>
        void (refusal || (await this.#keepFiles(spec, ends, endowed))),
    };
    if (!(await keepMachine(site, desired, spec, work, signal))) return undefined;
    site.containers.open();
    this.automations.connect(site.supervision.client, site.passed);
    if (!refusal) {
      if (!(await this.#keepFiles(spec, signal))) return undefined;
      await keepSecrets(site, spec, true, signal);
      await keepCredentials(site, spec, signal);
      await keepRepositoryFiles(site, spec, signal);
      await keepContainer(site, work.onState, signal);
      this.automations.connect(site.supervision.client, site.passed);
      await keepAutomationsFile(site, spec, signal);
    }
    if (this.#gitWatch.isDue) {
      const seen = this.#gitWatch.look();
      seen(await observeFiles(site, spec));
    }
    return LOOK_INTERVAL_MS;
  }

  /** Everything that needs no supervisor; false if the first content has failed. */
  async #keepFiles(spec: EnvironmentSpec, signal: AbortSignal, endowed = Promise.resolve()): Promise<boolean> {
    const site = this.#site;
    await keepSecrets(site, spec, false, signal);
    const ssh = endowed.then(() => keepSsh(site, spec, signal));
    const [isInUse, content] = await allOf(ssh, keepContent(site, spec, signal));
    if (isInUse) this.#signalActivity({ source: "SSH", at: new Date() });
    if (content === "placed") this.#gitWatch.seen();
    return content !== "failed";
  }

  /** Tells the control plane that somebody is at work, with the environment's token and at most once a minute. */
  #signalActivity(activity: { source: string; at: Date } | undefined): void {
    const now = Date.now();
    const token = this.#site.record.token?.text;
    if (!token || !activity || activity.at.getTime() <= this.#signaled) return;
    if (now - this.#signaledAt < ACTIVITY_INTERVAL_MS) return;
    this.#signaledAt = now;
    this.#signaled = activity.at.getTime();
    const activitySignal = { source: activity.source, timestamp: timestampFromDate(activity.at) };
    this.#host.controlPlane
      .environments(token)
      .markEnvironmentActive({ environmentId: this.id, activitySignal })
      .catch((error: unknown) => {
        this.#host.log.info({ environmentId: this.id, error: describe(error) }, "activity could not be reported");
      });
  }

  async #endProcesses(gracefully: boolean, signal: AbortSignal): Promise<void> {
    if (this.#mayRun) await this.#site.endProcesses(gracefully, signal);
    // The last words of services come before that of the environment, after which nothing counts.
    await this.#events.automations.sent(LAST_WORDS_MS);
    this.automations.connect(undefined, false);
    this.#mayRun = false;
  }

  async #halt(signal: AbortSignal): Promise<undefined> {
    await this.#endProcesses(true, signal);
    await this.#site.editTowardsEnd((record) => {
      record.status = stoppedStatus(record.status);
    });
    this.log.live = false;
    this.#halted.resolve();
  }

  async #stop(spec: EnvironmentSpec, signal: AbortSignal): Promise<void> {
    const site = this.#site;
    if (!UP_PHASES.has(site.machinePhase)) {
      await this.#endProcesses(false, signal);
      return await site.acknowledge(spec);
    }
    await site.editTowardsEnd(({ status }) => {
      status.runnerAck = acknowledgement(spec);
      if (status.machine) status.machine.phase = MachinePhase.STOPPING;
    });
    await this.#endProcesses(true, signal);
    await forgetSecretValues(site);
    await forgetSsh(site);
    site.sections.endAll(site.passed ? LogSectionOutcome.SUCCESS : LogSectionOutcome.CANCELLED);
    await site.editTowardsEnd((record) => {
      record.status = stoppedStatus(record.status);
      delete record.supervisor;
      delete record.ssh?.process;
      delete record.token;
    });
  }

  async #delete(spec: EnvironmentSpec): Promise<void> {
    const site = this.#site;
    const session = site.status.machine?.session ?? "";
    const machine = (phase: MachinePhase) => create(EnvironmentStatus_MachineSchema, { session, phase });
    if (site.onDisk) {
      await site.editTowardsEnd(({ status }) => {
        status.machine = machine(MachinePhase.DELETING);
      });
      await site.forgetContainer();
      await eraseEnvironment(this.#host, this.id, site.paths, site.record.user);
      site.onDisk = false;
    }
    site.record.status = create(EnvironmentStatusSchema, {
      runnerAck: acknowledgement(spec),
      machine: machine(MachinePhase.DELETED),
    });
    this.publish();
  }
}

function relayFor(site: EnvironmentSite, reports: AutomationReports): AutomationRelay {
  const { host, id: environmentId } = site;
  return new AutomationRelay({
    reports,
    containers: site.containers,
    logDays: host.config.logDays,
    logBase: () => environmentUrl(host.config.publicUrl, environmentId),
    async secrets(secretIds) {
      const { secrets } = await host.controlPlane.control.getEnvironmentSecrets({
        ...{ environmentId, secretIds: [...secretIds] },
      });
      // What only a proxy may use must not enter the environment.
      const given = secrets.filter(({ credentialProxy }) => !credentialProxy);
      return Object.fromEntries(given.map(({ id, value }) => [id, value]));
    },
    failed: (error) => host.log.debug({ environmentId, error: describe(error) }, "automations wait for the supervisor"),
  });
}

/** What the goal amounts to, as one text: work towards another one is pointless. */
function courseTo(goal: Goal | undefined): string {
  if (goal?.kind !== "keep") return goal?.kind ?? "";
  const spec = goal.desired.environment?.spec;
  return spec ? courseOf(spec) : "";
}

/** Whether a pass on one course has to give way to another; a stop is also the first part of a deletion. */
function cutsShort(present: string, next: string): boolean {
  return present !== next && !(present === "STOPPED" && next === "DELETED");
}
