import { create } from "@bufbuild/protobuf";
import {
  type AutomationTrigger,
  AutomationTriggerSchema,
  type EnvironmentVariableItem,
  type RunsOn,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { actionable, type FieldProblem } from "./errors.ts";
import { isImageReference } from "./image-reference.ts";
import { type EnvironmentState, isLeaving } from "./lifecycle.ts";

// What services, tasks and executions have in common: triggers, commands, variables, and when they may be touched.

/** Most services and tasks of one environment, and most executions of it that have not ended. */
export const MAX_SERVICES = 100;
export const MAX_TASKS = 200;
export const MAX_UNFINISHED_EXECUTIONS = 100;

/** Most bytes of all definitions of one environment: a change of any of them reads them all. */
export const MAX_DEFINITION_BYTES = 8 * 1024 * 1024;

const COMMAND_BYTES = 64 * 1024;
const VALUE_BYTES = 32 * 1024;
const VARIABLES = { entries: 256, bytes: 256 * 1024 };
const NAME_LENGTH = 1024;
const DESCRIPTION_LENGTH = 16 * 1024;
const VARIABLE = /^[A-Za-z_][A-Za-z0-9_]*$/;
const CONTAINER_VARIABLE = /^[A-Za-z_][A-Za-z0-9_.-]*(=|$)/;
const RESERVED = "BERTH_";
/** Opaque, but runners name files after them. */
const SESSION = /^(?!\.{1,2}$)[^\p{Cc}/\\]{0,128}$/u;

/** Output of a service or step: keys after a merge, and the lengths of a key and a value. */
const OUTPUT = { keys: 64, keyLength: 128, valueLength: 4096 };
const LOG_URL_LENGTH = 2048;
const FAILURE_LENGTH = 4096;

/** What became of a wish; `reason` is a sentence for the caller, fit for FAILED_PRECONDITION. */
export type Move<State> = { kind: "noop" } | { kind: "refused"; reason: string } | { kind: "changed"; next: State };

/** A trigger as automations files and `started_by` spell it. */
export type TriggerName = NonNullable<AutomationTrigger["trigger"]["case"]>;

const bytes = (text: string) => Buffer.byteLength(text);
const length = (text: string) => [...text].length;

/** An environment has no room for more of something. */
export const noRoom = (most: number, what: string) =>
  actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", `an environment has at most ${most} ${what}`);

// When an environment's automations may be touched.

/** Why services and tasks of the environment cannot be changed now; undefined if they can. */
export function editRefusal(environment: EnvironmentState): string | undefined {
  if (isLeaving(environment)) return "the environment is deleted or being deleted";
  return environment.metadata.archivedAt && "the environment is archived; unarchive it first";
}

/** Why nothing of the environment can be started now. One that is still starting takes starts and queues them. */
export function runRefusal(environment: EnvironmentState): string | undefined {
  const wantsRun = environment.spec.desiredPhase === EnvironmentPhase.RUNNING;
  return editRefusal(environment) ?? (wantsRun ? undefined : "the environment does not run; start it first");
}

// Triggers.

/** The triggers that are set, each once, in the order given. */
export function triggerNames(triggers: readonly AutomationTrigger[]): TriggerName[] {
  return [...new Set(triggers.flatMap(({ trigger }) => (trigger.case && trigger.value ? [trigger.case] : [])))];
}

/** A list of triggers as it is stored: without false ones and repetitions. */
export const storedTriggers = (names: readonly TriggerName[]): AutomationTrigger[] =>
  names.map((name) => create(AutomationTriggerSchema, { trigger: { case: name, value: true } }));

/** Problems of a list of triggers; `before_snapshot` is for tasks only. */
export function triggerProblems(triggers: readonly AutomationTrigger[], field: string, of: "service" | "task") {
  return triggers.flatMap(({ trigger }, index): FieldProblem[] => {
    if (!trigger.case) return [{ field: `${field}[${index}]`, message: "names no trigger" }];
    const isMisplaced = of === "service" && trigger.case === "beforeSnapshot" && trigger.value;
    return isMisplaced ? [{ field: `${field}[${index}].before_snapshot`, message: "is for tasks only" }] : [];
  });
}

// Texts, commands, variables, targets.

/** Problems of what people call a service or task. */
export function namingProblems(field: string, { name, description }: { name?: string; description?: string }) {
  const problems: FieldProblem[] = [];
  if (length(name ?? "") > NAME_LENGTH)
    problems.push({ field: `${field}.name`, message: `must have at most ${NAME_LENGTH} characters` });
  if (length(description ?? "") > DESCRIPTION_LENGTH)
    problems.push({ field: `${field}.description`, message: `must have at most ${DESCRIPTION_LENGTH} characters` });
  return problems;
}

/** Problems of commands, by field. */
export function commandProblems(commands: Readonly<Record<string, string | undefined>>): FieldProblem[] {
  return Object.entries(commands).flatMap(([field, command = ""]) => [
    ...(bytes(command) > COMMAND_BYTES ? [{ field, message: `must have at most ${COMMAND_BYTES} bytes` }] : []),
    ...(command.includes("\0") ? [{ field, message: "must not contain NUL" }] : []),
  ]);
}

function variableProblem({ name, source }: EnvironmentVariableItem): { part: string; message: string } | undefined {
  if (!VARIABLE.test(name))
    return { part: "name", message: "must be letters, digits and _, not beginning with a digit" };
  if (name.startsWith(RESERVED)) return { part: "name", message: `must not begin with ${RESERVED}` };
  if (source.case === "valueFrom")
    return source.value.source.case ? undefined : { part: "value_from", message: "needs a source" };
  if (source.case !== "value") return { part: "value", message: "a value or a source is required" };
  if (bytes(source.value) > VALUE_BYTES) return { part: "value", message: `must have at most ${VALUE_BYTES} bytes` };
  return source.value.includes("\0") ? { part: "value", message: "must not contain NUL" } : undefined;
}

const literal = ({ source }: EnvironmentVariableItem) => (source.case === "value" ? source.value : "");

/** Problems of a list of variables, except those of the secrets that it names. */
export function variableProblems(variables: readonly EnvironmentVariableItem[], field: string): FieldProblem[] {
  const names = variables.map(({ name }) => name);
  const total = variables.reduce((sum, each) => sum + bytes(each.name) + bytes(literal(each)), 0);
  return [
    ...variables.flatMap((variable, index): FieldProblem[] => {
      const problem = variableProblem(variable);
      if (problem) return [{ field: `${field}[${index}].${problem.part}`, message: problem.message }];
      return names.indexOf(variable.name) === index
        ? []
        : [{ field: `${field}[${index}].name`, message: "must be unique" }];
    }),
    ...(variables.length > VARIABLES.entries
      ? [{ field, message: `must have at most ${VARIABLES.entries} entries` }]
      : []),
    ...(total > VARIABLES.bytes ? [{ field, message: `must have at most ${VARIABLES.bytes} bytes in all` }] : []),
  ];
}

/** A variable whose value is a secret, and where it stands. */
export interface SecretUse {
  secretId: string;
  field: string;
}

/** The secrets that a list of variables names. */
export function secretUses(variables: readonly EnvironmentVariableItem[], field: string): SecretUse[] {
  return variables.flatMap(({ source }, index) => {
    const from = source.case === "valueFrom" ? source.value.source : undefined;
    if (from?.case !== "secretRef") return [];
    return [{ secretId: from.value.id, field: `${field}[${index}].value_from.secret_ref.id` }];
  });
}

/** Problems of a target; images and variables end up on the command line of a container engine. */
export function targetProblems(runsOn: RunsOn | undefined, field: string): FieldProblem[] {
  if (runsOn?.target.case !== "docker") return [];
  const { image, environment } = runsOn.target.value;
  return [
    ...(isImageReference(image) ? [] : [{ field: `${field}.docker.image`, message: "is not an image reference" }]),
    ...environment.flatMap((entry, index) =>
      CONTAINER_VARIABLE.test(entry) && !entry.includes("\0") && bytes(entry) <= VALUE_BYTES
        ? []
        : [{ field: `${field}.docker.environment[${index}]`, message: "must be NAME=value or NAME" }],
    ),
    ...(environment.length > VARIABLES.entries
      ? [{ field: `${field}.docker.environment`, message: `must have at most ${VARIABLES.entries} entries` }]
      : []),
  ];
}

/** A target as it is stored: one that names nothing is the default. */
export const storedTarget = (runsOn: RunsOn | undefined): RunsOn | undefined =>
  runsOn?.target.case ? runsOn : undefined;

export const sessionProblems = (session: string, field: string): FieldProblem[] =>
  SESSION.test(session) ? [] : [{ field, message: "must have at most 128 printable characters and no slash" }];

// What is reported.

type Output = Readonly<Record<string, string>>;

/** Problems of an output as a whole. */
export function outputProblems(output: Output, field: string): FieldProblem[] {
  const entries = Object.entries(output);
  const isMisfit = ([key, value]: [string, string]) =>
    !key || length(key) > OUTPUT.keyLength || length(value) > OUTPUT.valueLength;
  return [
    ...(entries.some(isMisfit)
      ? [
          {
            field,
            message: `keys must have 1 to ${OUTPUT.keyLength} characters and values at most ${OUTPUT.valueLength}`,
          },
        ]
      : []),
    ...(entries.length > OUTPUT.keys ? [{ field, message: `must have at most ${OUTPUT.keys} keys` }] : []),
  ];
}

/** Output with changes added key by key; an empty value removes its key. */
export function mergedOutput(output: Output, changes: Output): Record<string, string> {
  return Object.fromEntries(Object.entries({ ...output, ...changes }).filter(([, value]) => value !== ""));
}

/** A reported message, cut to what is kept. */
export const storedFailure = (message: string) => message.slice(0, FAILURE_LENGTH).toWellFormed();

/** Whether a runner can mean an address as that of a log; it is asked only for what it is trusted with anyway. */
export const isLogUrl = (logUrl: string) =>
  logUrl === "" || (logUrl.length <= LOG_URL_LENGTH && /^https?:$/.test(URL.parse(logUrl)?.protocol ?? ""));

/**
 * Whether a log address lies below the environment's own. Readers bring a token to it, so one that reads differently to
 * different parsers is refused as well. `logsUrl` is the address of the environment's own log, empty if there is none.
 */
export function isOwnLog(logUrl: string, logsUrl: string): boolean {
  const home = logsUrl && URL.canParse(logsUrl) ? new URL("./", logsUrl).href : "";
  if (!home || logUrl.length > LOG_URL_LENGTH) return false;
  const url = URL.parse(logUrl);
  return url?.href === logUrl && !url.hash && !/%|\\/.test(url.pathname) && logUrl.startsWith(home);
}
