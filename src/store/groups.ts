import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { type Group, GroupSchema, type ListGroupsRequest_Filter } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { isDuplicate, notFound, Refusal } from "../domain/errors.ts";
import { ADMINS_GROUP, type GroupNature, type GroupRights, MEMBERS_GROUP } from "../domain/group.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { administersGroup, readsGroup } from "./access.ts";
import { removeAssignmentsOfGroup } from "./assignment-rows.ts";
import { conjunction, containing, oneOf } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Attribution, type Change, recorded } from "./record.ts";

/** A group with what decides on the caller's rights. */
export interface StoredGroup extends GroupNature, GroupRights {
  organizationId: string;
  description: string;
  memberCount: number;
  createdAt: Date;
  updatedAt: Date;
}

interface GroupRow {
  id: string;
  organization_id: string;
  name: string;
  description: string;
  system_managed: boolean;
  direct_share: boolean;
  scim_managed: boolean;
  member_count: number;
  created_at: Date;
  updated_at: Date;
  administers: boolean;
  holds_organization_role: boolean;
}

const columns = (sql: Sql | Tx, caller: Caller) =>
  sql`g.id, g.organization_id, g.name, g.description, g.system_managed, g.direct_share, g.scim_managed, g.member_count,
    g.created_at, g.updated_at, ${administersGroup(sql, caller)} as administers,
    exists (select from role_assignments o where o.resource_id = g.organization_id and o.group_id = g.id)
      as holds_organization_role`;

const toGroup = (row: GroupRow): StoredGroup => ({
  id: row.id,
  organizationId: row.organization_id,
  name: row.name,
  description: row.description,
  systemManaged: row.system_managed,
  directShare: row.direct_share,
  scimManaged: row.scim_managed,
  memberCount: row.member_count,
  createdAt: row.created_at,
  updatedAt: row.updated_at,
  administers: row.administers,
  holdsOrganizationRole: row.holds_organization_role,
});

/** The wire message of a stored group. */
export const groupMessage = (group: StoredGroup): Group =>
  create(GroupSchema, {
    id: group.id,
    organizationId: group.organizationId,
    name: group.name,
    description: group.description,
    systemManaged: group.systemManaged,
    directShare: group.directShare,
    memberCount: group.memberCount,
    createdAt: timestampFromDate(group.createdAt),
    updatedAt: timestampFromDate(group.updatedAt),
  });

/** How a group is kept until the transaction ends: it stays, it stays as it is, or it may be removed. */
export type GroupHold = "existing" | "unchanged" | "exclusive";

const HOLDS: Record<GroupHold, (sql: Sql | Tx) => Fragment> = {
  existing: (sql) => sql`for key share of g`,
  unchanged: (sql) => sql`for no key update of g`,
  exclusive: (sql) => sql`for update of g`,
};

async function findGroup(
  sql: Sql | Tx,
  caller: Caller,
  which: Fragment,
  hold?: GroupHold,
): Promise<StoredGroup | undefined> {
  const [row] = await sql<GroupRow[]>`
    select ${columns(sql, caller)} from groups g where ${which} and ${readsGroup(sql, caller)} ${hold ? HOLDS[hold](sql) : sql``}`;
  return row && toGroup(row);
}

/** A group of the caller's organization; NOT_FOUND otherwise. */
export async function getGroup(sql: Sql | Tx, caller: Caller, id: string, hold?: GroupHold): Promise<StoredGroup> {
  const group = await findGroup(sql, caller, sql`g.id = ${id}`, hold);
  if (!group) throw notFound("group", id);
  return group;
}

/** As `getGroup`, by name, ignoring case; direct shares have none. */
export async function getGroupByName(sql: Sql, caller: Caller, name: string): Promise<StoredGroup> {
  const group = await findGroup(sql, caller, sql`lower(g.name) = lower(${name}) and not g.direct_share`);
  if (!group) throw notFound("group", name);
  return group;
}

/** Groups of the caller's organization, newest first, one more than the page holds. */
export async function listGroups(
  sql: Sql,
  caller: Caller,
  filter: ListGroupsRequest_Filter | undefined,
  page: Page,
): Promise<StoredGroup[]> {
  const conditions = [readsGroup(sql, caller), filter?.directShare ? sql`g.direct_share` : sql`not g.direct_share`];
  if (filter?.search)
    conditions.push(sql`lower(g.name || E'\n' || g.description || E'\n' || g.id) like ${containing(filter.search)}`);
  if (filter?.groupIds.length) conditions.push(oneOf(sql, sql`g.id`, filter.groupIds));
  if (filter?.systemManaged !== undefined) conditions.push(sql`g.system_managed = ${filter.systemManaged}`);
  const excluded = filter?.excludeAssignedToResource;
  if (excluded)
    conditions.push(sql`not exists (select from role_assignments a where a.group_id = g.id
      and a.resource_id = ${excluded.resourceId} and a.resource_type = ${excluded.resourceType})`);
  if (page.after) conditions.push(sql`g.id < ${page.after}`);
  const rows = await sql<GroupRow[]>`
    select ${columns(sql, caller)} from groups g where ${conjunction(sql, conditions)} order by g.id desc limit ${page.limit + 1}`;
  return rows.map(toGroup);
}

function change(
  sql: Tx,
  group: Pick<StoredGroup, "id" | "organizationId">,
  operation: ResourceOperation,
  action: string,
  by: Attribution,
): Change {
  return {
    ...{ organizationId: group.organizationId, resourceType: ResourceType.GROUP, resourceId: group.id, operation },
    ...{ at: by.at, audit: { id: by.newId(), actor: by.actor, action } },
    readers: sql`array[${group.organizationId}::uuid]`,
  };
}

