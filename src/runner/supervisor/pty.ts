import type { ChildProcess } from "node:child_process";
import { closeSync, constants, write as fsWrite, openSync } from "node:fs";
import { setTimeout as delay, setImmediate as turn } from "node:timers/promises";
import type { ReadStream } from "node:tty";
import { promisify } from "node:util";
import { Code, ConnectError } from "@connectrpc/connect";
import * as nodePty from "@lydell/node-pty";
import { hideFromChildren } from "./descriptors.ts";
import { errnoOf } from "./errors.ts";
import { type ProcessEnd, processEnd, spawnSession } from "./processes.ts";

// node-pty opens the pair and sets its size. What it does beyond that is done here: its writes block the whole process
// while a program does not read (libuv retries them in a loop), its descriptors leak into every process that is started
// later, and it does not say why a shell could not be started.

/** What node-pty exports besides what it declares. */
interface Pair {
  readonly master: ReadStream;
  readonly slave: ReadStream;
  /** Of the master. */
  readonly fd: number;
  /** Path of the slave. */
  readonly ptsName: string;
  resize(cols: number, rows: number): void;
}
const { open } = nodePty as unknown as { open(options: { cols: number; rows: number; encoding: null }): Pair };
const write = promisify(fsWrite);

/** What to run, and how large its terminal is. */
export interface PtyCommand {
  /** Absolute path. */
  file: string;
  args?: readonly string[];
  cwd: string;
  env: Record<string, string>;
  cols: number;
  rows: number;
}

// A session leader without a terminal gets the one it opens.
const TAKE_TERMINAL = 'exec "$@" <>"$0" >&0 2>&0';
const QUIET_MS = 30;
const MAX_DRAIN_MS = 1000;
const MAX_WAITING_INPUT = 1024 * 1024;
const WRITE_RETRY_MS = 10;

function openPair({ cols, rows }: PtyCommand): Pair {
  try {
    return open({ cols, rows, encoding: null });
  } catch (error) {
    throw new ConnectError(`no terminal can be opened: ${error}`, Code.ResourceExhausted);
  }
}

const spawnOn = ({ ptsName }: Pair, { file, args = [], cwd, env }: PtyCommand): ChildProcess =>
  spawnSession("/bin/sh", ["-c", TAKE_TERMINAL, ptsName, file, ...args], { cwd, env, output: "ignore" });

/** A program on a terminal of its own. */
export class Pty {
  readonly #pair: Pair;
  /** Keeps the terminal open when its last process has ended, so that nothing it wrote is lost. */
  readonly #held: number;
  readonly #reveal: () => void;
  readonly #child: ChildProcess;
  #input: Uint8Array[] = [];
  #waiting = 0;
  #writing: Promise<void> | undefined;
  #received = 0;
  #isOver = false;
  #isClosed = false;
  /** How the program ended; by then all its output has been handed on. */
  readonly ended: Promise<ProcessEnd>;

  private constructor(
    pair: Pair,
    held: number,
    reveal: () => void,
    child: ChildProcess,
    onData: (chunk: Buffer) => void,
  ) {
    this.#pair = pair;
    this.#held = held;
    this.#reveal = reveal;
    this.#child = child;
    pair.master.on("error", () => undefined);
    pair.master.on("data", (chunk: Buffer) => {
      this.#received += chunk.length;
      onData(chunk);
    });
    this.ended = processEnd(child).finally(() => this.#drain());
    // Whoever starts it looks first.
    this.ended.catch(() => undefined);
  }

  /** Rejects with a system error if the program cannot be started, RESOURCE_EXHAUSTED without a free terminal. */
  static async start(command: PtyCommand, onData: (chunk: Buffer) => void): Promise<Pty> {
    const pair = openPair(command);
    const reveal = hideFromChildren(pair.fd);
    let held: number | undefined;
    let pty: Pty;
    try {
      held = openSync(pair.ptsName, constants.O_RDWR | constants.O_NOCTTY);
      pair.slave.destroy();
      pty = new Pty(pair, held, reveal, spawnOn(pair, command), onData);
    } catch (error) {
      reveal();
      pair.slave.destroy();
      pair.master.destroy();
      if (held !== undefined) closeSync(held);
      throw error;
    }
    if (pty.#child.pid === undefined) await pty.ended;
    return pty;
  }

  get pid(): number {
    return this.#child.pid ?? 0;
  }

  /** False if more than 1 MiB would be waiting for the program to read it; nothing is taken then. */
  write(data: Uint8Array): boolean {
    if (this.#isOver || this.#waiting + data.length > MAX_WAITING_INPUT) return false;
    this.#input.push(data);
    this.#waiting += data.length;
    this.#writing ??= this.#writeAll().finally(() => {
      this.#writing = undefined;
    });
    return true;
  }

  /** Resolves when the program could have read all that was written. */
  get written(): Promise<void> {
    return this.#writing ?? Promise.resolve();
  }

  /** Takes the terminal away, as a line does that drops: the kernel tells its programs. */
  async hangUp(): Promise<void> {
    this.#isOver = true;
    await this.#close();
  }

  resize(cols: number, rows: number): void {
    if (!this.#isOver) this.#pair.resize(cols, rows);
  }

  /** The program has to wait once the kernel's buffer is full. */
  pause(): void {
    this.#pair.master.pause();
  }

  resume(): void {
    this.#pair.master.resume();
  }

  async #writeAll(): Promise<void> {
    for (let next = this.#input[0]; next && !this.#isOver; next = this.#input[0]) {
      let written = 0;
      try {
        ({ bytesWritten: written } = await write(this.#pair.fd, next, 0, next.length, null));
      } catch (error) {
        if (errnoOf(error) !== "EAGAIN") break;
        await delay(WRITE_RETRY_MS);
      }
      this.#waiting -= written;
      if (written === next.length) this.#input.shift();
      else this.#input[0] = next.subarray(written);
    }
    this.#input = [];
    this.#waiting = 0;
  }

  /** Hands on what the kernel still holds, then lets go of the terminal; a program in the background does not delay it. */
  async #drain(): Promise<void> {
    this.resume();
    const deadline = Date.now() + MAX_DRAIN_MS;
    for (let before = -1; before !== this.#received && Date.now() < deadline; ) {
      before = this.#received;
      await delay(QUIET_MS);
      await turn();
    }
    this.#isOver = true;
    await this.#close();
  }

  async #close(): Promise<void> {
    // The number of the descriptor may mean another file at once.
    await this.#writing;
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#reveal();
    this.#pair.master.destroy();
    closeSync(this.#held);
  }
}
