import { chmod, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ServicePhase, TaskExecutionPhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { newService, newTask, readExecution, readService, startTask } from "./harness/automations.ts";
import { type Operations, operations, reaches, supervisorOf, sweepUp, usableClass } from "./harness/environments.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { type StandAloneRunner, startStandAloneRunner } from "./harness/stand-alone-runner.ts";
import { eventually } from "./harness/wait.ts";

// Everything that may die is killed while a service runs and a plan is in its second group.

const { RUNNING, STOPPED } = ServicePhase;
const DEADLINE_MS = 60_000;
const STEP_MS = 100;

let berth: Installation;
let client: BerthClient;
let folder: string;
let runner: StandAloneRunner;
/** An environment of the embedded runner, and one of a runner that is alone. */
const ids = { embedded: "", alone: "" };

async function running(classId: string): Promise<string> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  return (await reaches(client, environment?.id ?? "", EnvironmentPhase.RUNNING)).id;
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-crash-"));
  // Users of environments must be able to pass.
  await chmod(folder, 0o711);
  berth = await startInstallation();
  client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  ids.embedded = await running(await usableClass(client));
  runner = await startStandAloneRunner(client, berth.url, join(folder, "runner"));
  ids.alone = await running(runner.classId);
}, 120_000);

afterAll(async () => {
  await runner?.kill();
  await berth?.terminate();
  for (const dataDir of [join(folder, "runner"), join(berth?.dataDir ?? folder, "runner")]) await sweepUp(dataDir);
  await berth?.[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
}, 120_000);

const isUp = async () => (await fetch(`${berth.url}/readyz`)).status === 200;
const runnerDataDir = () => join(berth.dataDir, "runner");

const victims = {
  async supervisor() {
    const { pid } = await supervisorOf(runnerDataDir(), ids.embedded);
    process.kill(pid, "SIGKILL");
    await eventually(async () => (await supervisorOf(runnerDataDir(), ids.embedded)).pid !== pid, "another supervisor");
  },
  async runner() {
    await runner.kill();
    await runner.start();
  },
  async server() {
    await berth.kill();
    await berth.start();
  },
  async database() {
    const text = await readFile(join(berth.dataDir, "postgres/data/postmaster.pid"), "utf8");
    process.kill(Number(text.split("\n")[0]), "SIGKILL");
    await eventually(async () => !(await isUp()), "the database is gone");
    await eventually(isUp, "it is back", DEADLINE_MS, STEP_MS);
  },
};

test.each(Object.entries(victims))(
  "AUT-38 the %s is killed: services go on, and so does the plan; no step runs twice",
  async (name, kill) => {
    const id = name === "runner" ? ids.alone : ids.embedded;
    const inside = (): Promise<Operations> =>
      eventually(() => operations(client, id), "operations", DEADLINE_MS, STEP_MS);
    const sh = async (command: string) =>
      await eventually(
        async () => (await (await inside()).exec({ command })).stdout || " ",
        command,
        DEADLINE_MS,
        STEP_MS,
      );
    const service = await newService(client, id, `${name}-s`, {
      commands: { start: `echo x >> ~/${name}-s; echo $$ > ~/${name}-pid; exec sleep 1000` },
    });
    const first = await newTask(client, id, `${name}-1`, [service], { command: `echo 1 >> ~/${name}` });
    const second = await newTask(client, id, `${name}-2`, [first], {
      command: `echo 2 >> ~/${name}; until test -e ~/${name}-go; do sleep 0.1; done`,
    });
    const third = await newTask(client, id, `${name}-3`, [second], { command: `echo 3 >> ~/${name}` });
    const { id: executionId } = await startTask(client, third);
    await eventually(async () => (await sh(`cat ~/${name}`)) === "1\n2\n", "the second group", DEADLINE_MS, STEP_MS);
    const pid = (await sh(`cat ~/${name}-pid`)).trim();
    await kill();
    await sh(`touch ~/${name}-go`);
    const ended = await eventually(
      async () => {
        const { status } = await readExecution(client, executionId);
        return (status?.phase ?? 0) >= TaskExecutionPhase.SUCCEEDED ? status : undefined;
      },
      "the plan has ended",
      DEADLINE_MS,
      STEP_MS,
    );
    expect(ended.phase, ended.failureMessage).toBe(TaskExecutionPhase.SUCCEEDED);
    expect(await sh(`cat ~/${name}`)).toBe("1\n2\n3\n");
    expect(await sh(`cat ~/${name}-s`)).toBe("x\n");
    expect((await readService(client, service.id)).status?.phase).toBe(RUNNING);
    expect(await sh(`kill -0 ${pid} && echo alive`)).toBe("alive\n");
    await client.environmentAutomation.stopService({ id: service.id });
    await eventually(
      async () => (await readService(client, service.id)).status?.phase === STOPPED,
      "the service has stopped",
      DEADLINE_MS,
      STEP_MS,
    );
  },
  120_000,
);
