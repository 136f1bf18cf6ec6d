import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { assignmentsOn, builtInGroup, newGroup } from "./harness/groups.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount } from "./harness/tenants.ts";

const { CREATE, UPDATE, DELETE } = ResourceOperation;
const { GROUP, GROUP_MEMBERSHIP_CHANGED, ROLE_ASSIGNMENT, ROLE_ASSIGNMENT_CHANGED, RUNNER } = ResourceType;
const LIMITS = { groups: 60, groupMembers: 5 };

let plane: TestPlane;
let member: TestUser;
let groupsAdmin: TestUser;
let foreign: TestUser;

beforeAll(async () => {
  plane = await startTestPlane({}, LIMITS);
  member = await plane.addUser({ name: "Ada Lovelace" });
  groupsAdmin = await plane.addUser({ name: "Grace Hopper" });
  await newGroup(plane, { users: [groupsAdmin], organizationRoles: [ResourceRole.ORG_GROUPS_ADMIN] });
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const groups = () => plane.admin.groups;
const user = ({ id }: { id: string }) => ({ id, principal: Principal.USER });

async function newRunner(): Promise<string> {
  const { runner } = await plane.admin.runners.createRunner({ name: "shared", provider: RunnerProvider.LINUX_HOST });
  return runner?.runnerId ?? "";
}

/** A member with the role ADMIN on a group. */
async function groupAdmin(groupId: string): Promise<TestUser> {
  const admin = await plane.addUser();
  const principal = { principal: Principal.USER, principalId: admin.id };
  const resource = { resourceType: GROUP, resourceId: groupId };
  await groups().shareResourceWithPrincipal({ ...resource, ...principal, role: ResourceRole.GROUP_ADMIN });
  return admin;
}

/** Code and details of a refusal because of what a group is. */
async function managed(call: Promise<unknown>): Promise<unknown[]> {
  const error = await refusal(call);
  const details = error
    .findDetails(ActionableErrorDetailsSchema)
    .map(({ errorCode, metadata }) => [errorCode, metadata]);
  return [await codeOf(Promise.reject(error)), ...details];
}

const systemManaged = (groupId: string) => [
  "FailedPrecondition",
  ["GROUP_STATE_SYSTEM_MANAGED", { group_id: groupId }],
];

describe("groups", () => {
  test("are made by organization and groups admins, and read by every member, by id and by name in any case", async () => {
    const { organizationId } = plane;
    const request = { organizationId, name: "Build Team", description: "Who keeps the builds green" };
    expect(await codeOf(member.client.groups.createGroup(request))).toBe("PermissionDenied");
    const { group } = await groupsAdmin.client.groups.createGroup(request);
    expect(group).toMatchObject({ ...request, systemManaged: false, directShare: false, memberCount: 0 });
    expect(group?.createdAt).toEqual(group?.updatedAt);
    const { client } = await addServiceAccount(plane);
    for (const by of [
      { group: { case: "id" as const, value: group!.id.toUpperCase() } },
      { group: { case: "name" as const, value: "bUILD tEAM" } },
      { groupId: group!.id },
    ]) {
      expect((await client.groups.getGroup(by)).group).toEqual(group);
    }
    expect(await codeOf(groups().getGroup({}))).toBe("InvalidArgument");
    expect(await codeOf(groups().getGroup({ groupId: "nonsense" }))).toBe("NotFound");
    expect(await auditActions(plane, group!.id)).toEqual(["Group created"]);
  });

  test("PLT-19: a group of another organization is not found, whatever is asked of it", async () => {
    const groupId = await newGroup(plane, { name: "not theirs", users: [member] });
    const id = { case: "id" as const, value: groupId };
    const byName = { case: "name" as const, value: "not theirs" };
    const { members } = await groups().listMemberships({ groupId });
    const theirs = foreign.client.groups;
    const resource = { resourceType: GROUP, resourceId: groupId };
    const principal = { principal: Principal.USER, principalId: foreign.id };
    const role = ResourceRole.GROUP_ADMIN;
    const calls = [
      theirs.createGroup({ organizationId: plane.organizationId, name: "intruders" }),
      theirs.getGroup({ group: id }),
      theirs.getGroup({ group: byName }),
      theirs.updateGroup({ groupId, name: "ours now" }),
      theirs.deleteGroup({ groupId }),
      theirs.createMembership({ groupId, subject: user(foreign) }),
      theirs.getMembership({ groupId, subject: user(foreign) }),
      theirs.listMemberships({ groupId }),
      theirs.deleteMembership({ membershipId: members[0]!.id }),
      theirs.createRoleAssignment({ groupId, ...resource, resourceRole: role }),
      theirs.shareResourceWithPrincipal({ ...resource, ...principal, role }),
      theirs.unshareResourceWithPrincipal({ ...resource, ...principal }),
    ];
    expect(await Promise.all(calls.map(codeOf))).toEqual(calls.map(() => "NotFound"));
    expect((await theirs.listGroups({ filter: { groupIds: [groupId] } })).groups).toEqual([]);
    expect((await theirs.listRoleAssignments({ filter: { groupId } })).assignments).toEqual([]);
  });

  test("a name is taken once, in whatever case and however many ask for it at the same time", async () => {
    const { organizationId } = plane;
    const names = ["Racing", "racing", "RACING", "rAcInG", "raciNG"];
    const made = await Promise.allSettled(names.map((name) => groups().createGroup({ organizationId, name })));
    const failed = made.filter((each) => each.status === "rejected");
    expect(await Promise.all(failed.map(({ reason }) => codeOf(Promise.reject(reason))))).toEqual(
      names.slice(1).map(() => "AlreadyExists"),
    );
    expect((await groups().listGroups({ filter: { search: "racing" } })).groups).toHaveLength(1);
    expect(await codeOf(groups().createGroup({ organizationId, name: "Org-Members" }))).toBe("AlreadyExists");

    const [left, right] = [await newGroup(plane), await newGroup(plane)];
    const renamed = await Promise.allSettled(
      [left, right].map((groupId) => groups().updateGroup({ groupId, name: "One of two" })),
    );
    const [loser] = renamed.filter((each) => each.status === "rejected");
    expect(renamed.filter((each) => each.status === "fulfilled")).toHaveLength(1);
    expect(await codeOf(Promise.reject(loser?.reason))).toBe("AlreadyExists");
  });

  test("an update sets name and description, and tells nobody when they are what they were", async () => {
    const groupId = await newGroup(plane);
    const admin = await groupAdmin(groupId);
    expect(await codeOf(member.client.groups.updateGroup({ groupId, name: "mine" }))).toBe("PermissionDenied");
    const update = { groupId, name: "renamed", description: "by its admin" };
    const { group } = await admin.client.groups.updateGroup(update);
    expect(group).toMatchObject({ id: groupId, name: "renamed", description: "by its admin" });
    const before = await traces(plane, GROUP);
    expect((await groupsAdmin.client.groups.updateGroup(update)).group).toEqual(group);
    expect(await traces(plane, GROUP)).toEqual(before);
    await groups().updateGroup({ groupId, name: "renamed" });
    expect(await auditActions(plane, groupId)).toEqual([
      "Group created",
      "Group changed: name, description",
      "Group changed: description",
    ]);
  });

  test("lists are newest first, page by page, and narrow down by every filter", async () => {
    const ids = [];
    for (const each of ["a", "b", "c"]) ids.unshift(await newGroup(plane, { name: `100%_${each} listed` }));
    const find = async (filter: object) =>
      (await member.client.groups.listGroups({ filter })).groups.map(({ id }) => id);
    expect(await find({ search: "0%_" })).toEqual(ids);
    expect(await find({ search: "%_B" })).toEqual([ids[1]]);
    expect(await find({ search: "_0" })).toEqual([]);
    expect(await find({ search: ids[2]!.slice(9).toUpperCase() })).toEqual([ids[2]]);
    expect(await find({ groupIds: [ids[2], uuidv7(), ids[0]] })).toEqual([ids[0], ids[2]]);
    expect((await find({ systemManaged: true })).length).toBe(2);
    expect(await find({ systemManaged: false, search: "listed" })).toEqual(ids);

    const resourceId = await newRunner();
    const runner = { resourceType: RUNNER, resourceId };
    await groups().createRoleAssignment({ groupId: ids[1], ...runner, resourceRole: ResourceRole.RUNNER_USER });
    expect(await find({ search: "listed", excludeAssignedToResource: runner })).toEqual([ids[0], ids[2]]);
    const other = { resourceType: GROUP, resourceId };
    expect(await find({ search: "listed", excludeAssignedToResource: other })).toEqual(ids);

    const page = (token: string, client = member.client) =>
      client.groups.listGroups({ filter: { search: "listed" }, pagination: { pageSize: 2, token } });
    const first = await page("");
    const token = first.pagination?.nextToken ?? "";
    const second = await page(token);
    expect([...first.groups, ...second.groups].map(({ id }) => id)).toEqual(ids);
    expect(second.pagination?.nextToken).toBe("");
    expect(await codeOf(page(token, groupsAdmin.client))).toBe("InvalidArgument");
  });

  test("a deletion ends at once what the group could do, and what others could do with it", async () => {
    const stream = await watchEvents(member.client);
    const groupId = await newGroup(plane, { users: [member] });
    // A reader that is behind is told how it ended, and no more of how it began.
    await stream.next(eventText(GROUP, CREATE, groupId));
    await stream.next(eventText(GROUP_MEMBERSHIP_CHANGED, UPDATE, groupId));
    const runnerId = await newRunner();
    const runner = { resourceType: RUNNER, resourceId: runnerId };
    await groups().createRoleAssignment({ groupId, ...runner, resourceRole: ResourceRole.RUNNER_USER });
    const admin = await groupAdmin(groupId);
    expect(await codeOf(admin.client.groups.deleteGroup({ groupId }))).toBe("PermissionDenied");
    const [held] = await assignmentsOn(plane, runnerId);
    const [on] = await assignmentsOn(plane, groupId);
    await member.client.runners.getRunner({ runnerId });

    const { organizationId } = plane;
    const policy = () => plane.admin.organizations.getOrganizationPolicies({ organizationId });
    const scmToolsAllowedGroupId = groupId;
    await plane.admin.organizations.updateOrganizationPolicies({
      organizationId,
      agentPolicy: { scmToolsAllowedGroupId },
    });
    await groupsAdmin.client.groups.deleteGroup({ groupId });
    expect(await codeOf(member.client.runners.getRunner({ runnerId }))).toBe("NotFound");
    expect(await codeOf(groups().getGroup({ groupId }))).toBe("NotFound");
    expect(await codeOf(groups().deleteGroup({ groupId }))).toBe("NotFound");
    const { assignments } = await groups().listRoleAssignments({});
    expect(assignments.filter(({ id }) => id === held!.id || id === on!.id)).toEqual([]);
    expect((await policy()).policies?.agentPolicy?.scmToolsAllowedGroupId).toBe("");

    for (const text of [eventText(ROLE_ASSIGNMENT, DELETE, held!.id), eventText(GROUP, DELETE, groupId)])
      await stream.next(text);
    // It is not a member's business who administers a group.
    expect(stream.events).not.toContain(eventText(ROLE_ASSIGNMENT, DELETE, on!.id));
    stream.stop();
  });

  test("there are at most so many in an organization, however many are made at once", async () => {
    await using other = await startTestPlane({}, { groups: 5 });
    const { organizationId } = other;
    const made = await Promise.allSettled(
      Array.from({ length: 8 }, (_, index) =>
        other.admin.groups.createGroup({ organizationId, name: `group ${index}` }),
      ),
    );
    const failed = made.filter((each) => each.status === "rejected");
    expect(failed).toHaveLength(5);
    for (const { reason } of failed)
      expect(reason.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "PLATFORM_LIMIT_QUOTA" }]);
    expect(await codeOf(Promise.reject(failed[0]?.reason))).toBe("ResourceExhausted");
    expect((await other.admin.groups.listGroups({})).groups).toHaveLength(5);
  });
});

