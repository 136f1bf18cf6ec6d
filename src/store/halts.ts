import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { requestStop } from "../domain/lifecycle.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { advanceEnvironment } from "./environment-steps.ts";
import { lockEnvironments, type StoredEnvironment } from "./environments.ts";
import { readPolicies } from "./organizations.ts";
import type { Attribution } from "./record.ts";

/** An order to stop the environments of a principal or, under the organization's own id, those on its local runners. */
export interface Halt {
  subjectId: string;
  organizationId: string;
  createdAt: Date;
}

/** How many environments the transaction of an order stops itself: more than most people run. */
const FIRST_STOPS = 20;

const isOfLocalRunners = (halt: Halt) => halt.subjectId === halt.organizationId;

/**
 * Orders that everything of a subject stops, and stops the first ones. The rest, and what a call that was under way adds
 * to them, follows after the commit, whatever happens to this process. The caller holds the row of the subject. Runners
 * that have to act are handed to `touched`.
 */
export async function orderHalt(
  tx: Tx,
  halt: Halt,
  by: Attribution,
  touched: (runnerId: string) => void,
): Promise<void> {
  await tx`insert into halts (subject_id, organization_id, created_at, due_at)
    values (${halt.subjectId}, ${halt.organizationId}, ${halt.createdAt}, ${halt.createdAt})
    on conflict (subject_id) do update set created_at = excluded.created_at, due_at = excluded.due_at`;
  const environments = await lockEnvironments(tx, await haltedIds(tx, halt, FIRST_STOPS));
  // Everybody takes environments before runners, and here there are several of both.
  environments.sort((left, right) => (left.metadata.runnerId < right.metadata.runnerId ? -1 : 1));
  for (const environment of environments)
    if (await stopHalted(tx, halt, environment, by)) touched(environment.metadata.runnerId);
}

/** Orders to look at, those that fell due first at the head. */
export async function dueHalts(sql: Sql, now: Date, limit: number): Promise<Halt[]> {
  const rows = await sql<{ subject_id: string; organization_id: string; created_at: Date }[]>`
    select subject_id, organization_id, created_at from halts where due_at <= ${now} order by due_at limit ${limit}`;
  return rows.map((row) => ({
    subjectId: row.subject_id,
    organizationId: row.organization_id,
    createdAt: row.created_at,
  }));
}

/** Whether the reason of an order is still there; it stays so until the transaction ends. */
export async function haltHolds(tx: Tx, halt: Halt): Promise<boolean> {
  if (isOfLocalRunners(halt)) {
    await tx`select from organizations where id = ${halt.organizationId} for share`;
    return !(await readPolicies(tx, halt.organizationId)).localRunners;
  }
  const [row] = await tx<{ active: boolean }[]>`
    with u as (select from users where id = ${halt.subjectId} and status = ${UserStatus.ACTIVE} for share),
    s as (select from service_accounts where id = ${halt.subjectId} and not suspended for share)
    select exists (select from u) or exists (select from s) as active`;
  return row?.active === false;
}

/** Puts the next look at an order off, unless it has been given anew. */
export async function postponeHalt(tx: Tx, halt: Halt, until: Date): Promise<void> {
  await tx`update halts set due_at = ${until} where subject_id = ${halt.subjectId} and created_at = ${halt.createdAt}`;
}

/** The end of an order, unless it has been given anew. */
export async function closeHalt(tx: Tx, halt: Halt): Promise<void> {
  await tx`delete from halts where subject_id = ${halt.subjectId} and created_at = ${halt.createdAt}`;
}

function halted(sql: Sql | Tx, halt: Halt): Fragment {
  if (!isOfLocalRunners(halt)) return sql`e.creator_id = ${halt.subjectId}`;
  return sql`e.runner_id in (select id from runners
    where organization_id = ${halt.organizationId} and kind = ${RunnerKind.LOCAL} and deleted_at is null)`;
}

/** Environments under an order that still want to run. */
export async function haltedIds(sql: Sql | Tx, halt: Halt, limit: number): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select e.id from environments e
    where e.organization_id = ${halt.organizationId} and ${halted(sql, halt)}
      and e.desired_phase = ${EnvironmentPhase.RUNNING} and e.deleted_at is null
    order by e.id limit ${limit}`;
  return rows.map((row) => row.id);
}

/** Asks an environment under an order, which the transaction holds, to stop; true if its runner has to act. */
export async function stopHalted(
  tx: Tx,
  halt: Halt,
  environment: StoredEnvironment,
  by: Attribution,
): Promise<boolean> {
  const stop = requestStop(environment, by.at);
  if (stop.kind !== "changed") return false;
  const reason = isOfLocalRunners(halt) ? "local runners are switched off" : "its creator is no longer active";
  return advanceEnvironment(tx, environment, stop.next, { ...by, action: `Environment stop requested: ${reason}` });
}
