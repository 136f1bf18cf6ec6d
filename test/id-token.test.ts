import { create } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { createLocalJWKSet, decodeJwt, decodeProtectedHeader, type JWTPayload, jwtVerify } from "jose";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Environment, EnvironmentInitializerSchema } from "../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OIDCConfigSchema } from "../gen/gitpod/v1/organization_pb.js";
import type { BerthClient } from "../src/client.ts";
import { type IdTokenSubject, idTokenClaims } from "../src/domain/id-tokens.ts";
import { currentKey, isRetired, nextKeyAt } from "../src/domain/signing-keys.ts";
import { rotateSigningKeys } from "../src/signing.ts";
import { listSigningKeys } from "../src/store/signing-keys.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, connectRunner, mint } from "./harness/tenants.ts";

const ISSUER = "https://berth.example.org/base";
const HOUR_MS = 60 * 60_000;
const DAY_MS = 24 * HOUR_MS;
const REPOSITORY = "https://git.example.org/team/project.git";
const UPSTREAM = "https://git.example.org/upstream/project.git";

let plane: TestPlane;
let member: TestUser;
let robot: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane({ BERTH_PUBLIC_URL: `${ISSUER}/` });
  member = await plane.addUser({ name: "Jo: 100%" });
  robot = await addServiceAccount(plane, "Deployer");
  ({ runner, classId } = await connectRunner(plane));
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await runner?.[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
});

const db = () => plane.plane.app.db;
const nowS = () => plane.plane.app.now().getTime() / 1000;

/** A new environment of the member, and its own token. */
async function newEnvironment(initializer?: Parameters<typeof create<typeof EnvironmentInitializerSchema>>[1]) {
  const content = { initializer: create(EnvironmentInitializerSchema, initializer) };
  const { environment } = await member.client.environments.createEnvironment({
    spec: { machine: { class: classId }, content },
  });
  const { id, spec } = environment as Environment;
  const session = { environmentId: id, machineSession: spec?.machine?.session ?? "" };
  return { id, client: plane.client((await runner.control.createEnvironmentToken(session)).token) };
}

async function publishedKeys() {
  const response = await fetch(`${plane.url}/.well-known/jwks.json`);
  return (await response.json()) as { keys: Record<string, string>[] };
}

/** The claims of a token, once it has been checked as its receiver would. */
async function verified(token: string, audience = "sts.example.org"): Promise<JWTPayload> {
  const keys = createLocalJWKSet((await publishedKeys()) as never);
  const currentDate = plane.plane.app.now();
  const { payload } = await jwtVerify(token, keys, { issuer: ISSUER, audience, algorithms: ["RS256"], currentDate });
  return payload;
}

async function claimsOf(client: BerthClient): Promise<JWTPayload> {
  return verified((await client.identity.getIDToken({ audience: ["sts.example.org"] })).token);
}

type Config = { case: "v2"; value: object } | { case: "v3"; value: { extraSubFields: string[] } };

const setConfig = (version: Config, client = plane.admin) =>
  client.organizations.updateOIDCConfig({
    organizationId: plane.organizationId,
    oidcConfig: create(OIDCConfigSchema, { version } as never),
  });
const v3 = (...extraSubFields: string[]): Config => ({ case: "v3", value: { extraSubFields } });

/** Who `member` is to the identity provider that they sign in with. */
async function signedInWith(claims: object): Promise<{ accountId: string }> {
  const [row] = await db().write<{ account_id: string }[]>`
    insert into account_identities (account_id, issuer, subject, claims, created_at, last_login_at)
    select account_id, 'https://idp.example.org', id::text, ${JSON.stringify(claims)}, now(), now() from users where id = ${member.id}
    on conflict (issuer, subject, coalesce(owner_organization_id, '00000000-0000-0000-0000-000000000000'))
    do update set claims = excluded.claims returning account_id`;
  return { accountId: row?.account_id ?? "" };
}

const accessEntries = async (subjectId: string) =>
  db().point`select action, actor_id, subject_type from audit_log
    where kind = ${AuditLogEntryKind.CREDENTIAL_ACCESS} and subject_id = ${subjectId} and action like 'ID token%'`;

