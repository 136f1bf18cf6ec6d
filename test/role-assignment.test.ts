import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole, type RoleAssignment } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { listAssignments } from "../src/store/assignment-list.ts";
import { findCaller } from "../src/store/credentials.ts";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { assignmentsOn, builtInGroup, newGroup } from "./harness/groups.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { rowsRead } from "./harness/rows-read.ts";
import { addOrganization, addServiceAccount, connectRunner } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { CREATE, UPDATE, DELETE } = ResourceOperation;
const { ORGANIZATION, RUNNER, PROJECT, ENVIRONMENT, GROUP, SERVICE_ACCOUNT, ROLE_ASSIGNMENT, ROLE_ASSIGNMENT_CHANGED } =
  ResourceType;
const { ORG_ADMIN, ORG_RUNNERS_ADMIN, ORG_GROUPS_ADMIN, ORG_AUDIT_LOG_READER, RUNNER_ADMIN, RUNNER_USER } =
  ResourceRole;
const { ENVIRONMENT_ADMIN, ENVIRONMENT_USER, ENVIRONMENT_VIEWER, GROUP_ADMIN, SERVICE_ACCOUNT_ADMIN } = ResourceRole;

let plane: TestPlane;
let member: TestUser;
let foreign: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  member = await plane.addUser();
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
  ({ runner, classId } = await connectRunner(plane));
});

