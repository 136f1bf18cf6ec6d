import { timestampDate } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  type Call,
  Directive,
  IntrospectTokenResponse_Kind as Kind,
  ObjectKind,
  ReportResult_Outcome as Outcome,
  DeregisterRequest_Reason as Reason,
  type WatchResponse,
} from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { type RunnerCapability, RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { PROTOCOL_VERSION } from "../src/domain/runner.ts";
import type { Tx } from "../src/store/db.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { meanwhile } from "./harness/meanwhile.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane } from "./harness/plane.ts";
import { codeOf, refusal } from "./harness/refusal.ts";
import { eventually } from "./harness/wait.ts";

let plane: TestPlane;
let admin: BerthClient;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  admin = plane.admin;
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

/** A runner with a process, not registered yet. */
async function newProcess(on: TestPlane = plane): Promise<FakeRunner> {
  const { runner, exchangeToken } = await on.admin.runners.createRunner({
    name: "test runner",
    provider: RunnerProvider.LINUX_HOST,
  });
  const { accessToken } = await on.admin.identity.exchangeToken({ exchangeToken });
  return Object.assign(new FakeRunner(on.url, accessToken), { id: runner!.runnerId });
}

async function newRunner(on: TestPlane = plane): Promise<{ runner: FakeRunner; classId: string }> {
  const runner = await newProcess(on);
  await runner.register();
  const { id } = await on.admin.runnerConfiguration.createEnvironmentClass({
    runnerId: runner.id,
    displayName: "Standard",
    description: "For tests",
    configuration: [
      { key: "cpu", value: "2" },
      { key: "memory", value: "4096" },
    ],
  });
  return { runner, classId: id };
}

async function newEnvironment(classId: string, client = admin): Promise<Environment> {
  const spec = { machine: { class: classId } };
  return (await client.environments.createEnvironment({ spec })).environment!;
}

const phaseOf = async (runnerId: string) => (await admin.runners.getRunner({ runnerId })).runner!.status!.phase;
const readEnvironment = async (environmentId: string) =>
  (await admin.environments.getEnvironment({ environmentId })).environment!;
const stop = (environment: Environment) => admin.environments.stopEnvironment({ environmentId: environment.id });

/** Lets the lease of a runner run out. */
const expireLease = (runnerId: string) => plane.plane.app.db.write`
  update runners set lease_expires_at = now() - interval '1 second' where id = ${runnerId}`;

async function sweep(name: string, on: TestPlane = plane): Promise<void> {
  await sweeps.find((each) => each.name === name)!.run(on.plane.app);
}

/** Audit entries and events about one resource. */
async function toldAbout(id: string) {
  const { point } = plane.plane.app.db;
  const audits = await point<{ action: string }[]>`select action from audit_log where subject_id = ${id} order by id`;
  const events = await point<
    { operation: number }[]
  >`select operation from events where resource_id = ${id} order by seq`;
  return { audits: audits.map((row) => row.action), events: events.map((row) => row.operation) };
}

type Event = WatchResponse["event"];
const steps = (runner: FakeRunner) => runner.seen.map((event) => event.case);

/** Ids and revisions of the environments that a stream has delivered, in its order. */
const upserts = (events: readonly Event[]) =>
  events.flatMap((event) => {
    if (event.case !== "upsert" || event.value.object.case !== "environment") return [];
    const { environment } = event.value.object.value;
    return [{ id: environment!.id, revision: event.value.revision, goal: environment!.spec!.desiredPhase }];
  });

const removals = (events: readonly Event[]) =>
  events.flatMap((event) => (event.case === "remove" ? [{ id: event.value.id, kind: event.value.kind }] : []));

async function watched(runner: FakeRunner): Promise<bigint> {
  void runner.watch();
  return eventually(() => {
    const end = runner.seen.find((event) => event.case === "snapshotEnd");
    return end?.case === "snapshotEnd" && { revision: end.value.revision };
  }, "the end of the snapshot").then(({ revision }) => revision);
}

const callsOf = (runner: FakeRunner) =>
  runner.seen.flatMap((event): Call[] => (event.case === "call" ? [event.value] : []));
const nextCall = (runner: FakeRunner) => eventually(() => callsOf(runner).at(-1), "a relayed call");

