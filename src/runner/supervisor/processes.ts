import { type ChildProcess, type SpawnOptions, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { setTimeout as delay } from "node:timers/promises";
import { inBatches } from "./batches.ts";
import { withDeadline } from "./errors.ts";

// Processes are found by reading /proc, never by remembering children: a supervisor can be replaced while they run.
// A pid alone names nothing for long, so every lasting reference is pid plus start time (clock ticks since boot).

/** A process that cannot be confused with a later one of the same pid within one boot. */
export interface ProcessRef {
  pid: number;
  /** Field 22 of `/proc/<pid>/stat`: clock ticks since boot. */
  startTime: number;
}

export interface ProcessEntry extends ProcessRef {
  parent: number;
  group: number;
  session: number;
}

/** Whose processes: with `uid` those of that user, else those carrying BERTH_ENVIRONMENT_ID; always with descendants. */
export interface EnvironmentSelector {
  environmentId: string;
  uid?: number;
  /** Pids left out, for example the supervisor that asks. */
  exclude?: readonly number[];
}

export const TERMINATION_GRACE_MS = 10_000;
const KILL_DEADLINE_MS = 5_000;
const POLL_MS = 50;
const MAX_STOP_PASSES = 20;

/** Identifies one boot of the kernel; pids and start times mean nothing across boots. */
export function bootId(): string {
  return readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
}

/** One line of `/proc/<pid>/stat`; undefined if the process is gone or a zombie. */
export function readProcess(pid: number): ProcessEntry | undefined {
  let line: string;
  try {
    line = readFileSync(`/proc/${pid}/stat`, "latin1");
  } catch {
    return undefined;
  }
  // The second field is the name in parentheses and may itself hold spaces and parentheses.
  const [state, parent, group, session, ...rest] = line.slice(line.lastIndexOf(")") + 2).split(" ");
  if (state === "Z" || state === "X") return undefined;
  return {
    pid,
    parent: Number(parent),
    group: Number(group),
    session: Number(session),
    startTime: Number(rest[15]),
  };
}

export function isAlive(reference: ProcessRef): boolean {
  return readProcess(reference.pid)?.startTime === reference.startTime;
}

/** The user a process runs as; undefined if it is gone. */
export function userOf(pid: number): number | undefined {
  return userIds(pid)[0];
}

/** Real, effective, saved and file system user id. */
function userIds(pid: number): number[] {
  try {
    const line = /^Uid:\s*(.*)$/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"));
    return (line?.[1] ?? "").split(/\s+/).map(Number);
  } catch {
    return [];
  }
}

function allProcesses(): ProcessEntry[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map((name) => readProcess(Number(name)))
    .filter((entry) => entry !== undefined);
}

async function carriesMarker(pid: number, marker: string): Promise<boolean> {
  try {
    // A process stuck in the kernel can block this read for ever, hence neither synchronous nor without deadline.
    const environ = await withDeadline(readFile(`/proc/${pid}/environ`, "latin1"), 1000, "reading a process");
    return environ.split("\0").includes(marker);
  } catch {
    return false;
  }
}

/** Starts a command as leader of its own session and process group, with stdin empty and nothing inherited. */
export function spawnSession(
  file: string,
  args: readonly string[],
  options: Pick<SpawnOptions, "cwd" | "uid" | "gid"> & { env: Record<string, string> },
): ChildProcess {
  return spawn(file, args, { ...options, detached: true, stdio: ["ignore", "pipe", "pipe"] });
}

/** Live members of the session a leader opened, and of its process group. */
export function sessionMembers(leader: ProcessRef): ProcessEntry[] {
  const present = readProcess(leader.pid);
  if (present && present.startTime !== leader.startTime) return [];
  return allProcesses().filter(
    ({ session, group, startTime }) =>
      (session === leader.pid || group === leader.pid) && startTime >= leader.startTime,
  );
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch {
    // Gone meanwhile, or a set-user-id program that only root may signal.
  }
}

const signalAll = (entries: readonly ProcessEntry[], name: NodeJS.Signals) => {
  for (const { pid } of entries) signal(pid, name);
};

/**
 * SIGTERM to everything in the leader's session, SIGKILL to what is left after the grace period.
 * Resolves when none is left, or 5 s after the first SIGKILL; false then.
 */
export async function terminateSession(leader: ProcessRef, graceMs = TERMINATION_GRACE_MS): Promise<boolean> {
  const start = Date.now();
  let members = sessionMembers(leader);
  signalAll(members, "SIGTERM");
  signalAll(members, "SIGCONT");
  while (members.length > 0) {
    const elapsed = Date.now() - start;
    if (elapsed > graceMs + KILL_DEADLINE_MS) return false;
    if (elapsed >= graceMs) signalAll(members, "SIGKILL");
    await delay(POLL_MS);
    members = sessionMembers(leader);
  }
  return true;
}

/** Live processes of an environment, without this process and pid 1. */
export async function environmentProcesses(selector: EnvironmentSelector): Promise<ProcessEntry[]> {
  const entries = allProcesses();
  const marker = `BERTH_ENVIRONMENT_ID=${selector.environmentId}`;
  const { uid } = selector;
  const owned = async ({ pid }: ProcessEntry) =>
    uid === undefined ? await carriesMarker(pid, marker) : userIds(pid).includes(uid);
  const flags = await inBatches(entries, owned);
  const members = new Map(entries.filter((_, index) => flags[index]).map((entry) => [entry.pid, entry]));
  // Children may have dropped the marker or changed the user.
  for (let size = -1; size !== members.size; ) {
    size = members.size;
    for (const entry of entries) if (members.has(entry.parent)) members.set(entry.pid, entry);
  }
  for (const pid of [1, process.pid, ...(selector.exclude ?? [])]) members.delete(pid);
  return [...members.values()];
}

/** Asks the kernel to kill everything of a user at once, which even a fork storm cannot outrun; needs root. */
async function killUser(uid: number): Promise<void> {
  const killer = spawn("/bin/sh", ["-c", "kill -KILL -1"], {
    uid,
    gid: uid,
    env: {},
    stdio: "ignore",
    timeout: KILL_DEADLINE_MS,
  });
  await new Promise((resolve) => killer.once("error", resolve).once("exit", resolve));
}

/** Stops all processes until a pass finds no new one, so that killing them cannot be outrun by forks; then kills. */
async function sweep(selector: EnvironmentSelector): Promise<void> {
  const stopped = new Map<number, ProcessEntry>();
  for (let pass = 0; pass < MAX_STOP_PASSES; pass++) {
    const fresh = (await environmentProcesses(selector)).filter(
      ({ pid, startTime }) => stopped.get(pid)?.startTime !== startTime,
    );
    if (fresh.length === 0) break;
    signalAll(fresh, "SIGSTOP");
    for (const entry of fresh) stopped.set(entry.pid, entry);
  }
  for (const entry of stopped.values()) if (isAlive(entry)) signal(entry.pid, "SIGKILL");
}

/**
 * Kills every process of an environment, by SIGKILL, until none is left or the deadline has passed.
 * Returns what is left: empty on success.
 */
export async function killEnvironmentProcesses(
  selector: EnvironmentSelector & { deadlineMs?: number },
): Promise<ProcessEntry[]> {
  const deadline = Date.now() + (selector.deadlineMs ?? 30_000);
  const { uid, exclude = [] } = selector;
  for (;;) {
    let left = await environmentProcesses(selector);
    if (left.length === 0) return [];
    if (uid !== undefined && uid !== 0 && exclude.length === 0 && process.getuid?.() === 0) await killUser(uid);
    await sweep(selector);
    left = await environmentProcesses(selector);
    if (left.length === 0 || Date.now() > deadline) return left;
    await delay(POLL_MS);
  }
}
