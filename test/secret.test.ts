import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import type { Environment } from "../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { SecurityAgentPolicySchema } from "../gen/gitpod/v1/organization_pb.js";
import type { CreateSecretRequestSchema, Secret, SecretScope } from "../gen/gitpod/v1/secret_pb.js";
import type { BerthClient } from "../src/client.ts";
import { SYSTEM } from "../src/domain/principal.ts";
import { Scope } from "../src/domain/secret.ts";
import { deleteSecretsOf } from "../src/store/secrets.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import {
  addOrganization,
  addProject,
  addServiceAccount,
  changePolicies,
  connectRunner,
  share,
} from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

let plane: TestPlane;
let member: TestUser;
let other: TestUser;
let foreigner: TestUser;
let robot: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane({}, { secrets: 20 });
  await liftQuotas(plane);
  ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 10_000 }));
  [member, other] = [await plane.addUser({ name: "Member" }), await plane.addUser({ name: "Other" })];
  foreigner = await plane.addUser({ organizationId: await addOrganization(plane) });
  robot = await addServiceAccount(plane);
});

afterAll(async () => {
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
  expect(logged).not.toContain("failed and will be tried again");
});

type Request = Exclude<MessageInitShape<typeof CreateSecretRequestSchema>, { $typeName: string }>;
type ScopeInit = { scope: Exclude<SecretScope["scope"], { case: undefined }> };

const ofUser = (value: string): ScopeInit => ({ scope: { case: "userId", value } });
const ofAccount = (value: string): ScopeInit => ({ scope: { case: "serviceAccountId", value } });
const ofOrganization = (value = plane.organizationId): ScopeInit => ({ scope: { case: "organizationId", value } });
const variable = { case: "environmentVariable", value: true } as const;

let made = 0;
const newName = () => `SECRET_${++made}`;

async function make(client: BerthClient, scope: ScopeInit, more: Request = {}): Promise<Secret> {
  const request = { name: newName(), value: "value", mount: variable, scope, ...more };
  const { secret } = await client.secrets.createSecret(request);
  if (!secret) throw new Error("an answer without a secret");
  return secret;
}

const attempt = (client: BerthClient, scope: ScopeInit, more: Request = {}) => codeOf(make(client, scope, more));

async function names(client: BerthClient, scope?: ScopeInit): Promise<string[]> {
  const { secrets } = await client.secrets.listSecrets({ filter: { scope }, pagination: { pageSize: 100 } });
  return secrets.map((secret) => secret.name);
}

/** What a secret has left in the outbox and in the audit log, oldest first. */
async function traces(id: string) {
  const { point } = plane.plane.app.db;
  const events = await point<{ resource_type: number; operation: number }[]>`
    select resource_type, operation from events where resource_id = ${id} order by seq`;
  const audit = await point<{ action: string; kind: number; actor_id: string; actor_principal: number }[]>`
    select action, kind, actor_id, actor_principal from audit_log where subject_id = ${id} order by id`;
  return {
    events: events.map((each) => `${ResourceType[each.resource_type]} ${ResourceOperation[each.operation]}`),
    audit,
  };
}

async function newEnvironment(
  client: BerthClient,
): Promise<{ environment: Environment; token: string; inside: BerthClient }> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  if (!environment) throw new Error("an answer without an environment");
  const machineSession = environment.spec?.machine?.session ?? "";
  const { token } = await runner.control.createEnvironmentToken({ environmentId: environment.id, machineSession });
  return { environment, token, inside: plane.client(token) };
}

