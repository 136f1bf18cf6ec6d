import { create, type MessageInitShape } from "@bufbuild/protobuf";
import {
  type AutomationTrigger,
  AutomationTriggerSchema,
  type CreateServiceRequestSchema,
  type CreateTaskRequestSchema,
  type Service,
  ServicePhase,
  type Task,
  type TaskExecution,
  TaskExecutionPhase,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type Environment,
  type EnvironmentSpec_AutomationsFileSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { ResourceOperation } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceOperation as Operation } from "../../gen/gitpod/v1/event_pb.js";
import type { BerthClient } from "../../src/client.ts";
import type { TriggerName } from "../../src/domain/automation.ts";
import { type FakeRunner, runningStatus } from "./fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./plane.ts";
import { connectRunner } from "./tenants.ts";
import { eventually } from "./wait.ts";

// A control plane with a member and a runner, on which that member has environments with services and tasks.

export interface Stage extends AsyncDisposable {
  plane: TestPlane;
  /** Creator of the environments. */
  member: TestUser;
  runner: FakeRunner;
  classId: string;
}

export async function setStage(): Promise<Stage> {
  const plane = await startTestPlane();
  await liftQuotas(plane);
  const { runner, classId } = await connectRunner(plane, { maxEnvironments: 10_000 });
  void runner.watch();
  return {
    ...{ plane, runner, classId },
    member: await plane.addUser({ name: "Member" }),
    async [Symbol.asyncDispose]() {
      await runner[Symbol.asyncDispose]();
      await plane[Symbol.asyncDispose]();
    },
  };
}

type FileSpec = MessageInitShape<typeof EnvironmentSpec_AutomationsFileSchema>;

/** An environment that is being made. */
export async function newEnvironment(
  { member, classId }: Stage,
  automationsFile: FileSpec = {},
  client = member.client,
): Promise<Environment> {
  const { environment } = await client.environments.createEnvironment({
    spec: { machine: { class: classId }, automationsFile },
  });
  return environment!;
}

/** What a runner reports about an environment that runs and whose automations file has been applied. */
export const settledStatus = (environment: Environment, phase = ContentPhase.READY) => ({
  ...runningStatus(environment),
  automationsFile: { session: environment.spec?.automationsFile?.session ?? "", phase },
});

/** An environment that runs. */
export async function runningEnvironment(
  stage: Stage,
  automationsFile: FileSpec = {},
  client = stage.member.client,
): Promise<Environment> {
  const environment = await newEnvironment(stage, automationsFile, client);
  await stage.runner.report(environment.id, settledStatus(environment));
  return environment;
}

/** A client with the environment's own token. */
export async function insideOf({ plane, runner }: Stage, { id, spec }: Environment): Promise<BerthClient> {
  const { token } = await runner.control.createEnvironmentToken({
    environmentId: id,
    machineSession: spec?.machine?.session ?? "",
  });
  return plane.client(token);
}

export const trigger = (name: TriggerName, value = true): AutomationTrigger =>
  create(AutomationTriggerSchema, { trigger: { case: name, value } });

type ServiceRequest = MessageInitShape<typeof CreateServiceRequestSchema>;
type TaskRequest = MessageInitShape<typeof CreateTaskRequestSchema>;
type Fields<T> = Omit<T, "$typeName">;

/** A service with a start command, unless told otherwise. */
export async function newService(
  client: BerthClient,
  environmentId: string,
  reference: string,
  spec: Fields<NonNullable<ServiceRequest["spec"]>> = {},
  triggeredBy: TriggerName[] = [],
): Promise<Service> {
  const { service } = await client.environmentAutomation.createService({
    environmentId,
    metadata: { reference, name: `The ${reference}`, triggeredBy: triggeredBy.map((name) => trigger(name)) },
    spec: { commands: { start: `run ${reference}` }, ...spec },
  });
  return service!;
}

/** A task with a command, unless told otherwise. */
export async function newTask(
  client: BerthClient,
  environmentId: string,
  reference: string,
  dependsOn: readonly { id: string }[] = [],
  spec: Fields<NonNullable<TaskRequest["spec"]>> = {},
  triggeredBy: TriggerName[] = [],
): Promise<Task> {
  const { task } = await client.environmentAutomation.createTask({
    environmentId,
    metadata: { reference, name: `The ${reference}`, triggeredBy: triggeredBy.map((name) => trigger(name)) },
    spec: { command: `do ${reference}`, ...spec },
    dependsOn: dependsOn.map(({ id }) => id),
  });
  return task!;
}

export const readService = async (client: BerthClient, id: string): Promise<Service> =>
  (await client.environmentAutomation.getService({ id })).service!;
export const readTask = async (client: BerthClient, id: string): Promise<Task> =>
  (await client.environmentAutomation.getTask({ id })).task!;
export const readExecution = async (client: BerthClient, id: string): Promise<TaskExecution> =>
  (await client.environmentAutomation.getTaskExecution({ id })).taskExecution!;

const DEADLINE_MS = 60_000;
const STEP_MS = 50;

/** The service once it is in a phase. */
export function serviceReaches(client: BerthClient, id: string, phase: ServicePhase): Promise<Service> {
  const look = async () => {
    const service = await readService(client, id);
    if (service.status?.phase === phase) return service;
    throw new Error(`it is ${ServicePhase[service.status?.phase ?? 0]}: ${service.status?.failureMessage}`);
  };
  return eventually(look, `the service is ${ServicePhase[phase]}`, DEADLINE_MS, STEP_MS);
}

/** The execution once it is in a phase. */
export function executionReaches(client: BerthClient, id: string, phase: TaskExecutionPhase): Promise<TaskExecution> {
  const look = async () => {
    const execution = await readExecution(client, id);
    if (execution.status?.phase === phase) return execution;
    throw new Error(`it is ${TaskExecutionPhase[execution.status?.phase ?? 0]}: ${execution.status?.failureMessage}`);
  };
  return eventually(look, `the execution is ${TaskExecutionPhase[phase]}`, DEADLINE_MS, STEP_MS);
}

export async function startTask(client: BerthClient, { id }: { id: string }): Promise<TaskExecution> {
  return (await client.environmentAutomation.startTask({ id })).taskExecution!;
}

/** The executions of an environment, the oldest first. */
export async function executionsOf(client: BerthClient, environmentId: string): Promise<TaskExecution[]> {
  const filter = { environmentIds: [environmentId] };
  const { taskExecutions } = await client.environmentAutomation.listTaskExecutions({
    filter,
    pagination: { pageSize: 100 },
  });
  return taskExecutions.reverse();
}

/** What one resource has left in the outbox and in the audit log, oldest first. */
export async function traces({ plane }: Stage, id: string): Promise<{ events: string[]; actions: string[] }> {
  const { point } = plane.plane.app.db;
  const events = await point<{ operation: ResourceOperation }[]>`
    select operation from events where resource_id = ${id} order by seq`;
  const audit = await point<{ action: string }[]>`select action from audit_log where subject_id = ${id} order by id`;
  return { events: events.map((each) => Operation[each.operation]), actions: audit.map((each) => each.action) };
}
