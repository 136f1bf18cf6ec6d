import type { ServiceImpl } from "@connectrpc/connect";
import type { CreateMembershipRequest, GroupService } from "../../../gen/gitpod/v1/group_pb.js";
import { Principal, type Subject } from "../../../gen/gitpod/v1/identity_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { actionable, invalid } from "../../domain/errors.ts";
import { checkEditable, checkMayChange } from "../../domain/group.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  deleteMembership,
  findMembership,
  getMembership,
  holdMember,
  insertMembership,
  listMemberships,
  type MemberRef,
  membershipMessage,
  type StoredMembership,
} from "../../store/group-members.ts";
import { getGroup } from "../../store/groups.ts";

type Memberships = "createMembership" | "deleteMembership" | "getMembership" | "listMemberships";

const MEMBERS: readonly Principal[] = [Principal.USER, Principal.SERVICE_ACCOUNT];

function memberOf(subject: Subject | undefined): MemberRef {
  if (!subject?.id) throw invalid({ field: "subject.id", message: "is required" });
  if (!MEMBERS.includes(subject.principal))
    throw invalid({ field: "subject.principal", message: "must be a user or a service account" });
  return { id: subject.id, principal: subject.principal };
}

async function join(app: App, caller: Caller, request: CreateMembershipRequest): Promise<StoredMembership | undefined> {
  const member = memberOf(request.subject);
  return transact(app, async (tx) => {
    await holdMember(tx, caller, member);
    const group = await getGroup(tx, caller, request.groupId, "unchanged");
    checkMayChange(group, caller);
    checkEditable(group);
    const most = app.limits.groupMembers;
    // One who is a member already is told so first.
    if (group.memberCount >= most && !(await findMembership(tx, group.id, member)))
      throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", `a group may have at most ${most} members`);
    await insertMembership(tx, group, { id: app.newId(), member }, attribution(app, caller));
    return findMembership(tx, group.id, member);
  });
}

async function leave(app: App, caller: Caller, membershipId: string): Promise<void> {
  await transact(app, async (tx) => {
    const membership = await getMembership(tx, caller, membershipId);
    const group = await getGroup(tx, caller, membership.groupId, "unchanged");
    if (membership.member.id !== caller.id) checkMayChange(group, caller);
    checkEditable(group);
    await deleteMembership(tx, group, membership, attribution(app, caller));
  });
}

/** Who is in a group. */
export function memberships(app: App): Pick<ServiceImpl<typeof GroupService>, Memberships> {
  return {
    async createMembership(request, context) {
      const membership = await join(app, principal(context), request);
      return { member: membership && membershipMessage(membership) };
    },
    async deleteMembership(request, context) {
      await leave(app, principal(context), request.membershipId);
      return {};
    },
    async getMembership(request, context) {
      const group = await getGroup(app.db.point, principal(context), request.groupId);
      const { subject } = request;
      const membership = subject?.id ? await findMembership(app.db.point, group.id, subject) : undefined;
      return { member: membership && membershipMessage(membership) };
    },
    async listMemberships(request, context) {
      const caller = principal(context);
      const group = await getGroup(app.db.point, caller, request.groupId);
      const page = openPage(request.pagination, ["memberships", caller.id, group.id, request.filter]);
      const rows = await listMemberships(app.db.list, group.id, request.filter?.search ?? "", page);
      const { items, nextToken } = closePage(page, rows, ({ id }) => id);
      return { members: items.map(membershipMessage), pagination: { nextToken } };
    },
  };
}