afterAll(async () => {
  await runner?.[Symbol.asyncDispose]();
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const groups = () => plane.admin.groups;
const onOrganization = () => ({ resourceType: ORGANIZATION, resourceId: plane.organizationId });
const onRunner = (resourceId: string) => ({ resourceType: RUNNER, resourceId });
const withUser = ({ id }: { id: string }) => ({ principal: Principal.USER, principalId: id });
const idsOf = (assignments: RoleAssignment[]) => assignments.map(({ id }) => id);

async function newRunner(client = plane.admin): Promise<string> {
  const { runner } = await client.runners.createRunner({ name: "shared", provider: RunnerProvider.LINUX_HOST });
  return runner?.runnerId ?? "";
}

async function newEnvironment(owner: TestUser): Promise<string> {
  const spec = { machine: { class: classId } };
  return (await owner.client.environments.createEnvironment({ spec })).environment?.id ?? "";
}

/** Gives a group a role; the assignment. */
async function assign(
  groupId: string,
  resource: { resourceType: ResourceType; resourceId: string },
  role: ResourceRole,
) {
  const { assignment } = await groups().createRoleAssignment({ groupId, ...resource, resourceRole: role });
  return assignment!;
}

const filtered = async (client = plane.admin, filter: object = {}) =>
  (await client.groups.listRoleAssignments({ filter })).assignments;

describe("which roles there are to assign", () => {
  test("each kind of resource takes its own, and nothing else", async () => {
    const groupId = await newGroup(plane);
    const robot = await addServiceAccount(plane);
    const resources: [ResourceType, string][] = [
      [ORGANIZATION, plane.organizationId],
      [RUNNER, await newRunner()],
      [ENVIRONMENT, await newEnvironment({ ...member, client: plane.admin })],
      [GROUP, await newGroup(plane)],
      [SERVICE_ACCOUNT, robot.id],
    ];
    const taken: Record<string, string[]> = {};
    for (const [resourceType, resourceId] of resources) {
      const found: string[] = [];
      for (const resourceRole of Object.values(ResourceRole).filter((each) => typeof each === "number")) {
        const request = { groupId, resourceType, resourceId, resourceRole };
        try {
          const { assignment } = await groups().createRoleAssignment(request);
          found.push(ResourceRole[resourceRole]);
          await groups().deleteRoleAssignment({ assignmentId: assignment!.id });
        } catch (error) {
          expect(violatedFields(await refusal(Promise.reject(error)))).toEqual(["resource_role"]);
        }
      }
      taken[ResourceType[resourceType]] = found.sort();
    }
    expect(taken).toEqual({
      ORGANIZATION: [
        "ORG_ADMIN",
        "ORG_AUDIT_LOG_READER",
        "ORG_AUTOMATIONS_ADMIN",
        "ORG_BILLING_VIEWER",
        "ORG_ENVIRONMENTS_READER",
        "ORG_GROUPS_ADMIN",
        "ORG_INSIGHTS_VIEWER",
        "ORG_PROJECTS_ADMIN",
        "ORG_RUNNERS_ADMIN",
        "ORG_SECURITY_ADMIN",
      ],
      RUNNER: ["RUNNER_ADMIN", "RUNNER_USER"],
      ENVIRONMENT: ["ENVIRONMENT_ADMIN", "ENVIRONMENT_USER", "ENVIRONMENT_VIEWER"],
      GROUP: ["GROUP_ADMIN", "GROUP_VIEWER"],
      SERVICE_ACCOUNT: ["SERVICE_ACCOUNT_ADMIN"],
    });
  });

  test("what is no kind of resource or no role is INVALID_ARGUMENT, a kind that there is nothing of NOT_FOUND", async () => {
    const groupId = await newGroup(plane);
    const fields = async (request: object) =>
      violatedFields(await refusal(groups().createRoleAssignment({ groupId, resourceId: uuidv7(), ...request })));
    expect(await fields({ resourceRole: RUNNER_USER })).toEqual(["resource_type"]);
    expect(await fields({ resourceType: 999, resourceRole: RUNNER_USER })).toEqual(["resource_type"]);
    expect(await fields({ resourceType: RUNNER })).toEqual(["resource_role"]);
    expect(await fields({ resourceType: RUNNER, resourceRole: 999 })).toEqual(["resource_role"]);
    const webhook = { groupId, resourceId: uuidv7(), resourceType: ResourceType.WEBHOOK };
    expect(await codeOf(groups().createRoleAssignment({ ...webhook, resourceRole: ResourceRole.WEBHOOK_ADMIN }))).toBe(
      "NotFound",
    );
    const unknown = { groupId, ...onRunner(uuidv7()), resourceRole: RUNNER_USER };
    expect(await codeOf(groups().createRoleAssignment(unknown))).toBe("NotFound");
    const nobody = { groupId: uuidv7(), ...onRunner(await newRunner()), resourceRole: RUNNER_USER };
    expect(await codeOf(groups().createRoleAssignment(nobody))).toBe("NotFound");
    const share = { ...withUser(member), resourceId: plane.organizationId };
    const shared = async (request: { resourceType: ResourceType; role: ResourceRole }) =>
      violatedFields(await refusal(groups().shareResourceWithPrincipal({ ...share, ...request })));
    expect(await shared({ resourceType: ORGANIZATION, role: ORG_ADMIN })).toEqual(["resource_type"]);
    expect(await shared({ resourceType: RUNNER, role: ResourceRole.RUNNER_IDENTITY })).toEqual(["role"]);
  });

  test("built-in groups: org-members takes none on the organization, org-admins none at all", async () => {
    const [members, admins] = [await builtInGroup(plane, "org-members"), await builtInGroup(plane, "org-admins")];
    const runnerId = await newRunner();
    for (const [groupId, resource, role] of [
      [members, onOrganization(), ORG_AUDIT_LOG_READER],
      [admins, onOrganization(), ORG_AUDIT_LOG_READER],
      [admins, onRunner(runnerId), RUNNER_USER],
    ] as const) {
      const error = await refusal(assign(groupId, resource, role));
      expect(await codeOf(Promise.reject(error))).toBe("FailedPrecondition");
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([
        { errorCode: "GROUP_STATE_SYSTEM_MANAGED", metadata: { group_id: groupId } },
      ]);
    }
  });
});

describe("what an assignment does", () => {
  test("PLT-20: a runner is hidden until org-members may use it, and hidden again once they may not", async () => {
    const runnerId = await newRunner();
    const listed = async () =>
      (await member.client.runners.listRunners({})).runners.some((each) => each.runnerId === runnerId);
    expect(await listed()).toBe(false);
    const { id } = await assign(await builtInGroup(plane, "org-members"), onRunner(runnerId), RUNNER_USER);
    expect(await listed()).toBe(true);
    await groups().deleteRoleAssignment({ assignmentId: id });
    expect(await listed()).toBe(false);
    expect(await codeOf(groups().deleteRoleAssignment({ assignmentId: id }))).toBe("NotFound");
  });

  test("a group has one role on a resource, and any number of different ones on the organization", async () => {
    const groupId = await newGroup(plane);
    const runnerId = await newRunner();
    const given = await assign(groupId, onRunner(runnerId.toUpperCase()), RUNNER_USER);
    expect(given).toMatchObject({
      ...{ groupId, organizationId: plane.organizationId, resourceId: runnerId, resourceType: RUNNER },
      resourceRole: RUNNER_USER,
    });
    expect(given.derivedFromOrgRole).toBeUndefined();
    for (const role of [RUNNER_USER, RUNNER_ADMIN])
      expect(await codeOf(assign(groupId, onRunner(runnerId), role))).toBe("AlreadyExists");
    await assign(groupId, onOrganization(), ORG_RUNNERS_ADMIN);
    await assign(groupId, onOrganization(), ORG_AUDIT_LOG_READER);
    expect(await codeOf(assign(groupId, onOrganization(), ORG_RUNNERS_ADMIN))).toBe("AlreadyExists");
    const attempts = await Promise.allSettled(
      Array.from({ length: 4 }, () => assign(groupId, onRunner(runner.id), RUNNER_USER)),
    );
    expect(attempts.filter(({ status }) => status === "fulfilled")).toHaveLength(1);
  });

  test("it is told and put down once, to those whom it concerns", async () => {
    const [inGroup, outside] = [await plane.addUser(), await plane.addUser()];
    const groupId = await newGroup(plane, { name: "the concerned", users: [inGroup] });
    const runnerId = await newRunner();
    const streams = [
      await watchEvents(plane.admin),
      await watchEvents(inGroup.client),
      await watchEvents(outside.client),
    ];
    const { id } = await assign(groupId, onRunner(runnerId), RUNNER_USER);
    await Promise.all(streams.slice(0, 2).map((stream) => stream.next(eventText(ROLE_ASSIGNMENT, CREATE, id))));
    const changed = eventText(ROLE_ASSIGNMENT_CHANGED, UPDATE, runnerId);
    await Promise.all(streams.slice(0, 2).map((stream) => stream.next(changed)));
    await groups().deleteRoleAssignment({ assignmentId: id });
    const { id: last } = await assign(groupId, onOrganization(), ORG_AUDIT_LOG_READER);
    for (const stream of streams) await stream.next(eventText(ROLE_ASSIGNMENT, CREATE, last));
    const gone = eventText(ROLE_ASSIGNMENT, DELETE, id);
    expect(streams.map(({ events }) => events.includes(gone))).toEqual([true, true, false]);
    expect(streams[2]!.events.filter((text) => text.includes(id) || text.includes(runnerId))).toEqual([]);
    await groups().deleteRoleAssignment({ assignmentId: last });
    for (const stream of streams) {
      await stream.next(eventText(ROLE_ASSIGNMENT, DELETE, last));
      stream.stop();
    }
    expect(await auditActions(plane, id)).toEqual([
      `Role RUNNER_USER on runner ${runnerId} given to group the concerned`,
      `Role RUNNER_USER on runner ${runnerId} taken from group the concerned`,
    ]);
    expect(await auditActions(plane, runnerId)).toEqual(["Runner created", "Runner exchange token issued"]);
  });

  test("it goes with its resource, which is told to those who could read it", async () => {
    const inGroup = await plane.addUser();
    const groupId = await newGroup(plane, { users: [inGroup] });
    const runnerId = await newRunner();
    const { id } = await assign(groupId, onRunner(runnerId), RUNNER_USER);
    const stream = await watchEvents(inGroup.client);
    await plane.admin.runners.deleteRunner({ runnerId, force: true });
    await stream.next(eventText(ROLE_ASSIGNMENT, DELETE, id));
    stream.stop();
    expect(await filtered(plane.admin, { groupId })).toEqual([]);
    expect(await codeOf(assign(groupId, onRunner(runnerId), RUNNER_USER))).toBe("NotFound");
  });
});

describe("who may assign", () => {
  /** Codes with which callers give a role on a resource to `org-members` and, if they could, take it away again. */
  async function codes(
    resource: { resourceType: ResourceType; resourceId: string },
    role: ResourceRole,
    callers: TestUser[],
  ) {
    const groupId = await newGroup(plane);
    const outcomes = [];
    for (const { client } of callers) {
      try {
        const { assignment } = await client.groups.createRoleAssignment({ groupId, ...resource, resourceRole: role });
        const other = { ...resource, ...withUser(member) };
        await client.groups.shareResourceWithPrincipal({ ...other, role }).catch((error: unknown) => {
          if (resource.resourceType !== ORGANIZATION) throw error;
        });
        await client.groups.unshareResourceWithPrincipal(other).catch((error: unknown) => {
          if (resource.resourceType !== ORGANIZATION) throw error;
        });
        await client.groups.deleteRoleAssignment({ assignmentId: assignment!.id });
        outcomes.push("ok");
      } catch (error) {
        outcomes.push(await codeOf(Promise.reject(error)));
      }
    }
    return outcomes;
  }

  async function holder(role: ResourceRole, resource = onOrganization()): Promise<TestUser> {
    const user = await plane.addUser();
    await assign(await newGroup(plane, { users: [user] }), resource, role);
    return user;
  }

  const adminUser = () => ({ id: "", token: plane.adminToken, client: plane.admin });

  test("on the organization and on service accounts organization admins alone", async () => {
    const admins = [adminUser(), await holder(ORG_ADMIN)];
    const others = [await holder(ORG_RUNNERS_ADMIN), await holder(ORG_GROUPS_ADMIN), member];
    expect(await codes(onOrganization(), ORG_AUDIT_LOG_READER, [...admins, ...others])).toEqual([
      ...["ok", "ok", "PermissionDenied", "PermissionDenied", "PermissionDenied"],
    ]);
    const robot = await addServiceAccount(plane);
    const account = { resourceType: SERVICE_ACCOUNT, resourceId: robot.id };
    const own = await holder(SERVICE_ACCOUNT_ADMIN, account);
    expect(await codes(account, SERVICE_ACCOUNT_ADMIN, [...admins, own, foreign, member])).toEqual([
      ...["ok", "ok", "PermissionDenied", "NotFound", "PermissionDenied"],
    ]);
  });

  test("on a runner its admins and creator, runner admins and organization admins", async () => {
    const creator = await holder(ORG_RUNNERS_ADMIN);
    const runnerId = await newRunner(creator.client);
    const resource = onRunner(runnerId);
    const [runnerAdmin, user] = [await holder(RUNNER_ADMIN, resource), await holder(RUNNER_USER, resource)];
    const callers = [adminUser(), creator, runnerAdmin, user, await holder(ORG_GROUPS_ADMIN), foreign];
    expect(await codes(resource, RUNNER_USER, callers)).toEqual([
      ...["ok", "ok", "ok", "PermissionDenied", "NotFound", "NotFound"],
    ]);
  });

  test("on a group its admins, groups admins and organization admins", async () => {
    const resource = { resourceType: GROUP, resourceId: await newGroup(plane) };
    const callers = [adminUser(), await holder(ORG_GROUPS_ADMIN), await holder(GROUP_ADMIN, resource)];
    expect(await codes(resource, GROUP_ADMIN, [...callers, member, foreign])).toEqual([
      ...["ok", "ok", "ok", "PermissionDenied", "NotFound"],
    ]);
  });

  test("on an environment its creator and its admins, not the admins of the organization, who could let themselves in", async () => {
    const owner = await plane.addUser();
    const environmentId = await newEnvironment(owner);
    const share = { resourceType: ENVIRONMENT, resourceId: environmentId };
    const [admin, user] = [await plane.addUser(), await plane.addUser()];
    const shares = owner.client.groups;
    await shares.shareResourceWithPrincipal({ ...share, ...withUser(admin), role: ENVIRONMENT_ADMIN });
    await shares.shareResourceWithPrincipal({ ...share, ...withUser(user), role: ENVIRONMENT_USER });
    const callers = [owner, admin, user, adminUser(), await holder(ORG_ADMIN), member];
    expect(await codes(share, ENVIRONMENT_VIEWER, callers)).toEqual([
      ...["ok", "ok", "PermissionDenied", "PermissionDenied", "PermissionDenied", "NotFound"],
    ]);
    await user.client.environments.createEnvironmentAccessToken({ environmentId });
    await shares.unshareResourceWithPrincipal({ ...share, ...withUser(user) });
    expect(await codeOf(user.client.environments.createEnvironmentAccessToken({ environmentId }))).toBe("NotFound");
    await owner.client.environments.deleteEnvironment({ environmentId, force: true });
    const again = shares.shareResourceWithPrincipal({ ...share, ...withUser(user), role: ENVIRONMENT_USER });
    expect(await codeOf(again)).toBe("FailedPrecondition");
  });

  test("on the local configuration runner and on a suspended service account nobody", async () => {
    const { runners } = await plane.admin.runners.listRunners({});
    const local = runners.at(-1)!.runnerId;
    const robot = await addServiceAccount(plane);
    await plane.admin.serviceAccounts.deleteServiceAccount({ serviceAccountId: robot.id });
    const account = { resourceType: SERVICE_ACCOUNT, resourceId: robot.id };
    expect(await codes(onRunner(local), RUNNER_USER, [adminUser(), member])).toEqual([
      "FailedPrecondition",
      "PermissionDenied",
    ]);
    expect(await codes(account, SERVICE_ACCOUNT_ADMIN, [adminUser(), member])).toEqual([
      ...["FailedPrecondition", "PermissionDenied"],
    ]);
  });
});

describe("direct shares", () => {
  test("PLT-23: a second share of the same thing with the same person replaces the role, and stays hidden", async () => {
    const person = await plane.addUser();
    const runnerId = await newRunner();
    const share = { ...onRunner(runnerId), ...withUser(person) };
    await groups().shareResourceWithPrincipal({ ...share, role: RUNNER_USER });
    await groups().shareResourceWithPrincipal({ ...share, role: RUNNER_ADMIN });
    const [assignment, ...others] = await assignmentsOn(plane, runnerId);
    expect(assignment).toMatchObject({ ...onRunner(runnerId), resourceRole: RUNNER_ADMIN });
    expect(others.filter(({ derivedFromOrgRole }) => derivedFromOrgRole === undefined)).toEqual([]);
    const before = await traces(plane, ROLE_ASSIGNMENT);
    await groups().shareResourceWithPrincipal({ ...share, role: RUNNER_ADMIN });
    expect(await traces(plane, ROLE_ASSIGNMENT)).toEqual(before);
    const listed = (await groups().listGroups({ pagination: { pageSize: 100 } })).groups;
    expect(listed.filter(({ id, directShare }) => directShare || id === assignment!.groupId)).toEqual([]);
    expect((await filtered(person.client, { userId: person.id })).map(({ id }) => id)).toContain(assignment!.id);
    expect((await auditActions(plane, assignment!.id)).length).toBe(2);

    // What comes through other groups stays.
    await assign(await newGroup(plane, { users: [person] }), onRunner(runnerId), RUNNER_USER);
    await groups().unshareResourceWithPrincipal(share);
    await groups().unshareResourceWithPrincipal(share);
    await person.client.runners.getRunner({ runnerId });
    expect(await codeOf(person.client.runners.createRunnerToken({ runnerId }))).toBe("PermissionDenied");
  });

  test("however many share the same thing with the same person at once, there is one hidden group and one assignment", async () => {
    const person = await plane.addUser();
    const [runnerId, other] = [await newRunner(), await newRunner()];
    const roles = [RUNNER_USER, RUNNER_ADMIN, RUNNER_USER, RUNNER_ADMIN, RUNNER_USER, RUNNER_ADMIN];
    await Promise.all([
      ...roles.map((role) => groups().shareResourceWithPrincipal({ ...onRunner(runnerId), ...withUser(person), role })),
      ...roles.map((role) => groups().shareResourceWithPrincipal({ ...onRunner(other), ...withUser(person), role })),
    ]);
    const assignments = await filtered(plane.admin, { userId: person.id, resourceIds: [runnerId, other] });
    const made = assignments.filter(({ derivedFromOrgRole }) => derivedFromOrgRole === undefined);
    expect(made.map(({ resourceId }) => resourceId).sort()).toEqual([runnerId, other].sort());
    expect(new Set(made.map(({ groupId }) => groupId)).size).toBe(1);
    expect((await groups().getGroup({ groupId: made[0]!.groupId })).group?.memberCount).toBe(1);
  });

  test("with users that are there and with service accounts, nobody else", async () => {
    const robot = await addServiceAccount(plane);
    const runnerId = await newRunner();
    const share = (principal: Principal, principalId: string) =>
      groups().shareResourceWithPrincipal({ ...onRunner(runnerId), principal, principalId, role: RUNNER_USER });
    await share(Principal.SERVICE_ACCOUNT, robot.id);
    expect((await robot.client.runners.getRunner({ runnerId })).runner?.runnerId).toBe(runnerId);
    const gone = await plane.addUser();
    await plane.admin.users.deleteUser({ userId: gone.id });
    for (const [principal, id] of [
      [Principal.USER, uuidv7()],
      [Principal.USER, gone.id],
      [Principal.USER, foreign.id],
      [Principal.USER, robot.id],
      [Principal.SERVICE_ACCOUNT, member.id],
    ] as const)
      expect(await codeOf(share(principal, id))).toBe("NotFound");
    expect(await codeOf(share(Principal.ENVIRONMENT, uuidv7()))).toBe("InvalidArgument");
  });
});

describe("lists", () => {
  test("newest first, page by page, narrowed down by each filter", async () => {
    const person = await plane.addUser();
    const [left, right] = [await newGroup(plane, { users: [person] }), await newGroup(plane)];
    const [first, second] = [await newRunner(), await newRunner()];
    const groupIds = [left, left, right];
    const made = [
      await assign(left, onRunner(first), RUNNER_ADMIN),
      await assign(left, onRunner(second), RUNNER_USER),
      await assign(right, onRunner(second), RUNNER_ADMIN),
    ].reverse();
    expect(made.map(({ groupId }) => groupId).reverse()).toEqual(groupIds);
    const among = async (filter: object) => {
      const known = new Set(idsOf(made));
      return idsOf(await filtered(plane.admin, filter)).filter((id) => known.has(id));
    };
    const [c, b, a] = idsOf(made);
    expect(await among({})).toEqual([c, b, a]);
    expect(await among({ groupId: left })).toEqual([b, a]);
    expect(await among({ userId: person.id })).toEqual([b, a]);
    expect(await among({ userId: person.id, groupId: right })).toEqual([]);
    expect(await among({ resourceId: second })).toEqual([c, b]);
    expect(await among({ resourceIds: [first.toUpperCase(), second, first] })).toEqual([c, b, a]);
    expect(await among({ resourceRoles: [RUNNER_ADMIN] })).toEqual([c, a]);
    expect(await among({ resourceTypes: [RUNNER, GROUP], resourceRoles: [RUNNER_USER] })).toEqual([b]);
    expect(await among({ resourceTypes: [GROUP] })).toEqual([]);
    for (const filter of [
      { resourceTypes: [GROUP], resourceRoles: [RUNNER_USER] },
      { resourceTypes: [0] },
      { resourceRoles: [0] },
      { groupId: "nonsense" },
      { userId: uuidv7() },
      { resourceId: "nonsense" },
    ])
      expect(await filtered(plane.admin, filter)).toEqual([]);
    const both = refusal(filtered(plane.admin, { resourceId: first, resourceIds: [second] }));
    expect(violatedFields(await both)).toEqual(["filter.resource_id"]);

    const found = [];
    let token = "";
    for (let pages = 0; pages === 0 || token; pages++) {
      const request = { filter: { resourceTypes: [RUNNER] }, pagination: { pageSize: 2, token } };
      const page = await groups().listRoleAssignments(request);
      found.push(...idsOf(page.assignments));
      token = page.pagination?.nextToken ?? "";
      expect(pages).toBeLessThan(50);
    }
    expect(found).toEqual([...new Set(found)].sort().reverse());
    expect(found.filter((id) => idsOf(made).includes(id))).toEqual([c, b, a]);
  });

  test("members see those on the organization, of their own groups and, by resource, where they may assign", async () => {
    const person = await plane.addUser();
    const [own, other] = [await newGroup(plane, { users: [person] }), await newGroup(plane)];
    const runnerId = await newRunner();
    const onOther = await assign(other, onRunner(runnerId), RUNNER_USER);
    const organizationWide = await assign(other, onOrganization(), ORG_AUDIT_LOG_READER);
    const sees = async (filter: object = {}) => {
      const ids = idsOf(await filtered(person.client, filter));
      return [onOther, organizationWide].map(({ id }) => ids.includes(id));
    };
    expect(await sees()).toEqual([false, true]);
    expect(await sees({ groupId: other })).toEqual([false, true]);
    expect(await sees({ resourceId: runnerId })).toEqual([false, false]);
    const ownUse = await assign(own, onRunner(runnerId), RUNNER_USER);
    expect(idsOf(await filtered(person.client))).toContain(ownUse.id);
    expect(await sees({ resourceId: runnerId })).toEqual([false, false]);
    await groups().deleteRoleAssignment({ assignmentId: ownUse.id });
    const ownAdmin = await assign(own, onRunner(runnerId), RUNNER_ADMIN);
    expect(await sees()).toEqual([false, true]);
    expect(await sees({ groupId: other })).toEqual([false, true]);
    expect(await sees({ resourceId: runnerId })).toEqual([true, false]);
    expect(await codeOf(person.client.groups.deleteRoleAssignment({ assignmentId: organizationWide.id }))).toBe(
      "PermissionDenied",
    );
    await person.client.groups.deleteRoleAssignment({ assignmentId: onOther.id });
    await person.client.groups.deleteRoleAssignment({ assignmentId: ownAdmin.id });
    expect(await codeOf(foreign.client.groups.deleteRoleAssignment({ assignmentId: organizationWide.id }))).toBe(
      "NotFound",
    );
    expect(await filtered(foreign.client)).toEqual([]);
  });
});

test("members find theirs on a resource however many others have roles on it", async () => {
  const { app } = plane.plane;
  const user = await plane.addUser();
  const [resourceId, groupId] = [await newRunner(), await newGroup(plane)];
  await groups().createMembership({ groupId, subject: { id: user.id, principal: Principal.USER } });
  await assign(groupId, onRunner(resourceId), RUNNER_USER);
  await app.db.write`
    with others as (
      insert into groups (id, organization_id, name, created_at, updated_at)
      select gen_random_uuid(), ${plane.organizationId}, 'other ' || n, now(), now() from generate_series(1, 3000) n returning id
    )
    insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
    select gen_random_uuid(), ${plane.organizationId}, id, ${RUNNER}, ${resourceId}, ${RUNNER_USER}, now() from others`;
  onTestFinished(async () => {
    await app.db
      .write`delete from role_assignments where group_id in (select id from groups where name like 'other %')`;
    await app.db.write`delete from groups where name like 'other %'`;
  });
  await app.db.write`analyze groups, role_assignments`;
  const filter = { resourceTypes: [], roles: [], groupId: "", memberId: "", resourceIds: [resourceId] };
  const listedBy = async (token: string) => {
    const credential = await findCaller(app.db.point, token, app.now());
    if (credential.state !== "ok") throw new Error("the caller cannot sign in");
    const page = { limit: 25, after: "", binding: "" };
    return rowsRead(app, ["role_assignments"], (sql) => listAssignments(sql, credential.caller, filter, page));
  };
  const own = await listedBy(user.token);
  expect(own.result.map((each) => each.groupId)).toEqual([groupId]);
  expect(own.rows).toBeGreaterThan(0);
  expect(own.rows).toBeLessThan(1000);
  // Whoever may assign there gets a page of all of them, and reads no more than that.
  await assign(groupId, { resourceType: ORGANIZATION, resourceId: plane.organizationId }, ORG_RUNNERS_ADMIN);
  const all = await listedBy(user.token);
  expect(all.result).toHaveLength(26);
  expect(all.rows).toBeLessThan(1000);
});

describe("derived assignments", () => {
  test("PLT-25: a group with ORG_RUNNERS_ADMIN is an admin of each runner, which is taken away on the organization alone", async () => {
    const person = await plane.addUser();
    const groupId = await newGroup(plane, { users: [person], organizationRoles: [ORG_RUNNERS_ADMIN] });
    const runnerId = await newRunner();
    const find = async (filter: object, client = plane.admin) =>
      (await filtered(client, filter)).filter(
        (each) => each.groupId === groupId && each.derivedFromOrgRole !== undefined,
      );
    const [derived, ...others] = await find({ resourceId: runnerId });
    expect(others).toEqual([]);
    expect(derived).toMatchObject({
      ...{ groupId, organizationId: plane.organizationId, resourceRole: RUNNER_ADMIN, ...onRunner(runnerId) },
      derivedFromOrgRole: ORG_RUNNERS_ADMIN,
    });
    expect(await find({ resourceIds: [runnerId], groupId, resourceRoles: [RUNNER_ADMIN] })).toEqual([derived]);
    expect(await find({ resourceId: runnerId }, person.client)).toEqual([derived]);
    expect(await find({ groupId })).toEqual([]);
    expect(await find({ resourceId: runnerId, resourceTypes: [GROUP] })).toEqual([]);
    expect(await find({ resourceId: runnerId, resourceRoles: [RUNNER_USER] })).toEqual([]);
    expect(await find({ resourceId: plane.organizationId })).toEqual([]);

    const assignmentId = derived!.id;
    for (const { client } of [{ client: plane.admin }, person]) {
      const error = await refusal(client.groups.deleteRoleAssignment({ assignmentId: assignmentId.toUpperCase() }));
      expect(await codeOf(Promise.reject(error))).toBe("FailedPrecondition");
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "ROLE_STATE_DERIVED" }]);
    }
    for (const { client } of [member, foreign])
      expect(await codeOf(client.groups.deleteRoleAssignment({ assignmentId }))).toBe("NotFound");
    const madeUp = assignmentId.replace(/.{4}$/, (end) => (end === "ffff" ? "0000" : "ffff"));
    expect(await codeOf(groups().deleteRoleAssignment({ assignmentId: madeUp }))).toBe("NotFound");

    const [source] = await filtered(plane.admin, { groupId, resourceTypes: [ORGANIZATION] });
    await groups().deleteRoleAssignment({ assignmentId: source!.id });
    expect(await find({ resourceId: runnerId })).toEqual([]);
    expect(await codeOf(groups().deleteRoleAssignment({ assignmentId }))).toBe("NotFound");
  });

  test("each role on the organization gives what it administers; none gives anything on environments", async () => {
    const groupId = await newGroup(plane, { organizationRoles: [ORG_ADMIN, ORG_RUNNERS_ADMIN, ORG_GROUPS_ADMIN] });
    const environmentId = await newEnvironment(member);
    const robot = await addServiceAccount(plane);
    const resourceIds = [await newRunner(), await newGroup(plane), robot.id, environmentId, uuidv7()];
    const derived = await filtered(plane.admin, { groupId, resourceIds });
    const shown = derived.map((each) => [each.resourceId, each.resourceRole, each.derivedFromOrgRole]);
    const [runnerId, otherGroup, robotId] = resourceIds;
    expect(shown.sort()).toEqual(
      [
        [runnerId, RUNNER_ADMIN, ORG_ADMIN],
        [runnerId, RUNNER_ADMIN, ORG_RUNNERS_ADMIN],
        [otherGroup, GROUP_ADMIN, ORG_ADMIN],
        [otherGroup, GROUP_ADMIN, ORG_GROUPS_ADMIN],
        [robotId, SERVICE_ACCOUNT_ADMIN, ORG_ADMIN],
      ].sort(),
    );
    expect(new Set(idsOf(derived)).size).toBe(5);
    await groups().deleteGroup({ groupId });
  });

  test("they come after the ones that were made, over as many pages as it takes", async () => {
    const runnerId = await newRunner();
    const made = [];
    for (let index = 0; index < 3; index++)
      made.unshift((await assign(await newGroup(plane), onRunner(runnerId), RUNNER_USER)).id);
    const wide = await newGroup(plane, { organizationRoles: [ORG_ADMIN, ORG_RUNNERS_ADMIN] });
    const whole = idsOf(await assignmentsOn(plane, runnerId));
    expect(whole.slice(0, 3)).toEqual(made);
    expect(whole.length).toBeGreaterThanOrEqual(5);
    for (const pageSize of [1, 2, 3, 4]) {
      const found: string[] = [];
      let token = "";
      do {
        const request = { filter: { resourceId: runnerId }, pagination: { pageSize, token } };
        const page = await groups().listRoleAssignments(request);
        found.push(...idsOf(page.assignments));
        token = page.pagination?.nextToken ?? "";
      } while (token && found.length <= whole.length);
      expect(found).toEqual(whole);
    }
    await groups().deleteGroup({ groupId: wide });
  });
});

