import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { actionable, notFound } from "../domain/errors.ts";
import { checkTakesRoles, MEMBERS_GROUP } from "../domain/group.ts";
import type { Caller } from "../domain/principal.ts";
import { DERIVATIONS, rolesFrom } from "../domain/roles.ts";
import {
  type AssignmentRow,
  assignmentColumns,
  deleteAssignment,
  insertAssignment,
  type StoredAssignment,
  toAssignment,
  updateAssignment,
} from "./assignment-rows.ts";
import type { Tx } from "./db.ts";
import { holdMember, type MemberRef } from "./group-members.ts";
import { getGroup, type StoredGroup } from "./groups.ts";
import type { Attribution } from "./record.ts";
import { holdSharedResource } from "./shared-resources.ts";

// Whoever changes who may do what, through whichever service, comes through here: assignments, policies of runners and
// projects, and direct shares are the same rows under the same rules.

const USES_RUNNER = rolesFrom(ResourceRole.RUNNER_USER) as number[];
const USES_EVERY_RUNNER = DERIVATIONS.filter(({ type }) => type === ResourceType.RUNNER).map(
  ({ from }) => from,
) as number[];

/** A group on a resource. */
export interface Holding {
  groupId: string;
  resourceType: ResourceType;
  resourceId: string;
}

/** A resource that something is shared of. */
type Resource = Omit<Holding, "groupId">;

/** The role that a group holds on a resource other than the organization, held until the transaction ends. */
async function lockHolding(
  tx: Tx,
  { groupId, resourceType, resourceId }: Holding,
): Promise<StoredAssignment | undefined> {
  const [row] = await tx<AssignmentRow[]>`
    select ${assignmentColumns(tx)} from role_assignments a join groups g on g.id = a.group_id
    where a.group_id = ${groupId} and a.resource_id = ${resourceId} and a.resource_type = ${resourceType} for update of a`;
  return row && toAssignment(row);
}

/**
 * Refuses a group that could see a project but create nothing from it: the project names classes, and the group can use
 * the runner of none, be it by a role of its own, through `org-members` or by a role on the organization.
 */
async function checkUsesRunner(tx: Tx, group: StoredGroup, projectId: string): Promise<void> {
  const [row] = await tx<{ usable: boolean }[]>`
    select not exists (select from project_environment_classes where project_id = ${projectId})
      or exists (
        select from project_environment_classes offer left join environment_classes c on c.id = offer.class_id
          join runners r on r.id = c.runner_id or offer.class_id is null and r.kind = ${RunnerKind.LOCAL}
        where offer.project_id = ${projectId} and r.organization_id = ${group.organizationId} and r.deleted_at is null
          and exists (
            select from role_assignments a join groups g on g.id = a.group_id
            where (g.id = ${group.id} or g.system_managed and g.name = ${MEMBERS_GROUP})
              and (a.resource_id = r.id and a.resource_role = any(${USES_RUNNER})
                or a.resource_id = ${group.organizationId} and a.resource_role = any(${USES_EVERY_RUNNER}))
          )
      ) as usable`;
  if (row?.usable) return;
  const message = "the group can use no runner of the project's environment classes: share one with it first";
  throw actionable("failed_precondition", "ROLE_RUNNER_NO_ACCESS", message, {
    ...{ group_id: group.id, project_id: projectId },
  });
}

/**
 * Gives a group a role on a resource. NOT_FOUND for what the caller cannot see, PERMISSION_DENIED if it may not assign
 * roles there, FAILED_PRECONDITION for a group or resource that takes none now, ALREADY_EXISTS if the group has one.
 */
export async function assignRole(
  tx: Tx,
  caller: Caller,
  wanted: Holding & { role: ResourceRole },
  by: Attribution,
): Promise<StoredAssignment> {
  const group = await getGroup(tx, caller, wanted.groupId, "existing");
  await holdSharedResource(tx, caller, wanted.resourceType, wanted.resourceId);
  checkTakesRoles(group, wanted.resourceType);
  // Whoever shares with a single person is not asked: it may be about to share the runner, too.
  if (wanted.resourceType === ResourceType.PROJECT && !group.directShare)
    await checkUsesRunner(tx, group, wanted.resourceId);
  const { organizationId, id: groupId, name: groupName } = group;
  return insertAssignment(tx, { ...wanted, id: by.newId(), organizationId, groupId, groupName }, by);
}

