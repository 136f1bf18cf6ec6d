import { createHash } from "node:crypto";
import { join } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import type { ExecResponse } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { lineWriter } from "../logs.ts";
import type { EnvironmentPaths } from "../paths.ts";
import type { SupervisorClient } from "../supervisor/client.ts";
import { UNATTENDED } from "../supervisor/private-http.ts";
import { shellQuoted } from "../supervisor/shell.ts";
import type { CommandPart, LifecycleCommand, StepOutcome } from "./lifecycle.ts";
import { followOutput } from "./output.ts";

// Commands run in the environment's supervisor, within its limits and as its user, and go on when the runner dies: the
// next one joins them by their operation id. A command that has ended leaves a marker, so that it never runs twice.

/** One command of a run. */
export interface Step {
  /** Tells it from all others of the environment; the same key never runs again once the command has ended. */
  key: string;
  command: LifecycleCommand;
  /** The steps after it are left out if it fails. */
  endsRun: boolean;
  /** It may take so long, unless the run ends before. */
  timeoutMs?: number;
}

export interface RunOptions {
  /** Supervisor that runs a step; one that cannot be had leaves the run `lost`. */
  clientOf(step: Step): SupervisorClient | Promise<SupervisorClient>;
  paths: Pick<EnvironmentPaths, "run" | "logs">;
  /** Owner of what the commands write. */
  uid: number;
  /** Where they run. */
  folder: string;
  steps: readonly Step[];
  /** The start within which a step that was cut off is not tried over and over. */
  attempt: string;
  /** The steps together may take so long; 0 = as long as they like. */
  timeoutMs: number;
  /** A step begins. */
  onStep(step: Step): void;
  /** A step has ended; `failure` is empty if well. */
  onEnd(step: Step, failure: string): void;
  write(line: string): void;
  /** Something has ended. */
  changed(): void;
}

/** Steps at work in the background. */
export interface Run {
  /** `lost`: the supervisor has gone, so that somebody has to look for them again. */
  readonly state: "running" | "done" | "lost";
  /** Steps that have ended since the last call; those that were left out count as well. */
  take(): StepOutcome[];
  /** Ends what runs; resolves when it has ended. */
  cancel(): Promise<void>;
  /** Lets go: the commands run on. */
  abandon(): void;
}

const ATTEMPTS = 3;
const CANCEL_MS = 15_000;
const MAX_LABEL = 60;
const headers = { [UNATTENDED]: "1" };
const digest = (...parts: readonly unknown[]) =>
  createHash("sha256").update(JSON.stringify(parts)).digest("hex").slice(0, 32);

/** Runs a text unless its marker says that it has ended before; its output replaces that of earlier runs. */
function once(text: string, marker: string, output: string): string {
  return `marker=${shellQuoted(marker)} output=${shellQuoted(output)}
if [ -f "$marker" ]; then exit "$(cat -- "$marker")"; fi
mkdir -p -- "\${marker%/*}" "\${output%/*}" || exit 1
rm -f -- "\${marker%-*}"-* "\${output%-*}"-*
exec >"$output" 2>&1 || exit 1
/bin/sh -c ${shellQuoted(text)}
code=$?
# One that a signal has ended may have been cut off.
if [ "$code" -lt 128 ]; then echo "$code" >"$marker.new" && mv -f -- "$marker.new" "$marker"; fi
exit "$code"`;
}

