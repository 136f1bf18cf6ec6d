import type { IncomingMessage } from "node:http";
import type { Duplex } from "node:stream";
import { Code, ConnectError, createContextKey, createContextValues, type Interceptor } from "@connectrpc/connect";
import { compressionBrotli, compressionGzip } from "@connectrpc/connect-node";
import type { Logger } from "pino";
import { Gauge, Registry } from "prom-client";
import { IntrospectTokenResponse_Kind as Kind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentOpsService } from "../../gen/supervisor/v1/environmentopts_pb.js";
import { answerError } from "../http/answers.ts";
import type { HttpRequest, HttpResponse, Limits } from "../http/exchange.ts";
import { type Listener, listen } from "../http/listener.ts";
import { type Access, bearerToken, type Grant } from "./access.ts";
import { answerText, CORS, LOGS_PATH, type LogServerDeps, serveLog } from "./log-server.ts";
import { OpenStreams } from "./open-streams.ts";
import { refuseUpgrade } from "./ports/proxy.ts";
import { portRoute } from "./ports/route.ts";
import { portServer } from "./ports/server.ts";
import { connectHandler } from "./supervisor/connect-handler.ts";
import { forwardOps } from "./supervisor/forward.ts";
import { MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES } from "./supervisor/ops.ts";

/** What the port of a runner serves. */
export interface ServerDeps extends LogServerDeps {
  host: string;
  port: number;
  /** Public base URL of this runner. */
  publicUrl(): string;
  /** Domain below which each port has a host of its own. */
  portDomain: string | undefined;
  /** Base URL of the control plane for browsers. */
  signInUrl: string;
  /** The organization shares no ports. */
  isSharingOff(): boolean;
  /** The link to the control plane is in force. */
  connected(): boolean;
  log: Logger;
  /** Milliseconds between two looks at the token of an open stream, by default 30 s. */
  recheckMs?: number;
}

const LIMITS: Limits = {
  bodyBytes: MAX_REQUEST_BYTES,
  answerBytes: MAX_RESPONSE_BYTES,
  headerBytes: 64 * 1024,
  headersMs: 30_000,
  requestMs: 5 * 60_000,
  stallMs: 60_000,
  idleMs: 75_000,
  connections: 2_000,
  streamsPerConnection: 200,
  calls: 1_000,
  streams: 1_000,
};
const RECHECK_MS = 30_000;
/** Smallest message that is worth compressing. */
const COMPRESS_MIN_BYTES = 16 * 1024;
const PATH = /^\/environments\/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(\/.*)$/;
const OPS_PATH = /^\/ops(\/|$)/;
const OPS_KINDS = [Kind.ENVIRONMENT_ACCESS, Kind.ENVIRONMENT];
/** Calls that only look. Everything else may change files. */
const LOOKING = /^(List|Get|Watch|Find|ReadFile|ReadTerminal|AttachTerminal)/;
const PREFLIGHT = {
  ...CORS,
  "access-control-allow-methods": "GET, POST, OPTIONS",
  "access-control-allow-headers":
    "authorization, content-type, connect-protocol-version, connect-timeout-ms, connect-accept-encoding, connect-content-encoding, grpc-timeout, x-grpc-web, x-user-agent, range",
  "access-control-max-age": "7200",
};

/** What the token of an operation opens, or the reason to refuse it, as the caller sees it. */
async function judgeOperation(access: Access, token: string | undefined, environmentId: string) {
  const verdict = await access.judge(token, environmentId, OPS_KINDS);
  switch (verdict) {
    case "none":
      return new ConnectError("a valid environment access token is needed", Code.Unauthenticated);
    case "other":
      return new ConnectError("the token is for another environment", Code.PermissionDenied);
    case "unknown":
      return new ConnectError("the token cannot be checked at the moment", Code.Unavailable);
    default:
      return verdict.grant;
  }
}

/** An operation that somebody may use. */
interface Operation {
  environmentId: string;
  token: string;
  grant: Grant;
}

const operationKey = createContextKey<Operation | undefined>(undefined, { description: "operation" });

/** Ends the public protocols and passes each call on to the supervisor of its environment. */
function operations({ environments, access }: ServerDeps, streams: OpenStreams) {
  const follow: Interceptor = (next) => async (request) => {
    const operation = request.contextValues.get(operationKey);
    if (!operation) throw new ConnectError("a valid environment access token is needed", Code.Unauthenticated);
    const { environmentId, token, grant } = operation;
    const touch = () => {
      if (!LOOKING.test(request.method.name)) environments.get(environmentId)?.touched();
    };
    touch();
    const response = await next(request);
    touch();
    if (!response.stream) return response;
    return { ...response, message: streams.pass(response.message, () => access.isWithdrawn(token, grant)) };
  };
  const implementation = forwardOps(async (context) => {
    const environmentId = context.values.get(operationKey)?.environmentId ?? "";
    const client = environments.get(environmentId)?.operations;
    if (!client) throw new ConnectError("the environment is not running", Code.Unavailable);
    return client;
  });
  return connectHandler((router) => router.service(EnvironmentOpsService, implementation), {
    interceptors: [follow],
    acceptCompression: [compressionGzip, compressionBrotli],
    compressMinBytes: COMPRESS_MIN_BYTES,
    readMaxBytes: LIMITS.bodyBytes,
    writeMaxBytes: LIMITS.answerBytes,
    stallMs: LIMITS.stallMs,
  });
}

