import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { type User, UserSchema, UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { notFound, Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { readsUser } from "./access.ts";
import type { Sql, Tx } from "./db.ts";
import { syncBuiltInGroups } from "./groups.ts";
import { type Attribution, type Change, recorded } from "./record.ts";

/** A user with what it shows of its account, which may be gone. */
export interface StoredUser {
  id: string;
  organizationId: string;
  accountId?: string;
  role: OrganizationRole;
  status: UserStatus;
  /** Never empty: the local part of the address stands in for a name. */
  fullName: string;
  email: string;
  avatarUrl: string;
  loginProvider: string;
  createdAt: Date;
  /** When the person joined or last rejoined. */
  memberSince: Date;
}

/** A row of `userColumns`. */
export interface UserRow {
  id: string;
  organization_id: string;
  account_id: string | null;
  role: OrganizationRole;
  status: UserStatus;
  full_name: string;
  email: string;
  avatar_url: string;
  login_provider: string;
  created_at: Date;
  member_since: Date;
}

export const userColumns = (
  sql: Sql | Tx,
) => sql`u.id, u.organization_id, u.account_id, u.role, u.status, u.full_name, u.email,
  u.avatar_url, u.login_provider, u.created_at, u.member_since`;

export const toUser = (row: UserRow): StoredUser => ({
  id: row.id,
  organizationId: row.organization_id,
  accountId: row.account_id ?? undefined,
  role: row.role,
  status: row.status,
  fullName: row.full_name,
  email: row.email,
  avatarUrl: row.avatar_url,
  loginProvider: row.login_provider,
  createdAt: row.created_at,
  memberSince: row.member_since,
});

/** The wire message of a stored user. */
export function userMessage(user: StoredUser): User {
  return create(UserSchema, {
    id: user.id,
    organizationId: user.organizationId,
    name: user.fullName,
    avatarUrl: user.avatarUrl,
    createdAt: timestampFromDate(user.createdAt),
    status: user.status,
    email: user.email,
  });
}

/** A user that the caller may read, also one who has left; NOT_FOUND otherwise. */
export async function getUser(sql: Sql | Tx, caller: Caller, id: string): Promise<StoredUser> {
  const [row] = await sql<UserRow[]>`
    select ${userColumns(sql)} from users u where u.id = ${id} and ${readsUser(sql, caller)}`;
  if (!row) throw notFound("user", id);
  return toUser(row);
}

/**
 * A user as it is now, who stays so until the transaction ends, as do the roles and states of all others in the
 * organization: whoever changes them holds its row, too.
 */
export async function holdUser(tx: Tx, { id, organizationId }: Pick<StoredUser, "id" | "organizationId">) {
  await tx`select from organizations where id = ${organizationId} for no key update`;
  const [row] = await tx<UserRow[]>`select ${userColumns(tx)} from users u where u.id = ${id} for no key update`;
  if (!row) throw notFound("user", id);
  return toUser(row);
}

function change(user: StoredUser, action: string, by: Attribution): Change {
  return {
    ...{ organizationId: user.organizationId, resourceType: ResourceType.USER, resourceId: user.id },
    ...{ operation: ResourceOperation.UPDATE, at: by.at, audit: { id: by.newId(), actor: by.actor, action } },
  };
}

/** Writes the status of a user whom the transaction holds; what follows from its end is in departures.ts. */
export async function setUserStatus(
  tx: Tx,
  user: StoredUser,
  status: UserStatus,
  by: Attribution & { action: string },
): Promise<void> {
  await tx`with ${recorded(tx, change(user, by.action, by))} update users set status = ${status} where id = ${user.id}`;
  await syncBuiltInGroups(tx, { organizationId: user.organizationId, memberId: user.id }, by);
}

/** Writes the role of a user whom the transaction holds. */
export async function setUserRole(tx: Tx, user: StoredUser, role: OrganizationRole, by: Attribution): Promise<void> {
  const action = `User has the role ${OrganizationRole[role].toLowerCase()}`;
  await tx`with ${recorded(tx, change(user, action, by))} update users set role = ${role} where id = ${user.id}`;
  await syncBuiltInGroups(tx, { organizationId: user.organizationId, memberId: user.id }, by);
}

/**
 * Keeps the calling user as it is until the transaction ends: what is counted or issued under it can neither exceed a
 * limit nor outlive a suspension. UNAUTHENTICATED if the user has been suspended or removed since the call was let in.
 */
export async function holdCaller(tx: Tx, caller: Caller): Promise<void> {
  const rows = await tx`
    select from users where id = ${caller.id} and status = ${UserStatus.ACTIVE} for no key update`;
  if (!rows.length) throw new Refusal("unauthenticated", "the token is no longer valid");
}

/** Repository of a user's dotfiles; empty without one, and for whoever is no user. */
export async function findDotfiles(sql: Sql | Tx, userId: string): Promise<string> {
  const [row] = await sql<{ dotfiles_repository: string }[]>`
    select dotfiles_repository from users where id = ${userId}`;
  return row?.dotfiles_repository ?? "";
}

/** Sets or, with an empty text, removes a user's dotfiles; false if that is what they were. */
export async function setDotfiles(tx: Tx, userId: string, repository: string): Promise<boolean> {
  const { count } = await tx`update users set dotfiles_repository = ${repository}
    where id = ${userId} and dotfiles_repository <> ${repository}`;
  return count > 0;
}