describe("link", () => {
  test("registration starts a link with lease and schema; other protocol versions and wrong facts are refused", async () => {
    await using runner = await newProcess();
    const register = (more: object) =>
      runner.control.register({
        ...{ instanceId: "test", protocolVersion: PROTOCOL_VERSION, maxEnvironments: 1 },
        status: { phase: RunnerPhase.ACTIVE, publicKey: new Uint8Array(32) },
        ...more,
      });
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.INACTIVE);
    for (const protocolVersion of [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1]) {
      const error = await refusal(register({ protocolVersion }));
      expect(error.code).toBe(Code.FailedPrecondition);
      expect(error.rawMessage).toContain(`${PROTOCOL_VERSION} to ${PROTOCOL_VERSION}`);
    }
    for (const status of [
      { phase: RunnerPhase.INACTIVE, publicKey: new Uint8Array(32) },
      { phase: RunnerPhase.ACTIVE, publicKey: new Uint8Array(31) },
    ])
      expect(await codeOf(register({ status }))).toBe("InvalidArgument");
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.INACTIVE);

    const first = await register({});
    expect(first).toMatchObject({ epoch: 1n, lease: { seconds: 30n }, heartbeatInterval: { seconds: 10n } });
    expect(first.runner).toMatchObject({ runnerId: runner.id, status: { phase: RunnerPhase.ACTIVE } });
    expect((await register({})).epoch).toBe(2n);
    expect(
      await codeOf(plane.admin.runners.getRunner({ runnerId: runner.id }).then(() => register({ maxEnvironments: 0 }))),
    ).toBe("InvalidArgument");
  });

  test("RUN-14: of two processes with one credential the newer has the link; every call of the older is ABORTED", async () => {
    const { runner, classId } = await newRunner();
    await using older = runner.twin(plane.url);
    const ended = older.watch();
    await eventually(() => steps(older).includes("snapshotEnd"), "the snapshot");
    await using newer = runner.twin(plane.url);
    await newer.register();
    expect(newer.epoch).toBe(2n);
    expect(await codeOf(older.heartbeat())).toBe("Aborted");
    expect(await codeOf(older.control.reportEnvironments({ linkId: older.linkId, items: [] }))).toBe("Aborted");
    expect(await codeOf(older.control.deregister({ linkId: older.linkId, reason: Reason.STOPPING }))).toBe("Aborted");
    expect(await codeOf(ended)).toBe("Aborted");
    await newer.heartbeat();
    expect((await newEnvironment(classId)).id).not.toBe("");
  });

  test("what a heartbeat says is shown, and told once; a new key is put down", async () => {
    const { runner } = await newRunner();
    const before = await toldAbout(runner.id);
    await runner.heartbeat();
    expect(await toldAbout(runner.id)).toEqual(before);
    const status = { phase: RunnerPhase.DEGRADED, message: "disk nearly full", capabilities: [99 as RunnerCapability] };
    await runner.heartbeat(status);
    await runner.heartbeat(status);
    expect((await admin.runners.getRunner({ runnerId: runner.id })).runner?.status).toMatchObject(status);
    await runner.heartbeat({ ...status, publicKey: new Uint8Array(32).fill(1) });
    const after = await toldAbout(runner.id);
    expect(after.audits.slice(before.audits.length)).toEqual(["Runner is degraded", "Runner has a new public key"]);
    expect(after.events.slice(before.events.length)).toEqual([
      ResourceOperation.UPDATE_STATUS,
      ResourceOperation.UPDATE_STATUS,
    ]);
    expect(await codeOf(runner.heartbeat({ phase: RunnerPhase.CREATED }))).toBe("InvalidArgument");
  });

  test("RUN-12, RUN-13: without heartbeats the runner is INACTIVE, told once; intent is kept; a late heartbeat brings it back", async () => {
    const { runner, classId } = await newRunner();
    const environment = await newEnvironment(classId);
    await runner.reportRunning(environment);
    const usable = async () => {
      const filter = { runnerIds: [runner.id], canCreateEnvironments: true };
      return (await admin.environments.listEnvironmentClasses({ filter })).environmentClasses.length;
    };
    expect(await usable()).toBe(1);
    const before = await toldAbout(runner.id);
    await expireLease(runner.id);
    await sweep("lost runners");
    const lost = (await admin.runners.getRunner({ runnerId: runner.id })).runner!.status!;
    expect(lost.phase).toBe(RunnerPhase.INACTIVE);
    expect(lost.message).toBe(`no contact since ${timestampDate(lost.updatedAt!).toISOString()}`);
    const after = await toldAbout(runner.id);
    expect(after.audits.slice(before.audits.length)).toEqual(["Runner is inactive"]);
    expect(after.events.slice(before.events.length)).toEqual([ResourceOperation.UPDATE_STATUS]);

    expect(await usable()).toBe(0);
    expect((await refusal(newEnvironment(classId))).rawMessage).toBe("runner is not connected");
    await stop(environment);
    const stopping = await readEnvironment(environment.id);
    expect(stopping.spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
    expect(stopping.status?.warningMessage.join()).toMatch(/runner unreachable since/);

    await runner.heartbeat();
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.ACTIVE);
    expect(await usable()).toBe(1);
    await sweep("lost runners");
    expect((await readEnvironment(environment.id)).status?.warningMessage).toEqual([]);
  });

  test("a process that stops says so: INACTIVE at once, its environments stay as they are", async () => {
    const { runner, classId } = await newRunner();
    const environment = await newEnvironment(classId);
    await runner.reportRunning(environment);
    await runner.control.deregister({ linkId: runner.linkId, reason: Reason.STOPPING });
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.INACTIVE);
    expect((await readEnvironment(environment.id)).status?.phase).toBe(EnvironmentPhase.RUNNING);
    await runner.register();
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.ACTIVE);
    const wrong = runner.control.deregister({ linkId: runner.linkId, reason: Reason.UNSPECIFIED });
    expect(await codeOf(wrong)).toBe("InvalidArgument");
  });

  test("a runner that is deleted is told to shut down, confirms, and is gone; one deleted by force is told before its stream ends", async () => {
    const { runner } = await newRunner();
    await using process = runner;
    await watched(process);
    await admin.runners.deleteRunner({ runnerId: process.id });
    const told = (of: FakeRunner) =>
      eventually(
        () => of.seen.some((event) => event.case === "directive" && event.value === Directive.SHUTDOWN),
        "the directive to shut down",
      );
    await told(process);
    expect((await process.heartbeat()).directive).toBe(Directive.SHUTDOWN);
    expect(await phaseOf(process.id)).toBe(RunnerPhase.DELETING);
    await process.control.deregister({ linkId: process.linkId, reason: Reason.DELETED });
    expect(await codeOf(phaseOf(process.id))).toBe("NotFound");
    expect(await codeOf(process.heartbeat())).toBe("Unauthenticated");

    await using forced = (await newRunner()).runner;
    const ended = forced.watch();
    await eventually(() => steps(forced).includes("snapshotEnd"), "the snapshot");
    await admin.runners.deleteRunner({ runnerId: forced.id, force: true });
    expect(await codeOf(ended)).toBe("Unauthenticated");
    await told(forced);
  });

  test("only a runner that is being deleted can confirm that", async () => {
    const { runner } = await newRunner();
    await runner.control.deregister({ linkId: runner.linkId, reason: Reason.DELETED });
    expect(await phaseOf(runner.id)).toBe(RunnerPhase.INACTIVE);
  });

  test("nobody but a runner may call", async () => {
    const { runner } = await newRunner();
    await using stranger = new FakeRunner(plane.url, plane.adminToken);
    stranger.linkId = runner.linkId;
    expect(await codeOf(stranger.heartbeat())).toBe("PermissionDenied");
    await using nobody = new FakeRunner(plane.url, "");
    nobody.linkId = runner.linkId;
    expect(await codeOf(nobody.heartbeat())).toBe("Unauthenticated");
  });
});

