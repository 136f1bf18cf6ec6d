import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Refusal } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { ADMIN_ROLES, DERIVATIONS, resourceName } from "../domain/roles.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Attribution, type Change, recorded } from "./record.ts";
import { assignsOnResource, creatorsOfResource } from "./shared-resources.ts";

/** A role of a group on a resource. */
export interface StoredAssignment {
  id: string;
  organizationId: string;
  groupId: string;
  groupName: string;
  resourceType: ResourceType;
  resourceId: string;
  role: ResourceRole;
}

export interface AssignmentRow {
  id: string;
  organization_id: string;
  group_id: string;
  group_name: string;
  resource_type: ResourceType;
  resource_id: string;
  resource_role: ResourceRole;
}

/** Columns of assignment `a` with its group `g`. */
export const assignmentColumns = (sql: Sql | Tx): Fragment =>
  sql`a.id, a.organization_id, a.group_id, g.name as group_name, a.resource_type, a.resource_id, a.resource_role`;

export const toAssignment = (row: AssignmentRow): StoredAssignment => ({
  id: row.id,
  organizationId: row.organization_id,
  groupId: row.group_id,
  groupName: row.group_name,
  resourceType: row.resource_type,
  resourceId: row.resource_id,
  role: row.resource_role,
});

/**
 * Condition: may read assignment `a`: every member one on the organization, the members of its group and whoever may
 * assign roles on its resource any other, organization admins all.
 */
export function readsAssignment(sql: Sql | Tx, caller: Caller): Fragment {
  const unasked = readsAssignmentUnasked(sql, caller);
  if (caller.orgAdmin) return unasked;
  return sql`(${unasked} or a.organization_id = ${caller.organizationId} and ${assignsOnResource(sql, caller)})`;
}

/** As `readsAssignment`, of what there is to see without asking for a resource. */
export function readsAssignmentUnasked(sql: Sql | Tx, caller: Caller): Fragment {
  const here = sql`a.organization_id = ${caller.organizationId}`;
  if (caller.orgAdmin) return here;
  return sql`(${here} and (a.resource_type = ${ResourceType.ORGANIZATION}
    or a.group_id in (select own.group_id from group_members own where own.member_id = ${caller.id})))`;
}

/** The same rule, asked of an assignment that goes: ids of all beside organization admins. */
const readers = (sql: Sql | Tx): Fragment => sql`
  case a.resource_type when ${ResourceType.ORGANIZATION} then array[a.organization_id] else array(
    select m.member_id from group_members m where m.group_id = a.group_id
    union select m.member_id from role_assignments o join group_members m on m.group_id = o.group_id
      where o.resource_id = a.resource_id and o.resource_role = any(${ADMIN_ROLES as number[]}::int[])
    union select m.member_id from role_assignments o join group_members m on m.group_id = o.group_id
      join unnest(${DERIVATIONS.map(({ type }) => type)}::int[], ${DERIVATIONS.map(({ from }) => from)}::int[]) d (type, role)
        on d.type = a.resource_type and d.role = o.resource_role
      where o.resource_id = a.organization_id
    union ${creatorsOfResource(sql)}
  ) end`;

const { CREATE, UPDATE, DELETE } = ResourceOperation;

function changes(
  sql: Tx,
  assignment: StoredAssignment,
  operation: ResourceOperation,
  action: string,
  by: Attribution,
): [Change, Change] {
  const { id, organizationId, resourceId } = assignment;
  return [
    {
      ...{ organizationId, resourceType: ResourceType.ROLE_ASSIGNMENT, resourceId: id, operation, at: by.at },
      readers: sql`(select ${readers(sql)} from role_assignments a where a.id = ${id})`,
      audit: { id: by.newId(), actor: by.actor, action },
    },
    {
      ...{ organizationId, resourceType: ResourceType.ROLE_ASSIGNMENT_CHANGED, resourceId },
      ...{ operation: UPDATE, at: by.at },
    },
  ];
}

const place = ({ resourceType, resourceId }: StoredAssignment) => `${resourceName(resourceType)} ${resourceId}`;

