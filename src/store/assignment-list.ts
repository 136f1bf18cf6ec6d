import type { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { assignableRoles, DERIVATIONS, derivedId, isDerivedId, resourceOfDerived } from "../domain/roles.ts";
import {
  type AssignmentRow,
  assignmentColumns,
  readsAssignment,
  readsAssignmentUnasked,
  type StoredAssignment,
  toAssignment,
} from "./assignment-rows.ts";
import { conjunction } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { assignableResources, readableResources } from "./shared-resources.ts";

/** Which assignments to list: all that is set must match, one value of each is enough. */
export interface AssignmentFilter {
  resourceTypes: readonly ResourceType[];
  roles: readonly ResourceRole[];
  groupId: string;
  /** Whose groups. */
  memberId: string;
  /** With these, derived assignments are listed too. */
  resourceIds: readonly string[];
}

export interface ListedAssignment extends StoredAssignment {
  /** Role on the organization that it follows from; absent for one that was made. */
  derivedFrom?: ResourceRole;
  /** Its place in the list. */
  position: string;
}

const isAmong = <T>(values: readonly T[], value: T) => !values.length || values.includes(value);

const groupsOf = (sql: Sql | Tx, memberId: string) =>
  sql`select m.group_id as value from group_members m where m.member_id = ${memberId}`;

/**
 * Where to look for assignments: `wanted` values of columns that have an index by which each value's rows come newest
 * first. A single statement over all of them would, for a rare value in a large organization, go through everybody else's.
 */
interface Source {
  values: Fragment;
  on: Fragment;
}

/**
 * Assignments on resources: all on those where the caller may assign roles, which is decided once for each of them; on the
 * others what its groups have, and on the organization what anybody has.
 */
function sourcesOn(sql: Sql, caller: Caller, resourceIds: readonly string[]): Source[] {
  const wanted = sql`select distinct unnest(${resourceIds as string[]}::uuid[]) as value`;
  const on = sql`a.resource_id = wanted.value`;
  if (caller.orgAdmin) return [{ values: wanted, on }];
  return [
    { values: assignableResources(sql, caller, resourceIds), on },
    {
      values: sql`select own.group_id, each.value from group_members own cross join (${wanted}) each
        where own.member_id = ${caller.id}`,
      on: sql`a.group_id = wanted.group_id and a.resource_id = wanted.value`,
    },
    { values: sql`select value from (${wanted}) each where value = ${caller.organizationId}`, on },
  ];
}

function sources(
  sql: Sql,
  caller: Caller,
  filter: AssignmentFilter,
  roles: readonly ResourceRole[] | undefined,
): Source[] {
  const from = (column: Fragment, values: Fragment): Source => ({ values, on: sql`${column} = wanted.value` });
  const group = sql`a.group_id`;
  const own = sql`select ${caller.organizationId}::uuid as value`;
  if (filter.resourceIds.length) return sourcesOn(sql, caller, filter.resourceIds);
  if (filter.groupId) return [from(group, sql`select ${filter.groupId}::uuid as value`)];
  if (filter.memberId) return [from(group, groupsOf(sql, filter.memberId))];
  if (!caller.orgAdmin) return [from(group, groupsOf(sql, caller.id)), from(sql`a.resource_id`, own)];
  if (roles) return [from(sql`a.resource_role`, sql`select distinct unnest(${roles as number[]}::int[]) as value`)];
  return [from(sql`a.organization_id`, own)];
}

function groupConditions(sql: Sql | Tx, filter: AssignmentFilter): Fragment[] {
  const conditions: Fragment[] = [];
  if (filter.groupId) conditions.push(sql`a.group_id = ${filter.groupId}`);
  if (filter.memberId) conditions.push(sql`a.group_id in (${groupsOf(sql, filter.memberId)})`);
  return conditions;
}

/** The roles that kinds of resources and roles leave; undefined if neither is filtered. */
function wantedRoles({ resourceTypes, roles }: AssignmentFilter): readonly ResourceRole[] | undefined {
  if (!resourceTypes.length) return roles.length ? roles : undefined;
  return resourceTypes.flatMap(assignableRoles).filter((role) => isAmong(roles, role));
}

async function listMade(
  sql: Sql,
  caller: Caller,
  filter: AssignmentFilter,
  after: string,
  limit: number,
): Promise<ListedAssignment[]> {
  const roles = wantedRoles(filter);
  // Of resources that were asked for only what may be read is looked at.
  const reads = filter.resourceIds.length
    ? sql`a.organization_id = ${caller.organizationId}`
    : readsAssignmentUnasked(sql, caller);
  const conditions = [reads, ...groupConditions(sql, filter)];
  if (roles) conditions.push(sql`a.resource_role = any(${roles as number[]}::int[])`);
  if (after) conditions.push(sql`a.id < ${after}`);
  const found = sources(sql, caller, filter, roles).map(
    ({ on, values }) => sql`select found.* from (${values}) wanted cross join lateral (
      select a.* from role_assignments a where ${on} and ${conjunction(sql, conditions)}
      order by a.id desc limit ${limit}) found`,
  );
  const rows = await sql<AssignmentRow[]>`
    select ${assignmentColumns(sql)} from (${found.reduce((all, each) => sql`${all} union ${each}`)}) a
    join groups g on g.id = a.group_id order by a.id desc limit ${limit}`;
  return rows.map((row) => ({ ...toAssignment(row), position: row.id }));
}

const DERIVED = "derived";

interface DerivedRow extends AssignmentRow {
  derived_from: ResourceRole;
}

/** What follows from assignments on the organization for the resources that are named, by those and the resources. */
async function listDerived(
  sql: Sql | Tx,
  caller: Caller,
  filter: AssignmentFilter,
  [afterId, afterResource]: readonly string[],
  limit: number,
): Promise<ListedAssignment[]> {
  const wanted = DERIVATIONS.filter(
    ({ type, role }) => isAmong(filter.resourceTypes, type) && isAmong(filter.roles, role),
  );
  if (!wanted.length) return [];
  const column = (name: "type" | "role" | "from") => sql`${wanted.map((each) => each[name] as number)}::int[]`;
  const conditions = [readsAssignment(sql, caller), ...groupConditions(sql, filter)];
  if (afterId && afterResource)
    conditions.push(sql`(a.id, a.resource_id) < (${afterId}::uuid, ${afterResource}::uuid)`);
  const rows = await sql<DerivedRow[]>`
    select ${assignmentColumns(sql)}, a.derived_from from (
      select o.id, o.organization_id, o.group_id, d.type as resource_type, r.id as resource_id, d.role as resource_role,
        o.resource_role as derived_from
      from (${readableResources(sql, caller, filter.resourceIds)}) r
        join unnest(${column("type")}, ${column("role")}, ${column("from")}) d (type, role, source) on d.type = r.type
        join role_assignments o on o.resource_id = ${caller.organizationId} and o.resource_role = d.source
    ) a join groups g on g.id = a.group_id
    where ${conjunction(sql, conditions)} order by a.id desc, a.resource_id desc limit ${limit}`;
  return rows.map((row) => ({
    ...toAssignment(row),
    id: derivedId(row.id, row.resource_id),
    derivedFrom: row.derived_from,
    position: `${DERIVED} ${row.id} ${row.resource_id}`,
  }));
}

/**
 * Assignments that the caller may read, newest first, one more than the page holds. Those that follow from roles on the
 * organization come last.
 */
export async function listAssignments(
  sql: Sql,
  caller: Caller,
  filter: AssignmentFilter,
  page: Page,
): Promise<ListedAssignment[]> {
  const limit = page.limit + 1;
  const [mark, ...position] = page.after.split(" ");
  const made = mark === DERIVED ? [] : await listMade(sql, caller, filter, page.after, limit);
  if (made.length === limit || !filter.resourceIds.length) return made;
  return [...made, ...(await listDerived(sql, caller, filter, position, limit - made.length))];
}

/** Whether there is such a derived assignment that the caller may read. */
async function isDerived(tx: Tx, caller: Caller, id: string): Promise<boolean> {
  const sources = await tx<{ id: string }[]>`
    select id from role_assignments where resource_id = ${caller.organizationId}
      and resource_role = any(${DERIVATIONS.map(({ from }) => from)}::int[])`;
  if (!sources.length) return false;
  const resourceIds = sources.map((source) => resourceOfDerived(id, source.id));
  const filter = { resourceTypes: [], roles: [], groupId: "", memberId: "", resourceIds };
  // At most one of these resources exists, and each source gives one role on it.
  const derived = await listDerived(tx, caller, filter, [], sources.length);
  return derived.some((each) => each.id === id.toLowerCase());
}

/** An assignment that the caller may read, or the word that it is a derived one; NOT_FOUND otherwise. */
export async function getAssignment(tx: Tx, caller: Caller, id: string): Promise<StoredAssignment | "derived"> {
  const [row] = await tx<AssignmentRow[]>`
    select ${assignmentColumns(tx)} from role_assignments a join groups g on g.id = a.group_id
    where a.id = ${id} and ${readsAssignment(tx, caller)}`;
  if (row) return toAssignment(row);
  if (isDerivedId(id) && (await isDerived(tx, caller, id))) return "derived";
  throw notFound("role assignment", id);
}
