import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { CreateEnvironmentPreconditionFailureDetailsSchema } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import {
  RunnerKind,
  RunnerProvider,
  HostAuthenticationTokenSource as Source,
} from "../gen/gitpod/v1/runner_configuration_pb.js";
import { connectControlPlane } from "../src/runner/control-plane.ts";
import { sourceControl } from "../src/runner/source-control.ts";
import { BLOCKED_ADDRESS, createGuard } from "../src/scm/guard.ts";
import { newBoxKeys, openBox } from "../src/scm/sealed-box.ts";
import { unseal } from "../src/store/envelope.ts";
import { hostTokenContext } from "../src/store/host-tokens.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, connectRunner } from "./harness/tenants.ts";

const DAY_MS = 24 * 60 * 60_000;

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;
let keys: { publicKey: Uint8Array; privateKey: Uint8Array };
let number = 0;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane));
  keys = await newBoxKeys();
  await runner.heartbeat({ publicKey: keys.publicKey });
  await runner.register({ status: { publicKey: keys.publicKey } });
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  expect(plane.logged()).not.toContain("canary");
  await plane[Symbol.asyncDispose]();
});

const configuration = () => plane.admin.runnerConfiguration;
const newHost = () => `git${++number}.example.org`;

const integrate = async (more: object = {}) => {
  const { host = newHost(), ...rest } = more as { host?: string };
  const { id } = await configuration().createSCMIntegration({
    runnerId: runner.id,
    scmId: "github",
    host,
    pat: true,
    ...rest,
  });
  return { id, host };
};

const newToken = (host: string, more: object = {}, user: TestUser = member) =>
  user.client.runnerConfiguration.createHostAuthenticationToken({
    ...{ runnerId: runner.id, host, token: "canary-secret", source: Source.PAT },
    ...more,
  });

const tokensOf = async (host: string) =>
  (await configuration().listHostAuthenticationTokens({})).tokens.filter((each) => each.host === host);

const signedIn = (host: string, user: TestUser = member) =>
  user.client.runners.checkAuthenticationForHost({ runnerId: runner.id, host });

const eventsOf = async (id: string) => {
  const rows = await plane.plane.app.db.point<{ operation: ResourceOperation; creator_id: string }[]>`
    select operation, creator_id from events where resource_id = ${id} order by seq`;
  return rows.map(({ operation, creator_id }) => [ResourceOperation[operation], creator_id]);
};

