import { clone } from "@bufbuild/protobuf";
import {
  type EnvironmentSpec,
  type EnvironmentStatus,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { ClassSettings } from "./classes.ts";
import { commandVariables } from "./commands.ts";
import { EnvironmentContainers } from "./containers/environment-containers.ts";
import { removeContainer, stopContainer } from "./devcontainer/belongings.ts";
import type { Run } from "./devcontainer/run.ts";
import type { Host } from "./host.ts";
import { EnvironmentLog, LogSections } from "./logs.ts";
import { ownerOf, stopProcesses } from "./machine.ts";
import { type EnvironmentPaths, environmentPaths } from "./paths.ts";
import { type EnvironmentRecord, newRecord, writeRecord } from "./record.ts";
import { redact } from "./redact.ts";
import type { Application } from "./repository-files.ts";
import { unheard } from "./side-work.ts";
import { acknowledgement, type Refusal } from "./status.ts";
import { Supervision } from "./supervision.ts";
import { type SupervisorClient, withGitOf } from "./supervisor/client.ts";
import { bootId, terminateSession } from "./supervisor/processes.ts";
import { CommandShell } from "./supervisor/shell.ts";
import type { Inhabitant } from "./users.ts";

const MESSAGE_CHARACTERS = 500;
// Within this time most notes are taken along.
const NOTE_MS = 50;

/** Short text of an error for people, without credentials. */
export const textOf = (error: unknown): string =>
  redact(error instanceof Error ? error.message : String(error)).slice(0, MESSAGE_CHARACTERS);

/** The user of an environment whose machine is up. */
export function userOf(site: EnvironmentSite): Inhabitant {
  const { record, supervision } = site;
  if (!record.user) throw new Error("the machine has no user");
  return { ...record.user, inside: supervision.inside, shell: site.shell };
}

/** What this process knows about the SSH server of an environment. */
export interface SshState {
  /** Why nobody can log in; empty if people can. */
  problem: string;
  /** Keys and variables last written, the variables as a text that changes with them. */
  keys: string | undefined;
  variables: string | undefined;
  /** Program of sessions last written. */
  script: string | undefined;
  /** The server did not start for this reason, and is tried again then. */
  failure: string;
  retryAt: number;
  /** When sessions were looked for. */
  seenAt: number;
}

export const newSshState = (): SshState => ({
  ...{ problem: "", failure: "", keys: undefined, variables: undefined, script: undefined, retryAt: 0, seenAt: 0 },
});

/** What the steps for one environment work on. Only the pass that is under way changes it. */
export class EnvironmentSite {
  readonly host: Host;
  readonly id: string;
  readonly paths: EnvironmentPaths;
  readonly record: EnvironmentRecord;
  readonly log: EnvironmentLog;
  readonly sections: LogSections;
  readonly supervision = new Supervision();
  /** As `supervision`, of the container that the dev container runs in. */
  readonly container = new Supervision();
  /** What the class of the environment says; undefined before anything is wanted of it. */
  settings: ClassSettings | undefined;
  /** Values of secrets in use, by the ids of their entries; only those that this process has fetched. */
  readonly secretValues = new Map<string, { session: string; value: string }>();
  /** When to ask for credentials of hosts again, by the ids of their entries. */
  readonly credentialLooks = new Map<string, { session: string; at: number }>();
  /** Its folder exists, so that changes are written down. */
  onDisk: boolean;
  /** The dev container that is being applied. */
  application: Application | undefined;
  /** Its commands that nobody waits for. */
  attached: Run | undefined;
  readonly ssh = newSshState();
  /** Those of its services and tasks. */
  readonly containers = new EnvironmentContainers(this);
  /** Lets the next pass begin at once. */
  readonly wake: () => void;
  readonly #changed: () => void;
  #shell: CommandShell | undefined;
  #writing: Promise<void> = Promise.resolve();
  #nextWrite: Promise<void> | undefined;
  #unwritten = 0;
  #isNoted = false;
  #written: EnvironmentStatus | undefined;

  constructor(host: Host, id: string, record: EnvironmentRecord | undefined, changed: () => void, wake: () => void) {
    this.host = host;
    this.id = id;
    this.paths = environmentPaths(host.config.dataDir, id);
    this.record = record ?? newRecord();
    this.onDisk = record !== undefined;
    this.log = new EnvironmentLog(this.paths.log);
    this.sections = new LogSections(this.log, this.record.sections);
    this.#changed = changed;
    this.wake = wake;
  }

  get status(): EnvironmentStatus {
    return this.record.status;
  }

  get machinePhase(): MachinePhase {
    return this.status.machine?.phase ?? MachinePhase.UNSPECIFIED;
  }

  /** Everything needed was ready once since this start began. */
  get passed(): boolean {
    const session = this.status.machine?.session;
    return Boolean(session) && this.record.gatesPassedSession === session;
  }

  /** Primary checkout; the workspace itself without one. */
  get folder(): string {
    return this.record.content.folder || this.paths.workspace;
  }

  /** The status as far as it is on disk: another step may be about to write down what it has changed. */
  get writtenStatus(): EnvironmentStatus {
    return this.#unwritten > 0 && this.#written ? this.#written : this.status;
  }

  /** Runs short commands of its user, in what its processes run in at the moment. */
  get shell(): CommandShell | undefined {
    const { user } = this.record;
    if (!user) return undefined;
    const runAs = { ...ownerOf(user), inside: this.supervision.inside };
    const known = this.#shell?.user;
    if (!known || known.uid !== runAs.uid || known.inside !== runAs.inside) {
      this.#shell?.close();
      const env = { ...commandVariables(), HOME: this.paths.home, BERTH_ENVIRONMENT_ID: this.id };
      this.#shell = new CommandShell(runAs, env);
    }
    return this.#shell;
  }

  /** Applies a change, writes it to disk, then reports it. */
  async edit(change: (record: EnvironmentRecord) => void): Promise<void> {
    change(this.record);
    this.#isNoted = false;
    if (this.onDisk) await this.#write();
    this.#changed();
  }

  /** Resolves when everything up to now is on disk. One write at a time: an older one must not replace a newer one. */
  async #write(): Promise<void> {
    this.#nextWrite ??= this.#writing
      .catch(() => undefined)
      .then(() => {
        this.#nextWrite = undefined;
        this.#writing = this.#writeNow();
        return this.#writing;
      });
    this.#unwritten++;
    try {
      await this.#nextWrite;
    } finally {
      this.#unwritten--;
    }
  }

  async #writeNow(): Promise<void> {
    const status = clone(EnvironmentStatusSchema, this.status);
    await writeRecord(this.paths, this.record);
    this.#written = status;
  }

  /**
   * As `edit`, soon and without waiting for it, for what nothing has to be found by after a crash: the next change that is
   * waited for takes it along. A failure to write shows with that.
   */
  note(change: (record: EnvironmentRecord) => void): void {
    change(this.record);
    if (this.#isNoted) return;
    this.#isNoted = true;
    setTimeout(() => {
      if (this.#isNoted) unheard(this.edit(() => undefined));
    }, NOTE_MS).unref();
  }

  /** As `edit`, for what leads to an end: a full disk must not hold that up, and a later pass finds out again. */
  async editTowardsEnd(change: (record: EnvironmentRecord) => void): Promise<void> {
    change(this.record);
    if (this.onDisk) {
      await this.#write().catch((error: unknown) => {
        this.host.log.warn({ environmentId: this.id, error: textOf(error) }, "a step could not be written down");
      });
    }
    this.#changed();
  }

  /** Tells which specification was accepted, or why not; says nothing twice. */
  async acknowledge(spec: EnvironmentSpec, refusal?: Refusal): Promise<void> {
    const ack = acknowledgement(spec, refusal);
    const { runnerAck } = this.status;
    const isKnown = runnerAck?.specVersion === ack.specVersion && runnerAck.statusCode === ack.statusCode;
    if (isKnown && runnerAck.message === ack.message) return;
    await this.edit(({ status }) => {
      status.runnerAck = ack;
    });
  }

  async failMachine(failureMessage: string): Promise<void> {
    this.log.write(failureMessage);
    await this.editTowardsEnd(({ status }) => {
      if (status.machine) status.machine.failureMessage = failureMessage;
    });
  }

  /**
   * Who serves its operations: what concerns processes and files is served where the dev container runs, git always on
   * the host. Undefined while one of them does not answer.
   */
  get operations(): SupervisorClient | undefined {
    const { client } = this.supervision;
    if (!this.record.container || !client) return client;
    const inner = this.container.client;
    return inner && withGitOf(client, inner);
  }

  /** Ends every process; throws while one is left, so that it is tried again. */
  async endProcesses(gracefully: boolean, signal: AbortSignal): Promise<void> {
    const { user, supervisor, ssh } = this.record;
    const work = this.application?.work;
    // There may be no other attempt, at whose end what was kept back would be told.
    this.log.release(() => undefined);
    this.letGo();
    // Nothing may be started while the rest ends.
    await work?.cancel();
    this.supervision.drop();
    this.container.drop();
    const endContainer = () => this.#endContainer(gracefully);
    const left = await stopProcesses(this.host, this.id, user, supervisor, gracefully, endContainer, signal);
    await this.containers.endAll();
    if (left.length > 0) throw new Error(`${left.length} processes cannot be ended`);
    // It writes its title over its variables, by which processes of an ordinary user's environments are found.
    if (ssh?.process?.bootId === bootId()) await terminateSession(ssh.process, 0);
    this.supervision.leave();
    await this.endStrayGit();
  }

  /** An engine that does not answer must not hold up the end: the processes of the container are ended like all others. */
  async #endContainer(gracefully: boolean): Promise<void> {
    if (!this.record.usesEngine) return;
    try {
      const engine = await this.host.engines.find();
      if (engine) await stopContainer(engine, this.id, gracefully);
    } catch (error) {
      this.host.log.warn({ environmentId: this.id, error: textOf(error) }, "a container could not be stopped in order");
    }
  }

  /** Takes away what the container engine has of it. What cannot be removed now is, when the runner looks for strays. */
  async forgetContainer(): Promise<void> {
    if (!this.record.usesEngine) return;
    try {
      const engine = await this.host.engines.find();
      if (engine) await removeContainer(engine, this.id);
    } catch (error) {
      this.host.log.warn({ environmentId: this.id, error: textOf(error) }, "a container could not be removed");
    }
  }

  /** Stops following commands; what runs goes on running. */
  letGo(): void {
    this.application?.run.abandon();
    this.application?.work?.abandon();
    this.attached?.abandon();
    this.application = this.attached = undefined;
    this.closeShell();
  }

  /** No more commands are to be run for now. */
  closeShell(): void {
    this.#shell?.close();
    this.#shell = undefined;
  }

  /** Git that a runner before this one started goes on writing into a folder that nobody wants any more. */
  async endStrayGit(): Promise<void> {
    const { process: stray, ...content } = this.record.content;
    if (!stray) return;
    if (stray.bootId === bootId()) await terminateSession(stray, 0);
    await this.editTowardsEnd((record) => {
      record.content = content;
    });
  }
}