describe("a token", () => {
  test("PLT-13 of an environment verifies against the published keys, for all its audiences, for an hour", async () => {
    const environment = await newEnvironment();
    const projectId = uuidv7();
    await db().write`update environments set project_id = ${projectId} where id = ${environment.id}`;
    const audience = ["sts.example.org", "https://vault.example.org"];
    const { token } = await environment.client.identity.getIDToken({ audience });
    const payload = await verified(token, audience[1]);
    expect(payload).toMatchObject({ aud: audience, iss: ISSUER });
    expect(Number(payload.exp) - Number(payload.iat)).toBe(3600);
    expect(Math.abs(Number(payload.iat) - nowS())).toBeLessThan(60);
    expect(payload.sub).toBe(`organization_id:${plane.organizationId}:project_id:${projectId}`);
    const { keys } = await publishedKeys();
    expect(decodeProtectedHeader(token)).toMatchObject({ alg: "RS256", kid: keys[0]?.kid });
    expect(await accessEntries(environment.id)).toMatchObject([
      { action: "ID token issued", actor_id: environment.id, subject_type: ResourceType.ENVIRONMENT },
    ]);
  });

  test("has an audience list even for one, and an id of its own", async () => {
    const [first, second] = [await claimsOf(member.client), await claimsOf(member.client)];
    expect(first.aud).toEqual(["sts.example.org"]);
    expect(first.jti).toMatch(/^\S{16,}$/);
    expect(second.jti).not.toBe(first.jti);
  });

  test.each([
    ["none", [], "audience"],
    ["too many", Array.from({ length: 17 }, (_, index) => `a${index}`), "audience"],
    ["an empty one", ["a", ""], "audience[1]"],
    ["a long one", ["x".repeat(513)], "audience[0]"],
  ])("is not made for audiences of which there is %s", async (_what, audience, field) => {
    const error = await refusal(member.client.identity.getIDToken({ audience }));
    expect([Code[error.code], ...violatedFields(error)]).toEqual([Code[Code.InvalidArgument], field]);
  });

  test("is made for 16 audiences of 512 characters", async () => {
    const audience = Array.from({ length: 16 }, (_, index) => `${"x".repeat(510)}${index + 10}`);
    const { token } = await member.client.identity.getIDToken({ audience });
    expect((await verified(token, audience[15])).aud).toEqual(audience);
  });

  test("opens nothing here", async () => {
    const { token } = await member.client.identity.getIDToken({ audience: [ISSUER] });
    const call = plane.client(token).identity.getAuthenticatedIdentity({});
    expect(await codeOf(call)).toBe(Code[Code.Unauthenticated]);
  });

  test("PLT-8 is not made for a credential that may only read", async () => {
    const token = await mint(plane, { kind: 1, subjectId: member.id, readOnly: true });
    const call = plane.client(token).identity.getIDToken({ audience: ["a"] });
    expect(await codeOf(call)).toBe(Code[Code.PermissionDenied]);
  });
});