describe("integrations", () => {
  test("RUN-24 OAuth needs a runner with a key, by words that clients know; tokens alone do not", async () => {
    const { runner: keyless } = await plane.admin.runners.createRunner({
      name: "keyless",
      provider: RunnerProvider.LINUX_HOST,
    });
    const request = { runnerId: keyless!.runnerId, scmId: "github", host: newHost() };
    const oauth = { oauthClientId: "id", oauthPlaintextClientSecret: "canary" };
    const error = await refusal(configuration().createSCMIntegration({ ...request, ...oauth }));
    expect(Code[error.code]).toBe("FailedPrecondition");
    expect(error.rawMessage).toBe("runner does not have a public key");
    await configuration().createSCMIntegration({ ...request, pat: true });
  });

  test("RUN-25 a client id comes with its secret, and a host has one integration", async () => {
    const half = await refusal(integrate({ oauthClientId: "id" }));
    expect(violatedFields(half)).toEqual(["oauth_plaintext_client_secret"]);
    const other = await refusal(integrate({ oauthPlaintextClientSecret: "canary" }));
    expect(violatedFields(other)).toEqual(["oauth_client_id"]);
    const { host } = await integrate();
    expect(await codeOf(integrate({ host: host.toUpperCase() }))).toBe("AlreadyExists");
  });

  test.each([
    ["scm_id", { scmId: "sourceforge" }],
    ["host", { host: "https://git.example.org" }],
    ["host", { host: "a b" }],
    ["oauth_client_id", { scmId: "git", oauthClientId: "i", oauthPlaintextClientSecret: "s" }],
    ["issuer_url", { scmId: "azuredevops_entra", oauthClientId: "i", oauthPlaintextClientSecret: "s" }],
    ["issuer_url", { oauthClientId: "i", oauthPlaintextClientSecret: "s", issuerUrl: "http://x" }],
    ["virtual_directory", { virtualDirectory: "/tfs" }],
    ["virtual_directory", { scmId: "azuredevops_server", virtualDirectory: "tfs" }],
  ])("a bad %s is named (%j)", async (field, more) => {
    expect(violatedFields(await refusal(integrate(more)))).toEqual([field]);
  });

  test("RUN-28 only the runner's key opens the client secret, and only admins see it sealed", async () => {
    const { id } = await integrate({ oauthClientId: "id", oauthPlaintextClientSecret: "canary-client-secret" });
    const { integration } = await configuration().getSCMIntegration({ id });
    const sealed = integration?.oauth?.encryptedClientSecret ?? new Uint8Array();
    expect(Buffer.from(await openBox(sealed, keys)).toString()).toBe("canary-client-secret");
    await expect(openBox(sealed, await newBoxKeys())).rejects.toThrow();
    const seen = await member.client.runnerConfiguration.getSCMIntegration({ id });
    expect([seen.integration?.oauth?.clientId, seen.integration?.oauth?.encryptedClientSecret.length]).toEqual([
      "id",
      0,
    ]);
    expect(await codeOf(member.client.runnerConfiguration.deleteSCMIntegration({ id }))).toBe("PermissionDenied");
    const stranger = await plane.addUser({ organizationId: await addOrganization(plane) });
    expect(await codeOf(stranger.client.runnerConfiguration.getSCMIntegration({ id }))).toBe("NotFound");
  });

  test("the local configuration runner has a key of its own, and what it holds serves all local runners", async () => {
    const { runners } = await plane.admin.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL_CONFIGURATION] } });
    const runnerId = runners[0]?.runnerId ?? "";
    const host = newHost();
    const secret = { oauthClientId: "id", oauthPlaintextClientSecret: "canary" };
    const { id } = await configuration().createSCMIntegration({
      runnerId,
      scmId: "github",
      host,
      pat: true,
      ...secret,
    });
    const read = async () =>
      (await configuration().getSCMIntegration({ id })).integration?.oauth?.encryptedClientSecret;
    const [row] = await plane.plane.app.db.point<{ public_key: Uint8Array; sealed_private_key: Uint8Array }[]>`
      select public_key, sealed_private_key from runners where id = ${runnerId}`;
    const privateKey = unseal(plane.plane.app.masterKey, `runner ${runnerId} private key`, row!.sealed_private_key);
    const opened = await openBox((await read()) ?? new Uint8Array(), { publicKey: row!.public_key, privateKey });
    expect(Buffer.from(opened).toString()).toBe("canary");
    expect((await signedIn(host)).authenticated).toBe(false);
    const { token } = await newToken(host);
    expect(token?.integrationId).toBe(id);
    // One of the runner's own wins.
    const own = await integrate({ host, pat: false });
    expect((await signedIn(host)).authenticated).toBe(true);
    await configuration().deleteSCMIntegration({ id: own.id });
    expect(await tokensOf(host)).toEqual([]);
    await newToken(host);
    await configuration().updateSCMIntegration({ id, pat: false });
    expect(await tokensOf(host)).toEqual([]);
    const refused = newToken(host, { runnerId });
    expect(await codeOf(refused)).toBe("FailedPrecondition");
  });

  test("RUN-26 RUN-27 a way to sign in that is taken away takes its tokens along, and no others", async () => {
    const { id, host } = await integrate({ oauthClientId: "id", oauthPlaintextClientSecret: "s" });
    const pat = await newToken(host);
    await newToken(host, { source: Source.OAUTH });
    const sources = async () => (await tokensOf(host)).map(({ source }) => source).sort();
    await configuration().updateSCMIntegration({ id, oauthClientId: "", oauthPlaintextClientSecret: "ignored" });
    expect(await sources()).toEqual([Source.PAT]);
    await configuration().updateSCMIntegration({ id, oauthClientId: "", pat: true });
    expect(await sources()).toEqual([Source.PAT]);
    expect(await codeOf(newToken(host, { source: Source.OAUTH }))).toBe("FailedPrecondition");
    await configuration().updateSCMIntegration({ id, pat: false });
    expect(await sources()).toEqual([]);
    expect(await eventsOf(pat.token?.id ?? "")).toEqual([
      ["CREATE", member.id],
      ["DELETE", member.id],
    ]);
    await configuration().updateSCMIntegration({ id, pat: true });
    await newToken(host);
    await configuration().deleteSCMIntegration({ id });
    expect(await sources()).toEqual([]);
    expect(await codeOf(configuration().deleteSCMIntegration({ id }))).toBe("NotFound");
  });

  test("a new client needs its secret, the same one keeps it, a secret alone replaces it", async () => {
    const { id } = await integrate({ oauthClientId: "id", oauthPlaintextClientSecret: "one" });
    const secret = async () => {
      const { integration } = await configuration().getSCMIntegration({ id });
      return Buffer.from(await openBox(integration!.oauth!.encryptedClientSecret, keys)).toString();
    };
    expect(violatedFields(await refusal(configuration().updateSCMIntegration({ id, oauthClientId: "new" })))).toEqual([
      "oauth_plaintext_client_secret",
    ]);
    await configuration().updateSCMIntegration({ id, oauthClientId: "id", issuerUrl: "https://login.example.org" });
    expect(await secret()).toBe("one");
    await configuration().updateSCMIntegration({ id, oauthPlaintextClientSecret: "two" });
    expect(await secret()).toBe("two");
    await configuration().updateSCMIntegration({ id, issuerUrl: "" });
    const before = await eventsOf(id);
    await configuration().updateSCMIntegration({ id, oauthClientId: "id" });
    expect(await eventsOf(id)).toEqual(before);
  });

  test("lists show what belongs to visible runners", async () => {
    const { id } = await integrate();
    const ids = async (user: { client: TestUser["client"] }) => {
      const { integrations } = await user.client.runnerConfiguration.listSCMIntegrations({
        ...{ filter: { runnerIds: [runner.id] }, pagination: { pageSize: 100 } },
      });
      return integrations.map((each) => each.id);
    };
    expect(await ids(member)).toContain(id);
    const stranger = await plane.addUser({ organizationId: await addOrganization(plane) });
    expect(await ids(stranger)).toEqual([]);
  });
});

