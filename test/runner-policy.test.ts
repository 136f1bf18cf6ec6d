import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerRole } from "../gen/gitpod/v1/runner_pb.js";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { assignmentsOn, builtInGroup, newGroup } from "./harness/groups.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, connectRunner } from "./harness/tenants.ts";

const { ADMIN, USER } = RunnerRole;
const { RUNNER, ROLE_ASSIGNMENT, ROLE_ASSIGNMENT_CHANGED } = ResourceType;

let plane: TestPlane;
let member: TestUser;
let groupId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  groupId = await newGroup(plane, { name: "runner users", users: [member] });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const policies = () => plane.admin.runners;

async function newRunner(): Promise<string> {
  const metrics = { enabled: true, url: "https://metrics.example.org", username: "u", password: "p" };
  const { runner } = await plane.admin.runners.createRunner({
    ...{ name: "shared", provider: RunnerProvider.LINUX_HOST, spec: { configuration: { metrics } } },
  });
  return runner?.runnerId ?? "";
}

/** Assignments on a runner that somebody has made. */
const made = async (runnerId: string) =>
  (await assignmentsOn(plane, runnerId)).filter(({ derivedFromOrgRole }) => derivedFromOrgRole === undefined);

test("RUN-9: a policy USER lets a group see and use a runner, without operator data, for as long as it lasts", async () => {
  const runnerId = await newRunner();
  const get = () => member.client.runners.getRunner({ runnerId });
  expect(await codeOf(get())).toBe("NotFound");
  expect((await policies().createRunnerPolicy({ runnerId, groupId, role: USER })).policy).toMatchObject({
    groupId,
    role: USER,
  });
  expect((await get()).runner?.spec?.configuration?.metrics).toBeUndefined();
  expect(await codeOf(member.client.runners.createRunnerToken({ runnerId }))).toBe("PermissionDenied");
  expect(await codeOf(member.client.runners.deleteRunner({ runnerId }))).toBe("PermissionDenied");
  await policies().updateRunnerPolicy({ runnerId, groupId, role: ADMIN });
  expect((await get()).runner?.spec?.configuration?.metrics?.url).toBe("https://metrics.example.org");
  await member.client.runners.createRunnerToken({ runnerId });
  await policies().deleteRunnerPolicy({ runnerId, groupId });
  expect(await codeOf(get())).toBe("NotFound");
});

test("RUN-46: a runner with a policy USER for org-members is one that every member can create environments on", async () => {
  const { runner, classId } = await connectRunner(plane, { shared: false });
  await using _connected = runner;
  const runnerId = runner.id;
  const create = () => member.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const offered = async () =>
    (
      await member.client.environments.listEnvironmentClasses({ filter: { canCreateEnvironments: true } })
    ).environmentClasses.some(({ id }) => id === classId);
  expect([await offered(), await codeOf(create())]).toEqual([false, "NotFound"]);
  await policies().createRunnerPolicy({ runnerId, groupId: await builtInGroup(plane, "org-members"), role: USER });
  expect(await offered()).toBe(true);
  const { environment } = await create();
  await policies().deleteRunnerPolicy({ runnerId, groupId: await builtInGroup(plane, "org-members") });
  // What exists goes on, but is not started again.
  const environmentId = environment!.id;
  await member.client.environments.stopEnvironment({ environmentId });
  expect(await codeOf(member.client.environments.startEnvironment({ environmentId }))).toBe("PermissionDenied");
});

test("PLT-24: policies of a runner and role assignments on it are the same thing", async () => {
  const runnerId = await newRunner();
  await policies().createRunnerPolicy({ runnerId, groupId, role: USER });
  const [assignment] = await made(runnerId);
  const runner = { resourceType: RUNNER, resourceId: runnerId };
  expect(assignment).toMatchObject({ groupId, ...runner, resourceRole: ResourceRole.RUNNER_USER });
  const { groups } = plane.admin;
  const again = { groupId, ...runner, resourceRole: ResourceRole.RUNNER_ADMIN };
  expect(await codeOf(groups.createRoleAssignment(again))).toBe("AlreadyExists");
  await policies().updateRunnerPolicy({ runnerId, groupId, role: ADMIN });
  expect(await made(runnerId)).toMatchObject([{ id: assignment!.id, resourceRole: ResourceRole.RUNNER_ADMIN }]);
  await groups.deleteRoleAssignment({ assignmentId: assignment!.id });
  expect((await policies().listRunnerPolicies({ runnerId })).policies).toEqual([]);
  expect(await codeOf(policies().updateRunnerPolicy({ runnerId, groupId, role: USER }))).toBe("NotFound");
  expect(await codeOf(policies().deleteRunnerPolicy({ runnerId, groupId }))).toBe("NotFound");

  // A share with one person is a policy of its hidden group.
  await groups.shareResourceWithPrincipal({
    ...{ ...runner, principal: Principal.USER, principalId: member.id, role: ResourceRole.RUNNER_USER },
  });
  const { policies: shares } = await policies().listRunnerPolicies({ runnerId });
  expect(shares).toMatchObject([{ role: USER }]);
  await policies().deleteRunnerPolicy({ runnerId, groupId: shares[0]!.groupId });
  expect(await codeOf(member.client.runners.getRunner({ runnerId }))).toBe("NotFound");
});

