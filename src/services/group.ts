import type { ServiceImpl } from "@connectrpc/connect";
import type {
  CreateGroupRequest,
  GetGroupRequest,
  GroupService,
  UpdateGroupRequest,
} from "../../gen/gitpod/v1/group_pb.js";
import { type App, attribution, transact } from "../app.ts";
import { actionable, denied, invalid, notFound } from "../domain/errors.ts";
import { checkEditable, checkMayChange } from "../domain/group.ts";
import { isUuid } from "../domain/ids.ts";
import { closePage, openPage } from "../domain/pages.ts";
import { type Caller, ownOrganization } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import {
  countGroups,
  deleteGroup,
  getGroup,
  getGroupByName,
  groupMessage,
  insertGroup,
  listGroups,
  type StoredGroup,
  updateGroup,
} from "../store/groups.ts";
import { forgetAllowedGroup, holdPolicies } from "../store/organizations.ts";
import { roleAssignments } from "./group/assignments.ts";
import { memberships } from "./group/memberships.ts";

const mayCreate = (caller: Caller) => caller.orgAdmin || caller.groupsAdmin;

async function create(app: App, caller: Caller, request: CreateGroupRequest): Promise<StoredGroup> {
  const organizationId = ownOrganization(caller, request.organizationId);
  if (!mayCreate(caller)) throw denied("only organization admins and groups admins create groups");
  return transact(app, async (tx) => {
    const most = app.limits.groups;
    if ((await countGroups(tx, organizationId)) >= most)
      throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", `an organization may have at most ${most} groups`);
    const id = app.newId();
    const { name, description } = request;
    await insertGroup(tx, { id, organizationId, name, description }, attribution(app, caller));
    return getGroup(tx, caller, id);
  });
}

function find(app: App, caller: Caller, { group, groupId }: GetGroupRequest): Promise<StoredGroup> {
  if (group.case === "name") return getGroupByName(app.db.point, caller, group.value);
  const id = group.case === "id" ? group.value : groupId;
  if (!id) throw invalid({ field: "id", message: "id or name is required" });
  if (!isUuid(id)) throw notFound("group", id);
  return getGroup(app.db.point, caller, id);
}

async function update(app: App, caller: Caller, request: UpdateGroupRequest): Promise<StoredGroup> {
  return transact(app, async (tx) => {
    const group = await getGroup(tx, caller, request.groupId, "unchanged");
    checkMayChange(group, caller);
    checkEditable(group);
    await updateGroup(tx, group, request, attribution(app, caller));
    return getGroup(tx, caller, group.id);
  });
}

async function remove(app: App, caller: Caller, groupId: string): Promise<void> {
  await transact(app, async (tx) => {
    // The organization comes first everywhere, or two transactions could wait for each other.
    const policies = await holdPolicies(tx, caller.organizationId);
    const group = await getGroup(tx, caller, groupId, "exclusive");
    if (!mayCreate(caller)) throw denied("only organization admins and groups admins delete groups");
    checkMayChange(group, caller);
    checkEditable(group);
    const by = attribution(app, caller);
    await forgetAllowedGroup(tx, policies, group.id, by);
    await deleteGroup(tx, group, by);
  });
}

/** Groups, who is in them, and what they may do. */
export function groupService(app: App): ServiceImpl<typeof GroupService> {
  return {
    ...memberships(app),
    ...roleAssignments(app),
    async createGroup(request, context) {
      return { group: groupMessage(await create(app, principal(context), request)) };
    },
    async getGroup(request, context) {
      return { group: groupMessage(await find(app, principal(context), request)) };
    },
    async listGroups(request, context) {
      const caller = principal(context);
      const page = openPage(request.pagination, ["groups", caller.id, request.filter]);
      const rows = await listGroups(app.db.list, caller, request.filter, page);
      const { items, nextToken } = closePage(page, rows, ({ id }) => id);
      return { groups: items.map(groupMessage), pagination: { nextToken } };
    },
    async updateGroup(request, context) {
      return { group: groupMessage(await update(app, principal(context), request)) };
    },
    async deleteGroup(request, context) {
      await remove(app, principal(context), request.groupId);
      return {};
    },
  };
}
