import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { tokenHash } from "../domain/tokens.ts";
import type { Sql, Tx } from "./db.ts";

/** What is remembered of a browser that was sent to an identity provider. */
export interface LoginFlow {
  provider: string;
  nonce: string;
  codeVerifier: string;
  returnTo: string;
}

export async function insertLoginFlow(
  sql: Sql,
  flow: LoginFlow & { state: string; browser: string; expiresAt: Date },
): Promise<void> {
  await sql`
    insert into login_flows (state_hash, browser_hash, provider, nonce, code_verifier, return_to, expires_at)
    values (${tokenHash(flow.state)}, ${tokenHash(flow.browser)}, ${flow.provider}, ${flow.nonce}, ${flow.codeVerifier},
      ${flow.returnTo}, ${flow.expiresAt})`;
}

/** Ends a flow and tells what it was; undefined if it is unknown, over, or that of another browser. */
export async function takeLoginFlow(
  sql: Sql,
  { state, browser, now }: { state: string; browser: string; now: Date },
): Promise<LoginFlow | undefined> {
  const [row] = await sql<{ provider: string; nonce: string; code_verifier: string; return_to: string }[]>`
    delete from login_flows
    where state_hash = ${tokenHash(state)} and browser_hash = ${tokenHash(browser)} and expires_at > ${now}
    returning provider, nonce, code_verifier, return_to`;
  return row && { provider: row.provider, nonce: row.nonce, codeVerifier: row.code_verifier, returnTo: row.return_to };
}

/** A code with which `berth login` gets a token of a user. */
export interface LoginCode {
  userId: string;
  codeChallenge: string;
  description: string;
  expiresAt: Date;
}

export async function insertLoginCode(sql: Sql | Tx, code: string, login: LoginCode): Promise<void> {
  await sql`
    insert into login_codes (code_hash, user_id, code_challenge, description, expires_at)
    values (${tokenHash(code)}, ${login.userId}, ${login.codeChallenge}, ${login.description}, ${login.expiresAt})`;
}

/** Ends a code, whatever becomes of it, and tells what it was; undefined if it is unknown. */
export async function takeLoginCode(sql: Sql | Tx, code: string): Promise<LoginCode | undefined> {
  const [row] = await sql<{ user_id: string; code_challenge: string; description: string; expires_at: Date }[]>`
    delete from login_codes where code_hash = ${tokenHash(code)}
    returning user_id, code_challenge, description, expires_at`;
  return (
    row && {
      ...{ userId: row.user_id, codeChallenge: row.code_challenge },
      ...{ description: row.description, expiresAt: row.expires_at },
    }
  );
}

/** An active user, whom the transaction keeps as they are until it ends; undefined for anybody else. */
export async function holdMember(
  tx: Tx,
  userId: string,
): Promise<{ email: string; organizationId: string; organizationName: string } | undefined> {
  const [row] = await tx<{ email: string; organizationId: string; organizationName: string }[]>`
    select u.email, o.id as "organizationId", o.name as "organizationName"
    from users u join organizations o on o.id = u.organization_id
    where u.id = ${userId} and u.status = ${UserStatus.ACTIVE} for no key update of u`;
  return row;
}

/** Removes flows and codes that nobody came back with, at most `limit` of each; returns how many. */
export async function purgeLogins(sql: Sql, now: Date, limit: number): Promise<number> {
  const flows = await sql`delete from login_flows where state_hash in (
    select state_hash from login_flows where expires_at < ${now} order by expires_at limit ${limit} for update skip locked)`;
  const codes = await sql`delete from login_codes where code_hash in (
    select code_hash from login_codes where expires_at < ${now} order by expires_at limit ${limit} for update skip locked)`;
  return Math.max(flows.count, codes.count);
}
