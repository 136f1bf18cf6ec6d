import type { IncomingHttpHeaders } from "node:http";
import { tokenKind } from "../../domain/tokens.ts";
import { bearerToken } from "../access.ts";

/** Query parameter with which a browser comes back from signing in. */
export const TOKEN_PARAMETER = "berth_port_token";
const COOKIE = "berth_port";
const COOKIE_SECONDS = 3600;

/** A token that a request carries, and how. */
export interface Presented {
  token: string;
  by: "header" | "cookie" | "query";
}

function cookies(header: string | undefined): [name: string, value: string][] {
  return (header ?? "").split(";").flatMap((pair) => {
    const [name = "", ...value] = pair.trim().split("=");
    return name ? [[name, value.join("=")] as [string, string]] : [];
  });
}

/**
 * The credential for the port itself. A bearer token that is none of ours is the service's business, and so is every
 * cookie but one.
 */
export function presented(headers: IncomingHttpHeaders, target: string): Presented | undefined {
  const query = new URL(target, "http://port").searchParams.get(TOKEN_PARAMETER);
  if (query) return { token: query, by: "query" };
  const bearer = bearerToken(headers.authorization);
  if (bearer && tokenKind(bearer)) return { token: bearer, by: "header" };
  const cookie = cookies(headers.cookie).find(([name]) => name === COOKIE)?.[1];
  return cookie ? { token: cookie, by: "cookie" } : undefined;
}

/** Headers without what only the runner may see. */
export function withoutCredential(headers: IncomingHttpHeaders): IncomingHttpHeaders {
  const { authorization, cookie, ...rest } = headers;
  const others = cookies(cookie).filter(([name]) => name !== COOKIE);
  const bearer = bearerToken(authorization);
  return {
    ...rest,
    ...(authorization && !(bearer && tokenKind(bearer)) && { authorization }),
    ...(others.length > 0 && { cookie: others.map(([name, value]) => `${name}=${value}`).join("; ") }),
  };
}

/** The target without the parameter that brought the token. */
export function withoutToken(target: string): string {
  const url = new URL(target, "http://port");
  url.searchParams.delete(TOKEN_PARAMETER);
  // Two slashes at the front would lead to another host.
  return url.pathname.replace(/^\/{2,}/, "/") + url.search;
}

/** Keeps the token in the browser, for this port only. */
export function portCookie(token: string, prefix: string, isSecure: boolean): string {
  const attributes = [`Path=${prefix}/`, `Max-Age=${COOKIE_SECONDS}`, "HttpOnly", "SameSite=Lax"];
  return [`${COOKIE}=${token}`, ...attributes, ...(isSecure ? ["Secure"] : [])].join("; ");
}
