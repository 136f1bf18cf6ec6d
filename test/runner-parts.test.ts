import { randomBytes, randomUUID } from "node:crypto";
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import { LogSectionOutcome } from "../gen/gitpod/v1/environment_logs_pb.js";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { Access } from "../src/runner/access.ts";
import { ControlGroups } from "../src/runner/cgroups.ts";
import { CommandTimeout, runCommand } from "../src/runner/commands.ts";
import { prepareRuntime } from "../src/runner/containers/runtime.ts";
import type { ControlPlane } from "../src/runner/control-plane.ts";
import { removeTree, writeAtomically } from "../src/runner/files.ts";
import { parseJsonc } from "../src/runner/jsonc.ts";
import { EnvironmentLog, LogSections, lineWriter } from "../src/runner/logs.ts";
import { environmentPaths, forgetSocket, runtimeFolder, supervisorSocket } from "../src/runner/paths.ts";
import { redact } from "../src/runner/redact.ts";
import { allOf, SideWork } from "../src/runner/side-work.ts";
import { ENTRANCE } from "../src/runner/supervisor/config.ts";
import { userName } from "../src/runner/users.ts";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-parts-"));
});
afterAll(async () => {
  await rm(folder, { recursive: true, force: true });
});

function readAll(log: EnvironmentLog, from = 0): { text: string; next: number } {
  const parts: Buffer[] = [];
  let position = from;
  for (;;) {
    const { data, next } = log.read(position);
    if (next === position) return { text: Buffer.concat(parts).toString(), next };
    parts.push(data);
    position = next;
  }
}

test("what containers run of an earlier program stays as long as one of them leads to it", async () => {
  const dataDir = join(folder, "runtimes");
  const [used, unused, id] = ["a".repeat(32), "b".repeat(32), randomUUID()];
  const all = runtimeFolder(dataDir);
  const entrance = join(environmentPaths(dataDir, id).root, ENTRANCE);
  await mkdir(dirname(entrance), { recursive: true });
  for (const key of [used, unused]) await mkdir(join(all, key), { recursive: true });
  await writeFile(entrance, `#!/bin/sh\nexec '${join(all, used)}/lib/ld.so' '${join(all, used)}/node' "$@"\n`);
  const { enter } = await prepareRuntime(dataDir);
  const present = basename(dirname(dirname(enter[0] ?? "")));
  expect((await readdir(all)).sort()).toEqual([used, present].sort());
  await rm(entrance);
  await prepareRuntime(dataDir);
  expect(await readdir(all)).toEqual([present]);
});

describe("side by side", () => {
  const { signal } = new AbortController();

  test("nothing is under way any more when one has failed", async () => {
    let isUnderWay = true;
    const slow = Promise.withResolvers<void>();
    const other = slow.promise.then(() => {
      isUnderWay = false;
    });
    const all = allOf(Promise.reject(new Error("first")), other);
    slow.resolve();
    await expect(all).rejects.toThrow("first");
    expect(isUnderWay).toBe(false);
    expect(await allOf(Promise.resolve(1), Promise.resolve("two"))).toEqual([1, "two"]);
  });

  test("work that has become pointless is ended, and what it says then does not count", async () => {
    const work = new SideWork(
      (ends) => new Promise((_resolve, reject) => ends.addEventListener("abort", () => reject(ends.reason))),
      signal,
    );
    await work.cancel();
    await work.done;
    await expect(new SideWork(() => Promise.reject(new Error("its own")), signal).done).rejects.toThrow("its own");
  });
});

