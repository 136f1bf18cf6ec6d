import { toJsonString } from "@bufbuild/protobuf";
import Gitpod from "@gitpod/sdk";
import { runCommand, runService } from "@gitpod/sdk/lib/automation";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  ServicePhase,
  ServiceSpecSchema,
  type TaskExecution,
  TaskExecutionPhase,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import type { BerthClient } from "../src/client.ts";
import { createEnvironmentLogs, type LogReader } from "./harness/automation-logs.ts";
import {
  executionReaches,
  newService,
  newTask,
  readExecution,
  readService,
  serviceReaches,
  startTask,
} from "./harness/automations.ts";
import { type Operations, operations, reaches, supervisorOf } from "./harness/environments.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";
import { eventually } from "./harness/wait.ts";

// Services and tasks that really run: a control plane, a runner on this machine, an environment with its supervisor.

const { STARTING, RUNNING, STOPPING, STOPPED, FAILED } = ServicePhase;
const Phase = TaskExecutionPhase;
const TIMEOUT_MS = 90_000;
const DEADLINE_MS = 60_000;

let plane: TestPlane;
let host: TestHost;
let user: TestUser;
let client: BerthClient;
let id: string;
let ops: Operations;
let logs: LogReader;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  host = await startHost(plane);
  user = await plane.addUser();
  client = user.client;
  id = await newEnvironment();
  ops = await operations(client, id);
  logs = await createEnvironmentLogs(client, id);
}, TIMEOUT_MS);

afterAll(async () => {
  await host[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
}, TIMEOUT_MS);

async function newEnvironment(): Promise<string> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: host.classId } } });
  return (await reaches(client, environment?.id ?? "", EnvironmentPhase.RUNNING)).id;
}

const api = () => client.environmentAutomation;

const serviceIs = (serviceId: string, phase: ServicePhase) => serviceReaches(client, serviceId, phase);
const executionIs = (executionId: string, phase: TaskExecutionPhase) => executionReaches(client, executionId, phase);

/** A service that has been asked to start. */
async function started(reference: string, commands: { start: string; stop?: string; ready?: string }, spec = {}) {
  const { id: serviceId } = await newService(client, id, reference, { commands, ...spec });
  await api().startService({ id: serviceId });
  return serviceId;
}

async function run(reference: string, command: string, dependsOn: { id: string }[] = [], spec = {}): Promise<string> {
  const task = await newTask(client, id, reference, dependsOn, { command, ...spec });
  return (await startTask(client, task)).id;
}

const sh = async (command: string) => (await ops.exec({ command })).stdout;
/** What a file of the environment says once it says something. */
const told = (file: string) => eventually(async () => (await sh(`cat ${file} 2>/dev/null`)).trim(), `${file} is there`);
const isAlive = async (pid: string) => (await ops.exec({ command: `kill -0 ${pid}` })).exitCode === 0;
const phasesOf = ({ status }: TaskExecution) => status?.steps.map(({ phase }) => Phase[phase]);

