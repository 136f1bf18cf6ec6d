import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { ExecResponseSchema } from "../gen/supervisor/v1/environmentopts_pb.js";
import { ExecJournal } from "../src/runner/supervisor/exec-journal.ts";
import { BoundedOutput } from "../src/runner/supervisor/output.ts";

const HOUR = 3_600_000;
const key = (number: number) => number.toString(16).padStart(64, "0");
const response = (stdout: string) => create(ExecResponseSchema, { stdout });

describe("results of commands", () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), "berth-journal-"));
    vi.useFakeTimers({ toFake: ["Date"] });
  });
  afterEach(() => {
    vi.useRealTimers();
    rmSync(directory, { recursive: true });
  });
  const opened = () => {
    const journal = new ExecJournal(directory);
    return { journal, orphans: journal.open() };
  };

  test("are kept 24 h from the end of the command", async () => {
    const { journal } = opened();
    const record = journal.begin(key(1), "f");
    vi.setSystemTime(Date.now() + 24 * HOUR);
    await journal.finish(record, response("late"));
    vi.setSystemTime(Date.now() + 24 * HOUR - 1000);
    expect((await opened().journal.result(key(1)))?.stdout).toBe("late");
    vi.setSystemTime(Date.now() + 2000);
    expect(opened().journal.find(key(1))).toBeUndefined();
    expect(readdirSync(directory)).toEqual([]);
  });

  test("are kept for the newest 1000", async () => {
    const { journal } = opened();
    const running = journal.begin(key(5000), "f");
    for (let number = 0; number < 1002; number++) {
      vi.setSystemTime(Date.now() + 1);
      await journal.finish(journal.begin(key(number), "f"), response(`${number}`));
    }
    expect([0, 1, 2].map((number) => journal.find(key(number))?.state)).toEqual([undefined, undefined, "done"]);
    expect(journal.find(running.key)?.state).toBe("running");
    expect(readdirSync(directory)).toHaveLength(2 * 1000 + 1);
  });

  test("that are damaged or foreign do not keep a supervisor from starting", async () => {
    const { journal } = opened();
    journal.started(journal.begin(key(1), "f"), { pid: 4242, startTime: 7 });
    await journal.finish(journal.begin(key(2), "f"), response("two"));
    writeFileSync(join(directory, `${key(2)}.result`), Buffer.from([0xff, 0xff]));
    writeFileSync(join(directory, `${key(3)}.json`), "");
    writeFileSync(join(directory, `${key(4)}.json`), '{"key":"../../etc"}');
    writeFileSync(join(directory, "left.tmp"), "x");
    const { journal: next, orphans } = opened();
    expect(orphans).toEqual([{ pid: 4242, startTime: 7 }]);
    expect(next.find(key(1))?.state).toBe("lost");
    expect(await next.result(key(2))).toBeUndefined();
    expect(readdirSync(directory).sort()).toEqual([`${key(1)}.json`, `${key(2)}.json`, `${key(2)}.result`]);
    expect(opened().orphans).toEqual([]);
  });
});

describe("kept output", () => {
  const MIB = 1024 * 1024;
  const kept = (bytes: Buffer, chunk: number) => {
    const output = new BoundedOutput();
    for (let at = 0; at < bytes.length; at += chunk) output.write(bytes.subarray(at, at + chunk));
    return output.text();
  };

  test("is everything up to 8 MiB, however it is cut", () => {
    expect(new BoundedOutput().text()).toBe("");
    for (const chunk of [1, 3, 100]) expect(kept(Buffer.from("häß€𝄞"), chunk)).toBe("häß€𝄞");
    const full = Buffer.alloc(8 * MIB, "abcdefg");
    expect(kept(full, 65_536)).toBe(full.toString());
  });

  test("beyond that is the first and last 4 MiB, never half a character", () => {
    // Numbered lines make every position of the text recognisable.
    const bytes = Buffer.from(Array.from({ length: 2_000_000 }, (_, line) => `${line}\n`).join(""));
    const omitted = bytes.length - 8 * MIB;
    const expected = `${bytes.subarray(0, 4 * MIB)}\n[... ${omitted} bytes left out ...]\n${bytes.subarray(-4 * MIB)}`;
    expect(kept(bytes, 65_537) === expected).toBe(true);
    expect(kept(bytes, bytes.length) === expected).toBe(true);
    const euros = Buffer.from("€".repeat(4 * MIB));
    expect(kept(euros, 65_536)).not.toContain("\ufffd");
  });
});
