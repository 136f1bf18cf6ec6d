import { fromBinary, toBinary } from "@bufbuild/protobuf";
import {
  type EnvironmentClass,
  EnvironmentClassSchema,
  type ListEnvironmentClassesRequest_Filter,
  RunnerKind,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { administersRunner, readsClass, usesRunner } from "./access.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Change, recorded } from "./record.ts";

/** A class for environments that the caller wants to make, with what its runner and the caller's roles allow. */
export interface UsableClass {
  message: EnvironmentClass;
  organizationId: string;
  /** The configuration satisfies the runner's schema. */
  fits: boolean;
  uses: boolean;
  runnerPhase: RunnerPhase;
  runnerKind: RunnerKind;
  maxEnvironments?: number;
}

/** A class, and whether the caller may change it. */
export interface StoredClass extends UsableClass {
  administers: boolean;
}

export interface UsableClassRow {
  message: Uint8Array;
  home: string;
  fits: boolean;
  uses: boolean;
  runner_phase: RunnerPhase;
  runner_kind: RunnerKind;
  max_environments: number | null;
}

/** Columns of a class `c` and its runner `r`, without `uses`. */
const columns = (sql: Sql | Tx) =>
  sql`c.message, c.organization_id as home, c.fits, r.phase as runner_phase, r.kind as runner_kind, r.max_environments`;

/**
 * Query for a class, as a caller sees it who wants to make an environment of it, with more `columns`, about class `c`
 * and its runner `r`. Whoever may use a runner may read its classes, which is asked first: it is asked in any case.
 */
export const usableClassQuery = (sql: Sql | Tx, caller: Caller, id: string | null, more: Fragment): Fragment => sql`
  select ${columns(sql)}, role.uses, ${more} from environment_classes c join runners r on r.id = c.runner_id
    cross join lateral (select ${usesRunner(sql, caller)} as uses offset 0) role
  where c.id = ${id} and r.organization_id = ${caller.organizationId}
    and (role.uses and r.deleted_at is null or ${readsClass(sql, caller)})`;

export function toUsableClass(row: UsableClassRow): UsableClass {
  return {
    message: fromBinary(EnvironmentClassSchema, row.message),
    organizationId: row.home,
    fits: row.fits,
    uses: row.uses,
    runnerPhase: row.runner_phase,
    runnerKind: row.runner_kind,
    maxEnvironments: row.max_environments ?? undefined,
  };
}

export async function insertClass(
  sql: Sql | Tx,
  input: { message: EnvironmentClass; organizationId: string; fits: boolean },
  change: Change,
): Promise<void> {
  const { message } = input;
  await sql`
    with ${recorded(sql, change)}
    insert into environment_classes (id, organization_id, runner_id, enabled, fits, message)
    values (${message.id}, ${input.organizationId}, ${message.runnerId}, ${message.enabled}, ${input.fits},
      ${toBinary(EnvironmentClassSchema, message)})`;
}

export async function updateClass(tx: Tx, message: EnvironmentClass): Promise<void> {
  await tx`update environment_classes set enabled = ${message.enabled}, message = ${toBinary(EnvironmentClassSchema, message)}
    where id = ${message.id}`;
}

/** A class that the caller may read; NOT_FOUND otherwise. */
export async function getClass(sql: Sql | Tx, caller: Caller, id: string, lock = false): Promise<StoredClass> {
  const [row] = await sql<(UsableClassRow & { administers: boolean })[]>`
    select ${columns(sql)}, ${administersRunner(sql, caller)} as administers, ${usesRunner(sql, caller)} as uses
    from environment_classes c join runners r on r.id = c.runner_id
    where c.id = ${id} and ${readsClass(sql, caller)} ${lock ? sql`for update of c` : sql``}`;
  if (!row) throw notFound("environment class", id);
  return { ...toUsableClass(row), administers: row.administers };
}

/** Throws NOT_FOUND unless the caller may read all of these classes; they cannot go until the transaction ends. */
export async function holdClasses(tx: Tx, caller: Caller, ids: readonly string[]): Promise<void> {
  if (!ids.length) return;
  const rows = await tx<{ id: string }[]>`
    select c.id from environment_classes c join runners r on r.id = c.runner_id
    where c.id = any(${ids as string[]}) and ${readsClass(tx, caller)} order by c.id for key share of c`;
  const found = new Set(rows.map((row) => row.id));
  const missing = ids.find((id) => !found.has(id.toLowerCase()));
  if (missing !== undefined) throw notFound("environment class", missing);
}

/** Condition: a new environment of class `c` could be created on runner `r` by the caller right now. */
export function canCreate(sql: Sql | Tx, caller: Caller, localRunners: boolean): Fragment {
  const connected = [RunnerPhase.ACTIVE, RunnerPhase.DEGRADED] as number[];
  const switchedOn = localRunners ? sql`true` : sql`r.kind <> ${RunnerKind.LOCAL}`;
  return sql`(c.enabled and c.fits and ${usesRunner(sql, caller)} and r.phase = any(${connected}) and ${switchedOn})`;
}

/** Classes that the caller may read, newest first, one more than the page holds. */
export async function listClasses(
  sql: Sql,
  caller: Caller,
  filter: ListEnvironmentClassesRequest_Filter | undefined,
  localRunners: boolean,
  page: Page,
): Promise<EnvironmentClass[]> {
  const conditions: Fragment[] = [sql`c.organization_id = ${caller.organizationId}`, readsClass(sql, caller)];
  if (filter?.enabled !== undefined) conditions.push(sql`c.enabled = ${filter.enabled}`);
  if (filter?.runnerIds.length) conditions.push(sql`c.runner_id = any(${filter.runnerIds})`);
  // The contract lets any number through, the columns are small.
  if (filter?.runnerKinds.length) conditions.push(sql`r.kind = any(${filter.runnerKinds as number[]}::int[])`);
  if (filter?.runnerProviders.length)
    conditions.push(sql`r.provider = any(${filter.runnerProviders as number[]}::int[])`);
  if (filter?.canCreateEnvironments !== undefined) {
    conditions.push(sql`${canCreate(sql, caller, localRunners)} = ${filter.canCreateEnvironments}`);
  }
  if (page.after) conditions.push(sql`c.id < ${page.after}`);
  const where = conditions.reduce((all, each) => sql`${all} and ${each}`);
  const rows = await sql<{ message: Uint8Array }[]>`
    select c.message from environment_classes c join runners r on r.id = c.runner_id
    where ${where} order by c.id desc limit ${page.limit + 1}`;
  return rows.map((row) => fromBinary(EnvironmentClassSchema, row.message));
}

/** Notes which classes of a runner satisfy a schema that it has just published. */
export async function refitClasses(
  tx: Tx,
  runnerId: string,
  fits: (message: EnvironmentClass) => boolean,
): Promise<void> {
  const rows = await tx<{ id: string; fits: boolean; message: Uint8Array }[]>`
    select id, fits, message from environment_classes where runner_id = ${runnerId} for update`;
  for (const row of rows) {
    const now = fits(fromBinary(EnvironmentClassSchema, row.message));
    if (now !== row.fits) await tx`update environment_classes set fits = ${now} where id = ${row.id}`;
  }
}
