import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  ServicePhase,
  ServiceRole,
  TaskExecutionPhase,
  type UpdateServiceRequest_ServiceStatus,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import type { BerthClient } from "../src/client.ts";
import { MAX_SERVICES, MAX_TASKS, MAX_UNFINISHED_EXECUTIONS } from "../src/domain/automation.ts";
import {
  executionsOf,
  insideOf,
  newEnvironment,
  newService,
  newTask,
  readExecution,
  readService,
  readTask,
  runningEnvironment,
  type Stage,
  setStage,
  settledStatus,
  startTask,
  traces,
  trigger,
} from "./harness/automations.ts";
import { watchEvents } from "./harness/event-stream.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, share } from "./harness/tenants.ts";

const { STARTING, RUNNING, STOPPING, STOPPED, FAILED, DELETED } = ServicePhase;
const { FailedPrecondition, InvalidArgument } = Code;

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
const stop = ({ id }: Environment) => client.environments.stopEnvironment({ environmentId: id });

async function fieldsOf(call: Promise<unknown>): Promise<string[]> {
  const error = await refusal(call);
  expect(Code[error.code]).toBe(Code[InvalidArgument]);
  return violatedFields(error);
}

/** Lets the runner report that a service runs in the session that is wanted. */
async function bringUp(id: string): Promise<void> {
  const { spec, environmentId } = await readService(client, id);
  const session = spec?.session ?? "";
  const logUrl = `http://runner/environments/${environmentId}/services/${id}/${session}`;
  expect(await stage.runner.reportService(id, { session, phase: RUNNING, logUrl })).toMatchObject({ outcome: 1 });
}

