import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import {
  ServicePhase,
  type TaskExecution,
  TaskExecutionPhase,
  type TaskExecutionSpec_Step,
  type TaskExecutionStatus,
  TaskExecutionStatus_StepSchema,
  TaskExecutionStatusSchema,
} from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { ENDED, executionPhase } from "../../../domain/automation-execution.ts";
import { LineLog } from "./line-log.ts";
import { newLogFolder } from "./log-folders.ts";
import { Signal, type Surroundings } from "./parts.ts";
import type { Records } from "./records.ts";
import type { ServiceMachine } from "./service.ts";
import type { Attached, TaskRecord, TaskRun } from "./task-run.ts";

const { PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED } = TaskExecutionPhase;

const LOGS_KEPT = 50;
/** A service that a plan needs may be told of a moment later than the plan. */
const SERVICE_KNOWN_MS = 5_000;
export const LOG_META_FILE = "meta.json";
const FOREGROUND = "the service ended before it was running; its start command has to stay in the foreground";

/** How one step fares. */
export interface StepRecord extends TaskRecord {
  id: string;
}

/** What is remembered of an execution. */
export interface ExecutionRecord {
  steps: StepRecord[];
  startedAt?: number;
  completedAt?: number;
  phase: TaskExecutionPhase;
  failureMessage: string;
  logUrl: string;
}

/** What is wanted of an execution. */
export interface ExecutionWish {
  execution: TaskExecution;
  firingId: string;
  startedBy: string;
}

/** Where an execution finds what its steps are about. */
export interface Workshop {
  /** The run of a task, begun or found: one per step, and within one firing of a trigger one per task. */
  taskRun(step: TaskExecutionSpec_Step, wish: ExecutionWish): TaskRun;
  service(id: string): ServiceMachine | undefined;
}

/** One execution: its groups one after the other, the steps of a group at the same time. */
export class ExecutionMachine {
  readonly id: string;
  readonly #around: Surroundings;
  readonly #records: Records<ExecutionRecord>;
  readonly #workshop: Workshop;
  readonly #tell: (status: TaskExecutionStatus, record: ExecutionRecord) => void;
  readonly #stop = new AbortController();
  readonly #news = new Signal();
  readonly #isReady: (wish: ExecutionWish) => boolean;
  readonly #ended: Promise<void>;
  #wish: ExecutionWish;
  #record: ExecutionRecord;
  #log: LineLog | undefined;

  constructor(
    wish: ExecutionWish,
    around: Surroundings,
    records: Records<ExecutionRecord>,
    workshop: Workshop,
    options: {
      isReady: (wish: ExecutionWish) => boolean;
      tell: (status: TaskExecutionStatus, record: ExecutionRecord) => void;
    },
  ) {
    this.id = wish.execution.id;
    this.#wish = wish;
    this.#around = around;
    this.#records = records;
    this.#workshop = workshop;
    this.#isReady = options.isReady;
    this.#tell = options.tell;
    this.#record = records.read(this.id) ?? { steps: [], phase: PENDING, failureMessage: "", logUrl: "" };
    this.want(wish);
    this.#ended = this.#work().catch((error: unknown) => around.unforeseen(error));
  }