describe("the life of a secret", () => {
  test("what is stored is answered, never the value; each change leaves an event and an audit entry", async () => {
    const proxy = { targetHosts: ["*.example.org"], header: "X-Token", format: 2 };
    const secret = await make(plane.admin, ofOrganization(plane.organizationId.toUpperCase()), {
      ...{ name: "API_KEY", credentialProxy: proxy, source: { value: { case: "verbatim", value: true } } },
    });
    const { subject } = await plane.admin.identity.getAuthenticatedIdentity({});
    expect(secret).toMatchObject({
      ...{ name: "API_KEY", projectId: "", creator: subject, mount: variable, credentialProxy: proxy },
      ...{ scope: ofOrganization(), source: { value: { case: "verbatim", value: true } } },
    });
    expect(secret.createdAt).toEqual(secret.updatedAt);
    plane.advance(1000);
    await plane.admin.secrets.updateSecretValue({ secretId: secret.id, value: "another" });
    const [listed] = (await plane.admin.secrets.listSecrets({ filter: { scope: ofOrganization() } })).secrets;
    expect(listed).toEqual({ ...secret, updatedAt: listed?.updatedAt });
    expect(listed?.updatedAt?.seconds).toBeGreaterThan(secret.updatedAt?.seconds ?? 0n);
    await plane.admin.secrets.updateSecretValue({ secretId: secret.id, value: "another" });
    await plane.admin.secrets.deleteSecret({ secretId: secret.id });
    expect(await codeOf(plane.admin.secrets.deleteSecret({ secretId: secret.id }))).toBe("NotFound");
    const { events, audit } = await traces(secret.id);
    const type = "ORGANIZATION_SECRET";
    expect(events).toEqual([`${type} CREATE`, `${type} UPDATE`, `${type} UPDATE`, `${type} DELETE`]);
    expect(audit.map((each) => each.action)).toEqual([
      ...["Secret created", "Secret value changed", "Secret value changed", "Secret deleted"],
    ]);
    expect(new Set(audit.map((each) => each.kind))).toEqual(new Set([AuditLogEntryKind.RESOURCE_CHANGE]));
  });

  test("a name is free once per scope, and in every other scope", async () => {
    const name = newName();
    await make(plane.admin, ofOrganization(), { name });
    const { subject } = await plane.admin.identity.getAuthenticatedIdentity({});
    await make(plane.admin, ofUser(subject?.id ?? ""), { name });
    await make(member.client, ofUser(member.id), { name });
    await make(plane.admin, ofOrganization(), { name: name.toLowerCase() });
    expect(await attempt(plane.admin, ofOrganization(), { name })).toBe("AlreadyExists");
    const both = await Promise.allSettled(
      ["A", "B"].map((value) => make(member.client, ofUser(member.id), { name: `${name}_2`, value })),
    );
    expect(both.map(({ status }) => status).sort()).toEqual(["fulfilled", "rejected"]);
  });

  test("PLT-39 a refusal names the field", async () => {
    const fields = async (more: Request) => violatedFields(await refusal(make(plane.admin, ofOrganization(), more)));
    const reserved = await refusal(make(plane.admin, ofOrganization(), { name: "path" }));
    expect(violatedFields(reserved)).toEqual(["name"]);
    expect(reserved.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "SECRET_NAME_RESERVED" }]);
    expect(await fields({ name: "PATH" })).toEqual(["name"]);
    expect(await fields({ name: "1ABC" })).toEqual(["name"]);
    expect(await fields({ name: "A B" })).toEqual(["name"]);
    expect(await fields({ value: "x".repeat(10_241) })).toEqual(["value"]);
    expect(await fields({ value: "" })).toEqual(["value"]);
    expect(await fields({ scope: undefined as never })).toEqual(["scope"]);
    expect(await fields({ mount: { case: undefined } })).toEqual(["mount"]);
    expect(await fields({ mount: { case: "filePath", value: "relative" } })).toEqual(["file_path"]);
    expect((await make(plane.admin, ofOrganization(), { value: "\u{1f511}".repeat(10_240) })).name).toMatch(/^SECRET_/);
    const two = { name: "TWO_MOUNTS", value: "v", scope: { organizationId: plane.organizationId }, apiOnly: true };
    const answer = await fetch(`${plane.url}/gitpod.v1.SecretService/CreateSecret`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${plane.adminToken}` },
      body: JSON.stringify({ ...two, environmentVariable: true }),
    });
    expect([answer.status, ((await answer.json()) as { code: string }).code]).toEqual([400, "invalid_argument"]);
  });

  test("a new value follows the rules of the mount; one that is kept elsewhere cannot be given", async () => {
    const login = await make(plane.admin, ofOrganization(), {
      ...{ mount: { case: "containerRegistryBasicAuthHost", value: "r.example.org" }, value: "user:password" },
    });
    const error = await refusal(plane.admin.secrets.updateSecretValue({ secretId: login.id, value: "password" }));
    expect([error.code, violatedFields(error)]).toEqual([3, ["value"]]);
    const jfrog = { host: "j.example.org", providerName: "p" };
    const elsewhere = await make(plane.admin, ofOrganization(), {
      ...{ value: "", source: { value: { case: "oidcJfrog", value: jfrog } } },
    });
    expect(elsewhere.source?.value.value).toMatchObject(jfrog);
    expect(await codeOf(plane.admin.secrets.updateSecretValue({ secretId: elsewhere.id, value: "x" }))).toBe(
      "FailedPrecondition",
    );
  });

  test("a scope holds so many and no more, also when they come at once", async () => {
    const hoarder = await plane.addUser();
    const wanted = Array.from({ length: 24 }, () => make(hoarder.client, ofUser(hoarder.id)));
    const results = await Promise.allSettled(wanted);
    expect(results.filter(({ status }) => status === "fulfilled")).toHaveLength(20);
    const error = await refusal(make(hoarder.client, ofUser(hoarder.id)));
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "PLATFORM_LIMIT_QUOTA" }]);
    expect(error.metadata.get("x-should-retry")).toBe("false");
    expect(await names(hoarder.client, ofUser(hoarder.id))).toHaveLength(20);
  });

  test("one that a policy names stays until the policy has changed", async () => {
    const byId = await make(plane.admin, ofOrganization());
    const byName = await make(plane.admin, ofOrganization());
    const mine = await make(member.client, ofUser(member.id), { name: byName.name });
    const securityAgentPolicy = create(SecurityAgentPolicySchema, {
      crowdstrike: { enabled: true, image: "falcon", cidSecretId: byId.id },
      customAgents: [{ name: "x", startCommand: "x", envMappings: [{ name: "X", secretName: byName.name }] }],
    });
    await changePolicies(plane, { securityAgentPolicy });
    for (const { id } of [byId, byName]) {
      const error = await refusal(plane.admin.secrets.deleteSecret({ secretId: id }));
      expect(error.code).toBe(9);
      const details = { errorCode: "SECRET_STATE_IN_USE", metadata: { secret_id: id } };
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([details]);
    }
    await member.client.secrets.deleteSecret({ secretId: mine.id });
    await changePolicies(plane, { securityAgentPolicy: undefined });
    for (const { id } of [byId, byName]) await plane.admin.secrets.deleteSecret({ secretId: id });
  });
});

describe("who may do what", () => {
  test("secrets of the organization: members read, admins write, others see nothing", async () => {
    const secret = await make(plane.admin, ofOrganization());
    const value = { secretId: secret.id, value: "x" };
    for (const { client } of [member, robot]) {
      expect(await names(client, ofOrganization())).toContain(secret.name);
      expect(await attempt(client, ofOrganization())).toBe("PermissionDenied");
      expect(await codeOf(client.secrets.updateSecretValue(value))).toBe("PermissionDenied");
      expect(await codeOf(client.secrets.deleteSecret({ secretId: secret.id }))).toBe("PermissionDenied");
    }
    expect(await codeOf(names(foreigner.client, ofOrganization()))).toBe("NotFound");
    expect(await attempt(foreigner.client, ofOrganization())).toBe("NotFound");
    expect(await codeOf(foreigner.client.secrets.updateSecretValue(value))).toBe("NotFound");
    expect(await codeOf(foreigner.client.secrets.deleteSecret({ secretId: secret.id }))).toBe("NotFound");
    const reader = await plane.addUser({ readOnlyToken: true });
    expect(await names(reader.client, ofOrganization())).toContain(secret.name);
    expect(await attempt(reader.client, ofUser(reader.id))).toBe("PermissionDenied");
  });

  test("PLT-19 secrets of a user are the user's alone, the admin's eyes included", async () => {
    const secret = await make(member.client, ofUser(member.id));
    expect(await names(member.client, ofUser(member.id))).toContain(secret.name);
    for (const client of [plane.admin, other.client, robot.client]) {
      expect(await attempt(client, ofUser(member.id))).toBe("PermissionDenied");
      expect(await codeOf(names(client, ofUser(member.id)))).toBe("PermissionDenied");
    }
    expect(await attempt(foreigner.client, ofUser(member.id))).toBe("NotFound");
    for (const client of [plane.admin, other.client, robot.client, foreigner.client]) {
      expect(await names(client)).not.toContain(secret.name);
      expect(await codeOf(client.secrets.updateSecretValue({ secretId: secret.id, value: "x" }))).toBe("NotFound");
      expect(await codeOf(client.secrets.deleteSecret({ secretId: secret.id }))).toBe("NotFound");
      expect(await codeOf(client.secrets.getSecretValue({ secretId: secret.id }))).toBe("NotFound");
    }
    expect(await attempt(plane.admin, ofUser(uuidv7()))).toBe("NotFound");
  });

  test("secrets of a service account are its own, its admins' and the organization admins'", async () => {
    const secret = await make(plane.admin, ofAccount(robot.id));
    const own = await make(robot.client, ofAccount(robot.id));
    expect(await attempt(member.client, ofAccount(robot.id))).toBe("PermissionDenied");
    expect(await codeOf(names(member.client, ofAccount(robot.id)))).toBe("PermissionDenied");
    expect(await codeOf(member.client.secrets.deleteSecret({ secretId: secret.id }))).toBe("NotFound");
    expect(await attempt(foreigner.client, ofAccount(robot.id))).toBe("NotFound");
    const role = ResourceRole.SERVICE_ACCOUNT_ADMIN;
    const unshare = await share(plane, member.id, { type: ResourceType.SERVICE_ACCOUNT, id: robot.id, role });
    const third = await make(member.client, ofAccount(robot.id));
    expect(await names(member.client, ofAccount(robot.id))).toEqual([third.name, own.name, secret.name]);
    expect(await names(member.client)).toEqual(expect.arrayContaining([third.name, own.name]));
    await member.client.secrets.updateSecretValue({ secretId: own.id, value: "x" });
    await member.client.secrets.deleteSecret({ secretId: third.id });
    await unshare();
    expect(await names(member.client)).not.toContain(own.name);
    await plane.plane.app.db.write`update service_accounts set suspended = true where id = ${robot.id}`;
    expect(await attempt(plane.admin, ofAccount(robot.id))).toBe("FailedPrecondition");
    await plane.plane.app.db.write`update service_accounts set suspended = false where id = ${robot.id}`;
  });

  test("secrets of a project: who may use it reads, who may edit it writes, nobody else sees them", async () => {
    const maker = await plane.addUser();
    const projectId = await addProject(maker.client, "With secrets");
    const scope: ScopeInit = { scope: { case: "projectId", value: projectId } };
    const secret = await make(maker.client, scope);
    expect(secret).toMatchObject({ projectId, scope });
    const older = await maker.client.secrets.createSecret({ name: newName(), value: "x", mount: variable, projectId });
    expect(older.secret).toMatchObject({ projectId, scope });
    const value = { secretId: secret.id, value: "x" };
    const isHidden = async (client: BerthClient) => {
      expect(await attempt(client, scope)).toBe("NotFound");
      expect(await codeOf(names(client, scope))).toBe("NotFound");
      expect(await names(client)).not.toContain(secret.name);
      expect(await codeOf(client.secrets.updateSecretValue(value))).toBe("NotFound");
      expect(await codeOf(client.secrets.deleteSecret({ secretId: secret.id }))).toBe("NotFound");
    };
    await isHidden(other.client);
    await isHidden(foreigner.client);
    const stream = await watchEvents(other.client);
    const user = { type: ResourceType.PROJECT, id: projectId, role: ResourceRole.PROJECT_USER };
    const unshare = await share(plane, other.id, user);
    expect(await names(other.client, scope)).toEqual([older.secret?.name, secret.name]);
    expect(await names(other.client)).toContain(secret.name);
    expect(await attempt(other.client, scope)).toBe("PermissionDenied");
    expect(await codeOf(other.client.secrets.updateSecretValue(value))).toBe("PermissionDenied");
    expect(await codeOf(other.client.secrets.deleteSecret({ secretId: secret.id }))).toBe("PermissionDenied");
    await unshare();
    await share(plane, other.id, { ...user, role: ResourceRole.PROJECT_EDITOR });
    const third = await make(other.client, scope);
    await other.client.secrets.updateSecretValue(value);
    await other.client.secrets.deleteSecret({ secretId: third.id });
    for (const operation of [ResourceOperation.UPDATE, ResourceOperation.DELETE]) {
      const id = operation === ResourceOperation.UPDATE ? secret.id : third.id;
      await stream.next(eventText(ResourceType.SECRET, operation, id));
    }
    stream.stop();
    expect(await names(plane.admin, scope)).toEqual([older.secret?.name, secret.name]);

    const { db } = plane.plane.app;
    // Nobody finishes the deletion meanwhile.
    await db.begin(async (tx) => {
      await tx`select from projects where id = ${projectId} for key share`;
      await db.write`update projects set deleting_at = now() where id = ${projectId}`;
      for (const refused of [
        () => make(maker.client, scope),
        () => maker.client.secrets.updateSecretValue(value),
        () => maker.client.secrets.deleteSecret({ secretId: secret.id }),
      ]) {
        const error = await refusal(refused());
        const [details] = error.findDetails(ActionableErrorDetailsSchema);
        expect([error.code, details?.errorCode]).toEqual([9, "PROJECT_STATE_DELETING"]);
      }
      await db.write`update projects set deleting_at = null where id = ${projectId}`;
    });
    await maker.client.projects.deleteProject({ projectId });
    const isGone = async () => (await traces(secret.id)).events.at(-1) === "SECRET DELETE";
    await eventually(isGone, "the secrets go with their project");
    expect(await attempt(plane.admin, { scope: { case: "projectId", value: uuidv7() } })).toBe("NotFound");
  });

  test("lists are newest first and page by page, over all owners or one", async () => {
    const person = await plane.addUser();
    const own: string[] = [];
    for (let index = 0; index < 5; index++) own.unshift((await make(person.client, ofUser(person.id))).name);
    const shared = (await make(plane.admin, ofOrganization())).name;
    const all = await names(person.client);
    expect(all.slice(0, 6)).toEqual([shared, ...own]);
    const paged: string[] = [];
    for (let token = ""; ; ) {
      const pagination = { pageSize: 2, token };
      const answer = await person.client.secrets.listSecrets({ pagination });
      paged.push(...answer.secrets.map((secret) => secret.name));
      token = answer.pagination?.nextToken ?? "";
      if (!token) break;
      expect(await codeOf(other.client.secrets.listSecrets({ pagination: { pageSize: 2, token } }))).toBe(
        "InvalidArgument",
      );
    }
    expect(paged).toEqual(all);
    const ignored = await person.client.secrets.listSecrets({
      ...{ filter: { scope: ofUser(person.id), projectIds: [uuidv7()] }, pagination: { pageSize: 100 } },
    });
    expect(ignored.secrets.map((secret) => secret.name)).toEqual(own);
    const tooMany = person.client.secrets.listSecrets({ pagination: { pageSize: 101 } });
    expect(await codeOf(tooMany)).toBe("InvalidArgument");
  });

  test("events of a secret reach those who may read it", async () => {
    const streams = {
      admin: await watchEvents(plane.admin),
      member: await watchEvents(member.client),
      other: await watchEvents(other.client),
      robot: await watchEvents(robot.client),
    };
    const personal = await make(member.client, ofUser(member.id));
    const account = await make(plane.admin, ofAccount(robot.id));
    await plane.admin.secrets.deleteSecret({ secretId: account.id });
    await member.client.secrets.deleteSecret({ secretId: personal.id });
    const shared = await make(plane.admin, ofOrganization());
    await plane.admin.secrets.deleteSecret({ secretId: shared.id });
    const last = eventText(ResourceType.ORGANIZATION_SECRET, ResourceOperation.DELETE, shared.id);
    for (const stream of Object.values(streams)) await stream.next(last);
    const seen = (name: keyof typeof streams, { id }: Secret) =>
      streams[name].events.filter((text) => text.endsWith(id)).map((text) => text.split(" ").slice(0, 2).join(" "));
    expect(seen("member", personal)).toContain("USER_SECRET DELETE");
    expect(seen("robot", account)).toContain("SERVICE_ACCOUNT_SECRET DELETE");
    expect(seen("admin", account)).toContain("SERVICE_ACCOUNT_SECRET DELETE");
    for (const name of ["admin", "other", "robot"] as const) expect(seen(name, personal)).toEqual([]);
    for (const name of ["member", "other"] as const) expect(seen(name, account)).toEqual([]);
    for (const stream of Object.values(streams)) stream.stop();
  });
});

describe("values", () => {
  test("PLT-37 the environment that has the secret reads it, nobody else; the first read is put down", async () => {
    const secret = await make(member.client, ofUser(member.id), { value: "first" });
    const own = await newEnvironment(member.client);
    const foreign = await newEnvironment(other.client);
    const read = (client: BerthClient) => client.secrets.getSecretValue({ secretId: secret.id });
    expect(await codeOf(read(plane.admin))).toBe("NotFound");
    expect(await codeOf(read(member.client))).toBe("PermissionDenied");
    expect(await codeOf(read(foreign.inside))).toBe("NotFound");
    expect(await codeOf(read(plane.client(runner.token)))).toBe("PermissionDenied");
    expect((await traces(secret.id)).audit).toHaveLength(1);
    const reads = await Promise.all([read(own.inside), read(own.inside), read(own.inside)]);
    expect(reads.map(({ value }) => value)).toEqual(["first", "first", "first"]);
    const accesses = async () =>
      (await traces(secret.id)).audit.filter(({ kind }) => kind === AuditLogEntryKind.CREDENTIAL_ACCESS);
    expect(await accesses()).toEqual([
      {
        ...{ action: "Secret value read", kind: AuditLogEntryKind.CREDENTIAL_ACCESS },
        ...{ actor_id: own.environment.id, actor_principal: Principal.ENVIRONMENT },
      },
    ]);
    await member.client.secrets.updateSecretValue({ secretId: secret.id, value: "second" });
    expect((await read(own.inside)).value).toBe("second");
    await read(own.inside);
    expect(await accesses()).toHaveLength(2);

    const shared = await make(plane.admin, ofOrganization());
    for (const client of [plane.admin, member.client, robot.client])
      expect(await codeOf(client.secrets.getSecretValue({ secretId: shared.id }))).toBe("PermissionDenied");
    expect(await codeOf(foreigner.client.secrets.getSecretValue({ secretId: shared.id }))).toBe("NotFound");
  });

  test("PLT-37 an answer is never kept, whichever way it was asked for", async () => {
    const secret = await make(member.client, ofUser(member.id));
    const { token } = await newEnvironment(member.client);
    const headers = { authorization: `Bearer ${token}` };
    const url = `${plane.url}/gitpod.v1.SecretService/GetSecretValue`;
    const message = encodeURIComponent(JSON.stringify({ secretId: secret.id.toUpperCase() }));
    const got = await fetch(`${url}?connect=v1&encoding=json&message=${message}`, { headers });
    const posted = await fetch(url, {
      ...{ method: "POST", headers: { ...headers, "content-type": "application/json" } },
      body: JSON.stringify({ secretId: secret.id }),
    });
    for (const answer of [got, posted]) {
      expect(answer.headers.get("cache-control")).toBe("no-store");
      expect(await answer.json()).toEqual({ value: "value" });
    }
    const refused = await fetch(`${url}?connect=v1&encoding=json&message=${message}`, {
      headers: { authorization: `Bearer ${member.token}` },
    });
    expect([refused.status, refused.headers.get("cache-control")]).toEqual([403, "no-store"]);
  });

  test("PLT-38 a value for a proxy does not enter the environment; ListSecrets tells the format", async () => {
    const credentialProxy = { targetHosts: ["api.example.org"], header: "X-Token", format: 2 };
    const secret = await make(member.client, ofUser(member.id), { credentialProxy });
    const { inside, environment } = await newEnvironment(member.client);
    const entry = environment.spec?.secrets.find(({ sourceRef }) => sourceRef === secret.id);
    expect(entry?.credentialProxy).toMatchObject(credentialProxy);
    expect(await codeOf(inside.secrets.getSecretValue({ secretId: secret.id }))).toBe("PermissionDenied");
    const listed = (await member.client.secrets.listSecrets({ filter: { scope: ofUser(member.id) } })).secrets;
    expect(listed.find(({ id }) => id === secret.id)?.credentialProxy).toMatchObject(credentialProxy);
  });

  test("PLT-38 RUN-49 the runner of the environment gets values, those for a proxy with all that the proxy needs", async () => {
    const credentialProxy = { targetHosts: ["api.example.org"], header: "X-Token", format: 2 };
    const jfrog = { case: "oidcJfrog" as const, value: { host: "j.example.org", providerName: "p" } };
    const person = await plane.addUser();
    const plain = await make(person.client, ofUser(person.id), { value: "plain" });
    const proxied = await make(person.client, ofUser(person.id), { value: "cHJveGllZA==", credentialProxy });
    const elsewhere = await make(person.client, ofUser(person.id), { value: "", source: { value: jfrog } });
    const { environment } = await newEnvironment(person.client);
    const stranger = await make(member.client, ofUser(member.id));
    const ask = (ids: string[], environmentId = environment.id, by = runner) =>
      by.control.getEnvironmentSecrets({ environmentId, secretIds: ids });
    const { secrets } = await ask([plain.id, proxied.id.toUpperCase(), elsewhere.id, plain.id]);
    const found = new Map(secrets.map((secret) => [secret.id, secret]));
    expect(secrets).toHaveLength(3);
    expect(found.get(plain.id)?.value).toBe("plain");
    expect(found.get(plain.id)?.credentialProxy).toBeUndefined();
    expect(found.get(proxied.id)).toMatchObject({ value: "cHJveGllZA==", credentialProxy });
    expect(found.get(elsewhere.id)).toMatchObject({ value: "", sourceDetails: { value: jfrog } });
    const sessions = new Map(environment.spec?.secrets.map(({ sourceRef, session }) => [sourceRef, session]));
    for (const { id, version } of secrets) expect(version).toBe(sessions.get(id));

    expect(await codeOf(ask([plain.id, stranger.id]))).toBe("NotFound");
    expect(await codeOf(ask([]))).toBe("InvalidArgument");
    expect(await codeOf(ask(Array(101).fill(plain.id)))).toBe("InvalidArgument");
    const hidden = await connectRunner(plane, { shared: false });
    expect(await codeOf(ask([plain.id], environment.id, hidden.runner))).toBe("NotFound");
    const accesses = async (id: string) =>
      (await traces(id)).audit.filter(({ kind }) => kind === AuditLogEntryKind.CREDENTIAL_ACCESS);
    await ask([plain.id]);
    expect(await accesses(plain.id)).toMatchObject([{ actor_id: runner.id, actor_principal: Principal.RUNNER }]);
    expect(await accesses(elsewhere.id)).toEqual([]);
    await person.client.secrets.updateSecretValue({ secretId: plain.id, value: "newer" });
    expect((await ask([plain.id])).secrets).toMatchObject([{ value: "newer" }]);
    expect(await accesses(plain.id)).toHaveLength(2);

    // Deleted, and the environment has not been told yet.
    await plane.plane.app.db.write`delete from secrets where id = ${elsewhere.id}`;
    expect((await ask([plain.id, elsewhere.id])).secrets).toMatchObject([{ id: plain.id }]);
    await person.client.environments.stopEnvironment({ environmentId: environment.id });
    expect(await codeOf(ask([plain.id]))).toBe("FailedPrecondition");
  });

  test("no value is readable in the database, in the log or in an error", async () => {
    const canary = `canary-${uuidv7()}`;
    const secret = await make(member.client, ofUser(member.id), { value: canary });
    await member.client.secrets.updateSecretValue({ secretId: secret.id, value: `${canary}-2` });
    const mount = { case: "containerRegistryBasicAuthHost", value: "r.example.org" } as const;
    expect((await refusal(make(member.client, ofUser(member.id), { value: canary, mount }))).message).not.toContain(
      canary,
    );
    const { write } = plane.plane.app.db;
    for (const table of ["secrets", "events", "audit_log", "environments"]) {
      const rows = await write<{ row: string }[]>`select to_jsonb(t)::text as row from ${write(table)} t`;
      const hex = Buffer.from(canary).toString("hex");
      expect(rows.some(({ row }) => row.includes(canary) || row.includes(hex))).toBe(false);
    }
    expect(plane.logged()).not.toContain(canary);
  });
});

test("secrets go with their owner, each with an event and an audit entry", async () => {
  const leaver = await plane.addUser();
  const secrets = [await make(leaver.client, ofUser(leaver.id)), await make(leaver.client, ofUser(leaver.id))];
  const { environment } = await newEnvironment(leaver.client);
  const { app } = plane.plane;
  const by = { organizationId: plane.organizationId, actor: SYSTEM, newId: app.newId, at: app.now() };
  const owner = { scope: Scope.USER, id: leaver.id };
  expect(await app.db.begin((tx) => deleteSecretsOf(tx, owner, by))).toBe(2);
  expect(await names(leaver.client, ofUser(leaver.id))).toEqual([]);
  for (const { id } of secrets) {
    const { events, audit } = await traces(id);
    expect([events.at(-1), audit.at(-1)?.action]).toEqual(["USER_SECRET DELETE", "Secret deleted with its owner"]);
  }
  await eventually(async () => {
    const found = await leaver.client.environments.getEnvironment({ environmentId: environment.id });
    return !found.environment?.spec?.secrets.some(({ sourceRef }) => secrets.some(({ id }) => id === sourceRef));
  }, "the environment loses them");
});
