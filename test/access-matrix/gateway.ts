import { GatewayService } from "../../gen/gitpod/v1/gateway_pb.js";
import { section } from "./section.ts";

const TABLE = `
               no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  listGateways U  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const gateway = section(GatewayService, TABLE, {});