  get hasEnded(): boolean {
    return ENDED.has(this.#record.phase);
  }

  get isRunning(): boolean {
    return this.#record.phase === RUNNING;
  }

  want(wish: ExecutionWish): void {
    this.#wish = wish;
    if (wish.execution.spec?.desiredPhase === STOPPED) this.#stop.abort();
    this.#news.set();
  }

  wake(): void {
    this.#news.set();
  }

  /** Stops what runs; resolves when it has ended. */
  async close(): Promise<void> {
    this.#stop.abort();
    this.#news.set();
    await this.#ended;
  }

  /** Says once more how it is. */
  emit(): void {
    const { phase, failureMessage, logUrl, steps } = this.#record;
    const status = create(TaskExecutionStatusSchema, {
      ...{ phase, failureMessage, logUrl },
      steps: steps.map((step) => create(TaskExecutionStatus_StepSchema, step)),
    });
    this.#tell(status, this.#record);
  }

  async #work(): Promise<void> {
    if (this.hasEnded) return this.emit();
    for (;;) {
      const news = this.#news.takeBack();
      if (this.#stop.signal.aborted || this.#record.steps.length > 0 || this.#isReady(this.#wish)) break;
      await news;
    }
    const plan = this.#wish.execution.spec?.plan ?? [];
    for (const group of plan) {
      if (this.#stop.signal.aborted && !group.steps.some((step) => this.#stepOf(step.id))) break;
      await Promise.all(group.steps.map((step) => this.#step(step)));
      if (group.steps.some((step) => this.#stepOf(step.id)?.phase !== SUCCEEDED)) break;
    }
    const phase = executionPhase(
      plan,
      this.#record.steps.map((step) => create(TaskExecutionStatus_StepSchema, step)),
      this.#stop.signal.aborted,
    );
    this.#set({ phase, completedAt: Date.now() });
    this.#log?.end();
  }

  #stepOf(id: string): StepRecord | undefined {
    return this.#record.steps.find((step) => step.id === id);
  }

  #set(change: Partial<ExecutionRecord>): void {
    this.#record = { ...this.#record, ...change };
    try {
      this.#records.write(this.id, this.#record);
    } catch (error) {
      this.#around.unforeseen(error);
    }
    this.emit();
  }

  #setStep(step: TaskExecutionSpec_Step, record: TaskRecord): void {
    const { phase, failureMessage, output } = record;
    const next: StepRecord = { id: step.id, phase, failureMessage, output };
    const isKnown = this.#stepOf(step.id) !== undefined;
    const steps = this.#record.steps.map((each) => (each.id === step.id ? next : each));
    const failed = phase === FAILED && !this.#record.failureMessage;
    this.#set({
      steps: isKnown ? steps : [...steps, next],
      ...(failed && { failureMessage: `${step.label}: ${failureMessage}` }),
    });
  }

  /** The log begins with the first step. */
  #begin(): LineLog {
    if (this.#log) return this.#log;
    const { metadata, spec } = this.#wish.execution;
    const path = `tasks/${metadata?.taskId}/${this.id}`;
    const folder = newLogFolder(join(this.#around.logs, "tasks", metadata?.taskId ?? ""), this.id, LOGS_KEPT);
    const tasks = (spec?.plan ?? []).flatMap(({ steps }) => steps).filter(({ step }) => step.case === "task");
    const labels = Object.fromEntries(tasks.map(({ id, label }) => [id, label]));
    try {
      writeFileSync(join(folder, LOG_META_FILE), JSON.stringify({ labels }), { mode: 0o600 });
    } catch (error) {
      this.#around.unforeseen(error);
    }
    this.#log = new LineLog(folder);
    this.#log.reopen();
    if (this.#record.startedAt === undefined) {
      this.#set({ startedAt: Date.now(), phase: RUNNING, logUrl: this.#around.logUrl(path) });
    }
    return this.#log;
  }

  async #step(step: TaskExecutionSpec_Step): Promise<void> {
    const known = this.#stepOf(step.id);
    if (known && ENDED.has(known.phase)) return;
    const log = this.#begin();
    const blank = { failureMessage: "", output: {} };
    if (step.step.case === "serviceId") {
      this.#setStep(step, known ?? { ...blank, phase: RUNNING });
      return this.#setStep(step, { ...blank, ...(await this.#untilServiceRuns(step.step.value)) });
    }
    const command = step.step.case === "task" ? step.step.value.spec?.command : "";
    if (!command) return this.#setStep(step, { ...blank, phase: SUCCEEDED });
    this.#setStep(step, known ?? { ...blank, phase: RUNNING });
    await this.#runTask(step, log);
  }

  async #runTask(step: TaskExecutionSpec_Step, log: LineLog): Promise<void> {
    const run = this.#workshop.taskRun(step, this.#wish);
    const attached: Attached = {
      lines: (lines) => log.write(lines, step.id),
      changed: (record) => {
        if (record.phase === RUNNING) this.#setStep(step, record);
      },
    };
    run.attach(attached);
    const stopped = new Promise<"stopped">((resolve) => {
      const { signal } = this.#stop;
      const onStop = () => resolve("stopped");
      if (signal.aborted) onStop();
      else signal.addEventListener("abort", onStop, { once: true });
    });
    const first = await Promise.race([run.result, stopped]);
    if (first !== "stopped") return this.#setStep(step, first);
    // Somebody else may still wait for it.
    const isLast = run.detach(attached);
    this.#setStep(step, isLast ? await run.result : { ...run.record, phase: STOPPED, failureMessage: "" });
  }

  /** Waits until a service runs; the service itself is left as it is, whatever becomes of the step. */
  async #untilServiceRuns(id: string): Promise<Pick<StepRecord, "phase" | "failureMessage">> {
    const { signal } = this.#stop;
    const knownBy = Date.now() + SERVICE_KNOWN_MS;
    for (;;) {
      if (signal.aborted) return { phase: STOPPED, failureMessage: "" };
      const service = this.#workshop.service(id);
      const verdict = service ? serviceVerdict(service) : undefined;
      if (verdict) return verdict;
      if (!service && Date.now() > knownBy) return { phase: FAILED, failureMessage: "the service was deleted" };
      await changeOf(service, signal);
    }
  }
}

/** Whether a step that waits for a service is over. */
function serviceVerdict(service: ServiceMachine): Pick<StepRecord, "phase" | "failureMessage"> | undefined {
  if (service.isPending || !service.status) return undefined;
  switch (service.status.phase) {
    case ServicePhase.RUNNING:
      return { phase: SUCCEEDED, failureMessage: "" };
    case ServicePhase.FAILED:
      return { phase: FAILED, failureMessage: `${service.status.failureMessage}; ${FOREGROUND}` };
    case ServicePhase.STOPPED:
      return { phase: FAILED, failureMessage: FOREGROUND };
    default:
      return undefined;
  }
}

const LOOK_MS = 250;

/** Resolves when the service has changed, when the signal fires, or after a moment. */
async function changeOf(service: ServiceMachine | undefined, signal: AbortSignal): Promise<void> {
  const changed = new AbortController();
  const leave = service?.follow(() => changed.abort());
  await delay(LOOK_MS, undefined, { signal: AbortSignal.any([signal, changed.signal]) }).catch(() => undefined);
  leave?.();
}
