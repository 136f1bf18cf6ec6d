import { v7 as uuidv7 } from "uuid";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { ResourceRole, RoleAssignment } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { TestPlane } from "./plane.ts";

/** Makes a group with these users in it and these roles on the organization; its id. */
export async function newGroup(
  { admin, organizationId }: TestPlane,
  options: { name?: string; users?: { id: string }[]; organizationRoles?: ResourceRole[] } = {},
): Promise<string> {
  const name = options.name ?? `group ${uuidv7()}`;
  const { group } = await admin.groups.createGroup({ organizationId, name });
  const groupId = group?.id ?? "";
  for (const { id } of options.users ?? [])
    await admin.groups.createMembership({ groupId, subject: { id, principal: Principal.USER } });
  for (const resourceRole of options.organizationRoles ?? []) {
    const resource = { resourceType: ResourceType.ORGANIZATION, resourceId: organizationId };
    await admin.groups.createRoleAssignment({ groupId, ...resource, resourceRole });
  }
  return groupId;
}

/** Id of a built-in group. */
export async function builtInGroup({ admin }: TestPlane, name: "org-members" | "org-admins"): Promise<string> {
  const { group } = await admin.groups.getGroup({ group: { case: "name", value: name } });
  return group?.id ?? "";
}

/** All assignments on a resource that an organization admin sees, newest first, derived ones last. */
export async function assignmentsOn({ admin }: TestPlane, resourceId: string): Promise<RoleAssignment[]> {
  return (await admin.groups.listRoleAssignments({ filter: { resourceId } })).assignments;
}
