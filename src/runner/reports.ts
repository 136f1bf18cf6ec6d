import { clone, equals } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import type { Logger } from "pino";
import { ReportResult_Outcome as Outcome, type ReportResult } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  type EnvironmentStatus,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { ControlPlane } from "./control-plane.ts";
import { Waiting } from "./waiting.ts";

const BATCH = 100;
// What comes on the way to a state that somebody waits for follows so soon that most of it need not be told by itself.
const LINGER_MS = 250;

const ON_THE_WAY: ReadonlySet<MachinePhase | undefined> = new Set([
  MachinePhase.CREATING,
  MachinePhase.STARTING,
  MachinePhase.RUNNING,
]);

/** The environment comes up, and nothing has gone wrong so far. */
const isOnTheWay = ({ machine, content, environmentUrls, runnerAck }: EnvironmentStatus) =>
  ON_THE_WAY.has(machine?.phase) &&
  !(environmentUrls?.ops || machine?.failureMessage || content?.failureMessage || runnerAck?.message);

/** What a report came to, for whoever acts on it. */
export type Judged = (environmentId: string, outcome: Outcome, status: EnvironmentStatus) => void;

/**
 * The newest status of each environment on its way to the control plane. Nothing else is queued: a newer status takes
 * the place of an older one that has not been sent. Sequence numbers belong to a link and begin anew with the next.
 */
export class Reports {
  readonly #log: Logger;
  readonly #judged: Judged;
  readonly #pending = new Map<string, EnvironmentStatus>();
  readonly #accepted = new Map<string, EnvironmentStatus>();
  readonly #seq = new Map<string, bigint>();
  /** Sessions of the machines that the control plane has heard of. */
  readonly #told = new Map<string, string | undefined>();
  readonly #waiting = new Waiting();
  #lingering: NodeJS.Timeout | undefined;

  constructor(log: Logger, judged: Judged) {
    this.#log = log;
    this.#judged = judged;
  }

  push(environmentId: string, status: EnvironmentStatus): void {
    const known = this.#accepted.get(environmentId);
    if (known && !this.#pending.has(environmentId) && equals(EnvironmentStatusSchema, known, status)) return;
    this.#pending.set(environmentId, status);
    // As long as the control plane knows of no machine it takes nothing to be there that could be stopped or erased.
    const session = status.machine?.session;
    const isFirst = this.#told.get(environmentId) !== session;
    this.#told.set(environmentId, session);
    if (isOnTheWay(status) && !isFirst) this.#lingering ??= setTimeout(() => this.#due(), LINGER_MS).unref();
    else this.#due();
  }

  #due(): void {
    clearTimeout(this.#lingering);
    this.#lingering = undefined;
    this.#waiting.wake();
  }

  /** Forgets an environment that is gone. */
  forget(environmentId: string): void {
    for (const map of [this.#pending, this.#accepted, this.#seq, this.#told]) map.delete(environmentId);
  }

  /** Forgets what an earlier link has sent: the new one has to be told everything. */
  restart(): void {
    this.#accepted.clear();
    this.#seq.clear();
    this.#told.clear();
  }

  /** Something waits to be sent; resolves at once if it does already, or when the signal fires. */
  waiting(signal: AbortSignal): Promise<void> {
    return this.#waiting.until(() => this.#pending.size > 0 && !this.#lingering, signal);
  }

  /** Sends one batch. What could not be delivered waits on, unless it is outdated by now; the error is thrown. */
  async flush({ control }: ControlPlane, linkId: string, signal: AbortSignal): Promise<void> {
    const batch = [...this.#pending].slice(0, BATCH);
    for (const [id] of batch) this.#pending.delete(id);
    try {
      await this.#send(control, linkId, batch, signal);
    } catch (error) {
      const isMalformed = ConnectError.from(error).code === Code.InvalidArgument;
      if (!isMalformed || batch.length === 1) {
        if (isMalformed) return this.#drop(batch);
        for (const [id, status] of batch) if (!this.#pending.has(id)) this.#pending.set(id, status);
        throw error;
      }
      // One of them cannot be read; alone each shows whether it is the one.
      for (const item of batch) await this.#sendAlone(control, linkId, item, signal);
    }
  }

  async #sendAlone(
    control: ControlPlane["control"],
    linkId: string,
    item: [string, EnvironmentStatus],
    signal: AbortSignal,
  ): Promise<void> {
    try {
      await this.#send(control, linkId, [item], signal);
    } catch (error) {
      if (ConnectError.from(error).code === Code.InvalidArgument) return this.#drop([item]);
      if (!this.#pending.has(item[0])) this.#pending.set(...item);
      throw error;
    }
  }

  #drop(batch: readonly [string, EnvironmentStatus][]): void {
    for (const [environmentId] of batch) this.#log.error({ environmentId }, "a report was refused as malformed");
  }

  async #send(
    control: ControlPlane["control"],
    linkId: string,
    batch: readonly [string, EnvironmentStatus][],
    signal: AbortSignal,
  ): Promise<void> {
    const items = batch.map(([environmentId, status]) => {
      const seq = (this.#seq.get(environmentId) ?? 0n) + 1n;
      this.#seq.set(environmentId, seq);
      return { environmentId, seq, status: clone(EnvironmentStatusSchema, status) };
    });
    const { results } = await control.reportEnvironments({ linkId, items }, { signal });
    for (const [index, [environmentId, status]] of batch.entries()) {
      const result: ReportResult | undefined = results[index];
      const outcome = result?.outcome ?? Outcome.UNSPECIFIED;
      if (outcome === Outcome.OK) this.#accepted.set(environmentId, status);
      else this.#log.warn({ environmentId, outcome: Outcome[outcome] }, "a report was not accepted");
      this.#judged(environmentId, outcome, status);
    }
  }
}
