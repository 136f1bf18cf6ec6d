import { create, equals } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type CreateTaskRequest,
  type TaskMetadata,
  TaskMetadataSchema,
  type TaskSpec,
  TaskSpecSchema,
  type UpdateTaskRequest,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import {
  commandProblems,
  namingProblems,
  type SecretUse,
  secretUses,
  storedTarget,
  storedTriggers,
  targetProblems,
  triggerNames,
  triggerProblems,
  variableProblems,
} from "./automation.ts";
import type { Origin } from "./automation-service.ts";
import type { FieldProblem } from "./errors.ts";

/** What is stored about a task besides its id. */
export interface TaskState {
  metadata: TaskMetadata;
  spec: TaskSpec;
  /** Ids of tasks and services of the same environment. */
  dependsOn: readonly string[];
}

/** Ids as they are compared: the contract takes either case. */
export const storedIds = (ids: readonly string[]): string[] => ids.map((id) => id.toLowerCase());

const AGGREGATE = "may only be empty with dependencies";

function repeated(dependsOn: readonly string[]): FieldProblem[] {
  const ids = storedIds(dependsOn);
  return ids.flatMap((id, index) =>
    ids.indexOf(id) === index ? [] : [{ field: `depends_on[${index}]`, message: "must be unique" }],
  );
}

/** Problems of a request that need no lookup. */
export function newTaskProblems({ metadata, spec, dependsOn }: CreateTaskRequest): FieldProblem[] {
  if (!metadata) return [{ field: "metadata", message: "is required" }];
  return [
    ...namingProblems("metadata", metadata),
    ...triggerProblems(metadata.triggeredBy, "metadata.triggered_by", "task"),
    ...(spec?.command || dependsOn.length > 0 ? [] : [{ field: "spec.command", message: AGGREGATE }]),
    ...commandProblems({ "spec.command": spec?.command }),
    ...variableProblems(spec?.env ?? [], "spec.env"),
    ...targetProblems(spec?.runsOn, "spec.runs_on"),
    ...repeated(dependsOn),
  ];
}

export const taskSecrets = (spec: { env: TaskSpec["env"] } | undefined): SecretUse[] =>
  secretUses(spec?.env ?? [], "spec.env");

/** Problems of dependencies among which `known` tells what can be depended on; the same for ids of others and of none. */
export function dependencyProblems(dependsOn: readonly string[], known: (id: string) => boolean, self?: string) {
  return storedIds(dependsOn).flatMap((id, index): FieldProblem[] => {
    const field = `depends_on[${index}]`;
    if (id === self) return [{ field, message: "must not be the task itself" }];
    return known(id) ? [] : [{ field, message: "is not a task or service of this environment" }];
  });
}

/** A new task, for a request without problems. */
export function newTask({ metadata, spec, dependsOn }: CreateTaskRequest, { creator, now }: Origin): TaskState {
  const named = metadata ?? create(TaskMetadataSchema);
  const given = spec ?? create(TaskSpecSchema);
  return {
    metadata: {
      ...named,
      creator,
      createdAt: timestampFromDate(now),
      triggeredBy: storedTriggers(triggerNames(named.triggeredBy)),
    },
    spec: { ...given, runsOn: storedTarget(given.runsOn) },
    dependsOn: storedIds(dependsOn),
  };
}

/** Problems of a request that need neither a lookup nor the stored task. */
export function updateTaskProblems({ metadata, spec, dependsOn }: UpdateTaskRequest): FieldProblem[] {
  return [
    ...namingProblems("metadata", metadata ?? {}),
    ...triggerProblems(metadata?.triggeredBy?.trigger ?? [], "metadata.triggered_by.trigger", "task"),
    ...commandProblems({ "spec.command": spec?.command }),
    ...variableProblems(spec?.env ?? [], "spec.env"),
    ...targetProblems(spec?.runsOn, "spec.runs_on"),
    ...repeated(dependsOn),
  ];
}

/** The task after an update; `problems` are those that only the stored task shows. */
export function updatedTask(
  { metadata, spec, dependsOn }: TaskState,
  changes: UpdateTaskRequest,
): { next: TaskState; problems: FieldProblem[] } {
  const triggers = changes.metadata?.triggeredBy && triggerNames(changes.metadata.triggeredBy.trigger);
  const next: TaskState = {
    metadata: {
      ...metadata,
      name: changes.metadata?.name ?? metadata.name,
      description: changes.metadata?.description ?? metadata.description,
      triggeredBy: triggers ? storedTriggers(triggers) : metadata.triggeredBy,
    },
    spec: {
      ...spec,
      command: changes.spec?.command ?? spec.command,
      runsOn: changes.spec?.runsOn ? storedTarget(changes.spec.runsOn) : spec.runsOn,
      env: changes.spec?.env.length ? changes.spec.env : spec.env,
      prebuildRequiresSuccess: changes.spec?.prebuildRequiresSuccess ?? spec.prebuildRequiresSuccess,
    },
    dependsOn: changes.dependsOn.length > 0 ? storedIds(changes.dependsOn) : dependsOn,
  };
  const isEmpty = !next.spec.command && next.dependsOn.length === 0;
  return { next, problems: isEmpty ? [{ field: "spec.command", message: AGGREGATE }] : [] };
}

/** Nothing about the task is new. The order of dependencies is part of it. */
export function sameTask(left: TaskState, right: TaskState): boolean {
  return (
    equals(TaskMetadataSchema, left.metadata, right.metadata) &&
    equals(TaskSpecSchema, left.spec, right.spec) &&
    left.dependsOn.length === right.dependsOn.length &&
    left.dependsOn.every((id, index) => id === right.dependsOn[index])
  );
}
