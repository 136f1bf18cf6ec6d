import { fromBinary } from "@bufbuild/protobuf";
import { AdmissionLevel, EnvironmentSpecSchema } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { admits, portOf } from "../domain/environment-ports.ts";
import type { Caller } from "../domain/principal.ts";
import { EXCHANGE_TOKEN_MS } from "../domain/runner.ts";
import { SHOWN_AFTER_END_MS, TokenKind, tokenHash, tokenKind } from "../domain/tokens.ts";
import type { Db, Fragment, Sql, Tx } from "./db.ts";

/** A token about to be stored; the text itself never is. */
export interface NewToken {
  id: string;
  text: string;
  kind: TokenKind;
  /** Absent for an account that has not chosen one. */
  organizationId?: string;
  subjectId: string;
  subjectPrincipal: Principal;
  createdAt: Date;
  expiresAt?: Date;
  /** Ends also when it has not been used for so long. */
  idleSeconds?: number;
  environmentId?: string;
  runnerId?: string;
  /** Who had it issued, where that is not its subject. */
  issuerId?: string;
  port?: number;
  /** Nonce that the port had. */
  authNonce?: bigint;
  readOnly?: boolean;
  description?: string;
}

/** Kinds that the public API takes as a credential. */
const API_KINDS: readonly TokenKind[] = [
  TokenKind.PERSONAL_ACCESS,
  TokenKind.SERVICE_ACCOUNT,
  TokenKind.SERVICE_ACCOUNT_ACCESS,
  TokenKind.RUNNER_ACCESS,
  TokenKind.ENVIRONMENT,
];

/** Kinds that come as the cookie of a browser. */
const COOKIE_KINDS: readonly TokenKind[] = [TokenKind.SESSION];

/** Kinds that only the endpoints of a runner take. */
const RUNNER_KINDS: readonly TokenKind[] = [
  TokenKind.ENVIRONMENT,
  TokenKind.ENVIRONMENT_ACCESS,
  TokenKind.PORT_ACCESS,
  TokenKind.LOGS,
];

export async function insertToken(sql: Sql | Tx, token: NewToken): Promise<void> {
  await sql`
    insert into tokens (id, hash, kind, organization_id, subject_id, subject_principal, environment_id, runner_id, issuer_id, port, auth_nonce,
      read_only, description, created_at, expires_at, idle_seconds)
    values (${token.id}, ${tokenHash(token.text)}, ${token.kind}, ${token.organizationId}, ${token.subjectId},
      ${token.subjectPrincipal}, ${token.environmentId}, ${token.runnerId}, ${token.issuerId}, ${token.port},
      ${token.authNonce === undefined ? null : String(token.authNonce)}, ${token.readOnly ?? false},
      ${token.description ?? ""}, ${token.createdAt}, ${token.expiresAt}, ${token.idleSeconds})`;
}

interface CallerRow {
  token_id: string;
  kind: TokenKind;
  organization_id: string | null;
  subject_id: string;
  subject_principal: Principal;
  account_id: string | null;
  read_only: boolean;
  expired: boolean;
  stale: boolean;
  alive: boolean;
  org_admin: boolean;
  org_roles: number[];
  runner_id: string | null;
  creator_id: string | null;
  project_id: string | null;
  issuer_id: string | null;
  name: string;
  email: string;
}

/** What a credential turned out to be. */
export type Credential =
  | { state: "ok"; caller: Caller /** `last_used_at` is over a minute old. */; stale: boolean }
  | { state: "expired" | "unknown" };

async function lookUp(sql: Sql, which: Fragment, now: Date): Promise<CallerRow[]> {
  return sql<CallerRow[]>`
    select t.id as token_id, t.kind, t.organization_id, t.subject_id, t.subject_principal, t.read_only,
      coalesce(t.expires_at <= ${now}, false)
        or coalesce(coalesce(t.last_used_at, t.created_at) + t.idle_seconds * interval '1 second' <= ${now}, false) as expired,
      coalesce(t.last_used_at < ${now}::timestamptz - interval '1 minute', true) as stale,
      case t.subject_principal
        when ${Principal.USER} then u.status = ${UserStatus.ACTIVE}
        when ${Principal.SERVICE_ACCOUNT} then not s.suspended and coalesce(s.valid_until > ${now}, true)
        when ${Principal.RUNNER} then r.deleted_at is null and r.id is not null
        when ${Principal.ENVIRONMENT} then e.deleted_at is null and e.id is not null
        when ${Principal.ACCOUNT} then a.id is not null
        else false end as alive, a.id as account_id,
      coalesce(u.role = ${OrganizationRole.ADMIN}, false) as org_admin,
      array(select share.resource_role from group_members member
        join role_assignments share on share.group_id = member.group_id
        where member.member_id = t.subject_id and share.resource_id = t.organization_id) as org_roles,
      coalesce(e.runner_id, r.id) as runner_id, e.creator_id, e.project_id, t.issuer_id,
      coalesce(a.name, s.name, r.name, '') as name, coalesce(a.email, '') as email
    from tokens t
      left join users u on t.subject_principal = ${Principal.USER} and u.id = t.subject_id
      left join accounts a on a.id = case t.subject_principal when ${Principal.ACCOUNT} then t.subject_id else u.account_id end
      left join service_accounts s on t.subject_principal = ${Principal.SERVICE_ACCOUNT} and s.id = t.subject_id
      left join runners r on t.subject_principal = ${Principal.RUNNER} and r.id = t.subject_id
      left join environments e on t.subject_principal = ${Principal.ENVIRONMENT} and e.id = t.subject_id
    where ${which}`;
}