describe("creating services", () => {
  test("AUT-1 a reference is free once", async () => {
    const own = await runningEnvironment(stage);
    const service = await newService(client, own.id, "web");
    expect(await codeOf(newService(client, own.id, "web"))).toBe("AlreadyExists");
    const { services } = await api().listServices({ filter: { environmentIds: [own.id] } });
    expect(services.map(({ id }) => id)).toEqual([service.id]);
    // Another environment, and a task, may use it.
    await newTask(client, own.id, "web");
    await newService(client, environment.id, "web");
  });

  test("a new service is stored with its defaults, and what the server decides is not taken from clients", async () => {
    const { service } = await api().createService({
      environmentId: environment.id,
      metadata: {
        ...{ reference: "defaults", name: "Defaults", description: "A service" },
        creator: { id: uuidv7(), principal: Principal.ACCOUNT },
        createdAt: { seconds: 1n },
        triggeredBy: [trigger("manual"), trigger("prebuild", false), trigger("manual"), trigger("postMachineStart")],
      },
      spec: { specVersion: 77n, runsOn: {}, env: [{ name: "A", source: { case: "value", value: "" } }] },
    });
    expect(service).toMatchObject({
      environmentId: environment.id,
      metadata: {
        creator: { id: stage.member.id, principal: Principal.USER },
        role: ServiceRole.DEFAULT,
        triggeredBy: [{ trigger: { case: "manual" } }, { trigger: { case: "postMachineStart" } }],
      },
      spec: { specVersion: 1n, desiredPhase: STOPPED, session: "", env: [{ name: "A" }] },
      status: { statusVersion: 1n, phase: STOPPED, session: "" },
    });
    expect(service?.spec?.runsOn).toBeUndefined();
    expect(service?.metadata?.createdAt?.seconds).toBeGreaterThan(1n);
    expect(await readService(client, service!.id)).toEqual(service);
    expect(await traces(stage, service!.id)).toEqual({ events: ["CREATE"], actions: ["Service created"] });
    // Without a start command it can never be started.
    expect((await refusal(api().startService({ id: service!.id }))).rawMessage).toContain("start command");
  });

  test("AUT-34 before_snapshot is for tasks only; bad values are named by their field", async () => {
    const make = (metadata: object, spec: object = {}) =>
      api().createService({
        environmentId: environment.id,
        metadata: { reference: "bad", name: "Bad", ...metadata },
        spec,
      });
    const value = (text: string) => ({ case: "value" as const, value: text });
    expect(await fieldsOf(make({ triggeredBy: [trigger("beforeSnapshot")] }))).toEqual([
      "metadata.triggered_by[0].before_snapshot",
    ]);
    expect(await fieldsOf(make({ triggeredBy: [{}] }))).toEqual(["metadata.triggered_by[0]"]);
    expect(await fieldsOf(make({ role: 99 }))).toEqual(["metadata.role"]);
    expect(await fieldsOf(make({ reference: "not a reference" }))).toEqual(["metadata.reference"]);
    expect(await fieldsOf(api().createService({ environmentId: environment.id }))).toEqual(["metadata"]);
    for (const desiredPhase of [STARTING, STOPPING, FAILED, DELETED])
      expect(await fieldsOf(make({}, { desiredPhase }))).toEqual(["spec.desired_phase"]);
    for (const session of ["a/b", "..", "x".repeat(129), "a\nb"])
      expect(await fieldsOf(make({}, { session }))).toEqual(["spec.session"]);
    expect(await fieldsOf(make({}, { commands: { start: "x".repeat(64 * 1024 + 1) } }))).toEqual([
      "spec.commands.start",
    ]);
    expect(await fieldsOf(make({}, { commands: { start: "a\0b" } }))).toEqual(["spec.commands.start"]);
    expect(await fieldsOf(make({}, { readinessTimeout: durationFromMs(86_401_000) }))).toEqual([
      "spec.readiness_timeout",
    ]);
    const env = [
      { name: "1A", source: value("") },
      { name: "BERTH_X", source: value("") },
      { name: "A", source: value("") },
      { name: "A", source: value("") },
      { name: "B" },
      { name: "C", source: { case: "valueFrom" as const, value: {} } },
      { name: "D", source: value("x".repeat(32 * 1024 + 1)) },
      { name: "E", source: value("a\0b") },
    ];
    expect(await fieldsOf(make({}, { env }))).toEqual([
      ...["spec.env[0].name", "spec.env[1].name", "spec.env[3].name", "spec.env[4].value", "spec.env[5].value_from"],
      ...["spec.env[6].value", "spec.env[7].value"],
    ]);
    const docker = (image: string, environment: string[] = []) => ({
      runsOn: { target: { case: "docker" as const, value: { image, environment } } },
    });
    expect(await fieldsOf(make({}, docker("--privileged")))).toEqual(["spec.runs_on.docker.image"]);
    expect(await fieldsOf(make({}, docker("redis:7", ["OK=1", "OK", "-v=/:/host"])))).toEqual([
      "spec.runs_on.docker.environment[2]",
    ]);
    const { services } = await api().listServices({ filter: { references: ["bad"] } });
    expect(services).toEqual([]);
  });

  test("AUT-36 a secret that is out of reach and one that does not exist are refused alike; one in reach shows its id alone", async () => {
    const secretRef = (id: string) => ({
      env: [
        {
          name: "TOKEN",
          source: { case: "valueFrom" as const, value: { source: { case: "secretRef" as const, value: { id } } } },
        },
      ],
    });
    const scope = (userId: string) => ({ scope: { case: "userId" as const, value: userId } });
    const stranger = await stage.plane.addUser();
    const make = async (of: BerthClient, userId: string) =>
      (
        await of.secrets.createSecret({
          name: "TOKEN",
          value: "hunter2",
          scope: scope(userId),
          mount: { case: "environmentVariable", value: true },
        })
      ).secret!.id;
    const foreign = await make(stranger.client, stranger.id);
    const refusals = [];
    for (const id of [uuidv7(), foreign]) {
      const error = await refusal(newService(client, environment.id, "secretive", secretRef(id)));
      expect(violatedFields(error)).toEqual(["spec.env[0].value_from.secret_ref.id"]);
      refusals.push(error.rawMessage);
      expect(await fieldsOf(newTask(client, environment.id, "secretive", [], secretRef(id)))).toEqual([
        "spec.env[0].value_from.secret_ref.id",
      ]);
    }
    expect(new Set(refusals).size).toBe(1);
    const own = await make(client, stage.member.id);
    const service = await newService(client, environment.id, "secretive", secretRef(own));
    expect((await readService(client, service.id)).spec?.env).toMatchObject(secretRef(own).env);
    const task = await newTask(client, environment.id, "secretive", [service], secretRef(own));
    const plan = JSON.stringify((await startTask(client, task)).spec, (_key, value) =>
      typeof value === "bigint" ? String(value) : value,
    );
    expect(plan).toContain(own);
    expect(plan).not.toContain("hunter2");
    // An admin of the environment is not its creator, whose secrets stay out of reach.
    const partner = await stage.plane.addUser();
    await share(stage.plane, partner.id, {
      ...{ type: ResourceType.ENVIRONMENT, id: environment.id, role: ResourceRole.ENVIRONMENT_ADMIN },
    });
    expect(await codeOf(newService(partner.client, environment.id, "borrowed", secretRef(own)))).toBe(
      "InvalidArgument",
    );
    await newService(await insideOf(stage, environment), environment.id, "from-inside", secretRef(own));
  });

  test("a service that is created RUNNING starts at once, if the environment is to run and there is something to start", async () => {
    const service = await newService(client, environment.id, "eager", { desiredPhase: RUNNING });
    expect(service).toMatchObject({
      spec: { desiredPhase: RUNNING, specVersion: 1n },
      status: { phase: STOPPED, session: "" },
    });
    expect(service.spec?.session).not.toBe("");
    const named = await newService(client, environment.id, "named", { desiredPhase: RUNNING, session: "mine" });
    expect(named.spec?.session).toBe("mine");
    expect((await stage.runner.desiredService(named.id)).startedBy).toBe("manual");
    const bare = api().createService({
      environmentId: environment.id,
      metadata: { reference: "bare", name: "Bare" },
      spec: { desiredPhase: RUNNING },
    });
    expect(await codeOf(bare)).toBe("FailedPrecondition");
    const stopped = await runningEnvironment(stage);
    await stop(stopped);
    expect(await codeOf(newService(client, stopped.id, "late", { desiredPhase: RUNNING }))).toBe("FailedPrecondition");
    await newService(client, stopped.id, "late");
  });

  test("an environment has room for so many services and tasks", async () => {
    const own = await runningEnvironment(stage);
    const services = Object.fromEntries(
      Array.from({ length: MAX_SERVICES }, (_, index) => [`s${index}`, { name: "S", commands: { start: "x" } }]),
    );
    const tasks = Object.fromEntries(
      Array.from({ length: MAX_TASKS }, (_, index) => [`t${index}`, { name: "T", command: "x" }]),
    );
    const upsert = (automationsFile: object) => api().upsertAutomationsFile({ environmentId: own.id, automationsFile });
    await upsert({ services, tasks });
    expect(await codeOf(newService(client, own.id, "more"))).toBe("ResourceExhausted");
    expect(await codeOf(newTask(client, own.id, "more"))).toBe("ResourceExhausted");
    expect(await codeOf(upsert({ services: { more: { name: "S" } } }))).toBe("ResourceExhausted");
    expect(await codeOf(upsert({ tasks: { more: { name: "T", command: "x" } } }))).toBe("ResourceExhausted");
    // Those that are there may still be named.
    await upsert({ services: { s0: { name: "Another name" } }, tasks: { t0: { name: "T", command: "y" } } });
  });
});

