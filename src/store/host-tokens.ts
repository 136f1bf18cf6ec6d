import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type HostAuthenticationToken,
  HostAuthenticationTokenSchema,
  type HostAuthenticationTokenSource,
  type ListHostAuthenticationTokensRequest_Filter,
  RunnerKind,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { Scope } from "../domain/secret.ts";
import { conjunction } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Attribution, type Change, recorded } from "./record.ts";
import { holdSecrets, told } from "./secrets.ts";

/** A credential that a subject holds for a host on a runner; its secrets are sealed. */
export interface StoredHostToken {
  id: string;
  organizationId: string;
  runnerId: string;
  /** Normalised. */
  host: string;
  subject: { id: string; principal: Principal };
  source: HostAuthenticationTokenSource;
  integrationId?: string;
  scopes: readonly string[];
  expiresAt?: Date;
  sealedToken: Uint8Array;
  sealedRefreshToken?: Uint8Array;
  version: number;
  /** Why the host no longer takes it. */
  invalidReason?: string;
}

interface TokenRow {
  id: string;
  organization_id: string;
  runner_id: string;
  host: string;
  subject_id: string;
  subject_principal: Principal;
  source: HostAuthenticationTokenSource;
  integration_id: string | null;
  scopes: string[];
  expires_at: Date | null;
  sealed_token: Uint8Array;
  sealed_refresh_token: Uint8Array | null;
  version: number;
  invalid_reason: string | null;
}

const columns = (sql: Sql | Tx) => sql`t.id, t.organization_id, t.runner_id, t.host, t.subject_id, t.subject_principal,
  t.source, t.integration_id, t.scopes, t.expires_at, t.sealed_token, t.sealed_refresh_token, t.version, t.invalid_reason`;

const toToken = (row: TokenRow): StoredHostToken => ({
  id: row.id,
  organizationId: row.organization_id,
  runnerId: row.runner_id,
  host: row.host,
  subject: { id: row.subject_id, principal: row.subject_principal },
  source: row.source,
  integrationId: row.integration_id ?? undefined,
  scopes: row.scopes,
  expiresAt: row.expires_at ?? undefined,
  sealedToken: row.sealed_token,
  sealedRefreshToken: row.sealed_refresh_token ?? undefined,
  version: row.version,
  invalidReason: row.invalid_reason ?? undefined,
});

/** To whom a change is put down, and its text for the audit log. */
export type Described = Attribution & { action: string };

/** What ties a sealed secret of a token to it. */
export const hostTokenContext = (id: string, part: "token" | "refresh") => `host token ${id} ${part}`;

/** The token as the API shows it: without its secrets. */
export function hostTokenMessage(token: StoredHostToken): HostAuthenticationToken {
  const { subject, expiresAt } = token;
  return create(HostAuthenticationTokenSchema, {
    ...{ id: token.id, runnerId: token.runnerId, host: token.host, source: token.source, subject },
    userId: subject.principal === Principal.USER ? subject.id : "",
    expiresAt: expiresAt && timestampFromDate(expiresAt),
    integrationId: token.integrationId ?? "",
    scopes: [...token.scopes],
  });
}

/** A change of a token: its subject alone hears of it. */
export function hostTokenChange(
  token: Pick<StoredHostToken, "id" | "organizationId" | "runnerId" | "subject">,
  operation: ResourceOperation,
  by: Described,
): Change {
  return {
    organizationId: token.organizationId,
    resourceType: ResourceType.HOST_AUTHENTICATION_TOKEN,
    resourceId: token.id,
    operation,
    creatorId: token.subject.id,
    runnerId: token.runnerId,
    at: by.at,
    audit: { id: by.newId(), actor: by.actor, action: by.action },
  };
}

/** CTEs that write a change of a token down and have the environments of its subject told. */
function noted(tx: Tx, token: StoredHostToken, operation: ResourceOperation, by: Described): Fragment {
  const { subject, organizationId } = token;
  const scope = subject.principal === Principal.USER ? Scope.USER : Scope.SERVICE_ACCOUNT;
  const owner = { scope, id: subject.id };
  return tx`${recorded(tx, hostTokenChange(token, operation, by))}, ${told(tx, owner, organizationId, by.at)}`;
}

