import type { ServiceImpl } from "@connectrpc/connect";
import { GroupService } from "../../gen/gitpod/v1/group_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** GroupService, as far as it is built. */
export function groupService(_app: App): ServiceImpl<typeof GroupService> {
  return withPending(
    GroupService,
    [
      "createGroup",
      "getGroup",
      "listGroups",
      "updateGroup",
      "deleteGroup",
      "createMembership",
      "deleteMembership",
      "getMembership",
      "listMemberships",
      "createRoleAssignment",
      "listRoleAssignments",
      "deleteRoleAssignment",
      "shareResourceWithPrincipal",
      "unshareResourceWithPrincipal",
    ],
    {},
  );
}
