import { createHash, randomBytes } from "node:crypto";
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { environmentProcesses, type ProcessRef, readProcess } from "../src/runner/supervisor/processes.ts";
import { Scrollback } from "../src/runner/supervisor/scrollback.ts";
import { TerminalOutput } from "../src/runner/supervisor/terminal-output.ts";
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

/** A terminal that somebody looks at. */
class Screen {
  readonly id: string;
  readonly kinds: (string | undefined)[] = [];
  text = "";
  size: [number, number] | undefined;
  exitCode: number | undefined;
  readonly #client: TestEnvironment["client"];
  readonly #left = new AbortController();
  readonly ended: Promise<unknown>;

  constructor(id: string, from = client) {
    this.id = id;
    this.#client = from;
    this.ended = this.#watch().catch((error: unknown) => error);
  }

  async #watch(): Promise<void> {
    for await (const { content } of this.#client.attachTerminal(
      { terminalId: this.id },
      { signal: this.#left.signal },
    )) {
      this.kinds.push(content.case);
      if (content.case === "replay") this.size = [content.value.cols, content.value.rows];
      if (content.case === "exited") this.exitCode = content.value.exitCode;
      else if (content.value) this.text += Buffer.from(content.value.data).toString();
    }
  }

  /** Waits for output; what matched is taken off it. */
  async shows(pattern: RegExp): Promise<RegExpExecArray> {
    const found = await waitFor(() => pattern.exec(this.text) ?? undefined).catch(() => {
      throw new Error(`${pattern} does not match ${JSON.stringify(this.text.slice(-500))}`);
    });
    this.text = this.text.slice(found.index + found[0].length);
    return found;
  }

  async type(text: string): Promise<void> {
    await this.#client.writeTerminal({ terminalId: this.id, data: Buffer.from(text) });
  }

  leave(): void {
    this.#left.abort();
  }
}

type Create = Parameters<TestEnvironment["client"]["createTerminal"]>[0];

async function terminal(request: Create = {}, from = client): Promise<Screen> {
  const env = { PS1: "$ ", ...request.env };
  return new Screen((await from.createTerminal({ ...request, env })).terminalId, from);
}

/** The process whose pid a shell shows as `pid=`. */
async function shownProcess(screen: Screen): Promise<ProcessRef> {
  const [, pid] = await screen.shows(/pid=(\d+)\r/);
  return await waitFor(() => readProcess(Number(pid)));
}

const listed = async (id: string) =>
  (await client.listTerminals({})).terminals.find(({ terminalId }) => terminalId === id);

