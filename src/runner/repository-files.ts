import { createHash } from "node:crypto";
import { posix } from "node:path";
import { create } from "@bufbuild/protobuf";
import {
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentStatus_DevContainer_Presence as DevContainerPresence,
  type EnvironmentSpec_DevContainer,
  type EnvironmentStatus_DevContainer,
  EnvironmentStatus_DevContainerSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { runCommand } from "./commands.ts";
import type { ContainerProgress } from "./devcontainer/belongings.ts";
import { LIFECYCLE_COMMANDS, type Lifecycle, lifecycleOf, NO_LIFECYCLE, withFolder } from "./devcontainer/lifecycle.ts";
import { type ContainerPlan, containerPlan } from "./devcontainer/plan.ts";
import type { Run } from "./devcontainer/run.ts";
import { parseJsonc } from "./jsonc.ts";
import { commandUser } from "./machine.ts";
import type { Inhabitant } from "./users.ts";

// Files of the checkout are read by a command that runs as the environment's user: a link there may point anywhere.

const MAX_FILE_BYTES = 1024 * 1024;
const READ_DEADLINE_MS = 20_000;
const NONE = 3;
const DEVCONTAINER_FILES = [".devcontainer/devcontainer.json", ".devcontainer.json"];
// Arguments: folder, most bytes to show, candidates in order. Prints the name of the first file, and its content.
const findFirst = (more: string) => `cd -P -- "$1" 2>/dev/null || exit ${NONE}; top=$PWD; limit=$2; shift 2
for each in "$@" ${more}; do
  [ -f "$each" ] || continue
  case $(realpath -- "$each") in
    "\${top%/}"/*) printf '%s\\n' "$each"; exec head -c "$limit" -- "$each" ;;
  esac
done
exit ${NONE}`;
const FIND_FILE = findFirst("");
const FIND_DEVCONTAINER = findFirst(".devcontainer/*/devcontainer.json");

export interface FoundFile {
  /** Below the folder of the checkout. */
  path: string;
  /** Cut when it is longer than any file that is looked for may be. */
  text: string;
}

/** Where the files of a repository are read, and as whom. */
export interface Checkout {
  folder: string;
  user: Inhabitant;
}

async function find(checkout: Checkout, script: string, candidates: readonly string[]): Promise<FoundFile | undefined> {
  const args = ["-c", script, "sh", checkout.folder, String(MAX_FILE_BYTES + 1), ...candidates];
  const { code, stdout } = await runCommand("sh", args, {
    user: commandUser(checkout.user),
    timeoutMs: READ_DEADLINE_MS,
    maxOutput: MAX_FILE_BYTES + 4096,
  });
  if (code !== 0) return undefined;
  const end = stdout.indexOf("\n");
  return { path: stdout.slice(0, end), text: stdout.slice(end + 1) };
}

/** The path as one below the checkout; undefined if it leads out of it. */
function inside(path: string): string | undefined {
  const normal = posix.normalize(path);
  return normal.startsWith("../") || normal === ".." || normal.startsWith("/") ? undefined : `./${normal}`;
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null;
const isVariable = (entry: [string, unknown]): entry is [string, string] =>
  /^[A-Za-z_][A-Za-z0-9_]*$/.test(entry[0]) && typeof entry[1] === "string" && !/\$\{|\0/.test(entry[1]);

/** Variables that need nothing but the checkout to be filled in. */
function literals(value: unknown, folder: string): Record<string, string> {
  if (!isRecord(value)) return {};
  const filled = Object.entries(value).map(([name, text]): [string, unknown] => [
    name,
    typeof text === "string" ? withFolder(text, folder) : text,
  ]);
  return Object.fromEntries(filled.filter(isVariable));
}

/** The first of these files, relative to the checkout, that is in it; links that lead out of it do not count. */
export async function findFile(checkout: Checkout, candidates: readonly string[]): Promise<FoundFile | undefined> {
  const paths = candidates.flatMap((path) => inside(path) ?? []);
  const found = paths.length > 0 ? await find(checkout, FIND_FILE, paths) : undefined;
  return found && { ...found, path: posix.normalize(found.path) };
}

/** A dev container as its file, or the lack of one, describes it. */
export interface FoundDevContainer {
  status: EnvironmentStatus_DevContainer;
  /** Hash of the file in use; empty without one. */
  hash: string;
  /** Variables of `containerEnv` and `remoteEnv` that need no substitution. */
  variables: Record<string, string>;
  /** What it asks to be run here. */
  lifecycle: Lifecycle;
  /** The container that it is to run in; undefined if that is the host. */
  plan?: ContainerPlan;
}

/** Where a dev container runs: in a container, or on the host with its commands, without them, or not at all. */
export type DevContainerMode = "container" | "run" | "skip" | "fail";

/** A dev container that is being applied: what the file said, and the commands at work. */
export interface Application {
  /** Sessions that it is for. */
  key: string;
  container: FoundDevContainer;
  run: Run;
  /** Brings the container up that it runs in. */
  work?: ContainerProgress;
}

const hashOf = (file: FoundFile | undefined) => (file ? createHash("sha256").update(file.text).digest("hex") : "");

async function devContainerFile(checkout: Checkout, specified: string): Promise<FoundFile | undefined> {
  if (specified) {
    const path = inside(specified);
    return path ? await find(checkout, FIND_FILE, [path]) : undefined;
  }
  return await find(checkout, FIND_DEVCONTAINER, DEVCONTAINER_FILES);
}

/** Hash of the file that would be used now. */
export async function devContainerHash(checkout: Checkout, spec: EnvironmentSpec_DevContainer): Promise<string> {
  return hashOf(await devContainerFile(checkout, spec.devcontainerFilePath));
}

function parse(file: FoundFile | undefined): Record<string, unknown> {
  if (!file) return {};
  if (file.text.length > MAX_FILE_BYTES) throw new Error(`${file.path} is larger than 1 MiB`);
  try {
    const value = parseJsonc(file.text);
    if (isRecord(value) && !Array.isArray(value)) return value;
  } catch {
    // Falls through: the parser's text would quote the file.
  }
  throw new Error(`${file.path} is not a JSON object`);
}

/** What only a container can have. */
const OF_CONTAINERS = ["image", "build", "dockerFile", "dockerComposeFile", "features"];
const isNamed = (value: unknown) => (isRecord(value) ? Object.keys(value).length > 0 : Boolean(value));

function hostWarnings(content: Record<string, unknown>, skipsCommands: boolean, hasEngine: boolean): string {
  const skipped = skipsCommands ? LIFECYCLE_COMMANDS.filter((name) => content[name] !== undefined) : [];
  const reason = hasEngine ? "the environment class keeps dev containers on the host" : "no container engine";
  // With an engine it is a choice of the operator, and worth a word where the file says otherwise.
  const isNews = !hasEngine || OF_CONTAINERS.some((name) => isNamed(content[name]));
  const warnings = [
    isNews ? `${reason}: image and features of the dev container are ignored and commands run on the host` : "",
    skipped.length > 0 ? `commands skipped by configuration: ${skipped.join(", ")}` : "",
  ];
  return warnings.filter(Boolean).join("; ");
}

const noHost = (hasEngine: boolean) =>
  hasEngine
    ? "dev containers need an environment class with isolation container on this runner"
    : "dev containers need a container engine on this runner";

/** What has no effect of a dev container that runs in a container. */
const containerWarning = ({ ignored }: ContainerPlan) =>
  ignored.length > 0 ? `ignored in the dev container file: ${ignored.join(", ")}` : "";

/**
 * The dev container of a checkout: on the host with its image and features left out, or with the plan of a container.
 * With an engine, it is the class of the environment that keeps it on the host.
 * FAILED if the named file is missing or unreadable, if it asks for what cannot be had or run, or if the operator wants
 * no dev container without a container.
 */
export async function findDevContainer(
  checkout: Checkout,
  spec: EnvironmentSpec_DevContainer,
  mode: DevContainerMode,
  hasEngine: boolean,
): Promise<FoundDevContainer> {
  const { session, devcontainerFilePath: specified } = spec;
  const file = await devContainerFile(checkout, specified);
  const found = file ? DevContainerPresence.DISCOVERED : DevContainerPresence.GENERATED;
  const status = create(EnvironmentStatus_DevContainerSchema, {
    session,
    devcontainerFilePath: specified || (file?.path ?? ""),
    devcontainerFilePresence: specified ? DevContainerPresence.SPECIFIED : found,
    devcontainerconfigInSync: true,
    secretsInSync: true,
    remoteUser: checkout.user.name,
    remoteWorkspaceFolder: checkout.folder,
  });
  const failed = (failureMessage: string): FoundDevContainer => ({
    status: { ...status, phase: DevContainerPhase.FAILED, failureMessage },
    hash: hashOf(file),
    variables: {},
    lifecycle: NO_LIFECYCLE,
  });
  if (specified && !file) return failed(`dev container file ${specified.slice(0, 200)} not found`);
  if (file && mode === "fail") return failed(noHost(hasEngine));
  try {
    const content = parse(file);
    const { folder } = checkout;
    if (mode === "container") {
      const plan = containerPlan(content, file?.path ?? ".", folder, spec.defaultDevcontainerImage);
      return {
        status: { ...status, phase: DevContainerPhase.RUNNING, warningMessage: containerWarning(plan) },
        ...{ hash: hashOf(file), variables: {}, plan },
        lifecycle: lifecycleOf(content, spec.lifecycleStage, folder),
      };
    }
    const warningMessage = hostWarnings(content, mode === "skip", hasEngine);
    return {
      status: { ...status, phase: DevContainerPhase.RUNNING, warningMessage },
      hash: hashOf(file),
      variables: { ...literals(content.containerEnv, folder), ...literals(content.remoteEnv, folder) },
      lifecycle: mode === "skip" ? NO_LIFECYCLE : lifecycleOf(content, spec.lifecycleStage, folder),
    };
  } catch (error) {
    return failed(error instanceof Error ? error.message : "the dev container file cannot be read");
  }
}
