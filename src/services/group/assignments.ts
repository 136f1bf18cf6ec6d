import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type {
  GroupService,
  ListRoleAssignmentsRequest,
  RoleAssignmentSchema,
  ShareResourceWithPrincipalRequest,
  UnshareResourceWithPrincipalRequest,
} from "../../../gen/gitpod/v1/group_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { actionable, invalid } from "../../domain/errors.ts";
import { isUuid } from "../../domain/ids.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { checkAssignable } from "../../domain/roles.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  type AssignmentFilter,
  getAssignment,
  type ListedAssignment,
  listAssignments,
} from "../../store/assignment-list.ts";
import type { StoredAssignment } from "../../store/assignment-rows.ts";
import { assignRole, shareWithMember, unshareWithMember, withdrawAssignment } from "../../store/role-assignments.ts";

type Assignments =
  | "createRoleAssignment"
  | "listRoleAssignments"
  | "deleteRoleAssignment"
  | "shareResourceWithPrincipal"
  | "unshareResourceWithPrincipal";

const message = (
  assignment: StoredAssignment & Pick<ListedAssignment, "derivedFrom">,
): MessageInitShape<typeof RoleAssignmentSchema> => ({
  id: assignment.id,
  groupId: assignment.groupId,
  organizationId: assignment.organizationId,
  resourceId: assignment.resourceId,
  resourceType: assignment.resourceType,
  resourceRole: assignment.role,
  ...(assignment.derivedFrom !== undefined && { derivedFromOrgRole: assignment.derivedFrom }),
});

function filterOf({ filter }: ListRoleAssignmentsRequest): AssignmentFilter {
  if (filter?.resourceId && filter.resourceIds.length)
    throw invalid({ field: "filter.resource_id", message: "cannot be combined with resource_ids" });
  return {
    resourceTypes: filter?.resourceTypes ?? [],
    roles: filter?.resourceRoles ?? [],
    groupId: filter?.groupId ?? "",
    memberId: filter?.userId ?? "",
    resourceIds: filter?.resourceId ? [filter.resourceId] : (filter?.resourceIds ?? []),
  };
}

async function list(app: App, caller: Caller, request: ListRoleAssignmentsRequest) {
  const filter = filterOf(request);
  const page = openPage(request.pagination, ["role assignments", caller.id, filter]);
  // The contract lets any text through; what is no id is the id of nothing.
  const ids = [filter.groupId, filter.memberId, ...filter.resourceIds].filter(Boolean);
  const rows = ids.every(isUuid) ? await listAssignments(app.db.list, caller, filter, page) : [];
  const { items, nextToken } = closePage(page, rows, ({ position }) => position);
  return { assignments: items.map(message), pagination: { nextToken } };
}

/** What is shared with whom. */
function shared(request: ShareResourceWithPrincipalRequest | UnshareResourceWithPrincipalRequest) {
  const { resourceType, resourceId, principal, principalId } = request;
  if (resourceType === ResourceType.ORGANIZATION)
    throw invalid({ field: "resource_type", message: "cannot be the organization: set the role of the user" });
  return { resourceType, resourceId, member: { id: principalId, principal } };
}

async function remove(app: App, caller: Caller, assignmentId: string): Promise<void> {
  await transact(app, async (tx) => {
    const assignment = await getAssignment(tx, caller, assignmentId);
    if (assignment === "derived")
      throw actionable(
        "failed_precondition",
        "ROLE_STATE_DERIVED",
        "the role follows from a role in the organization: take that one away instead",
      );
    await withdrawAssignment(tx, caller, assignment, attribution(app, caller));
  });
}

/** What groups, and single principals, may do with a resource. */
export function roleAssignments(app: App): Pick<ServiceImpl<typeof GroupService>, Assignments> {
  return {
    async createRoleAssignment(request, context) {
      const caller = principal(context);
      const { groupId, resourceType, resourceId, resourceRole: role } = request;
      checkAssignable(resourceType, resourceId, role, "resource_role");
      const wanted = { groupId, resourceType, resourceId, role };
      const assignment = await transact(app, (tx) => assignRole(tx, caller, wanted, attribution(app, caller)));
      return { assignment: message(assignment) };
    },
    listRoleAssignments: (request, context) => list(app, principal(context), request),
    async deleteRoleAssignment(request, context) {
      await remove(app, principal(context), request.assignmentId);
      return {};
    },
    async shareResourceWithPrincipal(request, context) {
      const caller = principal(context);
      const wanted = { ...shared(request), role: request.role };
      checkAssignable(wanted.resourceType, wanted.resourceId, wanted.role, "role");
      await transact(app, (tx) => shareWithMember(tx, caller, wanted, attribution(app, caller)));
      return {};
    },
    async unshareResourceWithPrincipal(request, context) {
      const caller = principal(context);
      await transact(app, (tx) => unshareWithMember(tx, caller, shared(request), attribution(app, caller)));
      return {};
    },
  };
}
