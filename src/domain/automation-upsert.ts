import { create, isMessage, type Message, toBinary } from "@bufbuild/protobuf";
import {
  type AutomationsFile,
  type AutomationsFile_Service,
  type AutomationsFile_Task,
  AutomationsFileSchema,
  CreateServiceRequestSchema,
  CreateTaskRequestSchema,
  ServiceRole,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import {
  commandProblems,
  MAX_SERVICES,
  MAX_TASKS,
  namingProblems,
  noRoom,
  storedTarget,
  storedTriggers,
  type TriggerName,
  targetProblems,
} from "./automation.ts";
import { findCycle } from "./automation-plan.ts";
import { isBeingDeleted, newService, type Origin, replaceService, type ServiceState } from "./automation-service.ts";
import { newTask, sameTask, type TaskState } from "./automation-task.ts";
import { type FieldProblem, invalid, precondition, refuseProblems } from "./errors.ts";

// Merging an automations file into what is stored: items are matched by kind and reference, changed where they differ,
// and kept where the file does not name them.

/** Most bytes of a file, as text and as a message. */
export const MAX_FILE_BYTES = 1024 * 1024;

const ROLES: Readonly<Record<string, ServiceRole>> = {
  "": ServiceRole.DEFAULT,
  default: ServiceRole.DEFAULT,
  editor: ServiceRole.EDITOR,
  "ai-agent": ServiceRole.AI_AGENT,
};

/** The stored services and tasks of one environment. */
export interface StoredItems {
  services: readonly (ServiceState & { id: string })[];
  tasks: readonly (TaskState & { id: string })[];
}

/** An item to store; without `before` it is new. */
export interface Write<State> {
  id: string;
  before?: State;
  next: State;
}

/** What an upsert writes, and the ids of all items of the file by reference, changed or not. */
export interface Upsert {
  services: Write<ServiceState>[];
  tasks: Write<TaskState>[];
  serviceIds: string[];
  taskIds: string[];
}

const sorted = <T>(items: Readonly<Record<string, T>>): [string, T][] =>
  Object.entries(items).sort(([left], [right]) => (left < right ? -1 : 1));

const at = (kind: "services" | "tasks", reference: string) => `automations_file.${kind}["${reference}"]`;

/** A message in a field, or in a choice of fields. */
function messageIn(value: unknown): Message | undefined {
  const inner = typeof value === "object" && value !== null && "value" in value ? value.value : value;
  return isMessage(value) ? value : isMessage(inner) ? inner : undefined;
}

/** Parts that came with more than the schema knows: a newer file does not mean what is left of it here. */
function strangeParts(message: Message, field: string): FieldProblem[] {
  if (message.$unknown?.length) return [{ field, message: "has fields that are not known here" }];
  return Object.entries(message).flatMap(([name, value]) => {
    const part = messageIn(value);
    return part ? strangeParts(part, `${field}.${name}`) : [];
  });
}

/** Problems of a file that the schema does not know, except those of dependencies. */
export function fileProblems(file: AutomationsFile | undefined): FieldProblem[] {
  if (!file) return [{ field: "automations_file", message: "is required" }];
  const strange = [
    ...strangeParts(file, "automations_file"),
    ...sorted(file.services).flatMap(([reference, item]) => strangeParts(item, at("services", reference))),
    ...sorted(file.tasks).flatMap(([reference, item]) => strangeParts(item, at("tasks", reference))),
  ];
  if (strange.length > 0) return strange;
  if (toBinary(AutomationsFileSchema, file).length > MAX_FILE_BYTES)
    return [{ field: "automations_file", message: `must have at most ${MAX_FILE_BYTES} bytes` }];
  const services = sorted(file.services).flatMap(([reference, service]) => {
    const field = at("services", reference);
    const { start, ready, stop } = service.commands ?? {};
    return [
      ...namingProblems(field, service),
      ...commandProblems({
        [`${field}.commands.start`]: start,
        [`${field}.commands.ready`]: ready,
        [`${field}.commands.stop`]: stop,
      }),
      ...targetProblems(service.runsOn, `${field}.runs_on`),
    ];
  });
  const tasks = sorted(file.tasks).flatMap(([reference, task]) => {
    const field = at("tasks", reference);
    return [
      ...namingProblems(field, task),
      ...commandProblems({ [`${field}.command`]: task.command }),
      ...targetProblems(task.runsOn, `${field}.runs_on`),
    ];
  });
  return [...services, ...tasks];
}

const triggersOf = ({ triggeredBy }: { triggeredBy: string[] }) =>
  storedTriggers([...new Set(triggeredBy as TriggerName[])]);

/** A service of the file as if it were created; the wire rules have let only known triggers and roles through. */
function serviceOf(reference: string, item: AutomationsFile_Service, origin: Origin): ServiceState {
  const { name, description, commands, runsOn, readinessTimeout } = item;
  const metadata = { reference, name, description, triggeredBy: triggersOf(item), role: ROLES[item.role] };
  const request = create(CreateServiceRequestSchema, { metadata, spec: { commands, runsOn, readinessTimeout } });
  return newService(request, origin);
}

function taskOf(reference: string, item: AutomationsFile_Task, dependsOn: string[], origin: Origin): TaskState {
  const { name, description, command, runsOn, prebuildRequiresSuccess } = item;
  const metadata = { reference, name, description, triggeredBy: triggersOf(item) };
  const spec = { command, runsOn, prebuildRequiresSuccess };
  return newTask(create(CreateTaskRequestSchema, { metadata, spec, dependsOn }), origin);
}

/** What comes from the file in an item that is stored already: all but its origin, its variables and its state. */
function mergedService(
  stored: ServiceState,
  { metadata, spec }: ServiceState,
): Pick<ServiceState, "metadata" | "spec"> {
  const { name, description, triggeredBy, role } = metadata;
  const { commands, runsOn, readinessTimeout } = spec;
  return {
    metadata: { ...stored.metadata, name, description, triggeredBy, role },
    spec: { ...stored.spec, commands, runsOn: storedTarget(runsOn), readinessTimeout },
  };
}

function mergedTask(stored: TaskState, { metadata, spec, dependsOn }: TaskState): TaskState {
  const { name, description, triggeredBy } = metadata;
  return {
    metadata: { ...stored.metadata, name, description, triggeredBy },
    spec: { ...spec, env: stored.spec.env },
    dependsOn,
  };
}

const byReference = <T extends { metadata: { reference: string } }>(items: readonly T[]) =>
  new Map(items.map((item) => [item.metadata.reference, item]));

/** Ids by kind and reference: of the file, stored or to be, and of everything that is stored. */
interface Names {
  file: { services: ReadonlyMap<string, string>; tasks: ReadonlyMap<string, string> };
  stored: { services: ReadonlyMap<string, string>; tasks: ReadonlyMap<string, string> };
}

function resolve(name: string, { file, stored }: Names): string | { problem: string } {
  for (const { services, tasks } of [file, stored]) {
    const [service, task] = [services.get(name), tasks.get(name)];
    if (service && task) return { problem: `"${name}" is ambiguous: a task and a service have this reference` };
    if (service ?? task) return service ?? task ?? "";
  }
  return { problem: `"${name}" is not a task or service of the file or the environment` };
}

function dependencies(reference: string, item: AutomationsFile_Task, names: Names): string[] {
  const field = (index: number) => `${at("tasks", reference)}.depends_on[${index}]`;
  return item.dependsOn.map((name, index) => {
    if (item.dependsOn.indexOf(name) !== index) throw invalid({ field: field(index), message: "must be unique" });
    const found = resolve(name, names);
    if (typeof found !== "string") throw invalid({ field: field(index), message: found.problem });
    return found;
  });
}

function refuseCycles(tasks: ReadonlyMap<string, TaskState & { id: string }>, ids: readonly string[]): void {
  const problems = ids.flatMap((id): FieldProblem[] => {
    const cycle = findCycle(tasks, id);
    const field = `${at("tasks", tasks.get(id)?.metadata.reference ?? "")}.depends_on`;
    return cycle ? [{ field, message: `must not form a cycle: ${cycle}` }] : [];
  });
  refuseProblems(problems.slice(0, 1));
}

function refuseTooMany(what: string, count: number, most: number): void {
  if (count > most) throw noRoom(most, what);
}

/**
 * What a file without problems of its own changes. Throws INVALID_ARGUMENT for dependencies that are unknown, ambiguous
 * or cyclic, FAILED_PRECONDITION for an item that is being deleted, RESOURCE_EXHAUSTED over a limit.
 */
export function upsert(file: AutomationsFile, stored: StoredItems, origin: Origin & { newId(): string }): Upsert {
  const services = byReference(stored.services);
  const tasks = byReference(stored.tasks);
  const going = sorted(file.services).find(([reference]) => {
    const service = services.get(reference);
    return service && isBeingDeleted(service);
  });
  if (going) throw precondition(`the service ${going[0]} is being deleted; try again when it is gone`);

  const idsOf = (items: Readonly<Record<string, unknown>>, known: ReadonlyMap<string, { id: string }>) =>
    new Map(sorted(items).map(([reference]) => [reference, known.get(reference)?.id ?? origin.newId()]));
  const usable = stored.services.filter((service) => !isBeingDeleted(service));
  const storedIds = (items: readonly { id: string; metadata: { reference: string } }[]) =>
    new Map(items.map(({ id, metadata }) => [metadata.reference, id]));
  const names: Names = {
    file: { services: idsOf(file.services, services), tasks: idsOf(file.tasks, tasks) },
    stored: { services: storedIds(usable), tasks: storedIds(stored.tasks) },
  };
  const ids = { services: [...names.file.services.values()], tasks: [...names.file.tasks.values()] };
  refuseTooMany("services", new Set([...stored.services.map(({ id }) => id), ...ids.services]).size, MAX_SERVICES);
  refuseTooMany("tasks", new Set([...stored.tasks.map(({ id }) => id), ...ids.tasks]).size, MAX_TASKS);

  const serviceWrites = sorted(file.services).flatMap(([reference, item]): Write<ServiceState>[] => {
    const id = names.file.services.get(reference) ?? "";
    const before = services.get(reference);
    const wanted = serviceOf(reference, item, origin);
    if (!before) return [{ id, next: wanted }];
    const move = replaceService(before, mergedService(before, wanted), origin.newId());
    return move.kind === "changed" ? [{ id, before, next: move.next }] : [];
  });
  const merged = new Map(stored.tasks.map((task) => [task.id, task]));
  const taskWrites = sorted(file.tasks).flatMap(([reference, item]): Write<TaskState>[] => {
    const id = names.file.tasks.get(reference) ?? "";
    const before = tasks.get(reference);
    const wanted = taskOf(reference, item, dependencies(reference, item, names), origin);
    const next = before ? mergedTask(before, wanted) : wanted;
    merged.set(id, { ...next, id });
    return before && sameTask(before, next) ? [] : [{ id, next, ...(before && { before }) }];
  });
  refuseCycles(merged, ids.tasks);
  return { services: serviceWrites, tasks: taskWrites, serviceIds: ids.services, taskIds: ids.tasks };
}