describe("memberships", () => {
  test("add and remove users and service accounts; the group knows how many it has", async () => {
    const groupId = await newGroup(plane);
    const admin = await groupAdmin(groupId);
    const robot = await addServiceAccount(plane, "Deploy bot");
    const robotSubject = { id: robot.id, principal: Principal.SERVICE_ACCOUNT };
    const add = (subject: object) => admin.client.groups.createMembership({ groupId, subject });
    const { member: added } = await add(user(member));
    expect(added).toMatchObject({ groupId, subject: user(member), name: "Ada Lovelace" });
    expect((await add(robotSubject)).member).toMatchObject({ subject: robotSubject, name: "Deploy bot" });
    expect(await codeOf(add(user(member)))).toBe("AlreadyExists");

    const { members } = await member.client.groups.listMemberships({ groupId });
    expect(members.map(({ name }) => name)).toEqual(["Deploy bot", "Ada Lovelace"]);
    const count = async () => (await groups().getGroup({ groupId })).group?.memberCount;
    expect(await count()).toBe(2);
    const find = async (search: string) =>
      (await groups().listMemberships({ groupId, filter: { search } })).members.map(({ subject }) => subject?.id);
    expect(await find("LOVE")).toEqual([member.id]);
    expect(await find(`${member.id}@EXAMPLE`)).toEqual([member.id]);
    expect(await find(robot.id)).toEqual([robot.id]);
    await plane.admin.serviceAccounts.updateServiceAccount({
      serviceAccountId: robot.id,
      description: "Ships releases",
    });
    expect(await find("RELEASE")).toEqual([robot.id]);
    expect(await find("%")).toEqual([]);
    const first = await groups().listMemberships({ groupId, pagination: { pageSize: 1 } });
    const second = await groups().listMemberships({
      ...{ groupId, pagination: { pageSize: 1, token: first.pagination!.nextToken } },
    });
    expect([...first.members, ...second.members]).toEqual(members);
    expect(second.pagination?.nextToken).toBe("");

    expect((await groups().getMembership({ groupId, subject: user(member) })).member).toEqual(added);
    await admin.client.groups.deleteMembership({ membershipId: added!.id });
    expect(await codeOf(admin.client.groups.deleteMembership({ membershipId: added!.id }))).toBe("NotFound");
    expect(await count()).toBe(1);
    expect(await auditActions(plane, groupId)).toEqual([
      "Group created",
      `user ${member.id} added to the group`,
      `service account ${robot.id} added to the group`,
      `user ${member.id} removed from the group`,
    ]);
  });

  test("PLT-27: somebody who is no member has no membership, and that is no error", async () => {
    const groupId = await newGroup(plane);
    const answer = await member.client.groups.getMembership({ groupId, subject: user(member) });
    expect(answer.member).toBeUndefined();
    await groups().createMembership({ groupId, subject: user(member) });
    const asRobot = { id: member.id, principal: Principal.SERVICE_ACCOUNT };
    for (const subject of [
      asRobot,
      { id: "", principal: Principal.USER },
      { id: uuidv7(), principal: Principal.RUNNER },
    ])
      expect((await groups().getMembership({ groupId, subject })).member).toBeUndefined();
    expect(await codeOf(groups().getMembership({ groupId }))).toBe("InvalidArgument");
  });

  test("only users and service accounts that are there can be added", async () => {
    const groupId = await newGroup(plane);
    const add = (subject?: object) => groups().createMembership({ groupId, subject });
    const fields = async (subject?: object) => violatedFields(await refusal(add(subject)));
    expect(await fields()).toEqual(["subject.id"]);
    expect(await fields({ id: uuidv7(), principal: Principal.ENVIRONMENT })).toEqual(["subject.principal"]);
    expect(await fields({ id: uuidv7() })).toEqual(["subject.principal"]);
    const [gone, suspended, robot] = [await plane.addUser(), await plane.addUser(), await addServiceAccount(plane)];
    await plane.admin.users.deleteUser({ userId: gone.id });
    await plane.admin.users.setSuspended({ userId: suspended.id, suspended: true });
    await plane.admin.serviceAccounts.deleteServiceAccount({ serviceAccountId: robot.id });
    for (const subject of [
      user({ id: uuidv7() }),
      user(gone),
      user(foreign),
      { id: robot.id, principal: Principal.SERVICE_ACCOUNT },
      { id: member.id, principal: Principal.SERVICE_ACCOUNT },
    ])
      expect(await codeOf(add(subject))).toBe("NotFound");
    expect((await add(user(suspended))).member?.subject?.id).toBe(suspended.id);
  });

  test("a member may leave by itself, and take nobody along", async () => {
    const other = await plane.addUser();
    const groupId = await newGroup(plane, { users: [member, other] });
    const { members } = await groups().listMemberships({ groupId });
    const [theirs, own] = members.map(({ id }) => id);
    const leave = (membershipId = "") => member.client.groups.deleteMembership({ membershipId });
    expect(await codeOf(leave(theirs))).toBe("PermissionDenied");
    await leave(own);
    expect((await groups().listMemberships({ groupId })).members.map(({ id }) => id)).toEqual([theirs]);
  });

  test("PLT-21: who is in a group that holds a role in the organization is up to organization admins alone", async () => {
    const groupId = await newGroup(plane, { users: [member], organizationRoles: [ResourceRole.ORG_ADMIN] });
    const admin = await groupAdmin(groupId);
    const { members } = await groups().listMemberships({ groupId });
    for (const { client, id } of [admin, groupsAdmin]) {
      const calls = [
        client.groups.createMembership({ groupId, subject: user({ id }) }),
        client.groups.updateGroup({ groupId, name: "harmless" }),
        client.groups.deleteMembership({ membershipId: members[0]!.id }),
        client.groups.deleteGroup({ groupId }),
      ];
      expect(await Promise.all(calls.map(codeOf))).toEqual(calls.map(() => "PermissionDenied"));
    }
    expect(await codeOf(admin.client.runners.createRunner({ name: "not yet", provider: RunnerProvider.GCP }))).toBe(
      "PermissionDenied",
    );
    // Who is in it is an organization admin, until it leaves.
    await member.client.groups.updateGroup({ groupId, name: "by an organization admin" });
    await member.client.groups.deleteMembership({ membershipId: members[0]!.id });
    expect(await codeOf(member.client.groups.deleteGroup({ groupId }))).toBe("PermissionDenied");
    await groups().deleteGroup({ groupId });
  });

  test("there are at most so many in a group, however many are added at once", async () => {
    const groupId = await newGroup(plane);
    const people = await Promise.all(Array.from({ length: 8 }, () => plane.addUser()));
    const added = await Promise.allSettled(
      people.map((each) => groups().createMembership({ groupId, subject: user(each) })),
    );
    const failed = added.filter((each) => each.status === "rejected");
    expect(failed).toHaveLength(people.length - LIMITS.groupMembers);
    expect(await codeOf(Promise.reject(failed[0]?.reason))).toBe("ResourceExhausted");
    const { members, group } = {
      ...(await groups().listMemberships({ groupId })),
      ...(await groups().getGroup({ groupId })),
    };
    expect([members.length, group?.memberCount]).toEqual([LIMITS.groupMembers, LIMITS.groupMembers]);
    expect(await codeOf(groups().createMembership({ groupId, subject: members[0]!.subject }))).toBe("AlreadyExists");
  });

  test("of two that add the same member one does", async () => {
    const groupId = await newGroup(plane);
    const before = await traces(plane, GROUP_MEMBERSHIP_CHANGED);
    const added = await Promise.allSettled(
      Array.from({ length: 4 }, () => groups().createMembership({ groupId, subject: user(member) })),
    );
    expect(added.filter((each) => each.status === "fulfilled")).toHaveLength(1);
    expect((await groups().getGroup({ groupId })).group?.memberCount).toBe(1);
    expect((await traces(plane, GROUP_MEMBERSHIP_CHANGED)).events - before.events).toBe(1);
  });
});

