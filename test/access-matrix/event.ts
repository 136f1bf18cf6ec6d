import { EventService } from "../../gen/gitpod/v1/event_pb.js";
import { section } from "./section.ts";

const TABLE = `
                          no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  watchEvents             U  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  watchEvents environment U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  listAuditLogs           U  D  ✓  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  ✓  .  .  .  .  .  .  .  .  .  .
  getAuditLog             U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  ✓  .  .  .  .  .  .  .  .  .  .
`;

export const event = section(EventService, TABLE, {
  watchEvents: {},
  "watchEvents environment": {
    request: ({ environmentId }) => ({ scope: { case: "environmentId", value: environmentId } }),
  },
  getAuditLog: { request: ({ auditId }) => ({ auditLogEntryId: auditId }) },
});
