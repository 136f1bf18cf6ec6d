import { isLoopback } from "../domain/browser.ts";
import { ConfigError, type Reader, readSecret } from "./reader.ts";

/** An OIDC provider that the operator has set up for the whole installation. */
export interface OidcProviderConfig {
  id: string;
  name: string;
  issuer: string;
  clientId: string;
  clientSecret: string;
}

/** How people sign in with a browser. */
export interface LoginConfig {
  providers: readonly OidcProviderConfig[];
  /** A browser login ends when it has not been used for so long, and in any case after its lifetime. */
  sessionIdleMs: number;
  sessionMaxMs: number;
  /** Origins besides our own that a browser may be sent back to. */
  returnToOrigins: readonly string[];
  /** Issuers on this machine may do without TLS. */
  loopbackIssuers: boolean;
}

const PROVIDERS = "BERTH_OIDC_PROVIDERS";
const KEYS = ["id", "name", "issuer", "client_id", "client_secret", "client_secret_file"] as const;
const PROVIDER_ID = /^[a-z0-9][a-z0-9-]{0,31}$/;
// What accounts of other origin are marked with.
const TAKEN_IDS = ["custom", "local"];
const MINUTE_MS = 60_000;
const YEAR_MS = 365 * 24 * 60 * MINUTE_MS;

/** Whether an issuer may be asked: by https, and on the loopback by http if that is allowed; without query or fragment. */
export function isIssuer(text: string, loopbackIssuers: boolean): boolean {
  const url = URL.parse(text);
  if (!url || /[?#@\s]/.test(text)) return false;
  if (url.protocol === "https:") return true;
  return url.protocol === "http:" && loopbackIssuers && isLoopback(url.hostname);
}

function secretOf(given: Partial<Record<(typeof KEYS)[number], string>>, id: string): string {
  const { client_secret: secret, client_secret_file: file } = given;
  if (secret && file) throw new ConfigError(`${PROVIDERS} gives ${id} both a client_secret and a client_secret_file`);
  const text = file ? readSecret(file) : secret?.trim();
  if (!text)
    throw new ConfigError(`${PROVIDERS} gives ${id} no client_secret, or a client_secret_file that holds none`);
  return text;
}

function providers(read: Reader, loopbackIssuers: boolean): OidcProviderConfig[] {
  const given = read.objects(PROVIDERS, KEYS) ?? [];
  const found = given.map((each): OidcProviderConfig => {
    const { id = "", name = id, issuer = "", client_id: clientId = "" } = each;
    if (!PROVIDER_ID.test(id) || TAKEN_IDS.includes(id)) {
      throw new ConfigError(`${PROVIDERS} must give each provider an id of small letters, digits and dashes`);
    }
    if (!isIssuer(issuer, loopbackIssuers)) {
      throw new ConfigError(
        `${PROVIDERS} must give ${id} an https issuer without query or fragment; on the loopback http is possible with BERTH_LOOPBACK_ISSUERS=on`,
      );
    }
    if (!clientId) throw new ConfigError(`${PROVIDERS} gives ${id} no client_id`);
    return { id, name: name.trim() || id, issuer, clientId, clientSecret: secretOf(each, id) };
  });
  if (new Set(found.map(({ id }) => id)).size < found.length)
    throw new ConfigError(`${PROVIDERS} must not use an id twice`);
  return found;
}

const isOrigin = (text: string) => /^https?:$/.test(URL.parse(text)?.protocol ?? "") && new URL(text).origin === text;

export function loginConfig(read: Reader): LoginConfig {
  const loopbackIssuers = read.flag("BERTH_LOOPBACK_ISSUERS", false);
  const sessionMaxMs = read.duration("BERTH_SESSION_MAX", "168h", MINUTE_MS, YEAR_MS);
  const sessionIdleMs = read.duration("BERTH_SESSION_IDLE", "24h", MINUTE_MS, YEAR_MS);
  return {
    providers: providers(read, loopbackIssuers),
    ...{ sessionIdleMs, sessionMaxMs, loopbackIssuers },
    returnToOrigins: read.list("BERTH_RETURN_TO_ORIGINS", isOrigin, "origins such as https://berth.example.org"),
  };
}
