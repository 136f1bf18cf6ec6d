import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { CountResponseRelation } from "../gen/gitpod/v1/count_pb.js";
import { type Environment, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import {
  type ListMembersRequestSchema,
  OrganizationRole,
  ListMembersRequest_SortField as SortField,
} from "../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../gen/gitpod/v1/pagination_pb.js";
import { HostAuthenticationTokenSource } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { ADMINS_GROUP, MEMBERS_GROUP } from "../src/domain/group.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import {
  actAsServiceAccount,
  addOrganization,
  addServiceAccount,
  connectRunner,
  mint,
  share,
} from "./harness/tenants.ts";

const { ADMIN, MEMBER } = OrganizationRole;
const { ACTIVE, SUSPENDED, LEFT } = UserStatus;
type Listing = Omit<MessageInitShape<typeof ListMembersRequestSchema>, "organizationId" | "$typeName">;

let plane: TestPlane;
let foreign: TestUser;
let adminId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: ADMIN });
  adminId = (await plane.admin.users.getAuthenticatedUser({})).user?.id ?? "";
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const db = () => plane.plane.app.db;
const { USER } = ResourceType;

const setRole = (userId: string, role: OrganizationRole, client = plane.admin) =>
  client.organizations.setRole({ organizationId: plane.organizationId, userId, role });
const leave = (userId: string, client = plane.admin) => client.organizations.leaveOrganization({ userId });
const suspend = (userId: string, suspended = true, client = plane.admin) =>
  client.users.setSuspended({ userId, suspended });
const remove = (userId: string, client = plane.admin) => client.users.deleteUser({ userId });
const statusOf = async (userId: string) => (await plane.admin.users.getUser({ userId })).user?.status;
const members = async (listing: Listing = {}, client = plane.admin) =>
  (await client.organizations.listMembers({ organizationId: plane.organizationId, ...listing })).members;
const roleOf = async (userId: string) => (await members({ filter: { userIds: [userId] } }))[0]?.role;
const isDead = (client: BerthClient) => codeOf(client.identity.getAuthenticatedIdentity({}));

/** Names of the groups that somebody is in. */
async function groupsOf(userId: string): Promise<string[]> {
  const rows = await db().point<{ name: string }[]>`
    select g.name from group_members m join groups g on g.id = m.group_id where m.member_id = ${userId} order by g.name`;
  return rows.map(({ name }) => name);
}

/** An organization of its own for a test about its last admin. */
async function withAdmins(count: number): Promise<{ plane: TestPlane; admins: TestUser[] }> {
  const own = await startTestPlane();
  const { user } = await own.admin.users.getAuthenticatedUser({});
  const first = { id: user?.id ?? "", token: own.adminToken, client: own.admin };
  const others = await Promise.all(Array.from({ length: count - 1 }, () => own.addUser({ role: ADMIN })));
  return { plane: own, admins: [first, ...others] };
}

