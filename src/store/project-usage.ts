import type { Subject } from "../../gen/gitpod/v1/identity_pb.js";
import type { Fragment, Sql, Tx } from "./db.ts";

/** CTEs `project_use` and `project_user`, which put down that somebody makes an environment from a project. */
export function usedProject(
  tx: Tx,
  use: { projectId: string; environmentId: string; creator: Subject | undefined; at: Date },
): Fragment {
  return tx`project_use as (
    insert into project_uses (project_id, environment_id, created_at) values (${use.projectId}, ${use.environmentId}, ${use.at})
  ), project_user as (
    insert into project_users (project_id, subject_id, subject_principal, used_at)
    values (${use.projectId}, ${use.creator?.id}, ${use.creator?.principal}, ${use.at})
    on conflict (project_id, subject_id) do update set used_at = excluded.used_at
  )`;
}

/**
 * Counts the popularity of projects whose turn it is again: environments made within `windowMs`, each half as much after
 * every `halfLifeMs`. Projects that somebody is changing wait. Returns how many were counted.
 */
export async function countPopularity(
  sql: Sql | Tx,
  { now, windowMs, halfLifeMs, everyMs }: { now: Date; windowMs: number; halfLifeMs: number; everyMs: number },
  limit: number,
): Promise<number> {
  const rows = await sql`
    with due as (
      select id from projects where popularity_due_at <= ${now} and deleting_at is null
      order by popularity_due_at limit ${limit} for update skip locked
    )
    update projects p set popularity_due_at = ${new Date(now.getTime() + everyMs)}, popularity = coalesce((
      select sum(power(0.5, extract(epoch from ${now}::timestamptz - u.created_at) * 1000 / ${halfLifeMs}::float8)) from project_uses u
      where u.project_id = p.id and u.created_at > ${new Date(now.getTime() - windowMs)}
    ), 0)
    from due where p.id = due.id returning p.id`;
  return rows.length;
}
