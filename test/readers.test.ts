import { create } from "@bufbuild/protobuf";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { AdmissionLevel } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { HostAuthenticationTokenSource } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { SecretScopeSchema } from "../gen/gitpod/v1/secret_pb.js";
import type { BerthClient } from "../src/client.ts";
import type { OutboxEvent } from "../src/domain/event.ts";
import type { Caller } from "../src/domain/principal.ts";
import { Scope } from "../src/domain/secret.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import {
  administersProject,
  readsClass,
  readsEnvironment,
  readsGroup,
  readsProject,
  readsRunner,
  readsSecret,
  readsServiceAccount,
  readsUser,
} from "../src/store/access.ts";
import { readsAssignment } from "../src/store/assignment-rows.ts";
import { findCaller } from "../src/store/credentials.ts";
import type { Fragment, Sql } from "../src/store/db.ts";
import { isStored } from "../src/store/readers.ts";
import { readableResources } from "../src/store/shared-resources.ts";
import { audienceOf, readableBy } from "../src/store/visibility.ts";
import { builtInGroup, newGroup } from "./harness/groups.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer, sweep } from "./harness/projects.ts";
import { addClass, addOrganization, addServiceAccount, connectRunner, mint, share } from "./harness/tenants.ts";

// The two ways to say who may read what must agree: conditions for one caller, and readers for all callers at once.

const T = ResourceType;

let plane: TestPlane;
let sql: Sql;
/** Callers by what they are. */
const callers = new Map<string, Caller>();
/** Ids of resources, by what they are. */
const resources = new Map<string, string>();

const known = (name: string) => resources.set(name, uuidv7()).get(name)!;

async function addCaller(name: string, { token }: { token: string }): Promise<void> {
  const found = await findCaller(plane.plane.app.db.point, token, new Date());
  if (found.state !== "ok") throw new Error(`the token of ${name} opens nothing`);
  callers.set(name, found.caller);
}

/** One user for each role on a resource, through a direct share. */
async function shareWithOneEach(what: string, type: ResourceType, id: string, ...roles: ResourceRole[]): Promise<void> {
  for (const role of roles) {
    const user = await plane.addUser();
    await share(plane, user.id, { type, id, role });
    await addCaller(`${ResourceRole[role]} of the ${what}`, user);
  }
}

async function addPeople(creator: TestUser, robot: TestUser): Promise<void> {
  const stranger = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
  await addCaller("admin", { token: plane.adminToken });
  await addCaller("creator", creator);
  await addCaller("member", await plane.addUser());
  await addCaller("service account", robot);
  await addCaller("admin of another organization", stranger);
  const { ORG_ADMIN, ORG_RUNNERS_ADMIN, ORG_PROJECTS_ADMIN, ORG_GROUPS_ADMIN } = ResourceRole;
  const { ORG_ENVIRONMENTS_READER, ORG_AUDIT_LOG_READER } = ResourceRole;
  const roles = [ORG_ADMIN, ORG_RUNNERS_ADMIN, ORG_PROJECTS_ADMIN, ORG_GROUPS_ADMIN];
  for (const role of [...roles, ORG_ENVIRONMENTS_READER, ORG_AUDIT_LOG_READER]) {
    const user = await plane.addUser();
    await newGroup(plane, { users: [user], organizationRoles: [role] });
    await addCaller(ResourceRole[role], user);
  }
}