describe("what a runner makes of integrations", () => {
  // Every name but one lies in a private network.
  const resolve = async (name: string) => [name.startsWith("metadata") ? "169.254.169.254" : "10.1.2.3"];
  const onRunner = () => {
    const guard = createGuard({ allowHosts: [], schemes: [], resolve });
    return sourceControl(
      connectControlPlane(plane.url, () => runner.token),
      guard,
      plane.url,
      () => Promise.reject(new Error("nothing is sealed for it")),
    ).guard;
  };
  const admits = (url: string, guard = onRunner()) =>
    guard.admit(url).then(
      ({ addresses }) => addresses,
      (error: Error) => error.message,
    );

  test("RUN-43 private addresses of hosts that are integrated for it may be contacted, and no others", async () => {
    const { host, id } = await integrate({ scmId: "gitlab" });
    const { host: other } = await integrate({ host: "8443.example.org:8443", scmId: "gitlab" });
    for (const url of [`https://${host}/a/b.git`, `ssh://git@${host}:2222/a.git`, `https://${other}/a`]) {
      expect([url, await admits(url)]).toEqual([url, ["10.1.2.3"]]);
    }
    const metadata = await integrate({ host: "metadata.example.org", scmId: "gitlab" });
    for (const url of [
      ...[`https://x.${host}/a`, `https://${host}:8443/a`, "https://8443.example.org/a", `https://${newHost()}/a`],
      ...[`https://${metadata.host}/a`, "https://10.1.2.3/a"],
    ]) {
      expect([url, await admits(url)]).toEqual([url, BLOCKED_ADDRESS]);
    }
    await configuration().deleteSCMIntegration({ id });
    expect(await admits(`https://${host}/a/b.git`)).toBe(BLOCKED_ADDRESS);
  });

  test("those of other runners count for a runner only where all local ones share them, and its own comes first", async () => {
    const ids = async () => {
      const { configuration: seen } = connectControlPlane(plane.url, () => runner.token);
      return (await seen.listSCMIntegrations({ pagination: { pageSize: 100 } })).integrations.map(({ id }) => id);
    };
    const { runners } = await plane.admin.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL_CONFIGURATION] } });
    const runnerId = runners[0]?.runnerId ?? "";
    const shared = await integrate({ runnerId });
    const other = await connectRunner(plane);
    const foreign = await integrate({ runnerId: other.runner.id });
    await other.runner[Symbol.asyncDispose]();
    const kind = async (to: RunnerKind) => {
      await plane.plane.app.db.write`update runners set kind = ${to} where id = ${runner.id}`;
    };
    await kind(RunnerKind.REMOTE);
    expect(await ids()).not.toContain(shared.id);
    await kind(RunnerKind.LOCAL);
    expect(await ids()).toContain(shared.id);
    expect(await ids()).not.toContain(foreign.id);
    const own = await integrate({ host: shared.host });
    expect(await ids()).toEqual(expect.arrayContaining([own.id]));
    expect(await ids()).not.toContain(shared.id);
  });
});

