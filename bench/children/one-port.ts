import { createServer, type IncomingMessage } from "node:http";
import { createServer as createHttp2Server } from "node:http2";
import type { Socket } from "node:net";
import type { HttpRequest, HttpResponse, Limits } from "../../src/http/exchange.ts";
import { listen } from "../../src/http/listener.ts";
import { collect, open } from "./plain-http.ts";
import { serve } from "./serve.ts";

export interface PortSettings {
  /** One port for both versions of HTTP, as the product has it, or one for each. */
  ports: "one" | "separate";
  /** Size of every answer. */
  bytes: number;
}

export interface PortApi {
  started(): { h1: string; h2c: string };
}

// Nothing here comes near any of them.
const LIMITS: Limits = {
  ...{ bodyBytes: 1e6, answerBytes: 1e6, headerBytes: 32_768, connections: 1000, streamsPerConnection: 250 },
  ...{ headersMs: 60_000, requestMs: 60_000, stallMs: 60_000, idleMs: 60_000, calls: 1000, streams: 1000 },
};

serve<PortSettings, PortApi>(async ({ ports, bytes }) => {
  const body = Buffer.alloc(bytes, 120);
  const answer = (request: HttpRequest, response: HttpResponse) => {
    collect(request as IncomingMessage, () => {
      response.writeHead(200, { "content-type": "application/proto", "content-length": String(bytes) });
      response.end(body);
    });
  };
  if (ports === "one") {
    const listener = await listen({ host: "127.0.0.1", port: 0, limits: LIMITS }, answer);
    const url = `http://127.0.0.1:${listener.port}/`;
    return { api: { started: () => ({ h1: url, h2c: url }) }, stop: () => listener.close(0) };
  }
  const http2 = createHttp2Server();
  // As any server has to: without it every small answer on a connection with nothing else to send waits some 40 ms.
  http2.on("connection", (socket: Socket) => socket.setNoDelay(true));
  http2.on("request", (request, response) => answer(request, response as unknown as HttpResponse));
  const urls = { h1: await open(createServer(answer)), h2c: await open(http2) };
  return { api: { started: () => urls } };
});
