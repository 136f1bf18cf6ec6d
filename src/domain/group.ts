import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { actionable, denied, type Refusal } from "./errors.ts";
import type { Caller } from "./principal.ts";

/** Names of the groups that every organization is born with. */
export const MEMBERS_GROUP = "org-members";
export const ADMINS_GROUP = "org-admins";

/** What decides on what may be done with a group. */
export interface GroupNature {
  id: string;
  name: string;
  systemManaged: boolean;
  /** Stands for one principal that something is shared with. */
  directShare: boolean;
  /** Name and members come from an identity provider. */
  scimManaged: boolean;
}

/** What decides on who may change a group. */
export interface GroupRights {
  /** The caller holds ADMIN on it. */
  administers: boolean;
  /** It holds a role on the organization: whoever says who is in it could make themselves an organization admin. */
  holdsOrganizationRole: boolean;
}

/** Refuses a caller who may not say what the group is called and who is in it. */
export function checkMayChange(group: GroupRights, caller: Pick<Caller, "orgAdmin">): void {
  if (!group.administers) throw denied("changing a group needs the role admin on it");
  if (group.holdsOrganizationRole && !caller.orgAdmin)
    throw denied("a group that holds a role in the organization is changed by organization admins alone");
}

const managed = (group: GroupNature, message: string): Refusal =>
  actionable("failed_precondition", "GROUP_STATE_SYSTEM_MANAGED", message, { group_id: group.id });

/** Refuses a change of a group that does not belong to people: of its name, its members, its existence. */
export function checkEditable(group: GroupNature): void {
  if (group.systemManaged) throw managed(group, `${group.name} is built in and follows the organization`);
  if (group.directShare) throw managed(group, "the group stands for a direct share: share or unshare instead");
  if (group.scimManaged) throw managed(group, "the group is synced by SCIM: change it where it comes from");
}

/** Refuses roles that a built-in group or a direct share does not take on a kind of resource. */
export function checkTakesRoles(group: GroupNature, type: ResourceType): void {
  if (group.systemManaged && group.name === ADMINS_GROUP)
    throw managed(group, `${ADMINS_GROUP} takes no roles: its members administer the organization already`);
  if (type !== ResourceType.ORGANIZATION) return;
  if (group.systemManaged) throw managed(group, `${group.name} takes no roles on the organization`);
  if (group.directShare) throw managed(group, "a direct share takes no roles on the organization: set the user's role");
}