describe("a terminal", () => {
  test("shows a replay first, what comes then, and at last how its shell ended", async () => {
    const annotations = { owner: "me", empty: "" };
    const before = new Date();
    const screen = await terminal({ annotations, initialCols: 100, initialRows: 30 });
    await screen.shows(/\$ /);
    await screen.type("echo $((40+2)); stty size\n");
    await screen.shows(/42\r\n30 100\r\n/);
    const info = await listed(screen.id);
    expect(info).toMatchObject({ shell: "/bin/sh", workingDirectory: environment.workspace, cols: 100, rows: 30 });
    expect(info?.annotations).toEqual(annotations);
    expect(Number(info?.createdAt?.seconds)).toBeGreaterThanOrEqual(Math.floor(before.getTime() / 1000));
    await screen.type("exit 7\n");
    await screen.ended;
    expect(screen.exitCode).toBe(7);
    expect([screen.kinds[0], screen.kinds.at(-1)]).toEqual(["replay", "exited"]);
    expect(new Set(screen.kinds.slice(1, -1))).toEqual(new Set(["data"]));
    expect(screen.size).toEqual([100, 30]);
    // It is known for a while, and can still be looked at.
    expect(await listed(screen.id)).toEqual(info);
    const late = new Screen(screen.id);
    await late.ended;
    expect([late.kinds, late.exitCode]).toEqual([["replay", "exited"], 7]);
    expect(late.text).toContain("42\r\n30 100");
    await failure(client.writeTerminal({ terminalId: screen.id, data: Buffer.from("x") }), Code.FailedPrecondition);
    await failure(client.resizeTerminal({ terminalId: screen.id, cols: 1, rows: 1 }), Code.FailedPrecondition);
    await failure(client.closeTerminal({ terminalId: screen.id }), Code.FailedPrecondition);
  });

  test("is a real one, with job control and the environment of every process", async () => {
    const { root, userName, environmentId, uid } = environment.config;
    const env = { MINE: "a b", BERTH_ENVIRONMENT_ID: "forged", LANG: "C" };
    const screen = await terminal({ shell: "/bin/bash", workingDirectory: "..", env });
    await screen.type("tty; pwd; id -u; echo =$FROM_FILE=$MINE=$BERTH_ENVIRONMENT_ID=$HOME=$USER=$LANG=$TERM=\n");
    await screen.shows(/\/dev\/pts\/\d+\r\n/);
    await screen.shows(new RegExp(`${root}/workspace\r\n${uid ?? process.getuid?.()}\r\n`));
    await screen.shows(new RegExp(`=yes=a b=${environmentId}=${root}/home=${userName}=C=xterm-256color=`));
    await screen.type("sleep 300\n");
    await screen.shows(/sleep 300\r\n/);
    await waitFor(async () => (await client.exec({ command: "pgrep -fx 'sleep 300'" })).exitCode === 0);
    await screen.type("\x03");
    await screen.type("echo status=$?\n");
    await screen.shows(/status=130\r\n/);
    await screen.type("sleep 300 & jobs; kill %1; wait; exit\n");
    await screen.shows(/Running\s+sleep 300/);
    await screen.ended;
    expect(screen.exitCode).toBe(0);
  });

  test("has many readers, with or without what was before", async () => {
    const screen = await terminal();
    await screen.type("echo one-$((1))\n");
    await screen.shows(/one-1\r\n/);
    const read = async (skipHistory: boolean) => {
      let text = "";
      for await (const { data } of client.readTerminal({ terminalId: screen.id, skipHistory })) {
        text += Buffer.from(data).toString();
      }
      return text;
    };
    const others = [read(false), read(true), read(false)];
    await screen.type("stty -echo; echo two-$((2)); exit 3\n");
    const [all, live, again] = await Promise.all(others);
    await screen.ended;
    expect(all).toContain("one-1\r\n");
    expect(all).toContain("two-2\r\n");
    expect(again).toBe(all);
    expect(live).toContain("two-2\r\n");
    expect(live).not.toContain("one-1\r\n");
    expect(await read(true)).toBe("");
  });

  test("changes its size", async () => {
    const screen = await terminal();
    await client.resizeTerminal({ terminalId: screen.id, cols: 1000, rows: 1 });
    await screen.type("stty size\n");
    await screen.shows(/1 1000\r\n/);
    expect(await listed(screen.id)).toMatchObject({ cols: 1000, rows: 1 });
    for (const [cols, rows] of [
      [0, 24],
      [80, 0],
      [1001, 24],
      [80, 1001],
    ]) {
      await failure(client.resizeTerminal({ terminalId: screen.id, cols, rows }), Code.InvalidArgument);
    }
    await client.closeTerminal({ terminalId: screen.id });
  });

  test("loses nothing that was written before the shell ended", async () => {
    for (let round = 0; round < 5; round++) {
      const screen = await terminal({ env: { PS1: "" } });
      await screen.type("stty -echo; echo begin; head -c 200000 /dev/zero | tr '\\0' x; echo end; exit\n");
      await screen.ended;
      expect(screen.text).toMatch(/begin\r\nx{200000}end\r\n$/);
    }
  });

  test("waits for a reader, so that a long output reaches it whole", async () => {
    const screen = await terminal({ env: { PS1: "" } });
    const bytes = 30_000_000;
    let received = 0;
    const hash = createHash("sha256");
    const reading = (async () => {
      for await (const { data } of client.readTerminal({ terminalId: screen.id, skipHistory: true })) {
        received += data.length;
        hash.update(data);
      }
    })();
    screen.leave();
    await screen.type(`stty -echo -opost; clear; head -c ${bytes} /dev/zero | tr '\\0' x; exit\n`);
    await reading;
    expect(received).toBeGreaterThan(bytes);
  });

  test("takes large input whole, and no more than fits while nobody reads it", async () => {
    const data = randomBytes(MIB);
    const screen = await terminal({ env: { PS1: "" } });
    await screen.type("stty raw -echo; echo ready; head -c 1048576 | sha256sum; sleep 300\n");
    await screen.shows(/ready\n/);
    await client.writeTerminal({ terminalId: screen.id, data });
    await screen.shows(new RegExp(createHash("sha256").update(data).digest("hex")));
    await failure(client.writeTerminal({ terminalId: screen.id, data: Buffer.alloc(MIB + 1) }), Code.ResourceExhausted);
    await client.writeTerminal({ terminalId: screen.id, data: Buffer.alloc(MIB) });
    // The kernel takes some of it; the rest waits without holding anybody up.
    await failure(client.writeTerminal({ terminalId: screen.id, data: Buffer.alloc(MIB) }), Code.ResourceExhausted);
    expect((await client.exec({ command: "echo alive" })).stdout).toBe("alive\n");
    await client.closeTerminal({ terminalId: screen.id });
    await screen.ended;
    expect(screen.exitCode).toBe(129);
  });
});