/** Starts steps one after the other; the parts of each run side by side. */
export function startRun(options: RunOptions): Run {
  const { steps } = options;
  const letGo = new AbortController();
  const stopped = new AbortController();
  const operations = new Map<string, SupervisorClient>();
  let outcomes: StepOutcome[] = [];
  let state: Run["state"] = steps.length > 0 ? "running" : "done";
  const deadline = options.timeoutMs > 0 ? Date.now() + options.timeoutMs : undefined;

  const exec = async (
    client: SupervisorClient,
    step: Step,
    operationId: string,
    command: string,
  ): Promise<ExecResponse> => {
    const left = Math.min(step.timeoutMs ?? Infinity, deadline === undefined ? Infinity : deadline - Date.now());
    const timeoutSeconds = left === Infinity ? 0 : Math.max(1, Math.ceil(left / 1000));
    operations.set(operationId, client);
    try {
      return await client.exec(
        { command, workingDirectory: options.folder, operationId, timeoutSeconds },
        { signal: letGo.signal, headers },
      );
    } finally {
      operations.delete(operationId);
    }
  };

  const runPart = async (client: SupervisorClient, step: Step, part: CommandPart, index: number): Promise<string> => {
    const { name, parts } = step.command;
    const file = `${name}-${index}-${digest(step.key)}`;
    const output = join(options.paths.logs, "devcontainer", file);
    const command = once(part.text, join(options.paths.run, "devcontainer", file), output);
    const label = parts.length > 1 ? `[${part.label.slice(0, MAX_LABEL)}] ` : "";
    const ended = new AbortController();
    const lines = lineWriter((line) => options.write(label + line));
    const following = followOutput(output, options.uid, ended.signal, lines.push).catch(() => undefined);
    try {
      return await attempts((attempt) =>
        exec(client, step, digest(options.attempt, step.key, index, attempt), command),
      );
    } finally {
      ended.abort();
      // A runner that goes away must not write on while the next one does.
      if (!letGo.signal.aborted) {
        await following;
        lines.end();
      }
    }
  };

  const attempts = async (run: (attempt: number) => Promise<ExecResponse>): Promise<string> => {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      try {
        return failureOf(await run(attempt));
      } catch (error) {
        const { code } = ConnectError.from(error);
        if (code === Code.NotFound) return "its folder does not exist";
        // Cut off with the supervisor of before, or the file says something else by now.
        if (code !== Code.Aborted && code !== Code.AlreadyExists) throw error;
      }
    }
    return `was cut off ${ATTEMPTS} times`;
  };

  const runStep = async (step: Step): Promise<string> => {
    const client = await options.clientOf(step);
    if (stopped.signal.aborted) return "";
    options.onStep(step);
    const { name, parts } = step.command;
    const results = await Promise.all(parts.map((part, index) => runPart(client, step, part, index)));
    const failed = results.findIndex((failure) => failure !== "");
    if (failed < 0) return "";
    const label = parts[failed]?.label.slice(0, MAX_LABEL);
    return `${name}${label ? ` (${label})` : ""} ${results[failed]}`;
  };

  const work = async () => {
    for (const [index, step] of steps.entries()) {
      const failure = await runStep(step);
      if (stopped.signal.aborted) return;
      const isOver = failure !== "" && step.endsRun;
      const left = isOver ? steps.slice(index + 1) : [];
      options.onEnd(step, failure);
      if (left.length > 0) options.write(`${left.map(({ command }) => command.name).join(", ")} left out`);
      outcomes.push({ key: step.key, failure }, ...left.map(({ key }) => ({ key, failure: "" })));
      options.changed();
      if (isOver) return;
    }
  };

  const finished = work().then(
    () => {
      state = stopped.signal.aborted ? "lost" : "done";
    },
    () => {
      letGo.abort();
      state = "lost";
    },
  );
  void finished.then(() => options.changed());
  return {
    get state() {
      return state;
    },
    take: () => {
      const taken = outcomes;
      outcomes = [];
      return taken;
    },
    async cancel() {
      stopped.abort();
      const late = setTimeout(() => letGo.abort(), CANCEL_MS);
      const asked = [...operations].map(([operationId, client]) =>
        client.cancelExec({ operationId }, { headers }).catch(() => undefined),
      );
      await Promise.all(asked);
      await finished;
      clearTimeout(late);
    },
    abandon: () => letGo.abort(),
  };
}

function failureOf({ exitCode, stderr }: ExecResponse): string {
  if (exitCode === 0) return "";
  // What the command writes goes elsewhere; this is the supervisor's.
  return stderr.includes("command timed out") ? "did not end in time" : `failed with exit code ${exitCode}`;
}