async function addRunners(creator: BerthClient): Promise<{ hidden: string; shared: string; classId: string }> {
  const { runner: shared, classId } = await connectRunner(plane, { shared: false });
  await shareRunner(plane, shared.id);
  const { runner: hidden, classId: hiddenClass } = await connectRunner(plane, { shared: false });
  const { runner: gone } = await connectRunner(plane, { shared: false });
  await plane.admin.runners.deleteRunner({ runnerId: gone.id, force: true });
  resources.set("a shared runner", shared.id).set("a hidden runner", hidden.id).set("a deleted runner", gone.id);
  resources.set("a class of the shared runner", classId).set("a class of the hidden runner", hiddenClass);
  resources.set("a class that a project offers", await addClass(plane, hidden.id));
  await shareWithOneEach("runner", T.RUNNER, hidden.id, ResourceRole.RUNNER_ADMIN, ResourceRole.RUNNER_USER);
  for (const [name, runnerId] of Object.entries({ shared: shared.id, hidden: hidden.id })) {
    const integration = { runnerId, scmId: "github", host: "git.example.org", pat: true };
    const { id } = await plane.admin.runnerConfiguration.createSCMIntegration(integration);
    resources.set(`an integration of the ${name} runner`, id);
  }
  const { environment } = await creator.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const admitted = await creator.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const { ENVIRONMENT_ADMIN, ENVIRONMENT_USER, ENVIRONMENT_VIEWER } = ResourceRole;
  const admission = AdmissionLevel.ORGANIZATION;
  await plane.plane.app.db
    .write`update environments set admission = ${admission} where id = ${admitted.environment!.id}`;
  resources.set("an environment", environment!.id).set("an admitted environment", admitted.environment!.id);
  const roles = [ENVIRONMENT_ADMIN, ENVIRONMENT_USER, ENVIRONMENT_VIEWER];
  await shareWithOneEach("environment", T.ENVIRONMENT, environment!.id, ...roles);
  return { hidden: hidden.id, shared: shared.id, classId };
}

async function addProjects(creator: TestUser): Promise<void> {
  const { id } = await createProject(creator.client);
  await offer(plane.admin, id, resources.get("a class that a project offers")!);
  const { id: going } = await createProject(creator.client);
  resources.set("a project", id).set("a project that is being deleted", going);
  const { PROJECT_ADMIN, PROJECT_EDITOR, PROJECT_USER } = ResourceRole;
  await shareWithOneEach("project", T.PROJECT, id, PROJECT_ADMIN, PROJECT_EDITOR, PROJECT_USER);
  for (const role of [PROJECT_USER, PROJECT_ADMIN]) {
    const { id: userId } = callers.get(`${ResourceRole[role]} of the project`)!;
    await share(plane, userId, { type: T.PROJECT, id: going, role });
  }
  await plane.plane.app.db.write`update projects set deleting_at = now() + interval '1 day' where id = ${going}`;
}

async function addOwned(creator: TestUser, robot: TestUser): Promise<void> {
  const { db } = plane.plane.app;
  const { organizationId } = plane;
  const projectId = resources.get("a project")!;
  const scopes = { organizationId, projectId, userId: creator.id, serviceAccountId: robot.id };
  for (const [field, value] of Object.entries(scopes)) {
    const scope = create(SecretScopeSchema, { scope: { case: field as keyof typeof scopes, value } });
    const client = field === "userId" ? creator.client : plane.admin;
    const mount = { case: "environmentVariable" as const, value: true };
    const { secret } = await client.secrets.createSecret({ name: "SOME_NAME", value: "x", scope, mount });
    resources.set(`a secret with ${field}`, secret!.id);
  }
  await creator.client.users.setPreference({ key: "theme", value: "dark" });
  const [preference] = await db.point<{ id: string }[]>`select id from user_preferences where user_id = ${creator.id}`;
  resources.set("a preference", preference!.id);
  await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: creator.id, id: known("a personal access token") });
  await mint(plane, { kind: TokenKind.SERVICE_ACCOUNT, subjectId: robot.id, id: known("a service account token") });
  const { token } = await creator.client.runnerConfiguration.createHostAuthenticationToken({
    ...{ runnerId: resources.get("a shared runner")!, host: "git.example.org", token: "x" },
    source: HostAuthenticationTokenSource.PAT,
  });
  resources.set("a host token", token!.id);
  await shareWithOneEach("service account", T.SERVICE_ACCOUNT, robot.id, ResourceRole.SERVICE_ACCOUNT_ADMIN);
}