/** Replaces the role of a group on a resource; no effect if it is that one. NOT_FOUND if it has none; else as `assignRole`. */
export async function changeRole(
  tx: Tx,
  caller: Caller,
  wanted: Holding & { role: ResourceRole },
  by: Attribution,
): Promise<StoredAssignment> {
  await holdSharedResource(tx, caller, wanted.resourceType, wanted.resourceId);
  const assignment = await lockHolding(tx, wanted);
  if (!assignment) throw notFound("policy of group", wanted.groupId);
  if (assignment.role !== wanted.role) await updateAssignment(tx, assignment, wanted.role, by);
  return { ...assignment, role: wanted.role };
}

/** Takes the role of a group on a resource away. NOT_FOUND if it has none; else as `assignRole`. */
export async function withdrawRole(tx: Tx, caller: Caller, holding: Holding, by: Attribution): Promise<void> {
  await holdSharedResource(tx, caller, holding.resourceType, holding.resourceId);
  const assignment = await lockHolding(tx, holding);
  if (!assignment) throw notFound("policy of group", holding.groupId);
  await deleteAssignment(tx, assignment, by);
}

/** Takes an assignment away, by what was read of it before. NOT_FOUND if it has gone meanwhile; else as `assignRole`. */
export async function withdrawAssignment(
  tx: Tx,
  caller: Caller,
  { id, resourceType, resourceId }: StoredAssignment,
  by: Attribution,
): Promise<void> {
  await holdSharedResource(tx, caller, resourceType, resourceId);
  const [row] = await tx<AssignmentRow[]>`
    select ${assignmentColumns(tx)} from role_assignments a join groups g on g.id = a.group_id where a.id = ${id} for update of a`;
  if (!row) throw notFound("role assignment", id);
  await deleteAssignment(tx, toAssignment(row), by);
}

/** The group behind what is shared with one principal, held until the transaction ends. */
async function findShareGroup(tx: Tx, caller: Caller, memberId: string): Promise<string | undefined> {
  const [row] = await tx<{ id: string }[]>`
    select id from groups where direct_share_of = ${memberId} and organization_id = ${caller.organizationId} for no key update`;
  return row?.id;
}

/** As `findShareGroup`, makes it if there is none; of two that share at once one does. */
async function shareGroup(tx: Tx, caller: Caller, member: MemberRef, by: Attribution): Promise<string> {
  const { organizationId } = caller;
  const [made] = await tx<{ id: string }[]>`
    with made as (
      insert into groups (id, organization_id, name, direct_share, direct_share_of, created_at, updated_at)
      values (${by.newId()}, ${organizationId}, ${`direct-share-${member.id}`}, true, ${member.id}, ${by.at}, ${by.at})
      on conflict do nothing returning id
    ), joined as (
      insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
      select ${by.newId()}::uuid, id, ${organizationId}, ${member.id}, ${member.principal}, ${by.at} from made
    )
    select id from made`;
  const id = made?.id ?? (await findShareGroup(tx, caller, member.id));
  if (!id) throw notFound("user", member.id);
  return id;
}

/** Gives one user or service account a role on a resource, in place of an earlier direct one; else as `assignRole`. */
export async function shareWithMember(
  tx: Tx,
  caller: Caller,
  wanted: Resource & { member: MemberRef; role: ResourceRole },
  by: Attribution,
): Promise<void> {
  const { member, role, ...resource } = wanted;
  // In the order in which one who leaves is taken out of everything.
  await holdMember(tx, caller, member);
  await holdSharedResource(tx, caller, resource.resourceType, resource.resourceId);
  const groupId = await shareGroup(tx, caller, member, by);
  const before = await lockHolding(tx, { ...resource, groupId });
  if (!before) await assignRole(tx, caller, { ...resource, groupId, role }, by);
  else if (before.role !== role) await updateAssignment(tx, before, role, by);
}

/** Takes away what one user or service account was given directly; no effect if there is nothing. */
export async function unshareWithMember(
  tx: Tx,
  caller: Caller,
  { member, ...resource }: Resource & { member: MemberRef },
  by: Attribution,
): Promise<void> {
  await holdSharedResource(tx, caller, resource.resourceType, resource.resourceId);
  const groupId = await findShareGroup(tx, caller, member.id);
  const assignment = groupId && (await lockHolding(tx, { ...resource, groupId }));
  if (assignment) await deleteAssignment(tx, assignment, by);
}