describe("CloseTerminal", () => {
  test("hangs up; what ignores that is killed 5 s later with the rest of the session", {
    timeout: 40_000,
  }, async () => {
    const screen = await terminal({ shell: "/bin/bash" });
    await screen.type(
      "trap '' HUP; (sleep 300; true) & echo pid=$!; nohup sleep 300 >/dev/null & echo pid=$!; echo pid=$$\n",
    );
    const processes = [await shownProcess(screen), await shownProcess(screen), await shownProcess(screen)];
    const started = Date.now();
    await Promise.all([1, 2].map(() => client.closeTerminal({ terminalId: screen.id })));
    expect(Date.now() - started).toBeGreaterThan(4500);
    await Promise.all(processes.map(gone));
    await screen.ended;
    expect(screen.exitCode).toBe(137);
  });

  test("leaving a shell spares what was told to stay", async () => {
    const screen = await terminal({ shell: "/bin/bash" });
    await screen.type("nohup sleep 300 >/dev/null 2>&1 & echo pid=$!; exit\n");
    const job = await shownProcess(screen);
    await screen.ended;
    expect(readProcess(job.pid)?.startTime).toBe(job.startTime);
    process.kill(job.pid, "SIGKILL");
  });

  test("a terminal that nobody knows is NOT_FOUND", async () => {
    const terminalId = "nowhere";
    await failure(client.closeTerminal({ terminalId }), Code.NotFound);
    await failure(client.writeTerminal({ terminalId }), Code.NotFound);
    await failure(client.resizeTerminal({ terminalId, cols: 80, rows: 24 }), Code.NotFound);
    for (const stream of [client.readTerminal({ terminalId }), client.attachTerminal({ terminalId })]) {
      await failure(stream[Symbol.asyncIterator]().next(), Code.NotFound);
    }
  });
});