describe("host authentication tokens", () => {
  test("RUN-30 a hundred scopes are enough, and no answer holds a secret", async () => {
    const scopes = Array.from({ length: 101 }, (_, index) => `s${index}`);
    const host = newHost();
    expect(violatedFields(await refusal(newToken(host, { scopes })))).toEqual(["scopes"]);
    const { token } = await newToken(host.toUpperCase(), { scopes: scopes.slice(1), refreshToken: "canary-refresh" });
    expect(token).toMatchObject({ host, userId: member.id, subject: { id: member.id, principal: Principal.USER } });
    const { tokens } = await member.client.runnerConfiguration.listHostAuthenticationTokens({});
    const bigintsAsText = (_key: string, value: unknown) => (typeof value === "bigint" ? String(value) : value);
    expect(JSON.stringify([token, tokens], bigintsAsText)).not.toContain("canary");
    const [row] = await plane.plane.app.db.point<{ sealed_token: Uint8Array }[]>`
      select sealed_token from host_tokens where id = ${token!.id}`;
    const opened = unseal(plane.plane.app.masterKey, hostTokenContext(token!.id, "token"), row!.sealed_token);
    expect(Buffer.from(opened).toString()).toBe("canary-secret");
  });

  test("RUN-31 people make their own; an admin makes those of service accounts; the runner has to be shared", async () => {
    const other = await plane.addUser();
    const subject = { id: other.id, principal: Principal.USER };
    expect(await codeOf(newToken(newHost(), { subject }))).toBe("PermissionDenied");
    const robot = await addServiceAccount(plane);
    await newToken(newHost(), {}, robot);
    const admin = { ...member, client: plane.admin };
    const robots = { id: robot.id, principal: Principal.SERVICE_ACCOUNT };
    const { token } = await newToken(newHost(), { subject: robots }, admin);
    expect([token?.subject?.id, token?.userId]).toEqual([robot.id, ""]);
    expect(await codeOf(newToken(newHost(), { subject }, admin))).toBe("PermissionDenied");
    const { runner: hidden } = await plane.admin.runners.createRunner({
      name: "hidden",
      provider: RunnerProvider.LINUX_HOST,
    });
    const runnerId = hidden!.runnerId;
    expect(await codeOf(newToken(newHost(), { runnerId }, robot))).toBe("NotFound");
    expect(await codeOf(newToken(newHost(), { runnerId, subject: robots }, admin))).toBe("NotFound");
    await shareRunner(plane, runnerId);
    await newToken(newHost(), { runnerId }, robot);
  });

  test.each([
    ["host", { host: "a b" }],
    ["source", { source: Source.UNSPECIFIED }],
    ["user_id", { userId: uuidv7(), subject: { id: uuidv7(), principal: Principal.USER } }],
    ["subject", { subject: { id: uuidv7(), principal: Principal.RUNNER } }],
    ["expires_at", { expiresAt: timestampFromDate(new Date(0)) }],
    ["token", { token: "two\nlines" }],
  ])("a bad %s is named", async (field, more) => {
    expect(violatedFields(await refusal(newToken(newHost(), more)))).toEqual([field]);
  });

  test("RUN-32 of a new secret neither the end nor a fault is known", async () => {
    const host = newHost();
    const expiresAt = timestampFromDate(new Date(plane.plane.app.now().getTime() + DAY_MS));
    const { token } = await newToken(host, { expiresAt });
    const id = token!.id;
    const { runnerConfiguration } = member.client;
    const { point } = plane.plane.app.db;
    await runnerConfiguration.updateHostAuthenticationToken({ id, scopes: ["repo"] });
    const read = async () => (await runnerConfiguration.getHostAuthenticationToken({ id })).token;
    expect(await read()).toMatchObject({ scopes: ["repo"], expiresAt });
    await plane.plane.app.db.write`update host_tokens set invalid_reason = 'refused' where id = ${id}`;
    await runnerConfiguration.updateHostAuthenticationToken({ id, token: "canary-new", refreshToken: "" });
    expect((await read())?.expiresAt).toBeUndefined();
    const [row] = await point<{ version: number; invalid_reason: string | null }[]>`
      select version, invalid_reason from host_tokens where id = ${id}`;
    expect(row).toEqual({ version: 3, invalid_reason: null });
    expect(await codeOf(plane.admin.runnerConfiguration.updateHostAuthenticationToken({ id, token: "x" }))).toBe(
      "PermissionDenied",
    );
  });

  test("others do not know of it; admins see it and can take it away", async () => {
    const { token } = await newToken(newHost());
    const id = token!.id;
    const other = await plane.addUser();
    expect(await codeOf(other.client.runnerConfiguration.getHostAuthenticationToken({ id }))).toBe("NotFound");
    expect((await other.client.runnerConfiguration.listHostAuthenticationTokens({})).tokens).toEqual([]);
    const filter = { subjectId: member.id, runnerId: runner.id };
    const { tokens } = await configuration().listHostAuthenticationTokens({ filter, pagination: { pageSize: 100 } });
    expect(tokens.map((each) => each.id)).toContain(id);
    await configuration().deleteHostAuthenticationToken({ id });
    expect(await codeOf(configuration().deleteHostAuthenticationToken({ id }))).toBe("NotFound");
  });

  test("all of a runner's go with it", async () => {
    const made = await connectRunner(plane);
    const host = newHost();
    await configuration().createSCMIntegration({ runnerId: made.runner.id, scmId: "git", host, pat: true });
    const { token } = await newToken(host, { runnerId: made.runner.id });
    await plane.admin.runners.deleteRunner({ runnerId: made.runner.id, force: true });
    expect(await tokensOf(host)).toEqual([]);
    expect((await eventsOf(token!.id)).at(-1)).toEqual(["DELETE", member.id]);
    const left = await plane.plane.app.db.point`select from scm_integrations where host = ${host}`;
    expect(left).toHaveLength(0);
    const told = await plane.plane.app.db.point`select from events
      where resource_type = ${ResourceType.RUNNER_SCM_INTEGRATION} and operation = 3 and runner_id = ${made.runner.id}`;
    expect(told).toHaveLength(1);
  });
});

