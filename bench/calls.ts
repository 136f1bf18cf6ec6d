import {
  create,
  type DescMessage,
  type DescMethod,
  type MessageInitShape,
  toBinary,
  toJsonString,
} from "@bufbuild/protobuf";
import { encodeEnvelope } from "@connectrpc/connect/protocol";
import type { Load } from "./load.ts";

/** How a unary call is written down. */
export type Format = "connect" | "json" | "connect-h2c" | "grpc";

type CallDesc<I extends DescMessage> = DescMethod & { input: I };

const CONTENT_TYPES: Record<Format, string> = {
  connect: "application/proto",
  "connect-h2c": "application/proto",
  json: "application/json",
  grpc: "application/grpc+proto",
};

// Generators cannot send an empty body, so an empty message gets a field that nobody knows: number 15, without content.
const UNKNOWN_FIELD = Uint8Array.of(0x7a, 0);

/** One call of an RPC as load; multiplexed over one connection where that is possible. */
export function callOf<I extends DescMessage>(
  url: string,
  method: CallDesc<I>,
  message: MessageInitShape<I>,
  options: { format: Format; token?: string; clients: number; ms: number },
): Load {
  const { format, token, clients, ms } = options;
  const request = create(method.input, message);
  const encoded = toBinary(method.input, request);
  const binary = encoded.length ? encoded : UNKNOWN_FIELD;
  const bodies = {
    json: () => Buffer.from(toJsonString(method.input, request)),
    grpc: () => encodeEnvelope(0, binary),
  };
  const body = format === "json" || format === "grpc" ? bodies[format]() : binary;
  const multiplexed = format === "grpc" || format === "connect-h2c";
  return {
    url: `${url}/${method.parent.typeName}/${method.name}`,
    protocol: multiplexed ? "h2c" : "h1",
    headers: {
      "content-type": CONTENT_TYPES[format],
      ...(format === "grpc" ? { te: "trailers" } : {}),
      ...(token ? { authorization: `Bearer ${token}` } : {}),
    },
    body,
    connections: multiplexed ? 1 : clients,
    streams: multiplexed ? clients : 1,
    ms,
  };
}

/** The same bytes to a server that knows nothing of RPCs. */
export function plainLoad(urls: { h1: string; h2c: string }, like: Load): Load {
  return { ...like, url: urls[like.protocol], headers: { "content-type": "application/proto" } };
}
