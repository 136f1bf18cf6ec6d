import type { IncomingHttpHeaders } from "node:http";
import { isOwnCookie } from "../../domain/browser.ts";
import { PORT_TOKEN_PARAMETER, withoutPortToken } from "../../domain/environment-ports.ts";
import { tokenKind } from "../../domain/tokens.ts";
import { bearerToken } from "../access.ts";

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

// Put together, since a target that begins with two slashes is no address of its own.
const addressOf = (target: string) => new URL(`http://port${target}`);

/**
 * The credential for the port itself. A bearer token that is none of ours is the service's business, and so is every
 * cookie but one.
 */
export function presented(headers: IncomingHttpHeaders, target: string): Presented | undefined {
  const query = addressOf(target).searchParams.get(PORT_TOKEN_PARAMETER);
  if (query) return { token: query, by: "query" };
  const bearer = bearerToken(headers.authorization);
  if (bearer && tokenKind(bearer)) return { token: bearer, by: "header" };
  const cookie = cookies(headers.cookie).find(([name]) => name === COOKIE)?.[1];
  return cookie ? { token: cookie, by: "cookie" } : undefined;
}

/** Headers without what only the runner may see, nor the control plane's cookies, which come along on a shared host. */
export function withoutCredential(headers: IncomingHttpHeaders): IncomingHttpHeaders {
  const { authorization, cookie, ...rest } = headers;
  const others = cookies(cookie).filter(([name]) => name !== COOKIE && !isOwnCookie(name));
  const bearer = bearerToken(authorization);
  return {
    ...rest,
    ...(authorization && !(bearer && tokenKind(bearer)) && { authorization }),
    ...(others.length > 0 && { cookie: others.map(([name, value]) => `${name}=${value}`).join("; ") }),
  };
}

/** The target without the parameter that brought the token. */
export function withoutToken(target: string): string {
  const { pathname, search } = addressOf(target);
  // Two slashes at the front would lead to another host.
  return pathname.replace(/^\/{2,}/, "/") + withoutPortToken(search);
}

/** Keeps the token in the browser, for this port only. */
export function portCookie(token: string, prefix: string, isSecure: boolean): string {
  const attributes = [`Path=${prefix}/`, `Max-Age=${COOKIE_SECONDS}`, "HttpOnly", "SameSite=Lax"];
  return [`${COOKIE}=${token}`, ...attributes, ...(isSecure ? ["Secure"] : [])].join("; ");
}
