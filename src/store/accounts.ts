import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type Account,
  type AccountMembership,
  AccountMembershipSchema,
  AccountSchema,
  type JoinableOrganization,
  JoinableOrganizationSchema,
} from "../../gen/gitpod/v1/account_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { type OrganizationRole, OrganizationTier } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { emailDomain } from "../domain/email-domains.ts";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Attribution, record } from "./record.ts";

/** More organizations than anybody works in. */
const MAX_MEMBERSHIPS = 1000;
/** Stands for no organization where one has to be named: what an account does concerns those that it belongs to. */
const NO_ORGANIZATION = "00000000-0000-0000-0000-000000000000";

const memberCount = (sql: Sql | Tx): Fragment =>
  sql`(select count(*)::int from users m where m.organization_id = o.id and m.status = 1) as member_count`;

async function listMemberships(sql: Sql, accountId: string): Promise<AccountMembership[]> {
  const rows = await sql<
    { id: string; role: OrganizationRole; organization_id: string; name: string; member_count: number }[]
  >`
    select u.id, u.role, o.id as organization_id, o.name, ${memberCount(sql)}
    from users u join organizations o on o.id = u.organization_id
    where u.account_id = ${accountId} and u.status = ${UserStatus.ACTIVE} order by u.id limit ${MAX_MEMBERSHIPS}`;
  return rows.map((row) =>
    create(AccountMembershipSchema, {
      userId: row.id,
      userRole: row.role,
      organizationId: row.organization_id,
      organizationName: row.name,
      organizationMemberCount: row.member_count,
      organizationTier: OrganizationTier.ENTERPRISE,
    }),
  );
}

/** An account with the organizations in which it has an active user; NOT_FOUND if there is none. */
export async function getAccount(sql: Sql, accountId: string): Promise<Account> {
  const [row] = await sql<
    {
      id: string;
      full_name: string;
      avatar_url: string;
      email: string;
      created_at: Date;
      updated_at: Date | null;
      owner_organization_id: string | null;
    }[]
  >`select a.id, full_name(a) as full_name, a.avatar_url, a.email, a.created_at, a.updated_at, a.owner_organization_id
    from accounts a where a.id = ${accountId || null}`;
  if (!row) throw notFound("account", accountId);
  return create(AccountSchema, {
    id: row.id,
    name: row.full_name,
    avatarUrl: row.avatar_url,
    email: row.email,
    createdAt: timestampFromDate(row.created_at),
    updatedAt: timestampFromDate(row.updated_at ?? row.created_at),
    memberships: await listMemberships(sql, row.id),
    organizationId: row.owner_organization_id ?? undefined,
  });
}

/**
 * Organizations that would take an account for the domain of its mail address, newest first, one more than the page
 * holds: those that invite the domain and do not know the account yet, or as somebody who has left.
 */
export async function listJoinable(sql: Sql, accountId: string, page: Page): Promise<JoinableOrganization[]> {
  const [account] = await sql<{ email: string }[]>`
    select email from accounts where id = ${accountId || null} and email_verified and owner_organization_id is null`;
  const domain = emailDomain(account?.email ?? "");
  if (!domain) return [];
  const rows = await sql<{ id: string; name: string; member_count: number }[]>`
    select o.id, o.name, ${memberCount(sql)} from organizations o
    where o.invite_domains @> ${[domain]}::text[] and ${page.after ? sql`o.id < ${page.after}` : sql`true`}
      and not exists (select from users u where u.organization_id = o.id and u.account_id = ${accountId}
        and u.status = any(${[UserStatus.ACTIVE, UserStatus.SUSPENDED] as number[]}))
    order by o.id desc limit ${page.limit + 1}`;
  return rows.map((row) =>
    create(JoinableOrganizationSchema, {
      organizationId: row.id,
      organizationName: row.name,
      organizationMemberCount: row.member_count,
    }),
  );
}

/** Users of an account that have not left, and the account, which gets no others until the transaction ends. */
export async function holdAccount(
  tx: Tx,
  accountId: string,
): Promise<{ id: string; organizationId: string; status: UserStatus }[]> {
  const rows = await tx`select from accounts where id = ${accountId} for update`;
  if (!rows.length) throw notFound("account", accountId);
  return tx<{ id: string; organizationId: string; status: UserStatus }[]>`
    select id, organization_id as "organizationId", status from users
    where account_id = ${accountId} and status <> ${UserStatus.LEFT} order by id`;
}

/** Whether an account belongs to an organization, and to nobody else: its only user is there. It stays so. */
export async function isOwnedBy(tx: Tx, accountId: string, organizationId: string): Promise<boolean> {
  const rows = await tx`
    select from accounts where id = ${accountId} and owner_organization_id = ${organizationId} for update`;
  return rows.length > 0;
}

/**
 * Deletes an account whose users have all left, with its logins. What they made goes on to show who they were, unless
 * `forgets`: then nothing about the person stays. Every organization that knew the account is told.
 */
export async function deleteAccount(
  tx: Tx,
  accountId: string,
  { forgets, ...by }: Attribution & { action: string; forgets: boolean },
): Promise<void> {
  const forgotten = forgets
    ? tx`, full_name = 'Deleted user', email = id || '@deleted.invalid', avatar_url = ''`
    : tx``;
  const rows = await tx<{ organization_id: string }[]>`
    update users set account_id = null ${forgotten} where account_id = ${accountId} returning organization_id`;
  await tx`delete from tokens where subject_id = ${accountId}`;
  await tx`delete from accounts where id = ${accountId}`;
  const organizations = new Set(rows.map((row) => row.organization_id));
  for (const organizationId of organizations.size ? organizations : [NO_ORGANIZATION]) {
    await record(tx, {
      ...{ organizationId, resourceType: ResourceType.ACCOUNT, resourceId: accountId },
      ...{ operation: ResourceOperation.DELETE, at: by.at },
      audit: { id: by.newId(), actor: by.actor, action: by.action },
    });
  }
}
