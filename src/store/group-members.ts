import { create } from "@bufbuild/protobuf";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { type GroupMembership, GroupMembershipSchema } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { notFound, Refusal } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { containing } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import type { StoredGroup } from "./groups.ts";
import { type Attribution, type Change, recorded } from "./record.ts";

/** A user or service account. */
export interface MemberRef {
  id: string;
  principal: Principal;
}

/** A member of a group with what is shown of it. */
export interface StoredMembership {
  id: string;
  groupId: string;
  member: MemberRef;
  name: string;
  avatarUrl: string;
}

interface MembershipRow {
  id: string;
  group_id: string;
  member_id: string;
  member_principal: Principal;
  name: string;
  avatar_url: string;
}

const columns = (sql: Sql | Tx) => sql`m.id, m.group_id, m.member_id, m.member_principal,
  coalesce(u.full_name, s.name, '') as name, coalesce(u.avatar_url, '') as avatar_url`;

/** Memberships `m` with who the members are. */
const memberships = (sql: Sql | Tx) => sql`group_members m
  left join users u on u.id = m.member_id and m.member_principal = ${Principal.USER}
  left join service_accounts s on s.id = m.member_id and m.member_principal = ${Principal.SERVICE_ACCOUNT}`;

const toMembership = (row: MembershipRow): StoredMembership => ({
  id: row.id,
  groupId: row.group_id,
  member: { id: row.member_id, principal: row.member_principal },
  name: row.name,
  avatarUrl: row.avatar_url,
});

/** The wire message of a stored membership. */
export const membershipMessage = ({ id, groupId, member, name, avatarUrl }: StoredMembership): GroupMembership =>
  create(GroupMembershipSchema, { id, groupId, subject: member, name, avatarUrl });

/** A membership of a group of the caller's organization; NOT_FOUND otherwise. */
export async function getMembership(sql: Sql | Tx, caller: Caller, id: string): Promise<StoredMembership> {
  const [row] = await sql<MembershipRow[]>`
    select ${columns(sql)} from ${memberships(sql)} where m.id = ${id} and m.organization_id = ${caller.organizationId}`;
  if (!row) throw notFound("membership", id);
  return toMembership(row);
}

/** The membership of somebody in a group; undefined for one who is no member. */
export async function findMembership(
  sql: Sql | Tx,
  groupId: string,
  member: MemberRef,
): Promise<StoredMembership | undefined> {
  const [row] = await sql<MembershipRow[]>`
    select ${columns(sql)} from ${memberships(sql)}
    where m.group_id = ${groupId} and m.member_id = ${member.id} and m.member_principal = ${member.principal}`;
  return row && toMembership(row);
}

/** Members of a group, newest first, one more than the page holds. */
export async function listMemberships(
  sql: Sql,
  groupId: string,
  search: string,
  page: Page,
): Promise<StoredMembership[]> {
  const pattern = containing(search);
  const found = search
    ? sql`(u.search like ${pattern} or s.search like ${pattern} or m.member_id::text like ${pattern})`
    : sql`true`;
  const rows = await sql<MembershipRow[]>`
    select ${columns(sql)} from ${memberships(sql)}
    where m.group_id = ${groupId} and ${found} and ${page.after ? sql`m.id < ${page.after}` : sql`true`}
    order by m.id desc limit ${page.limit + 1}`;
  return rows.map(toMembership);
}

/**
 * Keeps a user or service account of the caller's organization from leaving until the transaction ends. NOT_FOUND for one
 * who is unknown or has left, and for a service account that is suspended.
 */
export async function holdMember(tx: Tx, caller: Caller, { id, principal }: MemberRef): Promise<void> {
  const here: Fragment = tx`id = ${id} and organization_id = ${caller.organizationId}`;
  const rows =
    principal === Principal.USER
      ? await tx`select from users where ${here} and status <> ${UserStatus.LEFT} for share`
      : await tx`select from service_accounts where ${here} and not suspended for share`;
  if (!rows.length) throw notFound(principal === Principal.USER ? "user" : "service account", id);
}

function change(group: StoredGroup, { id, principal }: MemberRef, what: string, by: Attribution): Change {
  const action = `${Principal[principal].toLowerCase().replaceAll("_", " ")} ${id} ${what}`;
  return {
    ...{ organizationId: group.organizationId, resourceType: ResourceType.GROUP_MEMBERSHIP_CHANGED },
    ...{ resourceId: group.id, operation: ResourceOperation.UPDATE, at: by.at },
    audit: { id: by.newId(), actor: by.actor, action, subjectType: ResourceType.GROUP },
  };
}

/** Adds a member, which the transaction holds, to a group, which it holds too. ALREADY_EXISTS for one who is a member. */
export async function insertMembership(
  tx: Tx,
  group: StoredGroup,
  membership: { id: string; member: MemberRef },
  by: Attribution,
): Promise<void> {
  const { id, member } = membership;
  const rows = await tx`
    with ${recorded(tx, change(group, member, "added to the group", by))}
    insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
    values (${id}, ${group.id}, ${group.organizationId}, ${member.id}, ${member.principal}, ${by.at})
    on conflict do nothing returning id`;
  if (!rows.length) throw new Refusal("already_exists", "is a member of the group already");
}

/** Removes a member from a group that the transaction holds. NOT_FOUND if it is none any more. */
export async function deleteMembership(
  tx: Tx,
  group: StoredGroup,
  membership: StoredMembership,
  by: Attribution,
): Promise<void> {
  const rows = await tx`
    with ${recorded(tx, change(group, membership.member, "removed from the group", by))}
    delete from group_members where id = ${membership.id} returning id`;
  if (!rows.length) throw notFound("membership", membership.id);
}