const nameTaken = () => new Refusal("already_exists", "a group of this name exists already");

/** How many groups an organization has, direct shares aside; nobody else makes one until the transaction ends. */
export async function countGroups(tx: Tx, organizationId: string): Promise<number> {
  await tx`select from organizations where id = ${organizationId} for no key update`;
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from groups where organization_id = ${organizationId} and not direct_share`;
  return row?.count ?? 0;
}

/** Stores a new group. ALREADY_EXISTS if its name is taken. */
export async function insertGroup(
  tx: Tx,
  group: Pick<StoredGroup, "id" | "organizationId" | "name" | "description">,
  by: Attribution,
): Promise<void> {
  const rows = await tx`
    with ${recorded(tx, change(tx, group, ResourceOperation.CREATE, "Group created", by))}
    insert into groups (id, organization_id, name, description, created_at, updated_at)
    values (${group.id}, ${group.organizationId}, ${group.name}, ${group.description}, ${by.at}, ${by.at})
    on conflict do nothing returning id`;
  if (!rows.length) throw nameTaken();
}

/** Writes name and description of a group that the transaction holds. ALREADY_EXISTS if the name is taken. */
export async function updateGroup(
  tx: Tx,
  before: StoredGroup,
  next: Pick<StoredGroup, "name" | "description">,
  by: Attribution,
): Promise<void> {
  const changed = (["name", "description"] as const).filter((field) => next[field] !== before[field]);
  if (!changed.length) return;
  const action = `Group changed: ${changed.join(", ")}`;
  try {
    await tx`
      with ${recorded(tx, change(tx, before, ResourceOperation.UPDATE, action, by))}
      update groups set name = ${next.name}, description = ${next.description}, updated_at = ${by.at} where id = ${before.id}`;
  } catch (error) {
    throw isDuplicate(error, "groups_name") ? nameTaken() : error;
  }
}

/** Removes a group that the transaction holds, with its memberships and with what it and others on it were assigned. */
export async function deleteGroup(tx: Tx, group: StoredGroup, by: Attribution): Promise<void> {
  await removeAssignmentsOfGroup(tx, group.id, by.at);
  await tx`
    with ${recorded(tx, change(tx, group, ResourceOperation.DELETE, "Group deleted", by))}
    delete from groups where id = ${group.id}`;
}

/** A user or service account of an organization. */
interface Member {
  organizationId: string;
  memberId: string;
}

/** Statement that tells watchers which groups have other members, from a query of ids of groups. */
const membersChanged = (tx: Tx, organizationId: string, groupIds: Fragment, at: Date): Fragment => tx`
  insert into events (organization_id, resource_type, resource_id, operation, created_at)
  select ${organizationId}::uuid, ${ResourceType.GROUP_MEMBERSHIP_CHANGED}::int, changed.group_id, ${ResourceOperation.UPDATE}::int, ${at}::timestamptz
  from (${groupIds}) changed`;

/**
 * Brings the built-in groups in step with what this transaction has written about a user or service account: active users
 * and service accounts that are not suspended belong to `org-members`, active users with role ADMIN to `org-admins`. To be
 * called after every change of status or role, and without effect when nothing is out of step.
 */
export async function syncBuiltInGroups(
  tx: Tx,
  { organizationId, memberId }: Member,
  by: Pick<Attribution, "newId" | "at">,
): Promise<void> {
  await tx`
    with wanted as (
      select g.id, g.name, ${Principal.USER}::int as principal from groups g join users u on u.organization_id = g.organization_id
      where g.organization_id = ${organizationId} and g.system_managed and u.id = ${memberId} and u.status = ${UserStatus.ACTIVE}
        and (g.name = ${MEMBERS_GROUP} or g.name = ${ADMINS_GROUP} and u.role = ${OrganizationRole.ADMIN})
      union all
      select g.id, g.name, ${Principal.SERVICE_ACCOUNT}::int from groups g join service_accounts s on s.organization_id = g.organization_id
      where g.organization_id = ${organizationId} and g.system_managed and g.name = ${MEMBERS_GROUP}
        and s.id = ${memberId} and not s.suspended
    ), gone as (
      delete from group_members m using groups g
      where m.member_id = ${memberId} and g.id = m.group_id and g.organization_id = ${organizationId} and g.system_managed
        and g.id not in (select id from wanted)
      returning m.group_id
    ), come as (
      insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
      select case name when ${MEMBERS_GROUP} then ${by.newId()}::uuid else ${by.newId()}::uuid end, id, ${organizationId}, ${memberId},
        principal, ${by.at}
      from wanted on conflict (group_id, member_id) do nothing
      returning group_id
    )
    ${membersChanged(tx, organizationId, tx`select group_id from gone union all select group_id from come`, by.at)}`;
}

/**
 * Takes a user or service account that leaves its organization out of every group, and ends what was shared with it
 * directly.
 */
export async function removeFromGroups(tx: Tx, { organizationId, memberId }: Member, at: Date): Promise<void> {
  const [share] = await tx<{ id: string }[]>`
    select id from groups where direct_share_of = ${memberId} and organization_id = ${organizationId} for update`;
  if (share) {
    await removeAssignmentsOfGroup(tx, share.id, at);
    await tx`delete from groups where id = ${share.id}`;
  }
  await tx`
    with gone as (
      delete from group_members where member_id = ${memberId} and organization_id = ${organizationId} returning group_id
    )
    ${membersChanged(tx, organizationId, tx`select group_id from gone`, at)}`;
}
