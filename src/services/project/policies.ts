import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { ProjectPolicySchema, ProjectService } from "../../../gen/gitpod/v1/project_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import { projectRole, roleOfProjectPolicy } from "../../domain/roles.ts";
import { principal } from "../../rpc/authenticate.ts";
import { listDirectAssignments, type StoredAssignment } from "../../store/assignment-rows.ts";
import { getProject } from "../../store/projects.ts";
import { assignRole, changeRole, withdrawRole } from "../../store/role-assignments.ts";

type Policies = "listProjectPolicies" | "createProjectPolicy" | "updateProjectPolicy" | "deleteProjectPolicy";

const message = ({ groupId, role }: StoredAssignment): MessageInitShape<typeof ProjectPolicySchema> => ({
  groupId,
  role: projectRole(role),
});

const holding = ({ projectId, groupId }: { projectId: string; groupId: string }) => ({
  ...{ groupId, resourceType: ResourceType.PROJECT, resourceId: projectId },
});

/** Policies of projects: the roles that groups are assigned on them. */
export function projectPolicies(app: App): Pick<ServiceImpl<typeof ProjectService>, Policies> {
  return {
    async listProjectPolicies(request, context) {
      const caller = principal(context);
      const { id } = await getProject(app.db.point, caller, request.projectId);
      const page = openPage(request.pagination, ["project policies", caller.id, id]);
      const rows = await listDirectAssignments(app.db.list, ResourceType.PROJECT, id, page);
      const { items, nextToken } = closePage(page, rows, (assignment) => assignment.id);
      return { policies: items.map(message), pagination: { nextToken } };
    },
    async createProjectPolicy(request, context) {
      const caller = principal(context);
      const wanted = { ...holding(request), role: roleOfProjectPolicy(request.role) };
      const assignment = await transact(app, (tx) => assignRole(tx, caller, wanted, attribution(app, caller)));
      return { policy: message(assignment) };
    },
    async updateProjectPolicy(request, context) {
      const caller = principal(context);
      const wanted = { ...holding(request), role: roleOfProjectPolicy(request.role) };
      const assignment = await transact(app, (tx) => changeRole(tx, caller, wanted, attribution(app, caller)));
      return { policy: message(assignment) };
    },
    async deleteProjectPolicy(request, context) {
      const caller = principal(context);
      await transact(app, (tx) => withdrawRole(tx, caller, holding(request), attribution(app, caller)));
      return {};
    },
  };
}