describe("starting and stopping services", () => {
  test("AUT-2, AUT-3 a start wants a new session; another one changes nothing while it is wanted or in force", async () => {
    const service = await newService(client, environment.id, "starter");
    await api().startService({ id: service.id });
    const wanted = await readService(client, service.id);
    expect(wanted.spec).toMatchObject({ desiredPhase: RUNNING, specVersion: 2n });
    expect(wanted.spec?.session).not.toBe("");
    await api().startService({ id: service.id });
    expect(await readService(client, service.id)).toEqual(wanted);
    expect(
      await stage.runner.desiredService(service.id, (each) => each.service?.spec?.desiredPhase === RUNNING),
    ).toMatchObject({
      startedBy: "manual",
      service: { spec: { session: wanted.spec?.session } },
    });
    await bringUp(service.id);
    const up = await readService(client, service.id);
    expect(up.status).toMatchObject({ phase: RUNNING, session: up.spec?.session, statusVersion: 2n });
    expect(up.status?.logUrl).not.toBe("");
    await api().startService({ id: service.id });
    expect(await readService(client, service.id)).toEqual(up);
    expect(await traces(stage, service.id)).toEqual({
      events: ["CREATE", "UPDATE", "UPDATE_STATUS"],
      actions: ["Service created", "Service start requested", "Service is running"],
    });
    // One that has exited starts anew, in another session.
    await stage.runner.reportService(service.id, { session: up.spec?.session ?? "", phase: FAILED });
    await api().startService({ id: service.id });
    const again = await readService(client, service.id);
    expect(again.spec?.session).not.toBe(up.spec?.session);
    expect(again.status?.phase).toBe(FAILED);
  });

  test("AUT-10 stopping what is stopped is no news; a stop outlives an environment that does not run, a start is refused there", async () => {
    const own = await runningEnvironment(stage);
    const service = await newService(client, own.id, "stopper");
    await api().stopService({ id: service.id });
    expect(await readService(client, service.id)).toEqual(service);
    expect((await traces(stage, service.id)).events).toEqual(["CREATE"]);
    await api().startService({ id: service.id });
    await bringUp(service.id);
    await api().stopService({ id: service.id });
    const stopping = await readService(client, service.id);
    expect(stopping).toMatchObject({ spec: { desiredPhase: STOPPED }, status: { phase: RUNNING } });
    await api().stopService({ id: service.id });
    expect(await readService(client, service.id)).toEqual(stopping);
    // A start that comes while it is being stopped is a new one.
    await api().startService({ id: service.id });
    expect((await readService(client, service.id)).spec?.session).not.toBe(stopping.spec?.session);
    await stop(own);
    expect(await codeOf(api().startService({ id: service.id }))).toBe("FailedPrecondition");
    await api().stopService({ id: service.id });
  });
});

describe("updating services", () => {
  test("AUT-11 metadata changes at any time, the spec only at rest", async () => {
    const { id } = await newService(client, environment.id, "changing");
    await api().startService({ id });
    const commands = { start: "another" };
    const pending = await refusal(api().updateService({ id, spec: { commands } }));
    expect([pending.code, pending.rawMessage]).toEqual([
      FailedPrecondition,
      expect.stringContaining("stop the service first"),
    ]);
    await bringUp(id);
    const before = await readService(client, id);
    expect(await codeOf(api().updateService({ id, spec: { commands }, metadata: { name: "Never" } }))).toBe(
      "FailedPrecondition",
    );
    await api().updateService({
      ...{ id, spec: {} },
      metadata: { name: "Renamed", triggeredBy: { trigger: [trigger("manual")] }, role: ServiceRole.EDITOR },
    });
    const renamed = await readService(client, id);
    expect(renamed).toMatchObject({
      metadata: { name: "Renamed", triggeredBy: [{ trigger: { case: "manual" } }], role: ServiceRole.EDITOR },
      spec: { specVersion: before.spec?.specVersion, session: before.spec?.session },
    });
    await api().updateService({ id, metadata: { name: "Renamed" } });
    await api().updateService({ id });
    await api().updateService({ id, metadata: { triggeredBy: {}, role: ServiceRole.UNSPECIFIED } });
    expect((await readService(client, id)).metadata).toMatchObject({ triggeredBy: [], role: ServiceRole.DEFAULT });
    expect((await traces(stage, id)).events.slice(3)).toEqual(["UPDATE", "UPDATE"]);

    await api().stopService({ id });
    await stage.runner.reportService(id, { session: before.spec?.session ?? "", phase: STOPPED });
    const { spec } = await readService(client, id);
    await api().updateService({ id, spec: { commands: { ready: "is it?" }, readinessTimeout: durationFromMs(1000) } });
    const after = await readService(client, id);
    expect(after.spec).toMatchObject({
      specVersion: (spec?.specVersion ?? 0n) + 1n,
      commands: { start: "run changing", ready: "is it?" },
    });
    await api().updateService({ id, spec: { commands: { ready: "" } } });
    expect((await readService(client, id)).spec?.commands).toMatchObject({ start: "run changing", ready: "" });
  });

  test("a list of variables is replaced as a whole or not at all, a target can be taken back, a start command cannot", async () => {
    const env = [{ name: "A", source: { case: "value" as const, value: "1" } }];
    const machine = { target: { case: "machine" as const, value: {} } };
    const { id } = await newService(client, environment.id, "variables", { env, runsOn: machine });
    await api().updateService({ id, spec: { runsOn: {} } });
    const { spec } = await readService(client, id);
    expect([spec?.env, spec?.runsOn]).toMatchObject([env, undefined]);
    const other = [{ name: "B", source: { case: "value" as const, value: "2" } }];
    await api().updateService({ id, spec: { env: other } });
    expect((await readService(client, id)).spec?.env.map(({ name }) => name)).toEqual(["B"]);
    expect(await fieldsOf(api().updateService({ id, spec: { commands: { start: "" } } }))).toEqual([
      "spec.commands.start",
    ]);
    expect(
      await fieldsOf(api().updateService({ id, metadata: { triggeredBy: { trigger: [trigger("beforeSnapshot")] } } })),
    ).toEqual(["metadata.triggered_by.trigger[0].before_snapshot"]);
    const { service } = await api().createService({
      environmentId: environment.id,
      metadata: { reference: "commandless", name: "No commands" },
    });
    expect(await fieldsOf(api().updateService({ id: service!.id, spec: { commands: { stop: "x" } } }))).toEqual([
      "spec.commands.start",
    ]);
  });
});

