import { AccountService } from "../../gen/gitpod/v1/account_pb.js";
import { section } from "./section.ts";

const somebody = { email: "somebody@example.org" };

const TABLE = `
                            no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  getAccount                U  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteAccount             U  N  N  N  D  N  N  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getSSOLoginURL            N  N  N  N  N  N  N  N  N  N  N  N  N  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSSOLogins             ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listLoginProviders        ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listJoinableOrganizations U  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const account = section(AccountService, TABLE, {
  deleteAccount: { request: ({ unknownId }) => ({ accountId: unknownId }) },
  getSSOLoginURL: { request: () => somebody },
  listSSOLogins: { request: () => somebody },
});
