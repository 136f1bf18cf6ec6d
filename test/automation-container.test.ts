import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { readdir } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Service, ServicePhase, TaskExecutionPhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { createEnvironmentLogs, type LogReader } from "./harness/automation-logs.ts";
import {
  executionReaches,
  newService,
  newTask,
  readService,
  serviceReaches,
  startTask,
} from "./harness/automations.ts";
import { engineMissing, startContainerEngine, type TestEngine } from "./harness/container-engine.ts";
import {
  isGone,
  operations,
  processesOf,
  reaches,
  supervisorOf,
  sweepUp,
  usableClass,
} from "./harness/environments.ts";
import { startImageRegistry } from "./harness/image-registry.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { eventually } from "./harness/wait.ts";

// Services and tasks in containers: the product as an operator runs it, with an engine of this file's own.

const { RUNNING, STOPPED, FAILED } = ServicePhase;
const Phase = TaskExecutionPhase;
const TIMEOUT_MS = 120_000;
const DEADLINE_MS = 60_000;
const STEP_MS = 50;

const missing = engineMissing();

let engine: TestEngine;
let berth: Installation;
let client: BerthClient;
let classId: string;
let id: string;
let logs: LogReader;

beforeAll(async () => {
  if (missing) return;
  engine = await startContainerEngine();
  berth = await startInstallation({ BERTH_RUNNER_CONTAINER_ENGINE: "docker", DOCKER_HOST: engine.dockerHost });
  client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  classId = await usableClass(client);
  id = await newEnvironment();
  logs = await createEnvironmentLogs(client, id);
}, TIMEOUT_MS);

afterAll(async () => {
  await berth?.terminate();
  await sweepUp(join(berth?.dataDir ?? "/nonexistent", "runner"));
  await berth?.[Symbol.asyncDispose]();
  await engine?.[Symbol.asyncDispose]();
}, TIMEOUT_MS);

async function newEnvironment(): Promise<string> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  return (await reaches(client, environment?.id ?? "", EnvironmentPhase.RUNNING)).id;
}

const api = () => client.environmentAutomation;
const folderOf = (environmentId: string) => join(berth.dataDir, "runner/environments", environmentId);
const inContainer = (environment: string[] = [], image = engine.image) => ({
  runsOn: { target: { case: "docker" as const, value: { image, environment } } },
});

const serviceIs = (serviceId: string, phase: ServicePhase) => serviceReaches(client, serviceId, phase);
const executionIs = (executionId: string, phase: TaskExecutionPhase) => executionReaches(client, executionId, phase);

type Commands = { start: string; stop?: string; ready?: string };

async function started(reference: string, commands: Commands, spec = {}, environmentId = id): Promise<string> {
  const more = { commands, ...inContainer(), ...spec };
  const { id: serviceId } = await newService(client, environmentId, reference, more);
  await api().startService({ id: serviceId });
  return serviceId;
}

async function run(reference: string, command: string, spec = {}, environmentId = id): Promise<string> {
  const task = await newTask(client, environmentId, reference, [], { command, ...inContainer(), ...spec });
  return (await startTask(client, task)).id;
}

const inside = (environmentId = id) =>
  eventually(() => operations(client, environmentId), "operations", DEADLINE_MS, STEP_MS);
const sh = async (command: string) => (await (await inside()).exec({ command })).stdout;
const told = (file: string) => eventually(async () => (await sh(`cat ${file} 2>/dev/null`)).trim(), `${file} is there`);
const linesOf = async (url: string | undefined) => (await logs.read(url, "?follow=false")).split("\n");

/** Names of the containers of an environment. */
const containersOf = async (environmentId: string) =>
  (await engine.docker("ps", "--all", "--filter", `label=berth.environment=${environmentId}`, "--format", "{{.Names}}"))
    .split("\n")
    .filter(Boolean);

