import { randomBytes } from "node:crypto";
import { create } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { v7 as uuidv7 } from "uuid";
import { AdmissionLevel } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { ProjectRole } from "../../gen/gitpod/v1/project_pb.js";
import { HostAuthenticationTokenSource, RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerRole } from "../../gen/gitpod/v1/runner_pb.js";
import { type SecretScope, SecretScopeSchema } from "../../gen/gitpod/v1/secret_pb.js";
import type { BerthClient } from "../../src/client.ts";
import { TokenKind } from "../../src/domain/tokens.ts";
import { newService, newTask, settledStatus, startTask } from "../harness/automations.ts";
import type { FakeRunner } from "../harness/fake-runner.ts";
import { newGroup } from "../harness/groups.ts";
import { liftQuotas, type TestPlane, type TestUser } from "../harness/plane.ts";
import { createProject, offer } from "../harness/projects.ts";
import { addClass, addServiceAccount, connectRunner, mint, share } from "../harness/tenants.ts";

// One organization and what is in it. Everything was made by one member, the creator, or by an admin where members may
// not; nothing is shared, but for the runner, which the creator may use.

/** Ids of what callers act on. */
export interface World {
  organizationId: string;
  /** The creator, who is a member of the group. */
  userId: string;
  /** The admin who made the runners. */
  adminId: string;
  /** Somebody else, with no role at all. */
  otherUserId: string;
  runnerId: string;
  linkId: string;
  classId: string;
  integrationId: string;
  /** Its host, of which the creator has no token yet. */
  integrationHost: string;
  hostTokenId: string;
  exchangeToken: string;
  /** Made from the project. */
  environmentId: string;
  sessionId: string;
  serviceId: string;
  taskId: string;
  executionId: string;
  projectId: string;
  groupId: string;
  /** A group whose members are admins of runners. */
  powerfulGroupId: string;
  /** A group with the role USER on the runner and on the project. */
  sharingGroupId: string;
  membershipId: string;
  /** The role USER of the group on the runner. */
  assignmentId: string;
  serviceAccountId: string;
  serviceAccountTokenId: string;
  tokenId: string;
  preferenceId: string;
  userSecretId: string;
  projectSecretId: string;
  organizationSecretId: string;
  serviceAccountSecretId: string;
  auditId: string;
  unknownId: string;
}

/** Objects that a call uses up: each caller gets its own. Named after the field that holds the id. */
export type Fresh = keyof typeof makers;

/** What more it takes to make objects. */
export interface Stage {
  plane: TestPlane;
  creator: TestUser;
  robot: TestUser;
  runner: FakeRunner;
  otherRunner: FakeRunner;
  /** A class on the other runner. */
  otherClassId: string;
}

const PORT = { port: 3000, name: "web", admission: AdmissionLevel.OWNER_ONLY };

/** An environment that runs, and the token of its processes. */
export async function newEnvironment(
  classId: string,
  { by, on, projectId }: { by: BerthClient; on: FakeRunner; projectId?: string },
) {
  const spec = { machine: { class: classId }, ports: [PORT] };
  const { environment } = projectId
    ? await by.environments.createEnvironmentFromProject({ projectId, spec })
    : await by.environments.createEnvironment({ spec });
  const { id = "", spec: made, metadata } = environment ?? {};
  const machineSession = made?.machine?.session ?? "";
  const { token } = await on.control.createEnvironmentToken({ environmentId: id, machineSession });
  await on.report(id, settledStatus(environment!));
  const service = await newService(by, id, "web");
  const task = await newTask(by, id, "test");
  const execution = await startTask(by, task);
  const parts = { serviceId: service.id, taskId: task.id, executionId: execution.id };
  return { token, ids: { environmentId: id, sessionId: metadata?.sessionId ?? "", ...parts } };
}

const secretName = () => `SECRET_${uuidv7().replaceAll("-", "_")}`;
const mount = { case: "environmentVariable" as const, value: true };

/** A request for another secret. */
export const newSecret = (scope: Exclude<SecretScope["scope"], { case: undefined }>) => ({
  ...{ name: secretName(), value: "x", mount, scope: create(SecretScopeSchema, { scope }) },
});

