import { randomBytes } from "node:crypto";
import { Code, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { AdmissionLevel, type Environment } from "../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind } from "../gen/gitpod/v1/event_pb.js";
import { IdentityService, Principal } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { createBerthClient } from "../src/client.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { openDb } from "../src/store/db.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addServiceAccount, connectRunner, mint } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const HOUR_MS = 60 * 60_000;
const DAY_MS = 24 * HOUR_MS;

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;
/** A running environment of the member, and its own token. */
let environment: Environment;
let environmentToken: string;

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane));
  environment = await newEnvironment();
  environmentToken = await ownToken(environment);
});

afterAll(async () => {
  await runner?.[Symbol.asyncDispose]();
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
});

async function newEnvironment(): Promise<Environment> {
  const created = await member.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  if (!created.environment) throw new Error("no environment");
  await runner.reportRunning(created.environment);
  return created.environment;
}

async function ownToken({ id, spec }: Environment): Promise<string> {
  const machineSession = spec?.machine?.session ?? "";
  return (await runner.control.createEnvironmentToken({ environmentId: id, machineSession })).token;
}

/** A client that sends this as its Authorization header, whatever it is. */
function withHeader(authorization: string | undefined, baseUrl = plane.url) {
  const transport = createConnectTransport({
    baseUrl,
    httpVersion: "1.1",
    interceptors: [
      (next) => (request) => {
        if (authorization !== undefined) request.header.set("authorization", authorization);
        return next(request);
      },
    ],
  });
  return createClient(IdentityService, transport);
}

const identityOf = (token: string, baseUrl = plane.url) =>
  withHeader(`Bearer ${token}`, baseUrl).getAuthenticatedIdentity({});

async function newExchangeToken(): Promise<{ runnerId: string; exchangeToken: string }> {
  const provider = RunnerProvider.LINUX_HOST;
  const created = await plane.admin.runners.createRunner({ name: "another runner", provider });
  return { runnerId: created.runner?.runnerId ?? "", exchangeToken: created.exchangeToken };
}

const exchange = (exchangeToken: string) => withHeader(undefined).exchangeToken({ exchangeToken });
const db = () => plane.plane.app.db;

describe("who a credential is", () => {
  test("PLT-7 a personal access token is its user", async () => {
    expect(await member.client.identity.getAuthenticatedIdentity({})).toMatchObject({
      subject: { id: member.id, principal: Principal.USER },
      organizationId: plane.organizationId,
      organizationTier: "enterprise",
    });
  });

  test("every other kind is its own principal", async () => {
    const robot = await addServiceAccount(plane);
    const subjectPrincipal = Principal.SERVICE_ACCOUNT;
    const kind = TokenKind.SERVICE_ACCOUNT_ACCESS;
    const access = await mint(plane, { kind, subjectId: robot.id, subjectPrincipal });
    const known = [
      [robot.token, robot.id, Principal.SERVICE_ACCOUNT],
      [access, robot.id, Principal.SERVICE_ACCOUNT],
      [runner.token, runner.id, Principal.RUNNER],
      [environmentToken, environment.id, Principal.ENVIRONMENT],
    ] as const;
    for (const [token, id, principal] of known) {
      const { subject, organizationId } = await identityOf(token);
      expect(subject).toMatchObject({ id, principal });
      expect(organizationId).toBe(plane.organizationId);
    }
  });

  test.each(["Bearer ", "bearer ", "BEARER    ", "  bearer\t"])("the scheme is read leniently: %j", async (scheme) => {
    const { subject } = await withHeader(`${scheme}${member.token}  `).getAuthenticatedIdentity({});
    expect(subject?.id).toBe(member.id);
  });

  test("the last use is written, at most once a minute", async () => {
    const token = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: member.id, description: "used" });
    const used = async () => {
      const [row] = await db().point<
        { at: Date | null }[]
      >`select last_used_at as at from tokens where description = 'used'`;
      return row?.at?.getTime() ?? 0;
    };
    expect(await used()).toBe(0);
    await identityOf(token);
    const first = await eventually(used, "the first use is written");
    plane.advance(40_000);
    await identityOf(token);
    plane.advance(40_000);
    await identityOf(token);
    // Had the use in between been written, then this one would not be, so soon after it.
    await eventually(async () => (await used()) >= first + 80_000, "a use after more than a minute is written");
  });
});

