import { durationFromMs, timestampFromMs, timestampMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { HostAuthenticationTokenSource } from "../gen/gitpod/v1/runner_configuration_pb.js";
import type { ServiceAccount } from "../gen/gitpod/v1/service_account_pb.js";
import type { BerthClient } from "../src/client.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { actAsServiceAccount, addOrganization, connectRunner, mint, share } from "./harness/tenants.ts";

const MINUTE_MS = 60_000;
const DAY_MS = 24 * 60 * MINUTE_MS;
const LIMITS = { serviceAccounts: 30, serviceAccountTokens: 3 };
const { CREATE, UPDATE, DELETE } = ResourceOperation;
const { SERVICE_ACCOUNT, SERVICE_ACCOUNT_TOKEN } = ResourceType;

let plane: TestPlane;
let member: TestUser;
let foreign: TestUser;
let adminId: string;

beforeAll(async () => {
  plane = await startTestPlane({}, LIMITS);
  member = await plane.addUser();
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
  adminId = (await plane.admin.users.getAuthenticatedUser({})).user?.id ?? "";
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
});

const inMs = (ms: number) => timestampFromMs(plane.plane.app.now().getTime() + ms);
const db = () => plane.plane.app.db;

async function make(options: { name?: string; description?: string; validMs?: number } = {}, client = plane.admin) {
  const { name = "ci", description = "", validMs = 365 * DAY_MS } = options;
  const made = await client.serviceAccounts.createServiceAccount({ name, description, validUntil: inMs(validMs) });
  return made.serviceAccount as ServiceAccount;
}

const read = async (serviceAccountId: string, client: BerthClient = member.client) =>
  (await client.serviceAccounts.getServiceAccount({ serviceAccountId })).serviceAccount;
const list = async (filter = {}, client: BerthClient = member.client) =>
  (await client.serviceAccounts.listServiceAccounts({ filter, pagination: { pageSize: 100 } })).serviceAccounts;
const remove = (serviceAccountId: string, client = plane.admin) =>
  client.serviceAccounts.deleteServiceAccount({ serviceAccountId });
/** A token of a service account and a client with it. */
async function tokenOf(id: string) {
  const access = await actAsServiceAccount(plane, id);
  const { token, serviceAccountToken } = await access.serviceAccounts.createServiceAccountToken({});
  return { token, id: serviceAccountToken?.id ?? "", client: plane.client(token) };
}

describe("service accounts", () => {
  test("an admin makes them, every member sees them, and they are members themselves", async () => {
    const account = await make({ name: "deploy", description: "Ships it", validMs: DAY_MS });
    expect(account).toMatchObject({
      ...{ organizationId: plane.organizationId, name: "deploy", description: "Ships it", suspended: false },
      ...{ creator: { id: adminId, principal: Principal.USER }, systemManaged: false },
    });
    expect(timestampMs(account.validUntil!) - timestampMs(account.createdAt!)).toBeGreaterThan(DAY_MS - MINUTE_MS);
    const own = (await tokenOf(account.id)).client;
    for (const client of [plane.admin, member.client, own]) expect(await read(account.id, client)).toEqual(account);
    const groups = await db().point<{ name: string }[]>`
      select g.name from group_members m join groups g on g.id = m.group_id where m.member_id = ${account.id}`;
    expect(groups.map(({ name }) => name)).toEqual(["org-members"]);
    // Its name is nobody's alone.
    expect((await make({ name: "deploy" })).id).not.toBe(account.id);
  });

  test("members may not make, change or delete them, and others do not see them", async () => {
    const { id } = await make();
    const { serviceAccounts } = member.client;
    expect(await codeOf(make({}, member.client))).toBe("PermissionDenied");
    expect(await codeOf(serviceAccounts.updateServiceAccount({ serviceAccountId: id, name: "x" }))).toBe(
      "PermissionDenied",
    );
    expect(await codeOf(remove(id, member.client))).toBe("PermissionDenied");
    for (const unknown of [id, uuidv7()]) {
      expect(await codeOf(read(unknown, foreign.client))).toBe("NotFound");
      expect(await codeOf(remove(unknown, foreign.client))).toBe("NotFound");
      const update = { serviceAccountId: unknown, name: "x" };
      expect(await codeOf(foreign.client.serviceAccounts.updateServiceAccount(update))).toBe("NotFound");
    }
    expect(await list({ serviceAccountIds: [id] }, foreign.client)).toEqual([]);
  });

  test.each([0, -DAY_MS])("an end %s ms from now is INVALID_ARGUMENT", async (validMs) => {
    const error = await refusal(make({ validMs }));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["valid_until"]]);
  });

  test("lists are newest first, leave suspended ones out, and search name, description and id literally", async () => {
    const mark = uuidv7();
    const [first, second, third] = [
      await make({ name: "One", description: `${mark} 100%` }),
      await make({ name: "Two_", description: mark }),
      await make({ name: "Three", description: mark.toUpperCase() }),
    ];
    await remove(second.id);
    const names = async (filter: object) => (await list(filter)).map(({ name }) => name);
    expect(await names({ search: mark })).toEqual(["Three", "One"]);
    expect(await names({ search: mark, includeSuspended: true })).toEqual(["Three", "Two_", "One"]);
    expect(await names({ search: `${mark} 100%` })).toEqual(["One"]);
    expect(await names({ search: "%", serviceAccountIds: [first.id, third.id] })).toEqual(["One"]);
    expect(await names({ search: third.id.slice(0, 30).toUpperCase(), serviceAccountIds: [third.id] })).toEqual([
      "Three",
    ]);
    expect(await names({ serviceAccountIds: [first.id, second.id, uuidv7()] })).toEqual(["One"]);
    const { serviceAccounts, pagination } = await member.client.serviceAccounts.listServiceAccounts({
      ...{ filter: { search: mark }, pagination: { pageSize: 1 } },
    });
    expect(serviceAccounts.map(({ name }) => name)).toEqual(["Three"]);
    const token = pagination?.nextToken ?? "";
    const next = { filter: { search: mark }, pagination: { pageSize: 1, token } };
    const answer = await member.client.serviceAccounts.listServiceAccounts(next);
    expect(answer.serviceAccounts.map(({ name }) => name)).toEqual(["One"]);
    expect(answer.pagination?.nextToken).toBe("");
    expect(await codeOf(member.client.serviceAccounts.listServiceAccounts({ pagination: { token } }))).toBe(
      "InvalidArgument",
    );
  });

  test("name and description change, the end does not, and what changes nothing is not told", async () => {
    const { id, validUntil } = await make({ name: "before", description: "first" });
    const { serviceAccounts } = plane.admin;
    const stream = await watchEvents(member.client);
    const changed = await serviceAccounts.updateServiceAccount({ serviceAccountId: id, description: "" });
    expect(changed.serviceAccount).toMatchObject({ id, name: "before", description: "", validUntil });
    await stream.next(eventText(SERVICE_ACCOUNT, UPDATE, id));
    stream.stop();
    const trace = await traces(plane, SERVICE_ACCOUNT);
    await serviceAccounts.updateServiceAccount({ serviceAccountId: id, description: "", name: "before" });
    expect(await traces(plane, SERVICE_ACCOUNT)).toEqual(trace);
    expect(await auditActions(plane, id)).toEqual(["Service account created", "Service account changed: description"]);
    expect(await codeOf(serviceAccounts.updateServiceAccount({ serviceAccountId: id, name: "" }))).toBe(
      "InvalidArgument",
    );
  });

  test("the system's own can be neither changed nor deleted", async () => {
    const { id } = await make();
    await db().write`update service_accounts set system_managed = true where id = ${id}`;
    const update = plane.admin.serviceAccounts.updateServiceAccount({ serviceAccountId: id, name: "x" });
    expect([await codeOf(update), await codeOf(remove(id))]).toEqual(["FailedPrecondition", "FailedPrecondition"]);
    expect((await read(id))?.suspended).toBe(false);
  });

  test("PLT-16 a deleted one is read as suspended, listed on demand only, and its tokens are dead", async () => {
    const { id } = await make();
    const token = await tokenOf(id);
    const access = await actAsServiceAccount(plane, id);
    const stream = await watchEvents(member.client);
    await remove(id);
    await stream.next(eventText(SERVICE_ACCOUNT, DELETE, id));
    stream.stop();
    expect((await read(id))?.suspended).toBe(true);
    expect((await list({ serviceAccountIds: [id] })).length).toBe(0);
    expect((await list({ serviceAccountIds: [id], includeSuspended: true })).length).toBe(1);
    for (const client of [token.client, access])
      expect(await codeOf(client.identity.getAuthenticatedIdentity({}))).toBe("Unauthenticated");
    const trace = await traces(plane, SERVICE_ACCOUNT);
    await remove(id);
    expect(await traces(plane, SERVICE_ACCOUNT)).toEqual(trace);
    const { serviceAccounts } = plane.admin;
    const refused = await Promise.all([
      codeOf(serviceAccounts.updateServiceAccount({ serviceAccountId: id, name: "x" })),
      codeOf(serviceAccounts.createServiceAccountAccessToken({ serviceAccountId: id })),
    ]);
    expect(refused).toEqual(["FailedPrecondition", "FailedPrecondition"]);
  });

  test("with it go its secrets, its credentials for hosts, its memberships and shares; its environments stop", async () => {
    const { runner, classId } = await connectRunner(plane);
    const { id } = await make();
    const { client } = await tokenOf(id);
    const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
    const environmentId = environment?.id ?? "";
    await client.secrets.createSecret({
      ...{ name: "KEY", value: "x", mount: { case: "environmentVariable", value: true } },
      scope: { scope: { case: "serviceAccountId", value: id } },
    });
    await client.runnerConfiguration.createHostAuthenticationToken({
      ...{ runnerId: runner.id, host: "github.com", token: "x", source: HostAuthenticationTokenSource.PAT },
      subject: { id, principal: Principal.SERVICE_ACCOUNT },
    });
    await share(plane, id, { type: ResourceType.RUNNER, id: runner.id, role: ResourceRole.RUNNER_ADMIN });
    const left = async () => {
      const [row] = await db().point<{ secrets: number; hosts: number; groups: number; shares: number }[]>`
        select (select count(*)::int from secrets where scope_id = ${id}) as secrets,
          (select count(*)::int from host_tokens where subject_id = ${id}) as hosts,
          (select count(*)::int from group_members where member_id = ${id}) as groups,
          (select count(*)::int from groups where direct_share_of = ${id}) as shares`;
      return row;
    };
    expect(await left()).toEqual({ secrets: 1, hosts: 1, groups: 2, shares: 1 });
    await remove(id);
    expect(await left()).toEqual({ secrets: 0, hosts: 0, groups: 0, shares: 0 });
    const { environment: stopping } = await plane.admin.environments.getEnvironment({ environmentId });
    expect(stopping?.spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
    await runner[Symbol.asyncDispose]();
  });

  test("past its end its tokens are refused, and nobody gets another", async () => {
    const { id } = await make({ validMs: DAY_MS });
    const { client } = await tokenOf(id);
    await client.identity.getAuthenticatedIdentity({});
    await db().write`update service_accounts set valid_until = now() - interval '1 second' where id = ${id}`;
    expect(await codeOf(client.identity.getAuthenticatedIdentity({}))).toBe("Unauthenticated");
    expect(await codeOf(actAsServiceAccount(plane, id))).toBe("FailedPrecondition");
    expect((await read(id))?.suspended).toBe(false);
  });

  test("of admins at once no more succeed than there is room for; deleted ones make room", async () => {
    const room = LIMITS.serviceAccounts - (await list()).length;
    const attempts = await Promise.allSettled(Array.from({ length: room + 2 }, () => make({ name: "many" })));
    expect(attempts.filter(({ status }) => status === "fulfilled")).toHaveLength(room);
    const error = await refusal(make());
    expect([Code[error.code], error.metadata.get("x-should-retry")]).toEqual(["ResourceExhausted", "false"]);
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "PLATFORM_LIMIT_QUOTA" }]);
    for (const { id, name } of await list()) if (name === "many") await remove(id);
    await remove((await make()).id);
  });
});