describe("roles", () => {
  test("an admin gives and takes the role admin, which counts from the next call on", async () => {
    const user = await plane.addUser();
    expect(await codeOf(suspend(uuidv7(), true, user.client))).toBe("NotFound");
    expect(await codeOf(suspend(user.id, true, user.client))).toBe("PermissionDenied");
    const stream = await watchEvents(user.client);
    await setRole(user.id, ADMIN);
    await stream.next(eventText(USER, ResourceOperation.UPDATE, user.id));
    stream.stop();
    expect([await roleOf(user.id), await groupsOf(user.id)]).toEqual([ADMIN, [ADMINS_GROUP, MEMBERS_GROUP]]);
    const other = await plane.addUser();
    await setRole(other.id, ADMIN, user.client);
    const trace = await traces(plane, USER);
    await setRole(user.id, ADMIN);
    expect(await traces(plane, USER)).toEqual(trace);
    await setRole(user.id, MEMBER, user.client);
    expect(await codeOf(setRole(other.id, MEMBER, user.client))).toBe("PermissionDenied");
    expect(await groupsOf(user.id)).toEqual([MEMBERS_GROUP]);
    expect(await auditActions(plane, user.id)).toEqual(["User has the role admin", "User has the role member"]);
    await setRole(other.id, MEMBER);
  });

  test("no other roles, no users of others, none who have left", async () => {
    const user = await plane.addUser();
    for (const role of [OrganizationRole.UNSPECIFIED, 9 as OrganizationRole]) {
      const error = await refusal(setRole(user.id, role));
      expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["role"]]);
    }
    for (const id of [foreign.id, uuidv7()]) expect(await codeOf(setRole(id, ADMIN))).toBe("NotFound");
    expect(await codeOf(setRole(user.id, ADMIN, user.client))).toBe("PermissionDenied");
    await leave(user.id);
    expect(await codeOf(setRole(user.id, ADMIN))).toBe("FailedPrecondition");
  });

  test("who administers by a group may change roles, too, and is none of the admins that have to be there", async () => {
    const { plane: own, admins } = await withAdmins(1);
    await using _ = own;
    const [admin] = admins;
    const member = await own.addUser();
    await share(own, member.id, {
      ...{ type: ResourceType.ORGANIZATION, id: own.organizationId, role: ResourceRole.ORG_ADMIN },
    });
    const { organizations } = member.client;
    const { organizationId } = own;
    const demote = () => organizations.setRole({ organizationId, userId: admin!.id, role: MEMBER });
    expect(await codeOf(demote())).toBe("FailedPrecondition");
    await organizations.setRole({ organizationId, userId: member.id, role: ADMIN });
    await demote();
  });
});

describe("PLT-17 the last admin", () => {
  test("ORG-13 cannot leave, be deleted or become a member, until there is another one; nothing has changed", async () => {
    const { plane: own, admins } = await withAdmins(1);
    await using _ = own;
    const [{ id, client }] = admins as [TestUser];
    const member = await own.addUser();
    const { organizationId } = own;
    const before = [await traces(own, USER), (await client.users.getUser({ userId: id })).user];
    const attempts = [
      () => client.organizations.leaveOrganization({ userId: id }),
      () => client.users.deleteUser({ userId: id }),
      () => client.organizations.setRole({ organizationId, userId: id, role: MEMBER }),
    ];
    for (const attempt of attempts) {
      const error = await refusal(attempt());
      expect(Code[error.code]).toBe("FailedPrecondition");
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([
        { errorCode: "ORG_STATE_LAST_ADMIN", metadata: { organization_id: organizationId } },
      ]);
    }
    expect(await codeOf(client.users.setSuspended({ userId: id, suspended: true }))).toBe("FailedPrecondition");
    expect([await traces(own, USER), (await client.users.getUser({ userId: id })).user]).toEqual(before);

    await client.organizations.setRole({ organizationId, userId: member.id, role: ADMIN });
    await client.organizations.setRole({ organizationId, userId: id, role: MEMBER });
    await client.organizations.leaveOrganization({ userId: id });
    expect(await codeOf(client.users.getAuthenticatedUser({}))).toBe("Unauthenticated");
  });

  test("a suspended admin is none that counts", async () => {
    const { plane: own, admins } = await withAdmins(2);
    await using _ = own;
    const [first, second] = admins as [TestUser, TestUser];
    await first.client.users.setSuspended({ userId: second.id, suspended: true });
    expect(await codeOf(first.client.organizations.leaveOrganization({ userId: first.id }))).toBe("FailedPrecondition");
    await first.client.users.setSuspended({ userId: second.id, suspended: false });
    await first.client.organizations.leaveOrganization({ userId: first.id });
  });

  test.each(["demote each other", "suspend each other", "delete each other", "leave"])(
    "ORG-14 of two admins who %s at the same moment on two replicas exactly one succeeds",
    async (what) => {
      const { plane: own, admins } = await withAdmins(2);
      await using _ = own;
      const [first, second] = admins as [TestUser, TestUser];
      const replica = await own.replica();
      const there = createBerthClient({ baseUrl: replica.server.url, token: second.token });
      const { organizationId } = own;
      const acts: Record<string, (client: BerthClient, self: string, other: string) => Promise<unknown>> = {
        "demote each other": (client, _self, userId) =>
          client.organizations.setRole({ organizationId, userId, role: MEMBER }),
        "suspend each other": (client, _self, userId) => client.users.setSuspended({ userId, suspended: true }),
        "delete each other": (client, _self, userId) => client.users.deleteUser({ userId }),
        leave: (client, userId) => client.organizations.leaveOrganization({ userId }),
      };
      const act = acts[what]!;
      const results = await Promise.allSettled([
        act(first.client, first.id, second.id),
        act(there, second.id, first.id),
      ]);
      const codes = results.map((each) =>
        each.status === "fulfilled" ? "ok" : Code[ConnectError.from(each.reason).code],
      );
      expect(codes.filter((code) => code === "ok")).toHaveLength(1);
      // The other one was let in before or after it had lost its rights.
      expect(["FailedPrecondition", "PermissionDenied", "Unauthenticated"]).toContain(
        codes.find((code) => code !== "ok"),
      );
      const [row] = await own.plane.app.db.point<{ count: number }[]>`
        select count(*)::int from users where organization_id = ${organizationId} and role = ${ADMIN} and status = ${ACTIVE}`;
      expect(row?.count).toBe(1);
    },
  );
});