describe("status from inside the environment", () => {
  let inside: BerthClient;
  type Status = Partial<Omit<UpdateServiceRequest_ServiceStatus, "$typeName" | "$unknown">>;
  const update = (id: string, status: Status, as = inside) => as.environmentAutomation.updateService({ id, status });

  beforeAll(async () => {
    inside = await insideOf(stage, environment);
  });

  test("AUT-12 the status is written by the environment alone", async () => {
    const { id } = await newService(client, environment.id, "reported");
    const output = { url: "http://localhost:3000" };
    expect(await codeOf(update(id, { output }, client))).toBe("PermissionDenied");
    expect(await codeOf(update(id, { output }, stage.plane.admin))).toBe("PermissionDenied");
    const other = await insideOf(stage, await runningEnvironment(stage));
    expect(await codeOf(update(id, { output }, other))).toBe("NotFound");
    await update(id, { output });
    expect((await readService(client, id)).status).toMatchObject({ output, statusVersion: 2n });
    await update(id, { output });
    expect((await traces(stage, id)).events).toEqual(["CREATE", "UPDATE_STATUS"]);
    expect((await traces(stage, id)).actions).toEqual(["Service created"]);
    // One refused part refuses the whole.
    const both = client.environmentAutomation.updateService({
      id,
      metadata: { name: "Never" },
      status: { output: {} },
    });
    expect(await codeOf(both)).toBe("PermissionDenied");
    expect((await readService(client, id)).metadata?.name).toBe("The reported");
  });

  test("AUT-13 output is merged key by key, belongs to its session, and is bounded", async () => {
    const { id } = await newService(client, environment.id, "speaking", { desiredPhase: RUNNING });
    await bringUp(id);
    await update(id, { output: { a: "1", b: "2" } });
    await update(id, { output: { a: "", c: "3" } });
    expect((await readService(client, id)).status?.output).toEqual({ b: "2", c: "3" });
    const many = Object.fromEntries(Array.from({ length: 63 }, (_, index) => [`k${index}`, "x"]));
    for (const output of [many, { ["k".repeat(129)]: "x" }, { long: "x".repeat(4097) }])
      expect(await fieldsOf(update(id, { output }))).toEqual(["status.output"]);
    await update(id, { phase: FAILED, failureMessage: "exit code 1" });
    expect((await readService(client, id)).status).toMatchObject({
      output: { b: "2", c: "3" },
      failureMessage: "exit code 1",
    });
    await api().startService({ id });
    const { spec } = await readService(client, id);
    await update(id, { session: spec?.session ?? "", phase: STARTING });
    expect((await readService(client, id)).status).toMatchObject({
      ...{ phase: STARTING, session: spec?.session, output: {}, failureMessage: "", logUrl: "" },
    });
  });

  test("AUT-14 a superseded session and impossible phases are refused and leave the status as it is", async () => {
    const { id } = await newService(client, environment.id, "moving", { desiredPhase: RUNNING, session: "first" });
    await bringUp(id);
    await api().stopService({ id });
    await api().startService({ id });
    const before = await readService(client, id);
    // The session in force may still end; one that is neither wanted nor in force is over.
    const stale = await refusal(update(id, { session: "zeroth", phase: RUNNING }));
    expect([stale.code, stale.rawMessage]).toEqual([FailedPrecondition, expect.stringContaining("stale session")]);
    for (const phase of [STARTING, DELETED]) expect(await codeOf(update(id, { phase }))).toBe("FailedPrecondition");
    expect(await fieldsOf(update(id, { phase: ServicePhase.UNSPECIFIED }))).toEqual(["status.phase"]);
    expect(await readService(client, id)).toEqual(before);
    await update(id, { session: "first", phase: STOPPED });
    await update(id, { session: before.spec?.session ?? "", phase: RUNNING });
    expect(await codeOf(update(id, { session: "first", phase: FAILED }))).toBe("FailedPrecondition");
  });

  test("AUT-15 a log lies below the environment's own address", async () => {
    const { id } = await newService(client, environment.id, "logged", { desiredPhase: RUNNING });
    await bringUp(id);
    const home = `http://runner/environments/${environment.id}`;
    const strange = [
      ...[
        "http://evil.example/logs",
        "not a url",
        `${home}/../${uuidv7()}/logs`,
        `http://runner/environments/${uuidv7()}/x`,
      ],
      ...[
        `${home}@evil.example/`,
        `${home}/%2e%2e/x`,
        `${home}/a\\..\\b`,
        `HTTP://RUNNER/environments/${environment.id}/x`,
      ],
    ];
    for (const logUrl of strange) expect(await fieldsOf(update(id, { logUrl })), logUrl).toEqual(["status.log_url"]);
    await update(id, { logUrl: `${home}/services/${id}/log?session=1` });
    expect((await readService(client, id)).status?.logUrl).toContain("session=1");
  });
});

