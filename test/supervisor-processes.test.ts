import type { ChildProcess } from "node:child_process";
import { randomInt, randomUUID } from "node:crypto";
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, onTestFinished, test } from "vitest";
import {
  environmentProcesses,
  isAlive,
  killEnvironmentProcesses,
  type ProcessEntry,
  readProcess,
  sessionMembers,
  spawnSession,
  terminateSession,
} from "../src/runner/supervisor/processes.ts";
import { gone, isRoot, waitFor } from "./supervisor-harness.ts";

const PATH = process.env.PATH ?? "";

/** Starts a shell script in a session of its own, killed with the test. */
function start(
  script: string,
  options: { env?: Record<string, string>; uid?: number } = {},
): ProcessEntry & { child: ChildProcess } {
  const { env = {}, uid } = options;
  const child = spawnSession("/bin/sh", ["-c", script], { cwd: "/", env: { PATH, ...env }, uid, gid: uid });
  child.stdout?.resume();
  child.stderr?.resume();
  const entry = readProcess(child.pid ?? 0);
  if (!entry) throw new Error("did not start");
  onTestFinished(() => void terminateSession(entry, 0));
  return { ...entry, child };
}

/** A folder that runaway processes look for: they end when it goes, also if the test fails. */
function guard(): string {
  const folder = mkdtempSync(join(tmpdir(), "berth-guard-"));
  chmodSync(folder, 0o777);
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Has become what its shell was asked to start. */
function isSleep({ pid }: ProcessEntry): boolean {
  try {
    return readFileSync(`/proc/${pid}/comm`, "utf8") === "sleep\n";
  } catch {
    return false;
  }
}

const pids = (entries: readonly ProcessEntry[]) => entries.map(({ pid }) => pid).sort();

describe("sessions", () => {
  test("SIGTERM goes to every member, also those in groups of their own and stopped ones", async () => {
    const leader = start("timeout 300 sleep 300 & kill -STOP $$; wait");
    const members = await waitFor(() => {
      const found = sessionMembers(leader);
      return found.length === 3 && new Set(found.map(({ group }) => group)).size === 2 && found;
    });
    expect(await terminateSession(leader, 5000)).toBe(true);
    expect(members.filter(isAlive)).toEqual([]);
  });

  test("who ignores SIGTERM gets SIGKILL after the grace period", async () => {
    const leader = start("trap '' TERM; echo; while :; do sleep 0.1; done");
    const started = Date.now();
    expect(await terminateSession(leader, 300)).toBe(true);
    expect(Date.now() - started).toBeLessThan(5000);
  });

  test("a later process of the same pid is left alone", async () => {
    const leader = start("sleep 300");
    expect(await terminateSession({ pid: leader.pid, startTime: leader.startTime - 1 }, 0)).toBe(true);
    expect(isAlive(leader)).toBe(true);
  });
});

describe("processes of an environment", () => {
  test("are found by marker, with descendants that dropped it, and killed; others are left", async () => {
    const environmentId = randomUUID();
    const marked = { BERTH_ENVIRONMENT_ID: environmentId };
    const leader = start("env -i sleep 300 & setsid -f sleep 300; wait", { env: marked });
    const stranger = start("sleep 300", { env: { BERTH_ENVIRONMENT_ID: randomUUID(), OTHER: environmentId } });
    const found = await waitFor(async () => {
      const entries = await environmentProcesses({ environmentId });
      return entries.filter(isSleep).length === 2 && entries.length === 3 && entries;
    });
    expect(pids(await environmentProcesses({ environmentId, exclude: [leader.pid] }))).toEqual(
      pids(found.filter(({ pid }) => pid !== leader.pid)),
    );
    expect(await killEnvironmentProcesses({ environmentId })).toEqual([]);
    await Promise.all(found.map(gone));
    expect(isAlive(stranger)).toBe(true);
    expect(await killEnvironmentProcesses({ environmentId, exclude: [] })).toEqual([]);
  });

  test("one that is excluded survives", async () => {
    const environmentId = randomUUID();
    const [spared, doomed] = [1, 2].map(() =>
      start("exec sleep 300", { env: { BERTH_ENVIRONMENT_ID: environmentId } }),
    );
    expect(await killEnvironmentProcesses({ environmentId, exclude: [spared?.pid ?? 0] })).toEqual([]);
    expect([spared, doomed].map((entry) => entry && isAlive(entry))).toEqual([true, false]);
  });

  test("a chain of processes, each starting its successor and ending, is caught by its marker", async () => {
    const folder = guard();
    const environmentId = randomUUID();
    const hop = '[ -d "$FOLDER" ] || exit; sleep 0.01; echo >> "$FOLDER/hops"; setsid -f sh -c "$HOP"';
    const sizeOf = (name: string) => statSync(join(folder, name), { throwIfNoEntry: false })?.size ?? 0;
    for (const _ of [1, 2]) start(hop, { env: { BERTH_ENVIRONMENT_ID: environmentId, HOP: hop, FOLDER: folder } });
    await waitFor(() => sizeOf("hops") > 10);
    expect(await killEnvironmentProcesses({ environmentId, deadlineMs: 10_000 })).toEqual([]);
    const hops = sizeOf("hops");
    // Another chain of the same kind makes as many steps as a survivor would have made.
    const control = hop.replace("hops", "control");
    start(control, { env: { HOP: control, FOLDER: folder } });
    await waitFor(() => sizeOf("control") > 10);
    expect(sizeOf("hops")).toBe(hops);
  });

  test.runIf(isRoot)("a fork storm of a user is ended as a whole, other users' processes are left", async () => {
    const folder = guard();
    const uid = 200_000 + randomInt(1_000_000_000);
    const selector = { environmentId: randomUUID(), uid };
    const bystander = start("sleep 300", { uid: uid + 1 });
    // Up to 60 short-lived processes at a time, none of which carries the marker.
    const storm = 'ulimit -p 60; while [ -d "$FOLDER" ]; do sleep 0.5 & (setsid -f sleep 1 &); done 2> /dev/null';
    start(storm, { uid, env: { FOLDER: folder } });
    await waitFor(async () => (await environmentProcesses(selector)).length > 10);
    expect(await killEnvironmentProcesses({ ...selector, deadlineMs: 15_000 })).toEqual([]);
    expect(await environmentProcesses(selector)).toEqual([]);
    expect(isAlive(bystander)).toBe(true);
  });
});

test("zombies are no live processes", async () => {
  const leader = start("sleep 0.3 & exec sleep 300");
  const zombie = await waitFor(() => {
    const child = Number(readFileSync(`/proc/${leader.pid}/task/${leader.pid}/children`, "utf8"));
    return child > 0 && /State:\tZ/.test(readFileSync(`/proc/${child}/status`, "utf8")) && child;
  });
  expect(readProcess(zombie)).toBeUndefined();
  expect(pids(sessionMembers(leader))).toEqual([leader.pid]);
});