async function secret({ plane, creator }: Stage, scope: Exclude<SecretScope["scope"], { case: undefined }>) {
  const isOwn = scope.case === "userId" || scope.case === "projectId";
  const { secrets } = isOwn ? creator.client : plane.admin;
  return (await secrets.createSecret(newSecret(scope))).secret?.id ?? "";
}

/** A service account's token as only its access token can make it: returns the id. */
async function serviceAccountToken({ plane, robot }: Stage): Promise<string> {
  const id = uuidv7();
  const subject = { subjectId: robot.id, subjectPrincipal: Principal.SERVICE_ACCOUNT };
  await mint(plane, { id, kind: TokenKind.SERVICE_ACCOUNT, ...subject });
  return id;
}

/** Makes one more of something; what hangs on it comes along. */
const makers = {
  runnerId: async ({ plane }: Stage) => {
    const { runner } = await plane.admin.runners.createRunner({
      name: "one more",
      provider: RunnerProvider.LINUX_HOST,
    });
    return { runnerId: runner?.runnerId ?? "" };
  },
  classId: async ({ plane }: Stage, { runnerId }: World) => ({ classId: await addClass(plane, runnerId) }),
  exchangeToken: async ({ plane }: Stage, { runnerId }: World) => {
    const { exchangeToken } = await plane.admin.runners.createRunnerToken({ runnerId });
    return { exchangeToken };
  },
  integrationId: async ({ plane }: Stage, { runnerId }: World) => {
    const host = `${randomBytes(8).toString("hex")}.example.org`;
    const request = { runnerId, scmId: "github", host, pat: true };
    const { id } = await plane.admin.runnerConfiguration.createSCMIntegration(request);
    return { integrationId: id, integrationHost: host };
  },
  hostTokenId: async ({ creator }: Stage, { runnerId }: World) => {
    const host = `${randomBytes(8).toString("hex")}.example.org`;
    const request = { runnerId, host, token: "x", source: HostAuthenticationTokenSource.PAT };
    const { token } = await creator.client.runnerConfiguration.createHostAuthenticationToken(request);
    return { hostTokenId: token?.id ?? "" };
  },
  environmentId: async ({ creator, runner }: Stage, { classId, projectId }: World) =>
    (await newEnvironment(classId, { by: creator.client, on: runner, projectId })).ids,
  projectId: async ({ creator: { client } }: Stage, { classId }: Pick<World, "classId">) => {
    const { id: projectId } = await createProject(client);
    await offer(client, projectId, classId);
    return { projectId };
  },
  groupId: async ({ plane }: Stage) => ({ groupId: await newGroup(plane) }),
  powerfulGroupId: async ({ plane }: Stage) => ({
    powerfulGroupId: await newGroup(plane, { organizationRoles: [ResourceRole.ORG_RUNNERS_ADMIN] }),
  }),
  sharingGroupId: async ({ plane }: Stage, { runnerId, projectId }: World) => {
    const groupId = await newGroup(plane);
    await plane.admin.runners.createRunnerPolicy({ runnerId, groupId, role: RunnerRole.USER });
    await plane.admin.projects.createProjectPolicy({ projectId, groupId, role: ProjectRole.USER });
    return { sharingGroupId: groupId };
  },
  membershipId: async ({ plane }: Stage, { groupId }: World) => {
    const { id } = await plane.addUser();
    const subject = { id, principal: Principal.USER };
    return { membershipId: (await plane.admin.groups.createMembership({ groupId, subject })).member?.id ?? "" };
  },
  assignmentId: async ({ plane }: Stage, { runnerId }: World) => {
    const resource = { resourceType: ResourceType.RUNNER, resourceId: runnerId };
    const groupId = await newGroup(plane);
    const request = { groupId, ...resource, resourceRole: ResourceRole.RUNNER_USER };
    return { assignmentId: (await plane.admin.groups.createRoleAssignment(request)).assignment?.id ?? "" };
  },
  serviceAccountId: async ({ plane }: Stage) => ({ serviceAccountId: (await addServiceAccount(plane)).id }),
  serviceAccountTokenId: async (stage: Stage) => ({ serviceAccountTokenId: await serviceAccountToken(stage) }),
  userId: async ({ plane }: Stage) => ({ userId: (await plane.addUser()).id }),
  tokenId: async ({ plane }: Stage, { userId }: World) => {
    const tokenId = uuidv7();
    await mint(plane, { id: tokenId, kind: TokenKind.PERSONAL_ACCESS, subjectId: userId });
    return { tokenId };
  },
  preferenceId: async ({ creator }: Stage) => {
    const key = uuidv7();
    await creator.client.users.setPreference({ key, value: "x" });
    const { preference } = await creator.client.users.getPreference({
      preference: { case: "preferenceKey", value: key },
    });
    return { preferenceId: preference?.id ?? "" };
  },
  userSecretId: async (stage: Stage, { userId }: World) => ({
    userSecretId: await secret(stage, { case: "userId", value: userId }),
  }),
  projectSecretId: async (stage: Stage, { projectId }: World) => ({
    projectSecretId: await secret(stage, { case: "projectId", value: projectId }),
  }),
  organizationSecretId: async (stage: Stage, { organizationId }: World) => ({
    organizationSecretId: await secret(stage, { case: "organizationId", value: organizationId }),
  }),
  serviceAccountSecretId: async (stage: Stage, { serviceAccountId }: World) => ({
    serviceAccountSecretId: await secret(stage, { case: "serviceAccountId", value: serviceAccountId }),
  }),
} satisfies { [Field in keyof World]?: (stage: Stage, world: World) => Promise<Partial<World>> };