describe("acting as a service account", () => {
  test("PLT-15 an admin gets a token for half an hour, and with it one that ends with the account at the latest", async () => {
    const account = await make({ validMs: 40 * DAY_MS });
    const access = await actAsServiceAccount(plane, account.id);
    expect((await access.identity.getAuthenticatedIdentity({})).subject).toMatchObject({
      ...{ id: account.id, principal: Principal.SERVICE_ACCOUNT },
    });
    const issue = (days?: number, client = access) =>
      client.serviceAccounts.createServiceAccountToken({
        ...{ description: "ci", validFor: days === undefined ? undefined : durationFromMs(days * DAY_MS) },
      });
    const { token, serviceAccountToken } = await issue(400);
    expect(token).toMatch(/^berth_sat_\w{49}$/);
    expect(serviceAccountToken).toMatchObject({
      ...{ serviceAccountId: account.id, description: "ci", expiresAt: account.validUntil },
      creator: { id: adminId, principal: Principal.USER },
    });
    expect(await codeOf(issue(1, plane.client(token)))).toBe("PermissionDenied");
    for (const client of [plane.admin, member.client]) expect(await codeOf(issue(1, client))).toBe("PermissionDenied");
    const lifetime = ({ serviceAccountToken: made }: Awaited<ReturnType<typeof issue>>) =>
      timestampMs(made!.expiresAt!) - timestampMs(made!.createdAt!);
    expect(lifetime(await issue(7))).toBe(7 * DAY_MS);
    const long = await make();
    expect(lifetime(await issue(undefined, await actAsServiceAccount(plane, long.id)))).toBe(90 * DAY_MS);
  });

  test("the person behind it stands in the audit log with whatever is done with it", async () => {
    const { id } = await make();
    const access = await actAsServiceAccount(plane, id);
    const { serviceAccountToken } = await access.serviceAccounts.createServiceAccountToken({});
    const entries = await db().point`
      select actor_id, issuer_id, kind, action from audit_log where subject_id = any(${[id, serviceAccountToken!.id]}) order by id`;
    expect(entries.slice(1)).toMatchObject([
      { actor_id: adminId, kind: AuditLogEntryKind.CREDENTIAL_ACCESS, action: "Service account access token issued" },
      {
        actor_id: id,
        issuer_id: adminId,
        kind: AuditLogEntryKind.RESOURCE_CHANGE,
        action: "Service account token created",
      },
    ]);
  });

  test("needs the role admin on the account, or in the organization", async () => {
    const { id } = await make();
    const acting = (client: BerthClient) => actAsServiceAccount(plane, id, client);
    expect(await codeOf(acting(member.client))).toBe("PermissionDenied");
    expect(await codeOf(acting(foreign.client))).toBe("NotFound");
    const resource = { type: SERVICE_ACCOUNT, id, role: ResourceRole.SERVICE_ACCOUNT_ADMIN };
    const unshare = await share(plane, member.id, resource);
    const access = await acting(member.client);
    const { serviceAccountToken } = await access.serviceAccounts.createServiceAccountToken({});
    expect(serviceAccountToken?.creator?.id).toBe(member.id);
    await unshare();
    expect(await codeOf(acting(member.client))).toBe("PermissionDenied");
    // An account does not make itself a token: a person stands behind each.
    const { client } = await tokenOf(id);
    expect(await codeOf(acting(client))).toBe("PermissionDenied");
  });

  test("it ends with its half hour, and with an account that ends before that", async () => {
    const { id } = await make();
    const short = await make({ validMs: 10 * MINUTE_MS });
    const expiries = async (subjectId: string) => {
      await actAsServiceAccount(plane, subjectId);
      const rows = await db().point<{ created_at: Date; expires_at: Date }[]>`
        select created_at, expires_at from tokens
        where subject_id = ${subjectId} and kind = ${TokenKind.SERVICE_ACCOUNT_ACCESS}`;
      return rows.map((row) => row.expires_at.getTime() - row.created_at.getTime());
    };
    expect(await expiries(id)).toEqual([30 * MINUTE_MS]);
    expect((await expiries(short.id))[0]).toBeLessThanOrEqual(10 * MINUTE_MS);
  });
});

