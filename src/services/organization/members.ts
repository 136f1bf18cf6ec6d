import type { ServiceImpl } from "@connectrpc/connect";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import {
  type ListMembersRequest,
  OrganizationRole,
  type OrganizationService,
  type SetRoleRequest,
  ListMembersRequest_SortField as SortField,
} from "../../../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../../../gen/gitpod/v1/pagination_pb.js";
import { UserStatus } from "../../../gen/gitpod/v1/user_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { denied, type FieldProblem, invalid, precondition, refuseProblems } from "../../domain/errors.ts";
import { COUNT_CAP, closePage, countAnswer, openPage } from "../../domain/pages.ts";
import { type Caller, ownOrganization } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { endMembership, refuseLastAdmin } from "../../store/departures.ts";
import { countMembers, getMembershipOf, listMembers, memberMessage } from "../../store/members.ts";
import { getUser, holdUser, type StoredUser, setUserRole } from "../../store/users.ts";

/** Numbers that the contract lets through and that mean nothing. */
function listProblems({ filter, sort }: ListMembersRequest): FieldProblem[] {
  const unknown = (field: string, values: readonly number[], known: object) =>
    values.flatMap((value, index) =>
      value in known ? [] : [{ field: `${field}[${index}]`, message: "is not a known value" }],
    );
  return [
    ...unknown("filter.statuses", filter?.statuses ?? [], UserStatus),
    ...unknown("filter.roles", filter?.roles ?? [], OrganizationRole),
    ...((sort?.field ?? 0) in SortField ? [] : [{ field: "sort.field", message: "is not a known field" }]),
    ...((sort?.order ?? 0) in SortOrder ? [] : [{ field: "sort.order", message: "is not a known order" }]),
  ];
}

async function list(app: App, caller: Caller, request: ListMembersRequest) {
  refuseProblems(listProblems(request));
  const membership = await getMembershipOf(app.db.point, caller, request.organizationId);
  const { filter, sort } = request;
  const page = openPage(request.pagination, ["members", caller.id, membership.organizationId, filter, sort]);
  const wantsCount = request.count?.include === true && !page.after;
  const [rows, total] = await Promise.all([
    listMembers(app.db.list, membership, request, page),
    wantsCount ? countMembers(app.db.list, membership, filter, COUNT_CAP + 1) : undefined,
  ]);
  const { items, nextToken } = closePage(page, rows, ({ position }) => position);
  const count = total === undefined ? undefined : countAnswer(total);
  return { members: items.map(memberMessage), pagination: { nextToken }, count };
}

async function setRole(app: App, caller: Caller, { organizationId, userId, role }: SetRoleRequest): Promise<void> {
  if (role !== OrganizationRole.ADMIN && role !== OrganizationRole.MEMBER)
    throw invalid({ field: "role", message: "must be admin or member" });
  ownOrganization(caller, organizationId);
  const visible = await getUser(app.db.point, caller, userId);
  if (!caller.orgAdmin) throw denied("changing roles needs the role admin in the organization");
  await transact(app, async (tx) => {
    const user = await holdUser(tx, visible);
    if (user.status === UserStatus.LEFT) throw precondition("the user has left the organization");
    if (user.role === role) return;
    await refuseLastAdmin(tx, user);
    await setUserRole(tx, user, role, attribution(app, caller));
  });
}

const isSelf = (caller: Caller, user: StoredUser) =>
  caller.principal === Principal.ACCOUNT ? user.accountId === caller.id : user.id === caller.id;

async function leave(app: App, caller: Caller, userId: string): Promise<void> {
  const visible = await getUser(app.db.point, caller, userId);
  const self = isSelf(caller, visible);
  if (!self && !caller.orgAdmin) throw denied("removing others needs the role admin in the organization");
  await transact(app, async (tx, touched) => {
    const user = await holdUser(tx, visible);
    if (user.status === UserStatus.LEFT) return;
    const departure = { status: UserStatus.LEFT, action: self ? "User left" : "User removed" } as const;
    await endMembership(tx, user, departure, attribution(app, caller), touched);
  });
}

/** Who is in an organization, as what, and how they leave it. */
export function members(app: App) {
  return {
    listMembers: (request, context) => list(app, principal(context), request),
    async setRole(request, context) {
      await setRole(app, principal(context), request);
      return {};
    },
    async leaveOrganization(request, context) {
      await leave(app, principal(context), request.userId);
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof OrganizationService>>;
}