describe("desired state", () => {
  test("the first environment of a runner reaches a stream that began before it", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    expect(await watched(process)).toBe(0n);
    const environment = await newEnvironment(classId);
    const desired = await process.desired(environment.id);
    expect(desired.spec).toMatchObject({ desiredPhase: EnvironmentPhase.RUNNING, machine: { class: classId } });
    // The runner and its organization's policies.
    const begun = ["snapshotBegin", "upsert", "upsert", "snapshotEnd", "bookmark"];
    expect(steps(process).slice(0, 5)).toEqual(begun);
    const upsert = process.seen.findLast((event) => event.case === "upsert");
    expect(
      upsert?.case === "upsert" && upsert.value.object.case === "environment" && upsert.value.object.value,
    ).toMatchObject({
      environmentClass: { id: classId },
    });
  });

  test("RUN-15: changes made on another replica arrive in order, come again after a reconnect, and a cut log means a snapshot", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    const replica = await plane.replica();
    const there = createBerthClient({ baseUrl: replica.server.url, token: plane.adminToken });
    const environments = [];
    for (let index = 0; index < 3; index++) environments.push(await newEnvironment(classId));
    const resume = await watched(process);
    expect(resume).toBe(3n);
    expect(upserts(process.seen).map((each) => each.id)).toEqual(environments.map((each) => each.id));

    const inOrder = [environments[2]!, environments[0]!, environments[1]!];
    for (const environment of inOrder) await there.environments.stopEnvironment({ environmentId: environment.id });
    const expected = inOrder.map((each, index) => ({
      id: each.id,
      revision: BigInt(4 + index),
      goal: EnvironmentPhase.STOPPED,
    }));
    const fresh = (of: FakeRunner) => upserts(of.seen).filter((each) => each.revision > resume);
    await eventually(() => fresh(process).length === 3, "three changes");
    expect(fresh(process)).toEqual(expected);

    await using again = process.twin(replica.server.url);
    void again.watch(resume);
    await eventually(() => fresh(again).length === 3, "the same changes");
    expect(fresh(again)).toEqual(expected);
    expect(steps(again)).not.toContain("snapshotBegin");

    await using ahead = process.twin(plane.url);
    void ahead.watch(9_223_372_036_854_775_807n);
    await eventually(() => steps(ahead).includes("snapshotEnd"), "a snapshot for a revision from nowhere");

    await plane.plane.app.db.write`delete from runner_revisions where runner_id = ${process.id} and revision <= 5`;
    await using late = process.twin(plane.url);
    void late.watch(resume);
    await eventually(() => steps(late).includes("snapshotEnd"), "a snapshot");
    expect(steps(late)[0]).toBe("snapshotBegin");
    expect(new Set(upserts(late.seen).map((each) => each.goal))).toEqual(new Set([EnvironmentPhase.STOPPED]));
  });

  test("RUN-17: when a replica dies in mid-stream, the runner goes on at another one and has missed nothing", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    const replica = await plane.replica();
    await using victim = process.twin(replica.server.url);
    const ended = victim.watch();
    await eventually(() => steps(victim).includes("snapshotEnd"), "the snapshot");
    const first = await newEnvironment(classId);
    await victim.desired(first.id);
    const resume = upserts(victim.seen).at(-1)!.revision;
    await replica.server.close();
    await refusal(ended);
    const [second, third] = [await newEnvironment(classId), await newEnvironment(classId)];
    await stop(first);

    await using heir = process.twin(plane.url);
    void heir.watch(resume);
    await heir.desired(first.id, (environment) => environment.spec?.desiredPhase === EnvironmentPhase.STOPPED);
    const seen = upserts(heir.seen);
    expect(seen.map((each) => each.id)).toEqual([second.id, third.id, first.id]);
    expect(seen.map((each) => each.revision)).toEqual([resume + 1n, resume + 2n, resume + 3n]);
    await heir.heartbeat();
    expect((await toldAbout(process.id)).audits.filter((action) => action === "Runner is inactive")).toEqual([]);
  });

  test("RUN-19: a snapshot names what was deleted of the things a runner holds, shows the rest, and says nothing of strangers", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    const [kept, gone] = [await newEnvironment(classId), await newEnvironment(classId)];
    await admin.environments.deleteEnvironment({ environmentId: gone.id, force: true });
    const other = await newRunner();
    const foreign = await newEnvironment(other.classId);
    await admin.environments.deleteEnvironment({ environmentId: foreign.id, force: true });
    const stranger = "018f2f30-7b2e-7cc0-8000-000000000001";
    await process.register({ localEnvironmentIds: [kept.id, gone.id, foreign.id, stranger] });
    await watched(process);
    expect(upserts(process.seen).map((each) => each.id)).toEqual([kept.id]);
    expect(removals(process.seen)).toEqual([{ id: gone.id, kind: ObjectKind.ENVIRONMENT }]);
    const [begin] = process.seen;
    expect(begin?.case === "snapshotBegin" && begin.value.controlPlaneId).toBe(plane.plane.app.controlPlaneId);

    await admin.environments.deleteEnvironment({ environmentId: kept.id, force: true });
    await eventually(() => removals(process.seen).some((each) => each.id === kept.id), "the removal");
  });

  test("more environments than a page holds are all in the snapshot, and more changes than a page in the deltas", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    const { id } = await newEnvironment(classId);
    const { db } = plane.plane.app;
    // Copies of a row that the product has written; the id inside of the messages is the column's.
    await db.write`
      insert into environments select (rows.copy).* from (
        select jsonb_populate_record(e, jsonb_build_object('id', gen_random_uuid())) as copy
        from environments e, generate_series(1, 250) where e.id = ${id}
      ) rows`;
    const resume = await watched(process);
    expect(new Set(upserts(process.seen).map((each) => each.id)).size).toBe(251);
    await db.write`
      with head as (update runners set head_revision = head_revision + 251 where id = ${process.id} returning head_revision - 251 as base)
      insert into runner_revisions (runner_id, revision, object_kind, object_id, created_at)
      select ${process.id}, head.base + row_number() over (order by id), ${ObjectKind.ENVIRONMENT}, id, now()
      from environments, head where runner_id = ${process.id}`;
    await using again = process.twin(plane.url);
    void again.watch(resume);
    await eventually(() => upserts(again.seen).length === 251, "all changes");
    expect(upserts(again.seen).map((each) => each.revision)).toEqual(
      Array.from({ length: 251 }, (_, index) => resume + BigInt(index + 1)),
    );
  });

  test("a stream ends with UNAVAILABLE when its replica drains, and with UNAUTHENTICATED when its token is gone", async () => {
    await using short = await startTestPlane({}, { credentialCheckMs: 100 });
    const { runner } = await newRunner(short);
    await using process = runner;
    const replica = await short.replica();
    await using there = process.twin(replica.server.url);
    const drained = there.watch();
    const revoked = process.watch();
    await eventually(() => steps(there).includes("snapshotEnd") && steps(process).includes("snapshotEnd"), "snapshots");
    await replica.stop();
    expect(await codeOf(drained)).toBe("Unavailable");
    await short.plane.app.db.write`delete from tokens where subject_id = ${process.id}`;
    expect(await codeOf(revoked)).toBe("Unauthenticated");
  });
});

