import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer, type RequestListener } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ServicePhase, TaskExecutionPhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import { type Environment, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { readLog } from "../src/cli/automations/log.ts";
import { runAutomations } from "../src/cli/automations.ts";
import { keepCredential } from "../src/cli/credentials.ts";
import { exitCodeOf } from "../src/cli/exit.ts";
import { printable } from "../src/cli/output.ts";
import type { BerthClient } from "../src/client.ts";
import {
  executionsOf,
  newService,
  newTask,
  readExecution,
  readService,
  runningEnvironment,
  type Stage,
  setStage,
  startTask,
} from "./harness/automations.ts";
import { operations, reaches } from "./harness/environments.ts";
import { freePort } from "./harness/free-port.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { startProgram } from "./harness/program.ts";
import { eventually } from "./harness/wait.ts";

// `berth automations`: most of it in this process, with a runner that reports what a test wants.

const TIMEOUT_MS = 90_000;
const { RUNNING, STOPPED } = ServicePhase;
const Phase = TaskExecutionPhase;

let folder: string;
let stage: Stage;
let client: BerthClient;
let environment: Environment;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-automations-"));
  stage = await setStage();
  client = stage.member.client;
  environment = await runningEnvironment(stage);
});

afterAll(async () => {
  expect(stage.plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await stage[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
});

interface Call {
  env?: Record<string, string>;
  input?: string;
  /** Ctrl-C. */
  interrupted?: Promise<void>;
}

/** Variables of somebody outside of environments, with a token. */
const outside = (token = stage.member.token) => ({ XDG_CONFIG_HOME: folder, BERTH_TOKEN: token });

/** A command that goes on; what it prints can be read meanwhile. */
function begin(args: string[], { env = outside(), input = "", interrupted = new Promise(() => {}) }: Call = {}) {
  const [printed, told]: [string[], string[]] = [[], []];
  const ended = runAutomations(args, env, {
    say: (text) => void printed.push(`${text}\n`),
    tell: (text) => void told.push(`${text}\n`),
    async pour(source) {
      for await (const chunk of source) printed.push(String(chunk));
    },
    input: (async function* () {
      yield Buffer.from(input);
    })(),
    interrupted: () => interrupted,
  }).catch((error: Error) => {
    told.push(`${error.message}\n`);
    return exitCodeOf(error);
  });
  return { ended, printed: () => printed.join(""), told: () => told.join("") };
}

async function run(args: string[], call?: Call) {
  const { ended, printed, told } = begin(args, call);
  return { code: await ended, printed: printed(), told: told() };
}

/** From outside, about an environment. */
const on = ({ id }: Environment, ...args: string[]) => [...args, "--environment", id, "--server", stage.plane.url];

async function variablesOf({ id, spec }: Environment) {
  const machineSession = spec?.machine?.session ?? "";
  const { token } = await stage.runner.control.createEnvironmentToken({ environmentId: id, machineSession });
  const api = `${stage.plane.url}/api`;
  return { XDG_CONFIG_HOME: folder, BERTH_ENVIRONMENT_ID: id, ONA_API_KEY: token, ONA_BASE_URL: api };
}

describe("which environment, server and token", () => {
  test("inside of an environment its own, without a word about it", async () => {
    const own = await runningEnvironment(stage);
    await newTask(client, own.id, "build");
    const listed = await run(["list"], { env: await variablesOf(own) });
    expect([listed.code, listed.printed]).toEqual([
      0,
      expect.stringMatching(/^task +build +- +- +The build +[\w-]{36}$/m),
    ]);
    const foreign = await run(["list", "--environment", environment.id], { env: await variablesOf(own) });
    expect([foreign.code, foreign.told]).toEqual([1, expect.stringContaining("not found")]);
  });

  test("outside the one of --environment, with the token of berth login or BERTH_TOKEN", async () => {
    const env = { XDG_CONFIG_HOME: join(folder, "login") };
    const { token } = stage.member;
    const nobody = await run(on(environment, "list"), { env });
    expect([nobody.code, nobody.told]).toEqual([1, expect.stringContaining(`berth login ${stage.plane.url}`)]);
    await keepCredential(env, stage.plane.url, { token, tokenId: "", expiresAt: "", email: "", organizationName: "" });
    for (const args of [
      ["list", "--environment", environment.id],
      on(environment, "list"),
      [...on(environment, "list"), "--json"],
    ]) {
      expect(await run(args, { env })).toMatchObject({ code: 0 });
    }
    const wrong = await run(on(environment, "list"), { env: { ...env, BERTH_TOKEN: "berth_pat_x" } });
    expect([wrong.code, wrong.told]).toEqual([1, expect.stringContaining("does not accept the token")]);
    const nowhere = await run(["list"], { env });
    expect([nowhere.code, nowhere.told]).toEqual([2, expect.stringContaining("--environment")]);
  });

  test("a token of an environment is not sent to another server", async () => {
    const asked: unknown[] = [];
    await using other = await serve((request, response) => {
      asked.push(request.headers.authorization);
      response.writeHead(500).end();
    });
    const env = await variablesOf(environment);
    expect(await run(["list", "--server", other.url], { env })).toMatchObject({ code: 1 });
    expect(asked).toEqual([]);
    const gone = await run(["list", "--server", `http://127.0.0.1:${await freePort()}`], {
      env: { ...env, BERTH_TOKEN: "x" },
    });
    expect([gone.code, gone.told]).toEqual([1, expect.stringContaining("does not answer")]);
  });

  test.each([
    [[], 0],
    [["help"], 0],
    [["destroy"], 2],
    [["run"], 2],
    [["run", ""], 2],
    [["run", "a", "b"], 2],
    [["list", "--what"], 2],
    [["logs", "a", "--tail", "x"], 2],
  ])("%j ends with %i", async (args, code) => {
    expect(await run(args.length > 0 && args[0] !== "help" ? on(environment, ...args) : args)).toMatchObject({ code });
  });
});

describe("list", () => {
  test("shows everything, and nothing that could steer a terminal", async () => {
    const own = await runningEnvironment(stage);
    const empty = await run(on(own, "list"));
    expect([empty.code, empty.printed, empty.told]).toEqual([0, "", expect.stringContaining("no services")]);
    const service = await newService(client, own.id, "db", {}, ["manual", "prebuild"]);
    const name = "\u001b]0;owned\u0007\u202eevil\nline";
    const metadata = { reference: "t", name };
    await client.environmentAutomation.createTask({ environmentId: own.id, metadata, spec: { command: "x" } });
    for (let count = 0; count < 120; count++) await newTask(client, own.id, `many-${count}`);
    const task = await newTask(client, own.id, "last");
    const execution = await startTask(client, task);
    const { printed } = await run(on(own, "list"));
    const lines = printed.trimEnd().split("\n");
    expect(lines).toHaveLength(1 + 1 + 122 + 1);
    expect(lines[1]).toMatch(new RegExp(`^service +db +stopped +manual,prebuild +The db +${service.id}$`));
    expect(lines.at(-1)).toMatch(new RegExp(`^execution +last +pending +manual +- +${execution.id}$`));
    expect(printed).toContain("]0;owned evil line");
    expect(printable(printed.replaceAll("\n", ""))).toBe(printed.replaceAll("\n", ""));
    const json = JSON.parse((await run([...on(own, "list"), "--json"])).printed);
    expect(json.tasks).toHaveLength(122);
    expect(json.services[0]).toMatchObject({ id: service.id, metadata: { reference: "db" } });
    expect(json.taskExecutions).toMatchObject([{ id: execution.id }]);
  });

  test("an environment that the caller cannot see is not an empty one", async () => {
    const stranger = await stage.plane.addUser();
    const { code, told } = await run(on(environment, "list"), { env: outside(stranger.token) });
    expect([code, told]).toEqual([1, expect.stringContaining("not found")]);
  });
});

describe("start and stop", () => {
  test("a service by reference and by id", async () => {
    const { id } = await newService(client, environment.id, "start-stop");
    expect((await run(on(environment, "start", "start-stop"))).told).toContain("start-stop is asked to start");
    expect((await readService(client, id)).spec?.desiredPhase).toBe(RUNNING);
    expect(await run(on(environment, "stop", id))).toMatchObject({ code: 0 });
    expect((await readService(client, id)).spec?.desiredPhase).toBe(STOPPED);
  });

  test("an id comes before a reference that looks like one", async () => {
    const first = await newService(client, environment.id, "first");
    const second = await newService(client, environment.id, first.id);
    await run(on(environment, "start", first.id));
    expect((await readService(client, first.id)).spec?.desiredPhase).toBe(RUNNING);
    expect((await readService(client, second.id)).spec?.desiredPhase).toBe(STOPPED);
  });

  test("an execution by its id; a task has to be told which", async () => {
    const execution = await startTask(client, await newTask(client, environment.id, "to-stop"));
    const vague = await run(on(environment, "stop", "to-stop"));
    expect([vague.code, vague.told]).toEqual([1, expect.stringContaining("id of an execution")]);
    expect(await run(on(environment, "stop", execution.id))).toMatchObject({ code: 0 });
    expect((await readExecution(client, execution.id)).status?.phase).toBe(Phase.STOPPED);
  });

  test.each([["nothing"], ["no such thing"], ["0191f3a0-0000-7000-8000-000000000000"]])(
    "%s is not there",
    async (name) => {
      for (const command of ["start", "stop", "run", "logs"]) {
        const { code, told } = await run(on(environment, command, name));
        expect([code, told]).toEqual([1, expect.stringContaining(`has no`)]);
        expect(told).toContain(name);
      }
    },
  );

  test("what the server refuses is told in its words", async () => {
    const stopped = await runningEnvironment(stage);
    await newService(client, stopped.id, "db");
    await client.environments.stopEnvironment({ environmentId: stopped.id });
    const { code, told } = await run(on(stopped, "start", "db"));
    expect([code, told]).toEqual([1, "the environment does not run; start it first\n"]);
  });
});

describe("run", () => {
  test("detached it prints the execution and ends", async () => {
    const task = await newTask(client, environment.id, "detached");
    const { code, printed } = await run(on(environment, "run", "detached", "--detach"));
    const [execution] = (await executionsOf(client, environment.id)).filter(
      (each) => each.metadata?.taskId === task.id,
    );
    expect([code, printed]).toEqual([0, `${execution?.id}\n`]);
  });

  test.each([
    [Phase.SUCCEEDED, 0, "runs as execution"],
    [Phase.FAILED, 1, "has failed: it is broken"],
    [Phase.STOPPED, 1, "was stopped"],
  ])("waits until the execution is %i and ends with %i", async (phase, code, text) => {
    const task = await newTask(client, environment.id, `wait-${phase}`);
    const running = begin(on(environment, "run", task.id));
    const execution = await eventually(
      async () => (await executionsOf(client, environment.id)).find((each) => each.metadata?.taskId === task.id),
      "the execution",
    );
    const failureMessage = phase === Phase.FAILED ? "it is broken" : "";
    const steps = execution.spec?.plan.flatMap((group) => group.steps.map(({ id }) => ({ id, phase })));
    await stage.runner.reportExecution(execution.id, { phase, failureMessage, steps });
    expect(await running.ended).toBe(code);
    expect(running.told()).toContain(text);
  });

  test("Ctrl-C ends waiting, not the task, and says so", async () => {
    const task = await newTask(client, environment.id, "interrupted");
    const { promise, resolve } = Promise.withResolvers<void>();
    const running = begin(on(environment, "run", "interrupted"), { interrupted: promise });
    await eventually(() => running.told().includes("runs as execution"), "the start");
    resolve();
    expect(await running.ended).toBe(130);
    const execution = (await executionsOf(client, environment.id)).find((each) => each.metadata?.taskId === task.id);
    expect(running.told()).toContain(`berth automations stop ${execution?.id} ends it`);
    expect(execution).toMatchObject({ status: { phase: Phase.PENDING }, spec: { desiredPhase: Phase.UNSPECIFIED } });
  });
});

describe("apply", () => {
  const FILE = `services:
  db:
    name: Database
    commands: { start: ./db.sh }
tasks:
  test:
    name: Tests
    command: npm test
    dependsOn: [db]
`;
  const write = async (text: string | Buffer) => {
    const path = join(folder, `${Math.random()}.yaml`);
    await writeFile(path, text);
    return path;
  };

  test("a file and standard input, with what is odd about them", async () => {
    const own = await runningEnvironment(stage);
    const first = await run(on(own, "apply", await write(FILE)));
    const { services } = await client.environmentAutomation.listServices({ filter: { environmentIds: [own.id] } });
    const { tasks } = await client.environmentAutomation.listTasks({ filter: { environmentIds: [own.id] } });
    expect(first.code).toBe(0);
    expect(first.printed).toMatch(new RegExp(`^service +db +${services[0]?.id}\ntask +test +${tasks[0]?.id}$`, "m"));
    expect(first.told).toContain("trigger");
    const env = await variablesOf(own);
    const second = await run(["apply", "-", "--json"], { env, input: FILE });
    expect(JSON.parse(second.printed)).toEqual({
      updatedServiceIds: services.map(({ id }) => id),
      updatedTaskIds: tasks.map(({ id }) => id),
    });
    expect(await run(["apply", "-"], { env })).toMatchObject({ code: 0, printed: "" });
  });

  test("mistakes are told with file, line and path, and change nothing", async () => {
    const own = await runningEnvironment(stage);
    const path = await write(FILE.replace("command: npm test", "comand: npm test"));
    const wrong = await run(on(own, "apply", path));
    expect([wrong.code, wrong.told]).toEqual([
      1,
      expect.stringMatching(/\.yaml:8: tasks\.test\.comand is not a known/),
    ]);
    expect(wrong.told.startsWith(path)).toBe(true);
    const input = await run(on(own, "apply", "-"), { input: "tasks: [" });
    expect([input.code, input.told]).toEqual([1, expect.stringMatching(/^stdin:1: /)]);
    const unknown = await run(on(own, "apply", "-"), { input: FILE.replace("[db]", "[nothing]") });
    expect([unknown.code, unknown.told]).toEqual([1, expect.stringContaining("nothing")]);
    for (const each of [
      join(folder, "absent"),
      folder,
      await write(Buffer.from([0xff])),
      await write("#".repeat(1024 * 1024 + 1)),
    ]) {
      const { code, told } = await run(on(own, "apply", each));
      expect([code, told.includes(each)]).toEqual([1, true]);
    }
    const { tasks } = await client.environmentAutomation.listTasks({ filter: { environmentIds: [own.id] } });
    expect(tasks).toEqual([]);
  });
});

/** A server whose answers a test writes. */
async function serve(listener: RequestListener) {
  const server = createServer(listener);
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((closed) => server.close(closed));
    },
  };
}

