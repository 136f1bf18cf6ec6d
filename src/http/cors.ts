import { cors } from "@connectrpc/connect";
import type { HttpRequest, HttpResponse } from "./exchange.ts";

/** Origins whose pages may call the API; all of them may, because only a token that a page holds opens anything. */
export type CorsOrigins = "*" | readonly string[];

const PREFLIGHT_SECONDS = 7200;
const HEADER_LIST = /^[\w-]+(, ?[\w-]+){0,50}$/;

const METHODS = cors.allowedMethods.join(", ");
const REQUEST_HEADERS = [...cors.allowedHeaders, "Authorization", "X-Request-Id"].join(", ");
const EXPOSED_HEADERS = [
  ...cors.exposedHeaders,
  "X-Request-Id",
  "X-Should-Retry",
  "Retry-After",
  "RateLimit-RetryAfter",
  "WWW-Authenticate",
].join(", ");

/** Sets what browsers want to know about calls from other origins; true if that was all they asked. */
export function answerCors(request: HttpRequest, response: HttpResponse, origins: CorsOrigins): boolean {
  const { origin } = request.headers;
  if (typeof origin !== "string") return false;
  const isAllowed = origins === "*" || origins.includes(origin);
  const isPreflight = request.method === "OPTIONS" && request.headers["access-control-request-method"] !== undefined;
  if (origins !== "*") response.setHeader("vary", "Origin");
  if (isAllowed) {
    response.setHeader("access-control-allow-origin", origins === "*" ? "*" : origin);
    response.setHeader("access-control-expose-headers", EXPOSED_HEADERS);
  }
  if (!isPreflight) return false;
  if (isAllowed) {
    // SDKs add headers of their own; none of them opens anything.
    const wanted = String(request.headers["access-control-request-headers"] ?? "");
    response.setHeader("access-control-allow-methods", METHODS);
    response.setHeader("access-control-allow-headers", HEADER_LIST.test(wanted) ? wanted : REQUEST_HEADERS);
    response.setHeader("access-control-max-age", String(PREFLIGHT_SECONDS));
  }
  response.writeHead(204);
  response.end();
  return true;
}
