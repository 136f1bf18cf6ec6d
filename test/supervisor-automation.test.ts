import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readFile, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  ServicePhase,
  ServiceSchema,
  type ServiceSpecSchema,
  type ServiceStatus,
  TaskExecutionPhase,
  TaskExecutionSchema,
  type TaskExecutionSpec_StepSchema,
  type TaskExecutionStatus,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import { AutomationEngine } from "../src/runner/supervisor/automation/engine.ts";
import { CommandProblem, type News, TIMES } from "../src/runner/supervisor/automation/parts.ts";
import { eventually } from "./harness/wait.ts";

// What takes too long, or too much, for a whole installation: the engine of the supervisor, with short deadlines.

const { RUNNING, STOPPING, STOPPED, FAILED } = ServicePhase;
const MIB = 1024 * 1024;

let folder: string;
let engine: AutomationEngine;
const services = new Map<string, ServiceStatus[]>();
const executions = new Map<string, TaskExecutionStatus>();
const troubles: unknown[] = [];
/** Runs that a container was wanted for, and those that were taken back. */
const asked: string[] = [];
const removed: string[] = [];

function heard(news: News): void {
  if (news.kind === "execution") executions.set(news.id, news.status);
  else services.set(news.id, [...(services.get(news.id) ?? []), news.status]);
}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-engine-"));
  await mkdir(join(folder, "home"));
  engine = new AutomationEngine(
    {
      state: join(folder, "state"),
      logs: join(folder, "logs"),
      variables: (more) => ({ PATH: "/usr/bin:/bin", HOME: join(folder, "home"), ...more }),
      folder: () => join(folder, "home"),
      entrance: () => undefined,
      secrets: async () => new Map(),
      logUrl: (path) => `http://runner/${path}/logs`,
      containers: {
        async start(run, image, { signal }) {
          asked.push(run);
          if (image !== "slow") throw new CommandProblem("no engine");
          return await new Promise((_resolve, reject) =>
            signal.addEventListener("abort", () => reject(new Error("late"))),
          );
        },
        exec: async () => 0,
        remove: (run) => void removed.push(run),
      },
      times: { ...TIMES, serviceStopMs: 400, taskStopMs: 400, readyPauseMs: 20, shownRunningMs: 20, outputMs: 50 },
      unforeseen: (error) => troubles.push(error),
    },
    heard,
  );
  engine.setReady(true);
  engine.sync([], []);
});

afterEach(async () => {
  await engine.close();
  await rm(folder, { recursive: true, force: true, maxRetries: 5 });
  expect(troubles.splice(0)).toEqual([]);
  for (const list of [asked, removed]) list.splice(0);
  services.clear();
  executions.clear();
});

type ServiceSpec = Omit<MessageInitShape<typeof ServiceSpecSchema>, "$typeName">;

/** Wants a service in a phase; resolves with its id. */
function want(id: string, desiredPhase: ServicePhase, spec: ServiceSpec): string {
  const service = create(ServiceSchema, {
    ...{ id, environmentId: "e", metadata: { reference: "s" } },
    spec: { desiredPhase, session: `session-${id}`, ...spec },
  });
  engine.wantService({ service, startedBy: "" });
  return id;
}

const phaseOf = (id: string) => services.get(id)?.at(-1)?.phase;
const serviceIs = (id: string, phase: ServicePhase) =>
  eventually(async () => phaseOf(id) === phase, `it is ${ServicePhase[phase]}`, 20_000, 10);

type Step = MessageInitShape<typeof TaskExecutionSpec_StepSchema>;

/** A step that runs a command. */
function step(command: string, dependsOn: string[] = []): Step & { id: string } {
  const id = randomUUID();
  const task = { id: randomUUID(), spec: { command }, dependsOn };
  return { id, label: "t", step: { case: "task", value: task } };
}

function run(plan: Step[][]): string {
  const id = randomUUID();
  const spec = { plan: plan.map((steps) => ({ steps })), desiredPhase: TaskExecutionPhase.SUCCEEDED };
  const execution = create(TaskExecutionSchema, {
    ...{ id, spec, metadata: { taskId: randomUUID() } },
    status: { phase: TaskExecutionPhase.PENDING },
  });
  engine.wantExecution({ execution, firingId: "", startedBy: "" });
  return id;
}

const hasEnded = (id: string, limitMs = 40_000) =>
  eventually(
    async () => {
      const status = executions.get(id);
      return (status?.phase ?? 0) >= TaskExecutionPhase.SUCCEEDED ? status : undefined;
    },
    "the execution has ended",
    limitMs,
    10,
  );

const isAlive = (pid: string) => existsSync(`/proc/${pid.trim()}`);
const told = (name: string) =>
  eventually(async () => (await readFile(join(folder, "home", name), "utf8")).trim(), `${name} is there`);