describe("deleting services", () => {
  test("a service that runs is gone when its environment says so", async () => {
    const { id } = await newService(client, environment.id, "leaving", { desiredPhase: RUNNING });
    await bringUp(id);
    await api().deleteService({ id });
    await api().deleteService({ id });
    const leaving = await readService(client, id);
    expect(leaving).toMatchObject({ spec: { desiredPhase: DELETED }, status: { phase: RUNNING } });
    expect(await codeOf(api().startService({ id }))).toBe("FailedPrecondition");
    expect(await codeOf(api().updateService({ id, metadata: { name: "No" } }))).toBe("FailedPrecondition");
    await api().stopService({ id });
    expect(await readService(client, id)).toEqual(leaving);
    expect(await codeOf(newService(client, environment.id, "leaving"))).toBe("AlreadyExists");
    const inside = await insideOf(stage, environment);
    await inside.environmentAutomation.updateService({ id, status: { phase: DELETED } });
    expect(await codeOf(api().getService({ id }))).toBe("NotFound");
    expect(await codeOf(api().deleteService({ id }))).toBe("NotFound");
    await stage.runner.removed(id);
    expect((await traces(stage, id)).events.at(-1)).toBe("DELETE");
    await newService(client, environment.id, "leaving");
  });

  test("AUT-39 one that a task depends on goes by force alone, at once, and the task loses the dependency", async () => {
    const service = await newService(client, environment.id, "needed", { desiredPhase: RUNNING });
    await bringUp(service.id);
    const task = await newTask(client, environment.id, "needing", [service]);
    const error = await refusal(api().deleteService({ id: service.id }));
    expect([error.code, error.rawMessage]).toEqual([FailedPrecondition, expect.stringContaining("needing")]);
    await api().deleteService({ id: service.id.toUpperCase(), force: true });
    expect(await codeOf(api().getService({ id: service.id }))).toBe("NotFound");
    expect((await readTask(client, task.id)).dependsOn).toEqual([]);
    expect((await traces(stage, task.id)).events).toEqual(["CREATE", "UPDATE"]);
    await stage.runner.removed(service.id);
  });

  test("in an environment that has stopped a service is removed at once, and one being deleted goes with the stop", async () => {
    const own = await runningEnvironment(stage);
    const [first, second] = [await newService(client, own.id, "first"), await newService(client, own.id, "second")];
    await api().deleteService({ id: first.id });
    expect((await readService(client, first.id)).spec?.desiredPhase).toBe(DELETED);
    await stop(own);
    await stage.runner.reportMachine(own, MachinePhase.STOPPED);
    const { environment: stopped } = await client.environments.getEnvironment({ environmentId: own.id });
    expect(stopped?.status?.phase).toBe(EnvironmentPhase.STOPPED);
    expect(await codeOf(api().getService({ id: first.id }))).toBe("NotFound");
    await api().deleteService({ id: second.id });
    expect(await codeOf(api().getService({ id: second.id }))).toBe("NotFound");
  });
});

describe("tasks", () => {
  test("a task needs a command or dependencies, of its own environment, each once", async () => {
    const make = (more: object) =>
      api().createTask({ environmentId: environment.id, metadata: { reference: "odd", name: "Odd" }, ...more });
    const other = await newTask(client, (await runningEnvironment(stage)).id, "elsewhere");
    const base = await newTask(client, environment.id, "base");
    expect(await fieldsOf(make({}))).toEqual(["spec.command"]);
    expect(await fieldsOf(make({ spec: { command: "" } }))).toEqual(["spec.command"]);
    expect(await fieldsOf(make({ dependsOn: [base.id, base.id.toUpperCase()] }))).toEqual(["depends_on[1]"]);
    const unknown = await refusal(make({ dependsOn: [base.id, uuidv7(), other.id] }));
    expect(violatedFields(unknown)).toEqual(["depends_on[1]", "depends_on[2]"]);
    expect(await fieldsOf(api().createTask({ environmentId: environment.id }))).toEqual(["metadata"]);
    const { task } = await make({ dependsOn: [base.id.toUpperCase()] });
    expect(task).toMatchObject({ dependsOn: [base.id], metadata: { creator: { id: stage.member.id } } });
    expect(await readTask(client, task!.id)).toEqual(task);
    expect(await codeOf(make({ spec: { command: "x" } }))).toBe("AlreadyExists");
    expect(await fieldsOf(api().updateTask({ id: base.id, spec: { command: "" } }))).toEqual(["spec.command"]);
    await api().updateTask({ id: task!.id, spec: { command: "now" } });
    await api().updateTask({ id: task!.id, spec: { command: "" } });
    expect(await traces(stage, base.id)).toEqual({ events: ["CREATE"], actions: ["Task created"] });
    expect(await executionsOf(client, environment.id)).not.toContainEqual(
      expect.objectContaining({ metadata: expect.objectContaining({ taskId: task!.id }) }),
    );
  });

  test("AUT-18 a change that closes a circle is refused with its path; of two at once that close one together, one is", async () => {
    const b = await newTask(client, environment.id, "b");
    const a = await newTask(client, environment.id, "a", [b]);
    const error = await refusal(api().updateTask({ id: b.id, dependsOn: [a.id] }));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["depends_on"]]);
    expect(error.rawMessage).toContain("b -> a -> b");
    expect(await fieldsOf(api().updateTask({ id: b.id, dependsOn: [b.id] }))).toEqual(["depends_on[0]"]);
    for (let round = 0; round < 5; round++) {
      const [left, right] = [
        await newTask(client, environment.id, `l${round}`),
        await newTask(client, environment.id, `r${round}`),
      ];
      const outcomes = await Promise.allSettled([
        api().updateTask({ id: left.id, dependsOn: [right.id] }),
        api().updateTask({ id: right.id, dependsOn: [left.id] }),
      ]);
      expect(outcomes.map(({ status }) => status).sort()).toEqual(["fulfilled", "rejected"]);
    }
  });

  test("AUT-19 an update of the command leaves dependencies and variables, and executions keep their plan", async () => {
    const env = [{ name: "A", source: { case: "value" as const, value: "1" } }];
    const base = await newTask(client, environment.id, "ground");
    const task = await newTask(client, environment.id, "built", [base], { env });
    const execution = await startTask(client, task);
    await api().updateTask({ id: task.id, spec: { command: "new command" }, metadata: { description: "More" } });
    expect(await readTask(client, task.id)).toMatchObject({
      ...{ dependsOn: [base.id], spec: { command: "new command", env } },
      metadata: { description: "More", name: "The built" },
    });
    const { plan } = (await readExecution(client, execution.id)).spec!;
    expect(plan.at(-1)?.steps[0]?.step).toMatchObject({ value: { spec: { command: "do built" } } });
    const before = await traces(stage, task.id);
    await api().updateTask({ id: task.id, spec: { command: "new command" } });
    await api().updateTask({ id: task.id });
    expect(await traces(stage, task.id)).toEqual(before);
    await api().updateTask({ id: task.id, metadata: { triggeredBy: { trigger: [trigger("beforeSnapshot")] } } });
    expect((await readTask(client, task.id)).metadata?.triggeredBy).toHaveLength(1);
  });

  test("a task that others need stays; one that goes takes its executions along, except those that have ended", async () => {
    const base = await newTask(client, environment.id, "held");
    const needing = await newTask(client, environment.id, "holding", [base]);
    const error = await refusal(api().deleteTask({ id: base.id }));
    expect([error.code, error.rawMessage]).toEqual([FailedPrecondition, expect.stringContaining("holding")]);
    const [waiting, running, done] = [
      await startTask(client, needing),
      await startTask(client, needing),
      await startTask(client, needing),
    ];
    const step = running.spec!.plan[0]!.steps[0]!.id;
    await stage.runner.reportExecution(running.id, {
      phase: TaskExecutionPhase.RUNNING,
      steps: [{ id: step, phase: TaskExecutionPhase.RUNNING }],
    });
    await stage.runner.reportExecution(done.id, { phase: TaskExecutionPhase.FAILED, failureMessage: "no shell" });
    await api().deleteTask({ id: needing.id });
    expect(await codeOf(api().getTask({ id: needing.id }))).toBe("NotFound");
    expect(await codeOf(api().deleteTask({ id: needing.id }))).toBe("NotFound");
    expect((await readExecution(client, waiting.id)).status?.phase).toBe(TaskExecutionPhase.STOPPED);
    expect(await readExecution(client, running.id)).toMatchObject({
      ...{ spec: { desiredPhase: TaskExecutionPhase.STOPPED }, status: { phase: TaskExecutionPhase.RUNNING } },
    });
    expect((await readExecution(client, done.id)).status?.phase).toBe(TaskExecutionPhase.FAILED);
    const { taskExecutions } = await api().listTaskExecutions({ filter: { taskReferences: ["holding"] } });
    expect(taskExecutions.map(({ id }) => id)).toEqual([done.id, running.id, waiting.id]);
    await api().deleteTask({ id: base.id });
  });
});

