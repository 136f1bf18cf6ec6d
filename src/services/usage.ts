import type { ServiceImpl } from "@connectrpc/connect";
import { UsageService } from "../../gen/gitpod/v1/usage_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** UsageService, as far as it is built. */
export function usageService(_app: App): ServiceImpl<typeof UsageService> {
  return withPending(UsageService, ["getTopProjects"], {});
}
