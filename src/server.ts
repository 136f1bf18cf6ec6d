import { Code, ConnectError, type ConnectRouter, type Interceptor } from "@connectrpc/connect";
import type { Logger } from "pino";
import { Gauge } from "prom-client";
import { Health } from "../gen/grpc/health/v1/health_pb.js";
import { ServerReflection } from "../gen/grpc/reflection/v1/reflection_pb.js";
import { ServerReflection as ServerReflectionAlpha } from "../gen/grpc/reflection/v1alpha/reflection_pb.js";
import { answerError } from "./http/answers.ts";
import { entry, requestGate, serveBridged } from "./http/bridge.ts";
import { answerCors, type CorsOrigins } from "./http/cors.ts";
import { directFormat, type Gate, serveDirectly } from "./http/direct.ts";
import {
  answerJson,
  breakOff,
  type Exchange,
  type HttpHandler,
  type HttpRequest,
  type HttpResponse,
  isHttp2,
  type Limits,
} from "./http/exchange.ts";
import { healthService } from "./http/health.ts";
import { listen } from "./http/listener.ts";
import { operations } from "./http/operations.ts";
import { peerResolver } from "./http/peer.ts";
import { type Readiness, type Ready, readinessOf } from "./http/readiness.ts";
import { reflectionService } from "./http/reflection.ts";
import { collectRpcs, type Rpc, type Rpcs } from "./http/rpcs.ts";
import { newCall } from "./rpc/call.ts";
import { describeError } from "./rpc/observe.ts";

export type { Gate, HttpHandler, HttpRequest, HttpResponse, Limits };