/** Stores a new assignment. ALREADY_EXISTS if the group has a role on the resource, on the organization that role. */
export async function insertAssignment(
  tx: Tx,
  assignment: StoredAssignment,
  by: Attribution,
): Promise<StoredAssignment> {
  const { id, organizationId, groupId, resourceType, resourceId, role } = assignment;
  const action = `Role ${ResourceRole[role]} on ${place(assignment)} given to group ${assignment.groupName}`;
  const [row] = await tx<{ resource_id: string }[]>`
    with ${recorded(tx, ...changes(tx, assignment, CREATE, action, by))}
    insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
    values (${id}, ${organizationId}, ${groupId}, ${resourceType}, ${resourceId}, ${role}, ${by.at})
    on conflict do nothing returning resource_id`;
  if (!row) throw new Refusal("already_exists", "the group has a role on this resource already");
  // In the spelling of the database.
  return { ...assignment, resourceId: row.resource_id };
}

/** Replaces the role of an assignment that the transaction holds. */
export async function updateAssignment(
  tx: Tx,
  assignment: StoredAssignment,
  role: ResourceRole,
  by: Attribution,
): Promise<void> {
  const action = `Role on ${place(assignment)} of group ${assignment.groupName} changed to ${ResourceRole[role]}`;
  await tx`
    with ${recorded(tx, ...changes(tx, assignment, UPDATE, action, by))}
    update role_assignments set resource_role = ${role} where id = ${assignment.id}`;
}

/** Removes an assignment that the transaction holds. */
export async function deleteAssignment(tx: Tx, assignment: StoredAssignment, by: Attribution): Promise<void> {
  const { role, groupName } = assignment;
  const action = `Role ${ResourceRole[role]} on ${place(assignment)} taken from group ${groupName}`;
  await tx`
    with ${recorded(tx, ...changes(tx, assignment, DELETE, action, by))}
    delete from role_assignments where id = ${assignment.id}`;
}

/** Assignments on a resource, without derived ones, newest first, one more than the page holds. */
export async function listDirectAssignments(
  sql: Sql,
  resourceType: ResourceType,
  resourceId: string,
  page: Page,
): Promise<StoredAssignment[]> {
  const rows = await sql<AssignmentRow[]>`
    select ${assignmentColumns(sql)} from role_assignments a join groups g on g.id = a.group_id
    where a.resource_id = ${resourceId} and a.resource_type = ${resourceType} and ${page.after ? sql`a.id < ${page.after}` : sql`true`}
    order by a.id desc limit ${page.limit + 1}`;
  return rows.map(toAssignment);
}

/** CTEs that remove the assignments `a` of which a condition holds, and tell those who could read them. */
function removed(sql: Sql | Tx, condition: Fragment, at: Date): Fragment {
  return sql`doomed as (
    select a.id, a.organization_id, a.resource_id, ${readers(sql)} as readers from role_assignments a where ${condition}
  ), undone as (
    delete from role_assignments where id in (select id from doomed)
  ), told as (
    insert into events (organization_id, resource_type, resource_id, operation, readers, created_at)
    select organization_id, ${ResourceType.ROLE_ASSIGNMENT}::int, id, ${DELETE}::int, readers, ${at}::timestamptz from doomed
    union all
    select distinct organization_id, ${ResourceType.ROLE_ASSIGNMENT_CHANGED}::int, resource_id, ${UPDATE}::int, null::uuid[], ${at}::timestamptz
    from doomed
  )`;
}

/** CTEs that belong into the statement that ends a resource: what was assigned on it goes, and watchers are told. */
export const assignmentsEnded = (sql: Sql | Tx, resourceId: string, at: Date): Fragment =>
  removed(sql, sql`a.resource_id = ${resourceId}`, at);

/** As `assignmentsEnded`, in a statement of its own. */
export async function removeAssignmentsOn(tx: Tx, resourceId: string, at: Date): Promise<void> {
  await tx`with ${assignmentsEnded(tx, resourceId, at)} select`;
}

/** Removes all that a group holds, and what others hold on it. */
export async function removeAssignmentsOfGroup(tx: Tx, groupId: string, at: Date): Promise<void> {
  await tx`with ${removed(tx, tx`(a.group_id = ${groupId} or a.resource_id = ${groupId})`, at)} select`;
}
