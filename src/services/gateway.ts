import type { ServiceImpl } from "@connectrpc/connect";
import type { GatewayService } from "../../gen/gitpod/v1/gateway_pb.js";
import type { App } from "../app.ts";
import { closePage, openPage } from "../domain/pages.ts";
import { principal } from "../rpc/authenticate.ts";

/** GatewayService: what the operator has configured. */
export function gatewayService({ config: { gateways } }: App): ServiceImpl<typeof GatewayService> {
  return {
    async listGateways({ pagination }, context) {
      const page = openPage(pagination, ["gateways", principal(context).id]);
      const rest = gateways.filter(({ name }) => name > page.after);
      const { items, nextToken } = closePage(page, rest, ({ name }) => name);
      return { gateways: items, pagination: { nextToken } };
    },
  };
}