beforeAll(async () => {
  plane = await startTestPlane();
  sql = plane.plane.app.db.list;
  await liftQuotas(plane);
  const [creator, robot] = [await plane.addUser(), await addServiceAccount(plane)];
  await addPeople(creator, robot);
  await addRunners(creator.client);
  await addProjects(creator);
  await addOwned(creator, robot);
  resources.set("the organization", plane.organizationId).set("a user", creator.id).set("a service account", robot.id);
  resources.set("org-members", await builtInGroup(plane, "org-members")).set("nothing", uuidv7());
  const group = await newGroup(plane, { users: [await plane.addUser()] });
  resources.set("a group", group);
  await shareWithOneEach("group", T.GROUP, group, ResourceRole.GROUP_ADMIN, ResourceRole.GROUP_VIEWER);
  const assignments = await plane.plane.app.db.point<{ id: string; resource_type: number }[]>`
    select id, resource_type from role_assignments`;
  for (const { id, resource_type } of assignments) resources.set(`role on ${T[resource_type]} ${id}`, id);
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

type Query = (caller: Caller, ids: string[]) => Fragment;

const secretOf =
  (scope: Scope): Query =>
  (caller, ids) =>
    sql`select s.id from secrets s where s.id = any(${ids}) and s.scope = ${scope} and ${readsSecret(sql, caller)}`;
const group: Query = (caller, ids) =>
  sql`select g.id from groups g where g.id = any(${ids}) and ${readsGroup(sql, caller)}`;
const organization: Query = (caller, ids) =>
  sql`select id from organizations where id = any(${ids}) and id = ${caller.organizationId}`;
const project: Query = (caller, ids) => sql`select p.id from projects p where p.id = any(${ids})
  and ${readsProject(sql, caller)} and (p.deleting_at is null or ${administersProject(sql, caller)})`;
/** Of a kind that is told to its owner alone. */
const personal =
  (table: string, owner: string, more = "true"): Query =>
  (caller, ids) =>
    sql`select id from ${sql(table)} where id = any(${ids}) and ${sql(owner)} = ${caller.id} and ${sql.unsafe(more)}`;

/** Queries with the conditions that services read by. */
const QUERIES: Partial<Record<ResourceType, Query>> = {
  [T.ENVIRONMENT]: (caller, ids) =>
    sql`select e.id from environments e where e.id = any(${ids}) and ${readsEnvironment(sql, caller)}`,
  [T.RUNNER]: (caller, ids) => sql`select r.id from runners r where r.id = any(${ids}) and ${readsRunner(sql, caller)}`,
  [T.ENVIRONMENT_CLASS]: (caller, ids) => sql`select c.id from environment_classes c
    join runners r on r.id = c.runner_id where c.id = any(${ids}) and ${readsClass(sql, caller)}`,
  [T.RUNNER_SCM_INTEGRATION]: (caller, ids) => sql`select i.id from scm_integrations i
    join runners r on r.id = i.runner_id where i.id = any(${ids}) and ${readsRunner(sql, caller)}`,
  [T.HOST_AUTHENTICATION_TOKEN]: personal("host_tokens", "subject_id"),
  [T.PROJECT]: project,
  [T.PROJECT_ENVIRONMENT_CLASS]: project,
  [T.SECRET]: secretOf(Scope.PROJECT),
  [T.ORGANIZATION_SECRET]: secretOf(Scope.ORGANIZATION),
  [T.SERVICE_ACCOUNT_SECRET]: secretOf(Scope.SERVICE_ACCOUNT),
  [T.USER_SECRET]: secretOf(Scope.USER),
  [T.ORGANIZATION]: organization,
  [T.ORGANIZATION_POLICY]: organization,
  [T.USER]: (caller, ids) => sql`select u.id from users u where u.id = any(${ids}) and ${readsUser(sql, caller)}`,
  [T.USER_PREFERENCE]: personal("user_preferences", "user_id"),
  [T.PERSONAL_ACCESS_TOKEN]: personal("tokens", "subject_id", `kind = ${TokenKind.PERSONAL_ACCESS}`),
  [T.SERVICE_ACCOUNT]: (caller, ids) =>
    sql`select s.id from service_accounts s where s.id = any(${ids}) and ${readsServiceAccount(sql, caller)}`,
  [T.SERVICE_ACCOUNT_TOKEN]: (caller, ids) => sql`select id from tokens where id = any(${ids})
    and kind = ${TokenKind.SERVICE_ACCOUNT} and organization_id = ${caller.organizationId} and ${caller.orgAdmin}`,
  [T.GROUP]: group,
  [T.GROUP_MEMBERSHIP_CHANGED]: group,
  [T.ROLE_ASSIGNMENT]: (caller, ids) =>
    sql`select a.id from role_assignments a where a.id = any(${ids}) and ${readsAssignment(sql, caller)}`,
  [T.ROLE_ASSIGNMENT_CHANGED]: (caller, ids) => sql`select id from (${readableResources(sql, caller, ids)}) found
    where id not in (select id from projects where deleting_at is not null) union all ${project(caller, ids)}`,
};

const stored = Object.values(T).filter((type): type is ResourceType => typeof type === "number" && isStored(type));

test("every kind of resource that is stored is compared", () => {
  expect(Object.keys(QUERIES).map(Number).sort()).toEqual([...stored].sort());
  expect(callers.size).toBeGreaterThan(20);
  expect(resources.size).toBeGreaterThan(30);
});

test.each(stored.map((type) => [T[type]!, type] as const))(
  "who may read a %s is the same both ways",
  async (_name, type) => {
    const entries = [...resources];
    const all = entries.map(([, resourceId]) => ({ resourceType: type, resourceId, environmentId: null }));
    const find = await readableBy(sql, [...callers.values()], all);
    const expected: Record<string, string[]> = {};
    const found: Record<string, string[]> = {};
    const ids = entries.map(([, id]) => id);
    for (const [name, caller] of callers) {
      const rows = await sql<{ id: string }[]>`${QUERIES[type]!(caller, ids)}`;
      const readable = new Set(rows.map((row) => row.id));
      expected[name] = entries.filter(([, id]) => readable.has(id)).map(([what]) => what);
      found[name] = entries.filter((_each, index) => find(caller, all[index]!)).map(([what]) => what);
    }
    expect(found).toEqual(expected);
    // Somebody may read one, and somebody may not.
    const counts = new Set(Object.values(expected).map((each) => each.length));
    expect(Math.max(...counts)).toBeGreaterThan(0);
    expect(counts.size).toBeGreaterThan(1);
  },
);

/** Callers who may learn of an event. */
async function toldOf(event: OutboxEvent): Promise<string[]> {
  const all = [...callers].filter(([, caller]) => caller.organizationId === event.organizationId);
  const sees = await audienceOf(
    sql,
    all.map(([, caller]) => caller),
    [event],
  );
  return all.filter(([, caller]) => sees(caller, event)).map(([name]) => name);
}

async function lastEvent(type: ResourceType, id: string): Promise<OutboxEvent | undefined> {
  const [row] = await sql<(Omit<OutboxEvent, "readers"> & { readers: string[] | null })[]>`
    select organization_id as "organizationId", environment_id as "environmentId", resource_type as "resourceType",
      resource_id as "resourceId", operation, creator_id as "creatorId", readers
    from events where resource_type = ${type} and resource_id = ${id} order by seq desc limit 1`;
  return row && { ...row, readers: row.readers && new Set(row.readers) };
}

const admin = () => plane.admin;

/** What can be deleted: the most open ones last, because what they hold goes with them. */
const DELETIONS: [string, ResourceType, (id: string) => Promise<unknown>][] = [
  ["a secret with projectId", T.SECRET, (secretId) => admin().secrets.deleteSecret({ secretId })],
  ["a secret with organizationId", T.ORGANIZATION_SECRET, (secretId) => admin().secrets.deleteSecret({ secretId })],
  [
    "a secret with serviceAccountId",
    T.SERVICE_ACCOUNT_SECRET,
    (secretId) => admin().secrets.deleteSecret({ secretId }),
  ],
  [
    "an integration of the hidden runner",
    T.RUNNER_SCM_INTEGRATION,
    (id) => admin().runnerConfiguration.deleteSCMIntegration({ id }),
  ],
  [
    "an environment",
    T.ENVIRONMENT,
    (environmentId) => admin().environments.deleteEnvironment({ environmentId, force: true }),
  ],
  ["a group", T.GROUP, (groupId) => admin().groups.deleteGroup({ groupId })],
  [
    "a project",
    T.PROJECT,
    async (projectId) => {
      await admin().projects.deleteProject({ projectId });
      await sweep(plane, "project deletions");
    },
  ],
  ["a hidden runner", T.RUNNER, (runnerId) => admin().runners.deleteRunner({ runnerId, force: true })],
];

test.each(DELETIONS)("the end of %s is told to whoever could read it", async (name, type, remove) => {
  const resourceId = resources.get(name)!;
  const creatorId = (await lastEvent(type, resourceId))?.creatorId ?? null;
  const before = await toldOf({
    ...{ organizationId: plane.organizationId, environmentId: null, resourceType: type, resourceId },
    ...{ operation: ResourceOperation.UPDATE, creatorId, readers: null },
  });
  await remove(resourceId);
  const event = await lastEvent(type, resourceId);
  expect(event?.operation).toBe(ResourceOperation.DELETE);
  expect(await toldOf(event!)).toEqual(before);
});
