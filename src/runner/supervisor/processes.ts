import { type ChildProcess, type SpawnOptions, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { constants } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { inBatches } from "./batches.ts";
import { childStdio } from "./descriptors.ts";
import { errnoOf, withDeadline } from "./errors.ts";

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
const SETTLE_MS = 10;
const MAX_STOP_PASSES = 20;
const MAX_UNSURE_SCANS = 20;
// Start times count in USER_HZ, which is 100 on every architecture that Node.js is built for.
const TICKS_PER_SECOND = 100;
const YOUNG_TICKS = TICKS_PER_SECOND;

/** Identifies one boot of the kernel; pids and start times mean nothing across boots. */
export function bootId(): string {
  return readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
}

/** A line of `/proc/<pid>/stat`; undefined if the process is gone. */
function readStat(pid: number): (ProcessEntry & { ended: boolean }) | undefined {
  let line: string;
  try {
    line = readFileSync(`/proc/${pid}/stat`, "latin1");
  } catch {
    return undefined;
  }
  // The second field is the name in parentheses and may itself hold spaces and parentheses.
  const [state, parent, group, session, ...rest] = line.slice(line.lastIndexOf(")") + 2).split(" ");
  return {
    pid,
    parent: Number(parent),
    group: Number(group),
    session: Number(session),
    startTime: Number(rest[15]),
    ended: state === "Z" || state === "X",
  };
}

/** A live process; undefined if it is gone or a zombie. */
export function readProcess(pid: number): ProcessEntry | undefined {
  const { ended, ...entry } = readStat(pid) ?? { ended: true, pid: 0, parent: 0, group: 0, session: 0, startTime: 0 };
  return ended ? undefined : entry;
}

export function isAlive(reference: ProcessRef): boolean {
  return readProcess(reference.pid)?.startTime === reference.startTime;
}

/** The user a process runs as; undefined if it is gone. */
export function userOf(pid: number): number | undefined {
  return userIds(pid)?.[0];
}

/** Real, effective, saved and file system user id; undefined if the process is gone. */
function userIds(pid: number): number[] | undefined {
  try {
    const line = /^Uid:\s*(.*)$/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"));
    return (line?.[1] ?? "").split(/\s+/).map(Number);
  } catch {
    return undefined;
  }
}

const listedPids = () =>
  readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number);

const hasMarker = (environ: string, marker: string) => environ.split("\0").includes(marker);

/** Undefined if the process is gone, or is just becoming another program and shows no variables. */
function carriesMarkerNow(pid: number, marker: string): boolean | undefined {
  try {
    const environ = readFileSync(`/proc/${pid}/environ`, "latin1");
    return environ === "" ? undefined : hasMarker(environ, marker);
  } catch (error) {
    return ["ENOENT", "ESRCH"].includes(errnoOf(error) ?? "") ? undefined : false;
  }
}

/** For processes that may have been stuck in the kernel for long, in which case reading their variables blocks. */
async function carriesMarker(pid: number, marker: string): Promise<boolean> {
  const environ = withDeadline(readFile(`/proc/${pid}/environ`, "latin1"), 1000, "reading a process");
  return await environ.then(
    (text) => hasMarker(text, marker),
    () => false,
  );
}

/**
 * Starts a command as leader of its own session and process group, with stdin empty if not asked for, or with streams
 * of the caller's, and nothing else inherited.
 */
export function spawnSession(
  file: string,
  args: readonly string[],
  {
    input = "ignore",
    output = "pipe",
    streams,
    ...options
  }: Pick<SpawnOptions, "uid" | "gid"> & {
    cwd?: string;
    env: Readonly<Record<string, string>>;
    input?: "pipe" | "ignore";
    output?: "pipe" | "ignore";
    /** Descriptors for its input, output and errors. */
    streams?: readonly [number, number, number];
    /** Descriptors to be passed on, from the fourth on. */
    descriptors?: readonly number[];
  },
): ChildProcess {
  const { descriptors = [], ...rest } = options;
  const stdio = childStdio(streams ? [...streams] : [input, output, output]);
  return spawn(file, args, {
    ...rest,
    detached: true,
    stdio: [...stdio.slice(0, 3), ...descriptors, ...stdio.slice(3 + descriptors.length)],
  });
}

/** How a process ended. */
export interface ProcessEnd {
  code: number | null;
  signal: NodeJS.Signals | null;
}

/** Resolves when the process ended; rejects if it could not be started. */
export function processEnd(child: ChildProcess): Promise<ProcessEnd> {
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code, signal) => resolve({ code, signal }));
  });
}

/** The exit code as shells tell it: 128 plus the number of a signal. */
export const exitCodeOf = ({ code, signal }: ProcessEnd): number =>
  code ?? 128 + constants.signals[signal ?? "SIGKILL"];

