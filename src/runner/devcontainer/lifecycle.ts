import { basename } from "node:path";
import { EnvironmentSpec_DevContainer_LifecycleStage as Stage } from "../../../gen/gitpod/v1/environment_pb.js";
import { shellQuoted } from "../supervisor/shell.ts";

// What a dev container file asks to be run, and when. Pure.

/** A text for a shell; `label` tells it from those that run side by side with it, and is empty if it runs alone. */
export interface CommandPart {
  label: string;
  text: string;
}

/** A command of the dev container file; its parts run side by side. */
export interface LifecycleCommand {
  /** Name of the property, such as `postCreateCommand`. */
  name: string;
  parts: CommandPart[];
}

/** The commands of a file, in the order in which they run. */
export interface Lifecycle {
  /** Once per dev container session. */
  create: LifecycleCommand[];
  /** With every start. */
  start: LifecycleCommand[];
  /** With every start, after it; nobody waits for it. */
  attach: LifecycleCommand[];
}

/** How a step ended; `failure` is empty if well. */
export interface StepOutcome {
  key: string;
  failure: string;
}

/** What a dev container file that asks for nothing asks for. */
export const NO_LIFECYCLE: Readonly<Lifecycle> = { create: [], start: [], attach: [] };

// A command line of the shell is one argument, and it is quoted once more on its way there.
const MAX_TEXT_BYTES = 32 * 1024;
const MAX_PARTS = 32;
const CREATE = ["initializeCommand", "onCreateCommand", "updateContentCommand", "postCreateCommand"];
const PREBUILD = CREATE.slice(0, 3);
const START = ["postStartCommand"];
const ATTACH = ["postAttachCommand"];

/** Names of all commands, in order. */
export const LIFECYCLE_COMMANDS: readonly string[] = [...CREATE, ...START, ...ATTACH];

/** Replaces the variables that stand for the checkout; the host is the container here, so all lead to the same folder. */
export function withFolder(text: string, folder: string): string {
  return text
    .replaceAll(/\$\{(local|container)WorkspaceFolder\}/g, () => folder)
    .replaceAll(/\$\{(local|container)WorkspaceFolderBasename\}/g, () => basename(folder));
}

function textOf(name: string, value: unknown, folder: string): string {
  const isArguments = Array.isArray(value) && value.every((each): each is string => typeof each === "string");
  if (typeof value !== "string" && !isArguments) {
    throw new Error(`${name} is neither a command line nor a list of arguments`);
  }
  const filled = isArguments
    ? value.map((each) => shellQuoted(withFolder(each, folder))).join(" ")
    : withFolder(value, folder).trim();
  if (filled.includes("\0")) throw new Error(`${name} contains NUL`);
  if (Buffer.byteLength(filled) > MAX_TEXT_BYTES) throw new Error(`${name} is longer than ${MAX_TEXT_BYTES} bytes`);
  return filled;
}

function commandOf(name: string, value: unknown, folder: string): LifecycleCommand[] {
  if (value === undefined || value === null) return [];
  const isSeveral = typeof value === "object" && !Array.isArray(value);
  const entries: [string, unknown][] = isSeveral ? Object.entries(value) : [["", value]];
  if (entries.length > MAX_PARTS) throw new Error(`${name} has more than ${MAX_PARTS} commands`);
  const parts = entries.map(([label, each]) => ({
    label,
    text: textOf(label ? `${name}.${label.slice(0, 100)}` : name, each, folder),
  }));
  const wanted = parts.filter(({ text }) => text !== "");
  return wanted.length > 0 ? [{ name, parts: wanted }] : [];
}

/** The commands of a dev container file up to a stage. Throws with a text for people for one that cannot be run. */
export function lifecycleOf(content: Readonly<Record<string, unknown>>, stage: Stage, folder: string): Lifecycle {
  const of = (names: readonly string[]) => names.flatMap((name) => commandOf(name, content[name], folder));
  if (stage === Stage.PREBUILD) return { create: of(PREBUILD), start: [], attach: [] };
  return { create: of(CREATE), start: of(START), attach: of(ATTACH) };
}
