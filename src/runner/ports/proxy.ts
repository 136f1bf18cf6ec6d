import {
  type ClientRequest,
  type IncomingHttpHeaders,
  type IncomingMessage,
  type OutgoingHttpHeaders,
  request as requestHttp,
} from "node:http";
import { request as requestHttps } from "node:https";
import type { Duplex } from "node:stream";
import { EnvironmentSpec_EnvironmentPort_Protocol as Protocol } from "../../../gen/gitpod/v1/environment_pb.js";
import type { HttpRequest, HttpResponse } from "../../http/exchange.ts";
import { withoutCredential } from "./credential.ts";

// Bodies and upgraded connections pass through, as fast as the slower side takes them.

/** Where a request goes. */
export interface Upstream {
  address: string;
  port: number;
  protocol: Protocol;
  /** Path and query. */
  path: string;
  /** What the service's paths begin with outside; empty if nothing. */
  prefix: string;
  /** Scheme under which clients reach the port. */
  scheme: string;
}

const CONNECT_MS = 10_000;
/** Belong to one connection and are not passed on; those of HTTP/2 are no headers at all. */
const HOP_BY_HOP = new Set([
  ...["connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"],
  ...["trailer", "transfer-encoding", "upgrade", "http2-settings"],
]);

function passedOn(headers: IncomingHttpHeaders): OutgoingHttpHeaders {
  const named = String(headers.connection ?? "")
    .toLowerCase()
    .split(",")
    .map((name) => name.trim());
  const kept = Object.entries(headers).filter(
    ([name]) => !name.startsWith(":") && !HOP_BY_HOP.has(name) && !named.includes(name),
  );
  return Object.fromEntries(kept);
}

function requestHeaders(request: HttpRequest, { prefix, scheme }: Upstream): OutgoingHttpHeaders {
  const { headers } = request;
  const host = headers.host ?? headers[":authority"]?.toString() ?? "";
  const hops = [headers["x-forwarded-for"], request.socket?.remoteAddress].filter(Boolean).join(", ");
  return {
    ...passedOn(withoutCredential(headers)),
    host,
    "x-forwarded-for": hops,
    "x-forwarded-host": headers["x-forwarded-host"] ?? host,
    "x-forwarded-proto": scheme,
    ...(prefix && { "x-forwarded-prefix": prefix }),
  };
}

function open(request: HttpRequest, upstream: Upstream, headers: OutgoingHttpHeaders): ClientRequest {
  const { address, port, protocol, path } = upstream;
  const isTls = protocol === Protocol.HTTPS;
  // A service on loopback has whatever certificate it made for itself.
  const options = { host: address, port, path, method: request.method, headers, agent: false };
  const outgoing = isTls ? requestHttps({ ...options, rejectUnauthorized: false }) : requestHttp(options);
  const timer = setTimeout(() => outgoing.destroy(new Error("the service does not answer")), CONNECT_MS);
  outgoing.once("socket", (socket) => {
    if (!socket.connecting) clearTimeout(timer);
    socket.once(isTls ? "secureConnect" : "connect", () => clearTimeout(timer));
  });
  outgoing.once("close", () => clearTimeout(timer));
  return outgoing;
}

/**
 * Passes a request to the service and its answer back; ends both sides when either goes. Resolves when it is over; the
 * signal ends it before. `failed` is called when nothing of an answer has been sent.
 */
export function proxyRequest(
  request: HttpRequest,
  response: HttpResponse,
  upstream: Upstream,
  signal: AbortSignal,
  failed: () => void,
): Promise<void> {
  return new Promise((resolve) => {
    const outgoing = open(request, upstream, requestHeaders(request, upstream));
    const abort = () => outgoing.destroy();
    const over = () => {
      signal.removeEventListener("abort", abort);
      resolve();
    };
    signal.addEventListener("abort", abort, { once: true });
    outgoing.once("response", (answer) => {
      response.writeHead(answer.statusCode ?? 502, answerHeaders(answer, upstream.prefix));
      answer.pipe(response);
      answer.once("error", () => response.destroy());
      answer.once("close", () => {
        if (!answer.complete) response.destroy();
      });
    });
    outgoing.once("error", () => {
      if (response.headersSent || response.destroyed) response.destroy();
      else failed();
    });
    response.once("close", () => {
      outgoing.destroy();
      over();
    });
    request.pipe(outgoing);
  });
}

/** A service that knows nothing of its prefix speaks of paths as it sees them. */
function answerHeaders(answer: IncomingMessage, prefix: string): OutgoingHttpHeaders {
  const headers = passedOn(answer.headers);
  if (!prefix) return headers;
  const { location, "set-cookie": cookies } = headers;
  const isPath = typeof location === "string" && /^\/(?!\/)/.test(location) && !location.startsWith(`${prefix}/`);
  return {
    ...headers,
    ...(isPath && { location: prefix + location }),
    ...(Array.isArray(cookies) && {
      "set-cookie": cookies.map((cookie) => cookie.replace(/(;\s*path=)(\/[^;]*)/i, `$1${prefix}$2`)),
    }),
  };
}

/** As `proxyRequest`, for a connection that becomes something else, such as a WebSocket. */
export function proxyUpgrade(
  request: IncomingMessage,
  socket: Duplex,
  head: Buffer,
  upstream: Upstream,
  signal: AbortSignal,
): Promise<void> {
  return new Promise((resolve) => {
    const headers = { ...requestHeaders(request, upstream), connection: "upgrade", upgrade: request.headers.upgrade };
    const outgoing = open(request, upstream, headers);
    const end = () => {
      signal.removeEventListener("abort", end);
      outgoing.destroy();
      socket.destroy();
      resolve();
    };
    signal.addEventListener("abort", end, { once: true });
    socket.once("close", end);
    socket.once("error", end);
    outgoing.once("error", () => {
      if (!socket.destroyed) refuseUpgrade(socket, 502, "the service does not answer");
      end();
    });
    outgoing.once("response", (answer) => {
      // The service does not want to; its answer ends the connection.
      writeHead(socket, answer, "close");
      answer.pipe(socket);
      answer.once("close", end);
    });
    outgoing.once("upgrade", (answer, upstreamSocket: Duplex, firstBytes: Buffer) => {
      writeHead(socket, answer, "upgrade");
      if (firstBytes.length > 0) socket.write(firstBytes);
      if (head.length > 0) upstreamSocket.write(head);
      upstreamSocket.once("error", end);
      upstreamSocket.once("close", end);
      upstreamSocket.pipe(socket).pipe(upstreamSocket);
    });
    outgoing.end();
  });
}

function writeHead(socket: Duplex, answer: IncomingMessage, connection: string): void {
  const lines = Object.entries(passedOn(answer.headers)).flatMap(([name, value]) =>
    [value].flat().map((each) => `${name}: ${each}`),
  );
  const upgrade = connection === "upgrade" ? [`upgrade: ${answer.headers.upgrade ?? ""}`] : [];
  const status = `HTTP/1.1 ${answer.statusCode} ${answer.statusMessage}`;
  socket.write([status, ...lines, `connection: ${connection}`, ...upgrade, "", ""].join("\r\n"));
}

/** Answers a request for an upgrade with a refusal. */
export function refuseUpgrade(socket: Duplex, status: number, text: string): void {
  const body = `${text}\n`;
  socket.end(
    [
      `HTTP/1.1 ${status} ${text}`,
      "connection: close",
      "content-type: text/plain; charset=utf-8",
      `content-length: ${Buffer.byteLength(body)}`,
      "",
      body,
    ].join("\r\n"),
  );
}
