import { create } from "@bufbuild/protobuf";
import { TaskExecutionSpecSchema } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import type { Subject } from "../../../gen/gitpod/v1/identity_pb.js";
import type { TriggerName } from "../../domain/automation.ts";
import { failExecution, newExecution } from "../../domain/automation-execution.ts";
import { buildPlan, plannedServices, planRefusal, sizeRefusal } from "../../domain/automation-plan.ts";
import type { Tx } from "../db.ts";
import type { Attribution } from "../record.ts";
import { insertExecution, type StoredExecution } from "./executions.ts";
import type { HomeEnvironment } from "./parts.ts";
import { type StoredService, servicesOf, startService } from "./services.ts";
import { type StoredTask, tasksOf } from "./tasks.ts";

/** All services and tasks of an environment that the transaction holds. */
export interface AutomationSet {
  environment: HomeEnvironment;
  services: Map<string, StoredService>;
  tasks: Map<string, StoredTask>;
}

const byId = <T extends { id: string }>(items: readonly T[]) => new Map(items.map((item) => [item.id, item]));

export async function readAutomationSet(tx: Tx, environment: HomeEnvironment): Promise<AutomationSet> {
  const services = byId(await servicesOf(tx, environment.id));
  return { environment, services, tasks: byId(await tasksOf(tx, environment.id)) };
}

/** Size of all definitions in an environment that the transaction holds. */
export async function definitionBytes(tx: Tx, environmentId: string): Promise<number> {
  const [row] = await tx<{ bytes: number }[]>`
    select (select coalesce(sum(octet_length(metadata) + octet_length(spec)), 0) from services where environment_id = ${environmentId})
      + (select coalesce(sum(octet_length(metadata) + octet_length(spec)), 0) from tasks where environment_id = ${environmentId}) as bytes`;
  return Number(row?.bytes ?? 0);
}

/** Who starts a task, and why. */
export interface Start {
  creator: Subject;
  startedBy: TriggerName;
  /** The firing of a trigger; empty for a manual start. */
  firingId: string;
}

/**
 * Makes an execution of a task and asks the services of its plan to start, in one go: the runner then only waits for
 * them. One that cannot be planned is stored as FAILED.
 */
export async function startExecution(
  tx: Tx,
  { environment, services, tasks }: AutomationSet,
  task: StoredTask,
  { firingId, ...start }: Start,
  by: Attribution,
): Promise<StoredExecution> {
  const definitions = { tasks, services };
  const onMachine = start.startedBy === "postMachineStart";
  const cycle = planRefusal(definitions, task.id);
  const planned = cycle ? undefined : buildPlan(definitions, task.id, { newId: by.newId, onMachine });
  const refusal = cycle ?? (planned && sizeRefusal(planned));
  const facts = { taskId: task.id, environmentId: environment.id, ...start, now: by.at };
  const fresh = newExecution(refusal || !planned ? create(TaskExecutionSpecSchema) : planned, facts);
  const failed = refusal ? failExecution(fresh, refusal, by.at) : undefined;
  const state = failed?.kind === "changed" ? failed.next : fresh;
  const execution: StoredExecution = {
    ...state,
    id: by.newId(),
    organizationId: environment.organizationId,
    runnerId: environment.metadata.runnerId,
    firingId,
    reportEpoch: 0,
    reportSeq: 0,
  };
  for (const id of plannedServices(state.spec)) {
    const service = services.get(id);
    if (service) services.set(id, await startService(tx, service, start.startedBy, by));
  }
  await insertExecution(tx, execution, task.metadata.reference, by);
  return execution;
}
