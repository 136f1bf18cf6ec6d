import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { LineLog, LineSplitter } from "../src/runner/supervisor/automation/line-log.ts";
import { parseOutput } from "../src/runner/supervisor/automation/outputs.ts";
import { Run } from "../src/runner/supervisor/automation/run.ts";
import { isAlive } from "../src/runner/supervisor/processes.ts";
import { eventually } from "./harness/wait.ts";

let folder: string;
let number = 0;
const runs: Run[] = [];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-run-"));
});
afterEach(async () => {
  await Promise.all(runs.splice(0).map((run) => run.kill()));
  await rm(folder, { recursive: true, force: true });
});

async function start(command: string): Promise<{ run: Run; text: () => string }> {
  const chunks: Buffer[] = [];
  const mark = `${process.pid}-${++number}`;
  const env = { PATH: process.env.PATH ?? "", HOME: folder };
  const argv = ["/bin/sh", "-c", command] as const;
  const run = await Run.start(join(folder, mark), mark, { argv, cwd: folder, env }, (chunk) => chunks.push(chunk));
  runs.push(run);
  return { run, text: () => Buffer.concat(chunks).toString() };
}

describe("a command", () => {
  test("its output comes in order, with both streams, and its code is told", async () => {
    const { run, text } = await start("echo one; echo two >&2; echo three; exit 3");
    expect(await run.ended).toEqual({ code: 3 });
    expect(text()).toBe("one\ntwo\nthree\n");
  });

  test("a signal is a code above 128, and killed with its shell it leaves none", async () => {
    const { run } = await start("kill -TERM $$");
    expect(await run.ended).toEqual({ code: 143 });
    const other = await start("sleep 100");
    await other.run.kill();
    expect(await other.run.ended).toEqual({ code: undefined });
  });

  test("the signal reaches every process, and the shell around it survives to tell", async () => {
    const { run, text } = await start("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done");
    await eventually(() => text().includes("ready"), "it runs");
    run.signal("SIGTERM");
    expect(await run.ended).toEqual({ code: 7 });
    // The shell that was asked to run this may say that its sleep ended.
    expect(text().replace("Terminated\n", "")).toBe("ready\ncaught\n");
  });

  test("children in the background do not hold it up; killing it ends them, wherever they went", async () => {
    const { run, text } = await start("(sleep 100; echo late) & setsid sleep 100 & echo done");
    expect(await run.ended).toEqual({ code: 0 });
    expect(text()).toBe("done\n");
    await run.kill();
    const { markedProcesses } = await import("../src/runner/supervisor/automation/marked.ts");
    expect(markedProcesses(run.mark)).toEqual([]);
  });

  test("what cannot be started says so", async () => {
    const bad = Run.start(
      join(folder, "x"),
      "x",
      { argv: ["/bin/sh"], cwd: join(folder, "none"), env: {} },
      () => undefined,
    );
    await expect(bad).rejects.toThrow(/ENOENT/);
  });

  test("AUT-38 whoever comes later reads on and learns the code; one that is gone without a word is lost", async () => {
    const { run } = await start("echo one; sleep 0.4; echo two; exit 5");
    const seen: Buffer[] = [];
    const found = Run.adopt(run.folder, run.mark, (chunk) => seen.push(chunk));
    if (!(found instanceof Run)) throw new Error("it is alive");
    runs.push(found);
    expect(found.leader).toEqual(run.leader);
    expect(await found.ended).toEqual({ code: 5 });
    await eventually(() => !isAlive(run.leader), "its shell is gone");
    expect(Run.adopt(run.folder, run.mark, () => undefined)).toEqual({ code: 5 });
    await rm(join(run.folder, "exit"));
    expect(Run.adopt(run.folder, run.mark, () => undefined)).toBeUndefined();
  });

  test("much output passes whole", async () => {
    const { run, text } = await start("i=0; while [ $i -lt 2000 ]; do printf '%01000d\\n' $i; i=$((i+1)); done");
    await run.ended;
    expect(text().length).toBe(2000 * 1001);
  });

  test("it may say something about itself", async () => {
    const { run } = await start('echo "URL=http://x" >> "$BERTH_OUTPUT"');
    await run.ended;
    expect(run.output()).toBe("URL=http://x\n");
  });
});

describe("outputs", () => {
  test("the last value counts, an empty one unsets, blocks have lines", () => {
    const text = "A=1\nB=x=y\nA=2\nC<<END\none\ntwo\nEND\nD=\nB=\n";
    expect(parseOutput(text)).toEqual({ values: { A: "2", C: "one\ntwo" }, problems: [] });
  });

  test("what is malformed or too much is left out and named", () => {
    const { values, problems } = parseOutput(`nothing\n${"k".repeat(129)}=1\nA=${"x".repeat(4097)}\nB=1\nC<<END\nopen`);
    expect(values).toEqual({ B: "1" });
    expect(problems).toHaveLength(4);
    const many = parseOutput(Array.from({ length: 70 }, (_, index) => `K${index}=1`).join("\n"));
    expect([Object.keys(many.values).length, many.problems.length]).toEqual([64, 6]);
  });
});

describe("lines", () => {
  test("pieces become lines; what is no UTF-8 is replaced, what is long is split", () => {
    const lines: string[] = [];
    const splitter = new LineSplitter((line) => lines.push(line));
    const euro = Buffer.from("€");
    splitter.write(Buffer.concat([Buffer.from("a\r\nb"), euro.subarray(0, 1)]));
    splitter.write(Buffer.concat([euro.subarray(1), Buffer.from([0xff, 10])]));
    splitter.write(Buffer.from("x".repeat(70_000)));
    splitter.end();
    expect(lines.map((line) => line.slice(0, 10))).toEqual(["a", "b€�", "xxxxxxxxxx", "xxxxxxxxxx"]);
    expect(lines.at(-1)).toHaveLength(70_000 - 65_536);
  });

  test("the older half goes when there is no room, and the gap shows", async () => {
    const log = new LineLog(folder, 200);
    for (let each = 0; each < 30; each++) log.write([`line ${each}`], "s");
    log.end();
    const older = await readFile(join(folder, "log.older"), "utf8");
    const newer = await readFile(join(folder, "log"), "utf8").catch(() => "");
    expect(older).toContain("[older lines were dropped]");
    expect(older + newer).toContain("line 29");
    expect(older + newer).not.toContain("line 0\n");
  });
});
