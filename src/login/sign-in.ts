import { AuthorizationResponseError, ClientError } from "openid-client";
import { type App, transact } from "../app.ts";
import type { OidcProviderConfig } from "../config/login.ts";
import { safeReturnTo } from "../domain/browser.ts";
import { denied, invalid, Refusal } from "../domain/errors.ts";
import { ScmError } from "../scm/errors.ts";
import { type Identity, signInAccount } from "../store/identities.ts";
import { insertLoginFlow, type LoginFlow, takeLoginFlow } from "../store/logins.ts";
import type { Claims, Oidc, OidcClient } from "./oidc.ts";
import { startSession } from "./sessions.ts";

export const CALLBACK_PATH = "/auth/oidc/callback";
/** How long a browser may take to the provider and back. */
export const FLOW_MS = 10 * 60_000;
const SECRET_BYTES = 32;
const BROWSER_KEY = /^[\w-]{43}$/;
const EMAIL = /^[^@\s\p{Cc}]{1,64}@[^@\s\p{Cc}]{1,255}$/u;
const MAX_NAME = 255;
const MAX_URL = 2048;
const MAX_CLAIMS_BYTES = 32 * 1024;
// What concerns the token and not the person.
const PROTOCOL_CLAIMS = new Set([
  ...["iss", "aud", "azp", "exp", "iat", "nbf", "jti", "nonce", "auth_time", "acr", "amr", "sid"],
  ...["at_hash", "c_hash", "s_hash"],
]);

const secret = (app: App) => Buffer.from(app.random(SECRET_BYTES)).toString("base64url");

const clientOf = ({ issuer, clientId, clientSecret }: OidcProviderConfig): OidcClient => ({
  ...{ issuer, clientId, clientSecret },
});

const redirectUri = (app: App) => app.config.publicUrl + CALLBACK_PATH;

// What the library says of a provider that does not answer, or not as one.
const DOWN = new Set(["OAUTH_TIMEOUT", "OAUTH_RESPONSE_IS_NOT_CONFORM", "OAUTH_RESPONSE_IS_NOT_JSON"]);

/** Texts of an error and its causes; other properties hold claims. */
function reasonsOf(error: unknown): string[] {
  return error instanceof Error ? [error.message, ...reasonsOf(error.cause)] : [];
}

function isDown(error: unknown): boolean {
  if (error instanceof ScmError) return true;
  return error instanceof ClientError && (DOWN.has(error.code ?? "") || isDown(error.cause));
}

/** Tells what a person can make of a failure on the way; the log has the rest. */
function failure(app: App, provider: OidcProviderConfig, error: unknown): Refusal {
  app.log.warn({ reasons: reasonsOf(error), provider: provider.id }, "a sign-in with an identity provider failed");
  if (error instanceof AuthorizationResponseError) return denied(`${provider.name} did not sign you in`);
  if (isDown(error)) return new Refusal("unavailable", `${provider.name} cannot be reached now, try again later`);
  return denied(`what ${provider.name} says could not be confirmed`);
}

/** A provider by its id; the only one if no id is given, and undefined if there is a choice. */
export function chooseProvider(app: App, id: string | undefined): OidcProviderConfig | undefined {
  const { providers } = app.config.login;
  if (providers.length === 0) throw new Refusal("not_found", "signing in with a browser is not set up here");
  if (id === undefined) return providers.length === 1 ? providers[0] : undefined;
  const found = providers.find((each) => each.id === id);
  if (!found) throw new Refusal("not_found", "there is no such way to sign in");
  return found;
}

/**
 * Begins a login: returns where to send the browser, and the value of the cookie that ties the login to it. `browser` is
 * the value that it has already, from a login in another tab.
 */
export async function startSignIn(
  app: App,
  oidc: Oidc,
  { provider, returnTo, browser }: { provider: OidcProviderConfig; returnTo: string; browser: string | undefined },
): Promise<{ url: string; browser: string }> {
  const key = browser && BROWSER_KEY.test(browser) ? browser : secret(app);
  const checks = { state: secret(app), nonce: secret(app), codeVerifier: secret(app) };
  const url = await oidc.authorizationUrl(clientOf(provider), redirectUri(app), checks).catch((error: unknown) => {
    throw failure(app, provider, error);
  });
  const { publicUrl, login } = app.config;
  await insertLoginFlow(app.db.write, {
    ...{ ...checks, provider: provider.id, browser: key },
    returnTo: safeReturnTo(returnTo, publicUrl, login.returnToOrigins),
    expiresAt: new Date(app.now().getTime() + FLOW_MS),
  });
  return { url, browser: key };
}

function httpUrl(value: unknown): string {
  const url = typeof value === "string" && value.length <= MAX_URL ? URL.parse(value) : null;
  return url && /^https?:$/.test(url.protocol) ? url.href : "";
}

/** Whom the claims are about; PERMISSION_DENIED without an address that the provider has verified. */
function identityOf(provider: OidcProviderConfig, claims: Claims): Identity {
  const { sub, email, email_verified: isVerified, name, picture } = claims;
  if (typeof sub !== "string" || sub === "") throw denied(`${provider.name} does not say who you are`);
  if (typeof email !== "string" || !EMAIL.test(email)) throw denied(`${provider.name} does not tell your mail address`);
  if (isVerified !== true) throw denied(`${provider.name} has not verified your mail address`);
  const kept = JSON.stringify(Object.fromEntries(Object.entries(claims).filter(([key]) => !PROTOCOL_CLAIMS.has(key))));
  return {
    ...{ provider: provider.id, issuer: provider.issuer, subject: sub, email: email.toLowerCase() },
    name: typeof name === "string" ? name.trim().slice(0, MAX_NAME) : "",
    avatarUrl: httpUrl(picture),
    // The database stores no NUL.
    claims: Buffer.byteLength(kept) <= MAX_CLAIMS_BYTES && !kept.includes("\\u0000") ? kept : "{}",
  };
}

/** The flow that a browser comes back from; INVALID_ARGUMENT if it is not one of its own, over, or was used before. */
async function takeFlow(app: App, state: string, browser: string | undefined): Promise<LoginFlow> {
  const flow = browser && (await takeLoginFlow(app.db.write, { state, browser, now: app.now() }));
  if (!flow)
    throw invalid({ field: "state", message: "this sign-in is over or was begun in another browser; sign in again" });
  return flow;
}

/**
 * Ends a login with what the browser has brought back: returns the cookie's value and where to send it. `replaces` is the
 * login that the browser had before.
 */
export async function finishSignIn(
  app: App,
  oidc: Oidc,
  { query, browser, replaces }: { query: URLSearchParams; browser: string | undefined; replaces: string | undefined },
): Promise<{ session: string; returnTo: string }> {
  const state = query.get("state") ?? "";
  const { provider: providerId, nonce, codeVerifier, returnTo } = await takeFlow(app, state, browser);
  const provider = app.config.login.providers.find(({ id }) => id === providerId);
  if (!provider) throw new Refusal("not_found", "this way to sign in is no longer offered");
  const currentUrl = new URL(`${redirectUri(app)}?${query}`);
  const claims = await oidc
    .claims(clientOf(provider), currentUrl, { state, nonce, codeVerifier })
    .catch((error: unknown) => {
      throw failure(app, provider, error);
    });
  const identity = identityOf(provider, claims);
  const session = await transact(app, async (tx) => {
    const accountId = await signInAccount(tx, identity, app.now(), app.newId);
    return startSession(app, tx, { accountId, how: provider.name, replaces });
  });
  return { session, returnTo };
}
