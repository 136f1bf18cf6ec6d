import { isIPv4 } from "node:net";

// What browsers bring and take beside pages: cookies, and where a request comes from.

/** How cookies are set by a server with this public URL. */
export interface CookieRules {
  /** Sent over TLS only, and bound to the host by the name. */
  secure: boolean;
  /** Name of the cookie of a browser that has signed in. */
  session: string;
  /** Name of the cookie of one that is about to. */
  flow: string;
}

/** Whether a host is this machine itself. */
export function isLoopback(hostname: string): boolean {
  const host = hostname.toLowerCase();
  return host === "localhost" || host === "[::1]" || (isIPv4(host) && host.startsWith("127."));
}

/** Cookies are secure, except for development on the loopback without TLS. */
export function cookieRules(publicUrl: string): CookieRules {
  const { protocol, hostname } = new URL(publicUrl);
  const secure = protocol === "https:" || !isLoopback(hostname);
  const prefix = secure ? "__Host-" : "";
  return { secure, session: `${prefix}berth_session`, flow: `${prefix}berth_oidc` };
}

/** Whether a cookie is for this server alone, though browsers send it to every port of the host. */
export const isOwnCookie = (name: string): boolean => /^(__Host-)?berth_(session|oidc)$/.test(name);

/** The value of a cookie in a request header; undefined if it is not there. */
export function cookieValue(header: string | null | undefined, name: string): string | undefined {
  for (const pair of (header ?? "").split(";")) {
    const [key, ...value] = pair.trim().split("=");
    if (key === name && value.length > 0) return value.join("=");
  }
  return undefined;
}

/** A response header that sets a cookie for `seconds`; 0 takes it away. */
export function setCookie(name: string, value: string, seconds: number, { secure }: CookieRules): string {
  const attributes = ["Path=/", `Max-Age=${seconds}`, "HttpOnly", "SameSite=Lax", ...(secure ? ["Secure"] : [])];
  return [`${name}=${value}`, ...attributes].join("; ");
}

/** What a request says of where it comes from. */
export interface Origin {
  origin: string | null | undefined;
  /** `Sec-Fetch-Site`, which pages cannot forge. */
  fetchSite: string | null | undefined;
  /** Host that the request was sent to. */
  host: string | undefined;
}

/** Whether a page of this server sent a request, and no other one that a browser shows. */
export function isSameOrigin({ origin, fetchSite, host }: Origin): boolean {
  if (fetchSite) return fetchSite === "same-origin";
  const from = origin ? URL.parse(origin) : null;
  return from !== null && /^https?:$/.test(from.protocol) && from.host === host?.toLowerCase();
}

/**
 * Where to send a browser afterwards: a path of this server, or a URL at one of `origins`; the root of this server for
 * anything else, which a link could lure somebody to.
 */
export function safeReturnTo(text: string, publicUrl: string, origins: readonly string[]): string {
  const { origin: own, pathname } = new URL(publicUrl);
  const root = `${pathname.replace(/\/+$/, "")}/`;
  const target = text === "" ? null : URL.parse(text, own);
  // Browsers read a backslash as a slash, and drop control characters.
  if (!target || /[\\\p{Cc}]/u.test(text) || target.username || target.password) return root;
  const path = target.pathname + target.search + target.hash;
  if (target.origin === own) return path.startsWith("//") ? root : path;
  return origins.includes(target.origin) ? target.href : root;
}
