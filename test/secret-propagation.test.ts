import { create } from "@bufbuild/protobuf";
import { afterAll, beforeAll, expect, test } from "vitest";
import {
  type Environment,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentSpecSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
  EnvironmentSpec_Secret_Scope as SpecScope,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import type { BerthClient } from "../src/client.ts";
import { claimSecretChange, environmentSecrets } from "../src/store/secret-delivery.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { addProject, addServiceAccount, connectRunner } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const CHANGED = "Secrets of the environment changed";
const LEASE_MS = 30_000;

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await plane.replica();
  await liftQuotas(plane);
  ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 10_000 }));
  member = await plane.addUser();
});

afterAll(async () => {
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
});

const ofUser = (value: string) => ({ scope: { case: "userId" as const, value } });
const ofOrganization = () => ({ scope: { case: "organizationId" as const, value: plane.organizationId } });
const variable = { case: "environmentVariable", value: true } as const;
const file = (value: string) => ({ case: "filePath", value }) as const;

type Scope = ReturnType<typeof ofUser> | ReturnType<typeof ofOrganization>;

async function make(
  client: BerthClient,
  scope: Scope,
  name: string,
  mount: typeof variable | ReturnType<typeof file> = variable,
) {
  const { secret } = await client.secrets.createSecret({ name, value: "value", mount, scope });
  return secret?.id ?? "";
}

