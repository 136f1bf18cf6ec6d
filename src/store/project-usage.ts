import type { Subject } from "../../gen/gitpod/v1/identity_pb.js";
import type { Caller } from "../domain/principal.ts";
import { readsProject } from "./access.ts";
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
 * CTE `run`, which keeps the times at which an environment of a project runs; nothing where that does not change. `from`
 * and `to` are since when it was and is running, null where it is not.
 */
export function ranProject(
  tx: Tx,
  environment: { id: string; organizationId: string; projectId: string },
  from: Date | null,
  to: Date | null,
  at: Date,
): Fragment {
  const { id, organizationId, projectId } = environment;
  // The project may be gone already.
  if (to && !from)
    return tx`, run as (
      insert into environment_runs (environment_id, organization_id, project_id, started_at)
      select ${id}, ${organizationId}, id, ${to} from projects where id = ${projectId} for key share on conflict do nothing
    )`;
  if (from && !to)
    return tx`, run as (
      update environment_runs set ended_at = greatest(started_at, ${at}) where environment_id = ${id} and ended_at = 'infinity'
    )`;
  return tx``;
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

/** How long the environments of a project ran. */
export interface ProjectRuntime {
  id: string;
  name: string;
  seconds: number;
}

/**
 * Runtime within a time range of the projects that the caller may read, the longest first, one more than `limit`; those
 * below a second are left out. `after` is the last one of the page before.
 */
export async function projectRuntimes(
  sql: Sql,
  caller: Caller,
  range: { start: Date; end: Date },
  after: Pick<ProjectRuntime, "id" | "seconds"> | undefined,
  limit: number,
): Promise<ProjectRuntime[]> {
  const { start, end } = range;
  const position = after
    ? sql`(seconds < ${after.seconds} or seconds = ${after.seconds} and id > ${after.id})`
    : sql`true`;
  return sql<ProjectRuntime[]>`
    select id, name, seconds from (
      select p.id, p.name, floor(sum(extract(epoch from least(run.ended_at, ${end}) - greatest(run.started_at, ${start}))))::bigint as seconds
      from environment_runs run join projects p on p.id = run.project_id
      where run.organization_id = ${caller.organizationId} and run.ended_at > ${start} and run.started_at < ${end}
        and p.deleting_at is null and ${readsProject(sql, caller)}
      group by p.id
    ) totals where seconds > 0 and ${position} order by seconds desc, id limit ${limit + 1}`;
}
