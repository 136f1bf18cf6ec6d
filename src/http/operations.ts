import { createHash, timingSafeEqual } from "node:crypto";
import { collectDefaultMetrics, register } from "prom-client";
import { answerJson, type HttpHandler, type HttpRequest, type HttpResponse } from "./exchange.ts";
import { onlyGet } from "./methods.ts";
import type { Readiness } from "./readiness.ts";

const digest = (text: string) => createHash("sha256").update(text).digest();

function metrics(token: string | undefined): HttpHandler {
  if (!register.getSingleMetric("process_cpu_seconds_total")) collectDefaultMetrics();
  const expected = token === undefined ? undefined : digest(token);
  const isOpen = (request: HttpRequest) => {
    const [, given = ""] = /^bearer +(\S+)$/i.exec(request.headers.authorization ?? "") ?? [];
    return expected === undefined || timingSafeEqual(digest(given), expected);
  };
  return async (request, response) => {
    if (!isOpen(request)) {
      return answerJson(response, 401, { message: "a bearer token is needed" }, { "www-authenticate": "Bearer" });
    }
    const text = await register.metrics();
    response.writeHead(200, { "content-type": register.contentType });
    response.end(text);
  };
}

async function answerReadiness(readiness: Readiness, response: HttpResponse): Promise<void> {
  const { ok, reason } = await readiness.check();
  if (ok) answerJson(response, 200, { status: "ready" });
  else answerJson(response, 503, { status: "not ready", reason: reason ?? "unknown" });
}

/** What operators and orchestrators ask, by path. `/metrics` wants the token if there is one. */
export function operations(readiness: Readiness, metricsToken: string | undefined): Map<string, HttpHandler> {
  return new Map([
    ["/healthz", onlyGet((_request, response) => answerJson(response, 200, { status: "alive" }))],
    ["/readyz", onlyGet((_request, response) => answerReadiness(readiness, response))],
    ["/metrics", onlyGet(metrics(metricsToken))],
  ]);
}
