import { durationFromMs, timestampMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { TokenKind } from "../src/domain/tokens.ts";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, connectRunner, mint } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const DAY_MS = 24 * 60 * 60_000;
const LIMITS = { personalAccessTokens: 4, preferences: 3 };
const { CREATE, UPDATE, DELETE } = ResourceOperation;
const { PERSONAL_ACCESS_TOKEN, USER_PREFERENCE, USER } = ResourceType;

let plane: TestPlane;
let member: TestUser;
let foreign: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane({}, LIMITS);
  member = await plane.addUser({ name: "Ada Lovelace" });
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
  ({ runner, classId } = await connectRunner(plane));
});

afterAll(async () => {
  await runner?.[Symbol.asyncDispose]();
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
});

const db = () => plane.plane.app.db;

describe("who users are", () => {
  test("a user reads itself and every other of its organization, with what their accounts say", async () => {
    const { user } = await member.client.users.getAuthenticatedUser({});
    expect(user).toMatchObject({
      ...{ id: member.id, organizationId: plane.organizationId, name: "Ada Lovelace" },
      ...{ email: `${member.id}@example.org`, status: UserStatus.ACTIVE, avatarUrl: "" },
    });
    expect(user?.createdAt).toBeDefined();
    for (const { client } of [member, await addServiceAccount(plane), { client: plane.admin }])
      expect((await client.users.getUser({ userId: member.id })).user).toEqual(user);
  });

  test("a change of the account shows at once; a nameless one goes by its address", async () => {
    const other = await plane.addUser({ name: "  " });
    const read = async () => (await member.client.users.getUser({ userId: other.id })).user;
    expect((await read())?.name).toBe(other.id);
    await db()
      .write`update accounts set name = 'Grace', email = 'grace@example.org', avatar_url = 'https://a.test/g.png'
      where id = (select account_id from users where id = ${other.id})`;
    expect(await read()).toMatchObject({
      ...{ name: "Grace", email: "grace@example.org", avatarUrl: "https://a.test/g.png" },
    });
  });

  test("an environment knows its creator alone", async () => {
    const { environment } = await member.client.environments.createEnvironment({
      spec: { machine: { class: classId } },
    });
    const { id = "", spec } = environment ?? {};
    const machineSession = spec?.machine?.session ?? "";
    const { token } = await runner.control.createEnvironmentToken({ environmentId: id, machineSession });
    const { users } = plane.client(token);
    expect((await users.getUser({ userId: member.id })).user?.name).toBe("Ada Lovelace");
    const other = await plane.addUser();
    expect(await codeOf(users.getUser({ userId: other.id }))).toBe(Code[Code.NotFound]);
    expect(await codeOf(users.getAuthenticatedUser({}))).toBe(Code[Code.PermissionDenied]);
    await plane.admin.environments.deleteEnvironment({ environmentId: id, force: true });
  });

  test("PLT-19 a user of another organization is NOT_FOUND, as one that does not exist; only users are users", async () => {
    for (const userId of [foreign.id, uuidv7()])
      expect(await codeOf(member.client.users.getUser({ userId }))).toBe(Code[Code.NotFound]);
    expect(await codeOf(foreign.client.users.getUser({ userId: member.id }))).toBe(Code[Code.NotFound]);
    const robot = await addServiceAccount(plane);
    expect(await codeOf(member.client.users.getUser({ userId: robot.id }))).toBe(Code[Code.NotFound]);
    expect(await codeOf(robot.client.users.getAuthenticatedUser({}))).toBe(Code[Code.PermissionDenied]);
    expect(await codeOf(plane.client(runner.token).users.getUser({ userId: member.id }))).toBe(
      Code[Code.PermissionDenied],
    );
  });
});