const MIB = 1024 * 1024;
const DEFAULT_LIMITS: Limits = {
  bodyBytes: 4 * MIB,
  answerBytes: 64 * MIB,
  headerBytes: 32 * 1024,
  headersMs: 15_000,
  requestMs: 60_000,
  stallMs: 60_000,
  idleMs: 120_000,
  connections: 10_000,
  streamsPerConnection: 250,
  calls: 5000,
  streams: 10_000,
};
const GRACE_MS = 30_000;
const RPC_PATH = /^\/[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\/[A-Za-z_]\w*$/;
// How long calls that were told to end may take for it, and connections after that.
const LAST_CALLS_MS = 1000;
const CLOSE_MS = 250;

export interface ServerOptions {
  host: string;
  /** 0 takes a free one. */
  port: number;
  routes: (router: ConnectRouter) => void;
  /** Around every call, the first one outermost. */
  interceptors: Interceptor[];
  /** Runs before the body of a request is read; throws to refuse the call. */
  gate?: Gate;
  /** Other paths: exact ones, or all below one that ends in a slash and is more than that. */
  http?: ReadonlyMap<string, HttpHandler>;
  /** Opens `/metrics`; open to everybody without. */
  metricsToken?: string;
  /** Whether the server can take calls now, apart from draining. */
  ready: () => Promise<Ready>;
  log: Logger;
  /** Addresses or networks of proxies whose `X-Forwarded-For` is believed. */
  trustedProxies?: readonly string[];
  /** Origins whose pages may call, by default all. */
  corsOrigins?: CorsOrigins;
  limits?: Partial<Limits>;
  /** False sends every call through the protocols of connect, which is slower and must make no other difference. */
  direct?: boolean;
}

/** An open port that serves RPCs. */
export interface Server {
  readonly port: number;
  /** Base URL for clients on this machine. */
  readonly url: string;
  /**
   * Ends in peace: not ready from now on, streams end with UNAVAILABLE, new calls are refused so, and those in flight
   * have `graceMs`, by default 30 s, to finish. Resolves when every connection is closed.
   */
  drain(graceMs?: number): Promise<void>;
  /** Ends at once. */
  close(): Promise<void>;
}

const shuttingDown = () => new ConnectError("the server is shutting down", Code.Unavailable);

function urlOf(host: string, port: number): string {
  const reachable = host === "0.0.0.0" || host === "::" ? "127.0.0.1" : host;
  return `http://${reachable.includes(":") ? `[${reachable}]` : reachable}:${port}`;
}

const inFlight = new Gauge({ name: "berth_rpc_in_flight", help: "Calls in flight by kind", labelNames: ["kind"] });

type Kind = "unary" | "stream";

/** Calls in flight. */
class Traffic {
  readonly #open: Record<Kind, Set<Exchange>> = { unary: new Set(), stream: new Set() };
  readonly #whenIdle: (() => void)[] = [];

  of(kind: Kind): ReadonlySet<Exchange> {
    return this.#open[kind];
  }

  enter(kind: Kind, exchange: Exchange): void {
    this.#open[kind].add(exchange);
    inFlight.labels(kind).inc();
  }

  leave(kind: Kind, exchange: Exchange): void {
    if (!this.#open[kind].delete(exchange)) return;
    inFlight.labels(kind).dec();
    if (this.#isIdle()) for (const resolve of this.#whenIdle.splice(0)) resolve();
  }

  #isIdle(): boolean {
    return this.#open.unary.size + this.#open.stream.size === 0;
  }

  /** Resolves when nothing is in flight, or after so many milliseconds. */
  async idle(withinMs: number): Promise<void> {
    if (this.#isIdle()) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#whenIdle.push(resolve);
    const timer = setTimeout(resolve, withinMs);
    await promise;
    clearTimeout(timer);
  }
}

/** Handlers by path: exact ones first, then those for all paths below one; `/` is itself alone. */
function finder(handlers: ReadonlyMap<string, HttpHandler>): (path: string) => HttpHandler | undefined {
  const folders = [...handlers]
    .filter(([path]) => path.length > 1 && path.endsWith("/"))
    .sort(([a], [b]) => b.length - a.length);
  return (path) => handlers.get(path) ?? folders.find(([folder]) => path.startsWith(folder))?.[1];
}

/** Opens a port and serves until it is drained or closed. Rejects if the port cannot be had. */
export async function startServer(options: ServerOptions): Promise<Server> {
  const { log, interceptors, gate, direct = true, corsOrigins = "*" } = options;
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const peerOf = peerResolver(options.trustedProxies ?? []);
  const traffic = new Traffic();
  const draining = new AbortController();
  const shutdown = { stream: new AbortController(), unary: new AbortController() };
  const readiness = readinessOf(options.ready, draining.signal);
  const rpcs: Rpcs = collectRpcs([options.routes, (router) => ownServices(router, readiness, () => rpcs)], {
    ...{ interceptors, entry, limits },
    requestGate: requestGate(log, gate),
    shutdown: { streams: shutdown.stream.signal, calls: shutdown.unary.signal },
  });
  const find = finder(new Map([...operations(readiness, options.metricsToken), ...(options.http ?? [])]));
  const directOptions = { limits, log, gate, jsonTypes: rpcs.jsonTypes };

  const broken = (response: HttpResponse, path: string) => (error: unknown) => {
    log.error({ error: describeError(error), path }, "a request was not served");
    if (response.headersSent) breakOff(response);
    else answerJson(response, 500, { code: "internal", message: "internal error" });
  };

  async function serveRpc(rpc: Rpc, exchange: Exchange): Promise<void> {
    const format = directFormat(rpc.method, exchange.request);
    // Connect knows nothing of JSON lines.
    if (format && (direct || format.protocol === "jsonl")) return serveDirectly(directOptions, rpc, format, exchange);
    return serveBridged(limits, rpc, exchange);
  }

  async function admit(rpc: Rpc, request: HttpRequest, response: HttpResponse) {
    const kind = rpc.method.methodKind === "unary" ? "unary" : "stream";
    const isFull = traffic.of(kind).size >= (kind === "unary" ? limits.calls : limits.streams);
    // Health is asked about most when it is bad.
    const isRefused = draining.signal.aborted && rpc.method.parent.typeName !== Health.typeName;
    if (isFull || isRefused) {
      request.resume();
      if (!isHttp2(request)) response.setHeader("connection", "close");
      const reason = new ConnectError("too many calls are in flight", Code.Unavailable);
      return answerError(request, response, isRefused ? shuttingDown() : reason);
    }
    const authority = request.headers.host ?? request.headers[":authority"] ?? "";
    const call = newCall(request.headers["x-request-id"]?.toString(), peerOf(request), String(authority));
    const exchange: Exchange = { request, response, url: `http://${authority}${request.url}`, call, closed: false };
    let served = false;
    traffic.enter(kind, exchange);
    response.once("close", () => {
      exchange.closed = true;
      if (served) traffic.leave(kind, exchange);
      else exchange.abort?.(new ConnectError("the caller left", Code.Canceled));
    });
    try {
      await serveRpc(rpc, exchange);
    } finally {
      served = true;
      if (exchange.closed) traffic.leave(kind, exchange);
    }
  }

  async function route(path: string, request: HttpRequest, response: HttpResponse) {
    const handler = find(path);
    if (handler) return handler(request, response, peerOf(request));
    if (answerCors(request, response, corsOrigins)) return;
    const rpcPath = path.startsWith("/api/") ? path.slice("/api".length) : path;
    const rpc = rpcs.byPath.get(rpcPath);
    if (rpc) return admit(rpc, request, response);
    request.resume();
    if (!RPC_PATH.test(rpcPath)) return answerJson(response, 404, { code: "not_found", message: "nothing is here" });
    const message = `${rpcPath.slice(1)} is not implemented`;
    answerError(request, response, new ConnectError(message, Code.Unimplemented));
  }

  const listener = await listen({ host: options.host, port: options.port, limits }, (request, response) => {
    // Connections break all the time; whoever serves the request learns it from the end of the response.
    response.on("error", () => undefined);
    const [path = ""] = (request.url ?? "").split("?", 1);
    route(path, request, response).catch(broken(response, path));
  });

  function end(kind: Kind): void {
    shutdown[kind].abort(shuttingDown());
    for (const exchange of traffic.of(kind)) exchange.abort?.(shuttingDown());
  }

  async function drain(graceMs: number): Promise<void> {
    draining.abort();
    for (const { request, response } of [...traffic.of("unary"), ...traffic.of("stream")]) {
      if (!isHttp2(request) && !response.headersSent) response.setHeader("connection", "close");
    }
    end("stream");
    listener.goAway();
    await traffic.idle(graceMs);
    end("unary");
    await traffic.idle(LAST_CALLS_MS);
    await listener.close(CLOSE_MS);
  }

  let drained: Promise<void> | undefined;
  return {
    port: listener.port,
    url: urlOf(options.host, listener.port),
    drain(graceMs = GRACE_MS) {
      drained ??= drain(graceMs);
      return drained;
    },
    async close() {
      draining.abort();
      end("stream");
      end("unary");
      await listener.close(0);
    },
  };
}

function ownServices(router: ConnectRouter, readiness: Readiness, rpcs: () => Rpcs): void {
  const names = () => rpcs().services.map(({ typeName }) => typeName);
  const reflection = reflectionService(() => rpcs().services);
  router.service(Health, healthService(readiness, names));
  router.service(ServerReflection, reflection.v1);
  router.service(ServerReflectionAlpha, reflection.v1alpha);
}
