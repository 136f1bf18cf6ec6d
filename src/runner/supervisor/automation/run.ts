import { execFile, spawn } from "node:child_process";
import { closeSync, constants, existsSync, openSync, watch } from "node:fs";
import { mkdir } from "node:fs/promises";
import { Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import { readSmallFile, writeFileAtomically } from "../config.ts";
import { childStdio } from "../descriptors.ts";
import { bootId, isAlive, type ProcessRef, readProcess, sessionMembers } from "../processes.ts";
import { markedProcesses } from "./marked.ts";
import { BEGUN_FILE, DRAINED_FILE, GIVEN_PIPE, hostShim, OUTPUT_PIPE } from "./shim.ts";

// A command that outlives the supervisor. The shell around it and this file tell each other by files: a folder remembers
// who it is, and another one, which may be shared with a container, holds the pipe of its output and its exit code.

/** What to run on the host. */
export interface Command {
  argv: readonly [string, ...string[]];
  cwd: string;
  env: Readonly<Record<string, string>>;
}

/** How a command ended: its exit code, as a shell tells it; undefined if nobody knows or it was killed with its shell. */
export interface RunEnd {
  code: number | undefined;
}

/** What the command says about itself; BERTH_OUTPUT names it. */
export const OUTPUT_FILE = "output";

/** All that there is in a shared folder. */
export const SHARED_FILES = [OUTPUT_PIPE, GIVEN_PIPE, OUTPUT_FILE, BEGUN_FILE, DRAINED_FILE, "exit", "exit.new"];

const LOOK_MS = 500;
const QUIET_MS = 40;
const DRAIN_MS = 1_000;
const KILL_MS = 10_000;
const POLL_MS = 50;
const BACKGROUND_MS = 10_000;
const MAX_RECORD_BYTES = 4096;

const isNumber = (value: unknown): value is number => typeof value === "number" && Number.isSafeInteger(value);

interface Recorded {
  /** Absent if it is from another boot, or was never written down. */
  leader: ProcessRef | undefined;
  shared: string;
}

/** What a folder tells of a command. */
function recorded(folder: string): Recorded {
  try {
    const { pid, startTime, boot, shared } = JSON.parse(readSmallFile(join(folder, "run.json"), MAX_RECORD_BYTES));
    const isPresent = boot === bootId() && isNumber(pid) && isNumber(startTime);
    return {
      leader: isPresent ? { pid, startTime } : undefined,
      shared: typeof shared === "string" ? shared : folder,
    };
  } catch {
    return { leader: undefined, shared: folder };
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

/** Where a command that has been written down keeps its pipe and its exit code. */
export const sharedFolder = (folder: string): string => recorded(folder).shared;

/** One command from its start, or from when it was found, to its end. */
export class Run {
  /** What is remembered of it; the supervisor's alone. */
  readonly folder: string;
  /** Pipe, output file and exit code. */
  readonly shared: string;
  readonly leader: ProcessRef;
  /** Marks every process of it, wherever it moves. */
  readonly mark: string;
  readonly ended: Promise<RunEnd>;
  readonly #output: Socket;
  #lastDataAt = Date.now();
  #isOver = false;

  private constructor(
    { folder, shared, mark, leader }: Pick<Run, "folder" | "shared" | "mark" | "leader">,
    onData: (chunk: Buffer) => void,
  ) {
    this.folder = folder;
    this.shared = shared;
    this.mark = mark;
    this.leader = leader;
    this.#output = readPipe(join(shared, OUTPUT_PIPE));
    this.#output.on("data", (chunk: Buffer) => {
      this.#lastDataAt = Date.now();
      if (!this.#isOver) onData(chunk);
    });
    this.ended = this.#watch();
  }

  /** Starts a command on the host; its folder must not exist. Throws if it cannot be started. */
  static async start(folder: string, mark: string, command: Command, onData: (chunk: Buffer) => void): Promise<Run> {
    await makePipes(folder, [OUTPUT_PIPE], command.env.PATH);
    const child = spawn("/bin/sh", hostShim(folder, command.argv), {
      cwd: command.cwd,
      env: { ...command.env, BERTH_OUTPUT: join(folder, OUTPUT_FILE), BERTH_RUN: mark },
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
    return Run.begin({ folder, shared: folder, mark, leader }, onData);
  }

  /** Writes a command down whose shell has been started, and follows it. */
  static begin(run: Pick<Run, "folder" | "shared" | "mark" | "leader">, onData: (chunk: Buffer) => void): Run {
    const { folder, shared, leader } = run;
    const place = shared === folder ? {} : { shared };
    writeFileAtomically(join(folder, "run.json"), JSON.stringify({ ...leader, boot: bootId(), ...place }));
    return new Run(run, onData);
  }

  /** Takes up a command that was started before; if it has ended, only its end is known. Undefined if it is lost. */
  static adopt(folder: string, mark: string, onData: (chunk: Buffer) => void): Run | RunEnd | undefined {
    const { leader, shared } = recorded(folder);
    const isPresent = leader && isAlive(leader) && existsSync(join(shared, OUTPUT_PIPE));
    if (isPresent && (shared === folder || existsSync(join(shared, BEGUN_FILE)))) {
      return new Run({ folder, shared, mark, leader }, onData);
    }
    // Nobody will give it its command any more.
    if (isPresent) sendSignal(leader.pid, "SIGKILL");
    const code = exitCode(shared);
    return code === undefined ? undefined : { code };
  }

  /** What the command has written to its output file; empty if that cannot be read. */
  output(): string {
    try {
      return readSmallFile(join(this.shared, OUTPUT_FILE), 1024 * 1024);
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
    const hasEnded = () => existsSync(join(this.shared, "exit")) || !isAlive(this.leader);
    const look = () => {
      if (hasEnded()) resolve();
    };
    const watcher = watch(this.shared, look);
    watcher.on("error", () => undefined);
    const timer = setInterval(look, LOOK_MS);
    look();
    await news;
    clearInterval(timer);
    watcher.close();
    const code = exitCode(this.shared);
    await this.#drain();
    return { code };
  }

  /** What is in the pipe belongs to it; children in the background that go on writing do not hold it up. */
  async #drain(): Promise<void> {
    const until = Date.now() + DRAIN_MS;
    this.#lastDataAt = Date.now();
    while (Date.now() < until && Date.now() - this.#lastDataAt < QUIET_MS) await delay(QUIET_MS / 2);
    this.#isOver = true;
    touch(join(this.shared, DRAINED_FILE));
    void this.#readOn();
  }

  /** Reading on keeps children in the background from being ended by SIGPIPE, or from waiting for ever. */
  async #readOn(): Promise<void> {
    while (markedProcesses(this.mark).length > 0) await delay(BACKGROUND_MS, undefined, { ref: false });
    this.#output.destroy();
  }
}

/** Makes a folder with pipes of these names, and with an empty file for what a command says about itself. */
export async function makePipes(folder: string, names: readonly string[], path = ""): Promise<void> {
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const pipes = names.map((name) => join(folder, name));
  await promisify(execFile)("mkfifo", ["-m", "0600", ...pipes], { env: { PATH: path } });
  touch(join(folder, OUTPUT_FILE));
}

/** Makes an empty file, through no link; where that is not possible there is none. */
function touch(path: string): void {
  const { O_WRONLY, O_CREAT, O_NOFOLLOW, O_NONBLOCK } = constants;
  try {
    closeSync(openSync(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0o600));
  } catch {
    // A command that has no output file says nothing; one whose end is not marked is left alone a little later.
  }
}

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