export async function insertHostToken(tx: Tx, token: StoredHostToken, by: Described): Promise<void> {
  const { subject } = token;
  await holdSecrets(tx, token.organizationId);
  await tx`
    with ${noted(tx, token, ResourceOperation.CREATE, by)}
    insert into host_tokens (id, organization_id, runner_id, host, subject_id, subject_principal, source, integration_id,
      scopes, expires_at, sealed_token, sealed_refresh_token, created_at)
    values (${token.id}, ${token.organizationId}, ${token.runnerId}, ${token.host}, ${subject.id}, ${subject.principal},
      ${token.source}, ${token.integrationId}, ${token.scopes as string[]}, ${token.expiresAt}, ${token.sealedToken},
      ${token.sealedRefreshToken}, ${by.at})`;
}

/** Replaces what an update may change, with the next version. */
export async function updateHostToken(tx: Tx, token: StoredHostToken, by: Described): Promise<void> {
  await holdSecrets(tx, token.organizationId);
  await tx`
    with ${noted(tx, token, ResourceOperation.UPDATE, by)}
    update host_tokens set scopes = ${token.scopes as string[]}, expires_at = ${token.expiresAt},
      sealed_token = ${token.sealedToken}, sealed_refresh_token = ${token.sealedRefreshToken},
      invalid_reason = ${token.invalidReason}, refresh_lease_until = null, version = version + 1
    where id = ${token.id}`;
}

export async function deleteHostToken(tx: Tx, token: StoredHostToken, by: Described): Promise<void> {
  await holdSecrets(tx, token.organizationId);
  await tx`with ${noted(tx, token, ResourceOperation.DELETE, by)}
    delete from host_tokens where id = ${token.id}`;
}

/** Condition: the caller may know of token `t`: its own, and for organization admins all. */
function knows(sql: Sql | Tx, caller: Caller): Fragment {
  const here = sql`t.organization_id = ${caller.organizationId}`;
  return caller.orgAdmin ? here : sql`(${here} and t.subject_id = ${caller.id})`;
}

/** A token that the caller may know of; NOT_FOUND otherwise. */
export async function getHostToken(sql: Sql | Tx, caller: Caller, id: string, lock = false): Promise<StoredHostToken> {
  const [row] = await sql<TokenRow[]>`
    select ${columns(sql)} from host_tokens t where t.id = ${id} and ${knows(sql, caller)} ${lock ? sql`for update` : sql``}`;
  if (!row) throw notFound("host authentication token", id);
  return toToken(row);
}

/** Tokens that the caller may know of, newest first, one more than the page holds. */
export async function listHostTokens(
  sql: Sql,
  caller: Caller,
  filter: Pick<ListHostAuthenticationTokensRequest_Filter, "runnerId" | "subjectId"> | undefined,
  page: Page,
): Promise<StoredHostToken[]> {
  const conditions: Fragment[] = [knows(sql, caller)];
  if (filter?.runnerId) conditions.push(sql`t.runner_id = ${filter.runnerId}`);
  if (filter?.subjectId) conditions.push(sql`t.subject_id = ${filter.subjectId}`);
  if (page.after) conditions.push(sql`t.id < ${page.after}`);
  const rows = await sql<TokenRow[]>`
    select ${columns(sql)} from host_tokens t where ${conjunction(sql, conditions)} order by t.id desc limit ${page.limit + 1}`;
  return rows.map(toToken);
}

/** Whose tokens go: all of a host that an integration served, those of one subject, or those of a runner. */
export type TokensToEnd =
  | { integrationOf: string; host: string; source?: HostAuthenticationTokenSource }
  | { subjectId: string }
  | { runnerId: string };

function ended(tx: Tx, which: TokensToEnd): Fragment {
  if ("subjectId" in which) return tx`t.subject_id = ${which.subjectId}`;
  if ("runnerId" in which) return tx`t.runner_id = ${which.runnerId}`;
  const source = which.source === undefined ? tx`true` : tx`t.source = ${which.source}`;
  // What all local runners share holds for those that have nothing of their own for the host.
  return tx`(t.host = ${which.host} and ${source} and (t.runner_id = ${which.integrationOf} or exists (
    select from runners shared join runners r on r.organization_id = shared.organization_id and r.kind = ${RunnerKind.LOCAL}
    where shared.id = ${which.integrationOf} and shared.kind = ${RunnerKind.LOCAL_CONFIGURATION} and r.id = t.runner_id
      and not exists (select from scm_integrations own where own.runner_id = r.id and own.host = t.host))))`;
}

