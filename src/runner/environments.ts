import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type {
  DesiredEnvironment,
  DesiredService,
  DesiredTaskExecution,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { ReportResult_Outcome as Outcome } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  type EnvironmentStatus,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { AutomationReports } from "./automations/reports.ts";
import type { ContainerEngine } from "./containers/engine.ts";
import { removeStrayRuns } from "./containers/environment-containers.ts";
import { removeStrays } from "./devcontainer/belongings.ts";
import { type EnvironmentEvents, ManagedEnvironment } from "./environment.ts";
import { removeTree } from "./files.ts";
import type { Host } from "./host.ts";
import { environmentsFolder, quarantineFolder, trashFolder } from "./paths.ts";
import { readRecord } from "./record.ts";
import { removeUser, usersBelow } from "./users.ts";

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const QUARANTINE_MS = 24 * 60 * 60_000;
const SWEEP_MS = 60 * 60_000;
const HALT_DEADLINE_MS = 5 * 60_000;

/** All environments of this host, and what the control plane has said about each. */
export class Environments {
  readonly #host: Host;
  readonly #events: EnvironmentEvents;
  readonly #managed = new Map<string, ManagedEnvironment>();
  readonly #timer: NodeJS.Timeout;
  /** Ids of environments, and of their services and executions, named by the snapshot that is being read. */
  #named: Set<string> | undefined;

  private constructor(
    host: Host,
    report: EnvironmentEvents["report"],
    forget: (environmentId: string) => void,
    automations: AutomationReports,
  ) {
    this.#host = host;
    this.#events = {
      report,
      automations,
      gone: (environmentId) => {
        this.#managed.delete(environmentId);
        forget(environmentId);
      },
    };
    this.#timer = setInterval(() => void this.#sweep(), SWEEP_MS);
    this.#timer.unref();
  }

  /** Takes up what lies on disk, and erases what was being erased. */
  static async open(
    host: Host,
    report: EnvironmentEvents["report"],
    forget: (environmentId: string) => void,
    automations: AutomationReports,
  ): Promise<Environments> {
    const environments = new Environments(host, report, forget, automations);
    const names = await readdir(environmentsFolder(host.config.dataDir));
    for (const id of names.filter((name) => UUID.test(name))) await environments.#open(id);
    await environments.#sweep();
    host.engines.onAppear((engine) => void environments.#removeStrayContainers(engine));
    if (host.engines.present) await environments.#removeStrayContainers(host.engines.present);
    await environments.#removeStrayUsers().catch((error: unknown) => {
      host.log.warn({ error: String(error) }, "accounts of former environments could not be removed");
    });
    return environments;
  }

  /** Accounts of environments that are gone altogether. */
  async #removeStrayUsers(): Promise<void> {
    const { dataDir } = this.#host.config;
    const aside = await readdir(quarantineFolder(dataDir));
    const present = new Set([...this.#managed.keys(), ...aside.map((name) => name.split(".")[0])]);
    for (const id of await usersBelow(environmentsFolder(dataDir))) if (!present.has(id)) await removeUser(id);
  }

  /** What a runner that was ended, or an engine that did not answer, has left of environments that are gone. */
  async #removeStrayContainers(engine: ContainerEngine): Promise<void> {
    const images = [...this.#managed.values()].flatMap(({ containerImage }) => containerImage ?? []);
    const { dataDir } = this.#host.config;
    try {
      await removeStrays(engine, dataDir, { environmentIds: new Set(this.#managed.keys()), images });
      // Those of environments that run are known to their supervisors.
      await removeStrayRuns(engine, dataDir, (id) => this.#managed.get(id)?.isUp ?? false);
    } catch (error) {
      this.#host.log.warn({ error: String(error) }, "containers of former environments could not be removed");
    }
  }

  get ids(): string[] {
    return [...this.#managed.keys()];
  }

  get(environmentId: string): ManagedEnvironment | undefined {
    return this.#managed.get(environmentId);
  }

  /** User ids that files of other environments belong to. */
  reservedUids(environmentId: string): Set<number> {
    const others = [...this.#managed.values()].filter(({ id }) => id !== environmentId);
    return new Set(others.flatMap(({ ownUid }) => (ownUid === undefined ? [] : [ownUid])));
  }

  /** How many there are by state of their machine. */
  counts(): { known: number; running: number } {
    const all = [...this.#managed.values()];
    return { known: all.length, running: all.filter((each) => each.operations !== undefined).length };
  }

  async #open(environmentId: string): Promise<ManagedEnvironment> {
    const known = this.#managed.get(environmentId);
    if (known) return known;
    const opened = await ManagedEnvironment.open(this.#host, environmentId, this.#events);
    this.#managed.set(environmentId, opened);
    return opened;
  }

  /** A complete picture begins. */
  beginSnapshot(): void {
    this.#named = new Set();
  }

  async upsert(desired: DesiredEnvironment): Promise<void> {
    const id = desired.environment?.id ?? "";
    if (!UUID.test(id)) return;
    this.#named?.add(id);
    const environment = await this.#open(id);
    // Outside of a snapshot it is new, or known already: all of its automations have been said, or will be.
    if (!this.#named) environment.automations.complete();
    environment.setGoal({ kind: "keep", desired });
  }

  wantService(desired: DesiredService): void {
    const { id = "", environmentId = "" } = desired.service ?? {};
    this.#named?.add(id);
    this.#managed.get(environmentId)?.automations.wantService(desired);
  }

  wantExecution(desired: DesiredTaskExecution): void {
    const { id = "", metadata } = desired.taskExecution ?? {};
    this.#named?.add(id);
    this.#managed.get(metadata?.environmentId ?? "")?.automations.wantExecution(desired);
  }

  /** A service or an execution is gone. */
  removeAutomation(id: string): void {
    for (const environment of this.#managed.values()) if (environment.automations.remove(id)) return;
  }

  /** The environment was deleted: what is left of it goes, wherever it lies. */
  async remove(environmentId: string): Promise<void> {
    if (!UUID.test(environmentId)) return;
    this.#named?.add(environmentId);
    const known = this.#managed.get(environmentId);
    if (known) return known.setGoal({ kind: "erase" });
    await this.#eraseQuarantined((name) => name.startsWith(`${environmentId}.`));
  }

  /** The picture is complete: what it neither holds nor removes is unknown to the control plane. */
  endSnapshot(): void {
    const named = this.#named;
    this.#named = undefined;
    if (!named) return;
    for (const [id, environment] of this.#managed) {
      environment.automations.keepOnly(named);
      environment.automations.complete();
      if (named.has(id)) environment.publish();
      else environment.setGoal({ kind: "quarantine" });
    }
  }

  /** What became of a report. */
  judged(environmentId: string, outcome: Outcome, status: EnvironmentStatus): void {
    const environment = this.#managed.get(environmentId);
    if (!environment) return;
    environment.reported(status, outcome === Outcome.OK || outcome === Outcome.NOT_ASSIGNED);
    const isDeleted = status.machine?.phase === MachinePhase.DELETED;
    if (isDeleted && (outcome === Outcome.OK || outcome === Outcome.NOT_ASSIGNED))
      environment.setGoal({ kind: "erase" });
    else if (outcome === Outcome.NOT_ASSIGNED) environment.setGoal({ kind: "quarantine" });
  }

  /** Every environment looks again. */
  wakeAll(): void {
    for (const environment of this.#managed.values()) environment.wake();
  }

  /** Ends the processes of all environments and keeps their files; waits five minutes at most. */
  async haltAll(): Promise<void> {
    const all = [...this.#managed.values()];
    for (const environment of all) environment.setGoal({ kind: "halt" });
    const late = delay(HALT_DEADLINE_MS, undefined, { ref: false });
    await Promise.race([Promise.all(all.map((environment) => environment.halted())), late]);
  }

  /** Lets go of everything; environments go on running. */
  async close(): Promise<void> {
    clearInterval(this.#timer);
    await Promise.all([...this.#managed.values()].map((environment) => environment.close()));
  }

  async #sweep(): Promise<void> {
    const { dataDir } = this.#host.config;
    try {
      for (const name of await readdir(trashFolder(dataDir))) {
        if (!this.#managed.has(name)) await this.#erase(join(trashFolder(dataDir), name), name);
      }
      await this.#eraseQuarantined((name) => Date.now() - Number(name.split(".")[1]) > QUARANTINE_MS);
    } catch (error) {
      this.#host.log.warn({ error: String(error) }, "old files could not be erased");
    }
  }

  async #eraseQuarantined(due: (name: string) => boolean): Promise<void> {
    const folder = quarantineFolder(this.#host.config.dataDir);
    for (const name of (await readdir(folder)).filter(due)) {
      await this.#erase(join(folder, name), name.split(".")[0] ?? "");
    }
  }

  /** The user of files that were set aside, then the files: as long as they are there, a crash is made up for. */
  async #erase(folder: string, environmentId: string): Promise<void> {
    const record = await readRecord({ root: folder, record: join(folder, "state.json") });
    await removeUser(environmentId, record?.user);
    await removeTree(folder);
  }
}