describe("log", () => {
  test("keeps at most 10 MiB, drops the oldest, and readers go on across that", () => {
    const log = new EnvironmentLog(join(folder, "big.log"));
    const line = (index: number) => `${String(index).padStart(8, "0")} ${"x".repeat(1000)}`;
    for (let index = 0; index < 4000; index++) log.write(line(index));
    const first = readAll(log);
    expect(first.text.startsWith("00000000")).toBe(true);
    for (let index = 4000; index < 20_000; index++) log.write(line(index));
    const all = readAll(log).text;
    expect(all.length).toBeLessThanOrEqual(10 * 1024 * 1024 + 2000);
    expect(all.length).toBeGreaterThan(5 * 1024 * 1024);
    expect(all.trimEnd().endsWith(line(19_999))).toBe(true);
    const rest = readAll(log, first.next).text;
    expect(rest.startsWith(all.slice(0, 8))).toBe(true);
    expect(readAll(new EnvironmentLog(join(folder, "big.log"))).text).toBe(all);
  });

  test("tells readers of news, and that nothing more comes", async () => {
    const log = new EnvironmentLog(join(folder, "news.log"));
    log.live = true;
    const news = log.changed(10_000, new AbortController().signal);
    log.write("x");
    await news;
    const end = log.changed(10_000, new AbortController().signal);
    log.live = false;
    await end;
    expect(log.live).toBe(false);
  });

  test("sections that are left open are ended by whoever comes later", () => {
    const sections = { count: 0, open: [] };
    const path = join(folder, "sections.log");
    new LogSections(new EnvironmentLog(path), sections).open("content");
    const later = new LogSections(new EnvironmentLog(path), structuredClone(sections));
    later.open("content");
    later.end("content", LogSectionOutcome.SUCCESS);
    const marks = readAll(later.log).text.match(/"id":"content-\d+"|CANCELLED|SUCCESS/g);
    expect(marks).toEqual([
      '"id":"content-1"',
      '"id":"content-1"',
      "CANCELLED",
      '"id":"content-2"',
      '"id":"content-2"',
      "SUCCESS",
    ]);
  });

  test("ENV-29 what began earlier is told to its end before what began beside it", () => {
    const sections = { count: 0, open: [] };
    const log = new EnvironmentLog(join(folder, "beside.log"));
    const told = new LogSections(log, sections);
    told.open("machine");
    log.hold();
    told.open("content");
    log.write("Cloning");
    told.end("content", LogSectionOutcome.SUCCESS);
    expect(readAll(log).text.match(/\w+-\d|Cloning/g)).toEqual(["machine-1"]);
    expect(sections.open.map(({ id }) => id)).toEqual(["machine-1"]);
    log.release(() => {
      log.write("The supervisor answers");
      told.end("machine", LogSectionOutcome.SUCCESS);
    });
    log.write("after");
    expect(readAll(log).text.match(/\w+-\d|Cloning|answers|after/g)).toEqual([
      "machine-1",
      "answers",
      "machine-1",
      "content-2",
      "Cloning",
      "content-2",
      "after",
    ]);
    expect(sections.open).toEqual([]);
  });

  test("of what is kept back only so much stays", () => {
    const log = new EnvironmentLog(join(folder, "held.log"));
    log.hold();
    for (let index = 0; index < 10_000; index++) log.write(`line ${index}`);
    log.release(() => log.write("first"));
    const lines = readAll(log).text.trimEnd().split("\n");
    expect([lines[0], lines[1], lines.length]).toEqual(["first", "line 0", 2_001]);
  });

  test("of a progress line only some states are kept", () => {
    const lines: string[] = [];
    const writer = lineWriter((line) => lines.push(line));
    for (const text of [
      "Receiving: 1%\rReceiving: 2%\r",
      "Receiving: 99%\rReceiving: 100%, done.\nnext",
      "\n",
      "end",
    ]) {
      writer.push(Buffer.from(text));
    }
    writer.end();
    expect(lines).toEqual(["Receiving: 2%", "Receiving: 100%, done.", "next", "end"]);
  });

  test("credentials do not get in", () => {
    const token = tokenText(TokenKind.ENVIRONMENT, randomBytes);
    const text = redact(`a ${token} https://user:secret@host/x http://tok@h Authorization: Basic abc= done`);
    expect(text).not.toMatch(/secret|abc=|tok@/);
    expect(text).not.toContain(token);
    expect(text).toContain("https://[redacted]@host/x");
  });
});