describe("personal access tokens", () => {
  const create = async (user: TestUser, options: { description?: string; days?: number; readOnly?: boolean } = {}) => {
    const { days, ...rest } = options;
    const validFor = days === undefined ? undefined : durationFromMs(days * DAY_MS);
    return (await user.client.users.createPersonalAccessToken({ userId: user.id, validFor, ...rest })).token;
  };
  const list = async (user: TestUser, userIds: string[] = []) =>
    (await user.client.users.listPersonalAccessTokens({ filter: { userIds } })).personalAccessTokens;
  const admin = () => ({ id: "", token: plane.adminToken, client: plane.admin });

  test("PLT-7 a new one acts as its user and is described without its text", async () => {
    const user = await plane.addUser();
    const text = await create(user, { description: "laptop", days: 7 });
    expect(text).toMatch(/^berth_pat_\w{49}$/);
    expect(await plane.client(text).identity.getAuthenticatedIdentity({})).toMatchObject({
      ...{ subject: { id: user.id, principal: Principal.USER }, organizationId: plane.organizationId },
    });
    const [token] = await list(user);
    expect(token).toMatchObject({
      ...{ userId: user.id, description: "laptop", readOnly: false },
      creator: { id: user.id, principal: Principal.USER },
    });
    const lifetime = timestampMs(token!.expiresAt!) - timestampMs(token!.createdAt!);
    expect(lifetime).toBe(7 * DAY_MS);
    expect((await user.client.users.getPersonalAccessToken({ personalAccessTokenId: token!.id })).pat).toEqual(token);
    await eventually(async () => (await list(user))[0]?.lastUsed, "its use is written");
    expect(await auditActions(plane, token!.id)).toEqual(["Personal access token created"]);
  });

  test.each([
    [undefined, 30],
    [0, 30],
    [90, 90],
  ])("asked for %s days it lasts %s", async (days, expected) => {
    const user = await plane.addUser();
    await create(user, { days });
    const [token] = await list(user);
    expect(timestampMs(token!.expiresAt!) - timestampMs(token!.createdAt!)).toBe(expected * DAY_MS);
  });

  test.each([
    [{ days: 90.001 }, "valid_for"],
    [{ days: -1 }, "valid_for"],
    [{ description: "é".repeat(256) }, "description"],
  ])("%j is INVALID_ARGUMENT", async (options, field) => {
    const error = await refusal(create(member, options));
    expect([Code[error.code], violatedFields(error)]).toEqual([Code[Code.InvalidArgument], [field]]);
  });

  test("a description of 255 characters is kept as it is", async () => {
    const user = await plane.addUser();
    const description = "𝒶".repeat(255);
    await create(user, { description });
    expect((await list(user))[0]?.description).toBe(description);
  });

  test("PLT-9 nobody makes one for somebody else, not even an admin", async () => {
    const forOther = (client = plane.admin, userId = member.id) =>
      codeOf(client.users.createPersonalAccessToken({ userId }));
    expect(await forOther()).toBe(Code[Code.PermissionDenied]);
    expect(await forOther(member.client, (await plane.addUser()).id)).toBe(Code[Code.PermissionDenied]);
    expect(await forOther(plane.admin, foreign.id)).toBe(Code[Code.NotFound]);
    expect(await forOther(plane.admin, uuidv7())).toBe(Code[Code.NotFound]);
    const robot = await addServiceAccount(plane);
    expect(await forOther(robot.client, robot.id)).toBe(Code[Code.PermissionDenied]);
  });

  test("PLT-8 a read-only one reads, watches, and makes nothing, least of all another token", async () => {
    const user = await plane.addUser();
    const readOnly = { ...user, client: plane.client(await create(user, { readOnly: true })) };
    expect((await list(readOnly))[0]?.readOnly).toBe(true);
    const stream = await watchEvents(readOnly.client);
    const writes = [
      () => readOnly.client.projects.createProject({ name: "x" }),
      () => readOnly.client.identity.getIDToken({ audience: ["a"] }),
      () => create(readOnly),
      () => readOnly.client.users.setPreference({ key: "a", value: "b" }),
      () => readOnly.client.users.setDotfilesConfiguration({}),
    ];
    for (const write of writes) {
      const error = await refusal(write());
      expect(Code[error.code]).toBe(Code[Code.PermissionDenied]);
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "AUTH_TOKEN_READ_ONLY" }]);
    }
    stream.stop();
  });

  test("each sees its own; an admin also those of the users that it names; all newest first and page by page", async () => {
    const [ada, bob] = [await plane.addUser(), await plane.addUser()];
    for (const description of ["one", "two"]) await create(ada, { description });
    await create(bob, { description: "three" });
    const described = (tokens: { description: string }[]) => tokens.map((token) => token.description).filter(Boolean);
    expect(described(await list(ada))).toEqual(["two", "one"]);
    expect(await list(ada, [bob.id])).toEqual([]);
    expect(described(await list(ada, [bob.id, ada.id.toUpperCase()]))).toEqual(["two", "one"]);
    expect(described(await list(admin(), [ada.id, bob.id, foreign.id, uuidv7()]))).toEqual(["three", "two", "one"]);
    expect(await list(admin(), [foreign.id])).toEqual([]);
    expect((await list(admin())).map((token) => token.description)).toEqual(["First start"]);

    const paged: string[] = [];
    const filter = { userIds: [ada.id, bob.id] };
    for (let token = ""; ; ) {
      const answer = await plane.admin.users.listPersonalAccessTokens({ filter, pagination: { pageSize: 1, token } });
      expect(answer.personalAccessTokens).toHaveLength(1);
      paged.push(...described(answer.personalAccessTokens));
      token = answer.pagination?.nextToken ?? "";
      if (!token) break;
    }
    expect(paged).toEqual(["three", "two", "one"]);
    const [token] = await list(ada);
    const read = (client = plane.admin) => client.users.getPersonalAccessToken({ personalAccessTokenId: token!.id });
    expect((await read()).pat?.userId).toBe(ada.id);
    for (const { client } of [bob, foreign]) expect(await codeOf(read(client))).toBe(Code[Code.NotFound]);
  });

  test("of callers at once no more succeed than there is room for; expired ones make room", async () => {
    const user = await plane.addUser();
    await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: user.id, expiresAt: new Date(0) });
    // Its first token counts too.
    const room = LIMITS.personalAccessTokens - 1;
    const attempts = await Promise.allSettled(Array.from({ length: room + 3 }, () => create(user)));
    expect(attempts.filter(({ status }) => status === "fulfilled")).toHaveLength(room);
    const error = await refusal(create(user));
    expect(Code[error.code]).toBe(Code[Code.ResourceExhausted]);
    expect(error.metadata.get("x-should-retry")).toBe("false");
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "PLATFORM_LIMIT_QUOTA" }]);
    const [token] = await list(user);
    await user.client.users.deletePersonalAccessToken({ personalAccessTokenId: token!.id });
    await create(user);
  });

  test("revoked by its owner, by itself or by an admin it is dead at once, and cannot be revoked again", async () => {
    const user = await plane.addUser();
    const revoke = (client: TestUser["client"], id: string) =>
      client.users.deletePersonalAccessToken({ personalAccessTokenId: id });
    const other = await plane.addUser();
    for (const by of ["owner", "itself", "admin"]) {
      const text = await create(user);
      const [token] = await list(user);
      const id = token!.id;
      for (const { client } of [other, foreign]) expect(await codeOf(revoke(client, id))).toBe(Code[Code.NotFound]);
      const client = { owner: user.client, itself: plane.client(text), admin: plane.admin }[by]!;
      await revoke(client, id);
      expect(await codeOf(plane.client(text).users.getAuthenticatedUser({}))).toBe(Code[Code.Unauthenticated]);
      expect(await codeOf(revoke(user.client, id))).toBe(Code[Code.NotFound]);
      expect(await auditActions(plane, id)).toEqual(["Personal access token created", "Personal access token revoked"]);
    }
  });

  test("PLT-10 the open stream of a revoked one ends within 5 s", async () => {
    const user = await plane.addUser();
    const stream = await watchEvents(plane.client(await create(user)));
    const [token] = await list(user);
    await user.client.users.deletePersonalAccessToken({ personalAccessTokenId: token!.id });
    const since = performance.now();
    const error = await stream.ended;
    expect(Code[error?.code ?? 0]).toBe(Code[Code.Unauthenticated]);
    expect(performance.now() - since).toBeLessThan(5_000);
  });

  test("its owner alone hears of it", async () => {
    const user = await plane.addUser();
    const [own, others] = [await watchEvents(user.client), await watchEvents(plane.admin)];
    await create(user);
    const [token] = await list(user);
    await own.next(eventText(PERSONAL_ACCESS_TOKEN, CREATE, token!.id));
    await plane.admin.users.deletePersonalAccessToken({ personalAccessTokenId: token!.id });
    await own.next(eventText(PERSONAL_ACCESS_TOKEN, DELETE, token!.id));
    await plane.admin.users.setDotfilesConfiguration({ repository: "https://git.example.org/dots" });
    const { user: self } = await plane.admin.users.getAuthenticatedUser({});
    await others.next(eventText(USER, UPDATE, self!.id));
    expect(others.events.filter((each) => each.startsWith("PERSONAL"))).toEqual([]);
    for (const stream of [own, others]) stream.stop();
  });
});

