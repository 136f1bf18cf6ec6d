import { create } from "@bufbuild/protobuf";
import {
  FileChange_ChangeType as ChangeType,
  type EnvironmentGitStatus,
  EnvironmentGitStatusSchema,
  type FileChange,
  FileChangeSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { type GitOptions, gitItems, gitOrFail } from "./git-command.ts";

const MAX_LISTED = 100;
const MAX_PATH_CHARACTERS = 255;
const MAX_SUBJECT_CHARACTERS = 200;

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

/** Reads `git status --porcelain=v2 -z --branch` item by item; keeps the first `limit` changes. */
class StatusReader {
  readonly #limit: number;
  readonly #shown: (path: string) => string;
  commit = "";
  branch = "";
  readonly changes: FileChange[] = [];
  total = 0;
  #awaitsOldPath: FileChange | undefined;

  constructor(limit: number, shown: (path: string) => string) {
    this.#limit = limit;
    this.#shown = shown;
  }

  readonly read = (item: string): void => {
    if (this.#awaitsOldPath) {
      this.#awaitsOldPath.oldPath = this.#shown(item);
      this.#awaitsOldPath = undefined;
      return;
    }
    const kind = item[0] ?? "";
    const fields = FIELDS[kind];
    if (kind === "#") this.#readHeader(item);
    if (fields === undefined) return;
    const changeType =
      kind === "?" ? ChangeType.UNTRACKED : kind === "u" ? ChangeType.UPDATED_BUT_UNMERGED : changeOf(item[2], item[3]);
    const change = create(FileChangeSchema, { path: this.#shown(afterSpaces(item, fields)), changeType });
    if (kind === "2") this.#awaitsOldPath = change;
    if (++this.total <= this.#limit) this.changes.push(change);
  };

  #readHeader(item: string): void {
    const [, name, value = ""] = item.split(" ", 3);
    if (name === "branch.oid" && value !== "(initial)") this.commit = value;
    if (name === "branch.head" && value !== "(detached)") this.branch = value;
  }
}

/** Commits on HEAD or a local branch that no remote-tracking branch holds. */
async function unpushed(options: GitOptions) {
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
async function remoteUrl(options: GitOptions): Promise<string> {
  const remotes = new Map<string, string>();
  await gitItems(options, ["config", "-z", "--get-regexp", "^remote\\..*\\.url$"], (item) => {
    const [key = "", ...value] = item.split("\n");
    if (remotes.size < MAX_LISTED && !remotes.has(key)) remotes.set(key, value.join("\n"));
  });
  const address = remotes.get("remote.origin.url") ?? remotes.values().next().value ?? "";
  return shownAddress(address);
}

const shownAddress = (remote: string) => (remote.length > 2048 ? "" : httpsCloneUrl(remote));

const STATUS = ["status", "--porcelain=v2", "-z", "--branch", "--untracked-files=all", "--ignored=no"];

/** The first `limit` uncommitted changes with their whole paths, and how many there are. */
export async function uncommittedChanges(
  options: GitOptions,
  limit: number,
): Promise<{ changes: FileChange[]; total: number }> {
  const status = new StatusReader(limit, (path) => path);
  await gitOrFail(options, STATUS, status.read);
  return status;
}

/** As `gitStatus`, for a checkout of which the address is known, and that nothing has been committed in that is not there. */
export async function freshGitStatus(options: GitOptions, remote: string): Promise<EnvironmentGitStatus> {
  const status = new StatusReader(MAX_LISTED, shortened);
  await gitOrFail(options, STATUS, status.read);
  return statusMessage(status, shownAddress(remote), { commits: [], total: 0 });
}

/**
 * Status of a checkout: at most 100 changed files and unpushed commits (`<short id>: <subject>`), exact totals.
 * Branch is empty when HEAD is detached, the commit when there is none yet.
 * FAILED_PRECONDITION without a repository, DEADLINE_EXCEEDED if git does not answer in time.
 */
export async function gitStatus(options: GitOptions): Promise<EnvironmentGitStatus> {
  const status = new StatusReader(MAX_LISTED, shortened);
  await gitOrFail(options, STATUS, status.read);
  const local = status.commit === "" ? { commits: [], total: 0 } : await unpushed(options);
  return statusMessage(status, await remoteUrl(options), local);
}

function statusMessage(
  { branch, commit, changes, total }: StatusReader,
  cloneUrl: string,
  local: { commits: string[]; total: number },
): EnvironmentGitStatus {
  return create(EnvironmentGitStatusSchema, {
    ...{ cloneUrl, branch, latestCommit: commit, changedFiles: changes, totalChangedFiles: total },
    ...{ unpushedCommits: local.commits, totalUnpushedCommits: local.total },
  });
}
