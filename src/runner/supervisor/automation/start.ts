import { existsSync } from "node:fs";
import { rm } from "node:fs/promises";
import { basename, join } from "node:path";
import type { EnvironmentVariableItem } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { CommandProblem, type Surroundings } from "./parts.ts";
import type { Run } from "./run.ts";

/** A command of an automation. */
export interface AutomationCommand {
  text: string;
  env: readonly EnvironmentVariableItem[];
  /** Variables that win over all others. */
  own: Readonly<Record<string, string>>;
}

/** Where a command is remembered, and the mark of all its processes. */
export interface RunPlace {
  folder: string;
  mark: string;
}

export type TakeOutput = (chunk: Buffer) => void;

/** How a short command went. */
export interface Attempt {
  code: number;
  /** The end of what it has said. */
  text: string;
}

/**
 * Where commands run. Each rejects with a CommandProblem, or a system error, if a command cannot be started; a command
 * that is `beside` another one belongs to the same service and finds what that one has made.
 */
export interface Target {
  /** Starts a command; when the signal fires before that, nothing is left of it. */
  start(place: RunPlace, command: AutomationCommand, take: TakeOutput, signal: AbortSignal): Promise<Run>;
  startBeside(main: RunPlace, place: RunPlace, command: AutomationCommand, take: TakeOutput): Promise<Run>;
  /** Runs a command to its end, which comes no later than `until`, and at once when the signal fires. */
  attempt(
    main: RunPlace,
    mark: string,
    command: AutomationCommand,
    end: { until: number; signal: AbortSignal },
  ): Promise<Attempt>;
}

/** In the folder of a command that has, or may have, a container. */
export const CONTAINER_FILE = "container";

/** Removes what a command that is over has left. */
export async function forgetRun({ containers }: Surroundings, folder: string): Promise<void> {
  if (existsSync(join(folder, CONTAINER_FILE))) containers.remove(basename(folder));
  await rm(folder, { recursive: true, force: true });
}

/** Values of variables at this moment. */
export async function resolvedVariables(
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

const ATTEMPT_OUTPUT_BYTES = 16 * 1024;

/** Keeps the end of what is said. */
export function lastWords(): { take: TakeOutput; text(): string } {
  let text = "";
  return {
    take: (chunk) => {
      text = (text + chunk.toString()).slice(-ATTEMPT_OUTPUT_BYTES);
    },
    text: () => text,
  };
}
