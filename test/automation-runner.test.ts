import { toBinary } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  ObjectKind,
  ReportResult_Outcome as Outcome,
  type WatchResponse,
} from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  type Service,
  ServicePhase,
  type TaskExecution,
  TaskExecutionPhase,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentMetadataSchema,
  EnvironmentRole,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerCapability } from "../gen/gitpod/v1/runner_pb.js";
import type { BerthClient } from "../src/client.ts";
import { MAX_UNFINISHED_EXECUTIONS } from "../src/domain/automation.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import {
  executionsOf,
  newEnvironment,
  newService,
  newTask,
  readExecution,
  readService,
  runningEnvironment,
  type Stage,
  setStage,
  settledStatus,
  startTask,
  traces,
  trigger,
} from "./harness/automations.ts";
import { getEnvironment } from "./harness/environments.ts";
import { FakeRunner } from "./harness/fake-runner.ts";
import { codeOf } from "./harness/refusal.ts";
import { connectRunner } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { STARTING, RUNNING, STOPPING, STOPPED, FAILED, DELETED } = ServicePhase;
const { OK, STALE, REJECTED, NOT_ASSIGNED } = Outcome;
const Phase = TaskExecutionPhase;
const DAY_MS = 24 * 60 * 60_000;

let stage: Stage;
let client: BerthClient;
let environment: Environment;

beforeAll(async () => {
  stage = await setStage();
  client = stage.member.client;
  environment = await runningEnvironment(stage);
});

