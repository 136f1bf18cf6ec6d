import { createServer, type Server as Http1Server, type IncomingMessage } from "node:http";
import { createServer as createHttp2Server, type Http2Server, type ServerHttp2Session } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import type { Duplex } from "node:stream";
import type { HttpRequest, HttpResponse, Limits } from "./exchange.ts";

const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const KEEP_ALIVE_PROBE_MS = 60_000;
const MAX_TIMEOUT_CHECK_MS = 5000;

/** An open port. */
export interface Listener {
  readonly port: number;
  /** Closes what is unused and lets nobody start anything new on what is used; new connections are still taken. */
  goAway(): void;
  /** Takes no more connections; resolves when the last one is closed, at the latest after so many milliseconds. */
  close(withinMs: number): Promise<void>;
}

/**
 * Looks at the first bytes of a connection without taking them away, and tells whether it speaks HTTP/2. A connection
 * that says nothing in time is closed.
 */
function sniff(socket: Socket, timeoutMs: number, known: (isHttp2: boolean) => void): void {
  let head: Buffer = Buffer.alloc(0);
  const give = () => socket.destroy();
  const timer = setTimeout(give, timeoutMs);
  const stop = () => {
    clearTimeout(timer);
    socket.off("readable", look);
    socket.off("end", give);
    socket.off("error", give);
    socket.off("close", stop);
  };
  const look = () => {
    const chunk: Buffer | null = socket.read();
    if (!chunk) return;
    head = head.length ? Buffer.concat([head, chunk]) : chunk;
    const size = Math.min(head.length, PREFACE.length);
    const fits = head.subarray(0, size).equals(PREFACE.subarray(0, size));
    if (fits && size < PREFACE.length) return;
    stop();
    socket.unshift(head);
    known(fits);
  };
  socket.on("readable", look);
  socket.on("end", give);
  socket.on("error", give);
  socket.on("close", stop);
}

/** Closes HTTP/2 connections without open streams after a while, as Node does for HTTP/1.1 only. */
function closeIdle(session: ServerHttp2Session, idleMs: number): void {
  let open = 0;
  session.on("stream", (stream) => {
    open += 1;
    stream.once("close", () => {
      open -= 1;
    });
  });
  session.setTimeout(idleMs, () => {
    if (open === 0) session.close();
  });
}

/**
 * Opens one port for HTTP/1.1 and HTTP/2 without TLS. The HTTP/1.1 server owns the port, because Node enforces its
 * timeouts only on a server that listens itself; connections that begin with the HTTP/2 preface go to the other one.
 * Without `upgrade`, requests to change the protocol of a connection are served like any other.
 */
export async function listen(
  options: { host: string; port: number; limits: Limits },
  serve: (request: HttpRequest, response: HttpResponse) => void,
  upgrade?: (request: IncomingMessage, socket: Duplex, head: Buffer) => void,
): Promise<Listener> {
  const { host, port, limits } = options;
  const http1: Http1Server = createServer({
    // Without it every small HTTP/2 answer waits some 40 ms for an acknowledgement.
    noDelay: true,
    keepAlive: true,
    keepAliveInitialDelay: KEEP_ALIVE_PROBE_MS,
    maxHeaderSize: limits.headerBytes,
    headersTimeout: limits.headersMs,
    requestTimeout: limits.requestMs,
    keepAliveTimeout: limits.idleMs,
    connectionsCheckingInterval: Math.min(limits.headersMs, MAX_TIMEOUT_CHECK_MS),
  });
  const http2: Http2Server = createHttp2Server({
    settings: { maxConcurrentStreams: limits.streamsPerConnection, maxHeaderListSize: limits.headerBytes },
  });
  http1.maxConnections = limits.connections;
  http1.on("request", serve);
  if (upgrade) http1.on("upgrade", upgrade);
  http2.on("request", (request, response) => serve(request, response as unknown as HttpResponse));

  const sockets = new Set<Socket>();
  const sessions = new Set<ServerHttp2Session>();
  http2.on("session", (session) => {
    sessions.add(session);
    session.once("close", () => sessions.delete(session));
    closeIdle(session, limits.idleMs);
  });

  const [serveHttp1] = http1.listeners("connection");
  http1.removeAllListeners("connection");
  http1.on("connection", (socket: Socket) => {
    sockets.add(socket);
    socket.once("close", () => sockets.delete(socket));
    sniff(socket, limits.headersMs, (isHttp2) => {
      if (!isHttp2) return serveHttp1?.call(http1, socket);
      socket.allowHalfOpen = false;
      http2.emit("connection", socket);
    });
  });

  await new Promise<void>((resolve, reject) => {
    http1.once("error", reject);
    http1.listen({ host, port }, () => {
      http1.off("error", reject);
      // Accepting fails when file descriptors run out; the next connections are taken when there are some again.
      http1.on("error", () => undefined);
      resolve();
    });
  });

  const goAway = () => {
    http1.closeIdleConnections();
    for (const session of sessions) session.close();
  };
  return {
    port: (http1.address() as AddressInfo).port,
    goAway,
    async close(withinMs) {
      const closed = new Promise<void>((resolve) => http1.close(() => resolve()));
      goAway();
      const timer = setTimeout(() => {
        for (const session of sessions) session.destroy();
        for (const socket of sockets) socket.destroy();
      }, withinMs);
      await closed;
      clearTimeout(timer);
    },
  };
}
