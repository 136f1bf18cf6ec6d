import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import type { Sql, Tx } from "./db.ts";

/** What an identity provider has said about whoever signed in; the address is verified and in small letters. */
export interface Identity {
  /** Id of the provider, which new accounts are marked with. */
  provider: string;
  issuer: string;
  subject: string;
  email: string;
  name: string;
  avatarUrl: string;
  /** Its claims in JSON. */
  claims: string;
}

async function findAccount(tx: Tx, { issuer, subject, email }: Identity): Promise<string | undefined> {
  const [known] = await tx<{ account_id: string }[]>`
    select a.id as account_id from account_identities i join accounts a on a.id = i.account_id
    where i.issuer = ${issuer} and i.subject = ${subject} and i.owner_organization_id is null for update of a`;
  if (known) return known.account_id;
  const [account] = await tx<{ id: string }[]>`
    select id from accounts where email = ${email} and owner_organization_id is null for update`;
  return account?.id;
}

/**
 * The account of the installation that belongs to an identity: the one that it has been, else the one with its address,
 * else a new one. Name, picture and address follow the provider that an account came from.
 */
export async function signInAccount(tx: Tx, identity: Identity, at: Date, newId: () => string): Promise<string> {
  const { provider, issuer, subject, email, name, avatarUrl, claims } = identity;
  // Two first logins of the same person would make two accounts, or one of them fail.
  await tx`select pg_advisory_xact_lock(hashtextextended(${`login ${email}`}, 0))`;
  const accountId = (await findAccount(tx, identity)) ?? newId();
  await tx`insert into accounts (id, email, email_verified, name, avatar_url, login_provider, created_at)
    values (${accountId}, ${email}, true, ${name}, ${avatarUrl}, ${provider}, ${at}) on conflict (id) do nothing`;
  await tx`
    update accounts a set
      name = case when login_provider = ${provider} or a.name = '' then coalesce(nullif(${name}::text, ''), a.name) else a.name end,
      avatar_url = case when login_provider = ${provider} or a.avatar_url = '' then ${avatarUrl} else a.avatar_url end,
      email_verified = true,
      email = case when a.login_provider = ${provider}
        and not exists (select from accounts other where other.email = ${email} and other.owner_organization_id is null)
        then ${email} else a.email end
    where a.id = ${accountId}`;
  await tx`
    insert into account_identities (account_id, issuer, subject, claims, created_at, last_login_at)
    values (${accountId}, ${issuer}, ${subject}, ${claims}, ${at}, ${at})
    on conflict (issuer, subject, coalesce(owner_organization_id, '00000000-0000-0000-0000-000000000000'))
    do update set claims = excluded.claims, last_login_at = excluded.last_login_at`;
  return accountId;
}

/** A user of an account in one of its organizations. */
export interface Membership {
  userId: string;
  organizationId: string;
  organizationName: string;
}

/** Where the person behind an account is active, by the names of the organizations, at most 100. */
export async function activeMemberships(sql: Sql | Tx, accountId: string): Promise<Membership[]> {
  return sql<Membership[]>`
    select u.id as "userId", o.id as "organizationId", o.name as "organizationName"
    from users u join organizations o on o.id = u.organization_id
    where u.account_id = ${accountId} and u.status = ${UserStatus.ACTIVE} order by lower(o.name), o.id limit 100`;
}