describe("what a token says", () => {
  test("about an environment without a project: where it runs, what it was made from and by whom", async () => {
    const { accountId } = await signedInWith({ groups: ["engineering"], department: "r:d" });
    const initializer = {
      specs: [
        { spec: { case: "git", value: { remoteUri: REPOSITORY, upstreamRemoteUri: UPSTREAM } } },
        { spec: { case: "contextUrl", value: { url: "https://git.example.org/team/other" } } },
      ],
    };
    const environment = await newEnvironment(initializer as never);
    expect(await claimsOf(environment.client)).toMatchObject({
      sub: `organization_id:${plane.organizationId}:environment_id:${environment.id}`,
      environment_id: environment.id,
      organization_id: plane.organizationId,
      runner_id: runner.id,
      creator_principal: "user",
      creator_id: member.id,
      creator_email: `${member.id}@example.org`,
      creator_name: "Jo: 100%",
      creator_idp: "https://idp.example.org",
      creator_idp_claims: { groups: ["engineering"], department: "r:d" },
      environment_initializers: [
        { git: { remote_uri: REPOSITORY, upstream_remote_uri: UPSTREAM } },
        { context_url: "https://git.example.org/team/other" },
      ],
    });
    expect(await claimsOf(member.client)).toMatchObject({
      sub: `organization_id:${plane.organizationId}:user_id:${member.id}`,
      ...{ user_id: member.id, account_id: accountId, organization_id: plane.organizationId },
      ...{ email: `${member.id}@example.org`, name: "Jo: 100%", idp: "https://idp.example.org" },
      idp_claims: { groups: ["engineering"], department: "r:d" },
    });
  });

  test("about a service account, and about a runner", async () => {
    const organization_id = plane.organizationId;
    expect(await claimsOf(robot.client)).toMatchObject({
      sub: `organization_id:${organization_id}:service_account_id:${robot.id}`,
      ...{ service_account_id: robot.id, organization_id, name: "Deployer" },
    });
    expect(await claimsOf(plane.client(runner.token))).toMatchObject({
      sub: `organization_id:${organization_id}:runner_id:${runner.id}`,
      ...{ runner_id: runner.id, runner_name: "test runner", organization_id },
    });
    expect(await accessEntries(robot.id)).toHaveLength(1);
  });

  test("PLT-14 with extra fields: sorted, those without a value skipped, and no value can pass for a field", async () => {
    await signedInWith({ groups: ["engineering"], department: "r:d" });
    const environment = await newEnvironment();
    await setConfig(
      v3("idp_claims.department", "creator_name", "creator_idp_claims.department", "environment_id", "organization_id"),
    );
    const organization = `organization_id:${plane.organizationId}`;
    expect((await claimsOf(environment.client)).sub).toBe(
      `${organization}:environment_id:${environment.id}:creator_idp_claims.department:r%3Ad:creator_name:Jo%3A 100%25`,
    );
    expect((await claimsOf(member.client)).sub).toBe(
      `${organization}:user_id:${member.id}:idp_claims.department:r%3Ad`,
    );
    expect((await claimsOf(robot.client)).sub).toBe(`${organization}:service_account_id:${robot.id}`);
    await setConfig(v3());
  });

  test("in format 2 is a path, and nothing else", async () => {
    await setConfig({ case: "v2", value: {} });
    const environment = await newEnvironment();
    const projectId = uuidv7();
    const organization = `org:${plane.organizationId}`;
    const subOf = async (client: BerthClient) => (await claimsOf(client)).sub;
    expect(await subOf(environment.client)).toBe(`${organization}/env:${environment.id}`);
    await db().write`update environments set project_id = ${projectId} where id = ${environment.id}`;
    expect(await subOf(environment.client)).toBe(`${organization}/prj:${projectId}/env:${environment.id}`);
    expect(await subOf(member.client)).toBe(`${organization}/user:${member.id}`);
    expect(await subOf(robot.client)).toBe(`${organization}/sa:${robot.id}`);
    expect(await subOf(plane.client(runner.token))).toBe(`${organization}/rnr:${runner.id}`);
    const claims = Object.keys(await claimsOf(member.client));
    expect(claims.sort()).toEqual(["aud", "exp", "iat", "iss", "jti", "sub"]);
    await setConfig(v3());
  });

  test("the first initializer can be part of sub; lists and absent values cannot", () => {
    const initializer = create(EnvironmentInitializerSchema, {
      specs: [{ spec: { case: "git", value: { remoteUri: REPOSITORY } } }],
    });
    const subject: IdTokenSubject = {
      ...{ kind: "environment", organizationId: "o", environmentId: "e", projectId: "", runnerId: "r" },
      creator: { id: "c", principal: Principal.SERVICE_ACCOUNT, idpClaims: { "a:b": 1, list: ["x"], "": "y" } },
      ...{ initializer, contextUrl: "https://git.example.org/team/project" },
    };
    const extraSubFields = [
      ...["context_url", "git.remote_uri", "git.upstream_remote_uri"].map((key) => `environment_initializers.${key}`),
      ...[
        "creator_idp_claims.list",
        "creator_idp_claims.absent",
        "creator_idp_claims.a:b",
        "creator_idp_claims.toString",
      ],
      ...["project_id", "creator_principal"],
    ];
    const config = create(OIDCConfigSchema, { version: { case: "v3", value: { extraSubFields } } });
    expect(idTokenClaims(config, subject).sub).toBe(
      [
        "organization_id:o:environment_id:e:creator_idp_claims.a%3Ab:1:creator_principal:service_account",
        "environment_initializers.context_url:https%3A//git.example.org/team/project",
        "environment_initializers.git.remote_uri:https%3A//git.example.org/team/project.git",
      ].join(":"),
    );
  });
});

