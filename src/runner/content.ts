import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import type {
  EnvironmentGitStatus,
  EnvironmentInitializer,
  EnvironmentSpec_Content,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { AdmittedUrl } from "../scm/guard.ts";
import { isFullCommit } from "../scm/refs.ts";
import { type ClonePlan, planClones, type ResolveContext } from "./clone-plan.ts";
import { CommandTimeout, commandPath, runCommand } from "./commands.ts";
import { ContentError, failureText, type GitContext, git, isRedirect, movedTo } from "./git.ts";
import type { Host } from "./host.ts";
import { lineWriter } from "./logs.ts";
import { commandUser } from "./machine.ts";
import type { EnvironmentPaths } from "./paths.ts";
import type { ContentFacts } from "./record.ts";
import { fetchSubmodules } from "./submodules.ts";
import { gitStatus } from "./supervisor/git-status.ts";
import { bootId, type ProcessRef } from "./supervisor/processes.ts";
import type { UnixUser } from "./users.ts";

// Content is put in place by commands that run as the environment's user, since the workspace may hold anything. A new
// tree is cloned aside and complete before the first of its folders gets its name, so no crash leaves half of one.

const CONTENT_DEADLINE_MS = 30 * 60_000;
const FILES_DEADLINE_MS = 5 * 60_000;
const GIT_DEADLINE_MS = 60_000;
const MAX_REDIRECTS = 3;
/** Names in the workspace that belong to the runner. */
const RESERVED = /^\.(partial|berth)-/;
const PLAIN_SESSION = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** What content work needs to know about its environment. */
export interface Workspace {
  host: Host;
  environmentId: string;
  paths: EnvironmentPaths;
  user: UnixUser;
  /** Settings that let git sign in to hosts. */
  helpers: readonly string[];
  /** A line for the log. */
  write(line: string): void;
  /** Remembers the facts on disk before the work goes on. */
  save(facts: ContentFacts): Promise<void>;
  signal: AbortSignal;
}

/** Content as it was put in place. */
export interface PlacedContent {
  facts: ContentFacts;
  warnings: string[];
}

/** A session as part of a file name: it is text of a client. */
const label = (session: string) =>
  PLAIN_SESSION.test(session) ? session : createHash("sha256").update(session).digest("hex").slice(0, 16);

async function asUser({ user, paths, signal, environmentId }: Workspace, file: string, args: readonly string[]) {
  return await runCommand(file, args, {
    cwd: paths.workspace,
    env: { HOME: paths.home, BERTH_ENVIRONMENT_ID: environmentId },
    user: commandUser(user),
    timeoutMs: FILES_DEADLINE_MS,
    signal,
  });
}

async function change(workspace: Workspace, file: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await asUser(workspace, file, args);
  if (code === 0) return;
  const full = /No space left on device|Disk quota exceeded/i.test(stderr);
  throw new ContentError(full ? "disk full" : `${file} failed: ${stderr.trim().slice(0, 300)}`);
}

const isThere = async (workspace: Workspace, path: string) =>
  (await asUser(workspace, "test", ["-e", path, "-o", "-L", path])).code === 0;

/** Top-level names in the workspace that are not the runner's. */
async function entries(workspace: Workspace): Promise<string[]> {
  const args = ["-P", workspace.paths.workspace, "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\\0"];
  const { stdout } = await asUser(workspace, "find", args);
  return stdout.split("\0").filter((name) => name !== "" && !RESERVED.test(name));
}

async function move(workspace: Workspace, from: string, to: string): Promise<void> {
  await change(workspace, "mkdir", "-p", "--", dirname(to));
  await change(workspace, "mv", "-T", "--", from, to);
}

function gitContext(workspace: Workspace, cwd: string, plan: ClonePlan | undefined, deadline: number): GitContext {
  const { host, environmentId, paths, user, signal, helpers } = workspace;
  const scheme = plan?.admitted.url.protocol.slice(0, -1);
  return {
    ...{ cwd, environmentId, signal, helpers },
    home: paths.home,
    user: commandUser(user),
    timeoutMs: Math.max(1, deadline - Date.now()),
    protocols: [...new Set(["https", "ssh", ...host.config.scm.schemes, ...(scheme ? [scheme] : [])])],
    pinned: plan ? [plan.admitted] : [],
  };
}

/** Runs git with its progress in the log; throws the short text for people if it fails. */
async function gitStep(workspace: Workspace, context: GitContext, plan: ClonePlan, args: readonly string[]) {
  const lines = lineWriter(workspace.write);
  const { code, stderr } = await git({ ...context, onOutput: lines.push }, args);
  lines.end();
  if (code !== 0) throw new ContentError(failureText(stderr, plan.admitted));
}

/** Fetches a repository without checking anything out; a host that has moved it on itself is followed. */
async function fetchRepository(
  workspace: Workspace,
  plan: ClonePlan,
  folder: string,
  deadline: number,
  facts: ContentFacts,
): Promise<ClonePlan> {
  const options = ["--no-checkout", "--template=", "--origin", "origin", "--progress"];
  const onStart = (process: ProcessRef) => workspace.save({ ...facts, process: { ...process, bootId: bootId() } });
  let present = plan;
  for (let redirects = 0; ; redirects++) {
    const lines = lineWriter(workspace.write);
    const context = gitContext(workspace, dirname(folder), present, deadline);
    const args = ["clone", ...options, "--", present.url, folder];
    const { code, stderr } = await git({ ...context, onOutput: lines.push, onStart }, args);
    lines.end();
    if (code === 0) return present;
    const moved =
      isRedirect(stderr) && redirects < MAX_REDIRECTS && (await movedTo(present.admitted, workspace.signal));
    if (!moved) throw new ContentError(failureText(stderr, present.admitted));
    workspace.write(`The repository lies at ${moved.href}`);
    present = { ...present, url: moved.href, admitted: { ...present.admitted, url: moved } };
  }
}

const hasCommit = async (context: GitContext, name: string) =>
  (await git(context, ["rev-parse", "--verify", "--quiet", "--end-of-options", `${name}^{commit}`])).code === 0;

async function checkOut(workspace: Workspace, context: GitContext, plan: ClonePlan): Promise<void> {
  const { target } = plan;
  const run = (...args: string[]) => gitStep(workspace, context, plan, args);
  const missing = () => new ContentError(`ref not found: ${target.mode === "head" ? "HEAD" : target.name}`);
  const isEmpty = !(await hasCommit(context, "refs/remotes/origin/HEAD")) && !(await hasCommit(context, "HEAD"));
  switch (target.mode) {
    case "head":
      // Without a commit there is nothing to check out, and the unborn branch is already the remote's.
      if (!isEmpty) await run("checkout", "--force", "HEAD");
      return;
    case "branch": {
      const remote = `refs/remotes/origin/${target.name}`;
      if (!(await hasCommit(context, remote))) throw missing();
      return await run("checkout", "--force", "-B", target.name, "--track", remote);
    }
    case "new_branch":
      if (isEmpty) return await run("symbolic-ref", "HEAD", `refs/heads/${target.name}`);
      return await run("checkout", "--force", "--no-track", "-B", target.name, "HEAD");
    case "tag":
      if (!(await hasCommit(context, `refs/tags/${target.name}`))) throw missing();
      return await run("checkout", "--force", "--detach", `refs/tags/${target.name}`);
    case "commit": {
      if (!(await hasCommit(context, target.name)) && isFullCommit(target.name)) {
        const { code } = await git(context, ["fetch", "--no-tags", "origin", target.name]);
        if (code !== 0) throw missing();
      }
      if (!(await hasCommit(context, target.name))) throw missing();
      return await run("checkout", "--force", "--detach", target.name);
    }
  }
}

/** Clones one repository into a folder; returns warnings about submodules that could not be fetched. */
async function clone(
  workspace: Workspace,
  wanted: ClonePlan,
  folder: string,
  deadline: number,
  facts: ContentFacts,
): Promise<string[]> {
  await change(workspace, "mkdir", "-p", "--", dirname(folder));
  workspace.write(`Cloning ${wanted.admitted.url.href}`);
  const plan = await fetchRepository(workspace, wanted, folder, deadline, facts);
  const context = gitContext(workspace, folder, plan, deadline);
  await checkOut(workspace, context, plan);
  if (plan.upstream) await gitStep(workspace, context, plan, ["remote", "add", "--", "upstream", plan.upstream]);
  if (!(await isThere(workspace, join(folder, ".gitmodules")))) return [];
  const contextFor = (at: string, pinned: readonly AdmittedUrl[]) => ({
    ...gitContext(workspace, at, plan, deadline),
    pinned,
  });
  const { host, write, signal } = workspace;
  return await fetchSubmodules({ guard: host.guard, contextFor, write, signal }, folder, plan.url);
}

/** Nothing would be lost with this checkout: no change, no untracked file, no stash, nothing that is not pushed. */
async function isExpendable(workspace: Workspace, folder: string): Promise<boolean> {
  const { paths, user, environmentId } = workspace;
  const env = { HOME: paths.home, PATH: commandPath(), BERTH_ENVIRONMENT_ID: environmentId };
  const context = gitContext(workspace, folder, undefined, Date.now() + GIT_DEADLINE_MS);
  try {
    const status = await gitStatus({ directory: folder, env, ...commandUser(user) });
    const stash = await git(context, ["rev-parse", "--verify", "--quiet", "refs/stash"]);
    return status.totalChangedFiles === 0 && status.totalUnpushedCommits === 0 && stash.code !== 0;
  } catch {
    return false;
  }
}

/** The old tree: its checkouts, or everything if it was no git content. */
async function oldFolders(
  workspace: Workspace,
  facts: ContentFacts,
): Promise<{ names: string[]; expendable: boolean }> {
  const found = facts.checkouts.length > 0 ? facts.checkouts.map(({ location }) => location) : await entries(workspace);
  const names: string[] = [];
  let expendable = true;
  for (const name of found) {
    const folder = join(workspace.paths.workspace, name);
    if (!(await isThere(workspace, folder))) continue;
    names.push(name);
    expendable &&= facts.checkouts.length > 0 && (await isExpendable(workspace, folder));
  }
  return { names, expendable };
}

async function removeMatching(workspace: Workspace, pattern: string): Promise<void> {
  const found = [workspace.paths.workspace, "-mindepth", "1", "-maxdepth", "1", "-name", pattern];
  await change(workspace, "find", "-P", ...found, "-exec", "rm", "-rf", "--", "{}", "+");
}

/** Moves what was made ready to its place, what is in the way to the backup; can be repeated after a crash. */
async function place(
  workspace: Workspace,
  ready: string,
  backup: string,
  old: readonly string[],
  fresh: readonly string[],
): Promise<void> {
  const root = workspace.paths.workspace;
  const setAside = async (name: string) => {
    if (!(await isThere(workspace, join(root, name))) || (await isThere(workspace, join(backup, name)))) return;
    await move(workspace, join(root, name), join(backup, name));
  };
  for (const name of old.filter((each) => !fresh.includes(each))) await setAside(name);
  // Outer folders first: they carry what was cloned inside them.
  for (const name of [...fresh].sort()) {
    if (!(await isThere(workspace, join(ready, name)))) continue;
    await setAside(name);
    if (await isThere(workspace, join(root, name)))
      throw new ContentError(`${name} is in the way and could not be set aside`);
    await move(workspace, join(ready, name), join(root, name));
  }
}

/**
 * Brings the content of a session into the workspace. The first time whatever lies there is a leftover of a failed
 * attempt; later the old tree stays until the new one is complete, and is kept aside unless nothing would be lost.
 * Throws ContentError with a text for people; the old tree is then still in place.
 */
export async function initializeContent(
  workspace: Workspace,
  session: string,
  initializer: EnvironmentInitializer | undefined,
  facts: ContentFacts,
): Promise<PlacedContent> {
  const { host, paths, signal } = workspace;
  const deadline = Date.now() + CONTENT_DEADLINE_MS;
  const isFirst = facts.session === "";
  const ready = join(paths.workspace, `.berth-ready-${label(session)}`);
  const backup = join(paths.workspace, `.berth-backup-${label(facts.session)}`);
  const warnings: string[] = [];
  const purpose = { case: "environmentId" as const, value: workspace.environmentId };
  const resolve: ResolveContext = (url, ends) => host.resolveContext(url, purpose, ends);
  const plans = await planClones(host.guard, initializer, resolve, signal);
  const locations = plans.map(({ location }) => location);
  let replacing = facts.replacing?.session === session ? facts.replacing : undefined;

  try {
    await removeMatching(workspace, isFirst ? "*" : ".partial-*");
    if (!replacing) {
      await removeMatching(workspace, ".berth-ready-*");
      const partial = join(paths.workspace, `.partial-${label(session)}`);
      await change(workspace, "mkdir", "--", partial);
      for (const plan of plans) {
        warnings.push(...(await clone(workspace, plan, join(partial, plan.location), deadline, facts)));
      }
      await change(workspace, "mv", "-T", "--", partial, ready);
      const { names, expendable } = isFirst ? { names: [], expendable: true } : await oldFolders(workspace, facts);
      replacing = { session, old: names, keepBackup: !expendable };
      if (!isFirst) await workspace.save({ ...facts, replacing });
    }
    await place(workspace, ready, backup, replacing.old, locations);
    await change(workspace, "rm", "-rf", "--", ready);
  } catch (error) {
    if (!signal.aborted) await removeMatching(workspace, ".partial-*").catch(() => undefined);
    const isLate = error instanceof CommandTimeout && Date.now() >= deadline;
    throw isLate ? new ContentError("content was not ready within 30 minutes") : error;
  }
  if (!isFirst && replacing.keepBackup) warnings.push(`the content before was moved to ${backup}`);
  else if (!isFirst) await change(workspace, "rm", "-rf", "--", backup);
  const folder = join(paths.workspace, locations[0] ?? ".");
  return { facts: { session, checkouts: plans.map(({ location }) => ({ location })), folder }, warnings };
}

/** The name and address that commits get, as one text to compare. */
export const gitIdentity = ({ gitUsername, gitEmail }: EnvironmentSpec_Content, { session }: ContentFacts): string =>
  JSON.stringify([gitUsername, gitEmail, session]);

/** Writes who commits, and which folders git trusts, into the user's own git configuration. */
export async function configureGit(
  workspace: Workspace,
  { gitUsername, gitEmail }: EnvironmentSpec_Content,
  { checkouts }: ContentFacts,
): Promise<void> {
  const { paths, user, environmentId, signal } = workspace;
  const config = async (...args: string[]) => {
    const env = { HOME: paths.home, BERTH_ENVIRONMENT_ID: environmentId, GIT_CONFIG_NOSYSTEM: "1" };
    const options = { cwd: paths.home, env, user: commandUser(user), timeoutMs: GIT_DEADLINE_MS, signal };
    const { code, stderr } = await runCommand("git", ["config", "--global", ...args], options);
    // 5: the value to remove was not there.
    if (code !== 0 && code !== 5) throw new ContentError(`git config failed: ${stderr.trim().slice(0, 300)}`);
  };
  const set = async (name: string, values: readonly string[]) => {
    const [first, ...rest] = values;
    if (!first) return await config("--unset-all", "--", name);
    await config("--replace-all", "--", name, first);
    for (const value of rest) await config("--add", "--", name, value);
  };
  await set("user.name", [gitUsername]);
  await set("user.email", [gitEmail]);
  await set(
    "safe.directory",
    checkouts.map(({ location }) => join(paths.workspace, location)),
  );
}

/** Git status of the primary checkout; undefined without one. */
export async function contentGitStatus(
  environmentId: string,
  paths: EnvironmentPaths,
  user: UnixUser,
  { folder, checkouts }: ContentFacts,
): Promise<EnvironmentGitStatus | undefined> {
  if (checkouts.length === 0) return undefined;
  const env = { HOME: paths.home, USER: user.name, PATH: commandPath(), BERTH_ENVIRONMENT_ID: environmentId };
  return await gitStatus({ directory: folder, env, ...commandUser(user) }).catch(() => undefined);
}
