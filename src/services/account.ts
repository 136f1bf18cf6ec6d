import type { ServiceImpl } from "@connectrpc/connect";
import { AccountService } from "../../gen/gitpod/v1/account_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** AccountService, as far as it is built. */
export function accountService(_app: App): ServiceImpl<typeof AccountService> {
  return withPending(
    AccountService,
    [
      "getAccount",
      "deleteAccount",
      "getSSOLoginURL",
      "listSSOLogins",
      "listLoginProviders",
      "listJoinableOrganizations",
    ],
    {},
  );
}
