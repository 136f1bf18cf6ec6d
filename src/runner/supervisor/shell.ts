import type { ChildProcess } from "node:child_process";
import { randomBytes } from "node:crypto";
import { invocation, type RunAs } from "./namespaces.ts";
import { exitCodeOf, type ProcessRef, readProcess, spawnSession } from "./processes.ts";
import type { CommandOutput, Shell, ShellCommand, StartedCommand } from "./started-command.ts";

const PIPE_GRACE_MS = 1_000;
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

/** A shell at work, and the command that it runs. */
interface ShellProcess {
  child: ChildProcess;
  leader: ProcessRef;
  current: Record<"stdout" | "stderr", MarkedStream> | undefined;
}

/**
 * A shell that runs commands of an environment's user one after the other. Starting a process takes this one, which is
 * large, some milliseconds in which it can do nothing else; the shell does that in less than one. It is started for the first
 * command, and ends with this process.
 */
export class CommandShell implements Shell {
  /** What it runs as, and in. */
  readonly user: RunAs;
  readonly #env: Record<string, string>;
  #process: ShellProcess | undefined;
  #isClosed = false;

  /** `env` is what all commands get. */
  constructor(user: RunAs, env: Record<string, string>) {
    this.user = user;
    this.#env = env;
  }

  start({ file, args, cwd, env }: ShellCommand, output: CommandOutput): StartedCommand | undefined {
    const words = [file, ...args, cwd, ...Object.values(env)];
    const isUsable = Object.keys(env).every((name) => NAME.test(name)) && words.every((word) => !word.includes("\0"));
    if (this.#isClosed || this.#process?.current || !isUsable) return undefined;
    const shell = this.#open();
    if (!shell) return undefined;
    const mark = randomBytes(16).toString("hex");
    const current = {
      stdout: new MarkedStream(mark, (chunk) => output(chunk, "stdout")),
      stderr: new MarkedStream(mark, (chunk) => output(chunk, "stderr")),
    };
    shell.current = current;
    const variables = Object.entries(env).map(([name, value]) => `export ${name}=${shellQuoted(value)};`);
    const command = [file, ...args].map(shellQuoted).join(" ");
    shell.child.stdin?.write(
      `(${variables.join(" ")} cd -- ${shellQuoted(cwd)} || exit 127; exec ${command}) </dev/null; code=$?
printf '\\n%s %d\\n' ${mark} $code; printf '\\n%s %d\\n' ${mark} $code >&2
`,
    );
    const ended = Promise.all([current.stdout.ended.promise, current.stderr.ended.promise]).then(([code]) => {
      shell.current = undefined;
      if (this.#isClosed) this.#end();
      return code;
    });
    return { leader: shell.leader, ended, release: () => undefined };
  }

  /** Has it started before there is a command. */
  prepare(): void {
    if (!this.#isClosed) this.#open();
  }

  /** Takes no more commands; one that is at work goes on. */
  close(): void {
    this.#isClosed = true;
    if (!this.#process?.current) this.#end();
  }

  #open(): ShellProcess | undefined {
    if (this.#process) return this.#process;
    const { descriptors, file, args, ...place } = invocation("/bin/sh", [], { cwd: "/", ...this.user });
    const child = spawnSession(file, args, { ...place, env: this.#env, descriptors, input: "pipe" });
    const leader = child.pid === undefined ? undefined : readProcess(child.pid);
    child.once("error", () => undefined);
    child.stdin?.on("error", () => undefined);
    if (!leader) {
      child.stdin?.destroy();
      return undefined;
    }
    const shell: ShellProcess = { child, leader, current: undefined };
    for (const name of ["stdout", "stderr"] as const) {
      child[name]?.on("data", (chunk: Buffer) => shell.current?.[name].push(chunk)).on("error", () => undefined);
    }
    child.once("exit", (code, signal) => this.#gone(shell, exitCodeOf({ code, signal })));
    this.#process = shell;
    return shell;
  }

  #gone(shell: ShellProcess, code: number): void {
    if (this.#process === shell) this.#process = undefined;
    const close = () => {
      shell.current?.stdout.close(code);
      shell.current?.stderr.close(code);
      for (const stream of shell.child.stdio) stream?.destroy();
    };
    // What a command has left behind may hold the streams open for ever.
    const late = setTimeout(close, PIPE_GRACE_MS);
    shell.child.once("close", () => {
      clearTimeout(late);
      close();
    });
  }

  #end(): void {
    this.#process?.child.stdin?.end();
    this.#process = undefined;
  }
}
