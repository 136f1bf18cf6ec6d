import { type Client, createClient, type Transport } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import { type BerthClient, type ClientOptions, clientsOver, transportOptions } from "./client-common.ts";

export type { BerthClient, ClientOptions, Token } from "./client-common.ts";

/** Protocols that browsers can speak. */
export type Protocol = "connect" | "grpc-web";

export interface WebClientOptions extends ClientOptions {
  transport?: Protocol;
}

function transportFor({ transport = "connect", ...options }: WebClientOptions): Transport {
  return (transport === "connect" ? createConnectTransport : createGrpcWebTransport)(transportOptions(options));
}

/** Clients of the control plane for browsers, and for whatever else has `fetch`. */
export function createBerthClient(options: WebClientOptions): BerthClient {
  return clientsOver(transportFor(options));
}

/**
 * A client of the operations inside one environment. `opsUrl` is its `status.environment_urls.ops`, the token one of
 * CreateEnvironmentAccessToken.
 */
export function createOpsClient({
  opsUrl,
  ...options
}: Omit<WebClientOptions, "baseUrl"> & { opsUrl: string }): Client<typeof EnvironmentOpsService> {
  return createClient(EnvironmentOpsService, transportFor({ ...options, baseUrl: opsUrl }));
}