describe("reports", () => {
  test("RUN-16: old reports are stale, equal ones change nothing, impossible ones are rejected", async () => {
    const { runner, classId } = await newRunner();
    const environment = await newEnvironment(classId);
    const running = runningStatus(environment);
    const first = await runner.report(environment.id, running, 5n);
    expect(first).toMatchObject({ outcome: Outcome.OK, environmentId: environment.id });
    const told = await toldAbout(environment.id);

    const stopped = { ...running, machine: { ...running.machine, phase: MachinePhase.STOPPED } };
    for (const seq of [5n, 4n])
      expect(await runner.report(environment.id, stopped, seq)).toMatchObject({
        outcome: Outcome.STALE,
        statusVersion: first.statusVersion,
      });
    expect(await runner.report(environment.id, running, 8n)).toMatchObject({
      outcome: Outcome.OK,
      statusVersion: first.statusVersion,
    });
    // The equal one counts in the order.
    expect((await runner.report(environment.id, stopped, 7n)).outcome).toBe(Outcome.STALE);
    const ahead = { ...running, runnerAck: { ...running.runnerAck, specVersion: running.runnerAck.specVersion + 1n } };
    expect((await runner.report(environment.id, ahead, 9n)).outcome).toBe(Outcome.REJECTED);
    const deleted = { ...running, machine: { ...running.machine, phase: MachinePhase.DELETED } };
    expect((await runner.report(environment.id, deleted, 10n)).outcome).toBe(Outcome.REJECTED);
    expect(await toldAbout(environment.id)).toEqual(told);

    // A new process counts from one again, and what the old one still sends is older.
    await runner.register();
    const moved = await runner.report(environment.id, stopped, 1n);
    expect(moved.outcome).toBe(Outcome.OK);
    expect(moved.statusVersion).toBeGreaterThan(first.statusVersion);
  });

  test("a report is judged by what is there when it is written, not by what was read for it", async () => {
    const { runner, classId } = await newRunner();
    const environment = await newEnvironment(classId);
    const running = runningStatus(environment);
    const { statusVersion } = await runner.report(environment.id, running, 1n);
    const { db } = plane.plane.app;
    const hold = (tx: Tx) => tx`select from environments where id = ${environment.id} for update`;
    const moved = { ...running, environmentUrls: { ...running.environmentUrls, ops: "https://ops.example.org/2" } };
    const late = await meanwhile(
      db,
      hold,
      (tx) => tx`update environments set report_seq = 3 where id = ${environment.id}`,
      () => runner.report(environment.id, moved, 2n),
    );
    expect(late).toMatchObject({ outcome: Outcome.STALE, statusVersion });

    const told = await toldAbout(environment.id);
    const good = await meanwhile(
      db,
      hold,
      (tx) => tx`update environments set due_at = null where id = ${environment.id}`,
      () => runner.report(environment.id, moved, 4n),
    );
    expect(good).toMatchObject({ outcome: Outcome.OK, statusVersion: statusVersion + 1n });
    expect((await readEnvironment(environment.id)).status?.environmentUrls?.ops).toBe("https://ops.example.org/2");
    expect((await toldAbout(environment.id)).events).toHaveLength(told.events.length + 1);
  });

  test("each report of a batch is judged for itself", async () => {
    const { runner, classId } = await newRunner();
    const other = await newRunner();
    const foreign = await newEnvironment(other.classId);
    const [good, gone, broken] = [
      await newEnvironment(classId),
      await newEnvironment(classId),
      await newEnvironment(classId),
    ];
    await admin.environments.deleteEnvironment({ environmentId: gone.id, force: true });
    const report = (environment: Environment, status = runningStatus(environment), seq = 1n) => ({
      ...{ environmentId: environment.id, seq, status },
    });
    const unstorable = {
      ...runningStatus(broken),
      content: { ...runningStatus(broken).content, git: { branch: "a\0b" } },
    };
    const { results } = await runner.control.reportEnvironments({
      linkId: runner.linkId,
      items: [
        report(foreign),
        report(gone),
        report({ ...good, id: "018f2f30-7b2e-7cc0-8000-000000000001" }),
        report(broken, runningStatus(broken), 9_223_372_036_854_775_807n),
        report(broken, unstorable),
        report(good),
      ],
    });
    expect(results.map((each) => each.outcome)).toEqual([
      Outcome.NOT_ASSIGNED,
      Outcome.NOT_ASSIGNED,
      Outcome.NOT_ASSIGNED,
      Outcome.REJECTED,
      Outcome.REJECTED,
      Outcome.OK,
    ]);
    expect((await readEnvironment(good.id)).status?.phase).toBe(EnvironmentPhase.RUNNING);
    expect((await readEnvironment(foreign.id)).status?.phase).toBe(EnvironmentPhase.CREATING);
  });
});

