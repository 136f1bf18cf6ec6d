import type { ServiceImpl } from "@connectrpc/connect";
import { GatewayService } from "../../gen/gitpod/v1/gateway_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** GatewayService, as far as it is built. */
export function gatewayService(_app: App): ServiceImpl<typeof GatewayService> {
  return withPending(GatewayService, ["listGateways"], {});
}