function toCaller(row: CallerRow): Caller {
  return {
    principal: row.subject_principal,
    id: row.subject_id,
    organizationId: row.organization_id ?? "",
    accountId: row.account_id ?? "",
    orgAdmin: row.org_admin || row.org_roles.includes(ResourceRole.ORG_ADMIN),
    runnersAdmin: row.org_roles.includes(ResourceRole.ORG_RUNNERS_ADMIN),
    projectsAdmin: row.org_roles.includes(ResourceRole.ORG_PROJECTS_ADMIN),
    groupsAdmin: row.org_roles.includes(ResourceRole.ORG_GROUPS_ADMIN),
    environmentsReader: row.org_roles.includes(ResourceRole.ORG_ENVIRONMENTS_READER),
    auditReader: row.org_roles.includes(ResourceRole.ORG_AUDIT_LOG_READER),
    tokenKind: row.kind,
    tokenId: row.token_id,
    issuerId: row.issuer_id ?? undefined,
    readOnly: row.read_only,
    runnerId: row.runner_id ?? "",
    creatorId: row.creator_id ?? "",
    projectId: row.project_id ?? "",
    name: row.name,
    email: row.email,
  };
}

/**
 * Looks an API credential up, with the state of its owner and the organization-wide roles that it brings, in one
 * round trip. It runs on every call, so a revocation counts from its commit on.
 */
export const findCaller = (sql: Sql, text: string, now: Date): Promise<Credential> =>
  findCredential(sql, API_KINDS, text, now);

/** As `findCaller`, for what a browser brings in its cookie. */
export const findSession = (sql: Sql, text: string, now: Date): Promise<Credential> =>
  findCredential(sql, COOKIE_KINDS, text, now);

async function findCredential(sql: Sql, kinds: readonly TokenKind[], text: string, now: Date): Promise<Credential> {
  const kind = tokenKind(text);
  if (!kind || !kinds.includes(kind)) return { state: "unknown" };
  const [row] = await lookUp(sql, sql`t.hash = ${tokenHash(text)}`, now);
  if (!row || row.kind !== kind || !row.alive) return { state: "unknown" };
  if (row.expired) return { state: "expired" };
  return { state: "ok", stale: row.stale, caller: toCaller(row) };
}

/**
 * The callers behind open streams as they are now, with the roles of this moment, by the id of their credential; those
 * whose credential opens nothing any more are missing.
 */
export async function refreshCallers(
  sql: Sql,
  callers: readonly Caller[],
  now: Date,
): Promise<ReadonlyMap<string, Caller>> {
  const ids = [...new Set(callers.map((caller) => caller.tokenId))];
  const rows = await lookUp(sql, sql`t.id = any(${ids})`, now);
  return new Map(rows.filter((row) => row.alive && !row.expired).map((row) => [row.token_id, toCaller(row)]));
}

/** As `refreshCallers`, for one. */
export async function refreshCaller(sql: Sql, caller: Caller, now: Date): Promise<Caller | undefined> {
  return (await refreshCallers(sql, [caller], now)).get(caller.tokenId);
}

/** Marks a token as used, at most once a minute, however many calls see at once that it is time. */
export async function touchToken(sql: Sql, tokenId: string, now: Date): Promise<void> {
  await sql`update tokens set last_used_at = ${now} where id = ${tokenId}
    and coalesce(last_used_at < ${now}::timestamptz - interval '1 minute', true)`;
}

/** Uses an exchange token up; of two callers at once one gets the runner's id, the other undefined. */
export async function redeemExchangeToken(tx: Tx, text: string, now: Date): Promise<string | undefined> {
  if (tokenKind(text) !== TokenKind.RUNNER_EXCHANGE) return undefined;
  const [row] = await tx<{ runner_id: string }[]>`
    update tokens t set used_at = ${now} from runners r
    where t.hash = ${tokenHash(text)} and t.kind = ${TokenKind.RUNNER_EXCHANGE} and t.used_at is null and t.expires_at > ${now}
      and r.id = t.runner_id and r.deleted_at is null
    returning t.runner_id`;
  return row?.runner_id;
}

/** A port token opens its port as long as it is open the same way, for whom it admits. */
function opensPort(
  spec: Uint8Array,
  token: { port: number | null; auth_nonce: number | null; creator_id: string | null; subject_id: string },
): boolean {
  const port = portOf(fromBinary(EnvironmentSpecSchema, spec), token.port ?? 0);
  if (!port || Number(port.authNonce) !== token.auth_nonce) return false;
  return admits(port, token.creator_id ?? undefined, token.subject_id);
}