describe("tokens", () => {
  test("the token of a start opens the environment's own API, for this start and this runner only", async () => {
    const { runner, classId } = await newRunner();
    const environment = await newEnvironment(classId);
    const machineSession = environment.spec!.machine!.session;
    const issue = (of: FakeRunner, session = machineSession) =>
      of.control.createEnvironmentToken({ environmentId: environment.id, machineSession: session });
    expect(await codeOf(issue(runner, "another"))).toBe("FailedPrecondition");
    expect(await codeOf(issue((await newRunner()).runner))).toBe("NotFound");
    const { token: first } = await issue(runner);
    const { token: second } = await issue(runner);
    const who = async (token: string) => (await plane.client(token).identity.getAuthenticatedIdentity({})).subject;
    expect(await codeOf(who(first))).toBe("Unauthenticated");
    expect(await who(second)).toMatchObject({ id: environment.id, principal: Principal.ENVIRONMENT });
    await stop(environment);
    expect(await codeOf(issue(runner))).toBe("FailedPrecondition");
    expect(plane.logged()).not.toContain(second);
  });

  test("RUN-45: tokens open what they were made for on their runner, until they end or their owner may not enter any more", async () => {
    await using own = await startTestPlane();
    const { runner, classId } = await newRunner(own);
    const other = await newRunner(own);
    await shareRunner(own, runner.id);
    const user = await own.addUser();
    const environment = await newEnvironment(classId, user.client);
    const environmentId = environment.id;
    const machineSession = environment.spec!.machine!.session;
    const { token: ownToken } = await runner.control.createEnvironmentToken({ environmentId, machineSession });
    const { accessToken: access } = await user.client.environments.createEnvironmentAccessToken({ environmentId });
    const { accessToken: logs } = await user.client.environments.createEnvironmentLogsToken({ environmentId });

    const check = (token: string, by = runner) => by.control.introspectToken({ token });
    expect(await check(access)).toMatchObject({
      ...{ active: true, kind: Kind.ENVIRONMENT_ACCESS, environmentId },
      subject: { id: user.id, principal: Principal.USER },
    });
    expect(await check(logs)).toMatchObject({ active: true, kind: Kind.ENVIRONMENT_LOGS, environmentId });
    expect(await check(ownToken)).toMatchObject({ active: true, kind: Kind.ENVIRONMENT, environmentId });
    for (const token of [access, logs, ownToken]) {
      expect(await check(token, other.runner)).toMatchObject({
        active: false,
        kind: Kind.UNSPECIFIED,
        environmentId: "",
      });
    }
    for (const token of [user.token, own.adminToken, runner.token, "berth_eat_junk", "junk"])
      expect((await check(token)).active).toBe(false);

    const setStatus = (status: UserStatus) =>
      own.plane.app.db.write`update users set status = ${status} where id = ${user.id}`;
    await setStatus(UserStatus.SUSPENDED);
    expect([(await check(access)).active, (await check(logs)).active]).toEqual([false, false]);
    await setStatus(UserStatus.ACTIVE);
    expect((await check(access)).active).toBe(true);
    own.advance(61 * 60_000);
    expect([(await check(access)).active, (await check(logs)).active]).toEqual([false, false]);
    expect((await check(ownToken)).active).toBe(true);
    await own.admin.environments.deleteEnvironment({ environmentId, force: true });
    expect((await check(ownToken)).active).toBe(false);
  });
});

