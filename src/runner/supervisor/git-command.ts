import { Code, ConnectError } from "@connectrpc/connect";
import { errnoOf, failedPrecondition } from "./errors.ts";
import type { RunAs } from "./namespaces.ts";
import { terminateSession } from "./processes.ts";
import { startCommand } from "./start-command.ts";

// The repository belongs to the environment's user and its configuration may name commands. Git therefore runs with
// that user's rights, with what it would start by itself switched off, and under a deadline.

/** Where and as whom git runs. A runner that is root must name the environment's user. */
export interface GitOptions extends RunAs {
  /** Primary checkout, absolute. Repositories above it do not count. */
  directory: string;
  /** Variables of the environment's processes; git sees only PATH, HOME and the environment's id. */
  env: Record<string, string>;
  /** Milliseconds for each git command, default 20 s. */
  timeoutMs?: number;
}

/** How a git command ended. */
export interface GitEnd {
  code: number;
  /** Its first kilobyte. */
  stderr: string;
}

const MAX_ITEM_BYTES = 64 * 1024;
const TIMEOUT_MS = 20_000;
const QUIET = ["core.fsmonitor=false", "core.hooksPath=/dev/null", "core.sshCommand=false", "protocol.allow=never"];

function gitEnvironment({ directory, env }: GitOptions): Record<string, string> {
  const passed = ["PATH", "HOME", "USER", "BERTH_ENVIRONMENT_ID"].flatMap((name) => {
    const value = env[name];
    return value === undefined ? [] : [[name, value] as const];
  });
  return {
    ...Object.fromEntries(passed),
    LC_ALL: "C",
    GIT_CEILING_DIRECTORIES: directory.replace(/\/+[^/]*\/*$/, "") || "/",
    GIT_LITERAL_PATHSPECS: "1",
    GIT_OPTIONAL_LOCKS: "0",
    GIT_TERMINAL_PROMPT: "0",
    GIT_NO_LAZY_FETCH: "1",
    GIT_ASKPASS: "false",
  };
}

/** Runs git; its output goes to `onData`, and what that throws ends git and is the caller's error. */
export async function git(
  options: GitOptions,
  args: readonly string[],
  onData: (chunk: Buffer) => void,
): Promise<GitEnd> {
  const { directory, uid, gid, inside, shell, timeoutMs = TIMEOUT_MS } = options;
  const words = [...QUIET.flatMap((setting) => ["-c", setting]), ...args];
  const place = { cwd: directory, env: gitEnvironment(options), uid, gid, inside, shell };
  let stderr = "";
  const heard = Promise.withResolvers<never>();
  const { leader, ended, release } = startCommand("git", words, place, (chunk, stream) => {
    if (stream === "stderr") {
      stderr = (stderr + chunk.toString("utf8")).slice(0, 1024);
      return;
    }
    try {
      onData(chunk);
    } catch (error) {
      heard.reject(error);
    }
  });
  const late = new ConnectError(`git took longer than ${timeoutMs / 1000} s`, Code.DeadlineExceeded);
  const timer = setTimeout(() => heard.reject(late), timeoutMs);
  try {
    return { code: await Promise.race([ended, heard.promise]), stderr };
  } catch (error) {
    if (leader) void terminateSession(leader, 1000);
    throw errnoOf(error) === "ENOENT" ? failedPrecondition("no git, or no such checkout") : error;
  } finally {
    clearTimeout(timer);
    release();
  }
}

/** As `git`; each item of its output, ended by NUL or by the end, goes to `onItem`. */
export async function gitItems(
  options: GitOptions,
  args: readonly string[],
  onItem: (item: string) => void,
): Promise<GitEnd> {
  let rest: Buffer = Buffer.alloc(0);
  const end = await git(options, args, (chunk) => {
    let start = 0;
    const data = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk;
    for (let stop = data.indexOf(0); stop >= 0; stop = data.indexOf(0, start)) {
      onItem(data.toString("utf8", start, stop));
      start = stop + 1;
    }
    rest = Buffer.from(data.subarray(start));
    if (rest.length > MAX_ITEM_BYTES) throw failedPrecondition("git printed an endless line");
  });
  if (rest.length > 0) onItem(rest.toString("utf8"));
  return end;
}

/** As `git`; its output as a whole, RESOURCE_EXHAUSTED naming `what` when it is larger than `maxBytes`. */
export async function gitOutput(
  options: GitOptions,
  args: readonly string[],
  maxBytes: number,
  what: string,
): Promise<GitEnd & { output: Buffer }> {
  const chunks: Buffer[] = [];
  let size = 0;
  const end = await git(options, args, (chunk) => {
    size += chunk.length;
    if (size > maxBytes) throw new ConnectError(`${what} is larger than ${maxBytes} bytes`, Code.ResourceExhausted);
    chunks.push(chunk);
  });
  return { ...end, output: Buffer.concat(chunks) };
}

/** What a failure says about the repository, as FAILED_PRECONDITION. */
export function unusable({ code, stderr }: GitEnd): ConnectError {
  const reason = stderr
    .split("\n", 1)[0]
    ?.replace(/^fatal: /, "")
    .slice(0, 200);
  return failedPrecondition(`no usable repository: ${reason || `git exited with ${code}`}`);
}

/** As `gitItems`, for commands that only fail if the repository is broken or not there. */
export async function gitOrFail(
  options: GitOptions,
  args: readonly string[],
  onItem: (item: string) => void,
): Promise<void> {
  const end = await gitItems(options, args, onItem);
  if (end.code !== 0) throw unusable(end);
}
