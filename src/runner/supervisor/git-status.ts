import { spawn } from "node:child_process";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  FileChange_ChangeType as ChangeType,
  type EnvironmentGitStatus,
  EnvironmentGitStatusSchema,
  type FileChange,
  FileChangeSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { errnoOf, failedPrecondition } from "./errors.ts";
import { type ProcessRef, readProcess, terminateSession } from "./processes.ts";

// The repository belongs to the environment's user and its configuration may name commands. Git therefore runs with
// that user's rights, with what it would start by itself switched off, and under a deadline.

/** Where and as whom git runs. A runner that is root must name the environment's user. */
export interface GitStatusOptions {
  /** Primary checkout, absolute. Repositories above it do not count. */
  directory: string;
  /** Variables of the environment's processes; git sees only PATH, HOME and the environment's id. */
  env: Record<string, string>;
  uid?: number;
  gid?: number;
  /** Milliseconds for each git command, default 20 s. */
  timeoutMs?: number;
}

const MAX_LISTED = 100;
const MAX_PATH_CHARACTERS = 255;
const MAX_SUBJECT_CHARACTERS = 200;
const MAX_ITEM_BYTES = 64 * 1024;
const TIMEOUT_MS = 20_000;
const QUIET = ["core.fsmonitor=false", "core.hooksPath=/dev/null", "core.sshCommand=false", "protocol.allow=never"];

