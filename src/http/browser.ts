import { Code, ConnectError } from "@connectrpc/connect";
import { codeToHttpStatus, codeToString } from "@connectrpc/connect/protocol-connect";
import type { App } from "../app.ts";
import { isSameOrigin } from "../domain/browser.ts";
import { databaseRefusal, denied, invalid, Refusal } from "../domain/errors.ts";
import { toConnectError } from "../rpc/errors.ts";
import { answerJson, type HttpHandler, type HttpRequest, type HttpResponse, readBody } from "./exchange.ts";
import { answerPage, html } from "./html.ts";

// What routes for browsers share: they answer with pages, redirects and cookies, and with JSON to whoever sends it.

const BODY_LIMITS = { bodyBytes: 16 * 1024, requestMs: 10_000 };

/** A request to one of these routes. */
export interface Visit {
  request: HttpRequest;
  response: HttpResponse;
  /** Parameters of the URL. */
  query: URLSearchParams;
}

type Serve = (visit: Visit) => void | Promise<void>;

const wantsJson = ({ headers }: HttpRequest) =>
  /^application\/json\b/i.test(headers["content-type"] ?? "") || /^application\/json\b/i.test(headers.accept ?? "");

/** What went wrong as a status; undefined for a mistake of this program. */
function statusOf(error: unknown): ConnectError | undefined {
  if (error instanceof ConnectError) return error;
  const refusal = error instanceof Refusal ? error : databaseRefusal(error);
  return refusal && toConnectError(refusal);
}

function refuse(
  { request, response }: Visit,
  { code, rawMessage }: ConnectError,
  headers: Record<string, string> = {},
) {
  const status = codeToHttpStatus(code);
  if (wantsJson(request))
    return answerJson(response, status, { code: codeToString(code), message: rawMessage }, headers);
  for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
  answerPage(response, status, { title: "This did not work", body: html`<p>${rawMessage}.</p>` });
}

const TOO_MANY = new ConnectError("too many requests, try again later", Code.ResourceExhausted);

/** A handler for each method. `limit` tells how long a caller has to wait, in milliseconds. */
export function browserRoute(
  methods: { GET?: Serve; POST?: Serve },
  limit: (peer: string) => number = () => 0,
): HttpHandler {
  const allow = Object.keys(methods).join(", ");
  return async (request, response, peer) => {
    const serve = methods[request.method as "GET" | "POST"];
    if (!serve) {
      request.resume();
      return answerJson(response, 405, { message: `use ${allow}` }, { allow });
    }
    const visit = { request, response, query: new URL(request.url ?? "", "http://here").searchParams };
    const waitMs = limit(peer);
    if (waitMs > 0) {
      request.resume();
      return refuse(visit, TOO_MANY, { "retry-after": String(Math.ceil(waitMs / 1000)) });
    }
    if (request.method === "GET") request.resume();
    try {
      await serve(visit);
    } catch (error) {
      const status = statusOf(error);
      if (!status) throw error;
      request.resume();
      refuse(visit, status);
    }
  };
}

/** Refuses what a page of another server makes a browser send. */
export function checkOrigin({ headers }: HttpRequest): void {
  const host = String(headers.host ?? headers[":authority"] ?? "");
  const origin = { origin: headers.origin, fetchSite: headers["sec-fetch-site"]?.toString(), host };
  if (!isSameOrigin(origin)) throw denied("this has to come from a page of this server");
}

/** Texts that a request carries, as a form or in JSON. */
export async function readFields({ request }: Visit): Promise<ReadonlyMap<string, string>> {
  const text = Buffer.from(await readBody(request, BODY_LIMITS, 0)).toString();
  if (!/^application\/json\b/i.test(request.headers["content-type"] ?? "")) return new Map(new URLSearchParams(text));
  try {
    const fields: unknown = JSON.parse(text);
    const isObject = typeof fields === "object" && fields !== null;
    const texts = Object.entries(isObject ? fields : {}).filter(([, value]) => typeof value === "string");
    return new Map(texts as [string, string][]);
  } catch {
    throw invalid({ field: "body", message: "is no JSON" });
  }
}

/** Sends the browser elsewhere, to be read there with GET. */
export function redirect(response: HttpResponse, location: string, cookies: readonly string[] = []): void {
  response.writeHead(303, {
    location,
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    ...(cookies.length > 0 && { "set-cookie": [...cookies] }),
  });
  response.end();
}

/** Answers JSON to whoever has sent JSON, and sends everybody else to a page. */
export function answerOrRedirect(
  { request, response }: Visit,
  body: object,
  location: string,
  cookies: readonly string[] = [],
): void {
  if (wantsJson(request)) {
    response.setHeader("set-cookie", [...cookies]);
    answerJson(response, 200, body, { "cache-control": "no-store" });
  } else redirect(response, location, cookies);
}

/** A path of this server as browsers see it, who may find it below another one. */
export const publicPath = ({ config }: App, path: string): string =>
  new URL(config.publicUrl).pathname.replace(/\/+$/, "") + path;