describe("CreateTerminal", () => {
  test("bad requests", async () => {
    const refused = async (request: Create, code = Code.InvalidArgument) =>
      await failure(client.createTerminal(request), code);
    for (const shell of ["sh", "../bin/sh", "/no/such", "/etc/passwd", "/bin", "/bin/sh\0"]) await refused({ shell });
    await refused({ initialCols: 1001 });
    await refused({ initialRows: 1001 });
    await refused({ workingDirectory: "missing" }, Code.NotFound);
    await refused({ workingDirectory: "a\0b" });
    await refused({ workingDirectory: "/etc/hostname" });
    await refused({ env: { "A=B": "" } });
    await refused({ env: { "": "" } });
    await refused({ env: { A: "b\0c" } });
    await refused({ env: { A: "x".repeat(70_000) } });
    await refused({ annotations: { ["k".repeat(129)]: "" } });
    await refused({ annotations: { k: "v".repeat(1025) } });
    await refused({ annotations: Object.fromEntries(Array.from({ length: 33 }, (_, n) => [`k${n}`, ""])) });
    expect(
      (await client.listTerminals({})).terminals.filter(({ shell }) => shell !== "/bin/sh" && shell !== "/bin/bash"),
    ).toEqual([]);
  });

  test.runIf(isRoot)("a directory the user may not enter is PERMISSION_DENIED", async () => {
    await failure(client.createTerminal({ workingDirectory: "/root" }), Code.PermissionDenied);
  });

  test("what is no program ends with the shells' code for it", async () => {
    const shell = await environment.put("workspace/repo/broken", "#!/no/such/interpreter\n");
    await client.exec({ command: "chmod +x broken" });
    const screen = await terminal({ shell });
    await screen.ended;
    expect(screen.exitCode).toBeGreaterThan(125);
    expect(screen.text).not.toBe("");
  });
});

test("50 terminals, and not one more however many ask at once", { timeout: 60_000 }, async () => {
  await using crowded = await testEnvironment();
  await crowded.launch();
  const { client: other } = crowded;
  const asked = await Promise.allSettled(Array.from({ length: 60 }, () => other.createTerminal({})));
  const ids = asked.flatMap((each) => (each.status === "fulfilled" ? [each.value.terminalId] : []));
  const codes = asked.flatMap((each) => (each.status === "rejected" ? [each.reason.code] : []));
  expect(codes).toEqual(Array(10).fill(Code.ResourceExhausted));
  const { terminals } = await other.listTerminals({});
  expect(terminals.map(({ terminalId }) => terminalId).sort()).toEqual([...ids].sort());
  const ages = terminals.map(({ createdAt }) => (createdAt ? timestampMs(createdAt) : 0));
  expect(ages).toEqual([...ages].sort((a, b) => a - b));
  await other.closeTerminal({ terminalId: ids[0] });
  const { terminalId } = await other.createTerminal({});
  await failure(other.createTerminal({}), Code.ResourceExhausted);
  expect((await other.listTerminals({})).terminals.at(-1)?.terminalId).toBe(terminalId);
  // Reading is bounded as well, and a reader that leaves makes room.
  const readers = Array.from({ length: 50 }, () => new Screen(terminalId, other));
  await waitFor(() => readers.every(({ size }) => size));
  await failure(
    (async () => {
      for await (const _ of other.readTerminal({ terminalId, skipHistory: true }));
    })(),
    Code.ResourceExhausted,
  );
  readers[0]?.leave();
  await waitFor(async () => {
    const next = new Screen(terminalId, other);
    await Promise.race([next.ended, waitFor(() => next.size)]);
    const isIn = !((await Promise.race([next.ended, Promise.resolve("in")])) instanceof Error);
    next.leave();
    return isIn;
  });
  for (const reader of readers) reader.leave();
});

test("processes started later do not inherit a terminal", async () => {
  const first = await terminal();
  const second = await terminal();
  await second.type("echo pid=$$\n");
  const { pid } = await shownProcess(second);
  const { stdout } = await client.exec({ command: "for f in /proc/self/fd/*; do readlink $f; done" });
  const opened = readdirSync(`/proc/${pid}/fd`).map((name) => readlinkSync(`/proc/${pid}/fd/${name}`));
  for (const open of [stdout.split("\n"), opened]) expect(open.filter((path) => path.includes("ptmx"))).toEqual([]);
  for (const { id } of [first, second]) await client.closeTerminal({ terminalId: id });
});

