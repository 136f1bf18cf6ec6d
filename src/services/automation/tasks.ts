import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import {
  type CreateTaskRequest,
  type EnvironmentAutomationService,
  type Task,
  type TaskExecution,
  TaskSchema,
  type UpdateTaskRequest,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { type App, transact } from "../../app.ts";
import { MAX_TASKS, MAX_UNFINISHED_EXECUTIONS } from "../../domain/automation.ts";
import { hasEnded } from "../../domain/automation-execution.ts";
import { findCycle } from "../../domain/automation-plan.ts";
import { isBeingDeleted } from "../../domain/automation-service.ts";
import {
  dependencyProblems,
  newTask,
  newTaskProblems,
  sameTask,
  taskSecrets,
  updatedTask,
  updateTaskProblems,
} from "../../domain/automation-task.ts";
import { invalid, precondition, Refusal, refuseProblems } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { countUnfinished, readExecution, unfinishedIds } from "../../store/automation/executions.ts";
import { holdEnvironmentOf } from "../../store/automation/hold.ts";
import { noSuchPart } from "../../store/automation/parts.ts";
import { secretProblems } from "../../store/automation/secrets.ts";
import { type AutomationSet, readAutomationSet, startExecution } from "../../store/automation/start.ts";
import {
  getTask,
  insertTask,
  listTasks,
  removeTask,
  type StoredTask,
  saveTask,
  taskIn,
} from "../../store/automation/tasks.ts";
import type { Tx } from "../../store/db.ts";
import { getEnvironment } from "../../store/environments.ts";
import { byCaller, checkDelete, checkEdit, checkRoom, checkSize, checkStart, subjectOf } from "./environment.ts";
import { executionMessage, stopExecution } from "./executions.ts";

const message = ({ id, environmentId, metadata, spec, dependsOn }: StoredTask): Task =>
  create(TaskSchema, { id, environmentId, metadata, spec, dependsOn: [...dependsOn] });

/** Everything in the environment of a task that the caller may read, held until the transaction ends. */
async function holdTask(tx: Tx, caller: Caller, id: string) {
  const environment = await holdEnvironmentOf(tx, caller, "tasks", id);
  const set = await readAutomationSet(tx, environment);
  const task = set.tasks.get(id.toLowerCase());
  if (!task) throw noSuchPart("tasks", id);
  return { environment, set, task };
}

/** What a task can be made to depend on: not what is about to go. */
function canBeNeeded({ services, tasks }: AutomationSet, id: string): boolean {
  const service = services.get(id);
  return tasks.has(id) || (service !== undefined && !isBeingDeleted(service));
}

async function createTask(app: App, caller: Caller, request: CreateTaskRequest): Promise<Task> {
  refuseProblems(newTaskProblems(request));
  return transact(app, async (tx) => {
    const environment = await getEnvironment(tx, caller, request.environmentId, true);
    checkEdit(environment);
    const set = await readAutomationSet(tx, environment);
    const state = newTask(request, { creator: subjectOf(caller), now: app.now() });
    refuseProblems([
      ...(await secretProblems(tx, caller, environment, taskSecrets(request.spec))),
      ...dependencyProblems(state.dependsOn, (id) => canBeNeeded(set, id)),
    ]);
    const { reference } = state.metadata;
    if ([...set.tasks.values()].some(({ metadata }) => metadata.reference === reference))
      throw new Refusal("already_exists", `the environment already has a task ${reference}`);
    checkRoom(set.tasks.size, MAX_TASKS, "tasks");
    const task = taskIn(environment, app.newId(), state);
    await insertTask(tx, task, byCaller(app, caller));
    await checkSize(tx, environment);
    return message(task);
  });
}

async function updateTask(app: App, caller: Caller, request: UpdateTaskRequest): Promise<void> {
  refuseProblems(updateTaskProblems(request));
  await transact(app, async (tx) => {
    const { environment, set, task } = await holdTask(tx, caller, request.id);
    checkEdit(environment);
    const { next, problems } = updatedTask(task, request);
    const isKnown = (id: string) => task.dependsOn.includes(id) || canBeNeeded(set, id);
    refuseProblems([
      ...problems,
      ...(await secretProblems(tx, caller, environment, taskSecrets(request.spec))),
      ...dependencyProblems(request.dependsOn, isKnown, task.id),
    ]);
    const changed = { ...task, ...next };
    const cycle = findCycle(new Map(set.tasks).set(task.id, changed), task.id);
    if (cycle) throw invalid({ field: "depends_on", message: `must not form a cycle: ${cycle}` });
    if (sameTask(task, changed)) return;
    await saveTask(tx, changed, byCaller(app, caller));
    await checkSize(tx, environment);
  });
}

async function deleteTask(app: App, caller: Caller, id: string): Promise<void> {
  await transact(app, async (tx, touched) => {
    const { environment, set, task } = await holdTask(tx, caller, id);
    checkDelete(caller, environment);
    const dependents = [...set.tasks.values()].filter(({ dependsOn }) => dependsOn.includes(task.id));
    if (dependents.length > 0) {
      const references = dependents.map(({ metadata }) => metadata.reference).join(", ");
      throw precondition(`tasks depend on this task: ${references}`);
    }
    const by = byCaller(app, caller);
    for (const id of await unfinishedIds(tx, environment.id, task.id))
      await stopExecution(tx, environment, await readExecution(tx, id), by);
    await removeTask(tx, task, by);
    touched(environment.metadata.runnerId);
  });
}

async function startTask(app: App, caller: Caller, id: string): Promise<TaskExecution> {
  return transact(app, async (tx, touched) => {
    const { environment, set, task } = await holdTask(tx, caller, id);
    checkStart(environment);
    checkRoom(await countUnfinished(tx, environment.id), MAX_UNFINISHED_EXECUTIONS, "unfinished task executions");
    const start = { creator: subjectOf(caller), startedBy: "manual" as const, firingId: "" };
    const execution = await startExecution(tx, set, task, start, byCaller(app, caller));
    if (hasEnded(execution)) throw precondition(execution.status.failureMessage);
    touched(environment.metadata.runnerId);
    return executionMessage(execution);
  });
}

/** Commands of an environment that end. */
export function tasks(app: App) {
  return {
    async createTask(request, context) {
      return { task: await createTask(app, principal(context), request) };
    },
    async getTask({ id }, context) {
      return { task: message(await getTask(app.db.point, principal(context), id)) };
    },
    async listTasks({ pagination, filter }, context) {
      const caller = principal(context);
      const page = openPage(pagination, ["tasks", caller.id, filter]);
      const { rows, isCut } = await listTasks(app.db.list, caller, filter, page);
      const { items, nextToken } = closePage(page, rows, (task) => task.id, isCut);
      return { tasks: items.map(message), pagination: { nextToken } };
    },
    async updateTask(request, context) {
      await updateTask(app, principal(context), request);
      return {};
    },
    async deleteTask({ id }, context) {
      await deleteTask(app, principal(context), id);
      return {};
    },
    async startTask({ id }, context) {
      return { taskExecution: await startTask(app, principal(context), id) };
    },
  } satisfies Partial<ServiceImpl<typeof EnvironmentAutomationService>>;
}
