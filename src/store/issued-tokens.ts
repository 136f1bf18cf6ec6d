import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import { SHOWN_AFTER_END_MS, type TokenKind } from "../domain/tokens.ts";
import { oneOf } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";

/** What is known of a personal or a service account's token besides its text. */
export interface IssuedToken {
  id: string;
  /** Whom it acts as. */
  subjectId: string;
  description: string;
  readOnly: boolean;
  /** The person behind it, where that is not its subject. */
  issuerId?: string;
  createdAt: Date;
  expiresAt?: Date;
  lastUsedAt?: Date;
}

/** Tokens of one kind in one organization: those of the named subjects, or of all. */
export interface TokenScope {
  kind: typeof TokenKind.PERSONAL_ACCESS | typeof TokenKind.SERVICE_ACCOUNT;
  organizationId: string;
  subjectIds?: readonly string[];
}

interface TokenRow {
  id: string;
  subject_id: string;
  description: string;
  read_only: boolean;
  issuer_id: string | null;
  created_at: Date;
  expires_at: Date | null;
  last_used_at: Date | null;
}

const columns = (sql: Sql | Tx) =>
  sql`id, subject_id, description, read_only, issuer_id, created_at, expires_at, last_used_at`;

const toToken = (row: TokenRow): IssuedToken => ({
  id: row.id,
  subjectId: row.subject_id,
  description: row.description,
  readOnly: row.read_only,
  issuerId: row.issuer_id ?? undefined,
  createdAt: row.created_at,
  expiresAt: row.expires_at ?? undefined,
  lastUsedAt: row.last_used_at ?? undefined,
});

/** Condition: in the scope, and not so long past its end that it is no longer shown. */
function within(sql: Sql | Tx, { kind, organizationId, subjectIds }: TokenScope, now: Date): Fragment {
  const subjects = subjectIds ? oneOf(sql, sql`subject_id`, subjectIds) : sql`true`;
  return sql`(${subjects} and kind = ${kind} and organization_id = ${organizationId}
    and coalesce(expires_at > ${new Date(now.getTime() - SHOWN_AFTER_END_MS)}, true))`;
}

/** One of them; NOT_FOUND if it is none. */
export async function getIssuedToken(sql: Sql | Tx, scope: TokenScope, id: string, now: Date): Promise<IssuedToken> {
  const [row] = await sql<TokenRow[]>`
    select ${columns(sql)} from tokens where id = ${id} and ${within(sql, scope, now)}`;
  if (!row) throw notFound("token", id);
  return toToken(row);
}

/** All of them, newest first, one more than the page holds. */
export async function listIssuedTokens(sql: Sql, scope: TokenScope, page: Page, now: Date): Promise<IssuedToken[]> {
  const rows = await sql<TokenRow[]>`
    select ${columns(sql)} from tokens
    where ${within(sql, scope, now)} and ${page.after ? sql`id < ${page.after}` : sql`true`}
    order by id desc limit ${page.limit + 1}`;
  return rows.map(toToken);
}

/** How many of a subject's tokens still open something. */
export async function countUnexpired(
  tx: Tx,
  { kind, subjectId }: Pick<IssuedToken, "subjectId"> & Pick<TokenScope, "kind">,
  now: Date,
): Promise<number> {
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from tokens
    where subject_id = ${subjectId} and kind = ${kind} and coalesce(expires_at > ${now}, true)`;
  return row?.count ?? 0;
}

/** Ends a token; false if somebody else has done so. */
export async function deleteIssuedToken(tx: Tx, id: string): Promise<boolean> {
  const { count } = await tx`delete from tokens where id = ${id}`;
  return count > 0;
}