describe("what does not end", () => {
  test("AUT-8 a service that ignores the signal is killed with all that it has started, and has failed", async () => {
    const start = `trap '' TERM; setsid sh -c 'trap "" TERM; echo $$ > apart; while :; do sleep 0.1; done' & echo $$ > top
      while :; do sleep 0.1; done`;
    const spec = { commands: { start } };
    const id = want(randomUUID(), RUNNING, spec);
    await serviceIs(id, RUNNING);
    const pids = [await told("top"), await told("apart")];
    want(id, STOPPED, spec);
    await serviceIs(id, FAILED);
    expect(services.get(id)?.map(({ phase }) => phase)).toContain(STOPPING);
    expect(services.get(id)?.at(-1)?.failureMessage).toContain("killed");
    await eventually(async () => !pids.some(isAlive), "nothing of it is left");
  });

  test("a stop command that hangs is killed with the service", async () => {
    const spec = { commands: { start: "echo $$ > top; exec sleep 1000", stop: "echo $$ > stop; exec sleep 1000" } };
    const id = want(randomUUID(), RUNNING, spec);
    await serviceIs(id, RUNNING);
    const top = await told("top");
    want(id, STOPPED, spec);
    await serviceIs(id, FAILED);
    expect(services.get(id)?.at(-1)?.failureMessage).toContain("stop command");
    const stop = await told("stop");
    await eventually(async () => ![top, stop].some(isAlive), "nothing of it is left");
  });
});

describe("in a container", () => {
  const inContainer = (image: string) => ({
    ...{
      commands: { start: "touch ran" },
      runsOn: { target: { case: "docker" as const, value: { image } } },
    },
  });

  test("AUT-35 what keeps it from starting is told, and nothing runs", async () => {
    const id = want(randomUUID(), RUNNING, inContainer("none"));
    await serviceIs(id, FAILED);
    expect(services.get(id)?.at(-1)?.failureMessage).toBe("no engine");
    expect(existsSync(join(folder, "home/ran"))).toBe(false);
    expect(removed).toContain(asked.at(-1));
    await eventually(() => engine.containerRuns().length === 0, "nothing is kept of it");
  });

  test("one that is stopped while its image is on its way has stopped, and is not waited for", async () => {
    const id = want(randomUUID(), RUNNING, inContainer("slow"));
    await eventually(() => asked.length > 0, "it was asked for");
    expect(engine.containerRuns()).toEqual(asked);
    want(id, STOPPED, inContainer("slow"));
    await serviceIs(id, STOPPED);
    expect(removed).toContain(asked[0]);
    const { runsOn } = inContainer("slow");
    const value = { id: randomUUID(), spec: { command: "touch ran", runsOn } };
    run([[{ id: randomUUID(), label: "t", step: { case: "task", value } }]]);
    await eventually(() => asked.length > 1, "the task's was asked for");
    await engine.close();
    expect(removed).toContain(asked[1]);
  });
});

describe("much at once", () => {
  test("a plan of 200 tasks beside 100 services ends, and holds nothing up", async () => {
    const ids = Array.from({ length: 100 }, () =>
      want(randomUUID(), RUNNING, { commands: { start: "exec sleep 1000" } }),
    );
    const level = (count: number) => Array.from({ length: count }, () => step("echo x >> ran"));
    const id = run([level(50), level(100), level(50)]);
    const status = await hasEnded(id, 110_000);
    expect(status.phase, status.failureMessage).toBe(TaskExecutionPhase.SUCCEEDED);
    expect(status.steps).toHaveLength(200);
    expect((await readFile(join(folder, "home/ran"), "utf8")).length).toBe(400);
    for (const each of ids) await serviceIs(each, RUNNING);
  }, 120_000);

  test("output without end is bounded on disk and in memory, and its newest part stays", async () => {
    const before = process.memoryUsage().rss;
    const id = run([[step(`head -c ${96 * MIB} /dev/zero | tr '\\0' x | fold -w 1000; echo; echo last`)]]);
    const status = await hasEnded(id);
    expect(status.phase, status.failureMessage).toBe(TaskExecutionPhase.SUCCEEDED);
    const logs = status.logUrl.replace("http://runner/", "").replace(/\/logs$/, "");
    const sizes = await Promise.all(
      ["log", "log.older"].map((name) =>
        stat(join(folder, "logs", logs, name)).then(
          ({ size }) => size,
          () => 0,
        ),
      ),
    );
    const total = sizes.reduce((sum, size) => sum + size, 0);
    expect(total).toBeGreaterThan(MIB);
    expect(total).toBeLessThan(34 * MIB);
    expect(await readFile(join(folder, "logs", logs, "log"), "utf8")).toMatch(/ last\n$/);
    expect(process.memoryUsage().rss - before).toBeLessThan(400 * MIB);
  });

  test("text that is no UTF-8, and that would command a terminal, is logged as text", async () => {
    const id = run([[step(`printf 'a\\377b\\n\\033[31mred\\033[0m\\n'; printf 'k=\\377\\n' >> $BERTH_OUTPUT`)]]);
    const status = await hasEnded(id);
    expect(status.phase).toBe(TaskExecutionPhase.SUCCEEDED);
    const logs = status.logUrl.replace("http://runner/", "").replace(/\/logs$/, "");
    const text = await readFile(join(folder, "logs", logs, "log"), "utf8");
    expect(text).toContain("a\ufffdb\n");
    expect(text).toContain("\u001b[31mred");
  });
});
