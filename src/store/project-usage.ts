import type { Subject } from "../../gen/gitpod/v1/identity_pb.js";
import type { Caller } from "../domain/principal.ts";
import { readsProject } from "./access.ts";
import type { Fragment, Sql, Tx } from "./db.ts";

/**
 * CTEs `project_use` and `project_user`, which put down that somebody makes an environment from a project, if the CTE
 * `given`, which comes before, has a row.
 */
export function usedProject(
  tx: Tx,
  use: { projectId: string; environmentId: string; creator: Subject | undefined; at: Date },
  given: Fragment,
): Fragment {
  return tx`project_use as (
    insert into project_uses (project_id, environment_id, created_at)
    select ${use.projectId}, ${use.environmentId}, ${use.at} from ${given}
  ), project_user as (
    insert into project_users (project_id, subject_id, subject_principal, used_at)
    select ${use.projectId}, ${use.creator?.id}, ${use.creator?.principal}, ${use.at} from ${given}
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

const DAY_MS = 24 * 60 * 60_000;

interface Range {
  start: Date;
  end: Date;
}

/** The whole days (UTC) in a range, and what of it lies before and after them; no days and all of it if there are none. */
function daysWithin({ start, end }: Range): { days: Range; rests: Range[] } {
  const from = new Date(Math.ceil(start.getTime() / DAY_MS) * DAY_MS);
  const to = new Date(Math.floor(end.getTime() / DAY_MS) * DAY_MS);
  if (from >= to) return { days: { start: from, end: from }, rests: [{ start, end }] };
  const rests = [
    { start, end: from },
    { start: to, end },
  ];
  return { days: { start: from, end: to }, rests };
}

/** What runs amount to that meet a condition, each as far as it lies in a range. */
const clipped = (sql: Sql, { start, end }: Range, condition: Fragment) => sql`
  select run.project_id, extract(epoch from least(run.ended_at, ${end}) - greatest(run.started_at, ${start})) * 1000000
  from environment_runs run where run.organization_id = organization.id
    and run.started_at < ${end} and run.ended_at > ${start} and ${condition}`;

/** Microseconds that projects of `organization.id` ran within a range, in parts. */
function runtimeParts(sql: Sql, range: Range): Fragment {
  const { days, rests } = daysWithin(range);
  const ended = rests.map((rest) =>
    clipped(
      sql,
      rest,
      sql`run.ended_at <> 'infinity' and tstzrange(run.started_at, run.ended_at) && tstzrange(${rest.start}, ${rest.end})`,
    ),
  );
  const open = clipped(sql, range, sql`run.ended_at = 'infinity'`);
  return [...ended, open].reduce(
    (parts, each) => sql`${parts} union all ${each}`,
    sql`select project_id, microseconds from project_days
      where organization_id = organization.id and day >= ${days.start} and day < ${days.end}`,
  );
}

/**
 * Runtime within a time range of the projects that the caller may read, the longest first, one more than `limit`; those
 * below a second are left out. `after` is the last one of the page before. A range that ends before it starts has none.
 */
export async function projectRuntimes(
  sql: Sql,
  caller: Caller,
  range: Range,
  after: Pick<ProjectRuntime, "id" | "seconds"> | undefined,
  limit: number,
): Promise<ProjectRuntime[]> {
  if (range.start >= range.end) return [];
  const position = after
    ? sql`(seconds < ${after.seconds} or seconds = ${after.seconds} and id > ${after.id})`
    : sql`true`;
  return sql<ProjectRuntime[]>`
    select id, name, seconds from (
      select p.id, p.name, floor(ran.microseconds / 1000000)::bigint as seconds from (
        select parts.project_id, sum(parts.microseconds) as microseconds
        from (select ${caller.organizationId}::uuid as id) organization
          cross join lateral (${runtimeParts(sql, range)}) parts (project_id, microseconds)
        group by parts.project_id
      ) ran join projects p on p.id = ran.project_id
      where p.deleting_at is null and ${readsProject(sql, caller)}
    ) totals where seconds > 0 and ${position} order by seconds desc, id limit ${limit + 1}`;
}
