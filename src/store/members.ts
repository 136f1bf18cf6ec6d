import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type ListMembersRequest,
  type OrganizationMember,
  OrganizationMemberSchema,
  ListMembersRequest_SortField as SortField,
} from "../../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../../gen/gitpod/v1/pagination_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { conjunction, containing, oneOf } from "./conditions.ts";
import type { Fragment, Sql } from "./db.ts";
import { type StoredUser, toUser, type UserRow, userColumns } from "./users.ts";

/** A user in the list of members, with its place in the order. */
export interface Member extends StoredUser {
  position: string;
}

/** The wire message of a member. */
export const memberMessage = (user: StoredUser): OrganizationMember =>
  create(OrganizationMemberSchema, {
    userId: user.id,
    role: user.role,
    memberSince: timestampFromDate(user.memberSince),
    avatarUrl: user.avatarUrl,
    fullName: user.fullName,
    email: user.email,
    status: user.status,
    loginProvider: user.loginProvider,
  });

/** Whose members are listed, and which of them is the caller, if any. */
export interface Membership {
  organizationId: string;
  selfId?: string;
}

/** The caller's membership of an organization, an account's being that of its active user; NOT_FOUND if it has none. */
export async function getMembershipOf(sql: Sql, caller: Caller, organizationId: string): Promise<Membership> {
  if (caller.principal !== Principal.ACCOUNT) {
    if (organizationId.toLowerCase() !== caller.organizationId) throw notFound("organization", organizationId);
    return { organizationId: caller.organizationId, ...(caller.principal === Principal.USER && { selfId: caller.id }) };
  }
  const [row] = await sql<{ id: string; organization_id: string }[]>`
    select id, organization_id from users
    where organization_id = ${organizationId} and account_id = ${caller.id} and status = ${UserStatus.ACTIVE}`;
  if (!row) throw notFound("organization", organizationId);
  return { organizationId: row.organization_id, selfId: row.id };
}

function filterConditions(sql: Sql, organizationId: string, filter: ListMembersRequest["filter"]): Fragment[] {
  const statuses = filter?.statuses.length ? filter.statuses : [UserStatus.ACTIVE, UserStatus.SUSPENDED];
  const conditions = [sql`u.organization_id = ${organizationId}`, oneOf(sql, sql`u.status`, statuses)];
  const search = filter?.search.trim();
  if (search) conditions.push(sql`u.search like ${containing(search)}`);
  if (filter?.roles.length) conditions.push(oneOf(sql, sql`u.role`, filter.roles));
  if (filter?.userIds.length) conditions.push(oneOf(sql, sql`u.id`, filter.userIds));
  if (filter?.excludeGroupIds.length)
    conditions.push(sql`not exists (select from group_members m
      where m.member_id = u.id and ${oneOf(sql, sql`m.group_id`, filter.excludeGroupIds)})`);
  return conditions;
}

/** What the list is sorted by besides the id, as SQL and as it stands in a position. */
function sortKey(sql: Sql, field: SortField): { column: Fragment; key: Fragment; type: Fragment } {
  if (field !== SortField.DATE_JOINED) {
    const name = sql`lower(u.full_name)`;
    return { column: name, key: name, type: sql`text` };
  }
  return { column: sql`u.member_since`, key: sql`u.member_since::text`, type: sql`timestamptz` };
}

/** Stands for the caller, who is before all others where no order is asked for. */
const SELF = "self";

function positionOf(after: string): { key: string; id: string } | undefined {
  if (!after || after === SELF) return undefined;
  const [, id = "", key = ""] = /^([^/]*)\/(.*)$/s.exec(after) ?? [];
  return { key, id };
}

/**
 * Members of an organization, one more than the page holds: in the order that is asked for or, without one, the caller
 * first and then by name.
 */
export async function listMembers(
  sql: Sql,
  { organizationId, selfId }: Membership,
  { filter, sort }: ListMembersRequest,
  page: Page,
): Promise<Member[]> {
  const isFree = !sort?.field;
  const { column, key, type } = sortKey(sql, sort?.field ?? SortField.UNSPECIFIED);
  const isDescending = !isFree && sort?.order === SortOrder.DESC;
  const conditions = filterConditions(sql, organizationId, filter);
  const find = async (more: Fragment[], limit: number): Promise<Member[]> => {
    const order = isDescending ? sql`${column} desc, u.id desc` : sql`${column}, u.id`;
    const rows = await sql<(UserRow & { key: string })[]>`
      select ${userColumns(sql)}, ${key} as key from users u
      where ${conjunction(sql, [...conditions, ...more])} order by ${order} limit ${limit}`;
    return rows.map((row) => ({ ...toUser(row), position: `${row.id}/${row.key}` }));
  };
  const isFirst = !page.after && isFree && selfId !== undefined;
  const self = isFirst ? await find([sql`u.id = ${selfId}`], 1) : [];
  const others = isFree && selfId !== undefined ? [sql`u.id <> ${selfId}`] : [];
  const after = positionOf(page.after);
  if (after) {
    const place = sql`(${after.key}::text::${type}, ${after.id}::uuid)`;
    others.push(isDescending ? sql`(${column}, u.id) < ${place}` : sql`(${column}, u.id) > ${place}`);
  }
  const rest = await find(others, page.limit + 1);
  return [...self.map((member) => ({ ...member, position: SELF })), ...rest];
}

/** How many the filter matches, counted up to `cap`. */
export async function countMembers(
  sql: Sql,
  { organizationId }: Membership,
  filter: ListMembersRequest["filter"],
  cap: number,
): Promise<number> {
  const conditions = filterConditions(sql, organizationId, filter);
  const [row] = await sql<{ count: number }[]>`
    select count(*)::int as count from (select from users u where ${conjunction(sql, conditions)} limit ${cap}) as matching`;
  return row?.count ?? 0;
}