describe("relayed calls", () => {
  const contextUrl = "https://git.example.org/team/app";

  test("the runner answers; what it cannot know is added here, and later answers are ignored", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    await watched(process);
    const asked = admin.runners.parseContextURL({ contextUrl, runnerId: process.id });
    const call = await nextCall(process);
    expect(call).toMatchObject({
      request: { case: "parseContext", value: { contextUrl } },
      subject: { principal: Principal.USER },
    });
    const left = timestampDate(call.deadline!).getTime() - Date.now();
    expect(left).toBeGreaterThan(0);
    expect(left).toBeLessThanOrEqual(30_000);
    const response = {
      git: { cloneUrl: `${contextUrl}.git`, branch: "main" },
      scmId: "git",
      originalContextUrl: "something else",
      projectIds: ["018f2f30-7b2e-7cc0-8000-000000000001"],
      recommendedEnvironmentClasses: ["018f2f30-7b2e-7cc0-8000-000000000002"],
    };
    const complete = () =>
      process.control.completeCall({ callId: call.callId, outcome: { case: "parseContext", value: { response } } });
    // An answer by somebody else does not count.
    const stranger = (await newRunner()).runner;
    const failure = { case: "failure" as const, value: { code: Code.NotFound, message: "no" } };
    await stranger.control.completeCall({ callId: call.callId, outcome: failure });
    await complete();
    const answer = await asked;
    expect(answer).toMatchObject({ git: response.git, scmId: "git", originalContextUrl: contextUrl, projectIds: [] });
    expect(answer.recommendedEnvironmentClasses).toEqual([classId]);
    await complete();
    expect(await plane.plane.app.db.point`select id from runner_calls where id = ${call.callId}`).toEqual([]);
  });

  test("a failure keeps its code and text; one that means nothing to callers is UNAVAILABLE", async () => {
    const { runner } = await newRunner();
    await using process = runner;
    await watched(process);
    const outcomes = [
      [Code.NotFound, "NotFound"],
      [Code.InvalidArgument, "InvalidArgument"],
      [Code.PermissionDenied, "PermissionDenied"],
      [Code.ResourceExhausted, "ResourceExhausted"],
      [Code.Internal, "Unavailable"],
    ] as const;
    for (const [code, expected] of outcomes) {
      const before = callsOf(process).length;
      const asked = refusal(admin.runners.parseContextURL({ contextUrl, runnerId: process.id }));
      const call = await eventually(() => callsOf(process)[before], "a relayed call");
      const outcome = { case: "failure" as const, value: { code, message: "the text" } };
      await process.control.completeCall({ callId: call.callId, outcome });
      const error = await asked;
      expect(Code[error.code]).toBe(expected);
      expect(error.rawMessage).toContain("the text");
    }
  });

  test("a runner that does not answer costs its share of the time; the next one is asked", async () => {
    await using short = await startTestPlane({}, { runnerCallMs: 1000 });
    const { runner: second } = await newRunner(short);
    const { runner: first } = await newRunner(short);
    await using silent = first;
    await using answering = second;
    await watched(silent);
    await watched(answering);
    const error = await refusal(short.admin.runners.parseContextURL({ contextUrl, runnerId: silent.id }));
    expect(error.code).toBe(Code.DeadlineExceeded);
    expect(await short.plane.app.db.point`select id from runner_calls`).toEqual([]);
    const [expired] = callsOf(silent);
    const late = {
      callId: expired!.callId,
      outcome: { case: "failure" as const, value: { code: 5, message: "late" } },
    };
    await silent.control.completeCall(late);

    const asked = short.admin.runners.parseContextURL({ contextUrl });
    const call = await nextCall(answering);
    expect(callsOf(silent)).toHaveLength(2);
    const value = { response: { git: { cloneUrl: "https://git.example.org/a.git" } } };
    await answering.control.completeCall({ callId: call.callId, outcome: { case: "parseContext", value } });
    expect((await asked).git?.cloneUrl).toBe("https://git.example.org/a.git");
  });

  test("the question goes to the replica that holds the stream, the answer comes back, and a new stream asks again", async () => {
    const { runner } = await newRunner();
    const replica = await plane.replica();
    await using there = runner.twin(replica.server.url);
    await watched(there);
    const asked = admin.runners.parseContextURL({ contextUrl, runnerId: runner.id });
    const call = await nextCall(there);
    await using again = runner.twin(plane.url);
    await watched(again);
    expect((await nextCall(again)).callId).toBe(call.callId);
    const value = { response: { git: { cloneUrl: "https://git.example.org/b.git" } } };
    await there.control.completeCall({ callId: call.callId, outcome: { case: "parseContext", value } });
    expect((await asked).git?.cloneUrl).toBe("https://git.example.org/b.git");
  });

  test("an environment asks its own runner, for its creator", async () => {
    const { runner, classId } = await newRunner();
    await using process = runner;
    await watched(process);
    await shareRunner(plane, process.id);
    const user = await plane.addUser();
    const environment = await newEnvironment(classId, user.client);
    const { token } = await process.control.createEnvironmentToken({
      environmentId: environment.id,
      machineSession: environment.spec!.machine!.session,
    });
    const inside = plane.client(token);
    const asked = inside.runners.parseContextURL({ contextUrl });
    const call = await nextCall(process);
    expect(call.subject).toMatchObject({ id: user.id, principal: Principal.USER });
    const value = {
      response: { git: { cloneUrl: "https://git.example.org/c.git" }, recommendedEnvironmentClasses: ["x"] },
    };
    await process.control.completeCall({ callId: call.callId, outcome: { case: "parseContext", value } });
    expect(await asked).toMatchObject({
      git: { cloneUrl: "https://git.example.org/c.git" },
      recommendedEnvironmentClasses: [],
    });
    const other = await newRunner();
    const foreign = inside.runners.parseContextURL({ contextUrl, runnerId: other.runner.id });
    expect(await codeOf(foreign)).toBe("NotFound");
  });

  test("a caller that goes away leaves no question behind", async () => {
    const { runner } = await newRunner();
    await using process = runner;
    await watched(process);
    const gone = admin.runners.parseContextURL({ contextUrl, runnerId: process.id }, { timeoutMs: 300 });
    expect(await codeOf(gone)).toBe("DeadlineExceeded");
    const open = () => plane.plane.app.db.point`select id from runner_calls where runner_id = ${process.id}`;
    await eventually(async () => (await open()).length === 0, "the end of the question");
  });

  test("using a runner for this needs the role USER on it", async () => {
    const { runner } = await newRunner();
    const user = await plane.addUser();
    const parse = () => user.client.runners.parseContextURL({ contextUrl, runnerId: runner.id });
    expect(await codeOf(parse())).toBe("NotFound");
  });
});