afterAll(async () => {
  expect(stage.plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await stage[Symbol.asyncDispose]();
});

const api = () => client.environmentAutomation;
const stepIds = ({ spec }: TaskExecution) => spec!.plan.flatMap(({ steps }) => steps).map(({ id }) => id);
const running = (execution: TaskExecution) => ({
  phase: Phase.RUNNING,
  steps: [{ id: stepIds(execution)[0]!, phase: Phase.RUNNING }],
});

/** A service that runs, as its runner has reported. */
async function runningService(environmentId: string, reference: string): Promise<Service> {
  const { id, spec } = await newService(client, environmentId, reference, { desiredPhase: RUNNING });
  expect((await stage.runner.reportService(id, { session: spec?.session ?? "", phase: RUNNING })).outcome).toBe(OK);
  return readService(client, id);
}

async function runningTask(environmentId: string, reference: string): Promise<TaskExecution> {
  const execution = await startTask(client, await newTask(client, environmentId, reference));
  expect((await stage.runner.reportExecution(execution.id, running(execution))).outcome).toBe(OK);
  return execution;
}

/** Kinds and ids of the parts that a stream has delivered, in its order. */
const delivered = (events: readonly WatchResponse["event"][]) =>
  events.flatMap((event) => {
    if (event.case === "remove") return [`-${ObjectKind[event.value.kind]} ${event.value.id}`];
    if (event.case !== "upsert") return [];
    const { object } = event.value;
    if (object.case === "environment") return [`ENVIRONMENT ${object.value.environment?.id}`];
    if (object.case === "service") return [`SERVICE ${object.value.service?.id}`];
    return object.case === "taskExecution" ? [`TASK_EXECUTION ${object.value.taskExecution?.id}`] : [];
  });

const revisionOf = (event: WatchResponse["event"]) =>
  event.case === "snapshotEnd" || event.case === "bookmark" ? event.value.revision : 0n;

describe("what a runner is told", () => {
  test("a snapshot tells environments, then their services, then executions that have not ended", async () => {
    const own = await runningEnvironment(stage);
    const service = await newService(client, own.id, "told");
    const task = await newTask(client, own.id, "told");
    const [ended, open] = [await startTask(client, task), await startTask(client, task)];
    await api().stopTaskExecution({ id: ended.id });
    await using twin = stage.runner.twin(stage.plane.url);
    void twin.watch();
    await eventually(() => twin.seen.some(({ case: step }) => step === "snapshotEnd"), "the snapshot");
    const told = delivered(twin.seen);
    const places = [`ENVIRONMENT ${own.id}`, `SERVICE ${service.id}`, `TASK_EXECUTION ${open.id}`].map((each) =>
      told.indexOf(each),
    );
    expect(places).not.toContain(-1);
    expect(places).toEqual([...places].sort((left, right) => left - right));
    expect(told).not.toContain(`TASK_EXECUTION ${ended.id}`);
  });

  test("changes come in order, each object after what it lies in, however often that has changed since", async () => {
    await using before = stage.runner.twin(stage.plane.url);
    void before.watch();
    const resume = await eventually(
      () => before.seen.map(revisionOf).find((revision) => revision > 0n),
      "the end of the snapshot",
    );
    const own = await newEnvironment(stage);
    const service = await newService(client, own.id, "ordered", { desiredPhase: RUNNING });
    const gone = await newService(client, own.id, "gone");
    const execution = await startTask(client, await newTask(client, own.id, "ordered", [service]));
    await api().deleteService({ id: gone.id, force: true });
    // The environment changes last, and still has to come first.
    await client.environments.updateEnvironment({
      environmentId: own.id,
      spec: { content: { gitUsername: "Somebody" } },
    });
    await using after = stage.runner.twin(stage.plane.url);
    void after.watch(resume);
    await eventually(() => delivered(after.seen).some((each) => each.includes(execution.id)), "the changes");
    expect(delivered(after.seen)).toEqual([
      ...[`ENVIRONMENT ${own.id}`, `SERVICE ${service.id}`, `-SERVICE ${gone.id}`, `TASK_EXECUTION ${execution.id}`],
    ]);
    const head = await eventually(() => after.seen.map(revisionOf).find((revision) => revision > 0n), "a bookmark");
    expect(head).toBeGreaterThanOrEqual(resume + 6n);
    const { startedBy } = await after.desiredService(service.id);
    expect(startedBy).toBe("manual");
  });
});

describe("secrets that variables name", () => {
  test("AUT-36 their values reach the runner while something needs them, and no longer than they exist", async () => {
    // Those that the environment has anyway are given without being named: these are behind others of the same name.
    const make = async (name: string) => {
      const mount = { case: "apiOnly" as const, value: true };
      const userScope = { scope: { case: "userId" as const, value: stage.member.id } };
      await client.secrets.createSecret({ name, value: "another", scope: userScope, mount });
      const scope = { scope: { case: "organizationId" as const, value: stage.plane.organizationId } };
      return (await stage.plane.admin.secrets.createSecret({ name, value: `value of ${name}`, scope, mount })).secret!
        .id;
    };
    const [used, planned, gone, unused] = [
      await make("USED"),
      await make("PLANNED"),
      await make("GONE"),
      await make("UNUSED"),
    ];
    const own = await runningEnvironment(stage);
    const variable = (id: string) => ({
      name: `V${id.replaceAll("-", "")}`,
      source: {
        case: "valueFrom" as const,
        value: { source: { case: "secretRef" as const, value: { id } } },
      },
    });
    await newService(client, own.id, "secretive", { env: [variable(used), variable(gone)] });
    const task = await newTask(client, own.id, "secretive", [], { env: [variable(planned)] });
    const ask = async (...secretIds: string[]) => {
      const { secrets } = await stage.runner.control.getEnvironmentSecrets({ environmentId: own.id, secretIds });
      return secrets.map(({ value }) => value).sort();
    };
    expect(await codeOf(ask(planned))).toBe("NotFound");
    const execution = await startTask(client, task);
    expect(await ask(used, planned)).toEqual(["value of PLANNED", "value of USED"]);
    expect(await codeOf(ask(unused))).toBe("NotFound");
    await stage.plane.admin.secrets.deleteSecret({ secretId: gone });
    expect(await ask(used, gone)).toEqual(["value of USED"]);
    await api().stopTaskExecution({ id: execution.id });
    expect(await codeOf(ask(planned))).toBe("NotFound");
  });
});

describe("reports about services", () => {
  test("AUT-43 they are taken in the order of epoch and number, and what says nothing new is no news", async () => {
    const { id, spec } = await newService(client, environment.id, "counted", { desiredPhase: RUNNING });
    const session = spec?.session ?? "";
    const report = (phase: ServicePhase, seq: bigint, by = stage.runner) =>
      by.reportService(id, { session, phase }, seq);
    expect(await report(STARTING, 1000n)).toMatchObject({ id, outcome: OK, statusVersion: 2n });
    expect(await report(RUNNING, 1000n)).toMatchObject({ outcome: STALE, statusVersion: 2n });
    expect(await report(RUNNING, 999n)).toMatchObject({ outcome: STALE });
    expect(await report(STARTING, 1001n)).toMatchObject({ outcome: OK, statusVersion: 2n });
    expect(await report(RUNNING, 1001n)).toMatchObject({ outcome: STALE });
    expect(await report(RUNNING, 1002n)).toMatchObject({ outcome: OK, statusVersion: 3n });
    expect(await report(STARTING, 1003n)).toMatchObject({ outcome: REJECTED, statusVersion: 3n });
    // A rejected report leaves no mark.
    expect(await report(STOPPED, 1003n)).toMatchObject({ outcome: OK, statusVersion: 4n });
    expect(await traces(stage, id)).toEqual({
      events: ["CREATE", "UPDATE_STATUS", "UPDATE_STATUS", "UPDATE_STATUS"],
      actions: ["Service created", "Service is starting", "Service is running", "Service is stopped"],
    });
    // Another process of the runner counts anew.
    await stage.runner.register({ maxEnvironments: 10_000 });
    void stage.runner.watch();
    await api().startService({ id });
    const next = (await readService(client, id)).spec?.session ?? "";
    expect(await stage.runner.reportService(id, { session: next, phase: STARTING }, 1n)).toMatchObject({ outcome: OK });
  });

  test("a status that changes no phase is an event and no audit entry; messages and outputs are bounded", async () => {
    const service = await runningService(environment.id, "bounded");
    const session = service.spec?.session ?? "";
    const report = (more: object) => stage.runner.reportService(service.id, { session, phase: RUNNING, ...more });
    expect((await report({ output: { url: "x" }, failureMessage: "x".repeat(10_000) })).outcome).toBe(OK);
    const { status } = await readService(client, service.id);
    expect(status?.output).toEqual({ url: "x" });
    expect(status?.failureMessage.length).toBe(4096);
    expect((await traces(stage, service.id)).actions.at(-1)).toBe("Service is running");
    for (const logUrl of ["file:///etc/passwd", "x", `http://runner/${"x".repeat(2048)}`])
      expect((await report({ logUrl })).outcome).toBe(REJECTED);
    for (const output of [
      { "": "x" },
      { k: "x".repeat(4097) },
      Object.fromEntries(Array.from({ length: 65 }, (_, index) => [index, "x"])),
    ])
      expect((await report({ output })).outcome).toBe(REJECTED);
    expect((await readService(client, service.id)).status).toEqual(status);
  });

  test("one bad report does not hold up the others, and what is not this runner's is nobody's", async () => {
    const [left, right] = [await runningService(environment.id, "left"), await runningService(environment.id, "right")];
    const task = await runningTask(environment.id, "beside");
    const { runner: other } = await connectRunner(stage.plane);
    const unknown = "01900000-0000-7000-8000-000000000001";
    const stopped = (service: Service, seq: bigint, phase = STOPPED) => ({
      ...{ id: service.id, seq },
      status: { session: service.spec?.session ?? "", phase },
    });
    const answer = await stage.runner.control.reportAutomations({
      linkId: stage.runner.linkId,
      services: [
        stopped(left, 5000n, STARTING),
        { id: unknown, seq: 1n },
        stopped(right, 5000n),
        { id: left.id, seq: 5001n },
      ],
      executions: [
        { id: task.id, seq: 5000n, status: { phase: Phase.SUCCEEDED } },
        {
          id: task.id,
          seq: 5001n,
          status: { phase: Phase.FAILED, steps: [{ id: stepIds(task)[0]!, phase: Phase.FAILED }] },
        },
      ],
    });
    expect(answer.services.map(({ outcome }) => outcome)).toEqual([REJECTED, NOT_ASSIGNED, OK, REJECTED]);
    expect(answer.executions.map(({ outcome }) => outcome)).toEqual([REJECTED, OK]);
    expect((await other.reportService(right.id, { phase: RUNNING })).outcome).toBe(NOT_ASSIGNED);
    expect((await other.reportExecution(task.id, { phase: Phase.RUNNING })).outcome).toBe(NOT_ASSIGNED);
    await using stale = new FakeRunner(stage.plane.url, stage.runner.token);
    stale.linkId = unknown;
    expect(await codeOf(stale.reportService(left.id, { phase: STOPPED }))).toBe("Aborted");
  });

  test("the record of a service ends when its runner says so, and only if that is wanted", async () => {
    const service = await runningService(environment.id, "ending");
    const session = service.spec?.session ?? "";
    const report = (phase: ServicePhase) => stage.runner.reportService(service.id, { session, phase });
    expect((await report(DELETED)).outcome).toBe(REJECTED);
    await api().deleteService({ id: service.id });
    await stage.runner.desiredService(service.id, (each) => each.service?.spec?.desiredPhase === DELETED);
    for (const phase of [STOPPING, STOPPED, DELETED]) expect((await report(phase)).outcome).toBe(OK);
    expect(await codeOf(api().getService({ id: service.id }))).toBe("NotFound");
    expect((await report(DELETED)).outcome).toBe(NOT_ASSIGNED);
    expect((await traces(stage, service.id)).actions.at(-1)).toBe("Service deleted");
  });
});

describe("reports about executions", () => {
  test("AUT-17 steps, times and the end of an execution are as its runner says, and an end is final", async () => {
    const base = await newTask(client, environment.id, "first");
    const execution = await startTask(client, await newTask(client, environment.id, "second", [base]));
    const [first, second] = stepIds(execution);
    const steps = (...phases: TaskExecutionPhase[]) =>
      phases.map((phase, index) => ({ id: [first!, second!][index]!, phase }));
    const report = (phase: TaskExecutionPhase, more: object) =>
      stage.runner.reportExecution(execution.id, { phase, ...more });
    const logUrl = `http://runner/environments/${environment.id}/executions/${execution.id}`;
    expect(await report(Phase.RUNNING, { steps: steps(Phase.RUNNING), logUrl })).toMatchObject({
      outcome: OK,
      statusVersion: 2n,
    });
    expect((await report(Phase.RUNNING, { steps: steps(Phase.FAILED, Phase.RUNNING), logUrl })).outcome).toBe(REJECTED);
    expect(
      (await report(Phase.RUNNING, { steps: steps(Phase.SUCCEEDED, Phase.RUNNING), failureMessage: "soon", logUrl }))
        .outcome,
    ).toBe(OK);
    const during = await readExecution(client, execution.id);
    expect(during).toMatchObject({ status: { phase: Phase.RUNNING, failureMessage: "soon", logUrl } });
    expect(during.metadata?.startedAt).toBeDefined();
    expect((await report(Phase.FAILED, { steps: steps(Phase.SUCCEEDED, Phase.FAILED), logUrl })).outcome).toBe(OK);
    const end = await readExecution(client, execution.id);
    expect(end.metadata?.completedAt).toBeDefined();
    expect(end.metadata?.startedAt).toEqual(during.metadata?.startedAt);
    expect((await report(Phase.FAILED, { steps: steps(Phase.SUCCEEDED, Phase.FAILED), logUrl })).outcome).toBe(OK);
    expect((await report(Phase.STOPPED, { steps: steps(Phase.SUCCEEDED, Phase.STOPPED), logUrl })).outcome).toBe(
      REJECTED,
    );
    expect(await readExecution(client, execution.id)).toEqual(end);
    expect(await traces(stage, execution.id)).toEqual({
      events: ["CREATE", "UPDATE_STATUS", "UPDATE_STATUS", "UPDATE_STATUS"],
      actions: ["Task execution created", "Task execution is running", "Task execution is failed"],
    });
  });

  test("AUT-22 a stop is told to the runner, which says how it went", async () => {
    const execution = await runningTask(environment.id, "interrupted");
    await api().stopTaskExecution({ id: execution.id });
    await stage.runner.desiredExecution(
      execution.id,
      (each) => each.taskExecution?.spec?.desiredPhase === Phase.STOPPED,
    );
    expect((await readExecution(client, execution.id)).status?.phase).toBe(Phase.RUNNING);
    const steps = [{ id: stepIds(execution)[0]!, phase: Phase.STOPPED }];
    expect((await stage.runner.reportExecution(execution.id, { phase: Phase.STOPPED, steps })).outcome).toBe(OK);
    await api().stopTaskExecution({ id: execution.id });
    expect((await traces(stage, execution.id)).actions).toEqual([
      ...[
        "Task execution created",
        "Task execution is running",
        "Task execution stop requested",
        "Task execution is stopped",
      ],
    ]);
  });

  test("executions that ended a month ago are forgotten, those that have not ended are not", async () => {
    const task = await newTask(client, environment.id, "forgotten");
    const [ended, open] = [await startTask(client, task), await startTask(client, task)];
    await api().stopTaskExecution({ id: ended.id });
    const sweep = sweeps.find(({ name }) => name === "old task executions")!;
    await sweep.run(stage.plane.plane.app);
    expect(await readExecution(client, ended.id)).toBeDefined();
    stage.plane.advance(30 * DAY_MS + 1000);
    await sweep.run(stage.plane.plane.app);
    stage.plane.advance(-30 * DAY_MS - 1000);
    expect(await codeOf(api().getTaskExecution({ id: ended.id }))).toBe("NotFound");
    expect(await readExecution(client, open.id)).toBeDefined();
    expect((await traces(stage, ended.id)).events.at(-1)).toBe("DELETE");
  });
});

describe("with the environment", () => {
  const stop = ({ id }: Environment) => client.environments.stopEnvironment({ environmentId: id });

  test("an orderly stop asks everything to end; what says so in time ends well", async () => {
    const own = await runningEnvironment(stage);
    const [service, resting] = [await runningService(own.id, "up"), await newService(client, own.id, "down")];
    const queued = await newService(client, own.id, "queued", { desiredPhase: RUNNING });
    const execution = await runningTask(own.id, "busy");
    const waiting = await startTask(client, await newTask(client, own.id, "waiting"));
    await stop(own);
    expect((await readService(client, service.id)).spec?.desiredPhase).toBe(STOPPED);
    expect(await readService(client, resting.id)).toEqual(resting);
    expect((await readService(client, queued.id)).spec?.desiredPhase).toBe(STOPPED);
    expect((await readExecution(client, waiting.id)).status?.phase).toBe(Phase.STOPPED);
    expect((await readExecution(client, execution.id)).spec?.desiredPhase).toBe(Phase.STOPPED);
    await stage.runner.desiredService(service.id, (each) => each.service?.spec?.desiredPhase === STOPPED);
    await stage.runner.desiredExecution(
      execution.id,
      (each) => each.taskExecution?.spec?.desiredPhase === Phase.STOPPED,
    );
    // What follows from a stop is told, and put down with the stop alone.
    expect(await traces(stage, queued.id)).toEqual({ events: ["CREATE", "UPDATE"], actions: ["Service created"] });
    const session = service.spec?.session ?? "";
    expect((await stage.runner.reportService(service.id, { session, phase: STOPPED })).outcome).toBe(OK);
    const steps = [{ id: stepIds(execution)[0]!, phase: Phase.STOPPED }];
    expect((await stage.runner.reportExecution(execution.id, { phase: Phase.STOPPED, steps })).outcome).toBe(OK);
    await stage.runner.reportMachine(own, MachinePhase.STOPPED);
    expect((await readService(client, service.id)).status).toMatchObject({ phase: STOPPED, failureMessage: "" });
    expect((await readExecution(client, execution.id)).status?.phase).toBe(Phase.STOPPED);
    // Nothing of it comes back with the next start.
    await client.environments.startEnvironment({ environmentId: own.id });
    expect((await readService(client, service.id)).spec?.desiredPhase).toBe(STOPPED);
  });

  test("what does not say how it ended is lost with the environment, and can only say late that it stopped", async () => {
    const own = await runningEnvironment(stage);
    const [service, execution] = [await runningService(own.id, "up"), await runningTask(own.id, "busy")];
    const session = service.spec?.session ?? "";
    await stop(own);
    await stage.runner.reportMachine(own, MachinePhase.STOPPED);
    const message = "environment was lost";
    expect((await readService(client, service.id)).status).toMatchObject({
      phase: FAILED,
      failureMessage: message,
      session,
    });
    const lost = await readExecution(client, execution.id);
    expect(lost.status).toMatchObject({
      phase: Phase.FAILED,
      failureMessage: message,
      steps: [{ phase: Phase.FAILED }],
    });
    expect(lost.metadata?.completedAt).toBeDefined();
    expect((await traces(stage, service.id)).actions.at(-1)).toBe("Service is failed");
    expect((await stage.runner.reportExecution(execution.id, running(execution))).outcome).toBe(REJECTED);
    expect((await stage.runner.reportService(service.id, { session, phase: RUNNING })).outcome).toBe(REJECTED);
    expect((await stage.runner.reportService(service.id, { session, phase: STOPPED })).outcome).toBe(OK);
  });

  test("a new dev container stops what runs in the old one, and nothing else", async () => {
    const own = await runningEnvironment(stage);
    const machine = { runsOn: { target: { case: "machine" as const, value: {} } } };
    const [inside, outside] = [
      await runningService(own.id, "inside"),
      await newService(client, own.id, "outside", { desiredPhase: RUNNING, ...machine }),
    ];
    const session = outside.spec?.session ?? "";
    await stage.runner.reportService(outside.id, { session, phase: RUNNING });
    const queued = await newService(client, own.id, "queued", { desiredPhase: RUNNING });
    const [left, right] = [
      await runningTask(own.id, "inside"),
      await startTask(client, await newTask(client, own.id, "outside", [], machine)),
    ];
    await stage.runner.reportExecution(right.id, running(right));
    const waiting = await startTask(client, await newTask(client, own.id, "waiting"));
    await client.environments.updateEnvironment({
      environmentId: own.id,
      spec: { devcontainer: { session: "again" } },
    });
    expect((await readService(client, inside.id)).spec?.desiredPhase).toBe(STOPPED);
    expect((await readService(client, outside.id)).spec?.desiredPhase).toBe(RUNNING);
    expect((await readExecution(client, left.id)).spec?.desiredPhase).toBe(Phase.STOPPED);
    expect((await readExecution(client, right.id)).spec?.desiredPhase).toBe(Phase.UNSPECIFIED);
    // What has not begun can begin in the new one.
    expect(await readService(client, queued.id)).toEqual(queued);
    expect((await readExecution(client, waiting.id)).status?.phase).toBe(Phase.PENDING);
  });

  test("with a deleted environment everything in it goes, each with its event; the forced end of a runner is one too", async () => {
    const { runner, classId } = await connectRunner(stage.plane);
    const own = await runningEnvironment({ ...stage, runner, classId });
    const service = await newService(client, own.id, "doomed");
    const task = await newTask(client, own.id, "doomed");
    const execution = await startTask(client, task);
    await stage.plane.admin.runners.deleteRunner({ runnerId: runner.id, force: true });
    expect(await codeOf(api().getService({ id: service.id }))).toBe("NotFound");
    expect(await codeOf(api().getTask({ id: task.id }))).toBe("NotFound");
    expect(await codeOf(api().getTaskExecution({ id: execution.id }))).toBe("NotFound");
    for (const { id } of [service, task, execution]) expect((await traces(stage, id)).events.at(-1)).toBe("DELETE");
    expect(await codeOf(newTask(client, own.id, "more"))).toBe("FailedPrecondition");
    expect(await executionsOf(client, own.id)).toEqual([]);
  });
});

describe("triggers", () => {
  const stop = async (own: Environment) => {
    await client.environments.stopEnvironment({ environmentId: own.id });
    await stage.runner.reportMachine(own, MachinePhase.STOPPED);
  };
  const start = async ({ id }: Environment): Promise<Environment> => {
    await client.environments.startEnvironment({ environmentId: id });
    return (await client.environments.getEnvironment({ environmentId: id })).environment!;
  };
  const startedBy = async (own: Environment, taskId?: string) =>
    (await executionsOf(client, own.id))
      .filter(({ metadata }) => !taskId || metadata?.taskId === taskId)
      .map(({ metadata }) => metadata?.startedBy);

  test("AUT-25 the start of an environment and that of its dev container fire what is theirs", async () => {
    const own = await newEnvironment(stage);
    const upsert = {
      tasks: {
        each: { name: "Each start", command: "each", triggeredBy: ["postEnvironmentStart"] },
        once: { name: "Once", command: "once", triggeredBy: ["postDevcontainerStart"] },
        never: { name: "Never", command: "never", triggeredBy: ["manual", "prebuild"] },
      },
    };
    const { updatedTaskIds } = await api().upsertAutomationsFile({ environmentId: own.id, automationsFile: upsert });
    const [each, never, once] = updatedTaskIds;
    const service = await newService(client, own.id, "web", {}, ["postEnvironmentStart"]);
    await newService(client, own.id, "bare", { commands: undefined }, ["postEnvironmentStart"]);
    await stage.runner.report(own.id, settledStatus(own));
    expect((await startedBy(own)).sort()).toEqual(["postDevcontainerStart", "postEnvironmentStart"]);
    const [first] = await executionsOf(client, own.id);
    expect(first?.metadata?.creator).toMatchObject({ id: own.id, principal: Principal.ENVIRONMENT });
    const warning = "postEnvironmentStart left out service bare: the service has no start command";
    const { status } = await getEnvironment(client, own.id);
    expect([status?.automationsFile?.warningMessage, status?.warningMessage]).toEqual([warning, [warning]]);
    const up = await readService(client, service.id);
    expect(up.spec?.desiredPhase).toBe(RUNNING);
    expect(
      (await stage.runner.desiredService(service.id, (now) => now.service?.spec?.desiredPhase === RUNNING)).startedBy,
    ).toBe("postEnvironmentStart");
    const { firingId } = await stage.runner.desiredExecution(first!.id);
    expect(firingId).not.toBe("");

    await stop(own);
    const again = await start(own);
    await stage.runner.report(own.id, settledStatus(again));
    expect(await startedBy(own, each)).toEqual(["postEnvironmentStart", "postEnvironmentStart"]);
    expect(await startedBy(own, once)).toEqual(["postDevcontainerStart"]);
    expect(await startedBy(own, never)).toEqual([]);
    expect((await readService(client, service.id)).spec?.session).not.toBe(up.spec?.session);
    // What is added to an environment that runs waits for the next start.
    await newTask(client, own.id, "late", [], {}, ["postEnvironmentStart"]);
    await stage.runner.report(own.id, { ...settledStatus(again), warningMessage: ["something else"] });
    expect(await executionsOf(client, own.id)).toHaveLength(3);
  });

  test("what a trigger leaves out shows beside what the runner warns of, until it has fired again", async () => {
    const own = await newEnvironment(stage);
    const bare = await newService(client, own.id, "bare", { commands: undefined }, ["postEnvironmentStart"]);
    const busy = await newTask(client, own.id, "busy", [], {}, ["manual"]);
    for (let count = 0; count < MAX_UNFINISHED_EXECUTIONS; count++) await startTask(client, busy);
    for (let count = 0; count < 7; count++)
      await newTask(client, own.id, `t${count}`, [], {}, ["postDevcontainerStart"]);
    const warned = (environment: Environment) => {
      const status = settledStatus(environment);
      return { ...status, automationsFile: { ...status.automationsFile, warningMessage: "an odd file" } };
    };
    const messages = async () =>
      (await getEnvironment(client, own.id)).status?.automationsFile?.warningMessage.split("; ");
    await stage.runner.report(own.id, warned(own));
    const reason = "too many executions have not ended";
    const said = [
      "an odd file",
      ...Array.from({ length: 5 }, (_, at) => `postDevcontainerStart left out task t${at}: ${reason}`),
      "postDevcontainerStart left out 2 more",
      "postEnvironmentStart left out service bare: the service has no start command",
    ];
    expect(await messages()).toEqual(said);
    await stage.runner.report(own.id, { ...warned(own), warningMessage: ["something else"] });
    expect(await messages()).toEqual(said);

    await stop(own);
    await api().updateService({ id: bare.id, spec: { commands: { start: "now it has one" } } });
    const again = await start(own);
    await stage.runner.report(own.id, settledStatus(again));
    expect(await messages()).toEqual([""]);
    expect((await getEnvironment(client, own.id)).status?.warningMessage).toEqual([]);
  });

  test("AUT-26 a filter holds everything back that it does not list; by hand all can be started", async () => {
    const own = await newEnvironment(stage, { triggerFilter: [trigger("prebuild")] });
    const task = await newTask(client, own.id, "filtered", [], {}, ["postEnvironmentStart", "postMachineStart"]);
    const service = await newService(client, own.id, "filtered", {}, ["postDevcontainerStart"]);
    await stage.runner.report(own.id, settledStatus(own));
    expect(await executionsOf(client, own.id)).toEqual([]);
    expect((await readService(client, service.id)).spec?.desiredPhase).toBe(STOPPED);
    await startTask(client, task);
  });

  test("AUT-27 executions of one firing belong together: the tasks that both need run once", async () => {
    const own = await newEnvironment(stage);
    const deps = await newTask(client, own.id, "deps", [], {}, ["postEnvironmentStart"]);
    await newTask(client, own.id, "test", [deps], {}, ["postEnvironmentStart"]);
    await stage.runner.report(own.id, settledStatus(own));
    const executions = await executionsOf(client, own.id);
    expect(executions.map(({ spec }) => spec?.plan.length)).toEqual([1, 2]);
    const firings = await Promise.all(executions.map(({ id }) => stage.runner.desiredExecution(id)));
    expect(new Set(firings.map(({ firingId }) => firingId)).size).toBe(1);
    const manual = await startTask(client, deps);
    expect((await stage.runner.desiredExecution(manual.id)).firingId).toBe("");
  });

  test("AUT-28 of replicas that hear of a start at the same time one fires, and no report does so again", async () => {
    const replica = await stage.plane.replica();
    await using there = stage.runner.twin(replica.server.url);
    for (let round = 0; round < 5; round++) {
      const own = await newEnvironment(stage);
      await newTask(client, own.id, "once", [], {}, [
        "postMachineStart",
        "postDevcontainerStart",
        "postEnvironmentStart",
      ]);
      const status = settledStatus(own);
      const seq = BigInt(1_000_000 + 10 * round);
      const results = await Promise.all(
        [stage.runner, there, stage.runner, there].map((by, index) => by.report(own.id, status, seq + BigInt(index))),
      );
      expect(results.filter(({ outcome }) => outcome === OK).length).toBeGreaterThan(0);
      // The supervisor was restarted and says it all again, more than once.
      await there.report(
        own.id,
        { ...status, automationsFile: { ...status.automationsFile, phase: ContentPhase.INITIALIZING } },
        seq + 5n,
      );
      await Promise.all([there.report(own.id, status, seq + 6n), stage.runner.report(own.id, status, seq + 7n)]);
      expect((await startedBy(own)).sort()).toEqual([
        "postDevcontainerStart",
        "postEnvironmentStart",
        "postMachineStart",
      ]);
    }
  });

  test("AUT-41 what a file brings along still fires with the start that applies it, once", async () => {
    for (const end of [ContentPhase.READY, ContentPhase.FAILED]) {
      const own = await newEnvironment(stage);
      const early = await newTask(client, own.id, "early", [], {}, ["postEnvironmentStart"]);
      await stage.runner.report(own.id, settledStatus(own, ContentPhase.INITIALIZING));
      expect(await executionsOf(client, own.id)).toEqual([]);
      const late = await newTask(client, own.id, "late", [], {}, ["postEnvironmentStart"]);
      await stage.runner.report(own.id, settledStatus(own, end));
      await stage.runner.report(own.id, settledStatus(own, ContentPhase.INITIALIZING));
      await stage.runner.report(own.id, settledStatus(own, end));
      expect((await executionsOf(client, own.id)).map(({ metadata }) => metadata?.taskId)).toEqual([early.id, late.id]);
    }
  });

  test("before the dev container it is the machine where things run, and a rebuild fires what belongs to it", async () => {
    const own = await newEnvironment(stage);
    const task = await newTask(client, own.id, "machine", [], {}, ["postMachineStart"]);
    const service = await newService(client, own.id, "machine", {}, ["postMachineStart"]);
    const rebuilt = await newTask(client, own.id, "rebuilt", [], {}, ["postDevcontainerStart"]);
    const status = settledStatus(own, ContentPhase.CREATING);
    await stage.runner.report(own.id, { ...status, devcontainer: { session: "", phase: DevContainerPhase.CREATING } });
    const [execution] = await executionsOf(client, own.id);
    expect(execution).toMatchObject({ metadata: { taskId: task.id, startedBy: "postMachineStart" } });
    expect(execution?.spec?.plan[0]?.steps[0]?.step).toMatchObject({
      value: { spec: { runsOn: { target: { case: "machine" } } } },
    });
    expect((await stage.runner.desiredService(service.id, (now) => now.startedBy !== "")).startedBy).toBe(
      "postMachineStart",
    );
    expect((await readService(client, service.id)).spec?.runsOn).toBeUndefined();
    await stage.runner.report(own.id, settledStatus(own));
    for (const session of ["second", own.spec?.devcontainer?.session ?? ""]) {
      await client.environments.updateEnvironment({ environmentId: own.id, spec: { devcontainer: { session } } });
      const ready = settledStatus(own);
      await stage.runner.report(own.id, { ...ready, devcontainer: { session, phase: DevContainerPhase.CREATING } });
      await stage.runner.report(own.id, { ...ready, devcontainer: { session, phase: DevContainerPhase.RUNNING } });
    }
    expect(await startedBy(own, rebuilt.id)).toHaveLength(3);
    expect(await startedBy(own, task.id)).toHaveLength(1);
  });

  test("a prebuild fires its own triggers alone: first what makes it, then what comes before its snapshot", async () => {
    const { runner, classId } = await connectRunner(stage.plane);
    const capable = { capabilities: [RunnerCapability.PREBUILDS_BEFORE_SNAPSHOT_TRIGGER] };
    const make = async () => {
      const own = await newEnvironment({ ...stage, runner, classId });
      const metadata = toBinary(EnvironmentMetadataSchema, { ...own.metadata!, role: EnvironmentRole.PREBUILD });
      await stage.plane.plane.app.db.write`
        update environments set role = ${EnvironmentRole.PREBUILD}, metadata = ${metadata} where id = ${own.id}`;
      const tasks = [
        await newTask(client, own.id, "install", [], {}, ["prebuild", "postDevcontainerStart"]),
        await newTask(client, own.id, "clean", [], {}, ["beforeSnapshot", "postEnvironmentStart"]),
      ];
      return { own, tasks };
    };
    const without = await make();
    await runner.report(without.own.id, settledStatus(without.own));
    const [only] = await executionsOf(client, without.own.id);
    await api().stopTaskExecution({ id: only!.id });
    expect(await startedBy(without.own)).toEqual(["prebuild"]);
    expect((await getEnvironment(client, without.own.id)).status?.warningMessage).toEqual([
      "beforeSnapshot left out task clean: the runner does not offer it",
    ]);

    await runner.heartbeat(capable);
    const { own } = await make();
    await runner.report(own.id, settledStatus(own));
    expect(await startedBy(own)).toEqual(["prebuild"]);
    const [prebuild] = await executionsOf(client, own.id);
    await runner.reportExecution(prebuild!.id, running(prebuild!));
    expect(await startedBy(own)).toEqual(["prebuild"]);
    const steps = [{ id: stepIds(prebuild!)[0]!, phase: Phase.SUCCEEDED }];
    await runner.reportExecution(prebuild!.id, { phase: Phase.SUCCEEDED, steps });
    expect(await startedBy(own)).toEqual(["prebuild", "beforeSnapshot"]);
    const [, snapshot] = await executionsOf(client, own.id);
    await runner.reportExecution(snapshot!.id, {
      phase: Phase.SUCCEEDED,
      steps: [{ id: stepIds(snapshot!)[0]!, phase: Phase.SUCCEEDED }],
    });
    await runner.report(own.id, { ...settledStatus(own), warningMessage: ["x"] });
    expect(await executionsOf(client, own.id)).toHaveLength(2);
    await runner[Symbol.asyncDispose]();
  });

  test("definitions have room for so much, and pages for so much of it", async () => {
    const own = await newEnvironment(stage);
    const command = "x".repeat(64 * 1024);
    const file = (from: number, count: number) => ({
      environmentId: own.id,
      automationsFile: {
        tasks: Object.fromEntries(
          Array.from({ length: count }, (_, index) => [`t${from + index}`, { name: "T", command }]),
        ),
      },
    });
    for (let from = 0; from < 120; from += 15) await api().upsertAutomationsFile(file(from, 15));
    expect(await codeOf(api().upsertAutomationsFile(file(120, 15)))).toBe("ResourceExhausted");
    await newTask(client, own.id, "small");

    const filter = { environmentIds: [own.id] };
    const { tasks } = await api().listTasks({ filter, pagination: { pageSize: 30 } });
    const main = await newTask(client, own.id, "main", tasks);
    const started = [];
    for (let count = 0; count < 8; count++) started.push((await startTask(client, main)).id);
    const pages: string[][] = [];
    for (let token = ""; ; ) {
      const page = await api().listTaskExecutions({ filter, pagination: { pageSize: 8, token } });
      pages.push(page.taskExecutions.map(({ id }) => id));
      token = page.pagination?.nextToken ?? "";
      if (!token) break;
    }
    expect(pages.flat()).toEqual(started.reverse());
    expect(pages.length).toBe(2);
  });

  test("a plan that is too large shows as a failed execution, and is refused by hand", async () => {
    const own = await newEnvironment(stage);
    const command = "x".repeat(64 * 1024);
    const needs = [];
    for (let index = 0; index < 33; index++) needs.push(await newTask(client, own.id, `n${index}`, [], { command }));
    const task = await newTask(client, own.id, "huge", needs, {}, ["postEnvironmentStart"]);
    await stage.runner.report(own.id, settledStatus(own));
    const [execution] = await executionsOf(client, own.id);
    expect(execution?.status).toMatchObject({ phase: Phase.FAILED, failureMessage: expect.stringContaining("bytes") });
    expect(await codeOf(startTask(client, task))).toBe("FailedPrecondition");
    expect(await executionsOf(client, own.id)).toHaveLength(1);
  });
});

test("what columns repeat is what the messages say", async () => {
  const { point } = stage.plane.plane.app.db;
  const rows = await point<{ id: string; phase: number; desired_phase: number; role: number; reference: string }[]>`
    select id, phase, desired_phase, role, reference from services`;
  expect(rows.length).toBeGreaterThan(10);
  for (const row of rows) {
    const { metadata, spec, status } = await readService(stage.plane.admin, row.id);
    expect([row.phase, row.desired_phase, row.role, row.reference]).toEqual([
      ...[status?.phase, spec?.desiredPhase, metadata?.role, metadata?.reference],
    ]);
  }
  const executions = await point<
    { id: string; phase: number; desired_phase: number; task_id: string; open: boolean }[]
  >`
    select id, phase, desired_phase, task_id, completed_at is null as open from task_executions`;
  for (const row of executions) {
    const { taskExecution } = await stage.plane.admin.environmentAutomation.getTaskExecution({ id: row.id });
    const { metadata, spec, status } = taskExecution!;
    expect([row.phase, row.desired_phase, row.task_id, row.open]).toEqual([
      ...[status?.phase, spec?.desiredPhase, metadata?.taskId, metadata?.completedAt === undefined],
    ]);
  }
});