/** Live members of the session a leader opened, and of its process group. */
export function sessionMembers(leader: ProcessRef): ProcessEntry[] {
  const present = readProcess(leader.pid);
  if (present && present.startTime !== leader.startTime) return [];
  return listedPids()
    .map(readProcess)
    .filter((entry) => entry !== undefined)
    .filter(({ session, group }) => session === leader.pid || group === leader.pid)
    .filter(({ startTime }) => startTime >= leader.startTime);
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
 * SIGTERM to everything in the leader's session, SIGKILL to what is left after the grace period. With `hangUp` the
 * first signal is SIGHUP, or SIGHUP follows for the leader once it is alone: shells that people type into ignore
 * SIGTERM. Resolves when none is left, or 5 s after the first SIGKILL; false then.
 */
export async function terminateSession(
  leader: ProcessRef,
  graceMs = TERMINATION_GRACE_MS,
  hangUp?: "first" | "last",
): Promise<boolean> {
  const start = Date.now();
  let members = sessionMembers(leader);
  signalAll(members, hangUp === "first" ? "SIGHUP" : "SIGTERM");
  signalAll(members, "SIGCONT");
  while (members.length > 0) {
    const elapsed = Date.now() - start;
    if (elapsed > graceMs + KILL_DEADLINE_MS) return false;
    if (elapsed >= graceMs) signalAll(members, "SIGKILL");
    if (hangUp === "last" && members.every(({ pid }) => pid === leader.pid)) signalAll(members, "SIGHUP");
    await delay(POLL_MS);
    members = sessionMembers(leader);
  }
  return true;
}

interface Scan {
  members: ProcessEntry[];
  /** A young process ended while it was looked at, so one that it started meanwhile may be missing. */
  unsure: boolean;
}

/** Looks at all processes once, the youngest first, and calls `onMember` the moment it knows one. */
async function scan(
  { environmentId, uid, exclude = [] }: EnvironmentSelector,
  onMember: (entry: ProcessEntry) => void = () => undefined,
): Promise<Scan> {
  // Whoever asks so by mistake would end everything else on the machine.
  if (uid === 0) throw new Error("the processes of root belong to no environment");
  const marker = `BERTH_ENVIRONMENT_ID=${environmentId}`;
  const spared = new Set(exclude);
  const since = Number.parseFloat(readFileSync("/proc/uptime", "latin1")) * TICKS_PER_SECOND - YOUNG_TICKS;
  const entries: ProcessEntry[] = [];
  const old: ProcessEntry[] = [];
  const members = new Map<number, ProcessEntry>();
  let unsure = false;
  const join = (entry: ProcessEntry) => {
    members.set(entry.pid, entry);
    if (!spared.has(entry.pid)) onMember(entry);
  };
  for (const pid of listedPids().reverse()) {
    if (pid === 1 || pid === process.pid) continue;
    const found = readStat(pid);
    const isYoung = found === undefined || found.startTime > since;
    if (!found || found.ended) {
      unsure ||= isYoung;
      continue;
    }
    entries.push(found);
    if (uid === undefined && !isYoung) old.push(found);
    else {
      const isMember = uid === undefined ? carriesMarkerNow(pid, marker) : userIds(pid)?.includes(uid);
      unsure ||= isMember === undefined;
      if (isMember) join(found);
    }
  }
  await inBatches(old, async (entry) => {
    if (await carriesMarker(entry.pid, marker)) join(entry);
  });
  // Children may have dropped the marker or changed the user.
  for (let size = -1; size !== members.size; ) {
    size = members.size;
    for (const entry of entries) if (members.has(entry.parent) && !members.has(entry.pid)) join(entry);
  }
  for (const pid of spared) members.delete(pid);
  return { members: [...members.values()], unsure };
}

/** Live processes of an environment, without this process and pid 1, as far as one look at a moving picture can tell. */
export async function environmentProcesses(selector: EnvironmentSelector): Promise<ProcessEntry[]> {
  return (await scan(selector)).members;
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
  for (let pass = 0, before = -1; pass < MAX_STOP_PASSES && before !== stopped.size; pass++) {
    before = stopped.size;
    await scan(selector, (entry) => {
      if (stopped.get(entry.pid)?.startTime === entry.startTime) return;
      signal(entry.pid, "SIGSTOP");
      stopped.set(entry.pid, entry);
    });
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
  const canKillUser = uid !== undefined && uid !== 0 && exclude.length === 0 && process.getuid?.() === 0;
  for (let unsureScans = 0; ; ) {
    const { members, unsure } = await scan(selector);
    if (members.length === 0 && (!unsure || ++unsureScans >= MAX_UNSURE_SCANS)) return [];
    if (Date.now() > deadline) return members;
    if (members.length > 0) {
      unsureScans = 0;
      if (canKillUser) await killUser(uid);
      await sweep(selector);
    }
    await delay(SETTLE_MS);
  }
}