describe("signing in", () => {
  test("RUN-41 without an integration there is nothing to sign in to; with one a token is what counts", async () => {
    const open = await signedIn("github.com");
    expect([open.authenticated, open.scmId, open.supportsPat]).toEqual([true, "github", undefined]);
    const { host } = await integrate({ scmId: "gitlab" });
    const before = await signedIn(host);
    expect(before).toMatchObject({ authenticated: false, scmId: "gitlab", patSupported: true });
    expect(before.supportsPat?.createUrl).toBe(`https://${host}/-/user_settings/personal_access_tokens`);
    expect(before.authenticationUrl).toBe(before.supportsPat?.createUrl);
    await newToken(host);
    expect((await signedIn(host)).authenticated).toBe(true);
    const other = await plane.addUser();
    expect((await signedIn(host, other)).authenticated).toBe(false);
  });

  test("ENV-7 a repository on a host that people sign in to needs the creator's token", async () => {
    const { host } = await integrate();
    const specs = [{ spec: { case: "git" as const, value: { remoteUri: `https://${host}/a/b.git` } } }];
    const make = () =>
      member.client.environments.createEnvironment({
        spec: { machine: { class: classId }, content: { initializer: { specs } } },
      });
    const error = await refusal(make());
    expect(Code[error.code]).toBe("FailedPrecondition");
    const [detail] = error.findDetails(CreateEnvironmentPreconditionFailureDetailsSchema);
    expect(detail?.missingAuthenticationTokensForHosts).toEqual([host]);
    const { token } = await newToken(host, {
      expiresAt: timestampFromDate(new Date(plane.plane.app.now().getTime() + DAY_MS)),
    });
    await make();
    plane.advance(2 * DAY_MS);
    // Over, and nothing to renew it with.
    expect((await signedIn(host)).authenticated).toBe(false);
    await member.client.runnerConfiguration.updateHostAuthenticationToken({ id: token!.id, refreshToken: "r" });
    expect((await signedIn(host)).authenticated).toBe(true);
  });
});