describe("preferences", () => {
  const get = async ({ client }: TestUser, key: string) =>
    (await client.users.getPreference({ preference: { case: "preferenceKey", value: key } })).preference;

  test("are set, changed, read by key or id, listed and deleted", async () => {
    const user = await plane.addUser();
    const { users } = user.client;
    await users.setPreference({ key: "theme", value: "dark" });
    const first = await get(user, "theme");
    expect(first).toMatchObject({ key: "theme", value: "dark" });
    plane.advance(1_000);
    await users.setPreference({ key: "theme", value: "light" });
    const second = await get(user, "theme");
    expect(second).toMatchObject({ id: first?.id, value: "light", createdAt: first?.createdAt });
    expect(timestampMs(second!.updatedAt!)).toBeGreaterThan(timestampMs(first!.updatedAt!));
    const byId = { preference: { case: "preferenceId" as const, value: first!.id.toUpperCase() } };
    expect((await users.getPreference(byId)).preference).toEqual(second);
    expect((await users.getPreference({ userPreferenceId: first!.id })).preference).toEqual(second);

    await users.setPreference({ key: "editor", value: "x".repeat(10_240) });
    const keys = async (token = "") => {
      const answer = await users.listPreferences({ pagination: { pageSize: 1, token } });
      return { keys: answer.preferences.map(({ key }) => key), next: answer.pagination?.nextToken };
    };
    const page = await keys();
    expect(page.keys).toEqual(["editor"]);
    expect(await keys(page.next)).toEqual({ keys: ["theme"], next: "" });

    await users.deletePreference({ userPreferenceId: first!.id });
    expect(await codeOf(get(user, "theme"))).toBe(Code[Code.NotFound]);
    expect(await codeOf(users.deletePreference({ userPreferenceId: first!.id }))).toBe(Code[Code.NotFound]);
    const actions = ["Preference created", "Preference changed", "Preference deleted"];
    expect(await auditActions(plane, first!.id)).toEqual(actions);
  });

  test("belong to one user, whom nobody reads over the shoulder", async () => {
    const user = await plane.addUser();
    const stream = await watchEvents(user.client);
    await user.client.users.setPreference({ key: "k", value: "v" });
    const { id = "" } = (await get(user, "k")) ?? {};
    await stream.next(eventText(USER_PREFERENCE, CREATE, id));
    stream.stop();
    for (const client of [member.client, plane.admin]) {
      const byId = { preference: { case: "preferenceId" as const, value: id } };
      expect(await codeOf(client.users.getPreference(byId))).toBe(Code[Code.NotFound]);
      expect(await codeOf(client.users.deletePreference({ userPreferenceId: id }))).toBe(Code[Code.NotFound]);
      expect((await client.users.listPreferences({})).preferences.map((each) => each.id)).not.toContain(id);
    }
  });

  test("set to what they are change, emit and log nothing", async () => {
    await member.client.users.setPreference({ key: "same", value: "value" });
    const before = [await get(member, "same"), await traces(plane, USER_PREFERENCE)];
    await member.client.users.setPreference({ key: "same", value: "value" });
    expect([await get(member, "same"), await traces(plane, USER_PREFERENCE)]).toEqual(before);
  });

  test("are few, even when set at once; setting a known one again always works", async () => {
    const user = await plane.addUser();
    const keys = Array.from({ length: LIMITS.preferences + 2 }, (_, index) => `key ${index}`);
    const attempts = await Promise.allSettled(keys.map((key) => user.client.users.setPreference({ key, value: "a" })));
    const failed = attempts.flatMap((each) => (each.status === "rejected" ? [Code[each.reason.code]] : []));
    expect(failed).toEqual(Array(2).fill(Code[Code.ResourceExhausted]));
    const { preferences } = await user.client.users.listPreferences({});
    expect(preferences).toHaveLength(LIMITS.preferences);
    await user.client.users.setPreference({ key: preferences[0]!.key, value: "b" });
  });

  test("need a key or an id of the right form", async () => {
    const { users } = member.client;
    const unset = await refusal(users.getPreference({}));
    expect([Code[unset.code], violatedFields(unset)]).toEqual([Code[Code.InvalidArgument], ["preference"]]);
    for (const value of ["no uuid", uuidv7()]) {
      const call = users.getPreference({ preference: { case: "preferenceId", value } });
      expect(await codeOf(call)).toBe(Code[Code.NotFound]);
    }
    for (const bad of [
      { key: "", value: "v" },
      { key: "k", value: "" },
      { key: "k", value: "x".repeat(10_241) },
    ])
      expect(await codeOf(users.setPreference(bad))).toBe(Code[Code.InvalidArgument]);
    // What the contract lets through and no text column holds.
    expect(await codeOf(users.setPreference({ key: "a\u0000b", value: "v" }))).toBe(Code[Code.InvalidArgument]);
  });
});