describe("PLT-6 what is no credential is UNAUTHENTICATED", () => {
  const unauthenticated = Code[Code.Unauthenticated];

  test("none, an unknown one, and one with any single character changed", async () => {
    expect(await codeOf(withHeader(undefined).getAuthenticatedIdentity({}))).toBe(unauthenticated);
    expect(await codeOf(identityOf(tokenText(TokenKind.PERSONAL_ACCESS, randomBytes)))).toBe(unauthenticated);
    const changed = [...member.token].map((char, index) => {
      const other = char === "0" ? "1" : "0";
      return member.token.slice(0, index) + other + member.token.slice(index + 1);
    });
    const codes = await Promise.all(changed.map((token) => codeOf(identityOf(token))));
    expect(new Set(codes)).toEqual(new Set([unauthenticated]));
  });

  test.each(["Basic", "Token", "Bearer Bearer", ""])("another scheme: %j", async (scheme) => {
    expect(await codeOf(withHeader(`${scheme} ${member.token}`).getAuthenticatedIdentity({}))).toBe(unauthenticated);
  });

  test.each(["Bearer", "Bearer ", "Bearer x", `Bearer ${"x".repeat(8000)}`, "Bearer \u00e9"])("%j", async (header) => {
    expect(await codeOf(withHeader(header).getAuthenticatedIdentity({}))).toBe(unauthenticated);
  });

  test("an expired one, which is told so in a way that programs can read", async () => {
    const expiresAt = new Date(plane.plane.app.now().getTime() + HOUR_MS);
    const token = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: member.id, expiresAt });
    await identityOf(token);
    await db().write`update tokens set expires_at = now() - interval '1 second' where expires_at = ${expiresAt}`;
    const error = await refusal(identityOf(token));
    expect(Code[error.code]).toBe(unauthenticated);
    expect(error.rawMessage).toContain("expired");
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "AUTH_TOKEN_EXPIRED" }]);
  });

  test("callers are told how to authenticate", async () => {
    const response = await fetch(`${plane.url}/gitpod.v1.IdentityService/GetAuthenticatedIdentity`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: "{}",
    });
    expect(response.status).toBe(401);
    expect(response.headers.get("www-authenticate")).toBe("Bearer");
    expect(await response.json()).toMatchObject({ code: "unauthenticated" });
  });

  test("the credential is looked at before the message", async () => {
    const error = await refusal(
      createBerthClient({ baseUrl: plane.url, token: "x" }).environments.getEnvironment({ environmentId: "no uuid" }),
    );
    expect(Code[error.code]).toBe(unauthenticated);
    const allowed = await refusal(member.client.environments.getEnvironment({ environmentId: "no uuid" }));
    expect(Code[allowed.code]).toBe(Code[Code.InvalidArgument]);
    expect(violatedFields(allowed)).toEqual(["environment_id"]);
  });

  test("a database that is gone while it looks is UNAVAILABLE, which says nothing about the credential", async () => {
    const blocker = openDb(plane.databaseUrl);
    try {
      await blocker.begin(async (tx) => {
        await tx`lock table tokens in access exclusive mode`;
        const call = codeOf(identityOf(member.token));
        await eventually(async () => {
          const ended = await tx`select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock' and query like '%t.id as token_id%'`;
          return ended.length > 0;
        }, "the lookup waits and is ended");
        expect(await call).toBe(Code[Code.Unavailable]);
      });
    } finally {
      await blocker.close();
    }
    await identityOf(member.token);
  });

  test("PLT-48 tokens that are no API credentials", async () => {
    const { exchangeToken } = await newExchangeToken();
    const { environments } = member.client;
    const { accessToken } = await environments.createEnvironmentAccessToken({ environmentId: environment.id });
    const logs = await environments.createEnvironmentLogsToken({ environmentId: environment.id });
    const port = await mint(plane, {
      ...{ kind: TokenKind.PORT_ACCESS, subjectId: member.id, environmentId: environment.id, port: 3000 },
    });
    const scim = await mint(plane, { kind: TokenKind.SCIM, subjectId: member.id });
    const session = await mint(plane, { kind: TokenKind.SESSION, subjectId: member.id });
    for (const token of [exchangeToken, accessToken, logs.accessToken, port, scim, session]) {
      const error = await refusal(identityOf(token));
      expect(`${token.slice(0, 9)} ${Code[error.code]}`).toBe(`${token.slice(0, 9)} ${unauthenticated}`);
    }
  });

  test("a text with the prefix of another kind opens nothing, although its hash is known", async () => {
    const token = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
    await mint(plane, { kind: TokenKind.SCIM, subjectId: member.id, text: token });
    expect(await codeOf(identityOf(token))).toBe(unauthenticated);
  });
});