async function read(client: BerthClient, environmentId: string): Promise<Environment> {
  const { environment } = await client.environments.getEnvironment({ environmentId });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

async function newEnvironment(client: BerthClient): Promise<Environment> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

async function running(client: BerthClient): Promise<Environment> {
  const { id } = await newEnvironment(client);
  await runner.reportRunning(await read(client, id));
  const environment = await read(client, id);
  expect(environment.status?.phase).toBe(EnvironmentPhase.RUNNING);
  return environment;
}

const secretsOf = ({ spec }: Environment) => spec?.secrets ?? [];
const namesOf = (environment: Environment) => secretsOf(environment).map(({ name }) => name);

/** The environment once its secrets satisfy a condition. */
const until = (client: BerthClient, id: string, what: string, accept: (environment: Environment) => boolean) =>
  eventually(async () => {
    const environment = await read(client, id);
    return accept(environment) ? environment : undefined;
  }, what);

const told = async (id: string) =>
  await plane.plane.app.db.point<{ actor_principal: number; actor_id: string | null }[]>`
    select actor_principal, actor_id from audit_log where subject_id = ${id} and action = ${CHANGED}`;

const isQuiet = () =>
  eventually(async () => {
    const rows = await plane.plane.app.db.point`select from secret_changes`;
    return rows.length === 0;
  }, "no change waits");

test("PLT-35 the user's secret is in the spec, not the organization's of that name; a file of that name is there too", async () => {
  const ids = [
    await make(plane.admin, ofOrganization(), "API_KEY"),
    await make(member.client, ofUser(member.id), "API_KEY"),
  ];
  ids.push(await make(plane.admin, ofOrganization(), "API_KEY_FILE", file("/etc/api-key")));
  const twin = await plane.addUser();
  const environment = await newEnvironment(member.client);
  const [own, shared] = secretsOf(environment);
  expect(secretsOf(environment)).toHaveLength(2);
  expect(own).toMatchObject({
    ...{ name: "API_KEY", source: "control-plane", sourceRef: ids[1], scope: SpecScope.USER },
    mount: { case: "environmentVariable", value: "API_KEY" },
  });
  expect(shared).toMatchObject({ name: "API_KEY_FILE", mount: file("/etc/api-key"), scope: SpecScope.ORGANIZATION });
  expect(new Set(secretsOf(environment).flatMap(({ id, session }) => [id, session])).size).toBe(4);
  expect(secretsOf(await newEnvironment(twin.client)).map(({ sourceRef }) => sourceRef)).toEqual([ids[0], ids[2]]);
  const seen = (await plane.admin.environments.getEnvironment({ environmentId: environment.id })).environment;
  expect(seen?.spec?.secrets).toEqual([]);

  const robot = await addServiceAccount(plane);
  const scope = { scope: { case: "serviceAccountId" as const, value: robot.id } };
  await robot.client.secrets.createSecret({ name: "API_KEY", value: "robot", mount: variable, scope });
  expect(secretsOf(await newEnvironment(robot.client))).toMatchObject([
    { scope: SpecScope.ORGANIZATION },
    { scope: SpecScope.SERVICE_ACCOUNT },
  ]);
  for (const id of ids.filter((_id, index) => index !== 1)) await plane.admin.secrets.deleteSecret({ secretId: id });
});

test("PLT-35 secrets of its project are between those of the organization and of the user, and go with the project", async () => {
  const person = await plane.addUser();
  const projectId = await addProject(person.client, "Layers");
  const scope = { scope: { case: "projectId" as const, value: projectId } };
  const mount = variable;
  const shared = [
    await make(plane.admin, ofOrganization(), "ALL_LAYERS"),
    await make(plane.admin, ofOrganization(), "TWO_LAYERS"),
  ];
  for (const name of ["ALL_LAYERS", "TWO_LAYERS", "ONE_LAYER"])
    await person.client.secrets.createSecret({ name, value: "project", mount, scope });
  await make(person.client, ofUser(person.id), "ALL_LAYERS");
  const created = await person.client.environments.createEnvironmentFromProject({
    ...{ projectId, spec: { machine: { class: classId } } },
  });
  const environment = created.environment as Environment;
  const scopes = (found: Environment) =>
    Object.fromEntries(secretsOf(found).map(({ name, scope }) => [name, SpecScope[scope]]));
  expect(scopes(environment)).toEqual({ ALL_LAYERS: "USER", TWO_LAYERS: "PROJECT", ONE_LAYER: "PROJECT" });
  expect(scopes(await newEnvironment(person.client))).toEqual({ ALL_LAYERS: "USER", TWO_LAYERS: "ORGANIZATION" });
  await person.client.secrets.createSecret({ name: "LATER_LAYER", value: "project", mount, scope });
  const hasLater = (found: Environment) => namesOf(found).includes("LATER_LAYER");
  await until(person.client, environment.id, "a new secret of the project arrives", hasLater);
  await person.client.projects.deleteProject({ projectId });
  const isBare = (found: Environment) => !secretsOf(found).some((each) => each.scope === SpecScope.PROJECT);
  const bare = await until(person.client, environment.id, "the project takes its secrets along", isBare);
  expect(scopes(bare)).toEqual({ ALL_LAYERS: "USER", TWO_LAYERS: "ORGANIZATION" });
  expect(bare.metadata?.projectId).toBe(projectId);
  for (const id of shared) await plane.admin.secrets.deleteSecret({ secretId: id });
});

test("a prebuild gets no secrets of the user who makes it, but those of a service account", async () => {
  const person = await plane.addUser();
  const robot = await addServiceAccount(plane);
  await make(plane.admin, ofOrganization(), "FOR_ALL");
  await make(person.client, ofUser(person.id), "PERSONAL");
  const scope = { scope: { case: "serviceAccountId" as const, value: robot.id } };
  await robot.client.secrets.createSecret({ name: "ROBOTIC", value: "x", mount: variable, scope });
  const { app } = plane.plane;
  const resolved = (creator: { id: string; principal: Principal }, role: EnvironmentRole) => {
    const metadata = create(EnvironmentMetadataSchema, { creator, role });
    const environment = { organizationId: plane.organizationId, metadata, spec: create(EnvironmentSpecSchema) };
    return app.db.begin(async (tx) =>
      (await environmentSecrets(tx, environment, app.newId, true)).map(({ name }) => name),
    );
  };
  const user = { id: person.id, principal: Principal.USER };
  expect(await resolved(user, EnvironmentRole.DEFAULT)).toEqual(["FOR_ALL", "PERSONAL"]);
  expect(await resolved(user, EnvironmentRole.PREBUILD)).toEqual(["FOR_ALL"]);
  const account = { id: robot.id, principal: Principal.SERVICE_ACCOUNT };
  expect(await resolved(account, EnvironmentRole.PREBUILD)).toEqual(["FOR_ALL", "ROBOTIC"]);
});

test("PLT-36 a running environment learns of a new value, a new secret and the end of one, and nothing else changes", async () => {
  const person = await plane.addUser();
  const first = await make(person.client, ofUser(person.id), "FIRST");
  const second = await make(person.client, ofUser(person.id), "SECOND");
  const before = await running(person.client);
  const stream = await watchEvents(person.client);
  const entry = (environment: Environment, secretId: string) =>
    secretsOf(environment).find(({ sourceRef }) => sourceRef === secretId);

  await person.client.secrets.updateSecretValue({ secretId: first, value: "new" });
  const isNewer = (environment: Environment) => entry(environment, first)?.session !== entry(before, first)?.session;
  const updated = await until(person.client, before.id, "the session is another one", isNewer);
  expect(entry(updated, first)).toEqual({ ...entry(before, first), session: entry(updated, first)?.session });
  expect(entry(updated, second)).toEqual(entry(before, second));
  expect(updated.spec?.specVersion).toBe((before.spec?.specVersion ?? 0n) + 1n);
  expect({ ...updated.spec, secrets: [], specVersion: 0n }).toEqual({ ...before.spec, secrets: [], specVersion: 0n });
  expect(updated.status?.phase).toBe(EnvironmentPhase.UPDATING);
  await stream.next(eventText(ResourceType.ENVIRONMENT, ResourceOperation.UPDATE, before.id));
  expect(await told(before.id)).toEqual([{ actor_principal: Principal.UNSPECIFIED, actor_id: null }]);

  const third = await make(person.client, ofUser(person.id), "THIRD");
  const grown = await until(person.client, before.id, "the new secret is there", (found) =>
    Boolean(entry(found, third)),
  );
  expect(secretsOf(grown).slice(0, -1)).toEqual(secretsOf(updated));
  await person.client.secrets.deleteSecret({ secretId: second });
  const shrunk = await until(person.client, before.id, "the old secret is gone", (found) => !entry(found, second));
  expect(namesOf(shrunk).filter((name) => ["FIRST", "SECOND", "THIRD"].includes(name))).toEqual(["FIRST", "THIRD"]);
  expect(shrunk.spec?.specVersion).toBe((before.spec?.specVersion ?? 0n) + 3n);
  await runner.reportRunning(shrunk);
  expect((await read(person.client, before.id)).status?.phase).toBe(EnvironmentPhase.RUNNING);
  await isQuiet();
  expect(await told(before.id)).toHaveLength(3);
  stream.stop();
});

test("what an environment does not get does not touch it; one that is stopped gets everything at its start", async () => {
  const person = await plane.addUser();
  const shared = await make(plane.admin, ofOrganization(), "SHADOWED");
  await make(person.client, ofUser(person.id), "SHADOWED");
  const active = await running(person.client);
  const idle = await running(person.client);
  await person.client.environments.stopEnvironment({ environmentId: idle.id });
  await runner.reportMachine(await read(person.client, idle.id), MachinePhase.STOPPED);
  const stopped = await read(person.client, idle.id);
  expect(stopped.status?.phase).toBe(EnvironmentPhase.STOPPED);

  await plane.admin.secrets.updateSecretValue({ secretId: shared, value: "another" });
  await make(member.client, ofUser(member.id), "OF_SOMEBODY_ELSE");
  await isQuiet();
  expect((await read(person.client, active.id)).spec).toEqual(active.spec);

  const late = await make(person.client, ofUser(person.id), "LATE");
  await until(person.client, active.id, "the running one has it", (found) => namesOf(found).includes("LATE"));
  await isQuiet();
  expect((await read(person.client, idle.id)).spec).toEqual(stopped.spec);
  await person.client.environments.startEnvironment({ environmentId: idle.id });
  const started = await read(person.client, idle.id);
  expect(secretsOf(started).slice(0, -1)).toEqual(secretsOf(stopped));
  expect(secretsOf(started).at(-1)?.sourceRef).toBe(late);
});

test("environments that are made while secrets change end up with the newest, each change told once", async () => {
  const person = await plane.addUser();
  const secretId = await make(person.client, ofUser(person.id), "CONTESTED");
  const environments = await Promise.all(
    Array.from({ length: 24 }, async (_each, index) => {
      if (index % 2 === 0) await person.client.secrets.updateSecretValue({ secretId, value: `${index}` });
      return await newEnvironment(person.client);
    }),
  );
  await isQuiet();
  const [row] = await plane.plane.app.db.point<
    { session: string }[]
  >`select session from secrets where id = ${secretId}`;
  for (const { id } of environments) {
    const { spec } = await read(person.client, id);
    expect(spec?.secrets.find(({ sourceRef }) => sourceRef === secretId)?.session).toBe(row?.session);
    expect(await told(id)).toHaveLength(Number(spec?.specVersion) - 1);
  }
});

test("a secret does not change between the look of a start at it and the commit of that start", async () => {
  const person = await plane.addUser();
  const secretId = await make(person.client, ofUser(person.id), "HELD");
  const environment = await newEnvironment(person.client);
  const { app } = plane.plane;
  const looked = Promise.withResolvers<void>();
  const committing = Promise.withResolvers<void>();
  const start = app.db.begin(async (tx) => {
    const metadata = environment.metadata ?? create(EnvironmentMetadataSchema);
    const spec = create(EnvironmentSpecSchema);
    await environmentSecrets(tx, { organizationId: plane.organizationId, metadata, spec }, app.newId, true);
    looked.resolve();
    await committing.promise;
  });
  await looked.promise;
  let isChanged = false;
  const change = person.client.secrets.updateSecretValue({ secretId, value: "x" }).then(() => {
    isChanged = true;
  });
  await eventually(async () => {
    const waiting = await app.db.point`select from pg_locks where locktype = 'advisory' and not granted
      and database = (select oid from pg_database where datname = current_database())`;
    return waiting.length > 0;
  }, "the change waits");
  expect(isChanged).toBe(false);
  committing.resolve();
  await Promise.all([start, change]);
});

test("a change that somebody took up and dropped is taken up again when its time is over", async () => {
  const person = await plane.addUser();
  const environment = await running(person.client);
  const { app } = plane.plane;
  const { write } = app.db;
  await isQuiet();
  // As a replica leaves it that dies right after it has begun.
  const dropped = { id: "", until: new Date(app.now().getTime() + LEASE_MS) };
  await write`insert into secret_changes (scope, scope_id, organization_id, due_at)
    values (2, ${person.id}, ${plane.organizationId}, ${new Date(app.now().getTime() + 1000)})`;
  const claimed = await claimSecretChange(write, new Date(app.now().getTime() + 2000), dropped.until);
  expect(claimed?.owner.id).toBe(person.id);
  await write`insert into secrets (id, organization_id, scope, scope_id, name, session, message)
    values (${app.newId()}, ${plane.organizationId}, 2, ${person.id}, 'ORPHAN', ${app.newId()}, ''::bytea)`;
  expect(secretsOf(await read(person.client, environment.id))).toEqual(secretsOf(environment));
  plane.advance(LEASE_MS);
  const has = ({ length }: { length: number }) => length === secretsOf(environment).length + 1;
  await until(person.client, environment.id, "it is told after all", (found) => has(secretsOf(found)));
});

test("an environment that cannot be told does not keep others from it, and is told later", async () => {
  const person = await plane.addUser();
  const [broken, sound] = [await newEnvironment(person.client), await newEnvironment(person.client)];
  const { write } = plane.plane.app.db;
  const [row] = await write<{ facts: string }[]>`select facts from environments where id = ${broken.id}`;
  await write`update environments set facts = '' where id = ${broken.id}`;
  await make(person.client, ofUser(person.id), "STUBBORN");
  await until(person.client, sound.id, "the sound one has it", (found) => namesOf(found).includes("STUBBORN"));
  await eventually(() => plane.logged().includes("failed and will be tried again"), "the failure is logged");
  await write`update environments set facts = ${row?.facts ?? ""} where id = ${broken.id}`;
  plane.advance(LEASE_MS);
  await until(person.client, broken.id, "the other one has it too", (found) => namesOf(found).includes("STUBBORN"));
});