describe("suspending", () => {
  test("PLT-18 ends tokens for good and stops what runs; let in again, a new login works", async () => {
    const { runner, classId } = await connectRunner(plane);
    const user = await plane.addUser();
    const { environment } = await user.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
    await runner.reportRunning(environment as Environment);
    const environmentId = environment?.id ?? "";
    const { accessToken } = await user.client.environments.createEnvironmentAccessToken({ environmentId });
    const isOpen = async (token: string) => (await runner.control.introspectToken({ token })).active;
    expect(await isOpen(accessToken)).toBe(true);
    const stream = await watchEvents(user.client);
    await suspend(user.id);
    expect([await isDead(user.client), await isOpen(accessToken), await statusOf(user.id)]).toEqual([
      ...["Unauthenticated", false, SUSPENDED],
    ]);
    const read = async () => (await plane.admin.environments.getEnvironment({ environmentId })).environment;
    expect((await read())?.spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
    await runner.report(environmentId, {});
    expect((await read())?.status?.phase).toBe(EnvironmentPhase.STOPPED);
    expect(await groupsOf(user.id)).toEqual([]);
    expect(Code[(await stream.ended)?.code ?? 0]).toBe("Unauthenticated");

    await suspend(user.id, false);
    expect([await isDead(user.client), await isOpen(accessToken), await groupsOf(user.id)]).toEqual([
      ...["Unauthenticated", false, [MEMBERS_GROUP]],
    ]);
    const login = plane.client(await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: user.id }));
    expect((await login.users.getAuthenticatedUser({})).user?.status).toBe(ACTIVE);
    await login.environments.startEnvironment({ environmentId });
    const trace = await traces(plane, USER);
    await suspend(user.id, false);
    expect(await traces(plane, USER)).toEqual(trace);
    expect(await auditActions(plane, user.id)).toEqual(["User suspended", "User let in again"]);
    // An order to stop, given while it was suspended, does not reach what was started since.
    plane.advance(60_000);
    await login.environments.markEnvironmentActive({ environmentId });
    await db().write`update halts set due_at = now() - interval '1 minute' where subject_id = ${user.id}`;
    const halts = () => db().point`select from halts where subject_id = ${user.id}`;
    await expect.poll(async () => (await halts()).length, { timeout: 20_000 }).toBe(0);
    expect((await read())?.spec?.desiredPhase).toBe(EnvironmentPhase.RUNNING);
    await runner[Symbol.asyncDispose]();
  });

  test("what a user keeps: groups of people, preferences, dotfiles and secrets", async () => {
    const user = await plane.addUser();
    await user.client.users.setPreference({ key: "theme", value: "dark" });
    await user.client.users.setDotfilesConfiguration({ repository: "https://git.example.org/dots" });
    await user.client.secrets.createSecret({
      ...{ name: "KEY", value: "x", mount: { case: "environmentVariable", value: true } },
      scope: { scope: { case: "userId", value: user.id } },
    });
    await suspend(user.id);
    await suspend(user.id, false);
    const again = plane.client(await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: user.id }));
    expect((await again.users.listPreferences({})).preferences).toHaveLength(1);
    expect((await again.users.getDotfilesConfiguration({})).dotfilesConfiguration?.repository).toContain("dots");
    expect((await again.secrets.listSecrets({})).secrets.filter(({ name }) => name === "KEY")).toHaveLength(1);
  });

  test("is for admins, and neither for oneself nor for who has left", async () => {
    const user = await plane.addUser();
    const { client } = await plane.addUser();
    expect(await codeOf(suspend(user.id, true, client))).toBe("PermissionDenied");
    expect(await codeOf(suspend(adminId))).toBe("FailedPrecondition");
    await suspend(adminId, false);
    expect(await codeOf(suspend(foreign.id))).toBe("NotFound");
    await leave(user.id);
    for (const suspended of [true, false]) expect(await codeOf(suspend(user.id, suspended))).toBe("FailedPrecondition");
  });

  test("a token that is made at that moment is dead, too", async () => {
    for (let round = 0; round < 5; round += 1) {
      const user = await plane.addUser();
      const made = Array.from({ length: 5 }, () => user.client.users.createPersonalAccessToken({ userId: user.id }));
      const [ended, ...results] = await Promise.allSettled([suspend(user.id), ...made]);
      expect(ended?.status).toBe("fulfilled");
      for (const each of results)
        if (each.status === "rejected") expect(Code[ConnectError.from(each.reason).code]).toBe("Unauthenticated");
      await suspend(user.id, false);
      const rows = await db().point`select from tokens where subject_id = ${user.id}`;
      expect(rows).toHaveLength(0);
    }
  });
});