describe("executions", () => {
  test("AUT-16, AUT-20 a plan has groups by level, with steps that know their predecessors, and its services are asked to start", async () => {
    const own = await runningEnvironment(stage);
    const s = await newService(client, own.id, "s");
    const a = await newTask(client, own.id, "a");
    const b = await newTask(client, own.id, "b", [a, s]);
    const c = await newTask(client, own.id, "c", [a]);
    const d = await newTask(client, own.id, "d", [b, c]);
    const { spec, status, metadata } = await startTask(client, d);
    expect(spec!.plan.map(({ steps }) => steps.map(({ label }) => label))).toEqual([
      ["The a", "The s"],
      ["The b", "The c"],
      ["The d"],
    ]);
    const steps = new Map(spec!.plan.flatMap((group) => group.steps).map((each) => [each.label, each]));
    const idOf = (label: string) => steps.get(label)!.id;
    expect(new Set(steps.get("The b")!.dependsOn)).toEqual(new Set([idOf("The a"), idOf("The s")]));
    expect(new Set(steps.get("The d")!.dependsOn)).toEqual(new Set([idOf("The b"), idOf("The c")]));
    expect(steps.get("The s")!.step).toEqual({ case: "serviceId", value: s.id });
    expect(steps.get("The a")!.step).toMatchObject({ case: "task", value: { id: a.id, spec: { command: "do a" } } });
    expect(status).toMatchObject({ phase: TaskExecutionPhase.PENDING, steps: [], logUrl: "", statusVersion: 1n });
    expect(metadata).toMatchObject({
      ...{ taskId: d.id, environmentId: own.id, startedBy: "manual", creator: { id: stage.member.id } },
    });
    expect([metadata?.startedAt, metadata?.completedAt]).toEqual([undefined, undefined]);
    // The service has been asked to start, and the runner sees both.
    const { service } = await stage.runner.desiredService(s.id, (each) => each.service?.spec?.desiredPhase === RUNNING);
    expect(service?.spec?.session).not.toBe("");
    const [execution] = await executionsOf(client, own.id);
    expect(await stage.runner.desiredExecution(execution!.id)).toMatchObject({
      firingId: "",
      taskExecution: { id: execution!.id },
    });
  });

  test("AUT-23 each start is another execution, up to a limit", async () => {
    const own = await runningEnvironment(stage);
    const task = await newTask(client, own.id, "often");
    const [left, right] = await Promise.all([startTask(client, task), startTask(client, task)]);
    expect(left.id).not.toBe(right.id);
    for (let count = 2; count < MAX_UNFINISHED_EXECUTIONS; count++) await startTask(client, task);
    expect(await codeOf(startTask(client, task))).toBe("ResourceExhausted");
    await api().stopTaskExecution({ id: left.id });
    await startTask(client, task);
  });

  test("AUT-22 a stop reaches what runs, ends what waits, and does nothing to what has ended", async () => {
    const task = await newTask(client, environment.id, "stoppable");
    const waiting = await startTask(client, task);
    await api().stopTaskExecution({ id: waiting.id });
    const stopped = await readExecution(client, waiting.id);
    expect(stopped).toMatchObject({
      ...{ status: { phase: TaskExecutionPhase.STOPPED }, spec: { desiredPhase: TaskExecutionPhase.STOPPED } },
    });
    expect(stopped.metadata?.completedAt).toBeDefined();
    expect(stopped.metadata?.startedAt).toBeUndefined();
    await api().stopTaskExecution({ id: waiting.id });
    expect(await readExecution(client, waiting.id)).toEqual(stopped);
    // The runner had begun it meanwhile, and learns that it is over.
    const step = { id: waiting.spec!.plan[0]!.steps[0]!.id, phase: TaskExecutionPhase.RUNNING };
    const report = await stage.runner.reportExecution(waiting.id, { phase: TaskExecutionPhase.RUNNING, steps: [step] });
    expect(report.outcome).toBe(3);
    await stage.runner.desiredExecution(
      waiting.id,
      (each) => each.taskExecution?.status?.phase === TaskExecutionPhase.STOPPED,
    );
  });

  test("AUT-24 nothing starts in an environment that is to stop; in one that is still starting it waits", async () => {
    const own = await newEnvironment(stage);
    const task = await newTask(client, own.id, "early");
    const service = await newService(client, own.id, "early");
    const execution = await startTask(client, task);
    await api().startService({ id: service.id });
    await stage.runner.report(own.id, settledStatus(own));
    expect((await readExecution(client, execution.id)).status?.phase).toBe(TaskExecutionPhase.PENDING);
    await stop(own);
    expect(await codeOf(startTask(client, task))).toBe("FailedPrecondition");
    expect(await codeOf(api().startService({ id: service.id }))).toBe("FailedPrecondition");
    expect((await readExecution(client, execution.id)).status?.phase).toBe(TaskExecutionPhase.STOPPED);
    expect((await readService(client, service.id)).spec?.desiredPhase).toBe(STOPPED);
    await stage.runner.reportMachine(own, MachinePhase.STOPPED);
    await client.environments.archiveEnvironment({ environmentId: own.id });
    expect(await codeOf(newTask(client, own.id, "archived"))).toBe("FailedPrecondition");
    expect(await codeOf(api().updateService({ id: service.id, metadata: { name: "No" } }))).toBe("FailedPrecondition");
    expect(await readExecution(client, execution.id)).toBeDefined();
  });

  test("executions of one task beyond the newest fifty that ended make room, each with its event", async () => {
    const own = await runningEnvironment(stage);
    const task = await newTask(client, own.id, "plenty");
    const ids: string[] = [];
    for (let count = 0; count < 53; count++) {
      const { id } = await startTask(client, task);
      ids.push(id);
      await api().stopTaskExecution({ id });
    }
    expect((await executionsOf(client, own.id)).map(({ id }) => id)).toEqual(ids.slice(3));
    expect((await traces(stage, ids[0]!)).events.at(-1)).toBe("DELETE");
  });
});

