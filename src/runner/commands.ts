import { homedir } from "node:os";
import type { Readable } from "node:stream";
import type { RunAs } from "./supervisor/namespaces.ts";
import { type ProcessRef, terminateSession } from "./supervisor/processes.ts";
import { startCommand } from "./supervisor/start-command.ts";

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
const SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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

/** Variables that every command gets. */
export const commandVariables = (): Record<string, string> => ({
  PATH: commandPath(),
  LANG: "C.UTF-8",
  LC_ALL: "C.UTF-8",
});

/** What a stream has said, up to a limit. */
class Collected {
  readonly #limit: number;
  readonly #chunks: Buffer[] = [];
  #size = 0;

  constructor(limit: number) {
    this.#limit = limit;
  }

  add(chunk: Buffer): void {
    if (this.#size >= this.#limit) return;
    this.#chunks.push(chunk.subarray(0, this.#limit - this.#size));
    this.#size += chunk.length;
  }

  get text(): string {
    return Buffer.concat(this.#chunks).toString("utf8");
  }
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
  const { cwd = "/", env, user, input, timeoutMs, signal, maxOutput = DEFAULT_MAX_OUTPUT, onOutput, onStart } = options;
  signal?.throwIfAborted();
  const said = { stdout: new Collected(maxOutput), stderr: new Collected(maxOutput) };
  const place = { ...user, cwd, env: { ...commandVariables(), ...env }, input };
  const { leader, ended, release } = startCommand(file, args, place, (chunk, stream) => {
    onOutput?.(chunk);
    said[stream].add(chunk);
  });
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
    return { code, stdout: said.stdout.text, stderr: said.stderr.text };
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", aborted);
    release();
  }
}