test("commands end with their time, their output is bounded, and nothing of the runner's variables reaches them", async () => {
  process.env.BERTH_TEST_SECRET = "secret";
  const { stdout } = await runCommand("env", [], { timeoutMs: 10_000 });
  delete process.env.BERTH_TEST_SECRET;
  expect(stdout).not.toContain("BERTH_TEST_SECRET");
  const long = await runCommand("sh", ["-c", "yes | head -c 1000000; exit 3"], { timeoutMs: 10_000, maxOutput: 1000 });
  expect([long.code, long.stdout.length]).toEqual([3, 1000]);
  await expect(runCommand("sleep", ["60"], { timeoutMs: 100 })).rejects.toThrow(CommandTimeout);
  const cut = new AbortController();
  const running = runCommand("sh", ["-c", "trap '' TERM; sleep 60 & wait"], {
    timeoutMs: 60_000,
    signal: cut.signal,
    onStart: async () => cut.abort(new Error("enough")),
  });
  await expect(running).rejects.toThrow("enough");
  await expect(runCommand("/no/such", [], { timeoutMs: 1000 })).rejects.toMatchObject({ code: "ENOENT" });
});

test("files are replaced whole, links and all; trees of any depth are removed", async () => {
  const path = join(folder, "atomic");
  await writeAtomically(path, "one");
  await writeAtomically(path, "two");
  expect(await readFile(path, "utf8")).toBe("two");
  const deep = join(folder, "deep");
  await mkdir(deep);
  const script =
    "i=0; while [ $i -lt 300 ]; do mkdir aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa && cd -P a* || exit 1; i=$((i+1)); done";
  await runCommand("sh", ["-c", script], { cwd: deep, timeoutMs: 20_000 });
  await removeTree(deep);
  await expect(readFile(deep)).rejects.toMatchObject({ code: "ENOENT" });
});

test("dev container files may have comments and trailing commas; hostile ones cost no time", () => {
  expect(parseJsonc('\uFEFF{ // c\n "a": "x//y,}", /* , } */ "b": [1, 2,], "c\\"": {"d": 1e3,},}')).toEqual({
    a: "x//y,}",
    b: [1, 2],
    'c"': { d: 1000 },
  });
  for (const bad of ['{"a" 1}', "{", '{"a":1 2}', "/*", "[1,,2]", ",", ""])
    expect(() => parseJsonc(bad)).toThrow(SyntaxError);
  const started = performance.now();
  for (const piece of [",/*", "/*", '"\\', "//", ", "]) expect(() => parseJsonc(piece.repeat(300_000))).toThrow();
  expect(performance.now() - started).toBeLessThan(5000);
});

describe("control groups", () => {
  test("limits go to the group of the environment, below the runner's own", async () => {
    const root = join(folder, "cgroup");
    await mkdir(join(root, "service"), { recursive: true });
    await writeFile(join(root, "cgroup.controllers"), "cpuset cpu io memory pids\n");
    await writeFile(join(root, "service/cgroup.subtree_control"), "");
    await writeFile(join(folder, "self"), "0::/service\n");
    const groups = await ControlGroups.open(root, join(folder, "self"));
    await groups?.prepare("id", { cpuCores: 2, memoryMib: 512 });
    await groups?.add("id", 42);
    const read = (name: string) => readFile(join(root, "service", name), "utf8");
    expect(await read("cgroup.subtree_control")).toBe("+cpu +memory +pids");
    expect(await read("berth-id/cpu.max")).toBe("200000 100000");
    expect(await read("berth-id/memory.max")).toBe(String(512 * 1024 * 1024));
    expect(await read("berth-id/pids.max")).toBe("8192");
    expect(await read("berth-id/cgroup.procs")).toBe("42");
    await groups?.prepare("id", { cpuCores: undefined, memoryMib: undefined });
    expect(await read("berth-id/cpu.max")).toBe("max 100000");
    await groups?.remove("none");
  });

  test("without the unified hierarchy there are none", async () => {
    expect(await ControlGroups.open(join(folder, "nothing"))).toBeUndefined();
  });
});

