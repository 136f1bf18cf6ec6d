import { v7 as uuidv7 } from "uuid";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { GroupService, ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type Call, section } from "./section.ts";
import type { World } from "./world.ts";

const { ORGANIZATION, RUNNER, PROJECT, ENVIRONMENT, GROUP, SERVICE_ACCOUNT } = ResourceType;

const one = ({ groupId }: World) => ({ groupId });
const user = (id: string) => ({ id, principal: Principal.USER });

/** Gives a group that has no role yet one on a resource. */
const assign = (resourceType: ResourceType, field: keyof World, resourceRole: ResourceRole): Call => ({
  request: (world) => ({ groupId: world.powerfulGroupId, resourceType, resourceId: world[field], resourceRole }),
  fresh: ["powerfulGroupId"],
});

const shareWith = (resourceType: ResourceType, field: keyof World, role?: ResourceRole): Call => ({
  request: (world) => ({
    ...{ resourceType, resourceId: world[field], principal: Principal.USER, principalId: world.otherUserId },
    role,
  }),
});

const TABLE = `
                                           no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createGroup                              U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  .  .
  getGroup                                 U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listGroups                               U  D  0  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateGroup                              U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  ✓  .
  deleteGroup                              U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  .  .
  deleteGroup powerful                     U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createMembership                         U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  ✓  .
  createMembership powerful                U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteMembership                         U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  ✓  .
  getMembership                            U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listMemberships                          U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createRoleAssignment organization        U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createRoleAssignment runner              U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  createRoleAssignment project             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  createRoleAssignment environment         U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  createRoleAssignment group               U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  ✓  .  .  .  .  .  .  .  .  .  .  ✓  .
  createRoleAssignment service account     U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listRoleAssignments                      U  D  0  0  ✓  ✓  ✓  0  0  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listRoleAssignments runner               U  D  0  0  ✓  ✓  ✓  0  0  D  D  D  D  ✓  .  .  .  .  ✓  .  .  .  .  .  .  .  .  .
  deleteRoleAssignment                     U  D  N  N  D  N  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  .  .  .  .  .  .  .  .  .
  shareResourceWithPrincipal runner        U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  shareResourceWithPrincipal project       U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  shareResourceWithPrincipal environment   U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  unshareResourceWithPrincipal runner      U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  unshareResourceWithPrincipal project     U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  unshareResourceWithPrincipal environment U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
`;

export const group = section(GroupService, TABLE, {
  createGroup: { request: ({ organizationId }) => ({ organizationId, name: uuidv7() }) },
  getGroup: { request: ({ groupId }) => ({ group: { case: "id", value: groupId } }) },
  listGroups: { finds: ({ groupId }) => groupId },
  updateGroup: { request: ({ groupId }) => ({ groupId, name: groupId }) },
  deleteGroup: { request: one, fresh: ["groupId"] },
  "deleteGroup powerful": {
    request: ({ powerfulGroupId }) => ({ groupId: powerfulGroupId }),
    fresh: ["powerfulGroupId"],
  },
  createMembership: {
    request: ({ groupId, userId }) => ({ groupId, subject: user(userId) }),
    fresh: ["groupId"],
  },
  // Its members are admins of something: whoever adds one makes one.
  "createMembership powerful": {
    request: ({ powerfulGroupId, userId }) => ({ groupId: powerfulGroupId, subject: user(userId) }),
    fresh: ["powerfulGroupId", "userId"],
  },
  deleteMembership: { request: ({ membershipId }) => ({ membershipId }), fresh: ["membershipId"] },
  getMembership: { request: ({ groupId, userId }) => ({ groupId, subject: user(userId) }) },
  listMemberships: { request: one, finds: ({ userId }) => userId },
  "createRoleAssignment organization": assign(ORGANIZATION, "organizationId", ResourceRole.ORG_PROJECTS_ADMIN),
  "createRoleAssignment runner": assign(RUNNER, "runnerId", ResourceRole.RUNNER_USER),
  "createRoleAssignment project": assign(PROJECT, "projectId", ResourceRole.PROJECT_USER),
  "createRoleAssignment environment": assign(ENVIRONMENT, "environmentId", ResourceRole.ENVIRONMENT_USER),
  "createRoleAssignment group": assign(GROUP, "groupId", ResourceRole.GROUP_VIEWER),
  "createRoleAssignment service account": assign(
    SERVICE_ACCOUNT,
    "serviceAccountId",
    ResourceRole.SERVICE_ACCOUNT_ADMIN,
  ),
  listRoleAssignments: { finds: ({ assignmentId }) => assignmentId },
  "listRoleAssignments runner": {
    request: ({ runnerId }) => ({ filter: { resourceId: runnerId } }),
    finds: ({ assignmentId }) => assignmentId,
  },
  deleteRoleAssignment: { request: ({ assignmentId }) => ({ assignmentId }), fresh: ["assignmentId"] },
  "shareResourceWithPrincipal runner": shareWith(RUNNER, "runnerId", ResourceRole.RUNNER_USER),
  "shareResourceWithPrincipal project": shareWith(PROJECT, "projectId", ResourceRole.PROJECT_USER),
  "shareResourceWithPrincipal environment": shareWith(ENVIRONMENT, "environmentId", ResourceRole.ENVIRONMENT_VIEWER),
  "unshareResourceWithPrincipal runner": shareWith(RUNNER, "runnerId"),
  "unshareResourceWithPrincipal project": shareWith(PROJECT, "projectId"),
  "unshareResourceWithPrincipal environment": shareWith(ENVIRONMENT, "environmentId"),
});
