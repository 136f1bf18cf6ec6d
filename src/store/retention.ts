import type { Sql, Tx } from "./db.ts";

// Each function deletes at most `limit` rows and returns how many there were. Rows that another replica is deleting are
// skipped: two that took the same rows in another order would wait for each other.

/** Outbox rows, which only feed streams and the answer to "was it deleted?". */
export async function purgeEvents(sql: Sql, before: Date, limit: number): Promise<number> {
  const { count } = await sql`delete from events where seq in (
    select seq from events where created_at < ${before} order by created_at limit ${limit} for update skip locked)`;
  return count;
}

/** Revision logs of runners by age; a runner that resumes from before gets a snapshot. */
export async function purgeRevisions(sql: Sql, before: Date, limit: number): Promise<number> {
  const { count } = await sql`delete from runner_revisions where (runner_id, revision) in (
    select runner_id, revision from runner_revisions where created_at < ${before} order by created_at limit ${limit} for update skip locked)`;
  return count;
}

/** Revision logs of runners by length: of each the newest `keep` stay. */
export async function trimRevisions(sql: Sql, keep: number, limit: number): Promise<number> {
  const { count } = await sql`delete from runner_revisions where (runner_id, revision) in (
    select log.runner_id, log.revision from runners r
    join runner_revisions log on log.runner_id = r.id and log.revision <= r.head_revision - ${keep}::bigint
    where r.head_revision > ${keep} limit ${limit} for update of log skip locked)`;
  return count;
}

/** Questions to runners whose asker died before it could remove them. */
export async function purgeCalls(sql: Sql, before: Date, limit: number): Promise<number> {
  const { count } = await sql`delete from runner_calls where id in (
    select id from runner_calls where created_at < ${before} order by created_at limit ${limit} for update skip locked)`;
  return count;
}

/**
 * Audit entries past their retention: the one deletion that the trigger on the table lets through. Ids grow with time,
 * so only the first ones are looked at.
 */
export async function purgeAudit(tx: Tx, before: Date, limit: number): Promise<number> {
  await tx`select set_config('berth.audit_retention', 'on', true)`;
  const { count } = await tx`
    with oldest as (select id, created_at from audit_log order by id limit ${limit}),
    expired as (
      select id from audit_log where id in (select id from oldest where created_at < ${before}) for update skip locked
    )
    delete from audit_log where id in (select id from expired)`;
  return count;
}

/** Environments that no longer count for the popularity of their project. */
export async function purgeProjectUses(sql: Sql, before: Date, limit: number): Promise<number> {
  const { count } = await sql`delete from project_uses where (project_id, environment_id) in (
    select project_id, environment_id from project_uses where created_at < ${before} order by created_at limit ${limit}
    for update skip locked)`;
  return count;
}
