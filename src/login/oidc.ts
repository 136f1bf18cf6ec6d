import {
  allowInsecureRequests,
  authorizationCodeGrant,
  buildAuthorizationUrl,
  type ClientAuth,
  ClientSecretBasic,
  ClientSecretPost,
  Configuration,
  calculatePKCECodeChallenge,
  clockTolerance,
  customFetch,
  discovery,
  enableNonRepudiationChecks,
  fetchUserInfo,
  None,
  type ServerMetadata,
} from "openid-client";
import type { App } from "../app.ts";
import { guardedFetch } from "../scm/fetch.ts";
import { createGuard, type Guard } from "../scm/guard.ts";

/** This server as a client of an OpenID provider. */
export interface OidcClient {
  issuer: string;
  clientId: string;
  clientSecret: string;
  /** Besides `openid email profile`. */
  scopes?: readonly string[];
}

/** What one login is tied to. */
export interface Checks {
  state: string;
  nonce: string;
  codeVerifier: string;
}

/** What a provider says about somebody, by claim. */
export type Claims = Readonly<Record<string, unknown>>;

/** Signs people in at OpenID providers, by the code flow with PKCE. */
export interface Oidc {
  /** Where to send a browser. */
  authorizationUrl(client: OidcClient, redirectUri: string, checks: Checks): Promise<string>;
  /**
   * Redeems the code in the URL that the browser came back to. The ID token's signature, issuer, audience, times and
   * nonce are checked; where it has no address, the claims of userinfo lie beneath its own.
   */
  claims(client: OidcClient, currentUrl: URL, checks: Checks): Promise<Claims>;
}

const TIMEOUT_MS = 10_000;
const MAX_BYTES = 1024 * 1024;
const KEEP_MS = 60 * 60_000;
const CLOCK_TOLERANCE_S = 60;
const SCOPES = ["openid", "email", "profile"];
const LOOPBACK = ["localhost", "127.0.0.1", "::1"];

/** Requests of the library, to hosts that the guard admits; admins stand for issuers, which may be private. */
function fetchThrough(guard: Guard) {
  return async (
    url: string,
    {
      method,
      headers,
      body,
      signal,
    }: { method: string; headers: Record<string, string>; body?: unknown; signal?: AbortSignal },
  ): Promise<Response> => {
    const text = body instanceof URLSearchParams ? body.toString() : (body as string | undefined);
    return guardedFetch(
      guard,
      url,
      { method, headers, ...(text != null && { body: text }), ...(signal && { signal }) },
      { timeoutMs: TIMEOUT_MS, maxBytes: MAX_BYTES, vouched: true },
    );
  };
}

/** How the token endpoint wants to know us: in the header unless it only takes the body. */
function authenticationOf(
  { token_endpoint_auth_methods_supported: methods }: ServerMetadata,
  secret: string,
): ClientAuth {
  const onlyBody = methods?.includes("client_secret_post") && !methods.includes("client_secret_basic");
  return onlyBody ? ClientSecretPost(secret) : ClientSecretBasic(secret);
}

export function createOidc(app: App): Oidc {
  const { loopbackIssuers } = app.config.login;
  const guard = createGuard({ allowHosts: loopbackIssuers ? LOOPBACK : [], schemes: [] });
  const fetch = fetchThrough(guard);
  const known = new Map<string, { metadata: Promise<ServerMetadata>; until: number }>();

  const insecure = ({ issuer }: OidcClient) => (issuer.startsWith("http:") ? [allowInsecureRequests] : []);

  async function discover(client: OidcClient): Promise<ServerMetadata> {
    const options = { [customFetch]: fetch, execute: insecure(client) };
    const found = await discovery(new URL(client.issuer), client.clientId, undefined, None(), options);
    return found.serverMetadata();
  }

  /** What a provider has published, kept for an hour; a failure is not kept. */
  function metadataOf(client: OidcClient): Promise<ServerMetadata> {
    const kept = known.get(client.issuer);
    const now = app.now().getTime();
    if (kept && now < kept.until) return kept.metadata;
    const metadata = discover(client);
    known.set(client.issuer, { metadata, until: now + KEEP_MS });
    metadata.catch(() => known.delete(client.issuer));
    return metadata;
  }

  // Made for each login: the keys of the provider are asked for each time, and so never out of date.
  async function configure(client: OidcClient): Promise<Configuration> {
    const metadata = await metadataOf(client);
    const { clientId, clientSecret } = client;
    const options = { [clockTolerance]: CLOCK_TOLERANCE_S };
    const auth = authenticationOf(metadata, clientSecret);
    const configuration = new Configuration(metadata, clientId, options, auth);
    configuration[customFetch] = fetch;
    for (const enable of [enableNonRepudiationChecks, ...insecure(client)]) enable(configuration);
    return configuration;
  }

  return {
    async authorizationUrl(client, redirectUri, { state, nonce, codeVerifier }) {
      const scope = [...new Set([...SCOPES, ...(client.scopes ?? [])])].join(" ");
      const challenge = await calculatePKCECodeChallenge(codeVerifier);
      const parameters = {
        ...{ redirect_uri: redirectUri, scope, state, nonce, response_type: "code" },
        ...{ code_challenge: challenge, code_challenge_method: "S256" },
      };
      return buildAuthorizationUrl(await configure(client), parameters).href;
    },
    async claims(client, currentUrl, { state, nonce, codeVerifier }) {
      const configuration = await configure(client);
      const tokens = await authorizationCodeGrant(configuration, currentUrl, {
        ...{ expectedState: state, expectedNonce: nonce, pkceCodeVerifier: codeVerifier, idTokenExpected: true },
      });
      const claims = tokens.claims();
      if (!claims) throw new Error("the provider gave no ID token");
      if (claims.email || !configuration.serverMetadata().userinfo_endpoint) return claims;
      return { ...(await fetchUserInfo(configuration, tokens.access_token, claims.sub)), ...claims };
    },
  };
}
