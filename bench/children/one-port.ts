import { createServer } from "node:http";
import { createServer as createHttp2Server } from "node:http2";
import type { AddressInfo } from "node:net";
import type { HttpRequest, HttpResponse } from "../../src/http/exchange.ts";
import { listen } from "../../src/http/listener.ts";
import { DEFAULT_LIMITS } from "../../src/server.ts";
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