describe("the state of its owner", () => {
  const unauthenticated = Code[Code.Unauthenticated];

  test("a suspended user, service account, or one past its end", async () => {
    const user = await plane.addUser();
    const [robot, old] = [await addServiceAccount(plane), await addServiceAccount(plane)];
    for (const { token } of [user, robot, old]) await identityOf(token);
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${user.id}`;
    await db().write`update service_accounts set suspended = true where id = ${robot.id}`;
    await db().write`update service_accounts set valid_until = now() - interval '1 second' where id = ${old.id}`;
    for (const { token } of [user, robot, old]) expect(await codeOf(identityOf(token))).toBe(unauthenticated);
  });

  test("an environment that has stopped or is deleted; its token of the next start works", async () => {
    const { environments } = member.client;
    const own = await newEnvironment();
    const environmentId = own.id;
    const first = await ownToken(own);
    const second = await ownToken(own);
    expect(await codeOf(identityOf(first))).toBe(unauthenticated);
    await identityOf(second);
    await environments.stopEnvironment({ environmentId });
    // Its processes are still at work on stopping.
    await identityOf(second);
    await runner.report(environmentId, {});
    expect(await codeOf(identityOf(second))).toBe(unauthenticated);

    await environments.startEnvironment({ environmentId });
    const { environment: again } = await environments.getEnvironment({ environmentId });
    const third = await ownToken(again as Environment);
    await identityOf(third);
    await environments.deleteEnvironment({ environmentId, force: true });
    expect(await codeOf(identityOf(third))).toBe(unauthenticated);
  });

  test("a revocation counts at once, on every replica", async () => {
    const replica = await plane.replica();
    const token = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: member.id, description: "short" });
    await identityOf(token, replica.server.url);
    await identityOf(token);
    await db().write`delete from tokens where description = 'short'`;
    expect(await codeOf(identityOf(token, replica.server.url))).toBe(unauthenticated);
    expect(await codeOf(identityOf(token))).toBe(unauthenticated);
  });
});

test("PLT-8 a read-only token reads and watches, and is told that it may not do more", async () => {
  const token = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: member.id, readOnly: true });
  const client = plane.client(token);
  const environmentId = environment.id;
  expect((await client.environments.listEnvironments({})).environments).not.toHaveLength(0);
  await client.environments.listEnvironmentClasses({});
  expect((await client.identity.getAuthenticatedIdentity({})).subject?.id).toBe(member.id);
  const stop = new AbortController();
  const stream = client.events.watchEvents(
    { scope: { case: "environmentId", value: environmentId } },
    { signal: AbortSignal.any([stop.signal, AbortSignal.timeout(10_000)]) },
  );
  for await (const event of stream) {
    expect(event.resourceId).toBe(environmentId);
    break;
  }
  stop.abort();

  const writes = [
    () => client.environments.createEnvironment({ spec: { machine: { class: classId } } }),
    () => client.environments.deleteEnvironment({ environmentId }),
    () => client.environments.markEnvironmentActive({ environmentId }),
    () => client.environments.createEnvironmentAccessToken({ environmentId }),
    () => client.runners.createRunner({ name: "runner", provider: RunnerProvider.LINUX_HOST }),
    () => client.identity.getIDToken({ audience: ["a"] }),
  ];
  for (const write of writes) {
    const error = await refusal(write());
    expect(Code[error.code]).toBe(Code[Code.PermissionDenied]);
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "AUTH_TOKEN_READ_ONLY" }]);
  }
});

describe("ExchangeToken", () => {
  const unauthenticated = Code[Code.Unauthenticated];

  test("PLT-11 RUN-10 of callers at once exactly one gets a token", async () => {
    const { runnerId, exchangeToken } = await newExchangeToken();
    const attempts = await Promise.allSettled(Array.from({ length: 6 }, () => exchange(exchangeToken)));
    const won = attempts.flatMap((each) => (each.status === "fulfilled" ? [each.value.accessToken] : []));
    const lost = attempts.flatMap((each) => (each.status === "rejected" ? [Code[each.reason.code]] : []));
    expect(won).toHaveLength(1);
    expect(lost).toEqual(Array(5).fill(unauthenticated));
    expect((await identityOf(won[0] ?? "")).subject).toMatchObject({ id: runnerId, principal: Principal.RUNNER });
  });

  test("PLT-11 RUN-11 every exchange token gives an access token, and none ends another", async () => {
    const { runnerId, exchangeToken } = await newExchangeToken();
    const earlier = (await exchange(exchangeToken)).accessToken;
    const more = await Promise.all([1, 2].map(() => plane.admin.runners.createRunnerToken({ runnerId })));
    // A runner renews itself.
    const own = await createBerthClient({ baseUrl: plane.url, token: earlier }).runners.createRunnerToken({ runnerId });
    const exchanged = await Promise.all([...more, own].map((each) => exchange(each.exchangeToken)));
    const tokens = [earlier, ...exchanged.map((each) => each.accessToken)];
    expect(new Set(tokens).size).toBe(4);
    for (const token of tokens) expect((await identityOf(token)).subject?.id).toBe(runnerId);
  });

  test("the first exchange is the sign-up, is audited as the runner's own, and needs no credential", async () => {
    const { runnerId, exchangeToken } = await newExchangeToken();
    const phase = async () => (await plane.admin.runners.getRunner({ runnerId })).runner?.status?.phase;
    expect(await phase()).toBe(RunnerPhase.CREATED);
    await withHeader("Bearer nonsense").exchangeToken({ exchangeToken });
    expect(await phase()).toBe(RunnerPhase.INACTIVE);
    const entries = await db().point`select actor_id, actor_principal, kind, action from audit_log
      where subject_id = ${runnerId} and actor_id = ${runnerId} order by id`;
    expect(entries).toMatchObject([
      { actor_principal: Principal.RUNNER, kind: AuditLogEntryKind.RESOURCE_CHANGE, action: "Runner signed up" },
      { kind: AuditLogEntryKind.CREDENTIAL_ACCESS, action: "Runner access token issued" },
    ]);
  });

  test("PLT-12 used, expired, of a deleted runner, of another kind, or unknown: the same answer", async () => {
    const used = await newExchangeToken();
    await exchange(used.exchangeToken);
    const deleted = await newExchangeToken();
    await plane.admin.runners.deleteRunner({ runnerId: deleted.runnerId, force: true });
    const old = await newExchangeToken();
    await db().write`update tokens set expires_at = now() - interval '1 second'
      where kind = ${TokenKind.RUNNER_EXCHANGE} and runner_id = ${old.runnerId}`;
    const unknown = tokenText(TokenKind.RUNNER_EXCHANGE, randomBytes);
    const texts = [unknown, used.exchangeToken, deleted.exchangeToken, old.exchangeToken, member.token, "nonsense"];
    const errors = await Promise.all(texts.map((text) => refusal(exchange(text))));
    expect(errors.map(({ code }) => Code[code])).toEqual(texts.map(() => unauthenticated));
    expect(new Set(errors.map(({ message }) => message)).size).toBe(1);
  });

  test("none at all is INVALID_ARGUMENT", async () => {
    const error = await refusal(exchange(""));
    expect(Code[error.code]).toBe(Code[Code.InvalidArgument]);
    expect(violatedFields(error)).toEqual(["exchange_token"]);
  });

  test("an access token ends with its runner", async () => {
    const { runnerId, exchangeToken } = await newExchangeToken();
    const { accessToken } = await exchange(exchangeToken);
    await identityOf(accessToken);
    await plane.admin.runners.deleteRunner({ runnerId, force: true });
    expect(await codeOf(identityOf(accessToken))).toBe(unauthenticated);
  });
});

describe("tokens that are shown to a runner", () => {
  const active = async (token: string, by = runner) => {
    const { active, kind, environmentId } = await by.control.introspectToken({ token });
    return active ? { kind, environmentId } : undefined;
  };

  test("PLT-48 only those that were made for it count", async () => {
    const { environments } = member.client;
    const environmentId = environment.id;
    const access = (await environments.createEnvironmentAccessToken({ environmentId })).accessToken;
    const logs = (await environments.createEnvironmentLogsToken({ environmentId })).accessToken;
    expect(await active(access)).toEqual({ kind: Kind.ENVIRONMENT_ACCESS, environmentId });
    expect(await active(logs)).toEqual({ kind: Kind.ENVIRONMENT_LOGS, environmentId });
    expect(await active(environmentToken)).toEqual({ kind: Kind.ENVIRONMENT, environmentId });
    const robot = await addServiceAccount(plane);
    const { exchangeToken } = await newExchangeToken();
    const session = await mint(plane, { kind: TokenKind.SESSION, subjectId: member.id });
    for (const token of [member.token, plane.adminToken, robot.token, runner.token, exchangeToken, session, "x"]) {
      expect(await active(token)).toBeUndefined();
    }
    const { runner: other } = await connectRunner(plane);
    for (const token of [access, logs, environmentToken]) expect(await active(token, other)).toBeUndefined();
  });

  test("they end with their hour, their issuer, and the issuer's access", async () => {
    const { environments } = member.client;
    const environmentId = environment.id;
    const guest = await plane.addUser();
    const setAdmission = (level: number) =>
      db().write`update environments set admission = ${level} where id = ${environmentId}`;
    await setAdmission(3);
    const own = (await environments.createEnvironmentAccessToken({ environmentId })).accessToken;
    const theirs = (await guest.client.environments.createEnvironmentAccessToken({ environmentId })).accessToken;
    expect(await active(theirs)).toBeDefined();
    await setAdmission(1);
    expect(await active(theirs)).toBeUndefined();
    expect(await active(own)).toBeDefined();
    await setAdmission(3);
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${guest.id}`;
    expect(await active(theirs)).toBeUndefined();
    await setAdmission(1);

    const { expiresAt } = await runner.control.introspectToken({ token: own });
    const left = Number(expiresAt?.seconds ?? 0n) * 1000 - plane.plane.app.now().getTime();
    expect(left).toBeGreaterThan(HOUR_MS - 60_000);
    expect(left).toBeLessThanOrEqual(HOUR_MS);
  });
});

