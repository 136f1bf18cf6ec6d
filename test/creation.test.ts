import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Environment } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import type { Tx } from "../src/store/db.ts";
import { holdSecrets } from "../src/store/secrets.ts";
import { auditActions } from "./harness/audit.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { meanwhile } from "./harness/meanwhile.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer } from "./harness/projects.ts";
import { refusal } from "./harness/refusal.ts";
import { changePolicies, connectRunner } from "./harness/tenants.ts";

// What changes between the look of a creation at what it depends on and the moment at which the environment is stored.

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  member = await plane.addUser();
});

afterAll(async () => {
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
});

const db = () => plane.plane.app.db;

async function create({ client } = member): Promise<Environment> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

const holdRunner = (tx: Tx) => tx`select from runners where id = ${runner.id} for no key update`;

/** Every revision of the runner is in its log. */
async function expectNoGaps() {
  const rows = await db().point<{ revision: number; head: number }[]>`
    select v.revision, r.head_revision as head from runners r join runner_revisions v on v.runner_id = r.id
    where r.id = ${runner.id} order by v.revision`;
  const [{ revision: first = 0, head = 0 } = {}] = rows;
  expect(rows.map(({ revision }) => revision)).toEqual(Array.from(rows, (_row, index) => first + index));
  expect(rows.at(-1)?.revision).toBe(head);
}

/** A creation that is refused, without leaving a trace. */
async function refused(lock: (tx: Tx) => Promise<unknown>, change: (tx: Tx) => Promise<unknown>, creation = create) {
  const created = async () => {
    const [row] = await db().point`
      select (select count(*)::int from environments) as environments,
        (select count(*)::int from audit_log where action = 'Environment created') as entries,
        (select count(*)::int from events where resource_type = ${ResourceType.ENVIRONMENT}
          and operation = ${ResourceOperation.CREATE}) as events`;
    return row;
  };
  const before = await created();
  const error = await refusal(meanwhile(db(), lock, change, () => creation()));
  expect(await created()).toEqual(before);
  await expectNoGaps();
  return `${Code[error.code]}: ${error.rawMessage}`;
}

test("a class that the caller may not see is not there, however often it is asked for", async () => {
  const hidden = await connectRunner(plane, { shared: false });
  const person = await plane.addUser();
  const ask = () =>
    refusal(person.client.environments.createEnvironment({ spec: { machine: { class: hidden.classId } } }));
  for (let turn = 0; turn < 4; turn += 1) expect(Code[(await ask()).code]).toBe("NotFound");
});

describe("what changes while an environment is being made", () => {
  beforeAll(async () => {
    ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 100 }));
    await create();
  });

  test("a secret: the environment has the new value, and is made once", async () => {
    const { client, id } = member;
    const scope = { scope: { case: "userId" as const, value: id } };
    const mount = { case: "environmentVariable", value: true } as const;
    const { secret } = await client.secrets.createSecret({ name: "CHANGED", value: "value", mount, scope });
    const session = plane.plane.app.newId();
    const count = async () => (await db().point`select from environments where runner_id = ${runner.id}`).length;
    const before = await count();
    const environment = await meanwhile(
      db(),
      (tx) => holdSecrets(tx, plane.organizationId),
      (tx) => tx`update secrets set session = ${session} where id = ${secret?.id}`,
      create,
    );
    expect(environment.spec?.secrets.map((each) => [each.name, each.session])).toEqual([["CHANGED", session]]);
    expect(await count()).toBe(before + 1);
    expect(await auditActions(plane, environment.id)).toEqual(["Environment created"]);
    await expectNoGaps();
  });

  test("the runner: it is full, or has gone", async () => {
    const set = (tx: Tx, most: number) => tx`update runners set max_environments = ${most} where id = ${runner.id}`;
    const full = await refused(holdRunner, (tx) => set(tx, 1));
    expect(full).toMatch(/^ResourceExhausted: the runner runs \d of at most 1 environments$/);
    await set(db().write as unknown as Tx, 100);

    const move = (tx: Tx, phase: RunnerPhase) => tx`update runners set phase = ${phase} where id = ${runner.id}`;
    const gone = await refused(holdRunner, (tx) => move(tx, RunnerPhase.INACTIVE));
    expect(gone).toBe("FailedPrecondition: runner is not connected");
    await move(db().write as unknown as Tx, RunnerPhase.ACTIVE);
  });

  test("a quota: another environment of the same person counts again", async () => {
    const person = await plane.addUser();
    const first = await create(person);
    await person.client.environments.stopEnvironment({ environmentId: first.id });
    const archive = (sql: Tx, at: Date | null) =>
      sql`update environments set archived_at = ${at} where id = ${first.id}`;
    await archive(db().write as unknown as Tx, new Date());
    await changePolicies(plane, { maximumEnvironmentsPerUser: 1n });
    const lock = (tx: Tx) =>
      tx`select pg_advisory_xact_lock(hashtextextended(${`quota ${plane.organizationId} ${person.id}`}, 0))`;
    const error = await refused(
      lock,
      (tx) => archive(tx, null),
      () => create(person),
    );
    expect(error).toBe("ResourceExhausted: you have 1 of at most 1 environments");
    await liftQuotas(plane);
  });

  test("the project: it is being deleted", async () => {
    const { client } = member;
    const project = await createProject(client);
    await offer(plane.admin, project.id, classId);
    const error = await refused(
      (tx) => tx`select from projects where id = ${project.id} for update`,
      (tx) => tx`update projects set deleting_at = now() where id = ${project.id}`,
      async () => {
        const { environment } = await client.environments.createEnvironmentFromProject({ projectId: project.id });
        return environment as Environment;
      },
    );
    expect(error).toMatch(/^FailedPrecondition: /);
  });

  test("creations at once on one runner: each is told to it, in order", async () => {
    const people = await Promise.all(Array.from({ length: 4 }, () => plane.addUser()));
    const made = await Promise.all(Array.from({ length: 24 }, (_each, index) => create(people[index % 4])));
    expect(new Set(made.map(({ id }) => id)).size).toBe(24);
    await expectNoGaps();
    const rows = await db().point<{ object_id: string }[]>`
      select object_id from runner_revisions where runner_id = ${runner.id}`;
    const told = new Set(rows.map((row) => row.object_id));
    for (const { id } of made) expect(told).toContain(id);
  });
});