test("input is activity, looking is not", async () => {
  await using quiet = await testEnvironment();
  await quiet.launch();
  const { client: other } = quiet;
  await other.listTerminals({});
  await other.listTerminalProfiles({ includeDetectedProfiles: true });
  expect((await other.health()).activity).toBeUndefined();
  const screen = await terminal({}, other);
  await screen.shows(/\$ /);
  const created = (await other.health()).activity;
  expect(created?.source).toBe("Terminal");
  const later = new Screen(screen.id, other);
  await waitFor(() => later.size);
  expect((await other.health()).activity).toEqual(created);
  await waitFor(() => Date.now() > (created?.at.getTime() ?? 0));
  await screen.type("true\n");
  const { activity } = await other.health();
  expect(activity?.source).toBe("Terminal");
  expect(activity?.at.getTime()).toBeGreaterThan(created?.at.getTime() ?? 0);
});

describe("the end of a supervisor", () => {
  test("on SIGTERM terminals end: programs get SIGTERM, an idle shell does not take long", async () => {
    await using stopping = await testEnvironment();
    const record = await stopping.launch();
    const idle = await terminal({ shell: "/bin/bash" }, stopping.client);
    await idle.shows(/\$ /);
    const busy = await terminal({ shell: "/bin/bash" }, stopping.client);
    await busy.type('sh -c \'trap "echo by""e; exit" TERM; echo up-$((1)); while :; do sleep 0.1; done\'\n');
    await busy.shows(/up-1\r\n/);
    const started = Date.now();
    process.kill(record.pid, "SIGTERM");
    await Promise.all([idle.ended, busy.ended]);
    expect(Date.now() - started).toBeLessThan(8000);
    expect(busy.text).toContain("bye\r\n");
    expect([idle.kinds.at(-1), busy.kinds.at(-1)]).toEqual(["exited", "exited"]);
    await gone(record);
    expect(await environmentProcesses(stopping.config)).toEqual([]);
  });

  test("killed: the next one hangs up what is left of its terminals", { timeout: 40_000 }, async () => {
    await using killed = await testEnvironment();
    const record = await killed.launch();
    const screen = await terminal({ shell: "/bin/bash" }, killed.client);
    await screen.type(
      "trap '' HUP; nohup sleep 300 >/dev/null & echo pid=$!; sleep 301 & echo pid=$!; exec sleep 302\n",
    );
    const processes = [await shownProcess(screen), await shownProcess(screen)];
    process.kill(record.pid, "SIGKILL");
    expect(await screen.ended).toMatchObject({ code: expect.any(Number) });
    await gone(record);
    await killed.launch();
    expect((await killed.client.listTerminals({})).terminals).toEqual([]);
    await failure(killed.client.writeTerminal({ terminalId: screen.id }), Code.NotFound);
    await Promise.all(processes.map(gone));
  });
});

test("ListTerminalProfiles: settings first by name, then the machine's shells, each name once", async () => {
  const shells = readFileSync("/etc/shells", "utf8")
    .split("\n")
    .filter((line) => line.startsWith("/"));
  const present = (
    await client.exec({ command: `for s in ${shells.join(" ")}; do [ -f $s -a -x $s ] && echo $s; done` })
  ).stdout
    .trim()
    .split("\n");
  const seen = new Map<string, number>();
  const detected = present.map((path) => {
    const name = path.split("/").at(-1) ?? "";
    seen.set(name, (seen.get(name) ?? 0) + 1);
    const profileName = seen.get(name) === 1 ? name : `${name} (${seen.get(name)})`;
    return { profileName, path, isAutoDetected: true };
  });
  const profiles = async (configProfiles: Record<string, { path: string }>, includeDetectedProfiles: boolean) =>
    (await client.listTerminalProfiles({ configProfiles, includeDetectedProfiles })).profiles.map(
      ({ profileName, path, isAutoDetected }) => ({ profileName, path, isAutoDetected }),
    );
  expect(detected.length).toBeGreaterThan(0);
  expect(await profiles({}, false)).toEqual([]);
  expect(await profiles({}, true)).toEqual(detected);
  const settings = { zed: { path: "/opt/zed" }, bash: { path: "/opt/bash" }, sh: { path: "" }, hidden: { path: "" } };
  const configured = [
    { profileName: "bash", path: "/opt/bash", isAutoDetected: false },
    { profileName: "zed", path: "/opt/zed", isAutoDetected: false },
  ];
  expect(await profiles(settings, false)).toEqual(configured);
  const rest = detected.filter(({ profileName }) => !["bash", "sh"].includes(profileName));
  expect(await profiles(settings, true)).toEqual([...configured, ...rest]);
});