describe("tokens of a service account", () => {
  test("it lists, reads and revokes its own with an access token; an admin reads and revokes those of all", async () => {
    const [one, two] = [await make(), await make()];
    const access = await actAsServiceAccount(plane, one.id);
    const [first, second] = [await tokenOf(one.id), await tokenOf(one.id)];
    const other = await tokenOf(two.id);
    const { serviceAccounts } = access;
    const ids = async () => (await serviceAccounts.listServiceAccountTokens({})).tokens.map(({ id }) => id);
    expect(await ids()).toEqual([second.id, first.id]);
    const page = await serviceAccounts.listServiceAccountTokens({ pagination: { pageSize: 1 } });
    const token = page.pagination?.nextToken ?? "";
    expect((await serviceAccounts.listServiceAccountTokens({ pagination: { pageSize: 1, token } })).tokens[0]?.id).toBe(
      first.id,
    );
    const get = (client: BerthClient, id: string) =>
      client.serviceAccounts.getServiceAccountToken({ serviceAccountTokenId: id });
    const revoke = (client: BerthClient, id: string) =>
      client.serviceAccounts.deleteServiceAccountToken({ serviceAccountTokenId: id });
    for (const client of [access, plane.admin]) expect((await get(client, first.id)).token?.id).toBe(first.id);
    for (const call of [get, revoke]) {
      expect(await codeOf(call(access, other.id))).toBe("NotFound");
      expect(await codeOf(call(member.client, first.id))).toBe("NotFound");
      expect(await codeOf(call(foreign.client, first.id))).toBe("NotFound");
      expect(await codeOf(call(first.client, first.id))).toBe("PermissionDenied");
    }
    expect(await codeOf(plane.admin.serviceAccounts.listServiceAccountTokens({}))).toBe("PermissionDenied");
    expect(await codeOf(first.client.serviceAccounts.listServiceAccountTokens({}))).toBe("PermissionDenied");

    const stream = await watchEvents(plane.admin);
    await revoke(access, first.id);
    await revoke(plane.admin, second.id);
    await stream.next(eventText(SERVICE_ACCOUNT_TOKEN, DELETE, second.id));
    const third = await tokenOf(one.id);
    await stream.next(eventText(SERVICE_ACCOUNT_TOKEN, CREATE, third.id));
    stream.stop();
    for (const { client } of [first, second])
      expect(await codeOf(client.identity.getAuthenticatedIdentity({}))).toBe("Unauthenticated");
    expect(await codeOf(revoke(access, first.id))).toBe("NotFound");
    expect(await ids()).toEqual([third.id]);
    expect(await auditActions(plane, first.id)).toEqual([
      ...["Service account token created", "Service account token revoked"],
    ]);
  });

  test("PLT-10 the open stream of a revoked one ends within 5 s", async () => {
    const { id } = await make();
    const token = await tokenOf(id);
    const stream = await watchEvents(token.client);
    await plane.admin.serviceAccounts.deleteServiceAccountToken({ serviceAccountTokenId: token.id });
    const since = performance.now();
    expect(Code[(await stream.ended)?.code ?? 0]).toBe("Unauthenticated");
    expect(performance.now() - since).toBeLessThan(5_000);
  });

  test("are limited in number, even when made at once; personal ones are none of them", async () => {
    const { id } = await make();
    const access = await actAsServiceAccount(plane, id);
    const issue = () => access.serviceAccounts.createServiceAccountToken({});
    const attempts = await Promise.allSettled(Array.from({ length: LIMITS.serviceAccountTokens + 2 }, issue));
    expect(attempts.filter(({ status }) => status === "fulfilled")).toHaveLength(LIMITS.serviceAccountTokens);
    const error = await refusal(issue());
    expect([Code[error.code], error.metadata.get("x-should-retry")]).toEqual(["ResourceExhausted", "false"]);
    await db().write`update tokens set expires_at = now() - interval '1 second'
      where subject_id = ${id} and kind = ${TokenKind.SERVICE_ACCOUNT}`;
    await issue();
    const personal = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: member.id });
    const [{ id: patId } = { id: "" }] = await db().point<{ id: string }[]>`
      select id from tokens where subject_id = ${member.id} order by id desc limit 1`;
    expect(personal).toBeTruthy();
    const read = plane.admin.serviceAccounts.getServiceAccountToken({ serviceAccountTokenId: patId });
    expect(await codeOf(read)).toBe("NotFound");
  });

  test.each([
    [{ validFor: durationFromMs(-1_000) }, "valid_for"],
    [{ validFor: { seconds: 2_524_608_001n } }, "valid_for"],
    [{ description: "x".repeat(256) }, "description"],
  ])("request %# is INVALID_ARGUMENT", async (request, field) => {
    const access = await actAsServiceAccount(plane, (await make()).id);
    const error = await refusal(access.serviceAccounts.createServiceAccountToken(request));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", [field]]);
  });
});
