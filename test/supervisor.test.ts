import { spawn } from "node:child_process";
import { chownSync, cpSync, existsSync, mkdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Code, createClient } from "@connectrpc/connect";
import { connectNodeAdapter, createConnectTransport } from "@connectrpc/connect-node";
import { describe, expect, onTestFinished, test } from "vitest";
import { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import { connectSupervisor } from "../src/runner/supervisor/client.ts";
import { writeSupervisorConfig } from "../src/runner/supervisor/config.ts";
import { forwardOps } from "../src/runner/supervisor/forward.ts";
import { launchSupervisor, SupervisorStartError, startWaiting } from "../src/runner/supervisor/launch.ts";
import { environmentProcesses, isAlive, readProcess } from "../src/runner/supervisor/processes.ts";
import { liveSupervisor } from "../src/runner/supervisor/record.ts";
import { failure, gone, isRoot, testEnvironment, waitFor } from "./supervisor-harness.ts";

const lines = (text: string) => text.trim().split("\n");

async function startError(launch: Promise<unknown>): Promise<SupervisorStartError> {
  const error = await launch.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof SupervisorStartError)) throw new Error(`expected a start error, got ${error}`);
  return error;
}

describe("a supervisor process", () => {
  test("serves on a socket of its user, in its own session, and can be found by its record", async () => {
    await using environment = await testEnvironment();
    const record = await environment.launch();
    const { config } = environment;
    expect(await environment.client.health()).toEqual({
      ...record,
      environmentId: config.environmentId,
      workspaceFolder: config.workspaceFolder,
      runningExecs: 0,
      inDevContainer: 0,
      activity: undefined,
    });
    expect(liveSupervisor(config.root, config.uid)).toEqual(record);
    const socket = statSync(config.socketPath);
    expect([socket.mode & 0o777, socket.uid]).toEqual([0o600, config.uid ?? process.getuid?.()]);
    expect(readProcess(record.pid)).toMatchObject({ session: record.pid, group: record.pid });
  });

  test.runIf(isRoot)("drops every privilege before it serves, with its program unreadable from then on", async () => {
    await using environment = await testEnvironment();
    const { config, configPath } = environment;
    const hidden = join(configPath, "..", "program");
    for (const part of ["src", "gen", "package.json"]) {
      cpSync(part, join(hidden, part), { recursive: true });
    }
    symlinkSync(join(process.cwd(), "node_modules"), join(hidden, "node_modules"));
    writeSupervisorConfig(configPath, config);
    const child = spawn(process.execPath, [join(hidden, "src/runner/supervisor/main.ts"), configPath], {
      detached: true,
      env: {},
      stdio: ["ignore", "pipe", "inherit"],
    });
    await new Promise((resolve, reject) => child.stdout.once("data", resolve).once("end", reject));
    const status = readFileSync(`/proc/${child.pid}/status`, "utf8");
    const ids = Array(4).fill(config.uid).join("\t");
    expect(status).toContain(`\nUid:\t${ids}\n`);
    expect(status).toContain(`\nGid:\t${ids}\n`);
    expect(status).toMatch(new RegExp(`\\nGroups:\\t${config.gid} ?\\n`));
    expect(status).toMatch(/\nCapEff:\t0+\n/);
    const { stdout } = await environment.client.exec({
      command: `id -u; id -g; id -G; umask; cat ${hidden}/package.json`,
    });
    expect(lines(stdout)).toEqual([`${config.uid}`, `${config.uid}`, `${config.uid}`, "0022"]);
    await failure(environment.client.readFile({ path: configPath }), Code.PermissionDenied);
    await failure(environment.client.writeFile({ path: "/etc/berth-test" }), Code.PermissionDenied);
  });

  test("gives processes the base environment and nothing of its own or its starter's", async () => {
    process.env.STARTER_SECRET = "do not leak";
    onTestFinished(() => void delete process.env.STARTER_SECRET);
    await using environment = await testEnvironment();
    const { config, client } = environment;
    const { pid } = await environment.launch();
    expect(readFileSync(`/proc/${pid}/environ`, "utf8")).not.toContain("STARTER_SECRET");
    const env = async () => {
      const { stdout } = await client.exec({ command: "env" });
      return Object.fromEntries(lines(stdout).map((line) => line.split("=", 2)));
    };
    expect(await env()).toEqual({
      HOME: join(config.root, "home"),
      USER: config.userName,
      LOGNAME: config.userName,
      SHELL: "/bin/sh",
      PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
      LANG: "C.UTF-8",
      FROM_FILE: "yes",
      BERTH_ENVIRONMENT_ID: config.environmentId,
      GITPOD_ENVIRONMENT_ID: config.environmentId,
      PWD: environment.workspace,
    });
    await environment.setEnv({ LANG: "C", GITPOD_API_KEY: "token", BERTH_ENVIRONMENT_ID: "forged" });
    expect(await env()).toMatchObject({
      LANG: "C",
      GITPOD_API_KEY: "token",
      BERTH_ENVIRONMENT_ID: config.environmentId,
    });
    await environment.put("secrets/env.json", "{ broken");
    expect(await env()).toMatchObject({ LANG: "C", GITPOD_API_KEY: "token" });
  });

  test("leaves what was compiled for the next one, in a folder that its user cannot enter", async () => {
    const folder = await mkdtemp(join(tmpdir(), "berth-compiled-"));
    onTestFinished(() => rm(folder, { recursive: true }));
    const files = async () => (await readdir(folder, { recursive: true })).length;
    const startOne = async () => {
      await using environment = await testEnvironment();
      await launchSupervisor(environment.configPath, environment.config, folder);
      const { stdout } = await environment.client.exec({ command: `env; ls ${folder} 2> /dev/null` });
      expect(stdout).not.toContain("NODE_");
      if (isRoot) expect(stdout).not.toMatch(/^v\d+/m);
    };
    await startOne();
    const left = await files();
    expect(left).toBeGreaterThan(50);
    await startOne();
    expect(await files()).toBe(left);
  });

  test.runIf(isRoot)("waits for its environment when it is started ahead, and is as any other then", async () => {
    const folder = await mkdtemp(join(tmpdir(), "berth-compiled-"));
    onTestFinished(() => rm(folder, { recursive: true }));
    await using environment = await testEnvironment();
    const { config, configPath, client } = environment;
    const waiting = startWaiting(folder);
    const { record } = await launchSupervisor(configPath, config, folder, { waiting });
    expect(record.pid).toBe(waiting.child.pid);
    expect(await client.health()).toMatchObject({ ...record, environmentId: config.environmentId });
    const status = readFileSync(`/proc/${record.pid}/status`, "utf8");
    expect(status).toContain(`\nUid:\t${Array(4).fill(config.uid).join("\t")}\n`);
    expect(status).toMatch(/\nCapEff:\t0+\n/);
    expect(readFileSync(`/proc/${record.pid}/environ`, "utf8")).not.toContain("BERTH_");
    const { stdout } = await client.exec({
      command: "id -u; id -G; echo $BERTH_ENVIRONMENT_ID; readlink /proc/self/fd/0",
    });
    expect(lines(stdout)).toEqual([`${config.uid}`, `${config.uid}`, config.environmentId, "/dev/null"]);
    const found = await environmentProcesses({ environmentId: config.environmentId, uid: config.uid });
    expect(found.map(({ pid }) => pid)).toContain(record.pid);
  });

  test("that waits ends with its starter, and one that is gone is not waited for", async () => {
    const folder = await mkdtemp(join(tmpdir(), "berth-compiled-"));
    onTestFinished(() => rm(folder, { recursive: true }));
    const left = startWaiting(folder);
    const ended = new Promise((resolve) => left.child.once("exit", resolve));
    left.child.stdin?.destroy();
    expect(await ended).toBe(0);
    await using environment = await testEnvironment();
    const { record } = await launchSupervisor(environment.configPath, environment.config, folder, {
      waiting: left,
    });
    expect(record.pid).not.toBe(left.child.pid);
    expect((await environment.client.health()).pid).toBe(record.pid);
  });

  test("limits how many processes there may be, and what it starts cannot raise that", async () => {
    await using environment = await testEnvironment();
    await environment.launch();
    const raise = "(ulimit -u 100000 || ulimit -p 100000) 2> /dev/null || echo refused";
    const { stdout } = await environment.client.exec({ command: `cat /proc/self/limits; ${raise}` });
    const [, soft = "", hard = ""] = /Max processes +(\d+) +(\d+)/.exec(stdout) ?? [];
    expect(soft).toBe(hard);
    expect(Number(soft)).toBeLessThanOrEqual(8192);
    expect(stdout).toContain("refused");
  });

  test("is the only one on its socket, and replaces what a dead one left", async () => {
    await using environment = await testEnvironment();
    const first = await environment.launch();
    expect((await startError(environment.launch())).code).toBe(3);
    expect((await environment.client.health()).pid).toBe(first.pid);
    process.kill(first.pid, "SIGKILL");
    await gone(first);
    expect(liveSupervisor(environment.config.root)).toBeUndefined();
    expect(existsSync(environment.config.socketPath)).toBe(true);
    await failure(environment.client.health(), Code.Unavailable);
    await failure(environment.client.exec({ command: "true" }), Code.Unavailable);
    const second = await environment.launch();
    expect((await environment.client.health()).pid).toBe(second.pid);
  });

  test("refuses a configuration that is wrong or in foreign hands", async () => {
    await using environment = await testEnvironment();
    const { config, configPath } = environment;
    await expect(launchSupervisor(configPath, { ...config, socketPath: `/tmp/${"x".repeat(110)}` })).rejects.toThrow(
      "socketPath",
    );
    await expect(launchSupervisor(configPath, { ...config, uid: 0, gid: 0 })).rejects.toThrow("uid");
    await expect(launchSupervisor(configPath, { ...config, workspaceFolder: "repo" })).rejects.toThrow(
      "workspaceFolder",
    );
    if (!isRoot) return;
    const unnamed = await startError(launchSupervisor(configPath, { ...config, uid: undefined, gid: undefined }));
    expect([unnamed.code, unnamed.message]).toEqual([2, expect.stringContaining("uid and gid")]);
    const foreign = await environment.put("run/config.json", JSON.stringify(config));
    const child = spawn(process.execPath, ["src/runner/supervisor/main.ts", foreign], { stdio: "ignore" });
    expect(await new Promise((resolve) => child.once("exit", resolve))).toBe(2);
  });

  test("outlives its starter and hangups", async () => {
    await using environment = await testEnvironment();
    const script = `
      import { launchSupervisor } from ${JSON.stringify(join(process.cwd(), "src/runner/supervisor/launch.ts"))};
      const { record } = await launchSupervisor(${JSON.stringify(environment.configPath)}, ${JSON.stringify(environment.config)});
      console.log(JSON.stringify(record));
      setInterval(() => {}, 1000);`;
    const starter = spawn(process.execPath, ["--input-type=module-typescript", "-e", script], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    const record = JSON.parse(String(await new Promise((resolve) => starter.stdout.once("data", resolve))));
    starter.kill("SIGKILL");
    await new Promise((resolve) => starter.once("exit", resolve));
    process.kill(record.pid, "SIGHUP");
    expect((await environment.client.exec({ command: "echo alive" })).stdout).toBe("alive\n");
    expect(liveSupervisor(environment.config.root, environment.config.uid)).toEqual(record);
  });

  test("on SIGTERM ends what it runs, answers the callers and leaves nothing behind", async () => {
    await using environment = await testEnvironment();
    const record = await environment.launch();
    const { client, config } = environment;
    const result = client.exec({
      operationId: "op",
      command: "trap 'echo bye; exit 7' TERM; echo > up; while :; do sleep 0.1; done",
    });
    await environment.appears("up");
    process.kill(record.pid, "SIGTERM");
    expect(await result).toMatchObject({ exitCode: 7, stdout: "bye\n" });
    await gone(record);
    expect(existsSync(config.socketPath)).toBe(false);
    expect(existsSync(join(config.root, "run", "supervisor.json"))).toBe(false);
    expect(await environmentProcesses(config)).toEqual([]);
    await environment.launch();
    const again = await client.exec({
      operationId: "op",
      command: "trap 'echo bye; exit 7' TERM; echo > up; while :; do sleep 0.1; done",
    });
    expect(again.stdout).toBe("bye\n");
  });

  test("on SIGTERM ends the conversation with its runner when all has been said, instead of waiting for it", async () => {
    await using environment = await testEnvironment();
    const record = await environment.launch();
    const { messages } = await environment.client.automations();
    process.kill(record.pid, "SIGTERM");
    // One that is broken off throws.
    for await (const message of messages) expect(message.type).toBe("containers");
    await gone(record);
  });

  test("killed with a command running: the operation is ABORTED, never repeated, and no process of it stays", async () => {
    await using environment = await testEnvironment();
    const { client } = environment;
    const first = await environment.launch();
    await client.exec({ operationId: "finished", command: "echo kept; exit 3" });
    const command = "echo run >> log; sh -c 'echo $$ > pid; exec sleep 300'";
    const lost = client.exec({ operationId: "running", command }).catch((error: unknown) => error);
    const nameless = client.exec({ command: "echo $$ > pid2; sleep 300" }).catch((error: unknown) => error);
    const processes = await Promise.all(
      ["pid", "pid2"].map((name) => waitFor(async () => readProcess(Number(await environment.appears(name))))),
    );
    process.kill(first.pid, "SIGKILL");
    expect(await lost).toMatchObject({ code: Code.Unavailable });
    expect(await nameless).toMatchObject({ code: Code.Unavailable });
    expect(processes.every(isAlive)).toBe(true);
    await environment.launch();
    await failure(client.exec({ operationId: "running", command }), Code.Aborted);
    await failure(client.exec({ operationId: "running", command: "true" }), Code.AlreadyExists);
    expect(await client.exec({ operationId: "finished", command: "echo kept; exit 3" })).toMatchObject({
      exitCode: 3,
      stdout: "kept\n",
    });
    await Promise.all(processes.map(gone));
    expect(readFileSync(join(environment.workspace, "log"), "utf8")).toBe("run\n");
  });

  test("does not touch a process that merely has the number of a lost one", async () => {
    await using environment = await testEnvironment();
    const innocent = spawn("sleep", ["300"], { detached: true, stdio: "ignore", uid: environment.config.uid });
    onTestFinished(() => void innocent.kill("SIGKILL"));
    const directory = join(environment.config.root, "run", "exec");
    const key = "a".repeat(64);
    mkdirSync(directory);
    if (isRoot) chownSync(directory, environment.config.uid ?? 0, 0);
    const record = {
      key,
      fingerprint: "f",
      state: "running",
      changedAt: Date.now(),
      boot: readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim(),
      process: { pid: innocent.pid, startTime: 1 },
    };
    writeFileSync(join(directory, `${key}.json`), JSON.stringify(record));
    if (isRoot) await environment.put(`run/exec/${key}.json`, JSON.stringify(record));
    await environment.launch();
    expect((await environment.client.exec({ command: "echo fine" })).stdout).toBe("fine\n");
    expect(readProcess(innocent.pid ?? 0)).toBeDefined();
  });

  test("tells the latest activity; reading is none, a running command is one right now", async () => {
    await using environment = await testEnvironment();
    await environment.launch();
    const { client } = environment;
    await client.readFile({ path: "." });
    await client.find({ path: "." });
    await client.listCapabilities({});
    expect((await client.health()).activity).toBeUndefined();
    const before = new Date();
    await client.writeFile({ path: "a", content: Buffer.from("a") });
    const { activity } = await client.health();
    expect(activity?.source).toBe("Ops API");
    expect(activity?.at.getTime()).toBeGreaterThanOrEqual(before.getTime());
    const running = client.exec({ operationId: "long", command: "echo > up; sleep 300" });
    await environment.appears("up");
    const first = (await client.health()).activity?.at ?? before;
    const later = await waitFor(async () => {
      const at = (await client.health()).activity?.at;
      return at && at > first && at;
    });
    expect(Date.now() - later.getTime()).toBeLessThan(5000);
    expect((await client.health()).runningExecs).toBe(1);
    await client.cancelExec({ operationId: "long" });
    await running;
  });

  test("follows a change of the workspace folder", async () => {
    await using environment = await testEnvironment();
    await environment.launch();
    const { client, config } = environment;
    await client.setWorkspaceFolder(join(config.root, "home"));
    expect((await client.exec({ command: "pwd" })).stdout).toBe(`${config.root}/home\n`);
    await failure(client.setWorkspaceFolder("relative"), Code.InvalidArgument);
    expect((await client.health()).workspaceFolder).toBe(join(config.root, "home"));
  });
});

describe("the ops service", () => {
  test("reaches callers of a runner that forwards, over every protocol detail of its own", async () => {
    await using environment = await testEnvironment();
    await environment.launch();
    const absent = connectSupervisor(join(environment.config.root, "run", "absent.sock"), "absent");
    let target = environment.client;
    const routes = connectNodeAdapter({
      routes: (router) =>
        router.service(
          EnvironmentOpsService,
          forwardOps(async () => target),
        ),
    });
    const server = createServer(routes);
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    onTestFinished(() => void server.close());
    const transport = createConnectTransport({
      baseUrl: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
      httpVersion: "1.1",
      useBinaryFormat: false,
    });
    const caller = createClient(EnvironmentOpsService, transport);
    expect((await caller.exec({ command: "echo through" })).stdout).toBe("through\n");
    await caller.writeFile({ path: "f", content: Buffer.from([0, 255]) });
    const { result } = await caller.readFile({ path: "f" });
    expect(result.case === "content" && [...result.value.data]).toEqual([0, 255]);
    await failure(caller.readFile({ path: "missing" }), Code.NotFound);
    await failure(caller.attachTerminal({})[Symbol.asyncIterator]().next(), Code.NotFound);
    target = absent;
    await failure(caller.exec({ command: "true" }), Code.Unavailable);
  });

  test.runIf(isRoot)("is not reached through a link or another user's socket", async () => {
    await using environment = await testEnvironment();
    await environment.launch();
    const { socketPath, root, environmentId } = environment.config;
    const link = join(root, "run", "link.sock");
    symlinkSync(socketPath, link);
    await failure(connectSupervisor(link, environmentId).health(), Code.Unavailable);
    await failure(connectSupervisor(link, environmentId).exec({ command: "true" }), Code.Unavailable);
    await failure(connectSupervisor(socketPath, environmentId, { uid: 1 }).exec({ command: "true" }), Code.Unavailable);
  });
});