test("PLT-5 no table holds the text of a token", async () => {
  const { exchangeToken } = await newExchangeToken();
  const { accessToken } = await exchange(exchangeToken);
  const { environments } = member.client;
  const environmentId = environment.id;
  const ports = [{ port: 3000, name: "web", admission: AdmissionLevel.CREATOR_ONLY }];
  await environments.updateEnvironment({ environmentId, spec: { ports } });
  const robot = await addServiceAccount(plane);
  const { serviceAccounts } = plane.admin;
  const tokens = [
    ...[plane.adminToken, member.token, exchangeToken, accessToken, environmentToken, robot.token],
    (await serviceAccounts.createServiceAccountAccessToken({ serviceAccountId: robot.id })).token,
    (await environments.createPortAccessToken({ environmentId, port: 3000 })).accessToken,
    (await environments.createEnvironmentAccessToken({ environmentId })).accessToken,
    (await environments.createEnvironmentLogsToken({ environmentId })).accessToken,
  ];
  const tables = await db().point<{ name: string }[]>`
    select tablename as name from pg_tables where schemaname = 'public'`;
  let rows = 0;
  for (const { name } of tables) {
    const texts = await db().point<{ text: string }[]>`select t::text as text from ${db().point(name)} t`;
    rows += texts.length;
    for (const token of tokens) {
      const secret = token.replace(/^berth_[a-z]+_/, "");
      // Binary columns are shown in hexadecimal digits.
      const forms = [secret, Buffer.from(secret).toString("hex"), Buffer.from(secret).toString("base64").slice(4, -4)];
      const found = texts.find(({ text }) => forms.some((form) => text.includes(form)));
      expect(found, `${name} holds a ${token.slice(0, 9)} token`).toBeUndefined();
    }
  }
  expect(rows).toBeGreaterThan(20);
});

// Last, because it moves the clock of the whole file.
test("PLT-12 RUN-10 after a day an exchange token is worth nothing; after 90 days neither is an access token", async () => {
  const [late, intime] = [await newExchangeToken(), await newExchangeToken()];
  plane.advance(DAY_MS - 60_000);
  const { accessToken } = await exchange(intime.exchangeToken);
  plane.advance(2 * 60_000);
  expect(await codeOf(exchange(late.exchangeToken))).toBe(Code[Code.Unauthenticated]);
  plane.advance(90 * DAY_MS - 4 * 60_000);
  await identityOf(accessToken);
  plane.advance(4 * 60_000);
  expect(await codeOf(identityOf(accessToken))).toBe(Code[Code.Unauthenticated]);
});