/** Deletes tokens together with what they depended on, and tells the subject of each. */
export async function endHostTokens(tx: Tx, which: TokensToEnd, by: Described): Promise<void> {
  const rows = await tx<TokenRow[]>`delete from host_tokens t where ${ended(tx, which)} returning ${columns(tx)}`;
  const [first] = rows;
  if (first) await holdSecrets(tx, first.organization_id);
  for (const row of rows) await tx`with ${noted(tx, toToken(row), ResourceOperation.DELETE, by)} select`;
}

/** The newest usable token of a subject for a host on a runner. */
export async function usableHostToken(
  sql: Sql | Tx,
  which: { runnerId: string; host: string; subjectId: string },
  now: Date,
): Promise<StoredHostToken | undefined> {
  const [row] = await sql<TokenRow[]>`
    select ${columns(sql)} from host_tokens t
    where t.runner_id = ${which.runnerId} and t.host = ${which.host} and t.subject_id = ${which.subjectId}
      and is_usable(t, ${now}) order by t.id desc limit 1`;
  return row && toToken(row);
}

/** Keeps what renewing a token takes for one caller; undefined while somebody else has it. */
export async function leaseRefresh(sql: Sql, token: StoredHostToken, now: Date, until: Date): Promise<boolean> {
  const rows = await sql`update host_tokens set refresh_lease_until = ${until}
    where id = ${token.id} and version = ${token.version} and coalesce(refresh_lease_until <= ${now}, true) returning id`;
  return rows.length > 0;
}

/** Notes that a reader has had this version; true the first time. */
export async function noteTokenRead(sql: Sql, readerId: string, token: StoredHostToken): Promise<boolean> {
  const rows = await sql`
    insert into host_token_reads (reader_id, token_id, version) values (${readerId}, ${token.id}, ${token.version})
    on conflict (reader_id, token_id) do update set version = excluded.version
      where host_token_reads.version <> excluded.version returning token_id`;
  return rows.length > 0;
}

/** A token that is used on a runner, whoever it belongs to; undefined if there is none. */
export async function lockRunnersToken(tx: Tx, runnerId: string, id: string): Promise<StoredHostToken | undefined> {
  const [row] = await tx<TokenRow[]>`
    select ${columns(tx)} from host_tokens t where t.id = ${id} and t.runner_id = ${runnerId} for update`;
  return row && toToken(row);
}

/** Whether a user or service account of the organization may use a runner, by any of its roles. */
export async function subjectUsesRunner(
  sql: Sql | Tx,
  organizationId: string,
  subjectId: string,
  runnerId: string,
): Promise<boolean> {
  const roles = [ResourceRole.RUNNER_ADMIN, ResourceRole.RUNNER_USER] as number[];
  const organizationRoles = [ResourceRole.ORG_ADMIN, ResourceRole.ORG_RUNNERS_ADMIN] as number[];
  const rows = await sql`
    select from runners r where r.id = ${runnerId} and r.organization_id = ${organizationId} and r.deleted_at is null
      and (r.creator_id = ${subjectId} or exists (
        select from group_members m join role_assignments a on a.group_id = m.group_id where m.member_id = ${subjectId}
          and ((a.resource_id = r.id and a.resource_role = any(${roles}))
            or (a.resource_id = r.organization_id and a.resource_role = any(${organizationRoles})))))`;
  return rows.length > 0;
}

/** Removes tokens that ended before a moment and cannot be renewed, at most `limit`; returns how many. */
export async function purgeExpiredHostTokens(sql: Sql, before: Date, limit: number): Promise<number> {
  const { count } = await sql`delete from host_tokens where id in (
    select id from host_tokens where expires_at < ${before} and sealed_refresh_token is null
    order by expires_at limit ${limit} for update skip locked)`;
  return count;
}
