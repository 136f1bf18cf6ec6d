import type { ServiceImpl } from "@connectrpc/connect";
import { UserService } from "../../gen/gitpod/v1/user_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";
import { personalAccessTokens } from "./user/personal-access-tokens.ts";
import { preferences } from "./user/preferences.ts";
import { profile } from "./user/profile.ts";

/** UserService, as far as it is built. */
export function userService(app: App): ServiceImpl<typeof UserService> {
  return withPending(UserService, ["setSuspended", "deleteUser"], {
    ...profile(app),
    ...personalAccessTokens(app),
    ...preferences(app),
  });
}