/** Names of the built-in groups that somebody is in. */
async function builtInGroupsOf(memberId: string): Promise<string[]> {
  const rows = await plane.plane.app.db.point<{ name: string }[]>`
    select g.name from group_members m join groups g on g.id = m.group_id
    where m.member_id = ${memberId} and g.system_managed order by g.name`;
  return rows.map(({ name }) => name);
}

describe("built-in groups", () => {
  test("PLT-22: take neither members nor another name, and new members of the organization are in them by themselves", async () => {
    const robot = await addServiceAccount(plane);
    for (const name of ["org-members", "org-admins"] as const) {
      const groupId = await builtInGroup(plane, name);
      const { members } = await groups().listMemberships({ groupId });
      const calls = [
        groups().createMembership({ groupId, subject: user(member) }),
        groups().updateGroup({ groupId, name: "everybody" }),
        groups().deleteMembership({ membershipId: members[0]!.id }),
        groups().deleteGroup({ groupId }),
      ];
      expect(await Promise.all(calls.map(managed))).toEqual(calls.map(() => systemManaged(groupId)));
      expect(await codeOf(member.client.groups.updateGroup({ groupId, name: "mine" }))).toBe("PermissionDenied");
    }
    const groupId = await builtInGroup(plane, "org-members");
    const own = await robot.client.groups.getMembership({
      ...{ groupId, subject: { id: robot.id, principal: Principal.SERVICE_ACCOUNT } },
    });
    expect(own.member?.subject?.id).toBe(robot.id);
    expect(await managed(robot.client.groups.deleteMembership({ membershipId: own.member!.id }))).toEqual(
      systemManaged(groupId),
    );
  });

  test("follow status and role of users and the end of service accounts, and tell only when something changed", async () => {
    const { organizationId, admin } = plane;
    const person = await plane.addUser({ role: OrganizationRole.ADMIN });
    const robot = await addServiceAccount(plane);
    expect(await builtInGroupsOf(person.id)).toEqual(["org-admins", "org-members"]);
    expect(await builtInGroupsOf(robot.id)).toEqual(["org-members"]);

    const setRole = (role: OrganizationRole) =>
      admin.organizations.setRole({ organizationId, userId: person.id, role });
    await setRole(OrganizationRole.MEMBER);
    expect(await builtInGroupsOf(person.id)).toEqual(["org-members"]);
    const before = (await traces(plane, GROUP_MEMBERSHIP_CHANGED)).events;
    const told = async () => (await traces(plane, GROUP_MEMBERSHIP_CHANGED)).events - before;
    await setRole(OrganizationRole.MEMBER);
    expect(await told()).toBe(0);
    await admin.users.setSuspended({ userId: person.id, suspended: true });
    expect([await builtInGroupsOf(person.id), await told()]).toEqual([[], 1]);
    await admin.users.setSuspended({ userId: person.id, suspended: false });
    expect([await builtInGroupsOf(person.id), await told()]).toEqual([["org-members"], 2]);

    await admin.serviceAccounts.deleteServiceAccount({ serviceAccountId: robot.id });
    expect(await builtInGroupsOf(robot.id)).toEqual([]);
  });

  test("whoever leaves is in no group any more, and what was shared with them directly has ended", async () => {
    const runnerId = await newRunner();
    const person = await plane.addUser();
    const groupId = await newGroup(plane, { users: [person] });
    await groups().shareResourceWithPrincipal({
      ...{ resourceType: RUNNER, resourceId: runnerId, role: ResourceRole.RUNNER_USER },
      ...{ principal: Principal.USER, principalId: person.id },
    });
    const [assignment] = await assignmentsOn(plane, runnerId);
    const stream = await watchEvents(plane.admin);
    await person.client.organizations.leaveOrganization({ userId: person.id });
    await stream.next(eventText(ROLE_ASSIGNMENT, DELETE, assignment!.id));
    await stream.next(eventText(ROLE_ASSIGNMENT_CHANGED, UPDATE, runnerId));
    await stream.next(eventText(GROUP_MEMBERSHIP_CHANGED, UPDATE, groupId));
    stream.stop();
    expect(await builtInGroupsOf(person.id)).toEqual([]);
    expect((await groups().listRoleAssignments({ filter: { groupId: assignment!.groupId } })).assignments).toEqual([]);
    expect(await codeOf(groups().getGroup({ groupId: assignment!.groupId }))).toBe("NotFound");
    expect((await groups().getGroup({ groupId })).group?.memberCount).toBe(0);
  });
});

