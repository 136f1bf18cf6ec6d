import { type Client, createClient, type Transport } from "@connectrpc/connect";
import {
  createConnectTransport,
  createGrpcTransport,
  createGrpcWebTransport,
  Http2SessionManager,
} from "@connectrpc/connect-node";
import { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import { type BerthClient, type ClientOptions, clientsOver, transportOptions } from "./client-common.ts";

export type { BerthClient, ClientOptions, Token } from "./client-common.ts";

/** Protocols that the control plane speaks; gRPC runs over HTTP/2, the others over HTTP/1.1. */
export type Protocol = "connect" | "grpc" | "grpc-web";

export interface NodeClientOptions extends ClientOptions {
  transport?: Protocol;
}

const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

function transportFor({ transport = "connect", ...options }: NodeClientOptions): Transport {
  const common = { ...transportOptions(options), readMaxBytes: MAX_MESSAGE_BYTES };
  if (transport === "connect") return createConnectTransport({ ...common, httpVersion: "1.1" });
  if (transport === "grpc-web") return createGrpcWebTransport({ ...common, httpVersion: "1.1" });
  return createGrpcTransport({ ...common, sessionManager: new Http2SessionManager(common.baseUrl) });
}

/** Clients of the control plane for Node. */
export function createBerthClient(options: NodeClientOptions): BerthClient {
  return clientsOver(transportFor(options));
}

/**
 * A client of the operations inside one environment. `opsUrl` is its `status.environment_urls.ops`, the token one of
 * CreateEnvironmentAccessToken.
 */
export function createOpsClient({
  opsUrl,
  ...options
}: Omit<NodeClientOptions, "baseUrl"> & { opsUrl: string }): Client<typeof EnvironmentOpsService> {
  return createClient(EnvironmentOpsService, transportFor({ ...options, baseUrl: opsUrl }));
}