/** Nothing is left of a run, whose name ends in what the folder of its log is called. */
async function isCleanedUp(environmentId = id, part = ""): Promise<void> {
  await eventually(async () => {
    const names = (await containersOf(environmentId)).filter((name) => name.includes(part));
    const folders = await readdir(join(folderOf(environmentId), "containers")).catch(() => []);
    const left = [...names, ...folders.filter((name) => name.includes(part))];
    if (left.length > 0) throw new Error(`there is ${left.join(", ")}`);
    return true;
  }, "nothing is left");
}

/** The part of the address of a log that also names the run. */
const keyIn = (service: Service) => /([0-9a-f]{24})\/logs$/.exec(service.status?.logUrl ?? "")?.[1] ?? "nothing";

describe.skipIf(missing)(`automations in containers${missing ? ` (${missing})` : ""}`, () => {
  describe.concurrent("what runs in them", () => {
    test(
      "a task runs as the environment's user in the checkout, and gets exactly its own variables",
      async () => {
        await (await inside()).exec({ command: "echo from-host > shared" });
        const env = [
          { name: "GIVEN", source: { case: "value" as const, value: 'it\'s "$HOME"\nand more' } },
          { name: "TWICE", source: { case: "value" as const, value: "spec" } },
        ];
        const command = [
          "env | sort > told-env; pwd; id -u; cat shared; printf '%s|' \"$GIVEN\"; echo",
          "echo made > made; echo KEY=value >> $BERTH_OUTPUT; echo to-stderr >&2; exit 7",
        ].join("; ");
        const docker = ["COPIED=own value", "GITPOD_ENVIRONMENT_ID", "ABSENT", "TWICE=docker", "BERTH_AUTOMATION=no"];
        const executionId = await run("exact", command, { env, ...inContainer(docker) });
        const { status } = await executionIs(executionId, Phase.FAILED);
        expect(status?.failureMessage).toMatch(/exited with code 7/);
        expect(status?.steps[0]?.output).toEqual({ KEY: "value" });
        const uid = (await sh("id -u")).trim();
        expect(uid).not.toBe("0");
        const workspace = join(folderOf(id), "workspace");
        expect(await linesOf(status?.logUrl)).toEqual([
          ...[workspace, uid, "from-host", `it's "$HOME"`, "and more|", "to-stderr", ""],
        ]);
        expect((await sh("stat -c %u made")).trim()).toBe(uid);
        const variables = (await sh("cat told-env")).trim().split("\n");
        const names = variables.map((line) => line.split("=")[0]).filter((name) => name !== "and more");
        // What an engine and a shell set in every container is beside them.
        const usual = ["HOME", "HOSTNAME", "OLDPWD", "PATH", "PWD", "SHLVL", "_"];
        expect(names.filter((name = "") => !usual.includes(name)).sort()).toEqual(
          [
            ...["BERTH_AUTOMATION", "BERTH_EXECUTION_ID", "BERTH_OUTPUT", "BERTH_RUN"],
            ...["COPIED", "GITPOD_ENVIRONMENT_ID", "GIVEN", "TWICE"],
          ].sort(),
        );
        expect(variables).toContain("BERTH_AUTOMATION=The exact");
        expect(variables).toContain(`BERTH_EXECUTION_ID=${executionId}`);
        expect(variables).toContain(`GITPOD_ENVIRONMENT_ID=${id}`);
        expect(variables).toContain("TWICE=docker");
      },
      TIMEOUT_MS,
    );

    test(
      "a service is ready by a command beside it, reaches localhost, and is ended by its stop command",
      async () => {
        const server = createServer((_request, response) => response.end("hello\n"));
        await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
        const { port } = server.address() as AddressInfo;
        try {
          const start = [
            `printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc 127.0.0.1 ${port} | grep hello`,
            "until test -e service-go; do sleep 0.05; done; touch /tmp/up; exec sleep 1000",
          ].join("; ");
          const ready = 'echo "$BERTH_SESSION $(id -u)" > ready-told; test -e /tmp/up';
          const stop = 'echo "stopping $BERTH_AUTOMATION"; kill -TERM -1; sleep 0.3; touch stop-told';
          const serviceId = await started("whole", { start, ready, stop });
          await told("ready-told");
          const starting = await readService(client, serviceId);
          expect(ServicePhase[starting.status?.phase ?? 0]).toBe("STARTING");
          await sh("touch service-go");
          const service = await serviceIs(serviceId, RUNNING);
          expect(await told("ready-told")).toBe(`${service.spec?.session} ${(await sh("id -u")).trim()}`);
          await api().stopService({ id: serviceId });
          expect((await serviceIs(serviceId, STOPPED)).status?.failureMessage).toBe("");
          expect(await sh("ls stop-told")).toBe("stop-told\n");
          expect(await linesOf(service.status?.logUrl)).toEqual(["hello", "stopping whole", ""]);
          await isCleanedUp(id, keyIn(service));
        } finally {
          server.close();
        }
      },
      TIMEOUT_MS,
    );

    test(
      "AUT-7 SIGTERM reaches a service, which may take its time",
      async () => {
        const serviceId = await started("obedient", {
          start: "trap 'sleep 0.3; echo bye; exit 143' TERM; echo up; sleep 1000 & wait",
        });
        const service = await serviceIs(serviceId, RUNNING);
        await eventually(async () => (await linesOf(service.status?.logUrl))[0] === "up", "it is up");
        await api().stopService({ id: serviceId });
        expect((await serviceIs(serviceId, STOPPED)).status?.failureMessage).toBe("");
        expect(await linesOf(service.status?.logUrl)).toEqual(["up", "bye", ""]);
        await isCleanedUp(id, keyIn(service));
      },
      TIMEOUT_MS,
    );

    test(
      "AUT-22 a task that ignores SIGTERM is killed with everything in its container",
      async () => {
        const executionId = await run(
          "stubborn",
          "trap '' TERM; setsid sleep 1017 & touch stubborn-up; while :; do sleep 1; done",
        );
        await eventually(async () => (await sh("ls stubborn-up 2>/dev/null")).trim(), "it is up");
        expect(await sh("ps axww -o args")).toContain("sleep 1017");
        await api().stopTaskExecution({ id: executionId });
        const { status } = await executionIs(executionId, Phase.FAILED);
        expect(status?.failureMessage).toContain("was killed");
        expect(await sh("ps axww -o args")).not.toContain("sleep 1017");
      },
      TIMEOUT_MS,
    );

    test(
      "an image that cannot be had fails soon and says why, in the log as well; one without a shell, too",
      async () => {
        const image = "127.0.0.1:1/nobody/nothing:1";
        const { status } = await executionIs(await run("unfetched", "true", inContainer([], image)), Phase.FAILED);
        expect(status?.failureMessage).toMatch(
          /the image 127\.0\.0\.1:1\/nobody\/nothing:1 cannot be fetched: .*refused/,
        );
        expect((await linesOf(status?.logUrl)).join("\n")).toContain("refused");
        const serviceId = await started("shell-less", { start: "true" }, inContainer([], engine.bareImage));
        expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("it has no shell (sh)");
      },
      TIMEOUT_MS,
    );

    test(
      "an image is fetched with the logins of the environment, in the sight of people, and once",
      async () => {
        await using registry = await startImageRegistry(engine);
        const spec = inContainer([], registry.image);
        const refused = await executionIs(await run("logged-out", "true", spec), Phase.FAILED);
        expect(refused.status?.failureMessage).toContain("cannot be fetched");
        const auth = Buffer.from(registry.credentials).toString("base64");
        // A program that a configuration names is not run for a login: that would be as the runner.
        const config = { auths: { [registry.host]: { auth } }, credsStore: "nothing" };
        await (await inside()).exec({
          command: `mkdir -p ~/.docker; echo '${JSON.stringify(config)}' > ~/.docker/config.json`,
        });
        const first = await executionIs(await run("fetched", "echo inside", spec), Phase.SUCCEEDED);
        const told = await linesOf(first.status?.logUrl);
        expect(told.slice(-2)).toEqual(["inside", ""]);
        expect(told.join("\n")).toMatch(/private\/tools[\s\S]*Downloaded newer image/);
        expect(told.join("\n")).not.toContain("registry-pass");
        const second = await executionIs(await run("present", "echo inside", spec), Phase.SUCCEEDED);
        expect(await linesOf(second.status?.logUrl)).toEqual(["inside", ""]);
      },
      TIMEOUT_MS,
    );

    test(
      "AUT-39 a service that is deleted with force is gone, and so is its container",
      async () => {
        const serviceId = await started("forced", { start: "trap '' TERM; while :; do sleep 1; done" });
        const service = await serviceIs(serviceId, RUNNING);
        expect((await containersOf(id)).filter((name) => name.includes(keyIn(service)))).toHaveLength(1);
        await api().deleteService({ id: serviceId, force: true });
        await isCleanedUp(id, keyIn(service));
      },
      TIMEOUT_MS,
    );

    test("nothing that looks like an option is taken for an image", async () => {
      const create = newTask(client, id, "option", [], { command: "true", ...inContainer([], "--privileged") });
      await expect(create).rejects.toThrow(/runs_on\.docker\.image/);
    });

    test(
      "AUT-36 a secret reaches the process alone: nothing that the engine keeps holds it",
      async () => {
        const canary = `canary-${randomBytes(8).toString("hex")}`;
        const { subject } = await client.identity.getAuthenticatedIdentity({});
        const { secret } = await client.secrets.createSecret({
          ...{
            name: "container_secret",
            value: canary,
            scope: { scope: { case: "userId", value: subject?.id ?? "" } },
          },
          mount: { case: "apiOnly", value: true },
        });
        const secretRef = { id: secret?.id ?? "" };
        const env = [
          {
            name: "HIDDEN",
            source: { case: "valueFrom" as const, value: { source: { case: "secretRef" as const, value: secretRef } } },
          },
        ];
        const serviceId = await started("secretive", { start: `echo "length \${#HIDDEN}"; exec sleep 1000` }, { env });
        const service = await serviceIs(serviceId, RUNNING);
        const length = `length ${canary.length}`;
        await eventually(async () => (await linesOf(service.status?.logUrl))[0] === length, "it has the value");
        const names = await containersOf(id);
        expect(names.length).toBeGreaterThan(0);
        expect(await engine.docker("inspect", ...names)).not.toContain(canary);
        const run = promisify(execFile);
        const { stdout } = await run(
          "sh",
          ["-c", 'tr "\\0" " " < /dev/null; cat /proc/[0-9]*/cmdline 2>/dev/null || :'],
          {
            ...{ maxBuffer: 64 * 1024 * 1024 },
          },
        );
        expect(stdout).not.toContain(canary);
        const kept = [join(engine.dataRoot, "containers"), join(engine.dataRoot, "..", "exec"), folderOf(id)];
        const found = await run("grep", ["-rlsI", "-D", "skip", canary, ...kept]).catch(() => ({ stdout: "" }));
        expect(found.stdout).toBe("");
        await api().stopService({ id: serviceId });
        await serviceIs(serviceId, STOPPED);
      },
      TIMEOUT_MS,
    );
  });

  test(
    "a container that is removed from outside ends what ran in it",
    async () => {
      const serviceId = await started("removed", { start: "exec sleep 1000" });
      const service = await serviceIs(serviceId, RUNNING);
      const names = (await containersOf(id)).filter((name) => name.includes(keyIn(service)));
      expect(names).toHaveLength(1);
      await engine.docker("rm", "--force", ...names);
      expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("process lost");
      await isCleanedUp(id, keyIn(service));
    },
    TIMEOUT_MS,
  );

  const victims = {
    async supervisor() {
      const { pid } = await supervisorOf(join(berth.dataDir, "runner"), id);
      process.kill(pid, "SIGKILL");
      await eventually(
        async () => (await supervisorOf(join(berth.dataDir, "runner"), id)).pid !== pid,
        "another supervisor",
      );
    },
    async server() {
      await berth.kill();
      await berth.start();
    },
  };

  test.each(Object.entries(victims))(
    "AUT-38 the %s is killed: containers go on, and nothing runs twice",
    async (name, kill) => {
      const start = `echo x >> ${name}-s; echo up; until test -e ${name}-go; do sleep 0.1; done; exit 9`;
      const serviceId = await started(`${name}-s`, { start });
      const service = await serviceIs(serviceId, RUNNING);
      const executionId = await run(
        `${name}-t`,
        `echo x >> ${name}-t; until test -e ${name}-go; do sleep 0.1; done; echo end`,
      );
      await told(`${name}-t`);
      const before = (await containersOf(id)).sort();
      await kill();
      await eventually(
        async () => (await inside()).exec({ command: "true" }),
        "it answers again",
        DEADLINE_MS,
        STEP_MS,
      );
      expect((await containersOf(id)).sort()).toEqual(before);
      expect((await readService(client, serviceId)).status?.phase).toBe(RUNNING);
      await sh(`touch ${name}-go`);
      const { status } = await executionIs(executionId, Phase.SUCCEEDED);
      expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("code 9");
      expect(await sh(`cat ${name}-s ${name}-t`)).toBe("x\nx\n");
      logs = await createEnvironmentLogs(client, id);
      expect(await linesOf(status?.logUrl)).toEqual(["end", ""]);
      expect(await linesOf(service.status?.logUrl)).toEqual(["up", ""]);
      await isCleanedUp();
    },
    TIMEOUT_MS,
  );

  test(
    "no container is left of an environment that stops, or is deleted by force",
    async () => {
      const other = await newEnvironment();
      const serviceId = await started("lasting", { start: "trap 'exit 0' TERM; sleep 1000 & wait" }, {}, other);
      await serviceIs(serviceId, RUNNING);
      expect(await containersOf(other)).toHaveLength(1);
      await client.environments.stopEnvironment({ environmentId: other });
      await reaches(client, other, EnvironmentPhase.STOPPED);
      await isCleanedUp(other);
      expect((await readService(client, serviceId)).status?.phase).toBe(STOPPED);
      await client.environments.startEnvironment({ environmentId: other });
      await reaches(client, other, EnvironmentPhase.RUNNING);
      await run("busy", "trap '' TERM; touch busy; while :; do sleep 1; done", {}, other);
      await eventually(async () => (await containersOf(other)).length === 1, "its container is there");
      await client.environments.deleteEnvironment({ environmentId: other, force: true });
      await isGone(join(berth.dataDir, "runner"), other);
      expect(await containersOf(other)).toEqual([]);
      expect(await processesOf(other)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "an engine that dies takes its containers along; one that is away is told",
    async () => {
      const serviceId = await started("engine", { start: "exec sleep 1000" });
      await serviceIs(serviceId, RUNNING);
      await engine.kill();
      const { status } = await executionIs(await run("without", "touch without"), Phase.FAILED);
      expect(status?.failureMessage).toMatch(
        /^The without: runs_on\.docker needs a container engine; none found on runner /,
      );
      expect(await sh("ls without 2>&1")).toContain("No such file");
      await engine.start();
      expect((await serviceIs(serviceId, FAILED)).status?.failureMessage).toContain("process lost");
      await executionIs(await run("again", "true"), Phase.SUCCEEDED);
      await isCleanedUp();
    },
    TIMEOUT_MS,
  );
});
