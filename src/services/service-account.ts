import type { ServiceImpl } from "@connectrpc/connect";
import { ServiceAccountService } from "../../gen/gitpod/v1/service_account_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** ServiceAccountService, as far as it is built. */
export function serviceAccountService(_app: App): ServiceImpl<typeof ServiceAccountService> {
  return withPending(
    ServiceAccountService,
    [
      "createServiceAccount",
      "listServiceAccounts",
      "getServiceAccount",
      "updateServiceAccount",
      "deleteServiceAccount",
      "createServiceAccountAccessToken",
      "createServiceAccountToken",
      "listServiceAccountTokens",
      "getServiceAccountToken",
      "deleteServiceAccountToken",
    ],
    {},
  );
}