describe("groups that belong to nobody", () => {
  test("the group behind a direct share is found by its id alone, and changed by nobody", async () => {
    const person = await plane.addUser({ name: "Shared With" });
    const runnerId = await newRunner();
    const share = { resourceType: RUNNER, resourceId: runnerId, principal: Principal.USER, principalId: person.id };
    await groups().shareResourceWithPrincipal({ ...share, role: ResourceRole.RUNNER_USER });
    const [assignment] = await assignmentsOn(plane, runnerId);
    const groupId = assignment!.groupId;
    const { group } = await member.client.groups.getGroup({ groupId });
    expect(group).toMatchObject({ directShare: true, systemManaged: false, memberCount: 1 });
    expect((await groups().listMemberships({ groupId })).members).toMatchObject([{ subject: user(person) }]);
    expect(await codeOf(groups().getGroup({ group: { case: "name", value: group!.name } }))).toBe("NotFound");
    const listed = async (filter: object) => (await groups().listGroups({ filter })).groups.map(({ id }) => id);
    expect(await listed({ groupIds: [groupId] })).toEqual([]);
    expect(await listed({ groupIds: [groupId], directShare: false })).toEqual([]);
    expect(await listed({ groupIds: [groupId], directShare: true })).toEqual([groupId]);

    const { members } = await groups().listMemberships({ groupId });
    const calls = [
      groups().createMembership({ groupId, subject: user(member) }),
      groups().updateGroup({ groupId, name: "shares" }),
      groups().deleteMembership({ membershipId: members[0]!.id }),
      person.client.groups.deleteMembership({ membershipId: members[0]!.id }),
      groups().deleteGroup({ groupId }),
      groups().createRoleAssignment({
        ...{ groupId, resourceType: ResourceType.ORGANIZATION, resourceId: plane.organizationId },
        resourceRole: ResourceRole.ORG_ADMIN,
      }),
    ];
    expect(await Promise.all(calls.map(managed))).toEqual(calls.map(() => systemManaged(groupId)));
  });

  test("name and members of a group that SCIM keeps are read here, what it may do is said here", async () => {
    const groupId = await newGroup(plane, { users: [member] });
    await plane.plane.app.db.write`update groups set scim_managed = true where id = ${groupId}`;
    const { members } = await groups().listMemberships({ groupId });
    const calls = [
      groups().createMembership({ groupId, subject: user(groupsAdmin) }),
      groups().updateGroup({ groupId, name: "renamed" }),
      groups().deleteMembership({ membershipId: members[0]!.id }),
      groups().deleteGroup({ groupId }),
    ];
    expect(await Promise.all(calls.map(managed))).toEqual(calls.map(() => systemManaged(groupId)));
    const resource = { resourceType: RUNNER, resourceId: await newRunner() };
    const { assignment } = await groups().createRoleAssignment({
      ...{ groupId, ...resource, resourceRole: ResourceRole.RUNNER_USER },
    });
    await groups().deleteRoleAssignment({ assignmentId: assignment!.id });
    expect((await groups().getGroup({ groupId })).group?.systemManaged).toBe(false);
  });
});
