import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { ProjectRole } from "../gen/gitpod/v1/project_pb.js";
import { RunnerRole } from "../gen/gitpod/v1/runner_pb.js";
import { assignmentsOn, builtInGroup, newGroup } from "./harness/groups.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { connectRunner } from "./harness/tenants.ts";

const { ADMIN, EDITOR, USER, UNSPECIFIED } = ProjectRole;

let plane: TestPlane;
let owner: TestUser;
let member: TestUser;
let groupId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  owner = await plane.addUser();
  member = await plane.addUser();
  groupId = await newGroup(plane, { name: "project users", users: [member] });
});

afterAll(async () => {
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await plane[Symbol.asyncDispose]();
});

const policies = () => owner.client.projects;
const create = async () => (await createProject(owner.client)).id;

/** Assignments on a project that somebody has made. */
const made = async (projectId: string) =>
  (await assignmentsOn(plane, projectId)).filter(({ derivedFromOrgRole }) => derivedFromOrgRole === undefined);

test("PLT-24 policies of a project and role assignments on it are the same thing", async () => {
  const projectId = await create();
  expect((await policies().createProjectPolicy({ projectId, groupId, role: USER })).policy).toMatchObject({
    ...{ groupId, role: USER },
  });
  const [assignment] = await made(projectId);
  const project = { resourceType: ResourceType.PROJECT, resourceId: projectId };
  expect(assignment).toMatchObject({ groupId, ...project, resourceRole: ResourceRole.PROJECT_USER });
  const again = { groupId, ...project, resourceRole: ResourceRole.PROJECT_EDITOR };
  const { groups } = owner.client;
  expect(await codeOf(groups.createRoleAssignment(again))).toBe("AlreadyExists");
  expect(await codeOf(policies().createProjectPolicy({ projectId, groupId, role: EDITOR }))).toBe("AlreadyExists");

  expect((await policies().updateProjectPolicy({ projectId, groupId, role: EDITOR })).policy?.role).toBe(EDITOR);
  expect(await made(projectId)).toMatchObject([{ id: assignment?.id, resourceRole: ResourceRole.PROJECT_EDITOR }]);
  await groups.deleteRoleAssignment({ assignmentId: assignment?.id });
  expect((await policies().listProjectPolicies({ projectId })).policies).toEqual([]);
  expect(await codeOf(policies().updateProjectPolicy({ projectId, groupId, role: USER }))).toBe("NotFound");
  expect(await codeOf(policies().deleteProjectPolicy({ projectId, groupId }))).toBe("NotFound");

  const share = { ...project, principal: Principal.USER, principalId: member.id, role: ResourceRole.PROJECT_ADMIN };
  await groups.shareResourceWithPrincipal(share);
  const { policies: shares } = await policies().listProjectPolicies({ projectId });
  expect(shares).toMatchObject([{ role: ADMIN }]);
  await policies().deleteProjectPolicy({ projectId, groupId: shares[0]?.groupId });
  expect(await codeOf(member.client.projects.getProject({ projectId }))).toBe("NotFound");
});

test("a policy counts from its making to its end", async () => {
  const projectId = await create();
  const { projects } = member.client;
  const get = () => projects.getProject({ projectId });
  const rename = () => projects.updateProject({ projectId, name: "Renamed" });
  const assign = () => projects.createProjectPolicy({ projectId, groupId: uuidv7(), role: USER });
  expect(await codeOf(get())).toBe("NotFound");
  await policies().createProjectPolicy({ projectId, groupId, role: USER });
  await get();
  expect([await codeOf(rename()), await codeOf(assign())]).toEqual(["PermissionDenied", "NotFound"]);
  const members = await builtInGroup(plane, "org-members");
  expect(await codeOf(projects.createProjectPolicy({ projectId, groupId: members, role: USER }))).toBe(
    "PermissionDenied",
  );
  await policies().updateProjectPolicy({ projectId, groupId, role: EDITOR });
  await rename();
  expect(await codeOf(projects.updateProjectPolicy({ projectId, groupId, role: ADMIN }))).toBe("PermissionDenied");
  await policies().updateProjectPolicy({ projectId, groupId, role: ADMIN });
  await projects.createProjectPolicy({ projectId, groupId: members, role: USER });
  await policies().deleteProjectPolicy({ projectId, groupId });
  expect(await codeOf(rename())).toBe("PermissionDenied");
  await policies().deleteProjectPolicy({ projectId, groupId: members });
  expect(await codeOf(get())).toBe("NotFound");
});

test("PLT-26 a group needs a runner of one of the project's classes", async () => {
  const { runner, classId } = await connectRunner(plane, { shared: false });
  await using _connected = runner;
  const { id: projectId } = await createProject(plane.admin);
  await offer(plane.admin, projectId, classId);
  const { projects, runners } = plane.admin;
  const error = await refusal(projects.createProjectPolicy({ projectId, groupId, role: USER }));
  const [detail] = error.findDetails(ActionableErrorDetailsSchema);
  expect([Code[error.code], detail?.errorCode]).toEqual(["FailedPrecondition", "ROLE_RUNNER_NO_ACCESS"]);
  await runners.createRunnerPolicy({ runnerId: runner.id, groupId, role: RunnerRole.USER });
  await projects.createProjectPolicy({ projectId, groupId, role: USER });
  const { environment } = await member.client.environments.createEnvironmentFromProject({ projectId });
  expect(environment?.metadata?.runnerId).toBe(runner.id);
});

test("PLT-19 roles and groups that do not exist are refused", async () => {
  const projectId = await create();
  for (const role of [UNSPECIFIED, 9 as ProjectRole]) {
    const error = await refusal(policies().createProjectPolicy({ projectId, groupId, role }));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["role"]]);
  }
  expect(await codeOf(policies().createProjectPolicy({ projectId, groupId: uuidv7(), role: USER }))).toBe("NotFound");
  expect(await codeOf(policies().createProjectPolicy({ projectId: uuidv7(), groupId, role: USER }))).toBe("NotFound");
});

test("every reader sees the policies, the newest first and page by page", async () => {
  const projectId = await create();
  const groups = [groupId, await newGroup(plane), await builtInGroup(plane, "org-members")];
  for (const each of groups) await policies().createProjectPolicy({ projectId, groupId: each, role: USER });
  const found: string[] = [];
  let token = "";
  do {
    const page = await member.client.projects.listProjectPolicies({ projectId, pagination: { pageSize: 1, token } });
    found.push(...page.policies.map((each) => each.groupId));
    token = page.pagination?.nextToken ?? "";
  } while (token);
  expect(found).toEqual(groups.toReversed());
});
