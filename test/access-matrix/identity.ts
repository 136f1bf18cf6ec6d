import { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { section } from "./section.ts";

const TABLE = `
                           no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  getIDToken               U  D  ✓  ✓  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getAuthenticatedIdentity U  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  exchangeToken            ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const identity = section(IdentityService, TABLE, {
  exchangeToken: { request: ({ exchangeToken }) => ({ exchangeToken }), fresh: ["exchangeToken"] },
  getIDToken: { request: () => ({ audience: ["a"] }) },
});
