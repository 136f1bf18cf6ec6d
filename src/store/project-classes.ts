import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import type { ClassEntry } from "../domain/project.ts";
import { usesRunner } from "./access.ts";
import type { Sql, Tx } from "./db.ts";
import { canCreate } from "./environment-classes.ts";

/** What a project offers, by order, one more than the page holds. */
export async function listClassEntries(sql: Sql, projectId: string, page: Page): Promise<ClassEntry[]> {
  const rows = await sql<{ position: number; class_id: string | null }[]>`
    select position, class_id from project_environment_classes
    where project_id = ${projectId} and position > ${page.after ? Number(page.after) : -1} order by position limit ${page.limit + 1}`;
  return rows.map((row) => ({ order: row.position, classId: row.class_id ?? undefined }));
}

/** Replaces what a project offers, which the transaction holds locked, as it does the classes. */
export async function replaceClassEntries(tx: Tx, projectId: string, entries: readonly ClassEntry[]): Promise<void> {
  await tx`delete from project_environment_classes where project_id = ${projectId}`;
  await tx`
    insert into project_environment_classes (project_id, position, class_id)
    select ${projectId}, * from unnest(${entries.map((each) => each.order)}::int[], ${entries.map((each) => each.classId ?? null)}::uuid[])`;
}

/** Makes a class the one that a new project offers; false if the class is gone. */
export async function offerClass(tx: Tx, projectId: string, classId: string): Promise<boolean> {
  const rows = await tx`
    with held as (select id from environment_classes where id = ${classId} for key share)
    insert into project_environment_classes (project_id, position, class_id) select ${projectId}, 0, id from held returning class_id`;
  return rows.length > 0;
}

/**
 * Classes of projects with which the caller could create an environment right now, the best first: by project and order,
 * within local runners those that the caller made, then the newest.
 */
export async function usableClassIds(
  sql: Sql | Tx,
  caller: Caller,
  wanted: { projectIds: readonly string[]; localRunners: boolean; limit: number; runnerId?: string },
): Promise<string[]> {
  const { projectIds, localRunners, limit, runnerId } = wanted;
  if (!projectIds.length) return [];
  const rows = await sql<{ id: string }[]>`
    select id from (
      select distinct on (c.id) c.id, project.place, offer.position, r.creator_id = ${caller.id} as own
      from unnest(${projectIds as string[]}::uuid[]) with ordinality project (id, place)
      join project_environment_classes offer on offer.project_id = project.id
      cross join lateral (
        select * from environment_classes where id = offer.class_id
        union all
        select * from environment_classes where offer.class_id is null and organization_id = ${caller.organizationId}
      ) c join runners r on r.id = c.runner_id
      where (offer.class_id is not null or r.kind = ${RunnerKind.LOCAL}) and ${runnerId ? sql`r.id = ${runnerId}` : sql`true`}
        and ${canCreate(sql, caller, localRunners)}
      order by c.id, project.place, offer.position
    ) usable order by place, position, own desc, id desc limit ${limit}`;
  return rows.map((row) => row.id);
}

/** Whether a project offers a class, by itself or as one of a local runner that the caller may use. */
export async function offersClass(sql: Sql | Tx, caller: Caller, projectId: string, classId: string): Promise<boolean> {
  const rows = await sql`
    select from project_environment_classes offer where offer.project_id = ${projectId} and (
      offer.class_id = ${classId} or offer.class_id is null and exists (
        select from environment_classes c join runners r on r.id = c.runner_id
        where c.id = ${classId} and r.organization_id = ${caller.organizationId} and r.kind = ${RunnerKind.LOCAL}
          and ${usesRunner(sql, caller)}
      )
    )`;
  return rows.length > 0;
}