test("names of users come from the random end of the id", () => {
  expect(userName("01a1fdb7-9a58-7209-8cc6-863ffaf0fe6c")).toBe("berth-863ffaf0");
  expect(userName("01a1fdb7-9a58-7209-8cc6-863ffaf0fe6c", 1)).toBe("berth-863ffaf0-fe6c1");
});

test("a socket below a deep folder is reached by a short path", async () => {
  const paths = environmentPaths(join(folder, "d".repeat(80)), "01a1fdb7-9a58-7209-8cc6-863ffaf0fe6c");
  const socket = await supervisorSocket(paths);
  expect(Buffer.byteLength(socket)).toBeLessThanOrEqual(107);
  expect(await supervisorSocket(paths)).toBe(socket);
  await forgetSocket(paths);
});

describe("tokens presented to the runner", () => {
  afterEach(() => {
    vi.useRealTimers();
  });

  function controlPlane(answer: () => object) {
    const introspectToken = vi.fn(async () => answer());
    return { introspectToken, controlPlane: { control: { introspectToken } } as unknown as ControlPlane };
  }

  test("answers are kept for 30 seconds, refusals for less, failures not at all", async () => {
    vi.useFakeTimers({ toFake: ["Date"] });
    const token = tokenText(TokenKind.ENVIRONMENT_ACCESS, randomBytes);
    const kinds = [Kind.ENVIRONMENT_ACCESS];
    let active: boolean | undefined = true;
    const { introspectToken, controlPlane: plane } = controlPlane(() => {
      if (active === undefined) throw new Error("away");
      return { active, kind: Kind.ENVIRONMENT_ACCESS, environmentId: "e" };
    });
    const access = new Access(plane);
    const [first] = await Promise.all([access.judge(token, "e", kinds), access.judge(token, "e", kinds)]);
    expect(first).toMatchObject({ grant: { environmentId: "e" } });
    expect(await access.judge(token, "f", kinds)).toBe("other");
    expect(introspectToken).toHaveBeenCalledTimes(1);
    active = false;
    vi.advanceTimersByTime(29_000);
    expect(await access.judge(token, "e", kinds)).toMatchObject({ grant: {} });
    vi.advanceTimersByTime(2_000);
    expect(await access.judge(token, "e", kinds)).toBe("none");
    active = undefined;
    vi.advanceTimersByTime(6_000);
    expect(await access.judge(token, "e", kinds)).toBe("unknown");
    active = true;
    expect(await access.judge(token, "e", kinds)).toMatchObject({ grant: {} });
  });

  test("a stream ends when its token is withdrawn, not when its time is over", async () => {
    vi.useFakeTimers({ toFake: ["Date"] });
    const token = tokenText(TokenKind.LOGS, randomBytes);
    const { controlPlane: plane } = controlPlane(() => ({ active: false }));
    const access = new Access(plane);
    const grant = {
      kind: Kind.ENVIRONMENT_LOGS,
      environmentId: "e",
      port: 0,
      authNonce: 0n,
      subjectId: "",
      expiresAt: Date.now() + 60_000,
    };
    expect(await access.isWithdrawn(token, grant)).toBe(true);
    vi.advanceTimersByTime(61_000);
    expect(await access.isWithdrawn(token, grant)).toBe(false);
  });

  test("an expired token opens nothing, however fresh the answer", async () => {
    const { controlPlane: plane } = controlPlane(() => ({
      ...{ active: true, kind: Kind.ENVIRONMENT_LOGS, environmentId: "e" },
      expiresAt: { seconds: 1n, nanos: 0 },
    }));
    expect(await new Access(plane).judge(tokenText(TokenKind.LOGS, randomBytes), "e", [Kind.ENVIRONMENT_LOGS])).toBe(
      "none",
    );
  });
});
