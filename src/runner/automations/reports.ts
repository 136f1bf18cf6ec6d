import { create, type DescMessage, equals, type MessageShape } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import type { Logger } from "pino";
import {
  type AutomationReportResult,
  ReportResult_Outcome as Outcome,
  type ServiceReport,
  ServiceReportSchema,
  type TaskExecutionReport,
  TaskExecutionReportSchema,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import type { ServiceStatus, TaskExecutionStatus } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import type { ControlPlane } from "../control-plane.ts";
import { Waiting } from "../waiting.ts";

const BATCH = 100;

/** Newest reports of one kind; a newer one takes the place of an older one that has not been sent. */
class Outbox<D extends DescMessage> {
  readonly #schema: D;
  readonly #pending = new Map<string, MessageShape<D>>();
  readonly #accepted = new Map<string, MessageShape<D>>();
  readonly #seq = new Map<string, bigint>();

  constructor(schema: D) {
    this.#schema = schema;
  }

  get size(): number {
    return this.#pending.size;
  }

  push(id: string, report: MessageShape<D>): void {
    const accepted = this.#accepted.get(id);
    if (accepted && !this.#pending.has(id) && equals(this.#schema, accepted, report)) return;
    this.#pending.set(id, report);
  }

  take(): [string, MessageShape<D>][] {
    const batch = [...this.#pending].slice(0, BATCH);
    for (const [id] of batch) this.#pending.delete(id);
    return batch;
  }

  putBack(batch: readonly [string, MessageShape<D>][]): void {
    for (const [id, report] of batch) if (!this.#pending.has(id)) this.#pending.set(id, report);
  }

  nextSeq(id: string): bigint {
    const seq = (this.#seq.get(id) ?? 0n) + 1n;
    this.#seq.set(id, seq);
    return seq;
  }

  accept(id: string, report: MessageShape<D>): void {
    this.#accepted.set(id, report);
  }

  forget(id: string): void {
    for (const map of [this.#pending, this.#accepted, this.#seq]) map.delete(id);
  }

  restart(): void {
    this.#accepted.clear();
    this.#seq.clear();
  }
}

/** How an execution fares. */
export interface ExecutionNews {
  status: TaskExecutionStatus;
  /** Milliseconds since the epoch. */
  startedAt?: number;
  completedAt?: number;
}

/** How services and executions fare, on the way to the control plane. */
export class AutomationReports {
  readonly #log: Logger;
  readonly #services = new Outbox(ServiceReportSchema);
  readonly #executions = new Outbox(TaskExecutionReportSchema);
  readonly #waiting = new Waiting();
  readonly #gone: (id: string) => void;
  #drained: (() => void)[] = [];
  #isSending = false;

  /** `gone` is told of an item that the control plane knows nothing of. */
  constructor(log: Logger, gone: (id: string) => void) {
    this.#log = log;
    this.#gone = gone;
  }

  get #hasNews(): boolean {
    return this.#services.size + this.#executions.size > 0;
  }

  /** Something waits to be sent; resolves at once if it does already, or when the signal fires. */
  waiting(signal: AbortSignal): Promise<void> {
    return this.#waiting.until(() => this.#hasNews, signal);
  }

  pushService(id: string, status: ServiceStatus): void {
    this.#services.push(id, create(ServiceReportSchema, { id, status }));
    this.#waiting.wake();
  }

  pushExecution(id: string, { status, startedAt, completedAt }: ExecutionNews): void {
    const times = {
      ...(startedAt !== undefined && { startedAt: timestampFromMs(startedAt) }),
      ...(completedAt !== undefined && { completedAt: timestampFromMs(completedAt) }),
    };
    this.#executions.push(id, create(TaskExecutionReportSchema, { id, status, ...times }));
    this.#waiting.wake();
  }

  /** The new link has to be told everything. */
  restart(): void {
    this.#services.restart();
    this.#executions.restart();
  }

  /** Resolves when everything that waits now has been sent, or after so long. */
  async sent(withinMs: number): Promise<void> {
    if (!this.#hasNews && !this.#isSending) return;
    await new Promise<void>((resolve) => {
      this.#drained.push(resolve);
      setTimeout(resolve, withinMs).unref();
    });
  }

  /** Sends one batch; what could not be delivered waits on, and the error is thrown. */
  async flush({ control }: ControlPlane, linkId: string, signal: AbortSignal): Promise<void> {
    const [services, executions] = [this.#services.take(), this.#executions.take()];
    if (services.length + executions.length === 0) return;
    this.#isSending = true;
    try {
      const answer = await control.reportAutomations(
        {
          linkId,
          services: services.map(([id, report]): ServiceReport => ({ ...report, seq: this.#services.nextSeq(id) })),
          executions: executions.map(
            ([id, report]): TaskExecutionReport => ({ ...report, seq: this.#executions.nextSeq(id) }),
          ),
        },
        { signal },
      );
      for (const [index, [id, report]] of services.entries()) {
        if (this.#judge(id, answer.services[index])) this.#services.accept(id, report);
      }
      for (const [index, [id, report]] of executions.entries()) {
        if (this.#judge(id, answer.executions[index])) this.#executions.accept(id, report);
      }
    } catch (error) {
      this.#services.putBack(services);
      this.#executions.putBack(executions);
      throw error;
    } finally {
      this.#isSending = false;
    }
    if (!this.#hasNews) for (const resolve of this.#drained.splice(0)) resolve();
  }

  #judge(id: string, result: AutomationReportResult | undefined): boolean {
    const outcome = result?.outcome ?? Outcome.UNSPECIFIED;
    if (outcome === Outcome.OK) return true;
    this.#log.info({ id, outcome: Outcome[outcome] }, "a report about a service or an execution was not accepted");
    if (outcome === Outcome.NOT_ASSIGNED) {
      this.#services.forget(id);
      this.#executions.forget(id);
      this.#gone(id);
    }
    return false;
  }
}
