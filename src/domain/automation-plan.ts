import { create, toBinary } from "@bufbuild/protobuf";
import {
  RunsOnSchema,
  type TaskExecutionSpec,
  type TaskExecutionSpec_Group,
  TaskExecutionSpec_GroupSchema,
  type TaskExecutionSpec_Step,
  TaskExecutionSpec_StepSchema,
  TaskExecutionSpec_TaskSchema,
  TaskExecutionSpecSchema,
  type TaskSpec,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import { secretUses } from "./automation.ts";

/** A plan is sent and listed as a whole; one with more bytes than this cannot be started. */
export const MAX_PLAN_BYTES = 2 * 1024 * 1024;

/** What a plan needs to know of a task. */
export interface PlannedTask {
  id: string;
  metadata: { reference: string; name: string };
  spec: TaskSpec;
  dependsOn: readonly string[];
}

/** What a plan needs to know of a service, which depends on nothing. */
export interface PlannedService {
  id: string;
  metadata: { reference: string; name: string };
}

/** The tasks and services of one environment, by id. */
export interface Definitions {
  tasks: ReadonlyMap<string, PlannedTask>;
  services: ReadonlyMap<string, PlannedService>;
}

/**
 * A circle among the dependencies that can be reached from a task, as references from one back to itself: `a -> b -> a`.
 * Undefined if there is none.
 */
export function findCycle(tasks: Definitions["tasks"], from: string): string | undefined {
  const done = new Set<string>();
  const visit = (id: string, trail: readonly string[]): readonly string[] | undefined => {
    const task = tasks.get(id);
    if (!task || done.has(id)) return undefined;
    const start = trail.indexOf(id);
    if (start >= 0) return [...trail.slice(start), id];
    for (const next of task.dependsOn) {
      const cycle = visit(next, [...trail, id]);
      if (cycle) return cycle;
    }
    done.add(id);
    return undefined;
  };
  return visit(from, [])
    ?.map((id) => tasks.get(id)?.metadata.reference ?? id)
    .join(" -> ");
}

/** Level of each task and service that a task needs, itself included: one above the highest of its dependencies. */
function levels({ tasks, services }: Definitions, main: string): Map<string, number> {
  const found = new Map<string, number>();
  const visit = (id: string): number => {
    const known = found.get(id);
    if (known !== undefined) return known;
    // What has been deleted since takes no part.
    const needed = (tasks.get(id)?.dependsOn ?? []).filter((each) => tasks.has(each) || services.has(each));
    const level = Math.max(-1, ...needed.map(visit)) + 1;
    found.set(id, level);
    return level;
  };
  visit(main);
  return found;
}

const compare = (left: string, right: string) => (left < right ? -1 : left > right ? 1 : 0);

/**
 * The plan of an execution: everything that the task needs in groups by level, each by reference, the task alone in the
 * last one. There must be no cycle. With `onMachine` tasks without a target run on the machine.
 */
export function buildPlan(
  definitions: Definitions,
  main: string,
  { newId, onMachine = false }: { newId(): string; onMachine?: boolean },
): TaskExecutionSpec {
  const { tasks, services } = definitions;
  const ranks = levels(definitions, main);
  const stepIds = new Map([...ranks.keys()].map((id) => [id, newId()]));
  const groups = Array.from({ length: (ranks.get(main) ?? 0) + 1 }, () => create(TaskExecutionSpec_GroupSchema));
  const items = [...ranks].map(([id, rank]) => ({ id, rank, task: tasks.get(id), service: services.get(id) }));
  const referenceOf = ({ task, service }: (typeof items)[number]) => (task ?? service)?.metadata.reference ?? "";
  items.sort((left, right) => compare(referenceOf(left), referenceOf(right)) || compare(left.id, right.id));
  for (const { id, rank, task, service } of items) {
    const { name = "", reference = "" } = (task ?? service)?.metadata ?? {};
    const step = create(TaskExecutionSpec_StepSchema, { id: stepIds.get(id), label: name || reference });
    if (task) {
      const spec = onMachine && !task.spec.runsOn ? { ...task.spec, runsOn: MACHINE } : task.spec;
      step.dependsOn = task.dependsOn.flatMap((each) => stepIds.get(each) ?? []);
      step.step = { case: "task", value: create(TaskExecutionSpec_TaskSchema, { id, spec }) };
    } else step.step = { case: "serviceId", value: id };
    groups[rank]?.steps.push(step);
  }
  return create(TaskExecutionSpecSchema, { plan: groups });
}

const MACHINE = create(RunsOnSchema, { target: { case: "machine", value: {} } });

export const stepsOf = (plan: readonly TaskExecutionSpec_Group[]): TaskExecutionSpec_Step[] =>
  plan.flatMap(({ steps }) => steps);

/** Ids of the services that a plan needs. */
export const plannedServices = ({ plan }: TaskExecutionSpec): string[] =>
  stepsOf(plan).flatMap(({ step }) => (step.case === "serviceId" ? [step.value] : []));

/** Ids of the secrets that the tasks of a plan name. */
export const plannedSecrets = ({ plan }: TaskExecutionSpec): string[] =>
  stepsOf(plan).flatMap(({ step }) =>
    step.case === "task" ? secretUses(step.value.spec?.env ?? [], "").map(({ secretId }) => secretId) : [],
  );

/** Whether a plan runs a task where its environment does by default. */
export const usesDefaultTarget = ({ plan }: TaskExecutionSpec): boolean =>
  stepsOf(plan).some(({ step }) => step.case === "task" && !step.value.spec?.runsOn);

/** Why a task cannot be planned; undefined if it can. Definitions are checked for cycles whenever they change. */
export function planRefusal({ tasks }: Definitions, main: string): string | undefined {
  const cycle = findCycle(tasks, main);
  return cycle && `the dependencies form a cycle: ${cycle}`;
}

/** Why a plan cannot be used; undefined if it can. */
export const sizeRefusal = (spec: TaskExecutionSpec): string | undefined =>
  toBinary(TaskExecutionSpecSchema, spec).length > MAX_PLAN_BYTES
    ? `the plan has more than ${MAX_PLAN_BYTES} bytes of commands and variables`
    : undefined;

/**
 * Names the run that a step is part of. Executions of one firing run the command of each task once: steps with the same
 * name share that run, of which the first to be reached makes the start and the last to be stopped the end. Without a
 * firing each step has a run of its own.
 */
export function runOf(firingId: string, { id, step }: TaskExecutionSpec_Step): string {
  return firingId && step.case === "task" ? `${firingId}/${step.value.id}` : id;
}