describe.concurrent("services", () => {
  test(
    "AUT-2 a service reaches RUNNING in its session, with a log that readers can follow",
    async () => {
      const serviceId = await started("hello", { start: "echo one; echo two >&2; exec sleep 300" });
      const { spec, status } = await serviceIs(serviceId, RUNNING);
      expect(status?.session).toBe(spec?.session);
      expect(status?.logUrl).toMatch(
        new RegExp(`^${host.url}/environments/${id}/services/${serviceId}/[0-9a-f]+/logs$`),
      );
      await eventually(async () => (await logs.read(status?.logUrl, "?follow=false")) === "one\ntwo\n", "both lines");
      const followed = logs.read(status?.logUrl);
      await api().stopService({ id: serviceId });
      await serviceIs(serviceId, STOPPED);
      expect(await followed).toBe("one\ntwo\n");
      expect(await logs.read(status?.logUrl, "?tail=1")).toBe("two\n");
      expect(await logs.read(status?.logUrl, "?tail=1&timestamps=true")).toMatch(/^\d{4}-\d\d-\d\dT[\d:.]{12}Z two\n$/);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-3 starting a service that runs changes nothing",
    async () => {
      const serviceId = await started("again", { start: "sleep 300" });
      const before = await serviceIs(serviceId, RUNNING);
      await api().startService({ id: serviceId });
      const after = await readService(client, serviceId);
      expect(after.spec?.session).toBe(before.spec?.session);
      expect(after.spec?.specVersion).toBe(before.spec?.specVersion);
    },
    TIMEOUT_MS,
  );

  test.each([
    [0, STOPPED],
    [3, FAILED],
  ] as const)(
    "AUT-4 a service that exits with %i is shown as running for a second",
    async (code, phase) => {
      const events = client.events.watchEvents({ scope: { case: "environmentId", value: id } });
      const seen = new Set<ServicePhase>();
      const serviceId = await started(`exit-${code}`, { start: `exit ${code}` });
      const watcher = (async () => {
        for await (const event of events) {
          if (event.resourceId !== serviceId) continue;
          const { spec, status } = await readService(client, serviceId);
          if (status && status.session === spec?.session && spec.session) seen.add(status.phase);
          if (seen.has(phase)) return;
        }
      })();
      const { status } = await serviceIs(serviceId, phase);
      await watcher;
      expect(seen).toContain(RUNNING);
      if (code === 3) expect(status?.failureMessage).toContain("3");
      else expect(status?.failureMessage).toBe("");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-5 a service is ready once its command has passed, and is not asked again",
    async () => {
      const ready = `if test -d /tmp/busy-${id}; then echo overlap >> ~/ready; fi; mkdir /tmp/busy-${id}; echo x >> ~/ready
      rmdir /tmp/busy-${id}; test "$(wc -l < ~/ready)" -ge 3`;
      const serviceId = await started("ready", { start: "sleep 300", ready });
      const { status } = await readService(client, serviceId);
      expect([STARTING, STOPPED, ServicePhase.UNSPECIFIED]).toContain(status?.phase);
      await serviceIs(serviceId, RUNNING);
      expect(await sh("cat ~/ready")).toBe("x\nx\nx\n");
      const other = await run("meanwhile", "sleep 1.2");
      await executionIs(other, Phase.SUCCEEDED);
      expect(await sh("cat ~/ready")).toBe("x\nx\nx\n");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-6 a service that is not ready in time has failed, and its process is gone",
    async () => {
      const spec = { readinessTimeout: { seconds: 3n } };
      const commands = { start: "echo $$ > ~/late; exec sleep 300", ready: "echo nearly; false" };
      const serviceId = await started("late", commands, spec);
      const { status } = await serviceIs(serviceId, FAILED);
      expect(status?.failureMessage).toMatch(/ready/);
      expect(await isAlive(await told("~/late"))).toBe(false);
      expect(await logs.read(status?.logUrl, "?follow=false")).toContain("nearly\n");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-7 a service that needs a while to end is STOPPING, then STOPPED",
    async () => {
      const serviceId = await started("slow-end", {
        start: `trap 'sleep 2; exit 143' TERM; echo up; while :; do sleep 0.1; done`,
      });
      const { status } = await serviceIs(serviceId, RUNNING);
      await eventually(async () => (await logs.read(status?.logUrl, "?follow=false")) === "up\n", "it is up");
      await api().stopService({ id: serviceId });
      await serviceIs(serviceId, STOPPING);
      await serviceIs(serviceId, STOPPED);
    },
    TIMEOUT_MS,
  );

  test.each([
    [0, STOPPED],
    [1, FAILED],
  ] as const)(
    "AUT-9 a stop command that exits with %i decides how the service has ended",
    async (code, phase) => {
      const name = `stop-${code}`;
      const start = `trap 'echo told > ~/${name}-term' TERM; echo $$ > ~/${name}; while :; do sleep 0.1; done`;
      const serviceId = await started(name, { start, stop: `echo bye; exit ${code}` });
      const { status } = await serviceIs(serviceId, RUNNING);
      const pid = await told(`~/${name}`);
      await api().stopService({ id: serviceId });
      await serviceIs(serviceId, phase);
      await eventually(async () => !(await isAlive(pid)), "its process is gone");
      expect((await ops.exec({ command: `test -e ~/${name}-term` })).exitCode).toBe(1);
      expect(await logs.read(status?.logUrl, "?follow=false")).toBe("bye\n");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-13 a service's output is what it wrote, and is new with every session",
    async () => {
      const start = `printf 'a=1\\nb=2\\n' >> $BERTH_OUTPUT; test -e ~/go && printf 'a=\\nc=3\\n' >> $BERTH_OUTPUT; sleep 300`;
      const serviceId = await started("output", { start });
      const output = (wanted: object) =>
        eventually(async () => {
          const found = (await readService(client, serviceId)).status?.output;
          expect(found).toEqual(wanted);
          return true;
        }, "the output");
      await output({ a: "1", b: "2" });
      await sh("touch ~/go");
      await api().stopService({ id: serviceId });
      await serviceIs(serviceId, STOPPED);
      await api().updateService({ id: serviceId, spec: { commands: { start: "sleep 300" } } });
      await api().startService({ id: serviceId });
      await serviceIs(serviceId, RUNNING);
      await output({});
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-35 a service for a container fails where there is no engine, and nothing runs",
    async () => {
      const runsOn = { target: { case: "docker" as const, value: { environment: [], image: "alpine" } } };
      const serviceId = await started("docker", { start: "touch ~/docker-ran" }, { runsOn });
      const { status } = await serviceIs(serviceId, FAILED);
      expect(status?.failureMessage).toMatch(/^runs_on\.docker needs a container engine; none found on runner test\b/);
      expect((await ops.exec({ command: "test -e ~/docker-ran" })).exitCode).toBe(1);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-39 a service that is deleted with force is gone at once, its processes soon",
    async () => {
      const serviceId = await started("deleted", {
        start: "trap '' TERM; echo $$ > ~/deleted; while :; do sleep 0.1; done",
      });
      await serviceIs(serviceId, RUNNING);
      const pid = await told("~/deleted");
      const task = await newTask(client, id, "needs-deleted", [{ id: serviceId }]);
      expect(await codeOf(api().deleteService({ id: serviceId }))).toBe("FailedPrecondition");
      await api().deleteTask({ id: task.id });
      await api().deleteService({ id: serviceId, force: true });
      expect(await codeOf(api().getService({ id: serviceId }))).toBe("NotFound");
      await eventually(async () => !(await isAlive(pid)), "its process is gone");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-36 a secret reaches the process alone",
    async () => {
      const { secret } = await client.secrets.createSecret({
        ...{ name: "automation_secret", value: "s3cr3t-canary", scope: { scope: { case: "userId", value: user.id } } },
        mount: { case: "apiOnly", value: true },
      });
      const secretRef = { id: secret?.id ?? "" };
      const env = [
        {
          name: "HIDDEN",
          source: { case: "valueFrom" as const, value: { source: { case: "secretRef" as const, value: secretRef } } },
        },
      ];
      const start = `test "$HIDDEN" = "s3cr3t"-canary && echo same; tr '\\0' ' ' < /proc/$$/cmdline > ~/cmdline; sleep 300`;
      const serviceId = await started("secretive", { start }, { env });
      const { status, spec } = await serviceIs(serviceId, RUNNING);
      await eventually(async () => (await logs.read(status?.logUrl, "?follow=false")) === "same\n", "it has the value");
      expect(JSON.stringify(spec?.env)).toContain(secretRef.id);
      expect(toJsonString(ServiceSpecSchema, spec!)).not.toContain("s3cr3t-canary");
      expect(await sh("cat ~/cmdline; cat ~/../run/automations/*/* 2>/dev/null; ps axww -o args")).not.toContain(
        "s3cr3t-canary",
      );
      await api().stopService({ id: serviceId });
      await serviceIs(serviceId, STOPPED);
      await client.secrets.deleteSecret({ secretId: secretRef.id });
      await api().startService({ id: serviceId });
      expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("HIDDEN");
    },
    TIMEOUT_MS,
  );
});

describe.concurrent("tasks", () => {
  test(
    "AUT-16 a task runs after all that it depends on, and what may run at once does",
    async () => {
      const service = await newService(client, id, "plan-s", { commands: { start: "sleep 300" } });
      const a = await newTask(client, id, "plan-a", [], { command: "echo a >> ~/plan" });
      const meet = (own: string, other: string) =>
        `touch ~/plan-${own}; for i in $(seq 600); do test -e ~/plan-${other} && break; sleep 0.1; done; test -e ~/plan-${other} && echo ${own} >> ~/plan`;
      const b = await newTask(client, id, "plan-b", [a, service], { command: meet("b", "c") });
      const c = await newTask(client, id, "plan-c", [a], { command: meet("c", "b") });
      const executionId = await run("plan-d", "echo d >> ~/plan", [b, c]);
      const { spec, status } = await executionIs(executionId, Phase.SUCCEEDED);
      expect(spec?.plan.map(({ steps }) => steps.length)).toEqual([2, 2, 1]);
      expect((await sh("cat ~/plan")).split("\n")).toMatchObject({ 0: "a", 3: "d" });
      expect(status?.steps).toHaveLength(5);
      expect(await logs.read(status?.logUrl)).toBe("");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-17 a failure is told at once, what runs beside it goes on, what comes after it does not begin",
    async () => {
      const b = await newTask(client, id, "fail-b", [], {
        command: "touch ~/fail-b; for i in $(seq 600); do test -e ~/fail-go && break; sleep 0.1; done",
      });
      const c = await newTask(client, id, "fail-c", [], { command: "exit 7" });
      const executionId = await run("fail-d", "touch ~/fail-d", [b, c]);
      await eventually(
        async () => (await readExecution(client, executionId)).status?.failureMessage.includes("fail-c"),
        "the failure is named",
        DEADLINE_MS,
      );
      expect((await readExecution(client, executionId)).status?.phase).toBe(Phase.RUNNING);
      await sh("touch ~/fail-go");
      const execution = await executionIs(executionId, Phase.FAILED);
      expect(phasesOf(execution)?.sort()).toEqual(["FAILED", "SUCCEEDED"]);
      expect((await ops.exec({ command: "test -e ~/fail-d" })).exitCode).toBe(1);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-20 a task starts what it needs, waits until that is ready, and leaves it running",
    async () => {
      const commands = { start: "sleep 300", ready: "echo x >> ~/needed; test $(wc -l < ~/needed) -ge 2" };
      const service = await newService(client, id, "needed", { commands });
      const executionId = await run("needs", "wc -l < ~/needed", [service]);
      const { status } = await executionIs(executionId, Phase.SUCCEEDED);
      expect(await logs.read(status?.logUrl)).toBe("2\n");
      expect((await readService(client, service.id)).status?.phase).toBe(RUNNING);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-21 a service that ends before it is ready fails what needs it, and is told to stay in the foreground",
    async () => {
      const service = await newService(client, id, "forks", { commands: { start: "exit 0", ready: "false" } });
      const executionId = await run("needs-forks", "touch ~/forks", [service]);
      const execution = await executionIs(executionId, Phase.FAILED);
      expect(phasesOf(execution)).toEqual(["FAILED"]);
      expect(execution.status?.failureMessage).toMatch(/foreground/);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-22 a task that obeys is STOPPED, one that does not is killed and FAILED",
    async () => {
      const obeys = await run("obeys", "touch ~/obeys; exec sleep 300");
      const resists = await run("resists", "trap '' TERM; touch ~/resists; while :; do sleep 0.1; done");
      await eventually(
        async () => (await ops.exec({ command: "test -e ~/obeys -a -e ~/resists" })).exitCode === 0,
        "both run",
      );
      for (const each of [obeys, resists]) {
        // What is not known to run is STOPPED the moment somebody asks for it.
        await executionIs(each, Phase.RUNNING);
        await api().stopTaskExecution({ id: each });
      }
      expect(phasesOf(await executionIs(obeys, Phase.STOPPED))).toEqual(["STOPPED"]);
      expect(phasesOf(await executionIs(resists, Phase.FAILED))).toEqual(["FAILED"]);
      await api().stopTaskExecution({ id: obeys });
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-37 the official SDK runs commands and services, reads their lines, and stops what runs",
    async () => {
      const sdk = new Gitpod({ baseURL: `${plane.url}/api`, bearerToken: user.token });
      const lines = async (text: AsyncGenerator<string>) => {
        const found: string[] = [];
        for await (const line of text) found.push(line);
        return found;
      };
      expect(await lines(await runCommand(sdk, id, "printf 'a\\nb\\n'"))).toEqual(["a", "b"]);
      expect(await lines(await runCommand(sdk, id, "echo c"))).toEqual(["c"]);
      const metadata = { reference: "sdk", name: "SDK" };
      const text = await runService(sdk, id, metadata, { commands: { start: "echo up; exec sleep 300" } });
      expect((await text.next()).value).toBe("up");
      const { services } = sdk.environments.automations;
      const filter = { environmentIds: [id], references: ["sdk"] };
      const [service] = (await services.list({ filter })).services;
      await services.stop({ id: service?.id ?? "" });
      expect((await text.next()).done).toBe(true);
      await serviceIs(service?.id ?? "", STOPPED);
      await services.delete({ id: service?.id ?? "" });
      await eventually(async () => (await services.list({ filter })).services?.length === 0, "it is gone");
    },
    TIMEOUT_MS,
  );

  test(
    "lines of several tasks are told apart, and one can be read alone",
    async () => {
      const first = await newTask(client, id, "label-1", [], { command: "echo first" });
      const executionId = await run("label-2", "echo second", [first]);
      const { status, spec } = await executionIs(executionId, Phase.SUCCEEDED);
      const text = await logs.read(status?.logUrl);
      expect(text).toMatch(/^\[.+\] first\n\[.+\] second\n$/);
      expect(await logs.read(status?.logUrl, `?step=${spec?.plan[0]?.steps[0]?.id}`)).toBe("first\n");
    },
    TIMEOUT_MS,
  );

  test(
    "logs are for those with a token of the environment",
    async () => {
      const executionId = await run("private", "echo private");
      const { status } = await executionIs(executionId, Phase.SUCCEEDED);
      const url = status?.logUrl ?? "";
      expect((await fetch(url)).status).toBe(401);
      expect((await fetch(url, { headers: { authorization: `Bearer ${user.token}` } })).status).toBe(401);
      const other = await createEnvironmentLogs(client, await newEnvironment());
      expect(await other.status(url)).toBe(403);
      expect(await logs.status(url.replace(executionId, crypto.randomUUID()))).toBe(404);
    },
    TIMEOUT_MS,
  );
});

test(
  "AUT-38 services are adopted by a new supervisor, and how they end is told",
  async () => {
    const own = await newEnvironment();
    const inside = await operations(client, own);
    const start = "echo $$ > ~/pid; while ! test -e ~/end; do sleep 0.1; done; exit 5";
    const { id: serviceId } = await newService(client, own, "survivor", { commands: { start } });
    await api().startService({ id: serviceId });
    await serviceIs(serviceId, RUNNING);
    const task = await newTask(client, own, "long", [], {
      command: "echo x >> ~/ran; while ! test -e ~/end; do sleep 0.1; done",
    });
    const after = await newTask(client, own, "after", [task], { command: "echo y >> ~/ran" });
    const execution = await startTask(client, after);
    const read = async (file: string) => (await inside.exec({ command: `cat ~/${file}` })).stdout;
    await eventually(async () => (await read("ran")) === "x\n", "the task runs");
    const pid = await read("pid");
    const supervisor = await supervisorOf(host.dataDir, own);
    process.kill(supervisor.pid, "SIGKILL");
    await eventually(async () => (await supervisorOf(host.dataDir, own)).pid !== supervisor.pid, "a new supervisor");
    expect((await readService(client, serviceId)).status?.phase).toBe(RUNNING);
    await eventually(
      async () => (await inside.exec({ command: `kill -0 ${pid}` })).exitCode === 0,
      "the process lives",
    );
    await inside.exec({ command: "touch ~/end" });
    expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("5");
    await executionIs(execution.id, Phase.SUCCEEDED);
    expect(await read("ran")).toBe("x\ny\n");
  },
  TIMEOUT_MS,
);

test(
  "AUT-24 a task that was started too early runs once the environment is up; AUT-25 executions end with the environment",
  async () => {
    const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: host.classId } } });
    const own = environment?.id ?? "";
    const task = await newTask(client, own, "early", [], { command: "echo up" });
    const early = await startTask(client, task);
    await reaches(client, own, EnvironmentPhase.RUNNING);
    await executionIs(early.id, Phase.SUCCEEDED);
    const long = await startTask(client, await newTask(client, own, "long", [], { command: "exec sleep 300" }));
    await executionIs(long.id, Phase.RUNNING);
    const { id: serviceId } = await newService(client, own, "lives", { commands: { start: "exec sleep 300" } });
    await api().startService({ id: serviceId });
    await serviceIs(serviceId, RUNNING);
    await client.environments.stopEnvironment({ environmentId: own });
    await reaches(client, own, EnvironmentPhase.STOPPED);
    await executionIs(long.id, Phase.STOPPED);
    await serviceIs(serviceId, STOPPED);
    expect(await codeOf(api().startTask({ id: task.id }))).toBe("FailedPrecondition");
  },
  TIMEOUT_MS,
);