function gitEnvironment({ directory, env }: GitStatusOptions): Record<string, string> {
  const passed = ["PATH", "HOME", "USER", "BERTH_ENVIRONMENT_ID"].flatMap((name) => {
    const value = env[name];
    return value === undefined ? [] : [[name, value] as const];
  });
  return {
    ...Object.fromEntries(passed),
    LC_ALL: "C",
    GIT_CEILING_DIRECTORIES: directory.replace(/\/+[^/]*\/*$/, "") || "/",
    GIT_OPTIONAL_LOCKS: "0",
    GIT_TERMINAL_PROMPT: "0",
    GIT_NO_LAZY_FETCH: "1",
    GIT_ASKPASS: "false",
  };
}

/** The command's exit code and error text; each NUL-separated item of its output goes to `onItem`. */
async function git(
  options: GitStatusOptions,
  args: readonly string[],
  onItem: (item: string) => void,
): Promise<{ code: number; stderr: string }> {
  const { directory, uid, gid, timeoutMs = TIMEOUT_MS } = options;
  const child = spawn("git", [...QUIET.flatMap((setting) => ["-c", setting]), ...args], {
    cwd: directory,
    env: gitEnvironment(options),
    detached: true,
    stdio: ["ignore", "pipe", "pipe"],
    uid,
    gid,
  });
  let rest: Buffer = Buffer.alloc(0);
  let stderr = "";
  child.stdout.on("data", (chunk: Buffer) => {
    let start = 0;
    const data = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk;
    for (let end = data.indexOf(0); end >= 0; end = data.indexOf(0, start)) {
      onItem(data.toString("utf8", start, end));
      start = end + 1;
    }
    rest = Buffer.from(data.subarray(start));
    if (rest.length > MAX_ITEM_BYTES) child.stdout.destroy(new Error("git printed an endless line"));
  });
  child.stdout.on("error", () => undefined);
  child.stderr.on("data", (chunk: Buffer) => {
    stderr = (stderr + chunk.toString("utf8")).slice(0, 1024);
  });
  return await new Promise((resolve, reject) => {
    const leader: ProcessRef | undefined = child.pid === undefined ? undefined : readProcess(child.pid);
    const timer = setTimeout(() => {
      if (leader) void terminateSession(leader, 1000);
      child.stdout.destroy();
      child.stderr.destroy();
      reject(new ConnectError(`git took longer than ${timeoutMs / 1000} s`, Code.DeadlineExceeded));
    }, timeoutMs);
    child.once("error", (error) => {
      clearTimeout(timer);
      reject(errnoOf(error) === "ENOENT" ? failedPrecondition("no git, or no such checkout") : error);
    });
    child.once("close", (code) => {
      clearTimeout(timer);
      if (rest.length > 0) onItem(rest.toString("utf8"));
      resolve({ code: code ?? 1, stderr });
    });
  });
}

/** As `git`, for commands that only fail if the repository is broken or not there. */
async function gitOrFail(options: GitStatusOptions, args: readonly string[], onItem: (item: string) => void) {
  const { code, stderr } = await git(options, args, onItem);
  if (code === 0) return;
  const reason = stderr
    .split("\n", 1)[0]
    ?.replace(/^fatal: /, "")
    .slice(0, 200);
  throw failedPrecondition(`no usable repository: ${reason || `git exited with ${code}`}`);
}

/** Limit of the wire: 255 characters. The end of a path tells more than its start. */
function shortened(path: string): string {
  const characters = [...path];
  return characters.length <= MAX_PATH_CHARACTERS ? path : `…${characters.slice(1 - MAX_PATH_CHARACTERS).join("")}`;
}

/** Change of an ordinary entry from its index and working-tree letters, of which `.` means unchanged. */
function changeOf(index: string | undefined, tree: string | undefined): ChangeType {
  if (tree === "D") return ChangeType.DELETED;
  if (index === "R" || tree === "R") return ChangeType.RENAMED;
  if (index === "C" || tree === "C") return ChangeType.COPIED;
  if (index === "A" || tree === "A") return ChangeType.ADDED;
  return index === "D" ? ChangeType.DELETED : ChangeType.MODIFIED;
}

/** Text after the n-th space: paths come last and may hold spaces themselves. */
function afterSpaces(line: string, count: number): string {
  let at = 0;
  for (let n = 0; n < count; n++) at = line.indexOf(" ", at) + 1;
  return line.slice(at);
}

// Fields before the path, by kind of entry, in `git status --porcelain=v2`.
const FIELDS: Readonly<Record<string, number>> = { "1": 8, "2": 9, u: 10, "?": 1 };

/** Reads `git status --porcelain=v2 -z --branch` item by item. */
class StatusReader {
  commit = "";
  branch = "";
  readonly changes: FileChange[] = [];
  total = 0;
  #awaitsOldPath: FileChange | undefined;

  readonly read = (item: string): void => {
    if (this.#awaitsOldPath) {
      this.#awaitsOldPath.oldPath = shortened(item);
      this.#awaitsOldPath = undefined;
      return;
    }
    const kind = item[0] ?? "";
    const fields = FIELDS[kind];
    if (kind === "#") this.#readHeader(item);
    if (fields === undefined) return;
    const changeType =
      kind === "?" ? ChangeType.UNTRACKED : kind === "u" ? ChangeType.UPDATED_BUT_UNMERGED : changeOf(item[2], item[3]);
    const change = create(FileChangeSchema, { path: shortened(afterSpaces(item, fields)), changeType });
    if (kind === "2") this.#awaitsOldPath = change;
    if (++this.total <= MAX_LISTED) this.changes.push(change);
  };

  #readHeader(item: string): void {
    const [, name, value = ""] = item.split(" ", 3);
    if (name === "branch.oid" && value !== "(initial)") this.commit = value;
    if (name === "branch.head" && value !== "(detached)") this.branch = value;
  }
}

/** Commits on HEAD or a local branch that no remote-tracking branch holds. */
async function unpushed(options: GitStatusOptions) {
  const commits: string[] = [];
  const range = ["HEAD", "--branches", "--not", "--remotes", "--"];
  await gitOrFail(
    options,
    ["log", "-z", `--max-count=${MAX_LISTED}`, "--no-show-signature", "--format=tformat:%h: %s", ...range],
    (commit) => commits.push([...commit].slice(0, MAX_SUBJECT_CHARACTERS).join("")),
  );
  if (commits.length < MAX_LISTED) return { commits, total: commits.length };
  let total = commits.length;
  await gitOrFail(options, ["rev-list", "--count", ...range], (count) => {
    total = Number(count);
  });
  return { commits, total };
}

/**
 * A remote's address as an https URL without credentials; local paths and schemes other than ssh and git stay as they are.
 */
export function httpsCloneUrl(remote: string): string {
  const scp = /^(?:[^@/:\s]+@)?([^/:\s[\]]+|\[[^\]]+\]):(?!\/\/)(.+)$/.exec(remote);
  if (scp) return `https://${scp[1]}/${(scp[2] ?? "").replace(/^\/+/, "")}`;
  const url = URL.parse(remote);
  if (!url?.hostname) return remote;
  if (/^(git\+)?ssh:$|^git:$/.test(url.protocol)) return `https://${url.hostname}${url.pathname}`;
  url.username = "";
  url.password = "";
  return url.href;
}

/** The address of `origin`, else of the remote that comes first. */
async function remoteUrl(options: GitStatusOptions): Promise<string> {
  const remotes = new Map<string, string>();
  await git(options, ["config", "-z", "--get-regexp", "^remote\\..*\\.url$"], (item) => {
    const [key = "", ...value] = item.split("\n");
    if (remotes.size < MAX_LISTED && !remotes.has(key)) remotes.set(key, value.join("\n"));
  });
  const address = remotes.get("remote.origin.url") ?? remotes.values().next().value ?? "";
  return address.length > 2048 ? "" : httpsCloneUrl(address);
}

/**
 * Status of a checkout: at most 100 changed files and unpushed commits (`<short id>: <subject>`), exact totals.
 * Branch is empty when HEAD is detached, the commit when there is none yet.
 * FAILED_PRECONDITION without a repository, DEADLINE_EXCEEDED if git does not answer in time.
 */
export async function gitStatus(options: GitStatusOptions): Promise<EnvironmentGitStatus> {
  const status = new StatusReader();
  const args = ["status", "--porcelain=v2", "-z", "--branch", "--untracked-files=all", "--ignored=no"];
  await gitOrFail(options, args, status.read);
  const { commits, total } = status.commit === "" ? { commits: [], total: 0 } : await unpushed(options);
  return create(EnvironmentGitStatusSchema, {
    cloneUrl: await remoteUrl(options),
    branch: status.branch,
    latestCommit: status.commit,
    changedFiles: status.changes,
    totalChangedFiles: status.total,
    unpushedCommits: commits,
    totalUnpushedCommits: total,
  });
}
