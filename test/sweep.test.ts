import { timestampDate } from "@bufbuild/protobuf/wkt";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { ObjectKind } from "../gen/berth/runner/v1/runner_control_pb.js";
import { type Environment, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { type App, transact } from "../src/app.ts";
import type { ControlPlane } from "../src/control-plane.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import type { Sql } from "../src/store/db.ts";
import { dueEnvironmentIds } from "../src/store/environments.ts";
import { record } from "../src/store/record.ts";
import { trimRevisions } from "../src/store/retention.ts";
import { insertToken } from "../src/store/tokens.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";

const MINUTE_MS = 60_000;
const DAY_MS = 24 * 60 * MINUTE_MS;

let plane: TestPlane;
let app: App;
let replica: ControlPlane;
let runner: FakeRunner;
let classId: string;

async function newRunner(): Promise<{ runner: FakeRunner; classId: string }> {
  const provider = RunnerProvider.LINUX_HOST;
  const { exchangeToken } = await plane.admin.runners.createRunner({ name: "test runner", provider });
  const { accessToken } = await plane.admin.identity.exchangeToken({ exchangeToken });
  const process = new FakeRunner(plane.url, accessToken);
  await process.register();
  const { id } = await plane.admin.runnerConfiguration.createEnvironmentClass({
    runnerId: process.id,
    displayName: "Standard",
    description: "For tests",
    configuration: [
      { key: "cpu", value: "2" },
      { key: "memory", value: "4096" },
    ],
  });
  return { runner: process, classId: id };
}

async function newEnvironment(of = classId): Promise<Environment> {
  return (await plane.admin.environments.createEnvironment({ spec: { machine: { class: of } } })).environment!;
}

const newEnvironments = (count: number, of = classId) =>
  Promise.all(Array.from({ length: count }, () => newEnvironment(of)));

const readEnvironment = async (environmentId: string) =>
  (await plane.admin.environments.getEnvironment({ environmentId })).environment!;

const readRunner = async (runnerId: string) => (await plane.admin.runners.getRunner({ runnerId })).runner!;

const sweep = (name: string, on: App = app) => sweeps.find((each) => each.name === name)!.run(on);

/** Runs a sweep on both replicas at the same time, and then once more. */
async function sweepEverywhere(name: string): Promise<void> {
  await Promise.all([sweep(name), sweep(name, replica.app)]);
  await sweep(name);
}

const expireLease = (runnerId: string) => app.db.write`
  update runners set lease_expires_at = now() - interval '1 second' where id = ${runnerId}`;

/** Audit entries and events about one resource since a time. */
async function toldAbout(id: string) {
  const audits = await app.db.point<{ action: string }[]>`
    select action from audit_log where subject_id = ${id} order by id`;
  const events = await app.db.point<{ operation: number }[]>`
    select operation from events where resource_id = ${id} order by seq`;
  return { audits: audits.map((row) => row.action), events: events.map((row) => row.operation) };
}

beforeAll(async () => {
  plane = await startTestPlane({ BERTH_AUDIT_RETENTION_DAYS: "400" });
  await liftQuotas(plane);
  app = plane.plane.app;
  replica = await plane.replica();
  ({ runner, classId } = await newRunner());
});

// Its lease is shorter than this file may take on a busy machine.
beforeEach(() => runner.heartbeat());

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

describe("lost runners", () => {
  test("RUN-12: one look calls a runner lost and warns at its environments, told once by two replicas; its return takes it back", async () => {
    const own = await newRunner();
    const [active, stopped] = [await newEnvironment(own.classId), await newEnvironment(own.classId)];
    await own.runner.reportRunning(active);
    await plane.admin.environments.stopEnvironment({ environmentId: stopped.id });
    expect((await readEnvironment(stopped.id)).status?.phase).toBe(EnvironmentPhase.STOPPED);
    const [runnerBefore, activeBefore] = [await toldAbout(own.runner.id), await toldAbout(active.id)];

    await expireLease(own.runner.id);
    await sweepEverywhere("lost runners");
    const { status } = await readRunner(own.runner.id);
    expect(status?.phase).toBe(RunnerPhase.INACTIVE);
    const since = timestampDate(status!.updatedAt!).toISOString();
    const lost = (await readEnvironment(active.id)).status!;
    expect(lost).toMatchObject({
      phase: EnvironmentPhase.RUNNING,
      warningMessage: [`runner unreachable since ${since}`],
      environmentUrls: { ops: expect.stringContaining("ops") },
    });
    expect((await readEnvironment(stopped.id)).status?.warningMessage).toEqual([]);
    const runnerLost = await toldAbout(own.runner.id);
    expect(runnerLost.audits).toEqual([...runnerBefore.audits, "Runner is inactive"]);
    expect(runnerLost.events).toEqual([...runnerBefore.events, ResourceOperation.UPDATE_STATUS]);
    const activeLost = await toldAbout(active.id);
    expect(activeLost.audits).toEqual(activeBefore.audits);
    expect(activeLost.events).toEqual([...activeBefore.events, ResourceOperation.UPDATE_STATUS]);

    await own.runner.heartbeat();
    await sweepEverywhere("lost runners");
    expect((await readEnvironment(active.id)).status?.warningMessage).toEqual([]);
    expect((await toldAbout(active.id)).events).toEqual([...activeLost.events, ResourceOperation.UPDATE_STATUS]);
    expect((await toldAbout(own.runner.id)).audits.at(-1)).toBe("Runner is active");
  });

  test("a look that ended half-way is finished by the next one, in both directions", async () => {
    const own = await newRunner();
    const environments = await newEnvironments(3, own.classId);
    const warnings = async () =>
      (await Promise.all(environments.map(({ id }) => readEnvironment(id)))).map(
        (each) => each.status!.warningMessage.length,
      );
    await expireLease(own.runner.id);
    await sweep("lost runners");
    expect(await warnings()).toEqual([1, 1, 1]);

    // Back: that the environments have to learn it is kept with the heartbeat.
    await own.runner.heartbeat();
    expect(await warnings()).toEqual([1, 1, 1]);
    await sweep("lost runners");
    expect(await warnings()).toEqual([0, 0, 0]);

    // Lost, and the replica dies before any environment has learned it.
    await expireLease(own.runner.id);
    await app.db
      .write`update runners set lost_at = last_contact_at, phase = ${RunnerPhase.INACTIVE} where id = ${own.runner.id}`;
    await sweep("lost runners");
    expect(await warnings()).toEqual([1, 1, 1]);
    await own.runner.heartbeat();
    await sweep("lost runners");
    expect(await warnings()).toEqual([0, 0, 0]);
  });

  test("a runner that is back before its environments were warned leaves no warning behind", async () => {
    const own = await newRunner();
    const environment = await newEnvironment(own.classId);
    await app.db.write`
      update runners set lost_at = date_trunc('milliseconds', now()), phase = ${RunnerPhase.INACTIVE}
      where id = ${own.runner.id}`;
    await own.runner.heartbeat();
    await sweepEverywhere("lost runners");
    expect((await readEnvironment(environment.id)).status?.warningMessage).toEqual([]);
    expect(await app.db.point`select lost_at from runners where id = ${own.runner.id}`).toEqual([{ lost_at: null }]);
  });

  test("heartbeats while the lease is in force cost the environments nothing", async () => {
    const environment = await newEnvironment();
    const before = await toldAbout(environment.id);
    await runner.heartbeat();
    await sweep("lost runners");
    expect(await toldAbout(environment.id)).toEqual(before);
  });
});

test("a runner that was told to go and stays silent for ten minutes is deleted, once, and not before", async () => {
  const own = await newRunner();
  await plane.admin.runners.deleteRunner({ runnerId: own.runner.id });
  await sweepEverywhere("silent deletions");
  expect((await readRunner(own.runner.id)).status?.phase).toBe(RunnerPhase.DELETING);
  plane.advance(10 * MINUTE_MS + 1);
  await sweepEverywhere("silent deletions");
  expect(await codeOf(readRunner(own.runner.id))).toBe("NotFound");
  expect(await codeOf(own.runner.heartbeat())).toBe("Unauthenticated");
  const told = await toldAbout(own.runner.id);
  expect(told.audits.filter((action) => action.startsWith("Runner deleted"))).toHaveLength(1);
  expect(told.events.filter((operation) => operation === ResourceOperation.DELETE)).toHaveLength(1);
});

describe("due environments", () => {
  test("idle environments of several runners stop on time, each told once by two replicas that look at the same time", async () => {
    const other = await newRunner();
    const environments = [...(await newEnvironments(8)), ...(await newEnvironments(8, other.classId))];
    for (const [index, environment] of environments.entries())
      await (index < 8 ? runner : other.runner).reportRunning(environment);
    await sweepEverywhere("due environments");
    for (const { id } of environments)
      expect((await readEnvironment(id)).spec?.desiredPhase).toBe(EnvironmentPhase.RUNNING);

    plane.advance(31 * MINUTE_MS);
    await sweepEverywhere("due environments");
    for (const { id } of environments) {
      const stopped = await readEnvironment(id);
      expect(stopped.spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
      expect(stopped.status?.machine?.timeout).toBe("stopped after 30 minutes without activity");
      const { audits } = await toldAbout(id);
      expect(audits.filter((action) => action === "Environment is stopping")).toHaveLength(1);
    }
  });

  test("an environment that cannot be read does not hold up the others, and is tried again later", async () => {
    const [broken, good] = [await newEnvironment(), await newEnvironment()];
    for (const each of [broken, good]) await runner.reportRunning(each);
    const [row] = await app.db.write<{ status: Uint8Array; due_at: Date }[]>`
      update environments set due_at = due_at - interval '1 minute' where id = ${broken.id} returning status, due_at`;
    await app.db.write`update environments set status = '\\xff' where id = ${broken.id}`;
    plane.advance(31 * MINUTE_MS);
    await sweep("due environments");
    expect((await readEnvironment(good.id)).spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
    const due = await dueEnvironmentIds(app.db.list, app.now(), 100);
    expect(due).not.toContain(broken.id);
    expect(plane.logged()).toContain("part of a sweep failed and will be tried again");

    await app.db.write`update environments set status = ${row!.status} where id = ${broken.id}`;
    plane.advance(2 * MINUTE_MS);
    await sweep("due environments");
    expect((await readEnvironment(broken.id)).spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
  });

  test("a deleted environment stays readable for seven days and is gone then", async () => {
    const environment = await newEnvironment();
    await plane.admin.environments.deleteEnvironment({ environmentId: environment.id, force: true });
    plane.advance(7 * DAY_MS - MINUTE_MS);
    await sweepEverywhere("due environments");
    expect((await readEnvironment(environment.id)).status?.phase).toBe(EnvironmentPhase.DELETED);
    plane.advance(2 * MINUTE_MS);
    await sweepEverywhere("due environments");
    expect(await codeOf(readEnvironment(environment.id))).toBe("NotFound");
  });

  test("due rows are found by their index, however many there are", async () => {
    const { id } = await newEnvironment();
    const columns = await app.db.point<{ name: string }[]>`
      select column_name as name from information_schema.columns
      where table_name = 'environments' and column_name not in ('id', 'due_at')`;
    const names = columns.map((column) => column.name).join(", ");
    await app.db.write.unsafe(`
      insert into environments (id, due_at, ${names})
      select gen_random_uuid(), now() + interval '1 year' + n * interval '1 second', ${names}
      from environments, generate_series(1, 30000) n where id = '${id}'`);
    await app.db.write`analyze environments`;
    const plans: string[] = [];
    const explaining = ((strings: TemplateStringsArray, ...values: never[]) => {
      const [first = "", ...rest] = strings;
      const query = [`explain (analyze, format json) ${first}`, ...rest];
      const template = Object.assign(query, { raw: query }) as unknown as TemplateStringsArray;
      return app.db.list(template, ...values).then((rows) => {
        plans.push(JSON.stringify(rows));
        return [];
      });
    }) as unknown as Sql;
    await dueEnvironmentIds(explaining, app.now(), 50);
    expect(plans).toHaveLength(1);
    expect(plans[0]).toContain('"Index Name":"environments_due"');
    expect(plans[0]).not.toContain("Seq Scan");
    await app.db.write`delete from environments where due_at > now() + interval '300 days'`;
  });
});

describe("retention", () => {
  const count = async (query: PromiseLike<readonly unknown[]>) => (await query).length;

  test("outbox, revisions and abandoned calls go after a day, by two replicas at once", async () => {
    const old = new Date(app.now().getTime() - DAY_MS - MINUTE_MS);
    const recent = new Date(app.now().getTime() - DAY_MS + MINUTE_MS);
    const ids = { [String(old)]: uuidv7(), [String(recent)]: uuidv7() };
    for (const at of [old, recent]) {
      const id = ids[String(at)]!;
      const { organizationId } = plane;
      const operation = ResourceOperation.UPDATE;
      await transact(app, (tx) =>
        record(tx, { organizationId, resourceType: ResourceType.PROJECT, resourceId: id, operation, at }),
      );
      await app.db.write`insert into runner_revisions (runner_id, revision, object_kind, object_id, created_at)
        values (${runner.id}, ${at === old ? 1_000_001 : 1_000_002}, ${ObjectKind.ENVIRONMENT}, ${id}, ${at})`;
      await app.db.write`insert into runner_calls (id, runner_id, call, deadline, created_at)
        values (${id}, ${runner.id}, '', ${at}, ${at})`;
    }
    for (const name of ["old events", "old revisions", "abandoned calls"]) await sweepEverywhere(name);
    for (const [at, id] of Object.entries(ids)) {
      const left = at === String(old) ? 0 : 1;
      expect(await count(app.db.point`select from events where resource_id = ${id}`)).toBe(left);
      expect(await count(app.db.point`select from runner_revisions where object_id = ${id}`)).toBe(left);
      expect(await count(app.db.point`select from runner_calls where id = ${id}`)).toBe(left);
    }
    await app.db.write`delete from runner_revisions where revision > 1000000`;
  });

  test("of the revisions of a runner the newest stay, whatever their age", async () => {
    const own = await newRunner();
    for (let index = 0; index < 5; index++) await newEnvironment(own.classId);
    expect(await trimRevisions(app.db.write, 3, 100)).toBeGreaterThanOrEqual(2);
    const left = await app.db.point<{ revision: number }[]>`
      select revision from runner_revisions where runner_id = ${own.runner.id} order by revision`;
    expect(left.map((row) => row.revision)).toEqual([3, 4, 5]);
    await sweepEverywhere("excess revisions");
  });

  test("expired tokens go a day after their end, and runs of the job on two replicas do not hinder each other", async () => {
    const now = app.now().getTime();
    const add = async (expiresAt: Date) => {
      const id = uuidv7();
      await insertToken(app.db.write, {
        id,
        text: tokenText(TokenKind.LOGS, app.random),
        kind: TokenKind.LOGS,
        organizationId: plane.organizationId,
        subjectId: uuidv7(),
        subjectPrincipal: Principal.USER,
        runnerId: runner.id,
        createdAt: new Date(now),
        expiresAt,
      });
      return id;
    };
    const ended = [];
    for (let index = 0; index < 20; index++) ended.push(await add(new Date(now - DAY_MS - MINUTE_MS)));
    const recent = await add(new Date(now - DAY_MS + MINUTE_MS));
    await sweepEverywhere("expired tokens");
    expect(await app.db.point`select id from tokens where id = any(${[...ended, recent]})`).toEqual([{ id: recent }]);
  });

  test("audit entries go after their retention and never otherwise", async () => {
    const ages = [401, 399];
    const entries = ages.map((days) => ({ days, id: uuidv7({ msecs: app.now().getTime() - days * DAY_MS }) }));
    for (const { id, days } of entries)
      await app.db.write`
        insert into audit_log (id, organization_id, actor_principal, subject_type, kind, action, created_at)
        values (${id}, ${plane.organizationId}, 0, 0, 3, 'something', ${new Date(app.now().getTime() - days * DAY_MS)})`;
    for (const { id } of entries) {
      await expect(app.db.write`delete from audit_log where id = ${id}`).rejects.toThrow("immutable");
      await expect(app.db.write`update audit_log set action = 'x' where id = ${id}`).rejects.toThrow("immutable");
    }
    await sweepEverywhere("old audit entries");
    const left = await app.db.point`select id from audit_log where id = any(${entries.map((each) => each.id)})`;
    expect(left).toEqual([{ id: entries[1]!.id }]);
    await expect(app.db.write`delete from audit_log where id = ${entries[1]!.id}`).rejects.toThrow("immutable");
  });
});
