import { execFile, spawn } from "node:child_process";
import { closeSync, constants, existsSync, openSync, watch } from "node:fs";
import { mkdir, rm, writeFile } from "node:fs/promises";
import { Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import { readSmallFile, writeFileAtomically } from "../config.ts";
import { childStdio } from "../descriptors.ts";
import { bootId, isAlive, type ProcessRef, readProcess, sessionMembers } from "../processes.ts";
import { markedProcesses } from "./marked.ts";

// A command that outlives the supervisor. A small shell around it leads its session, keeps the pipe of its output open
// and writes its exit code down, so that whoever comes after a dead supervisor finds out how it went and reads on.

/** What to run. */
export interface Command {
  argv: readonly [string, ...string[]];
  cwd: string;
  env: Readonly<Record<string, string>>;
}

/** How a command ended: its exit code, as a shell tells it; undefined if nobody knows or it was killed with its shell. */
export interface RunEnd {
  code: number | undefined;
}

// Arguments: the folder, then the command. The signals reach the command as well; the shell has to survive them. Once the
// code is written it stays for a while, so that what is still in the pipe is not lost with the last who holds it open.
// A subshell runs the command, because some shells write which signal ended it to where its output goes.
const SHIM = `dir=$1; shift
trap : TERM INT HUP QUIT USR1 USR2 PIPE
exec 3<>"$dir/pipe" || exit 1
(exec "$@" </dev/null >"$dir/pipe" 2>&1 3<&-)
code=$?
printf '%s\\n' "$code" >"$dir/exit.new" && mv -f "$dir/exit.new" "$dir/exit"
n=0
while [ -d "$dir" ] && [ ! -e "$dir/drained" ] && [ "$n" -lt 300 ]; do sleep 0.1; n=$((n+1)); done`;

const LOOK_MS = 500;
const QUIET_MS = 40;
const DRAIN_MS = 1_000;
const KILL_MS = 10_000;
const POLL_MS = 50;
const BACKGROUND_MS = 10_000;
const MAX_RECORD_BYTES = 4096;

const isNumber = (value: unknown): value is number => typeof value === "number" && Number.isSafeInteger(value);

/** The process that a folder tells of, if it is from this boot. */
function recorded(folder: string): ProcessRef | undefined {
  try {
    const { pid, startTime, boot } = JSON.parse(readSmallFile(join(folder, "run.json"), MAX_RECORD_BYTES));
    return boot === bootId() && isNumber(pid) && isNumber(startTime) ? { pid, startTime } : undefined;
  } catch {
    return undefined;
  }
}

function exitCode(folder: string): number | undefined {
  try {
    const text = readSmallFile(join(folder, "exit"), 64).trim();
    return /^\d{1,3}$/.test(text) ? Number(text) : undefined;
  } catch {
    return undefined;
  }
}

/** One command from its start, or from when it was found, to its end. */
export class Run {
  readonly folder: string;
  readonly leader: ProcessRef;
  /** Marks every process of it, wherever it moves. */
  readonly mark: string;
  readonly ended: Promise<RunEnd>;
  readonly #output: Socket;
  #lastDataAt = Date.now();
  #isOver = false;

  private constructor(folder: string, mark: string, leader: ProcessRef, onData: (chunk: Buffer) => void) {
    this.folder = folder;
    this.mark = mark;
    this.leader = leader;
    this.#output = readPipe(join(folder, "pipe"));
    this.#output.on("data", (chunk: Buffer) => {
      this.#lastDataAt = Date.now();
      if (!this.#isOver) onData(chunk);
    });
    this.ended = this.#watch();
  }

  /** Starts a command; its folder must not exist. Throws if it cannot be started. */
  static async start(folder: string, mark: string, command: Command, onData: (chunk: Buffer) => void): Promise<Run> {
    await mkdir(folder, { recursive: true, mode: 0o700 });
    await promisify(execFile)("mkfifo", ["-m", "0600", join(folder, "pipe")], {
      env: { PATH: command.env.PATH ?? "" },
    });
    await writeFile(join(folder, "output"), "", { flag: "a", mode: 0o600 });
    const child = spawn("/bin/sh", ["-c", SHIM, "berth-shim", folder, ...command.argv], {
      cwd: command.cwd,
      env: { ...command.env, BERTH_OUTPUT: join(folder, "output"), BERTH_RUN: mark },
      detached: true,
      stdio: childStdio(["ignore", "ignore", "ignore"]),
    });
    await new Promise<void>((resolve, reject) => {
      child.once("error", reject);
      child.once("spawn", resolve);
    });
    child.on("error", () => undefined);
    child.unref();
    const found = readProcess(child.pid ?? 0);
    const leader = { pid: child.pid ?? 0, startTime: found?.startTime ?? 0 };
    writeFileAtomically(join(folder, "run.json"), JSON.stringify({ ...leader, boot: bootId() }));
    return new Run(folder, mark, leader, onData);
  }

  /** Takes up a command that was started before; if it has ended, only its end is known. Undefined if it is lost. */
  static adopt(folder: string, mark: string, onData: (chunk: Buffer) => void): Run | RunEnd | undefined {
    const leader = recorded(folder);
    if (leader && isAlive(leader) && existsSync(join(folder, "pipe"))) return new Run(folder, mark, leader, onData);
    const code = exitCode(folder);
    return code === undefined ? undefined : { code };
  }

  /** What the command has written to its output file; empty if that cannot be read. */
  output(): string {
    try {
      return readSmallFile(join(this.folder, "output"), 1024 * 1024);
    } catch {
      return "";
    }
  }

  /** Sends a signal to the whole session. */
  signal(name: NodeJS.Signals): void {
    for (const { pid } of sessionMembers(this.leader)) sendSignal(pid, name);
  }

  /** Kills whatever is left of it, also what has left its session; resolves when nothing is, or after ten seconds. */
  async kill(): Promise<void> {
    const until = Date.now() + KILL_MS;
    for (;;) {
      const left = [...sessionMembers(this.leader), ...markedProcesses(this.mark)];
      if (left.length === 0 || Date.now() > until) break;
      for (const { pid } of left) sendSignal(pid, "SIGKILL");
      await delay(POLL_MS);
    }
    await this.ended;
  }

  async #watch(): Promise<RunEnd> {
    const { promise: news, resolve } = Promise.withResolvers<void>();
    const hasEnded = () => existsSync(join(this.folder, "exit")) || !isAlive(this.leader);
    const look = () => {
      if (hasEnded()) resolve();
    };
    const watcher = watch(this.folder, look);
    watcher.on("error", () => undefined);
    const timer = setInterval(look, LOOK_MS);
    look();
    await news;
    clearInterval(timer);
    watcher.close();
    const code = exitCode(this.folder);
    await this.#drain();
    return { code };
  }

  /** What is in the pipe belongs to it; children in the background that go on writing do not hold it up. */
  async #drain(): Promise<void> {
    const until = Date.now() + DRAIN_MS;
    this.#lastDataAt = Date.now();
    while (Date.now() < until && Date.now() - this.#lastDataAt < QUIET_MS) await delay(QUIET_MS / 2);
    this.#isOver = true;
    await writeFile(join(this.folder, "drained"), "").catch(() => undefined);
    void this.#readOn();
  }

  /** Reading on keeps children in the background from being ended by SIGPIPE, or from waiting for ever. */
  async #readOn(): Promise<void> {
    while (markedProcesses(this.mark).length > 0) await delay(BACKGROUND_MS, undefined, { ref: false });
    this.#output.destroy();
  }
}

/** Removes the folder of a command that is over. */
export const forgetRun = (folder: string): Promise<void> => rm(folder, { recursive: true, force: true });

function sendSignal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch {
    // Gone meanwhile.
  }
}

/** Opened for both directions, a pipe has no end as long as somebody may come back to it. */
function readPipe(path: string): Socket {
  const descriptor = openSync(path, constants.O_RDWR | constants.O_NONBLOCK | constants.O_NOFOLLOW);
  try {
    const socket = new Socket({ fd: descriptor, readable: true, writable: false });
    socket.on("error", () => undefined);
    return socket;
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}
