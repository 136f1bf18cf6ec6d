import { create, fromBinary } from "@bufbuild/protobuf";
import type { AutomationTrigger } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { Principal, SubjectSchema } from "../../../gen/gitpod/v1/identity_pb.js";
import { RunnerCapability, RunnerStatusSchema } from "../../../gen/gitpod/v1/runner_pb.js";
import { MAX_UNFINISHED_EXECUTIONS, runRefusal, type TriggerName, triggerNames } from "../../domain/automation.ts";
import { isPrebuild, type Occurrence } from "../../domain/automation-environment.ts";
import { startRefusal } from "../../domain/automation-service.ts";
import type { Tx } from "../db.ts";
import type { Attribution } from "../record.ts";
import { countUnfinished } from "./executions.ts";
import type { HomeEnvironment } from "./parts.ts";
import { startService } from "./services.ts";
import { readAutomationSet, startExecution } from "./start.ts";
import { tasksOf } from "./tasks.ts";

/** Puts an occurrence down as fired; false if it already was. Older ones of its trigger do not come back. */
async function claim(tx: Tx, environmentId: string, { trigger, occurrence }: Occurrence, at: Date): Promise<boolean> {
  const rows = await tx`
    insert into trigger_firings (environment_id, trigger, occurrence, fired_at)
    values (${environmentId}, ${trigger}, ${occurrence}, ${at})
    on conflict (environment_id, trigger) do update set occurrence = excluded.occurrence, fired_at = excluded.fired_at
      where trigger_firings.occurrence <> excluded.occurrence
    returning trigger`;
  return rows.length > 0;
}

/** A trigger that has fired, and what it had to leave out, as ends of sentences that begin with its name. */
export interface Firing {
  trigger: TriggerName;
  leftOut: string[];
}

/**
 * Starts whatever a trigger names, once per occurrence, in an environment that the transaction holds. A service that
 * cannot be started is left out, and so are tasks while too many executions have not ended. Answers what has fired.
 */
export async function fire(
  tx: Tx,
  environment: HomeEnvironment,
  occurrence: Occurrence,
  { newId, at }: Attribution,
): Promise<Firing[]> {
  if (!(await claim(tx, environment.id, occurrence, at))) return [];
  const { trigger } = occurrence;
  const leftOut: string[] = [];
  const creator = create(SubjectSchema, { id: environment.id, principal: Principal.ENVIRONMENT });
  const by = { actor: { id: creator.id, principal: creator.principal, tokenId: null }, newId, at };
  const set = await readAutomationSet(tx, environment);
  for (const [id, service] of set.services) {
    if (!triggerNames(service.metadata.triggeredBy).includes(trigger)) continue;
    const refusal = startRefusal(service);
    if (refusal) leftOut.push(`left out service ${service.metadata.reference}: ${refusal}`);
    else set.services.set(id, await startService(tx, service, trigger, by));
  }
  const tasks = [...set.tasks.values()].filter(({ metadata }) => triggerNames(metadata.triggeredBy).includes(trigger));
  const hasRoom = tasks.length > 0 && (await countUnfinished(tx, environment.id)) < MAX_UNFINISHED_EXECUTIONS;
  const start = { creator, startedBy: trigger, firingId: newId() };
  for (const task of tasks) {
    if (hasRoom) await startExecution(tx, set, task, start, by);
    else leftOut.push(`left out task ${task.metadata.reference}: too many executions have not ended`);
  }
  const next = trigger === "prebuild" ? await fireBeforeSnapshot(tx, environment, by) : [];
  return [{ trigger, leftOut }, ...next];
}

/** Fires what comes between the executions of a prebuild and its snapshot, once all of them have ended. */
export async function fireBeforeSnapshot(tx: Tx, environment: HomeEnvironment, by: Attribution): Promise<Firing[]> {
  if (!isPrebuild(environment) || runRefusal(environment)) return [];
  if ((await countUnfinished(tx, environment.id, "prebuild")) > 0) return [];
  const [row] = await tx<{ status: Uint8Array }[]>`
    select r.status from runners r join trigger_firings f on f.environment_id = ${environment.id} and f.trigger = 'prebuild'
    where r.id = ${environment.metadata.runnerId}`;
  const isOffered = (status: Uint8Array) =>
    fromBinary(RunnerStatusSchema, status).capabilities.includes(RunnerCapability.PREBUILDS_BEFORE_SNAPSHOT_TRIGGER);
  if (!row) return [];
  if (isOffered(row.status)) return await fire(tx, environment, BEFORE_SNAPSHOT, by);
  const tasks = (await tasksOf(tx, environment.id)).filter(({ metadata }) => isOfSnapshot(metadata.triggeredBy));
  const leftOut = tasks.map(({ metadata }) => `left out task ${metadata.reference}: the runner does not offer it`);
  return [{ trigger: BEFORE_SNAPSHOT.trigger, leftOut }];
}

const BEFORE_SNAPSHOT: Occurrence = { trigger: "beforeSnapshot", occurrence: "" };
const isOfSnapshot = (triggers: readonly AutomationTrigger[]) =>
  triggerNames(triggers).includes(BEFORE_SNAPSHOT.trigger);