test("a change is told and put down once, and not at all when nothing changed", async () => {
  const runnerId = await newRunner();
  const stream = await watchEvents(plane.admin);
  await policies().createRunnerPolicy({ runnerId, groupId, role: USER });
  const [{ id } = { id: "" }] = await made(runnerId);
  const before = await traces(plane, ROLE_ASSIGNMENT);
  expect((await policies().updateRunnerPolicy({ runnerId, groupId, role: USER })).policy).toMatchObject({
    groupId,
    role: USER,
  });
  expect(await traces(plane, ROLE_ASSIGNMENT)).toEqual(before);
  await policies().updateRunnerPolicy({ runnerId, groupId, role: ADMIN });
  await policies().deleteRunnerPolicy({ runnerId, groupId });
  await stream.next(eventText(ROLE_ASSIGNMENT, ResourceOperation.DELETE, id));
  await stream.next(eventText(ROLE_ASSIGNMENT_CHANGED, ResourceOperation.UPDATE, runnerId));
  stream.stop();
  expect(await auditActions(plane, id)).toEqual([
    `Role RUNNER_USER on runner ${runnerId} given to group runner users`,
    `Role on runner ${runnerId} of group runner users changed to RUNNER_ADMIN`,
    `Role RUNNER_ADMIN on runner ${runnerId} taken from group runner users`,
  ]);
});

test("the list is newest first and page by page, without what follows from roles in the organization", async () => {
  const runnerId = await newRunner();
  await newGroup(plane, { organizationRoles: [ResourceRole.ORG_RUNNERS_ADMIN] });
  const groupIds: string[] = [];
  for (const role of [USER, ADMIN, USER]) {
    const each = await newGroup(plane);
    groupIds.unshift(each);
    await policies().createRunnerPolicy({ runnerId, groupId: each, role });
  }
  const first = await policies().listRunnerPolicies({ runnerId, pagination: { pageSize: 2 } });
  const token = first.pagination!.nextToken;
  const second = await policies().listRunnerPolicies({ runnerId, pagination: { pageSize: 2, token } });
  expect([...first.policies, ...second.policies].map((each) => each.groupId)).toEqual(groupIds);
  expect(first.policies.map(({ role }) => role)).toEqual([USER, ADMIN]);
  expect(second.pagination?.nextToken).toBe("");
  const other = policies().listRunnerPolicies({ runnerId: await newRunner(), pagination: { token } });
  expect(violatedFields(await refusal(other))).toEqual(["pagination.token"]);
});

test("only admins of a runner see and change its policies, and only for groups of their organization", async () => {
  const [runnerId, hidden] = [await newRunner(), await newRunner()];
  await policies().createRunnerPolicy({ runnerId, groupId, role: USER });
  const other = await newGroup(plane);
  const calls = (client: TestUser["client"], id: string, group = other) => [
    client.runners.listRunnerPolicies({ runnerId: id }),
    client.runners.createRunnerPolicy({ runnerId: id, groupId: group, role: USER }),
    client.runners.updateRunnerPolicy({ runnerId: id, groupId: group, role: ADMIN }),
    client.runners.deleteRunnerPolicy({ runnerId: id, groupId: group }),
  ];
  const codes = (promises: Promise<unknown>[]) => Promise.all(promises.map(codeOf));
  expect(await codes(calls(member.client, runnerId))).toEqual(Array(4).fill("PermissionDenied"));
  expect(await codes(calls(member.client, hidden))).toEqual(Array(4).fill("NotFound"));
  const foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
  expect(await codes(calls(foreign.client, runnerId))).toEqual(Array(4).fill("NotFound"));
  expect(await codes(calls(plane.admin, hidden, uuidv7()).slice(1))).toEqual(Array(3).fill("NotFound"));
  expect(await codeOf(policies().createRunnerPolicy({ runnerId, groupId, role: ADMIN }))).toBe("AlreadyExists");
  for (const role of [RunnerRole.UNSPECIFIED, 99 as RunnerRole]) {
    expect(violatedFields(await refusal(policies().createRunnerPolicy({ runnerId, groupId: other, role })))).toEqual([
      "role",
    ]);
    expect(violatedFields(await refusal(policies().updateRunnerPolicy({ runnerId, groupId, role })))).toEqual(["role"]);
  }
  const admins = await builtInGroup(plane, "org-admins");
  const error = await refusal(policies().createRunnerPolicy({ runnerId, groupId: admins, role: USER }));
  expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "GROUP_STATE_SYSTEM_MANAGED" }]);

  const local = (await plane.admin.runners.listRunners({})).runners.at(-1)!.runnerId;
  expect(await codes(calls(plane.admin, local))).toEqual(Array(4).fill("FailedPrecondition"));
  expect(await codes(calls(member.client, local))).toEqual(Array(4).fill("PermissionDenied"));
});

test("a runner that is being deleted takes no policies any more", async () => {
  const { runner } = await connectRunner(plane, { shared: false });
  await using _connected = runner;
  const runnerId = runner.id;
  await policies().createRunnerPolicy({ runnerId, groupId, role: USER });
  await policies().deleteRunner({ runnerId });
  const other = await newGroup(plane);
  expect(await codeOf(policies().createRunnerPolicy({ runnerId, groupId: other, role: USER }))).toBe(
    "FailedPrecondition",
  );
  expect(await codeOf(policies().updateRunnerPolicy({ runnerId, groupId, role: ADMIN }))).toBe("FailedPrecondition");
  expect(await codeOf(policies().deleteRunnerPolicy({ runnerId, groupId }))).toBe("FailedPrecondition");
  expect((await policies().listRunnerPolicies({ runnerId })).policies).toHaveLength(1);
});