describe("dotfiles", () => {
  const repository = "https://git.example.org/ada/dotfiles.git";
  const read = async (client = member.client) =>
    (await client.users.getDotfilesConfiguration({})).dotfilesConfiguration?.repository;

  test("are set, kept, and removed, each time with a trace of its own", async () => {
    const user = await plane.addUser();
    expect(await read(user.client)).toBe("");
    await user.client.users.setDotfilesConfiguration({ repository });
    await user.client.users.setDotfilesConfiguration({ repository });
    expect(await read(user.client)).toBe(repository);
    expect(await read()).toBe("");
    await user.client.users.setDotfilesConfiguration({});
    expect(await read(user.client)).toBe("");
    expect(await auditActions(plane, user.id)).toEqual(["Dotfiles changed", "Dotfiles removed"]);
  });

  test.each([
    "http://git.example.org/a/b",
    "file:///etc/passwd",
    "https://user:secret@git.example.org/a/b",
    "https://git.example.org",
    "ext::sh",
    "no address",
    `https://git.example.org/${"x".repeat(255)}`,
  ])("%j is no address to clone from", async (address) => {
    const error = await refusal(member.client.users.setDotfilesConfiguration({ repository: address }));
    expect([Code[error.code], violatedFields(error)]).toEqual([Code[Code.InvalidArgument], ["repository"]]);
    expect(await read()).toBe("");
  });

  test("come with the environments that their owner creates from then on, unless a request brings its own", async () => {
    const user = await plane.addUser();
    const robot = await addServiceAccount(plane);
    const dotfilesOf = async ({ client }: TestUser, devcontainer = {}) => {
      const spec = { machine: { class: classId }, devcontainer };
      const { environment } = await client.environments.createEnvironment({ spec });
      return environment?.spec?.devcontainer?.dotfiles?.repository;
    };
    expect(await dotfilesOf(user)).toBeUndefined();
    await user.client.users.setDotfilesConfiguration({ repository });
    expect(await dotfilesOf(user)).toBe(repository);
    const own = "https://git.example.org/other";
    expect(await dotfilesOf(user, { dotfiles: { repository: own } })).toBe(own);
    expect(await dotfilesOf(member)).toBeUndefined();
    expect(await dotfilesOf(robot)).toBeUndefined();
  });
});

// Last, because it moves the clock of the whole file.
test("an expired token stays in the list for 30 days, and its row goes with it", async () => {
  const user = await plane.addUser();
  const { token } = await user.client.users.createPersonalAccessToken({ userId: user.id, description: "old" });
  const listed = async () => {
    const { personalAccessTokens } = await user.client.users.listPersonalAccessTokens({});
    return personalAccessTokens.some((each) => each.description === "old");
  };
  const rows = async () => (await db().point`select from tokens where description = 'old'`).length;
  plane.advance(30 * DAY_MS + 60_000);
  expect(await codeOf(plane.client(token).users.getAuthenticatedUser({}))).toBe(Code[Code.Unauthenticated]);
  plane.advance(29 * DAY_MS);
  expect(await listed()).toBe(true);
  const { purgeExpiredTokens } = await import("../src/store/tokens.ts");
  const purge = () => purgeExpiredTokens(db().write, plane.plane.app.now(), 1_000);
  await purge();
  expect(await rows()).toBe(1);
  plane.advance(DAY_MS);
  expect(await listed()).toBe(false);
  await purge();
  expect(await rows()).toBe(0);
});
