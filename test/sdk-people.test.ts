import Gitpod from "@gitpod/sdk";
import { afterAll, beforeAll, expect, test } from "vitest";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";

// The official SDK, unmodified, on what it offers about people and their organization.

let plane: TestPlane;
let member: TestUser;
let sdk: Gitpod;
let own: Gitpod;
let organizationId: string;

beforeAll(async () => {
  plane = await startTestPlane({ BERTH_BOOTSTRAP_ADMIN_NAME: "Chief" });
  member = await plane.addUser({ name: "Ada" });
  ({ organizationId } = plane);
  sdk = new Gitpod({ baseURL: `${plane.url}/api`, bearerToken: plane.adminToken });
  own = new Gitpod({ baseURL: `${plane.url}/api`, bearerToken: member.token });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

/** Status with which a call fails; undefined if it does not. */
const failure = (call: Promise<unknown>) =>
  call.then(
    () => undefined,
    (error: { status?: number; code?: string }) => `${error.status} ${error.code ?? ""}`.trim(),
  );

test("a user finds itself, its account, its tokens and its dotfiles", async () => {
  const { user } = await own.users.getAuthenticatedUser({});
  expect(user).toMatchObject({ id: member.id, organizationId, name: "Ada", status: "USER_STATUS_ACTIVE" });
  const { account } = await own.accounts.retrieve({});
  expect(account.memberships).toMatchObject([{ userId: member.id, organizationName: "Default" }]);

  const descriptions = ["one", "two", "three"];
  for (const description of descriptions)
    await member.client.users.createPersonalAccessToken({ userId: member.id, description });
  const listed: string[] = [];
  for await (const token of own.users.pats.list({ pageSize: 1 })) listed.push(token.description ?? "");
  expect(listed).toEqual(["three", "two", "one", ""]);
  const { personalAccessTokens } = await own.users.pats.list({ filter: { userIds: [member.id] } });
  const personalAccessTokenId = personalAccessTokens[0]?.id ?? "";
  expect((await own.users.pats.get({ personalAccessTokenId })).pat.description).toBe("three");
  await own.users.pats.delete({ personalAccessTokenId });
  expect(await failure(own.users.pats.get({ personalAccessTokenId }))).toContain("404");

  const repository = "https://git.example.org/ada/dotfiles";
  await own.users.dotfiles.set({ repository });
  expect((await own.users.dotfiles.get({})).dotfilesConfiguration).toEqual({ repository });
  expect(await failure(own.users.dotfiles.set({ repository: "ext::sh" }))).toContain("400");
  expect((await own.accounts.listJoinableOrganizations({})).joinableOrganizations ?? []).toEqual([]);
});

test("members are listed page by page, in the order of the SDK's user, and given roles", async () => {
  await plane.addUser({ name: "Bea" });
  const names: string[] = [];
  for await (const each of own.organizations.listMembers({ organizationId, pageSize: 1 })) names.push(each.fullName);
  expect(names).toEqual(["Ada", "Bea", "Chief"]);
  const role = "ORGANIZATION_ROLE_ADMIN";
  await sdk.organizations.setRole({ organizationId, userId: member.id, role });
  const { members } = await own.organizations.listMembers({ organizationId });
  expect(members.filter((each) => each.role === role).map(({ fullName }) => fullName)).toEqual(["Ada", "Chief"]);
  await sdk.organizations.setRole({ organizationId, userId: member.id, role: "ORGANIZATION_ROLE_MEMBER" });
  const { organization } = await own.organizations.retrieve({ organizationId });
  expect(organization).toMatchObject({ name: "Default", tier: "ORGANIZATION_TIER_ENTERPRISE" });
});

test("policies are changed by what is sent alone", async () => {
  const { policies: before } = await sdk.organizations.policies.retrieve({ organizationId });
  expect(before).toMatchObject({ membersCreateProjects: true, maximumEnvironmentTimeout: "0s" });
  await sdk.organizations.policies.update({
    ...{
      organizationId,
      maximumEnvironmentTimeout: "3600s",
      maximumEnvironmentsPerUser: "7",
      allowedEditorIds: ["zed"],
    },
  });
  const { policies } = await own.organizations.policies.retrieve({ organizationId });
  const changed = { maximumEnvironmentTimeout: "3600s", maximumEnvironmentsPerUser: "7", allowedEditorIds: ["zed"] };
  const { securityAgentPolicy: _hidden, ...visible } = before as typeof before & { securityAgentPolicy?: unknown };
  expect(policies).toEqual({ ...visible, ...changed });
  expect(await failure(own.organizations.policies.update({ organizationId, membersCreateProjects: false }))).toContain(
    "403",
  );
  const bad = sdk.organizations.policies.update({ organizationId, maximumEnvironmentTimeout: "60s" });
  expect(await failure(bad)).toContain("400");
});

test("who is suspended or leaves is out", async () => {
  const user = await plane.addUser();
  const theirs = new Gitpod({ baseURL: `${plane.url}/api`, bearerToken: user.token });
  await theirs.users.getAuthenticatedUser({});
  await sdk.users.setSuspended({ userId: user.id, suspended: true });
  expect(await failure(theirs.users.getAuthenticatedUser({}))).toContain("401");
  await own.organizations.leave({ userId: member.id });
  expect(await failure(own.users.getAuthenticatedUser({}))).toContain("401");
});
