import { createHash, timingSafeEqual } from "node:crypto";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type App, newTokenText, transact } from "../app.ts";
import { denied, type FieldProblem, Refusal, refuseProblems } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { PERSONAL_ACCESS_MS, TokenKind } from "../domain/tokens.ts";
import { holdMember, insertLoginCode, takeLoginCode } from "../store/logins.ts";
import { issuePersonalAccessToken } from "../store/personal-access-tokens.ts";

/** How long a code from the browser can be swapped for a token. */
const CODE_MS = 5 * 60_000;
const CODE_BYTES = 32;
const PORTS = { min: 1024, max: 65_535 };

/** What `berth login` asks a browser for. */
export interface CliLogin {
  /** Port of this machine where it waits for the browser. */
  port: string;
  /** Comes back with the code. */
  state: string;
  /** Challenge of RFC 7636, method S256. */
  codeChallenge: string;
  /** Name of the machine that asks, as it says itself; may be empty. */
  machine: string;
}

/** Throws INVALID_ARGUMENT for what no `berth login` asks. */
export function checkCliLogin({ port, state, codeChallenge, machine }: CliLogin): void {
  const isPort = /^\d{1,5}$/.test(port) && Number(port) >= PORTS.min && Number(port) <= PORTS.max;
  const checks: [boolean, FieldProblem][] = [
    [isPort, { field: "port", message: `must be from ${PORTS.min} to ${PORTS.max}` }],
    [
      /^[\w.~-]{1,128}$/.test(state),
      { field: "state", message: "must have 1 to 128 letters, digits, '.', '_', '~', '-'" },
    ],
    [/^[\w-]{43}$/.test(codeChallenge), { field: "code_challenge", message: "must be an S256 challenge" }],
    [/^[\w.-]{0,64}$/.test(machine), { field: "machine", message: "must be a host name" }],
  ];
  refuseProblems(checks.flatMap(([isRight, problem]) => (isRight ? [] : [problem])));
}

/** Where the command waits for the browser. */
export const callbackOf = ({ port, state }: CliLogin, code: string): string =>
  `http://127.0.0.1:${port}/callback?${new URLSearchParams({ code, state })}`;

/** A code that gets the command a token of the user who has agreed to it, once. */
export async function agree(app: App, caller: Caller, { codeChallenge, machine }: CliLogin): Promise<string> {
  if (caller.principal !== Principal.USER) throw denied("choose an organization first");
  const code = Buffer.from(app.random(CODE_BYTES)).toString("base64url");
  await insertLoginCode(app.db.write, code, {
    ...{ userId: caller.id, codeChallenge, description: `berth login ${machine}`.trim() },
    expiresAt: new Date(app.now().getTime() + CODE_MS),
  });
  return code;
}

function isVerifierOf(verifier: string, challenge: string): boolean {
  const [given, expected] = [createHash("sha256").update(verifier).digest(), Buffer.from(challenge, "base64url")];
  return given.length === expected.length && timingSafeEqual(given, expected);
}

/** A new token and whose it is. */
export interface CliToken {
  token: string;
  tokenId: string;
  expiresAt: string;
  email: string;
  organizationId: string;
  organizationName: string;
}

/**
 * Swaps a code for a token, valid for 30 days. UNAUTHENTICATED for a code that is unknown, used, over five minutes old or
 * another command's; whoever has tried one has used it up.
 */
export async function swap(app: App, code: string, verifier: string): Promise<CliToken> {
  const login = await takeLoginCode(app.db.write, code);
  const isGood = login && login.expiresAt > app.now() && isVerifierOf(verifier, login.codeChallenge);
  if (!isGood) throw new Refusal("unauthenticated", "the code is not valid; run berth login again");
  const { userId, description } = login;
  const token = newTokenText(app, TokenKind.PERSONAL_ACCESS);
  return transact(app, async (tx) => {
    const member = await holdMember(tx, userId);
    if (!member) throw new Refusal("unauthenticated", "the user has left or is suspended");
    const [tokenId, at] = [app.newId(), app.now()];
    const { email, organizationId, organizationName } = member;
    const actor = { id: userId, principal: Principal.USER, tokenId };
    const by = { actor, newId: app.newId, at, most: app.limits.personalAccessTokens };
    await issuePersonalAccessToken(tx, { id: tokenId, text: token, organizationId, userId, description }, by);
    const expiresAt = new Date(at.getTime() + PERSONAL_ACCESS_MS).toISOString();
    return { token, tokenId, expiresAt, email, organizationId, organizationName };
  });
}
