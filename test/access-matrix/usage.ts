import { UsageService } from "../../gen/gitpod/v1/usage_pb.js";
import { section } from "./section.ts";

const TABLE = `
                 no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  getTopProjects U  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const usage = section(UsageService, TABLE, {
  getTopProjects: { request: () => ({ dateRange: { startTime: { seconds: 0n }, endTime: { seconds: 1n } } }) },
});