describe("logs", () => {
  const read = async (url: string, options = { follow: false }) => {
    const { signal } = new AbortController();
    const place = { server: stage.plane.url, client, environmentId: environment.id };
    const chunks = [];
    for await (const chunk of readLog(place, url, options, signal)) chunks.push(chunk);
    return Buffer.concat(chunks).toString();
  };

  test("a log that is not ready is asked for again three times, with a logs token", async () => {
    const asked: [string | undefined, string | undefined][] = [];
    await using logs = await serve((request, response) => {
      asked.push([request.url, request.headers.authorization]);
      if (asked.length < 4) response.writeHead(502).end("not ready yet");
      else response.end("ready\n");
    });
    expect(await read(`${logs.url}/logs`)).toBe("ready\n");
    expect(asked).toEqual(Array(4).fill(["/logs?follow=false", expect.stringMatching(/^Bearer berth_log_/)]));
  });

  test("what else can go wrong is told, and the token goes to nobody else", async () => {
    const asked: string[] = [];
    await using elsewhere = await serve((request, response) => {
      asked.push(String(request.headers.authorization));
      response.end();
    });
    await using logs = await serve(({ url }, response) => {
      if (url?.startsWith("/moved")) response.writeHead(302, { location: elsewhere.url }).end();
      else if (url?.startsWith("/cut"))
        response.writeHead(200, { "content-length": "10" }).write("cut", () => response.destroy());
      else response.writeHead(403).end("the token is \u001b[1mfor another environment");
    });
    await expect(read(`${logs.url}/moved`)).rejects.toThrow(/302/);
    await expect(read(`${logs.url}/cut`)).rejects.toThrow(/cannot be read from 127/);
    await expect(read(`${logs.url}/x`)).rejects.toThrow(/: 403 the token is {1,2}\[1mfor another environment$/);
    await expect(read("file:///etc/passwd")).rejects.toThrow(/address/);
    expect(asked).toEqual([]);
  });

  test("a service that never ran has none; one that starts will have one", async () => {
    const { id } = await newService(client, environment.id, "silent");
    await newTask(client, environment.id, "silent-task");
    for (const name of ["silent", "silent-task"]) {
      const none = await run(on(environment, "logs", name, "-f"));
      expect([none.code, none.told]).toEqual([1, expect.stringContaining("never ran")]);
    }
    await client.environmentAutomation.startService({ id });
    const early = await run(on(environment, "logs", "silent"));
    expect([early.code, early.told]).toEqual([1, expect.stringContaining("no log yet")]);
    const { promise, resolve } = Promise.withResolvers<void>();
    const following = begin(on(environment, "logs", "silent", "-f"), { interrupted: promise });
    resolve();
    expect(await following.ended).toBe(130);
  });

  test("a name of a service and a task has to be an id", async () => {
    const service = await newService(client, environment.id, "both");
    await newTask(client, environment.id, "both");
    const both = await run(on(environment, "logs", "both"));
    expect([both.code, both.told]).toEqual([1, expect.stringContaining("give the id")]);
    expect((await run(on(environment, "logs", service.id))).told).toContain("never ran");
  });
});

describe("on a runner that runs things", () => {
  let host: TestHost;
  let real: Environment;

  beforeAll(async () => {
    host = await startHost(stage.plane);
    const { environment: made } = await client.environments.createEnvironment({
      spec: { machine: { class: host.classId } },
    });
    real = await reaches(client, made?.id ?? "", EnvironmentPhase.RUNNING);
  }, TIMEOUT_MS);
  afterAll(() => host?.[Symbol.asyncDispose](), TIMEOUT_MS);

  test(
    "run shows the log as it is and ends as the task does",
    async () => {
      await newTask(client, real.id, "good", [], { command: "echo one; echo '\u001b[1mtwo' >&2" });
      await newTask(client, real.id, "bad", [], { command: "echo three; exit 7" });
      const good = await run(on(real, "run", "good"));
      expect([good.code, good.printed]).toEqual([0, "one\n\u001b[1mtwo\n"]);
      const bad = await run(on(real, "run", "bad"));
      expect([bad.code, bad.printed, bad.told]).toEqual([1, "three\n", expect.stringContaining("code 7")]);
      expect((await run(on(real, "logs", "bad"))).printed).toBe("three\n");
    },
    TIMEOUT_MS,
  );

  test(
    "logs of steps, the last lines, and times",
    async () => {
      const base = await newTask(client, real.id, "base", [], { command: "echo base-1; echo base-2" });
      await newTask(client, real.id, "top", [base], { command: "echo top" });
      expect(await run(on(real, "run", "top"))).toMatchObject({
        code: 0,
        printed: "[The base] base-1\n[The base] base-2\n[The top] top\n",
      });
      expect((await run(on(real, "logs", "top", "--step", "The base"))).printed).toBe("base-1\nbase-2\n");
      expect((await run(on(real, "logs", "top", "--tail", "1"))).printed).toBe("[The top] top\n");
      expect((await run(on(real, "logs", "top", "--timestamps", "--tail", "1"))).printed).toMatch(
        /^\d{4}-\S+Z \[The top\] top\n$/,
      );
      const wrong = await run(on(real, "logs", "top", "--step", "nothing"));
      expect([wrong.code, wrong.told]).toEqual([1, expect.stringContaining("The base, The top")]);
    },
    TIMEOUT_MS,
  );

  test(
    "processes of the environment have the program, for what is theirs",
    async () => {
      const { exec } = await operations(client, real.id);
      const file = "tasks: { piped: { name: Piped, command: echo piped } }";
      const inside = await exec({
        command: `echo '${file}' | berth automations apply - && berth automations run piped`,
      });
      expect(inside).toMatchObject({
        exitCode: 0,
        stdout: expect.stringMatching(/^task +piped +[\w-]{36}\npiped\n$/m),
      });
      // Login shells of many hosts replace PATH; what the task sets itself comes first.
      const env = [{ name: "PATH", source: { case: "value" as const, value: "/opt/own:/usr/bin:/bin" } }];
      await newTask(client, real.id, "nested", [], { command: "berth automations list --json | head -c 13" });
      await newTask(client, real.id, "own-path", [], { command: "echo $PATH; env | grep -c BERTH_PATH", env });
      expect(await run(on(real, "run", "nested"))).toMatchObject({ code: 0, printed: '{"services":[\n' });
      expect((await run(on(real, "run", "own-path"))).printed).toMatch(/^\/opt\/own:\/usr\/bin:\/bin:.*\n0\n$/);
      const { stdout } = await exec({
        command: 'stat -c "%U %a" "$(dirname "$(command -v berth)")"; touch "$(command -v berth)" || echo kept',
      });
      if (process.getuid?.() === 0) expect(stdout).toBe("root 755\nkept\n");
    },
    TIMEOUT_MS,
  );

  test(
    "the program follows a service until Ctrl-C, and a stop ends what it reads",
    async () => {
      const { id } = await newService(client, real.id, "web", { commands: { start: "echo up; exec sleep 300" } });
      await run(on(real, "start", "web"));
      await using program = startProgram(on(real, "automations", "logs", "web", "-f"), outside());
      const following = begin(on(real, "logs", "web", "-f"));
      await program.says("up\n");
      program.send("SIGINT");
      expect(await program.ended()).toBe(130);
      await eventually(() => following.printed() === "up\n", "its log");
      await run(on(real, "stop", "web"));
      expect(await following.ended).toBe(0);
      await eventually(async () => (await readService(client, id)).status?.phase === STOPPED, "the end");
    },
    TIMEOUT_MS,
  );
});