describe("lists", () => {
  test("filters narrow together and widen inside; pages are complete; tokens belong to their filter", async () => {
    const [left, right] = [await runningEnvironment(stage), await runningEnvironment(stage)];
    const made = [];
    for (const reference of ["a", "b", "c"])
      for (const { id } of [left, right]) made.push(await newService(client, id, `list-${reference}`));
    const ids = (services: readonly { id: string }[]) => services.map(({ id }) => id);
    const environmentIds = [left.id, right.id, right.id.toUpperCase(), uuidv7()];
    const list = async (filter: object, pagination = {}) => (await api().listServices({ filter, pagination })).services;
    expect(ids(await list({ environmentIds }))).toEqual(ids([...made].reverse()));
    expect(ids(await list({ environmentIds, references: ["list-a", "list-c"] }))).toEqual(
      ids(made.filter((_, index) => index < 2 || index > 3).reverse()),
    );
    expect(ids(await list({ references: ["list-b"] }))).toEqual(ids([made[3]!, made[2]!]));
    expect(ids(await list({ serviceIds: [made[0]!.id, uuidv7()], environmentIds: [left.id] }))).toEqual([made[0]!.id]);
    expect(await list({ serviceIds: [made[0]!.id], environmentIds: [right.id] })).toEqual([]);
    expect(await list({ environmentIds, roles: [ServiceRole.EDITOR, ServiceRole.UNSPECIFIED] })).toEqual([]);
    expect(await list({ environmentIds, roles: [ServiceRole.DEFAULT] })).toHaveLength(6);
    const seen: string[] = [];
    let token = "";
    do {
      const page = await api().listServices({ filter: { environmentIds }, pagination: { pageSize: 4, token } });
      seen.push(...ids(page.services));
      token = page.pagination?.nextToken ?? "";
      if (token) expect(await codeOf(list({ environmentIds: [left.id] }, { token }))).toBe("InvalidArgument");
    } while (token);
    expect(seen).toEqual(ids([...made].reverse()));
    expect(await codeOf(list({ environmentIds: Array.from({ length: 26 }, () => uuidv7()) }))).toBe("InvalidArgument");

    const tasks = [await newTask(client, left.id, "list-t"), await newTask(client, right.id, "list-t")];
    expect(ids((await api().listTasks({ filter: { references: ["list-t"] } })).tasks)).toEqual(
      ids([tasks[1]!, tasks[0]!]),
    );
    const [first, second] = [await startTask(client, tasks[0]!), await startTask(client, tasks[1]!)];
    await api().stopTaskExecution({ id: first.id });
    const executions = async (filter: object) => ids((await api().listTaskExecutions({ filter })).taskExecutions);
    expect(await executions({ environmentIds })).toEqual([second.id, first.id]);
    expect(await executions({ taskIds: [tasks[0]!.id] })).toEqual([first.id]);
    expect(await executions({ environmentIds, phases: [TaskExecutionPhase.PENDING] })).toEqual([second.id]);
    expect(await executions({ taskReferences: ["list-t"], phases: [TaskExecutionPhase.STOPPED, 12345] })).toEqual([
      first.id,
    ]);
  });
});

