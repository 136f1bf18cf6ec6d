import type { ChildProcess } from "node:child_process";
import { randomBytes } from "node:crypto";
import type { Socket } from "node:net";
import { invocation, type RunAs } from "./namespaces.ts";
import { exitCodeOf, type ProcessRef, readProcess, spawnSession } from "./processes.ts";
import type { CommandOutput, Shell, ShellCommand, StartedCommand } from "./started-command.ts";

// Between two commands of one piece of work, and no longer: it is a process of the environment's.
const IDLE_MS = 1_000;
const NAME = /^[A-Za-z_][A-Za-z0-9_]*$/;
const NEWLINE = 10;

/** A text as one word of a shell. */
export const shellQuoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;

/** Takes the line that ends a command's output out of a stream; it comes last, after a newline of its own. */
class MarkedStream {
  readonly #mark: Buffer;
  readonly #output: (chunk: Buffer) => void;
  #rest: Buffer = Buffer.alloc(0);
  readonly ended = Promise.withResolvers<number>();

  constructor(mark: string, output: (chunk: Buffer) => void) {
    this.#mark = Buffer.from(`\n${mark} `);
    this.#output = output;
  }

  push(chunk: Buffer): void {
    const data = this.#rest.length > 0 ? Buffer.concat([this.#rest, chunk]) : chunk;
    const at = data.indexOf(this.#mark);
    const end = at < 0 ? -1 : data.indexOf(NEWLINE, at + this.#mark.length);
    const kept = at < 0 ? this.#beginsAt(data) : at;
    this.#emit(data.subarray(0, kept));
    this.#rest = Buffer.from(data.subarray(kept));
    if (end >= 0) this.ended.resolve(Number(data.toString("latin1", at + this.#mark.length, end)));
  }

  /** The shell has gone: what looked like the line is none. */
  close(code: number): void {
    this.#emit(this.#rest);
    this.ended.resolve(code);
  }

  #emit(chunk: Buffer): void {
    if (chunk.length > 0) this.#output(chunk);
  }

  /** Where the mark may begin of which the rest has not come yet. */
  #beginsAt(data: Buffer): number {
    for (let length = Math.min(this.#mark.length - 1, data.length); length > 0; length--) {
      if (data.subarray(data.length - length).equals(this.#mark.subarray(0, length))) return data.length - length;
    }
    return data.length;
  }
}

/**
 * A shell that runs commands of an environment's user one after the other. Starting a process takes this one, which is
 * large, some milliseconds in which it can do nothing else; the shell does that in less than one. It is started for the first
 * command, is left running for a second after the last one, and ends with this process.
 */
export class CommandShell implements Shell {
  /** What it runs as, and in. */
  readonly user: RunAs;
  readonly #env: Record<string, string>;
  #child: ChildProcess | undefined;
  #leader: ProcessRef | undefined;
  #current: { stdout: MarkedStream; stderr: MarkedStream } | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isClosed = false;

  /** `env` is what all commands get. */
  constructor(user: RunAs, env: Record<string, string>) {
    this.user = user;
    this.#env = env;
  }

  start({ file, args, cwd, env }: ShellCommand, output: CommandOutput): StartedCommand | undefined {
    const words = [file, ...args, cwd, ...Object.values(env)];
    const isUsable = Object.keys(env).every((name) => NAME.test(name)) && words.every((word) => !word.includes("\0"));
    if (this.#isClosed || this.#current || !isUsable) return undefined;
    const leader = this.#open();
    if (!leader) return undefined;
    clearTimeout(this.#timer);
    const mark = randomBytes(16).toString("hex");
    const current = {
      stdout: new MarkedStream(mark, (chunk) => output(chunk, "stdout")),
      stderr: new MarkedStream(mark, (chunk) => output(chunk, "stderr")),
    };
    this.#current = current;
    const variables = Object.entries(env).map(([name, value]) => `export ${name}=${shellQuoted(value)};`);
    const command = [file, ...args].map(shellQuoted).join(" ");
    this.#child?.stdin?.write(
      `(${variables.join(" ")} cd -- ${shellQuoted(cwd)} || exit 127; exec ${command}) </dev/null; code=$?
printf '\\n%s %d\\n' ${mark} $code; printf '\\n%s %d\\n' ${mark} $code >&2
`,
    );
    this.#hold(true);
    const ended = Promise.all([current.stdout.ended.promise, current.stderr.ended.promise]).then(([code]) => {
      if (this.#current === current) this.#rest();
      return code;
    });
    return { leader, ended, release: () => undefined };
  }

  /** Has it started before there is a command. */
  prepare(): void {
    if (this.#isClosed || this.#current || !this.#open()) return;
    clearTimeout(this.#timer);
    this.#rest();
  }

  /** Takes no more commands; one that is at work goes on. */
  close(): void {
    this.#isClosed = true;
    if (!this.#current) this.#end();
  }

  #open(): ProcessRef | undefined {
    if (this.#child) return this.#leader;
    const { descriptors, file, args, ...place } = invocation("/bin/sh", [], { cwd: "/", ...this.user });
    const child = spawnSession(file, args, { ...place, env: this.#env, descriptors, input: "pipe" });
    const leader = child.pid === undefined ? undefined : readProcess(child.pid);
    child.once("error", () => undefined);
    child.stdin?.on("error", () => undefined);
    if (!leader) {
      child.stdin?.destroy();
      return undefined;
    }
    this.#child = child;
    this.#leader = leader;
    for (const name of ["stdout", "stderr"] as const) {
      child[name]?.on("data", (chunk: Buffer) => this.#current?.[name].push(chunk)).on("error", () => undefined);
    }
    child.once("exit", (code, signal) => this.#gone(child, exitCodeOf({ code, signal })));
    return leader;
  }

  #gone(child: ChildProcess, code: number): void {
    const current = this.#child === child ? this.#current : undefined;
    if (this.#child === child) this.#child = this.#leader = this.#current = undefined;
    const close = () => {
      current?.stdout.close(code);
      current?.stderr.close(code);
      for (const stream of child.stdio) stream?.destroy();
    };
    // What a command has left behind may hold the streams open for ever.
    child.once("close", close);
    if (current) setTimeout(close, IDLE_MS).unref();
  }

  #rest(): void {
    this.#current = undefined;
    this.#hold(false);
    if (this.#isClosed) this.#end();
    else this.#timer = setTimeout(() => this.#end(), IDLE_MS).unref();
  }

  #end(): void {
    clearTimeout(this.#timer);
    this.#child?.stdin?.end();
    this.#child = this.#leader = undefined;
  }

  /** Whether this process has to wait for it. */
  #hold(isHeld: boolean): void {
    const child = this.#child;
    if (!child) return;
    for (const each of [child, ...child.stdio.slice(0, 3)] as (ChildProcess | Socket | null)[]) {
      if (isHeld) each?.ref();
      else each?.unref();
    }
  }
}