/** A token that somebody presented to a runner. */
export interface RunnerToken {
  kind: TokenKind;
  environmentId?: string;
  port?: number;
  authNonce?: number;
  subjectId: string;
  subjectPrincipal: Principal;
  expiresAt?: Date;
}

/**
 * Looks up a token that opens something on this runner: kind, environment, and whether whoever asked for it is still
 * active and may still use that environment. Undefined for everything else.
 */
export async function findRunnerToken(
  sql: Sql,
  runnerId: string,
  text: string,
  now: Date,
): Promise<RunnerToken | undefined> {
  const claimed = tokenKind(text);
  if (!claimed || !RUNNER_KINDS.includes(claimed)) return undefined;
  const [row] = await sql<
    {
      kind: TokenKind;
      environment_id: string | null;
      port: number | null;
      subject_id: string;
      subject_principal: Principal;
      expires_at: Date | null;
      auth_nonce: number | null;
      creator_id: string | null;
      spec: Uint8Array | null;
    }[]
  >`
    select t.kind, t.environment_id, t.port, t.subject_id, t.subject_principal, t.expires_at, t.auth_nonce, e.creator_id,
      case when t.kind = ${TokenKind.PORT_ACCESS} then e.spec end as spec
    from tokens t
      left join environments e on e.id = t.environment_id
      left join users u on t.subject_principal = ${Principal.USER} and u.id = t.subject_id
      left join service_accounts s on t.subject_principal = ${Principal.SERVICE_ACCOUNT} and s.id = t.subject_id
    where t.hash = ${tokenHash(text)} and t.kind = ${claimed} and coalesce(t.expires_at > ${now}, true)
      and (e.runner_id = ${runnerId} or t.runner_id = ${runnerId}) and e.deleted_at is null
      and case t.subject_principal
        when ${Principal.USER} then u.status = ${UserStatus.ACTIVE}
        when ${Principal.SERVICE_ACCOUNT} then not s.suspended and coalesce(s.valid_until > ${now}, true)
        else true end
      and (t.kind = any(${[TokenKind.ENVIRONMENT, TokenKind.PORT_ACCESS] as number[]}) or t.environment_id is null or t.subject_id = e.id or t.subject_id = e.creator_id
        or e.admission = any(${[AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE] as number[]})
        or exists (select from group_members member join role_assignments share on share.group_id = member.group_id
          where member.member_id = t.subject_id and share.resource_id = e.id
            and share.resource_role = any(${[ResourceRole.ENVIRONMENT_ADMIN, ResourceRole.ENVIRONMENT_USER] as number[]})))`;
  if (!row || (row.spec && !opensPort(row.spec, row))) return undefined;
  return {
    kind: row.kind,
    environmentId: row.environment_id ?? undefined,
    port: row.port ?? undefined,
    authNonce: row.auth_nonce ?? undefined,
    subjectId: row.subject_id,
    subjectPrincipal: row.subject_principal,
    expiresAt: row.expires_at ?? undefined,
  };
}

/** Ends the token with which the processes of an environment call the API. */
export async function revokeEnvironmentToken(tx: Tx, environmentId: string): Promise<void> {
  await tx`delete from tokens where environment_id = ${environmentId} and kind = ${TokenKind.ENVIRONMENT}`;
}

/** Kinds that their owners see for a while after their end. */
const SHOWN_KINDS: readonly TokenKind[] = [TokenKind.PERSONAL_ACCESS, TokenKind.SERVICE_ACCOUNT];

/**
 * Removes tokens whose end is a day past, or as long as they are shown after it, at most `limit`; returns how many.
 */
export async function purgeExpiredTokens(sql: Sql, now: Date, limit: number): Promise<number> {
  const rows = await sql`
    delete from tokens where id in (
      select id from tokens where expires_at < ${now}::timestamptz - interval '1 day'
        and (kind <> all(${SHOWN_KINDS as number[]}) or expires_at < ${new Date(now.getTime() - SHOWN_AFTER_END_MS)})
      order by expires_at limit ${limit} for update skip locked
    ) returning id`;
  return rows.length;
}

/** Makes a used exchange token good for another day, and ends what it was exchanged for, which nobody holds. */
export async function rearmExchangeToken(db: Db, text: string, now: Date): Promise<void> {
  await db.write`
    with rearmed as (
      update tokens set used_at = null, expires_at = ${new Date(now.getTime() + EXCHANGE_TOKEN_MS)}
      where hash = ${tokenHash(text)} and kind = ${TokenKind.RUNNER_EXCHANGE} and used_at is not null
      returning runner_id
    )
    delete from tokens t using rearmed
    where t.subject_id = rearmed.runner_id and t.kind = ${TokenKind.RUNNER_ACCESS} and t.last_used_at is null`;
}
