import { createHash } from "node:crypto";
import { constants } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import type { ServiceStatus, TaskExecutionStatus } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { parseOutput } from "./outputs.ts";
import type { Run, RunEnd } from "./run.ts";

/** What a supervisor has to ask of the runner: its own user may not talk to a container engine. */
export interface Containers {
  /**
   * Starts a container that waits for its command in a folder that both can see. Output of the engine that people want
   * to see goes to `onOutput`. Rejects with a CommandProblem, also when the signal fires; nothing is left then.
   */
  start(
    run: string,
    image: string,
    options: { onOutput: (chunk: Buffer) => void; signal: AbortSignal },
  ): Promise<{ pid: number; shared: string }>;
  /**
   * Starts a shell in the container of `run` that waits for its command in `part` of the folder; it carries the mark.
   * Resolves with its pid.
   */
  exec(run: string, part: string, mark: string): Promise<number>;
  /** Kills and removes a container with its folder, or keeps one from being started. */
  remove(run: string): void;
}

/** What services and executions of one environment work with. */
export interface Surroundings {
  /** Folder for what runs, and for what is remembered of it. */
  state: string;
  /** Folder for logs that people read. */
  logs: string;
  /** Variables of every process, with some more. */
  variables(more: Readonly<Record<string, string>>): Record<string, string>;
  /** Where commands start. */
  folder(): string;
  /** Program that runs a command in the dev container; undefined where that is the host, empty while there is none. */
  entrance(): string | undefined;
  /** Values of secrets by id; those that the environment may not have are absent. Rejects if nobody can tell. */
  secrets(ids: readonly string[]): Promise<ReadonlyMap<string, string>>;
  /** What the runner does about containers. */
  containers: Containers;
  /** Public address of a log below the environment's own, for example `services/<id>/<key>`. */
  logUrl(path: string): string;
  /** Seconds and so on that tests make shorter. */
  times: Times;
  unforeseen(error: unknown): void;
}

/** Times in milliseconds. */
export interface Times {
  /** How long a service, or a task, may take to end when it is asked to. */
  serviceStopMs: number;
  taskStopMs: number;
  /** Pause between two attempts of a ready command. */
  readyPauseMs: number;
  /** How long a service without ready command is shown as running, at least. */
  shownRunningMs: number;
  /** How often output files are looked at. */
  outputMs: number;
}

export const TIMES: Times = {
  serviceStopMs: 120_000,
  taskStopMs: 10_000,
  readyPauseMs: 1_000,
  shownRunningMs: 1_000,
  outputMs: 1_000,
};

/** What the engine tells about one item. */
export type News =
  | { kind: "service"; id: string; status: ServiceStatus }
  | { kind: "execution"; id: string; status: TaskExecutionStatus; startedAt?: number; completedAt?: number };

/** A problem that people can do something about; its text is the failure message. */
export class CommandProblem extends Error {}

/** A short name for files, from texts of any form. */
export const keyOf = (...texts: string[]): string =>
  createHash("sha256").update(texts.join("\0")).digest("hex").slice(0, 24);

const SIGNAL_NAMES = new Map(Object.entries(constants.signals).map(([name, number]) => [number, name]));

/** How a command that did not end well ended, for people. */
export function endText(what: string, { code }: RunEnd): string {
  if (code === undefined) return `${what}: process lost`;
  const signal = code > 128 ? SIGNAL_NAMES.get((code - 128) as number) : undefined;
  return signal ? `${what} was ended by ${signal} (exit code ${code})` : `${what} exited with code ${code}`;
}

/** Asks a command to end, then kills what is left; true if it ended by itself in time. */
export async function endRun(run: Run, graceMs: number): Promise<boolean> {
  run.signal("SIGTERM");
  run.signal("SIGCONT");
  const late = Symbol("late");
  const controller = new AbortController();
  const timer = delay(graceMs, late, { signal: controller.signal }).catch(() => late);
  const first = await Promise.race([run.ended, timer]);
  controller.abort();
  await run.kill();
  return first !== late;
}

/** Follows what a run says about itself; `read` gives what is new since the last time, undefined if nothing is. */
export function outputOf(run: Run, notice: (problem: string) => void) {
  let before = "";
  const told = new Set<string>();
  return (): Record<string, string> | undefined => {
    const text = run.output();
    if (text === before) return undefined;
    before = text;
    const { values, problems } = parseOutput(text);
    for (const problem of problems.filter((each) => !told.has(each))) {
      told.add(problem);
      notice(`output: ${problem}`);
    }
    return values;
  };
}

/** Something has happened. Whoever looks at what there is to do takes it back first, so that nothing is missed. */
export class Signal {
  #latch = Promise.withResolvers<void>();
  #isSet = false;

  set(): void {
    this.#isSet = true;
    this.#latch.resolve();
  }

  /** Waits for the next time; call it before looking. */
  takeBack(): Promise<void> {
    if (this.#isSet) this.#latch = Promise.withResolvers<void>();
    this.#isSet = false;
    return this.#latch.promise;
  }
}
