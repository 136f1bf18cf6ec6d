import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readProcess } from "../src/runner/supervisor/processes.ts";
import { failure, gone, isRoot, type TestEnvironment, testEnvironment, waitFor } from "./supervisor-harness.ts";

const MIB = 1024 * 1024;
let environment: TestEnvironment;
let client: TestEnvironment["client"];

beforeAll(async () => {
  environment = await testEnvironment();
  await environment.launch();
  client = environment.client;
});
afterAll(async () => await environment[Symbol.asyncDispose]());

const inWorkspace = (name: string) => readFileSync(join(environment.workspace, name), "utf8");
/** The process whose pid a command wrote to a file. */
const processIn = (name: string) => waitFor(async () => readProcess(Number(await environment.appears(name))));

describe.concurrent("Exec", () => {
  test("ENV-37 a repeated operation id joins the running command, which runs once, and later returns its result", async () => {
    const request = {
      operationId: "join",
      command: "echo run >> join.log; while [ ! -e join.go ]; do sleep 0.05; done; echo out; echo err >&2; exit 4",
    };
    const caller = new AbortController();
    const dropped = client.exec(request, { signal: caller.signal }).catch((error: unknown) => error);
    await environment.appears("join.log");
    caller.abort();
    expect(await dropped).toMatchObject({ code: Code.Canceled });
    const joined = [
      client.exec(request),
      client.exec({ ...request, workingDirectory: environment.workspace, timeoutSeconds: 1 }),
    ];
    await failure(client.exec({ ...request, command: "echo other" }), Code.AlreadyExists);
    await failure(client.exec({ ...request, workingDirectory: "/" }), Code.AlreadyExists);
    await environment.put("workspace/repo/join.go", "");
    const expected = { exitCode: 4, stdout: "out\n", stderr: "err\n" };
    expect(await Promise.all(joined)).toMatchObject([expected, expected]);
    expect(await client.exec(request)).toMatchObject(expected);
    await failure(client.exec({ ...request, command: "echo other" }), Code.AlreadyExists);
    expect(inWorkspace("join.log")).toBe("run\n");
  });

  test("ENV-37 timeout 1 on `sleep 60` gives exit code 124 and says so last", async () => {
    const started = Date.now();
    const { exitCode, stdout, stderr } = await client.exec({
      command: "echo $$ > slow; echo -n before >&2; sleep 60",
      timeoutSeconds: 1,
    });
    expect(Date.now() - started).toBeLessThan(15_000);
    expect({ exitCode, stdout, stderr }).toEqual({
      exitCode: 124,
      stdout: "",
      stderr: "before\ncommand timed out after 1 s\n",
    });
    expect(readProcess(Number(inWorkspace("slow")))).toBeUndefined();
  });

  test("a command that ignores SIGTERM is killed 10 s later, with what it started", { timeout: 30_000 }, async () => {
    const command =
      "trap '' TERM; sh -c 'echo $$ > stubborn-child; while :; do sleep 1; done' & echo $$ > stubborn; wait";
    const result = client.exec({ command, timeoutSeconds: 1 });
    const processes = [await processIn("stubborn"), await processIn("stubborn-child")];
    const { exitCode } = await result;
    expect(exitCode).toBe(124);
    expect(processes.map(({ pid }) => readProcess(pid))).toEqual([undefined, undefined]);
  });

  test("without an operation id every call runs", async () => {
    const request = { command: "echo run >> each.log" };
    await client.exec(request);
    await client.exec(request);
    expect(inWorkspace("each.log")).toBe("run\nrun\n");
  });

  test("exit codes, also of signals; stdin is empty; the directory is the workspace folder", async () => {
    expect(await client.exec({ command: "exit 42" })).toMatchObject({ exitCode: 42 });
    expect(await client.exec({ command: "kill -KILL $$" })).toMatchObject({ exitCode: 137 });
    expect(await client.exec({ command: "kill -TERM $$" })).toMatchObject({ exitCode: 143 });
    expect(await client.exec({ command: "cat; pwd; no-such-command" })).toMatchObject({
      exitCode: 127,
      stdout: `${environment.workspace}\n`,
    });
    expect((await client.exec({ command: "pwd", workingDirectory: ".." })).stdout).toBe(
      `${environment.config.root}/workspace\n`,
    );
    expect((await client.exec({ command: "pwd", workingDirectory: "/usr" })).stdout).toBe("/usr\n");
  });

  test("bad requests", async () => {
    await failure(client.exec({ command: "" }), Code.InvalidArgument);
    await failure(client.exec({ command: "echo \0" }), Code.InvalidArgument);
    await failure(client.exec({ command: `: ${"x".repeat(200_000)}` }), Code.InvalidArgument);
    await failure(client.exec({ command: "true", timeoutSeconds: -1 }), Code.InvalidArgument);
    await failure(client.exec({ command: "true", workingDirectory: "missing" }), Code.NotFound);
    await failure(client.exec({ command: "true", workingDirectory: "a\0b" }), Code.InvalidArgument);
    await failure(client.exec({ command: "true", workingDirectory: "/etc/hostname" }), Code.InvalidArgument);
  });

  test.runIf(isRoot)("a directory the user may not enter is PERMISSION_DENIED", async () => {
    mkdirSync(join(environment.workspace, "closed"), { mode: 0o700 });
    await failure(client.exec({ command: "true", workingDirectory: "closed" }), Code.PermissionDenied);
  });

  test("a command that never started is not remembered", async () => {
    const request = { operationId: "early", command: "echo now", workingDirectory: "early" };
    await failure(client.exec(request), Code.NotFound);
    await client.exec({ command: "mkdir early" });
    expect((await client.exec(request)).stdout).toBe("now\n");
  });

  test("invalid UTF-8 is replaced", async () => {
    const { stdout } = await client.exec({ command: "printf 'a\\377b\\303'" });
    expect(stdout).toBe("a\ufffdb\ufffd");
  });

  test("long output keeps the first and last 4 MiB of each stream, and is stored", async () => {
    const command = "echo first; head -c 12000000 /dev/zero | tr '\\0' x; echo; echo last; echo small >&2";
    for (const _ of ["fresh", "stored"]) {
      const { stdout, stderr } = await client.exec({ operationId: "long", command });
      expect(stderr).toBe("small\n");
      expect(stdout.startsWith("first\nxxx")).toBe(true);
      expect(stdout.endsWith("xxx\nlast\n")).toBe(true);
      const omitted = 6 + 12_000_000 + 1 + 5 - 8 * MIB;
      expect(stdout.length).toBe(8 * MIB + `\n[... ${omitted} bytes left out ...]\n`.length);
    }
  });

  test("a background process neither delays the answer nor is ended by it", async () => {
    const command =
      "(trap '' HUP; while [ ! -e bg.go ]; do sleep 0.05; done; echo noise; echo survived > bg.out) & echo done";
    const started = Date.now();
    expect((await client.exec({ command })).stdout).toBe("done\n");
    expect(Date.now() - started).toBeLessThan(5000);
    await environment.put("workspace/repo/bg.go", "");
    expect(await waitFor(async () => (await environment.appears("bg.out")) || undefined)).toBe("survived\n");
  });

  test("results and their directory are readable for the user alone", async () => {
    await client.exec({ operationId: "private", command: "echo secret" });
    const directory = join(environment.config.root, "run", "exec");
    const key = createHash("sha256").update("private").digest("hex");
    const modes = ["", `${key}.json`, `${key}.result`].map((name) => statSync(join(directory, name)).mode & 0o777);
    expect(modes).toEqual([0o700, 0o600, 0o600]);
  });
});

describe.concurrent("CancelExec", () => {
  test("ends the command with its children; the waiting caller gets 130, and so do later ones", async () => {
    const request = { operationId: "cancel", command: "sh -c 'echo $$ > cancelled; exec sleep 300'; echo never" };
    const result = client.exec(request);
    const child = await processIn("cancelled");
    await client.cancelExec({ operationId: "cancel" });
    expect(await result).toMatchObject({ exitCode: 130, stdout: "" });
    await gone(child);
    await client.cancelExec({ operationId: "cancel" });
    expect(await client.exec(request)).toMatchObject({ exitCode: 130 });
  });

  test("an unknown or finished operation is fine", async () => {
    await client.cancelExec({ operationId: "never seen" });
    await client.exec({ operationId: "brief", command: "echo brief" });
    await client.cancelExec({ operationId: "brief" });
    expect(await client.exec({ operationId: "brief", command: "echo brief" })).toMatchObject({ exitCode: 0 });
  });
});
