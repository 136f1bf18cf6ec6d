import type { Sql, Tx } from "./db.ts";

// Each function deletes at most `limit` rows from before a time and returns how many there were.

/** Outbox rows, which only feed streams and the answer to "was it deleted?". */
export async function purgeEvents(sql: Sql, before: Date, limit: number): Promise<number> {
  const rows = await sql`delete from events where seq in (
    select seq from events where created_at < ${before} order by created_at limit ${limit}) returning seq`;
  return rows.length;
}

/** Revision logs of runners; one that resumes from before gets a snapshot. */
export async function purgeRevisions(sql: Sql, before: Date, limit: number): Promise<number> {
  const rows = await sql`delete from runner_revisions where (runner_id, revision) in (
    select runner_id, revision from runner_revisions where created_at < ${before} order by created_at limit ${limit}) returning 1`;
  return rows.length;
}

/** Questions to runners whose asker died before it could remove them. */
export async function purgeCalls(sql: Sql, before: Date, limit: number): Promise<number> {
  const rows = await sql`delete from runner_calls where id in (
    select id from runner_calls where created_at < ${before} order by created_at limit ${limit}) returning id`;
  return rows.length;
}

/** Audit entries past their retention: the one deletion that the trigger on the table lets through. */
export async function purgeAudit(tx: Tx, before: Date, limit: number): Promise<number> {
  await tx`select set_config('berth.audit_retention', 'on', true)`;
  const rows = await tx`delete from audit_log where id in (
    select id from audit_log where created_at < ${before} order by id limit ${limit}) returning id`;
  return rows.length;
}