/** The world with new objects in some places. */
export async function refreshed(stage: Stage, world: World, fields: readonly Fresh[]): Promise<World> {
  let next = world;
  for (const field of fields) next = { ...next, ...(await makers[field](stage, next)) };
  return next;
}

/** Sets everything up; the token is that of the environment. */
export async function makeWorld(plane: TestPlane): Promise<{ stage: Stage; world: World; environmentToken: string }> {
  await liftQuotas(plane);
  const creator = await plane.addUser({ name: "Creator" });
  const robot = await addServiceAccount(plane);
  const { runner, classId } = await connectRunner(plane, { shared: false, maxEnvironments: 10_000 });
  const other = await connectRunner(plane, { shared: false });
  await share(plane, creator.id, { type: ResourceType.RUNNER, id: runner.id, role: ResourceRole.RUNNER_USER });
  const stage: Stage = {
    ...{ plane, creator, robot, runner, otherRunner: other.runner, otherClassId: other.classId },
  };
  const { projectId } = await makers.projectId(stage, { classId });
  const { subject } = await plane.admin.identity.getAuthenticatedIdentity({});
  const empty = {
    adminId: subject?.id,
    ...{ organizationId: plane.organizationId, userId: creator.id, runnerId: runner.id, linkId: runner.linkId },
    ...{ classId, projectId, serviceAccountId: robot.id, unknownId: uuidv7() },
    otherUserId: (await plane.addUser({ name: "Other" })).id,
    groupId: await newGroup(plane, { users: [creator] }),
  } as World;
  const made = await refreshed(stage, empty, [
    ...([
      "exchangeToken",
      "integrationId",
      "hostTokenId",
      "powerfulGroupId",
      "membershipId",
      "sharingGroupId",
    ] as const),
    ...(["serviceAccountTokenId", "tokenId", "preferenceId", "userSecretId", "projectSecretId"] as const),
    ...(["organizationSecretId", "serviceAccountSecretId"] as const),
  ]);
  const environment = await newEnvironment(classId, { by: creator.client, on: runner, projectId });
  const { assignment } = await plane.admin.groups.createRoleAssignment({
    ...{ groupId: made.groupId, resourceType: ResourceType.RUNNER, resourceId: runner.id },
    resourceRole: ResourceRole.RUNNER_USER,
  });
  const { entries } = await plane.admin.events.listAuditLogs({});
  const world = { ...made, ...environment.ids, assignmentId: assignment?.id ?? "", auditId: entries[0]?.id ?? "" };
  return { stage, world, environmentToken: environment.token };
}

/** Far enough in the future for what has an end. */
export const LATER = timestampFromMs(4e12);
