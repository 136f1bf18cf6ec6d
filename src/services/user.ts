import type { ServiceImpl } from "@connectrpc/connect";
import { UserService } from "../../gen/gitpod/v1/user_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** UserService, as far as it is built. */
export function userService(_app: App): ServiceImpl<typeof UserService> {
  return withPending(
    UserService,
    [
      "getAuthenticatedUser",
      "getUser",
      "setSuspended",
      "deleteUser",
      "createPersonalAccessToken",
      "getPersonalAccessToken",
      "listPersonalAccessTokens",
      "deletePersonalAccessToken",
      "setPreference",
      "getPreference",
      "listPreferences",
      "deletePreference",
      "getDotfilesConfiguration",
      "setDotfilesConfiguration",
    ],
    {},
  );
}
