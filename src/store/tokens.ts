import { fromBinary } from "@bufbuild/protobuf";
import { AdmissionLevel, EnvironmentSpecSchema } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { admits, portOf } from "../domain/environment-ports.ts";
import { EXCHANGE_TOKEN_MS } from "../domain/runner.ts";
import { SHOWN_AFTER_END_MS, TokenKind, tokenHash, tokenKind } from "../domain/tokens.ts";
import type { Db, Sql, Tx } from "./db.ts";

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
  /** Opens nothing, and is exchanged for one that does. */
  toRedeem?: boolean;
}

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
      read_only, description, created_at, expires_at, idle_seconds, to_redeem)
    values (${token.id}, ${tokenHash(token.text)}, ${token.kind}, ${token.organizationId}, ${token.subjectId},
      ${token.subjectPrincipal}, ${token.environmentId}, ${token.runnerId}, ${token.issuerId}, ${token.port},
      ${token.authNonce === undefined ? null : String(token.authNonce)}, ${token.readOnly ?? false},
      ${token.description ?? ""}, ${token.createdAt}, ${token.expiresAt}, ${token.idleSeconds}, ${token.toRedeem ?? false})`;
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

/** Gives a port token that is to be redeemed on this runner another text and end; false for all others. */
export async function redeemPortToken(
  sql: Sql,
  runnerId: string,
  text: string,
  next: { text: string; expiresAt: Date },
  now: Date,
): Promise<boolean> {
  if (tokenKind(text) !== TokenKind.PORT_ACCESS) return false;
  const { count } = await sql`
    update tokens t set hash = ${tokenHash(next.text)}, expires_at = ${next.expiresAt}, to_redeem = false from environments e
    where t.hash = ${tokenHash(text)} and t.kind = ${TokenKind.PORT_ACCESS} and t.to_redeem and t.expires_at > ${now}
      and e.id = t.environment_id and e.runner_id = ${runnerId} and e.deleted_at is null`;
  return count > 0;
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
      and not t.to_redeem and (e.runner_id = ${runnerId} or t.runner_id = ${runnerId}) and e.deleted_at is null
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
