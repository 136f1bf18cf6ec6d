import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type {
  EnvironmentVariableItem,
  RunsOn,
  ServiceStatus,
  TaskExecutionStatus,
} from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { parseOutput } from "./outputs.ts";
import type { Command, Run, RunEnd } from "./run.ts";

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
  /** The environment's dev container runs in a container. */
  isContained(): boolean;
  /** Values of secrets by id; those that the environment may not have are absent. Rejects if nobody can tell. */
  secrets(ids: readonly string[]): Promise<ReadonlyMap<string, string>>;
  /** Public address of a log below the environment's own, for example `services/<id>/<key>`. */
  logUrl(path: string): string;
  /** Names the runner in messages for people. */
  runnerName(): string;
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

/**
 * A command line as a person would have typed it at the prompt of a login shell. What its profile does to PATH, which many
 * replace, comes after what the environment says.
 */
const shellFor = (text: string): readonly [string, ...string[]] => [
  "/bin/sh",
  "-c",
  'exec "$(command -v bash || echo sh)" "$@"',
  "sh",
  "-l",
  "-c",
  `PATH=$BERTH_PATH:$PATH; unset BERTH_PATH; ${text}`,
];

/** Why nothing runs in a container: whoever has an engine has to hear that it is not used. */
function engineProblem(around: Surroundings): string {
  const folders = (around.variables({}).PATH ?? "").split(":");
  const engine = ["docker", "podman"].find((name) => folders.some((folder) => existsSync(join(folder, name))));
  const found = engine ? `${engine} is not used by this version of the runner` : "none found";
  return `runs_on.docker needs a container engine; ${found} on runner ${around.runnerName()}`;
}

/** A command of an automation with all that it gets, or the problem that keeps it from running. */
export async function commandOf(
  around: Surroundings,
  command: { text: string; env: readonly EnvironmentVariableItem[]; runsOn?: RunsOn | undefined },
  own: Readonly<Record<string, string>>,
): Promise<Command> {
  if (command.runsOn?.target.case === "docker") throw new CommandProblem(engineProblem(around));
  if (command.runsOn?.target.case !== "machine" && around.isContained()) {
    throw new CommandProblem("this runner cannot run it in the dev container yet: set runs_on.machine");
  }
  const env = around.variables({ ...(await resolved(around, command.env)), ...own });
  return {
    argv: shellFor(command.text),
    cwd: around.folder(),
    env: { ...env, BERTH_PATH: env.PATH ?? "" },
  };
}

/** Values of variables at this moment. */
async function resolved(
  around: Surroundings,
  env: readonly EnvironmentVariableItem[],
): Promise<Record<string, string>> {
  const references = env.flatMap(({ name, source }) => {
    const from = source.case === "valueFrom" ? source.value.source : undefined;
    return from?.case === "secretRef" ? [{ name, id: from.value.id.toLowerCase() }] : [];
  });
  const values = references.length ? await around.secrets([...new Set(references.map(({ id }) => id))]) : new Map();
  const missing = references.find(({ id }) => !values.has(id));
  if (missing) throw new CommandProblem(`variable ${missing.name}: secret not available`);
  const secret = new Map(references.map(({ name, id }) => [name, String(values.get(id))]));
  return Object.fromEntries(
    env.map(({ name, source }) => [name, secret.get(name) ?? (source.case === "value" ? source.value : "")]),
  );
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