describe("projects", () => {
  const { PROJECT_ADMIN, PROJECT_EDITOR, PROJECT_USER } = ResourceRole;
  const onProject = (resourceId: string) => ({ resourceType: PROJECT, resourceId });
  const create = async () => (await createProject(plane.admin)).id;

  test("PLT-20: a project is hidden until org-members may use it, and hidden again once they may not", async () => {
    const projectId = await create();
    const listed = async () =>
      (await member.client.projects.listProjects({})).projects.some(({ id }) => id === projectId);
    expect(await listed()).toBe(false);
    const { id } = await assign(await builtInGroup(plane, "org-members"), onProject(projectId), PROJECT_USER);
    expect(await listed()).toBe(true);
    await groups().deleteRoleAssignment({ assignmentId: id });
    expect(await listed()).toBe(false);
  });

  test("PLT-26: a group needs a runner of one of the classes, which it can use in one way or another", async () => {
    const { runner: hidden, classId: hiddenClass } = await connectRunner(plane, { shared: false });
    await using _connected = hidden;
    const projectId = await create();
    const refused = async (groupId: string) => {
      const error = await refusal(assign(groupId, onProject(projectId), PROJECT_USER));
      return [await codeOf(Promise.reject(error)), ...error.findDetails(ActionableErrorDetailsSchema)];
    };
    const early = await newGroup(plane);
    const beforeClasses = await assign(early, onProject(projectId), PROJECT_USER);
    await offer(plane.admin, projectId, hiddenClass);
    const groupId = await newGroup(plane);
    expect(await refused(groupId)).toMatchObject([
      "FailedPrecondition",
      { errorCode: "ROLE_RUNNER_NO_ACCESS", metadata: { group_id: groupId, project_id: projectId } },
    ]);
    const shared = await assign(groupId, onRunner(hidden.id), RUNNER_USER);
    await assign(groupId, onProject(projectId), PROJECT_USER);
    // What a group has been given stays when the runner goes.
    await groups().deleteRoleAssignment({ assignmentId: shared.id });
    const stays = await filtered(plane.admin, { resourceId: projectId, resourceRoles: [PROJECT_USER] });
    expect(stays.map((each) => each.groupId)).toEqual(expect.arrayContaining([groupId, early]));
    await groups().deleteRoleAssignment({ assignmentId: beforeClasses.id });
    expect((await refused(early))[0]).toBe("FailedPrecondition");

    await assign(
      await newGroup(plane, { organizationRoles: [ORG_RUNNERS_ADMIN] }),
      onProject(projectId),
      PROJECT_EDITOR,
    );
    // The runner of the other class is shared with everybody.
    await offer(plane.admin, projectId, hiddenClass, classId);
    await assign(early, onProject(projectId), PROJECT_ADMIN);
    await offer(plane.admin, projectId, "local");
    await assign(await newGroup(plane), onProject(projectId), PROJECT_USER);
    // Nobody asks when it is one person.
    await offer(plane.admin, projectId, hiddenClass);
    const share = { ...onProject(projectId), ...withUser(member) };
    await groups().shareResourceWithPrincipal({ ...share, role: PROJECT_USER });
    expect((await member.client.projects.getProject({ projectId })).project?.id).toBe(projectId);
  });

  test("PLT-23: shared with one person as USER and then as EDITOR, a project has one direct entry, which says EDITOR", async () => {
    const projectId = await create();
    const share = { ...onProject(projectId), ...withUser(await plane.addUser()) };
    for (const role of [PROJECT_USER, PROJECT_EDITOR]) await groups().shareResourceWithPrincipal({ ...share, role });
    const assignments = await assignmentsOn(plane, projectId);
    const direct = assignments.filter(({ derivedFromOrgRole }) => derivedFromOrgRole === undefined);
    expect(direct).toMatchObject([{ ...onProject(projectId), resourceRole: PROJECT_EDITOR }]);
    const { groups: listed } = await groups().listGroups({ pagination: { pageSize: 100 } });
    expect(listed.map(({ id }) => id)).not.toContain(direct[0]!.groupId);
  });

  test("PLT-25: a group with ORG_PROJECTS_ADMIN is an admin of each project, which is read-only", async () => {
    const groupId = await newGroup(plane, { organizationRoles: [ResourceRole.ORG_PROJECTS_ADMIN] });
    const projectId = await create();
    const [derived, ...others] = await filtered(plane.admin, { resourceId: projectId, groupId });
    expect(others).toEqual([]);
    const derivedFromOrgRole = ResourceRole.ORG_PROJECTS_ADMIN;
    expect(derived).toMatchObject({ ...onProject(projectId), resourceRole: PROJECT_ADMIN, derivedFromOrgRole });
    expect(await codeOf(groups().deleteRoleAssignment({ assignmentId: derived!.id }))).toBe("FailedPrecondition");
  });

  test("one that is being deleted takes no roles any more", async () => {
    const groupId = await newGroup(plane);
    // The job that ends it may be faster, though not time and again.
    const refused = await eventually(async () => {
      const projectId = await create();
      await plane.admin.projects.deleteProject({ projectId });
      const error = await refusal(assign(groupId, onProject(projectId), PROJECT_USER));
      const details = error.findDetails(ActionableErrorDetailsSchema);
      return error.code === Code.FailedPrecondition && { projectId, details };
    }, "a project that is being deleted");
    expect(refused.details).toMatchObject([
      { errorCode: "PROJECT_STATE_DELETING", metadata: { project_id: refused.projectId } },
    ]);
  });
});
