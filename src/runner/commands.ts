import { type ChildProcess, spawn } from "node:child_process";
import { constants, homedir } from "node:os";
import { Readable } from "node:stream";
import { invocation, type RunAs } from "./supervisor/namespaces.ts";
import { type ProcessRef, readProcess, terminateSession } from "./supervisor/processes.ts";

/** How a command is run. Nothing of the runner's own environment reaches it but PATH. */
export interface CommandOptions {
  cwd?: string;
  env?: Readonly<Record<string, string>>;
  /** User it runs as, and where; as the runner itself if left out. */
  user?: RunAs | undefined;
  /** The whole session is terminated after this time. */
  timeoutMs: number;
  signal?: AbortSignal;
  /** Longest output that is kept, per stream; the rest is dropped. Default 64 KiB. */
  maxOutput?: number;
  /** What it reads; nothing if left out. */
  input?: string | Readable;
  /** Sees both streams as they come. */
  onOutput?: (chunk: Buffer) => void;
  /** Called once the command is known by pid and start time, for whoever must find it after a crash. */
  onStart?: (process: ProcessRef) => Promise<void>;
}

/** How a command ended; `code` is 128 plus the signal number when a signal ended it. */
export interface CommandResult {
  code: number;
  stdout: string;
  stderr: string;
}

/** The command did not end in time and was terminated. */
export class CommandTimeout extends Error {}

const DEFAULT_MAX_OUTPUT = 64 * 1024;
const GRACE_MS = 2000;
const PIPE_GRACE_MS = 1000;
const SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SIGNALED = 128;

/**
 * PATH for commands and environments: the usual places, then what the runner was started with, without its own
 * packages and, as root, without what lies in root's home.
 */
export function commandPath(): string {
  const isHidden = (entry: string) => process.getuid?.() === 0 && entry.startsWith(`${homedir()}/`);
  const own = (process.env.PATH ?? "").split(":");
  const usable = own.filter((entry) => entry.startsWith("/") && !entry.includes("node_modules") && !isHidden(entry));
  return [...new Set([...SYSTEM_PATH.split(":"), ...usable])].join(":");
}

/** A text as one word of a shell. */
export const shellQuoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;

function collect(
  stream: NodeJS.ReadableStream | null,
  limit: number,
  onOutput?: (chunk: Buffer) => void,
): () => string {
  const chunks: Buffer[] = [];
  let size = 0;
  stream?.on("data", (chunk: Buffer) => {
    onOutput?.(chunk);
    if (size >= limit) return;
    chunks.push(chunk.subarray(0, limit - size));
    size += chunk.length;
  });
  stream?.on("error", () => undefined);
  return () => Buffer.concat(chunks).toString("utf8");
}

function ending(child: ChildProcess): Promise<number> {
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code, signal) => {
      const ended = () => resolve(code ?? SIGNALED + (signal ? constants.signals[signal] : 0));
      // Something the command left behind may hold its output open for ever.
      const late = setTimeout(ended, PIPE_GRACE_MS);
      child.once("close", () => {
        clearTimeout(late);
        ended();
      });
    });
  });
}

/** Writes to the input of a program, which need not read it. */
function feed({ stdin }: ChildProcess, input: string | Readable): void {
  if (!stdin) return;
  stdin.on("error", () => undefined);
  const source = typeof input === "string" ? Readable.from([input]) : input;
  source.on("error", () => stdin.destroy());
  source.pipe(stdin);
}

/**
 * Runs a program to its end, in a session of its own, with empty input unless it is given one. Throws CommandTimeout, the signal's reason, or
 * the system error if it could not be started; a failure exit is a result.
 */
export async function runCommand(
  file: string,
  args: readonly string[],
  options: CommandOptions,
): Promise<CommandResult> {
  const { cwd, env, user, timeoutMs, signal, maxOutput = DEFAULT_MAX_OUTPUT, onOutput, onStart, input } = options;
  signal?.throwIfAborted();
  const { descriptors, ...started } = invocation(file, args, { cwd: cwd ?? "/", ...user });
  const child = spawn(started.file, started.args, {
    ...{ cwd: started.cwd, uid: started.uid, gid: started.gid },
    env: { PATH: commandPath(), LANG: "C.UTF-8", LC_ALL: "C.UTF-8", ...env },
    detached: true,
    stdio: [input === undefined ? "ignore" : "pipe", "pipe", "pipe", ...descriptors],
  });
  const ended = ending(child);
  if (input !== undefined) feed(child, input);
  const stdout = collect(child.stdout, maxOutput, onOutput);
  const stderr = collect(child.stderr, maxOutput, onOutput);
  const leader = child.pid === undefined ? undefined : readProcess(child.pid);
  let cut: Error | undefined;
  const terminate = (reason: Error) => {
    cut ??= reason;
    if (leader) void terminateSession(leader, GRACE_MS);
  };
  const timer = setTimeout(
    () => terminate(new CommandTimeout(`${file} took longer than ${timeoutMs / 1000} s`)),
    timeoutMs,
  );
  const aborted = () => terminate(signal?.reason instanceof Error ? signal.reason : new Error("aborted"));
  signal?.addEventListener("abort", aborted, { once: true });
  try {
    if (leader) await onStart?.(leader);
    const code = await ended;
    if (cut) throw cut;
    return { code, stdout: stdout(), stderr: stderr() };
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", aborted);
    child.stdout?.destroy();
    child.stderr?.destroy();
  }
}