describe("who may what", () => {
  test("AUT-40 rights follow the environment: admins tidy up, users run, viewers look, strangers see nothing", async () => {
    const own = await runningEnvironment(stage);
    const service = await newService(client, own.id, "guarded", { desiredPhase: RUNNING });
    const task = await newTask(client, own.id, "guarded");
    const people = {
      owner: await stage.plane.addUser(),
      user: await stage.plane.addUser(),
      viewer: await stage.plane.addUser(),
      stranger: await stage.plane.addUser(),
      foreign: await stage.plane.addUser({ organizationId: await addOrganization(stage.plane) }),
    };
    const roles = {
      owner: ResourceRole.ENVIRONMENT_ADMIN,
      user: ResourceRole.ENVIRONMENT_USER,
      viewer: ResourceRole.ENVIRONMENT_VIEWER,
    };
    for (const [name, role] of Object.entries(roles))
      await share(stage.plane, people[name as keyof typeof roles].id, {
        type: ResourceType.ENVIRONMENT,
        id: own.id,
        role,
      });
    const outcome = (call: Promise<unknown>) =>
      call.then(
        () => "ok",
        (error) => Code[error.code],
      );
    const rights = async ({ environmentAutomation: by }: BerthClient) => ({
      read: await outcome(by.getService({ id: service.id })),
      listed: (await by.listTasks({ filter: { environmentIds: [own.id] } })).tasks.length,
      start: await outcome(by.startTask({ id: task.id })),
      startService: await outcome(by.startService({ id: service.id })),
      stop: await outcome(by.stopService({ id: service.id })),
      create: await outcome(
        by.createTask({ environmentId: own.id, metadata: { reference: uuidv7(), name: "x" }, spec: { command: "x" } }),
      ),
      update: await outcome(by.updateTask({ id: task.id })),
      upsert: await outcome(by.upsertAutomationsFile({ environmentId: own.id, automationsFile: {} })),
      delete: await outcome(by.deleteTask({ id: (await newTask(client, own.id, `d${uuidv7()}`)).id })),
    });
    const all = {
      read: "ok",
      start: "ok",
      startService: "ok",
      stop: "ok",
      create: "ok",
      update: "ok",
      upsert: "ok",
      delete: "ok",
    };
    const [no, none] = ["PermissionDenied", "NotFound"];
    const refusedEdit = { create: no, update: no, upsert: no, delete: no };
    expect(await rights(people.owner.client)).toMatchObject(all);
    expect(await rights(await insideOf(stage, own))).toMatchObject(all);
    expect(await rights(people.user.client)).toMatchObject({ ...all, ...refusedEdit });
    expect(await rights(people.viewer.client)).toMatchObject({
      read: "ok",
      start: no,
      startService: no,
      stop: no,
      ...refusedEdit,
    });
    expect(await rights(stage.plane.admin)).toMatchObject({
      ...{ read: "ok", start: no, startService: no, stop: "ok" },
      ...{ create: no, update: no, upsert: no, delete: "ok" },
    });
    for (const { client: outsider } of [people.stranger, people.foreign])
      expect(await rights(outsider)).toEqual({
        ...{ read: none, listed: 0, start: none, startService: none, stop: none },
        ...{ create: none, update: none, upsert: none, delete: none },
      });
  });

  test("AUT-43 a runner's token opens none of this; the same status by the private protocol is stored", async () => {
    const { id } = await newService(client, environment.id, "private", { desiredPhase: RUNNING });
    const task = await newTask(client, environment.id, "private");
    const asRunner = stage.plane.client(stage.runner.token).environmentAutomation;
    expect(await codeOf(asRunner.updateService({ id, status: { phase: RUNNING } }))).toBe("PermissionDenied");
    expect(await codeOf(asRunner.getTask({ id: task.id }))).toBe("PermissionDenied");
    await bringUp(id);
    expect((await readService(client, id)).status?.phase).toBe(RUNNING);
  });

  test("AUT-44 events go to the stream of the environment, and to no stream of the organization", async () => {
    const own = await runningEnvironment(stage);
    const organization = await watchEvents(client);
    const stream = await watchEvents(client, { scope: { case: "environmentId", value: own.id } });
    // One after the other: a reader that is behind gets what it has missed of a resource as one event.
    const service = await newService(client, own.id, "told", { desiredPhase: RUNNING });
    await stream.next(`SERVICE CREATE ${service.id}`);
    await bringUp(service.id);
    await stream.next(`SERVICE UPDATE_STATUS ${service.id}`);
    const task = await newTask(client, own.id, "told");
    const execution = await startTask(client, task);
    await stream.next(`TASK_EXECUTION CREATE ${execution.id}`);
    await api().deleteTask({ id: task.id });
    await stream.next(`TASK DELETE ${task.id}`);
    await stream.next(`TASK_EXECUTION UPDATE ${execution.id}`);
    await client.environments.deleteEnvironment({ environmentId: own.id, force: true });
    await stream.next(`SERVICE DELETE ${service.id}`);
    await stream.next(`TASK_EXECUTION DELETE ${execution.id}`);
    await organization.next(`ENVIRONMENT DELETE ${own.id}`);
    expect(organization.events.filter((event) => /SERVICE|TASK/.test(event))).toEqual([]);
    for (const open of [organization, stream]) open.stop();
  });
});
