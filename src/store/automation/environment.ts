import { TaskExecutionPhase } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { type Consequences, consequences } from "../../domain/automation-environment.ts";
import { failExecution, requestExecutionStop } from "../../domain/automation-execution.ts";
import { usesDefaultTarget } from "../../domain/automation-plan.ts";
import { isAtRest, isBeingDeleted, LOST, loseService, requestServiceStop } from "../../domain/automation-service.ts";
import type { EnvironmentState } from "../../domain/lifecycle.ts";
import type { Tx } from "../db.ts";
import type { Attribution } from "../record.ts";
import { readExecution, type StoredExecution, saveExecution, unfinishedIds } from "./executions.ts";
import type { HomeEnvironment } from "./parts.ts";
import { removeService, type StoredService, saveService, servicesOf } from "./services.ts";
import { type Firing, fire } from "./triggers.ts";

/**
 * Does to services, tasks and executions what a change of their environment means for them, in the transaction that
 * makes the change and holds the environment. `next` is the environment as it is from now on; answers what has fired.
 */
export async function followEnvironment(
  tx: Tx,
  before: EnvironmentState,
  next: HomeEnvironment,
  { actor, newId, at }: Attribution,
): Promise<Firing[]> {
  const found = consequences(before, next);
  if (!found) return [];
  // Without the words for the environment: what follows from them is not put down again.
  const by = { actor, newId, at };
  if (found.end) {
    await removeAll(tx, next, by.at);
    return [];
  }
  if (found.stop || found.rebuild || found.halt) {
    for (const service of await servicesOf(tx, next.id)) await endService(tx, service, found, by);
    for (const id of await unfinishedIds(tx, next.id)) await endExecution(tx, await readExecution(tx, id), found, by);
  }
  const firings: Firing[] = [];
  for (const occurrence of found.fire) firings.push(...(await fire(tx, next, occurrence, by)));
  return firings;
}

/** What a stop of the environment, a new dev container, or its end without a word means for a service. */
async function endService(tx: Tx, service: StoredService, found: Consequences, by: Attribution): Promise<void> {
  if (found.halt && isBeingDeleted(service)) return removeService(tx, service, by);
  let state = service;
  const isInContainer = !isAtRest(service) && !service.spec.runsOn;
  if (found.stop || (found.rebuild && isInContainer)) {
    const stop = requestServiceStop(state);
    if (stop.kind === "changed") state = await saveService(tx, state, stop.next, by);
  }
  const loss = found.halt ? loseService(state) : undefined;
  if (loss?.kind === "changed") await saveService(tx, state, loss.next, by);
}

/** The same for an execution. */
async function endExecution(tx: Tx, execution: StoredExecution, found: Consequences, by: Attribution): Promise<void> {
  let state = execution;
  const isInContainer = execution.status.phase === TaskExecutionPhase.RUNNING && usesDefaultTarget(execution.spec);
  if (found.stop || (found.rebuild && isInContainer)) {
    const stop = requestExecutionStop(state, by.at);
    if (stop.kind === "changed") {
      await saveExecution(tx, state, stop.next, by);
      state = { ...state, ...stop.next };
    }
  }
  const loss = found.halt ? failExecution(state, LOST, by.at) : undefined;
  if (loss?.kind === "changed") await saveExecution(tx, state, loss.next, by);
}

/** The end of everything in an environment, told to whoever watches it; its runner hears of the environment alone. */
async function removeAll(tx: Tx, { id, organizationId }: HomeEnvironment, at: Date): Promise<void> {
  await tx`
    with services_gone as (delete from services where environment_id = ${id} returning id),
    tasks_gone as (delete from tasks where environment_id = ${id} returning id),
    executions_gone as (delete from task_executions where environment_id = ${id} returning id),
    firings_gone as (delete from trigger_firings where environment_id = ${id})
    insert into events (organization_id, environment_id, resource_type, resource_id, operation, created_at)
    select ${organizationId}, ${id}, part.type, part.id, ${ResourceOperation.DELETE}, ${at} from (
      select ${ResourceType.TASK_EXECUTION}::int as type, id from executions_gone
      union all select ${ResourceType.TASK}::int, id from tasks_gone
      union all select ${ResourceType.SERVICE}::int, id from services_gone
    ) part`;
}
