import { ScmError } from "./errors.ts";
import { guardedFetch } from "./fetch.ts";
import type { Guard } from "./guard.ts";

const LIMITS = { timeoutMs: 10_000, maxBytes: 64 * 1024, vouched: true };
const MAX_SECONDS = 10 * 366 * 24 * 60 * 60;

/** Who renews a token, and where: what an admin declared about a host. */
export interface OAuthClient {
  scmId: string;
  host: string;
  clientId: string;
  clientSecret: string;
  /** Empty where the product itself gives the tokens out. */
  issuerUrl: string;
}

/** A token after its renewal; what the host did not say is absent. */
export interface RenewedToken {
  token: string;
  refreshToken?: string;
  expiresInMs?: number;
  scopes: string[];
}

const PATHS: Readonly<Record<string, string>> = {
  github: "/login/oauth/access_token",
  gitlab: "/oauth/token",
  bitbucket: "/site/oauth2/access_token",
};
const AZURE_SCOPES = "499b84ac-1321-427f-aa17-267ca6975798/.default offline_access";
const REFUSALS: ReadonlySet<unknown> = new Set(["invalid_grant", "bad_refresh_token"]);

/** Where tokens are given out; undefined for products that give none. */
function tokenEndpoint({ scmId, host, issuerUrl }: OAuthClient): string | undefined {
  const path = PATHS[scmId];
  if (path) return `https://${host}${path}`;
  if (scmId !== "azuredevops_entra") return undefined;
  return `${issuerUrl.replace(/(\/oauth2)?\/v2\.0\/?$|\/$/, "")}/oauth2/v2.0/token`;
}

const isText = (value: unknown): value is string => typeof value === "string" && /^[^\s\p{Cc}]{1,16384}$/u.test(value);

function renewed(answer: Record<string, unknown>): RenewedToken | undefined {
  const { access_token: token, refresh_token: refreshToken, expires_in: seconds, scope } = answer;
  if (!isText(token)) return undefined;
  const isTime = typeof seconds === "number" && seconds > 0 && seconds <= MAX_SECONDS;
  return {
    token,
    refreshToken: isText(refreshToken) ? refreshToken : undefined,
    expiresInMs: isTime ? seconds * 1000 : undefined,
    scopes:
      typeof scope === "string"
        ? scope
            .split(/[\s,]+/)
            .filter(Boolean)
            .slice(0, 100)
        : [],
  };
}

/**
 * Exchanges a refresh token for a new token; "refused" if the host takes it no more. Throws ScmError: what `admit` throws,
 * or `unavailable` where the host does not answer as it should.
 */
export async function renewToken(
  guard: Guard,
  client: OAuthClient,
  refreshToken: string,
  signal: AbortSignal,
): Promise<RenewedToken | "refused"> {
  const { scmId, host, clientId, clientSecret } = client;
  const endpoint = tokenEndpoint(client);
  if (!endpoint) throw new ScmError("unavailable", `host ${host} gives out no tokens`);
  const form = new URLSearchParams({ grant_type: "refresh_token", refresh_token: refreshToken });
  const headers: Record<string, string> = {
    accept: "application/json",
    "content-type": "application/x-www-form-urlencoded",
    "user-agent": "berth",
  };
  if (scmId === "bitbucket") {
    headers.authorization = `Basic ${Buffer.from(`${clientId}:${clientSecret}`).toString("base64")}`;
  } else {
    form.set("client_id", clientId);
    form.set("client_secret", clientSecret);
  }
  if (scmId === "azuredevops_entra") form.set("scope", AZURE_SCOPES);
  const request = { method: "POST", headers, body: form.toString(), signal };
  const response = await guardedFetch(guard, endpoint, request, LIMITS);
  const answer = Object((await response.json().catch(() => undefined)) ?? {}) as Record<string, unknown>;
  if (REFUSALS.has(answer.error)) return "refused";
  const token = response.status === 200 ? renewed(answer) : undefined;
  if (!token) throw new ScmError("unavailable", `host ${host} did not renew the token`);
  return token;
}
