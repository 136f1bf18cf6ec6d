import { join } from "node:path";
import type { TaskExecutionSpec_Task } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { TaskExecutionPhase } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { lineBatches } from "./line-log.ts";
import { endRun, endText, outputOf, type Surroundings } from "./parts.ts";
import type { Records } from "./records.ts";
import { Run, type RunEnd } from "./run.ts";
import { problemOf } from "./service.ts";
import { forgetRun } from "./start.ts";
import { isOfDevContainer, targetOf } from "./targets.ts";

const { RUNNING, SUCCEEDED, FAILED, STOPPED } = TaskExecutionPhase;

/** What is remembered of one run of a task's command. */
export interface TaskRecord {
  phase: TaskExecutionPhase;
  failureMessage: string;
  output: Record<string, string>;
}

/** A task as it is run. */
export interface StartedTask {
  reference: string;
  executionId: string;
  task: TaskExecutionSpec_Task;
  /** Trigger or person that the execution was started by. */
  startedBy: string;
}

/** A step of an execution that waits for the run. */
export interface Attached {
  /** Lines of the command, as they come. */
  lines(lines: readonly string[]): void;
  /** It goes on, with this. */
  changed(record: TaskRecord): void;
}

/**
 * One run of a task's command, for every step that waits for it: within one firing of a trigger a task runs once. It is
 * written down before it begins; a run that is found written down never begins again.
 */
export class TaskRun {
  readonly key: string;
  readonly result: Promise<TaskRecord>;
  readonly #around: Surroundings;
  readonly #records: Records<TaskRecord>;
  readonly #attached = new Set<Attached>();
  readonly #stop = Promise.withResolvers<"stop">();
  readonly #task: StartedTask;
  #record: TaskRecord;

  constructor(key: string, task: StartedTask, around: Surroundings, records: Records<TaskRecord>) {
    this.key = key;
    this.#task = task;
    this.#around = around;
    this.#records = records;
    const known = records.read(key);
    this.#record = known ?? { phase: RUNNING, failureMessage: "", output: {} };
    this.result = this.#work(known !== undefined).catch((error: unknown) =>
      this.#end(FAILED, problemOf("the command cannot be started", error)),
    );
  }

  get record(): TaskRecord {
    return this.#record;
  }

  attach(step: Attached): void {
    this.#attached.add(step);
  }

  /** It is at work in the dev container. */
  get isInDevContainer(): boolean {
    const { task, startedBy } = this.#task;
    return this.#record.phase === RUNNING && isOfDevContainer(task.spec?.runsOn, startedBy);
  }

  /** The step no longer waits. True if it was the last one that did: then the command is stopped. */
  detach(step: Attached): boolean {
    const isLast = this.#attached.size === 1 && this.#attached.has(step);
    if (isLast) this.#stop.resolve("stop");
    else this.#attached.delete(step);
    return isLast;
  }

  get #folder(): string {
    return join(this.#around.state, "runs", this.key);
  }

  async #work(isKnown: boolean): Promise<TaskRecord> {
    const { reference, executionId, task, startedBy } = this.#task;
    if (isKnown && this.#record.phase !== RUNNING) return this.#record;
    const { write: take, end: finish } = lineBatches((lines) => {
      for (const step of this.#attached) step.lines(lines);
    });
    if (isKnown) {
      const found = Run.adopt(this.#folder, this.key, take);
      if (!(found instanceof Run)) return this.#ended(found ?? { code: undefined });
      return this.#follow(found, finish);
    }
    // Before anything else: what is not written down could run twice.
    this.#records.write(this.key, this.#record);
    const spec = task.spec;
    const own = { BERTH_AUTOMATION: reference, BERTH_EXECUTION_ID: executionId };
    const target = targetOf(this.#around, spec?.runsOn, startedBy);
    const asked = new AbortController();
    void this.#stop.promise.then(() => asked.abort());
    try {
      const place = { folder: this.#folder, mark: this.key };
      const run = await target.start(
        place,
        { text: spec?.command ?? "", env: spec?.env ?? [], own },
        take,
        asked.signal,
      );
      return await this.#follow(run, finish);
    } catch (error) {
      finish();
      if (asked.signal.aborted) return this.#end(STOPPED, "");
      throw error;
    }
  }

  async #follow(run: Run, finish: () => void): Promise<TaskRecord> {
    const output = outputOf(run, (problem) => {
      for (const step of this.#attached) step.lines([problem]);
    });
    const readOutput = () => {
      const values = output();
      if (values) this.#set({ output: values });
    };
    const look = setInterval(readOutput, this.#around.times.outputMs);
    try {
      const first = await Promise.race([run.ended, this.#stop.promise]);
      if (first !== "stop") {
        finish();
        readOutput();
        return this.#ended(first);
      }
      const { taskStopMs } = this.#around.times;
      const isObedient = await endRun(run, taskStopMs);
      finish();
      readOutput();
      if (isObedient) return this.#end(STOPPED, "");
      return this.#end(FAILED, `the command did not end within ${taskStopMs / 1000} seconds and was killed`);
    } finally {
      clearInterval(look);
    }
  }

  #ended(end: RunEnd): TaskRecord {
    return end.code === 0 ? this.#end(SUCCEEDED, "") : this.#end(FAILED, endText("the command", end));
  }

  #end(phase: TaskExecutionPhase, failureMessage: string): TaskRecord {
    this.#set({ phase, failureMessage });
    void forgetRun(this.#around, this.#folder).catch((error: unknown) => this.#around.unforeseen(error));
    return this.#record;
  }

  #set(change: Partial<TaskRecord>): void {
    this.#record = { ...this.#record, ...change };
    try {
      this.#records.write(this.key, this.#record);
    } catch (error) {
      this.#around.unforeseen(error);
    }
    for (const step of this.#attached) step.changed(this.#record);
  }
}
