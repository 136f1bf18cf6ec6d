import { join } from "node:path";
import { IntrospectTokenResponse_Kind as Kind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { drained, type HttpRequest, type HttpResponse } from "../http/exchange.ts";
import { type Access, bearerToken } from "./access.ts";
import { hasLog, type LogRequest, logText } from "./automations/logs.ts";
import type { ManagedEnvironment } from "./environment.ts";
import type { Environments } from "./environments.ts";
import type { EnvironmentLog } from "./logs.ts";
import { environmentPaths } from "./paths.ts";

/** What serving logs takes. */
export interface LogServerDeps {
  environments: Environments;
  access: Access;
  dataDir: string;
}

export const CORS = {
  "access-control-allow-origin": "*",
  "access-control-expose-headers": "*, grpc-status, grpc-message, grpc-status-details-bin",
};
/** Below the address of an environment: its log, that of a session of a service, that of an execution of a task. */
export const LOGS_PATH = /^(?:\/(services|tasks)\/([0-9a-f-]{36})\/([0-9a-f-]{1,64}))?\/logs$/;

const LOGS_KINDS = [Kind.ENVIRONMENT_ACCESS, Kind.ENVIRONMENT_LOGS];
const RECHECK_MS = 30_000;
const STALL = { stallMs: 60_000 };

export function answerText(
  response: HttpResponse,
  status: number,
  text: string,
  headers: Record<string, string> = {},
): void {
  response.writeHead(status, { "content-type": "text/plain; charset=utf-8", ...headers });
  response.end(text);
}

function begin(response: HttpResponse): void {
  response.writeHead(200, { "content-type": "text/plain; charset=utf-8", "cache-control": "no-store", ...CORS });
  response.flushHeaders();
}

/** The log of an environment: what is stored, then what comes until it has stopped or the reader leaves. */
async function* environmentText(log: EnvironmentLog, follow: boolean, signal: AbortSignal): AsyncGenerator<Buffer> {
  let position = 0;
  while (!signal.aborted) {
    const { data, next } = log.read(position);
    if (data.length > 0) yield data;
    if (next === position && (!follow || !log.live)) return;
    if (next === position) await log.changed(RECHECK_MS, signal);
    position = next;
  }
}

/** Sends a log until it ends, the reader leaves, or the token that opened it is withdrawn. */
async function send(
  response: HttpResponse,
  text: (signal: AbortSignal) => AsyncIterable<string | Buffer>,
  isWithdrawn: () => Promise<boolean>,
): Promise<void> {
  const left = new AbortController();
  response.once("close", () => left.abort());
  const recheck = setInterval(async () => {
    if (await isWithdrawn()) left.abort();
  }, RECHECK_MS);
  begin(response);
  try {
    for await (const data of text(left.signal)) {
      if (data.length > 0 && !response.write(data)) await drained(response, STALL);
      if (left.signal.aborted) break;
    }
  } finally {
    clearInterval(recheck);
  }
  response.end();
}

const count = (text: string | null) => (text !== null && /^\d{1,9}$/.test(text) ? Number(text) : undefined);

/** How a log of a service or an execution is asked for. */
function logRequest(environment: ManagedEnvironment, folder: string, query: URLSearchParams): LogRequest {
  return {
    ...{ folder, uid: environment.ownUid, follow: query.get("follow") !== "false" },
    ...{ tail: count(query.get("tail")), step: query.get("step") ?? undefined },
    timestamps: query.get("timestamps") === "true",
  };
}

/** Serves a log below the address of an environment. Who may read it is decided before anything else is told. */
export async function serveLog(
  { environments, access, dataDir }: LogServerDeps,
  { environmentId, path }: { environmentId: string; path: string },
  request: HttpRequest,
  response: HttpResponse,
): Promise<void> {
  const answer = (status: number, text: string, headers = {}) =>
    answerText(response, status, `${text}\n`, { ...CORS, ...headers });
  if (request.method !== "GET") return answer(405, "method not allowed", { allow: "GET, OPTIONS" });
  const token = bearerToken(request.headers.authorization);
  const verdict = await access.judge(token, environmentId, LOGS_KINDS);
  if (verdict === "none") return answer(401, "a valid logs token is needed", { "www-authenticate": "Bearer" });
  if (verdict === "other") return answer(403, "the token is for another environment");
  if (verdict === "unknown") return answer(502, "the token cannot be checked at the moment");
  const environment = environments.get(environmentId);
  if (!environment) return answer(404, "no such environment");
  const query = new URL(request.url ?? "", "http://runner").searchParams;
  const isWithdrawn = () => access.isWithdrawn(token ?? "", verdict.grant);
  const [, kind, owner = "", name = ""] = LOGS_PATH.exec(path) ?? [];
  if (kind) {
    const folder = join(environmentPaths(dataDir, environmentId).logs, "automations", kind, owner, name);
    if (!(await hasLog(folder))) return answer(404, "no such log");
    const asked = logRequest(environment, folder, query);
    return await send(response, (signal) => logText(asked, signal, () => !environment.log.live), isWithdrawn);
  }
  if (!environment.hasLog) return answer(502, "not ready yet");
  const follow = query.get("follow") !== "false";
  await send(response, (signal) => environmentText(environment.log, follow, signal), isWithdrawn);
}