describe("leaving", () => {
  test("ORG-15 somebody who is removed is out at once, off the list, and on it for who asks", async () => {
    const { runner, classId } = await connectRunner(plane);
    const user = await plane.addUser({ name: "Leaver" });
    const { environment } = await user.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
    const environmentId = environment?.id ?? "";
    await leave(user.id);
    expect(await isDead(user.client)).toBe("Unauthenticated");
    const { environment: left } = await plane.admin.environments.getEnvironment({ environmentId });
    expect(left?.spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
    const filter = { userIds: [user.id] };
    expect(await members({ filter })).toEqual([]);
    expect(await members({ filter: { ...filter, statuses: [LEFT] } })).toMatchObject([
      { userId: user.id, fullName: "Leaver", status: LEFT },
    ]);
    const { client } = await plane.addUser();
    expect((await client.users.getUser({ userId: user.id })).user).toMatchObject({ name: "Leaver", status: LEFT });
    const trace = await traces(plane, USER);
    await leave(user.id);
    await remove(user.id);
    expect(await traces(plane, USER)).toEqual(trace);
    expect(await auditActions(plane, user.id)).toEqual(["User removed"]);
    await runner[Symbol.asyncDispose]();
  });

  test("takes along what was the user's own, and leaves what others use", async () => {
    const { runner, classId } = await connectRunner(plane);
    const user = await plane.addUser();
    const { client, id } = user;
    const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
    const environmentId = environment?.id ?? "";
    await client.environments.createEnvironmentLogsToken({ environmentId });
    await client.users.setPreference({ key: "theme", value: "dark" });
    await client.users.setDotfilesConfiguration({ repository: "https://git.example.org/dots" });
    await client.secrets.createSecret({
      ...{ name: "KEY", value: "x", mount: { case: "environmentVariable", value: true } },
      scope: { scope: { case: "userId", value: id } },
    });
    await client.runnerConfiguration.createHostAuthenticationToken({
      ...{ runnerId: runner.id, host: "github.com", token: "x", source: HostAuthenticationTokenSource.PAT },
      subject: { id, principal: Principal.USER },
    });
    await share(plane, id, { type: ResourceType.RUNNER, id: runner.id, role: ResourceRole.RUNNER_ADMIN });
    const robot = await addServiceAccount(plane);
    await share(plane, id, {
      type: ResourceType.SERVICE_ACCOUNT,
      id: robot.id,
      role: ResourceRole.SERVICE_ACCOUNT_ADMIN,
    });
    const access = await actAsServiceAccount(plane, robot.id, client);
    const { token } = await access.serviceAccounts.createServiceAccountToken({});
    const left = async () => {
      const [row] = await db().point<Record<string, number>[]>`
        select (select count(*)::int from tokens where subject_id = ${id}) as tokens,
          (select count(*)::int from user_preferences where user_id = ${id}) as preferences,
          (select count(*)::int from users where id = ${id} and dotfiles_repository <> '') as dotfiles,
          (select count(*)::int from secrets where scope_id = ${id}) as secrets,
          (select count(*)::int from host_tokens where subject_id = ${id}) as hosts,
          (select count(*)::int from groups where direct_share_of = ${id}) as shares,
          (select count(*)::int from environments where id = ${environmentId}) as environments`;
      return row;
    };
    const before = { tokens: 2, preferences: 1, dotfiles: 1, secrets: 1, hosts: 1, shares: 1, environments: 1 };
    expect(await left()).toEqual(before);
    await leave(id, client);
    const none = Object.fromEntries(Object.keys(before).map((name) => [name, 0]));
    expect([await left(), await groupsOf(id)]).toEqual([{ ...none, environments: 1 }, []]);
    // What it had issued to act as a service account is its own, what that account was issued is not.
    expect(await isDead(access)).toBe("Unauthenticated");
    expect((await plane.client(token).identity.getAuthenticatedIdentity({})).subject?.id).toBe(robot.id);
    expect(await auditActions(plane, id)).toContain("User left");
    await runner[Symbol.asyncDispose]();
  });

  test("is one's own business or an admin's", async () => {
    const [user, other] = [await plane.addUser(), await plane.addUser()];
    for (const end of [leave, remove]) {
      expect(await codeOf(end(user.id, other.client))).toBe("PermissionDenied");
      expect(await codeOf(end(foreign.id, other.client))).toBe("NotFound");
      expect(await codeOf(end(uuidv7()))).toBe("NotFound");
    }
    const robot = await addServiceAccount(plane);
    expect(await codeOf(leave(user.id, robot.client))).toBe("PermissionDenied");
    expect(await codeOf(leave(robot.id))).toBe("NotFound");
    await remove(user.id, user.client);
    expect([await statusOf(user.id), await isDead(user.client)]).toEqual([LEFT, "Unauthenticated"]);
    expect(await auditActions(plane, user.id)).toEqual(["User deleted"]);
    await suspend(other.id);
    await leave(other.id);
    expect(await statusOf(other.id)).toBe(LEFT);
  });

  test("an account that the organization owns goes with its user, whose name stays", async () => {
    const user = await plane.addUser({ name: "Owned" });
    const [account] = await db().write<{ id: string }[]>`
      update accounts set owner_organization_id = ${plane.organizationId}
      where id = (select account_id from users where id = ${user.id}) returning id`;
    const stream = await watchEvents(plane.admin);
    await remove(user.id);
    await stream.next(eventText(ResourceType.ACCOUNT, ResourceOperation.DELETE, account!.id));
    stream.stop();
    expect(await db().point`select from accounts where id = ${account!.id}`).toHaveLength(0);
    expect((await plane.admin.users.getUser({ userId: user.id })).user).toMatchObject({
      ...{ name: "Owned", email: `${user.id}@example.org`, status: LEFT },
    });
    expect(await auditActions(plane, account!.id)).toEqual(["Account deleted with its user"]);
  });
});

describe("ListMembers", () => {
  let own: TestPlane;
  let zoe: TestUser;
  let adam: TestUser;
  let bea: TestUser;

  beforeAll(async () => {
    own = await startTestPlane({ BERTH_BOOTSTRAP_ADMIN_NAME: "Chief" });
    zoe = await own.addUser({ name: "Zoe" });
    adam = await own.addUser({ name: "adam" });
    bea = await own.addUser({ name: "Bea 100%" });
  });
  afterAll(() => own[Symbol.asyncDispose]());

  const answer = (listing: Listing = {}, client = zoe.client) =>
    client.organizations.listMembers({ organizationId: own.organizationId, ...listing });
  const names = async (listing: Listing = {}, client = zoe.client) =>
    (await answer(listing, client)).members.map(({ fullName }) => fullName);

  async function pages(listing: Listing, client = zoe.client): Promise<string[]> {
    const found: string[] = [];
    for (let token = ""; ; ) {
      const { members: page, pagination } = await answer({ ...listing, pagination: { pageSize: 1, token } }, client);
      expect(page).toHaveLength(1);
      found.push(...page.map(({ fullName }) => fullName));
      token = pagination?.nextToken ?? "";
      if (!token) return found;
    }
  }

  test("ORG-16 without an order the caller comes first, then by name; with one nobody is special; page by page too", async () => {
    const order = ["Zoe", "adam", "Bea 100%", "Chief"];
    expect([await names(), await pages({})]).toEqual([order, order]);
    expect(await names({ sort: { order: SortOrder.DESC } })).toEqual(order);
    expect(await names({}, bea.client)).toEqual(["Bea 100%", "adam", "Chief", "Zoe"]);
    const descending = { sort: { field: SortField.NAME, order: SortOrder.DESC } };
    expect([await names(descending), await pages(descending)]).toEqual([
      ["Zoe", "Chief", "Bea 100%", "adam"],
      ["Zoe", "Chief", "Bea 100%", "adam"],
    ]);
    const joined = { sort: { field: SortField.DATE_JOINED } };
    expect([await names(joined), await pages(joined)]).toEqual([
      ["Chief", "Zoe", "adam", "Bea 100%"],
      ["Chief", "Zoe", "adam", "Bea 100%"],
    ]);
    expect(await names({ sort: { field: SortField.DATE_JOINED, order: SortOrder.DESC } })).toEqual([
      ...["Bea 100%", "adam", "Zoe", "Chief"],
    ]);
    const robot = await addServiceAccount(own);
    expect([await names({}, robot.client), await pages({}, robot.client)]).toEqual([
      ["adam", "Bea 100%", "Chief", "Zoe"],
      ["adam", "Bea 100%", "Chief", "Zoe"],
    ]);
  });

  test("namesakes are told apart by their ids, in the direction of the order", async () => {
    const twins = [
      await own.addUser({ name: "Kim" }),
      await own.addUser({ name: "KIM" }),
      await own.addUser({ name: "kim" }),
    ];
    const ids = twins.map(({ id }) => id);
    const filter = { userIds: ids };
    const listed = async (order: SortOrder) => {
      const found: string[] = [];
      for (let token = ""; ; ) {
        const sort = { field: SortField.NAME, order };
        const { members: page, pagination } = await answer({ filter, sort, pagination: { pageSize: 1, token } });
        found.push(...page.map(({ userId }) => userId));
        token = pagination?.nextToken ?? "";
        if (!token) return found;
      }
    };
    expect(await listed(SortOrder.ASC)).toEqual(ids);
    expect(await listed(SortOrder.DESC)).toEqual([...ids].reverse());
    for (const { id } of twins) await own.admin.users.deleteUser({ userId: id });
  });

  test("a member is shown with all that members may know", async () => {
    const [self] = (await answer()).members;
    expect(self).toMatchObject({
      ...{ userId: zoe.id, role: MEMBER, fullName: "Zoe", email: `${zoe.id}@example.org`, status: ACTIVE },
      loginProvider: "local",
    });
    expect(timestampMs(self!.memberSince!)).toBeGreaterThan(0);
  });

  test("ORG-17 searching is literal; groups are left out; a token fits its own request; pages have a most", async () => {
    expect(await names({ filter: { search: "%" } })).toEqual(["Bea 100%"]);
    expect(await names({ filter: { search: "  ADA " } })).toEqual(["adam"]);
    expect(await names({ filter: { search: `${adam.id}@EXAMPLE` } })).toEqual(["adam"]);
    expect(await names({ filter: { search: "_" } })).toEqual([]);
    const group = async (...ids: string[]) => {
      const id = uuidv7();
      const { write } = own.plane.app.db;
      await write`insert into groups (id, organization_id, name, created_at, updated_at)
        values (${id}, ${own.organizationId}, ${id}, now(), now())`;
      for (const member of ids)
        await write`insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
          values (${uuidv7()}, ${id}, ${own.organizationId}, ${member}, ${Principal.USER}, now())`;
      return id;
    };
    const excludeGroupIds = [await group(zoe.id, adam.id), await group(bea.id), uuidv7()];
    expect(await names({ filter: { excludeGroupIds } })).toEqual(["Chief"]);
    expect(await names({ filter: { excludeGroupIds: [uuidv7()], excludeMembersInAnyTeam: true } })).toHaveLength(4);

    const { pagination } = await answer({ pagination: { pageSize: 1 } });
    const token = pagination?.nextToken ?? "";
    for (const other of [{ filter: { search: "a" } }, { sort: { field: SortField.NAME } }]) {
      expect(await codeOf(answer({ ...other, pagination: { pageSize: 1, token } }))).toBe("InvalidArgument");
    }
    expect(await codeOf(answer({ pagination: { pageSize: 1, token } }, adam.client))).toBe("InvalidArgument");
    const tooLarge = await refusal(answer({ pagination: { pageSize: 101 } }));
    expect(violatedFields(tooLarge)).toEqual(["pagination.page_size"]);
  });

  test("roles, statuses and users are alternatives, the filters conditions; zero matches nobody", async () => {
    expect(await names({ filter: { roles: [ADMIN] } })).toEqual(["Chief"]);
    expect(await names({ filter: { roles: [ADMIN, MEMBER], userIds: [adam.id, bea.id, uuidv7()] } })).toEqual([
      ...["adam", "Bea 100%"],
    ]);
    expect(await names({ filter: { roles: [OrganizationRole.UNSPECIFIED] } })).toEqual([]);
    expect(await names({ filter: { statuses: [UserStatus.UNSPECIFIED] } })).toEqual([]);
    await own.admin.users.setSuspended({ userId: adam.id, suspended: true });
    expect(await names()).toContain("adam");
    expect(await names({ filter: { statuses: [SUSPENDED] } })).toEqual(["adam"]);
    await own.admin.users.setSuspended({ userId: adam.id, suspended: false });
    const bad: [string, Listing][] = [
      ["filter.statuses[1]", { filter: { statuses: [ACTIVE, 9 as UserStatus] } }],
      ["filter.roles[0]", { filter: { roles: [9 as OrganizationRole] } }],
      ["sort.field", { sort: { field: 9 as SortField } }],
      ["sort.order", { sort: { order: 9 as SortOrder } }],
    ];
    for (const [field, listing] of bad) expect(violatedFields(await refusal(answer(listing)))).toEqual([field]);
  });

  test("a count is given when asked for, with the first page", async () => {
    const count = { include: true };
    const first = await answer({ count, pagination: { pageSize: 1 }, filter: { search: "example.org" } });
    expect(first.count).toMatchObject({ value: 3, relation: CountResponseRelation.EQ });
    const token = first.pagination?.nextToken ?? "";
    const next = await answer({ count, pagination: { pageSize: 1, token }, filter: { search: "example.org" } });
    expect(next.count).toBeUndefined();
    expect((await answer()).count).toBeUndefined();
  });

  test("ORG-18 of another organization nobody is shown", async () => {
    const { organizations } = foreign.client;
    for (const organizationId of [plane.organizationId, uuidv7()]) {
      expect(await codeOf(organizations.listMembers({ organizationId }))).toBe("NotFound");
      const role = { organizationId, userId: adminId, role: MEMBER };
      expect(await codeOf(organizations.setRole(role))).toBe("NotFound");
    }
  });
});
