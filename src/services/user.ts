import type { ServiceImpl } from "@connectrpc/connect";
import type { UserService } from "../../gen/gitpod/v1/user_pb.js";
import type { App } from "../app.ts";
import { membership } from "./user/membership.ts";
import { personalAccessTokens } from "./user/personal-access-tokens.ts";
import { preferences } from "./user/preferences.ts";
import { profile } from "./user/profile.ts";

/** UserService. */
export function userService(app: App): ServiceImpl<typeof UserService> {
  return { ...profile(app), ...membership(app), ...personalAccessTokens(app), ...preferences(app) };
}