describe("terminal output", () => {
  afterEach(() => void vi.useRealTimers());

  async function all(chunks: AsyncIterable<Uint8Array>): Promise<Buffer> {
    const parts: Uint8Array[] = [];
    for await (const part of chunks) parts.push(part);
    return Buffer.concat(parts);
  }
  const never = new AbortController().signal;

  test("the scrollback keeps the last MiB in a MiB, however it is cut, from a whole character on", () => {
    const scrollback = new Scrollback();
    const text = Buffer.from("äöü€".repeat(300_000));
    for (let at = 0; at < text.length; at += 4999) scrollback.write(text.subarray(at, at + 4999));
    expect([scrollback.start, scrollback.end]).toEqual([text.length - MIB, text.length]);
    expect(scrollback.read(scrollback.start, MIB).equals(text.subarray(-MIB))).toBe(true);
    expect(scrollback.read(scrollback.end - 10, 5).equals(text.subarray(-10, -5))).toBe(true);
    expect(Buffer.from(scrollback.all()).toString()).not.toContain("\ufffd");
    scrollback.write(Buffer.alloc(3 * MIB, "z"));
    expect(scrollback.end).toBe(text.length + 3 * MIB);
    expect(scrollback.read(scrollback.start, MIB).equals(Buffer.alloc(MIB, "z"))).toBe(true);
  });

  test("the writer waits for a reader that is slow, but not for one that is stuck, which is told what it missed", async () => {
    vi.useFakeTimers({ toFake: ["Date", "setInterval", "clearInterval"] });
    const flow: boolean[] = [];
    const output = new TerminalOutput((isFlowing) => flow.push(isFlowing));
    const stuck = output.reader().rest(never);
    const quick = output.reader().rest(never);
    output.write(Buffer.alloc(1000, "a"));
    expect((await stuck.next()).value?.length).toBe(1000);
    expect((await quick.next()).value?.length).toBe(1000);
    output.write(Buffer.alloc(400_000, "b"));
    expect(flow).toEqual([false]);
    for (let left = 400_000; left > 0; ) left -= (await quick.next()).value?.length ?? 0;
    // The quick one has read everything; the other one still counts.
    vi.advanceTimersByTime(4500);
    expect(flow).toEqual([false]);
    vi.advanceTimersByTime(1000);
    expect(flow).toEqual([false, true]);
    for (let round = 0; round < 4; round++) {
      output.write(Buffer.alloc(300_000, "c"));
      for (let left = 300_000; left > 0; ) left -= (await quick.next()).value?.length ?? 0;
    }
    expect(flow.filter((isFlowing) => !isFlowing).length).toBe(flow.filter((isFlowing) => isFlowing).length);
    await failure(stuck.next(), Code.ResourceExhausted);
    output.complete();
    expect((await all(quick)).length).toBe(0);
  });

  test("a reader ends when it leaves, also while nothing comes", async () => {
    const output = new TerminalOutput(() => undefined);
    const leaving = new AbortController();
    const reading = all(output.reader().rest(leaving.signal));
    output.write(Buffer.from("x"));
    leaving.abort();
    expect((await reading).toString()).toMatch(/^x?$/);
  });
});