function metrics({ environments, connected }: ServerDeps): Registry {
  const registry = new Registry();
  new Gauge({
    name: "berth_runner_environments",
    help: "Environments on this host, and how many of them run",
    labelNames: ["state"],
    registers: [registry],
    collect() {
      for (const [state, count] of Object.entries(environments.counts())) this.set({ state }, count);
    },
  });
  new Gauge({
    name: "berth_runner_connected",
    help: "1 while the control plane answers",
    registers: [registry],
    collect() {
      this.set(connected() ? 1 : 0);
    },
  });
  return registry;
}

/** Serves the operations of environments. Who may use them is decided before anything of the request is read. */
function operationsHandler(deps: ServerDeps, streams: OpenStreams) {
  const serve = operations(deps, streams);
  return async (environmentId: string, request: HttpRequest, response: HttpResponse): Promise<void> => {
    for (const [name, value] of Object.entries(CORS)) response.setHeader(name, value);
    const token = bearerToken(request.headers.authorization);
    const grant = await judgeOperation(deps.access, token, environmentId);
    if (grant instanceof ConnectError) return answerError(request, response, grant);
    // Connect sees the path below the environment.
    const url = request.url ?? "";
    request.url = url.slice(url.indexOf("/ops") + "/ops".length);
    const operation = { environmentId, token: token ?? "", grant };
    await serve(request as IncomingMessage, response, createContextValues().set(operationKey, operation));
  };
}

/** Opens the port of the runner: logs and operations of environments, health and metrics. */
export async function startRunnerServer(deps: ServerDeps): Promise<Listener> {
  const streams = new OpenStreams(LIMITS.streams, deps.recheckMs ?? RECHECK_MS);
  const serveOperation = operationsHandler(deps, streams);
  const registry = metrics(deps);
  const ports = portServer({ ...deps, domain: deps.portDomain });
  const portRouteOf = ({ headers, url = "" }: HttpRequest) =>
    portRoute(String(headers.host ?? headers[":authority"] ?? ""), url, deps.portDomain);
  const serve = async (request: HttpRequest, response: HttpResponse): Promise<void> => {
    const route = portRouteOf(request);
    if (route) return await ports.serve(route, request, response);
    const [path = ""] = (request.url ?? "").split("?", 1);
    const [, environmentId = "", part = ""] = PATH.exec(path) ?? [];
    const [isOps, isLog] = [OPS_PATH.test(part), LOGS_PATH.test(part)];
    if ((isOps || isLog) && request.method === "OPTIONS") {
      response.writeHead(204, PREFLIGHT);
      response.end();
      return;
    }
    if (isOps) return await serveOperation(environmentId, request, response);
    if (isLog) return await serveLog(deps, { environmentId, path: part }, request, response);
    switch (path) {
      case "/healthz":
        return answerText(response, 200, "ok\n");
      case "/readyz":
        return deps.connected()
          ? answerText(response, 200, "ok\n")
          : answerText(response, 503, "the control plane does not answer\n");
      case "/metrics":
        return answerText(response, 200, await registry.metrics(), { "content-type": registry.contentType });
      default:
        return answerText(response, 404, "not found\n");
    }
  };
  const upgrade = async (request: IncomingMessage, socket: Duplex, head: Buffer): Promise<void> => {
    const route = portRouteOf(request);
    if (route) return await ports.upgrade(route, request, socket, head);
    refuseUpgrade(socket, 404, "not found");
  };
  const failed = (error: unknown) => deps.log.error({ err: error }, "a request failed");
  const listener = await listen(
    { host: deps.host, port: deps.port, limits: LIMITS },
    (request, response) => {
      response.on("error", () => undefined);
      serve(request, response).catch((error: unknown) => {
        failed(error);
        if (response.headersSent || response.destroyed) response.destroy();
        else answerText(response, 500, "internal error\n");
      });
    },
    (request, socket, head) => {
      socket.on("error", () => undefined);
      upgrade(request, socket, head).catch((error: unknown) => {
        failed(error);
        socket.destroy();
      });
    },
  );
  return {
    ...listener,
    close(withinMs) {
      streams.endAll();
      return listener.close(withinMs);
    },
  };
}