describe("the format", () => {
  const get = (client: BerthClient, organizationId = plane.organizationId) =>
    client.organizations.getOIDCConfig({ organizationId });

  test("is format 3 without extra fields at first; every member reads it, admins change it", async () => {
    const version = { case: "v3", value: { extraSubFields: [] } };
    expect((await get(member.client)).oidcConfig).toMatchObject({ version });
    expect((await get(robot.client)).oidcConfig).toMatchObject({ version });
    expect(await codeOf(setConfig(v3("email"), member.client))).toBe(Code[Code.PermissionDenied]);
    const changed = await setConfig(v3("email", "creator_email"));
    expect(changed.oidcConfig).toMatchObject({ version: { value: { extraSubFields: ["email", "creator_email"] } } });
    expect((await get(member.client)).oidcConfig).toEqual(changed.oidcConfig);
    await setConfig(v3());
  });

  test("a change is told and put down once, a repetition not at all", async () => {
    const traces = async () =>
      Promise.all([
        db().point`select operation from events where resource_id = ${plane.organizationId}
          and resource_type = ${ResourceType.ORGANIZATION} and operation = ${ResourceOperation.UPDATE}`,
        db()
          .point`select from audit_log where subject_id = ${plane.organizationId} and action = 'Format of ID tokens changed'`,
      ]).then(([events, entries]) => [events.length, entries.length]);
    const [events = 0, entries = 0] = await traces();
    await setConfig(v3("name", "email"));
    await setConfig(v3("email", "name"));
    expect(await traces()).toEqual([events + 1, entries + 1]);
    await setConfig({ case: "v2", value: {} });
    await setConfig({ case: "v2", value: {} });
    expect(await traces()).toEqual([events + 2, entries + 2]);
    await setConfig(v3());
  });

  test.each([
    [{ case: undefined }, "oidc_config.version"],
    [v3("email", "password"), "oidc_config.v3.extra_sub_fields[1]"],
    [v3("environment_initializers"), "oidc_config.v3.extra_sub_fields[0]"],
    [v3("idp_claims"), "oidc_config.v3.extra_sub_fields[0]"],
    [v3("idp_claims."), "oidc_config.v3.extra_sub_fields[0]"],
    [v3("Email"), "oidc_config.v3.extra_sub_fields[0]"],
    [v3(`idp_claims.${"x".repeat(256)}`), "oidc_config.v3.extra_sub_fields[0]"],
  ])("%j is refused and changes nothing", async (version, field) => {
    const before = (await get(member.client)).oidcConfig;
    const error = await refusal(setConfig(version as Config));
    expect([Code[error.code], ...violatedFields(error)]).toEqual([Code[Code.InvalidArgument], field]);
    expect((await get(member.client)).oidcConfig).toEqual(before);
  });

  test("ORG-18 of another organization is NOT_FOUND, to read and to change", async () => {
    const organizationId = await addOrganization(plane);
    const oidcConfig = create(OIDCConfigSchema, { version: { case: "v2", value: {} } });
    expect(await codeOf(get(plane.admin, organizationId))).toBe(Code[Code.NotFound]);
    const change = plane.admin.organizations.updateOIDCConfig({ organizationId, oidcConfig });
    expect(await codeOf(change)).toBe(Code[Code.NotFound]);
  });
});