describe("what runners get", () => {
  const git = (host: string) => [{ spec: { case: "git" as const, value: { remoteUri: `https://${host}/a/b.git` } } }];

  const environmentFrom = async (host: string) => {
    const { environment } = await member.client.environments.createEnvironment({
      spec: { machine: { class: classId }, content: { initializer: { specs: git(host) } } },
    });
    return environment!;
  };

  const ask = (environmentId: string, host: string, by: FakeRunner = runner) =>
    by.control.getHostToken({ purpose: { case: "environmentId", value: environmentId }, host });

  test("an environment names the credential that its creator holds, and its runner alone gets it", async () => {
    const { host } = await integrate({ scmId: "gitlab" });
    const { token } = await newToken(host);
    const { id, spec } = await environmentFrom(host);
    expect(spec?.secrets).toMatchObject([
      { name: host, source: "runner", sourceRef: host, mount: { case: "gitCredentialHost", value: host } },
    ]);
    const got = await ask(id, host.toUpperCase());
    expect(got).toMatchObject({
      tokenId: token!.id,
      version: 1n,
      token: "canary-secret",
      source: Source.PAT,
      scmId: "gitlab",
    });
    expect(await codeOf(ask(id, newHost()))).toBe("NotFound");
    const other = await connectRunner(plane);
    expect(await codeOf(ask(id, host, other.runner))).toBe("NotFound");
    await ask(id, host);
    const audit = await plane.plane.app.db.point`select from audit_log
      where subject_id = ${token!.id} and action = 'Host authentication token handed to the runner'`;
    expect(audit).toHaveLength(1);
    await member.client.runnerConfiguration.deleteHostAuthenticationToken({ id: token!.id });
    expect(await codeOf(ask(id, host))).toBe("NotFound");
  });

  test("RUN-33 of many that could renew a token one does, and what has changed since is not overwritten", async () => {
    const host = newHost();
    const expiresAt = timestampFromDate(new Date(plane.plane.app.now().getTime() + 60_000));
    const { token } = await newToken(host, { source: Source.OAUTH, expiresAt, refreshToken: "canary-refresh" });
    const { id } = await environmentFrom(host);
    const answers = await Promise.all(Array.from({ length: 5 }, () => ask(id, host)));
    const [lease] = answers.flatMap(({ refresh }) => refresh ?? []);
    expect(answers.filter(({ refresh }) => refresh)).toHaveLength(1);
    expect(lease?.refreshToken).toBe("canary-refresh");
    const put = (expectedVersion: bigint, outcome: Parameters<FakeRunner["control"]["putHostToken"]>[0]["outcome"]) =>
      runner.control.putHostToken({ tokenId: token!.id, expectedVersion, outcome });
    const renewal = { case: "renewal" as const, value: { token: "canary-renewed" } };
    await put(1n, renewal);
    expect(await codeOf(put(1n, renewal))).toBe("Aborted");
    const after = await ask(id, host);
    expect([after.token, after.version, after.refresh, after.expiresAt]).toEqual([
      "canary-renewed",
      2n,
      undefined,
      undefined,
    ]);
    await put(2n, { case: "invalidReason", value: "revoked" });
    expect(await codeOf(ask(id, host))).toBe("NotFound");
    const other = await connectRunner(plane);
    const foreign = other.runner.control.putHostToken({ tokenId: token!.id, expectedVersion: 3n, outcome: renewal });
    expect(await codeOf(foreign)).toBe("NotFound");
  });
});