describe("published", () => {
  test("is where the keys are, for everybody, to be kept for five minutes", async () => {
    const response = await fetch(`${plane.url}/.well-known/openid-configuration`);
    expect(response.headers.get("cache-control")).toBe("public, max-age=300");
    expect(await response.json()).toEqual({
      issuer: ISSUER,
      jwks_uri: `${ISSUER}/.well-known/jwks.json`,
      response_types_supported: ["id_token"],
      subject_types_supported: ["public"],
      id_token_signing_alg_values_supported: ["RS256"],
    });
    const keys = await fetch(`${plane.url}/.well-known/jwks.json`);
    expect(keys.headers.get("cache-control")).toBe("public, max-age=300");
    const post = await fetch(`${plane.url}/.well-known/jwks.json`, { method: "POST", body: "x" });
    expect(post.status).toBe(405);
  });

  test("are public halves alone; the private ones lie sealed in the database", async () => {
    const { keys } = await publishedKeys();
    expect(keys).toHaveLength(1);
    expect(Object.keys(keys[0] ?? {}).sort()).toEqual(["alg", "e", "kid", "kty", "n", "use"]);
    expect(Buffer.from(keys[0]?.n ?? "", "base64url")).toHaveLength(256);
    const rows = await listSigningKeys(db().point);
    const stored = rows.map((row) => Buffer.from(row.sealedPrivateKey).toString("latin1") + row.publicJwk).join();
    expect(stored).toContain(keys[0]?.kid);
    expect(stored).not.toContain("PRIVATE KEY");
    expect(stored).not.toMatch(/"[dpq]":/);
  });
});

describe("rotation", () => {
  const at = (days: number) => new Date(days * DAY_MS);
  const key = (days: number) => ({ activeAt: at(days) });

  test("a key comes into use a day after it was made, and signs for 90 days or until the next one", () => {
    expect(nextKeyAt([], at(7))).toEqual(at(7));
    expect(nextKeyAt([key(0)], at(88.9))).toBeUndefined();
    expect(nextKeyAt([key(0)], at(89))).toEqual(at(90));
    expect(nextKeyAt([key(0), key(90)], at(89))).toBeUndefined();
    // Nobody was there when it was time.
    expect(nextKeyAt([key(0)], at(300))).toEqual(at(301));
    const keys = [key(0), key(90)];
    expect([0, 89.99, 90, 300].map((day) => keys.indexOf(currentKey(keys, at(day))!))).toEqual([0, 0, 1, 1]);
    expect(currentKey(keys, at(-1))).toBeUndefined();
    expect([89, 90, 90.99, 91].map((day) => isRetired(keys, 0, at(day)))).toEqual([false, false, false, true]);
    expect(isRetired(keys, 1, at(1000))).toBe(false);
  });

  // Last, because it moves the clock of the whole file.
  test("replicas make one key between them; tokens of the old one stay valid until they end", async () => {
    const replica = await plane.replica();
    const everywhere = () => Promise.all([rotateSigningKeys(plane.plane.app), rotateSigningKeys(replica.app)]);
    const kidOf = (token: string) => decodeProtectedHeader(token).kid;
    const newToken = async () => (await member.client.identity.getIDToken({ audience: ["sts.example.org"] })).token;
    const published = async () => (await publishedKeys()).keys.map(({ kid }) => kid);
    await db().write`update tokens set expires_at = null`;
    const [first] = await published();

    plane.advance(89 * DAY_MS + HOUR_MS);
    await everywhere();
    const keys = await published();
    expect(keys).toEqual([first, expect.any(String)]);
    expect(kidOf(await newToken())).toBe(first);

    plane.advance(DAY_MS - 2 * HOUR_MS);
    await everywhere();
    const last = await newToken();
    expect(kidOf(last)).toBe(first);
    plane.advance(2 * HOUR_MS);
    expect(kidOf(await newToken())).toBe(keys[1]);
    await expect(verified(last)).rejects.toMatchObject({ code: "ERR_JWT_EXPIRED" });
    expect(decodeJwt(last).sub).toContain(member.id);
    expect(await published()).toEqual(keys);

    plane.advance(DAY_MS);
    await everywhere();
    expect(await published()).toEqual([keys[1]]);
    expect((await listSigningKeys(db().point)).map(({ id }) => id)).toEqual([keys[1]]);
    await verified(await newToken());
  });
});
