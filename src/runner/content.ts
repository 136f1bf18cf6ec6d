import { createHash } from "node:crypto";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import type {
  EnvironmentGitStatus,
  EnvironmentInitializer,
  EnvironmentSpec_Content,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { AdmittedUrl } from "../scm/guard.ts";
import { isFullCommit } from "../scm/refs.ts";
import { type ClonePlan, type CloneTarget, planClones, type ResolveContext } from "./clone-plan.ts";
import { CommandTimeout, commandPath, runCommand } from "./commands.ts";
import { ContentError, failureText, type GitContext, git, isRedirect, movedTo } from "./git.ts";
import type { Host } from "./host.ts";
import { lineWriter } from "./logs.ts";
import { commandUser } from "./machine.ts";
import type { EnvironmentPaths } from "./paths.ts";
import type { ContentFacts } from "./record.ts";
import { fetchSubmodules } from "./submodules.ts";
import { freshGitStatus, gitStatus } from "./supervisor/git-status.ts";
import { bootId, type ProcessRef } from "./supervisor/processes.ts";
import type { Inhabitant } from "./users.ts";
import {
  CONFIGURE_GIT,
  EVERYTHING,
  gitConfiguration,
  HAS_SUBMODULES,
  IN_THE_WAY,
  LOOK_AFTERWARDS,
  PLACE,
  PREPARE,
} from "./workspace-scripts.ts";

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
  user: Inhabitant;
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
  /** Address of the primary checkout if nothing in it can be unknown to that remote; undefined if it is to be looked at. */
  pristine: string | undefined;
}

/** A repository that was cloned. */
interface Cloned {
  plan: ClonePlan;
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

function failed(what: string, stderr: string): ContentError {
  const full = /No space left on device|Disk quota exceeded/i.test(stderr);
  return new ContentError(full ? "disk full" : `${what} failed: ${stderr.trim().slice(0, 300)}`);
}

async function change(workspace: Workspace, file: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await asUser(workspace, file, args);
  if (code !== 0) throw failed(file, stderr);
}

async function script(workspace: Workspace, what: string, text: string, args: readonly string[]): Promise<void> {
  const { code, stderr } = await asUser(workspace, "sh", ["-c", text, "sh", ...args]);
  if (code !== 0) throw failed(what, stderr);
}

/** Removes what matches the patterns, then makes folders. */
const prepare = (workspace: Workspace, patterns: readonly string[], folders: readonly string[] = []) =>
  script(workspace, "preparing the workspace", PREPARE, [...patterns, "--", ...folders]);

const isThere = async (workspace: Workspace, path: string) =>
  (await asUser(workspace, "test", ["-e", path, "-o", "-L", path])).code === 0;

/** Top-level names in the workspace that are not the runner's. */
async function entries(workspace: Workspace): Promise<string[]> {
  const args = ["-P", workspace.paths.workspace, "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\\0"];
  const { stdout } = await asUser(workspace, "find", args);
  return stdout.split("\0").filter((name) => name !== "" && !RESERVED.test(name));
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

/**
 * Runs git with its progress in the log, and tells whether the checkout has submodules then; throws the short text for
 * people if it fails.
 */
async function gitStep(
  workspace: Workspace,
  context: GitContext,
  plan: ClonePlan,
  args: readonly string[],
): Promise<boolean> {
  const lines = lineWriter(workspace.write);
  const { code, stdout, stderr } = await git({ ...context, onOutput: lines.push }, args, LOOK_AFTERWARDS, context.cwd);
  lines.end();
  if (code !== 0) throw new ContentError(failureText(stderr, plan.admitted));
  return stdout.includes(HAS_SUBMODULES);
}

/**
 * Fetches a repository, and checks it out if its own HEAD is wanted; a host that has moved it on itself is followed.
 * Answers where it lay, and whether submodules are to be fetched.
 */
async function fetchRepository(
  workspace: Workspace,
  plan: ClonePlan,
  folder: string,
  deadline: number,
  facts: ContentFacts,
): Promise<{ plan: ClonePlan; hasSubmodules: boolean }> {
  const options = ["--template=", "--origin", "origin", "--progress"];
  if (plan.target.mode !== "head") options.push("--no-checkout");
  const onStart = (process: ProcessRef) => workspace.save({ ...facts, process: { ...process, bootId: bootId() } });
  let present = plan;
  for (let redirects = 0; ; redirects++) {
    const lines = lineWriter(workspace.write);
    const context = gitContext(workspace, workspace.paths.workspace, present, deadline);
    const args = ["clone", ...options, "--", present.url, folder];
    const { code, stdout, stderr } = await git(
      { ...context, onOutput: lines.push, onStart },
      args,
      LOOK_AFTERWARDS,
      folder,
    );
    lines.end();
    if (code === 0) return { plan: present, hasSubmodules: stdout.includes(HAS_SUBMODULES) };
    const moved =
      isRedirect(stderr) && redirects < MAX_REDIRECTS && (await movedTo(present.admitted, workspace.signal));
    if (!moved) throw new ContentError(failureText(stderr, present.admitted));
    workspace.write(`The repository lies at ${moved.href}`);
    present = { ...present, url: moved.href, admitted: { ...present.admitted, url: moved } };
  }
}

const hasCommit = async (context: GitContext, name: string) =>
  (await git(context, ["rev-parse", "--verify", "--quiet", "--end-of-options", `${name}^{commit}`])).code === 0;

/** Checks out what is wanted, if it is not the remote's own HEAD; tells whether the checkout has submodules. */
async function checkOut(
  workspace: Workspace,
  context: GitContext,
  plan: ClonePlan,
  target: Exclude<CloneTarget, { mode: "head" }>,
): Promise<boolean> {
  const run = (...args: string[]) => gitStep(workspace, context, plan, args);
  const missing = () => new ContentError(`ref not found: ${target.name}`);
  /** Most are there, so that is only looked into when the checkout fails. */
  const runOn = async (ref: string, ...args: string[]) => {
    try {
      return await run(...args);
    } catch (error) {
      throw error instanceof ContentError && !(await hasCommit(context, ref)) ? missing() : error;
    }
  };
  switch (target.mode) {
    case "branch": {
      const remote = `refs/remotes/origin/${target.name}`;
      return await runOn(remote, "checkout", "--force", "-B", target.name, "--track", remote);
    }
    case "new_branch":
      if (await hasCommit(context, "HEAD")) {
        return await run("checkout", "--force", "--no-track", "-B", target.name, "HEAD");
      }
      return await run("symbolic-ref", "HEAD", `refs/heads/${target.name}`);
    case "tag": {
      const tag = `refs/tags/${target.name}`;
      return await runOn(tag, "checkout", "--force", "--detach", tag);
    }
    case "commit":
      if (!(await hasCommit(context, target.name)) && isFullCommit(target.name)) {
        const { code } = await git(context, ["fetch", "--no-tags", "origin", target.name]);
        if (code !== 0) throw missing();
      }
      return await runOn(target.name, "checkout", "--force", "--detach", target.name);
  }
}

/** Clones one repository into a folder that git makes, with warnings about submodules that cannot be had. */
async function clone(
  workspace: Workspace,
  wanted: ClonePlan,
  folder: string,
  deadline: number,
  facts: ContentFacts,
): Promise<Cloned> {
  workspace.write(`Cloning ${wanted.admitted.url.href}`);
  const { plan, ...fetched } = await fetchRepository(workspace, wanted, folder, deadline, facts);
  const context = gitContext(workspace, folder, plan, deadline);
  const { target } = plan;
  const hasSubmodules =
    target.mode === "head" ? fetched.hasSubmodules : await checkOut(workspace, context, plan, target);
  if (plan.upstream) await gitStep(workspace, context, plan, ["remote", "add", "--", "upstream", plan.upstream]);
  if (!hasSubmodules) return { plan, warnings: [] };
  const contextFor = (at: string, pinned: readonly AdmittedUrl[]) => ({
    ...gitContext(workspace, at, plan, deadline),
    pinned,
  });
  const { host, write, signal } = workspace;
  const options = { guard: host.guard, contextFor, write, signal };
  return { plan, warnings: await fetchSubmodules(options, folder, plan.url) };
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

/** Moves what was made ready to its place, what is in the way to the backup; can be repeated after a crash. */
async function place(
  workspace: Workspace,
  ready: string,
  backup: string,
  old: readonly string[],
  fresh: readonly string[],
): Promise<void> {
  const below = (names: readonly string[]) => names.map((name) => `./${name}`);
  // Outer folders first: they carry what was cloned inside them.
  const names = [...below(old.filter((each) => !fresh.includes(each))), "--", ...below([...fresh].sort())];
  const { code, stdout, stderr } = await asUser(workspace, "sh", ["-c", PLACE, "sh", ready, backup, ...names]);
  if (code === IN_THE_WAY) throw new ContentError(`${stdout.slice(2)} is in the way and could not be set aside`);
  if (code !== 0) throw failed("putting the content in place", stderr);
}

/** Every commit that a tag or an id names may be on no branch of the remote, and then counts as one not pushed. */
function pristineUrl(primary: Cloned | undefined): string | undefined {
  const isOnBranch = primary && primary.plan.target.mode !== "tag" && primary.plan.target.mode !== "commit";
  return isOnBranch ? primary.plan.url : undefined;
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
  const partial = join(paths.workspace, `.partial-${label(session)}`);
  const ready = join(paths.workspace, `.berth-ready-${label(session)}`);
  const backup = join(paths.workspace, `.berth-backup-${label(facts.session)}`);
  const cloned: Cloned[] = [];
  const purpose = { case: "environmentId" as const, value: workspace.environmentId };
  const resolve: ResolveContext = (url, ends) => host.resolveContext(url, purpose, ends);
  const plans = await planClones(host.guard, initializer, resolve, signal);
  const locations = plans.map(({ location }) => location);
  let replacing = facts.replacing?.session === session ? facts.replacing : undefined;

  try {
    if (replacing) await prepare(workspace, [".partial-*"]);
    else {
      const isClean = isFirst && (await readdir(paths.workspace)).length === 0;
      if (!isClean) await prepare(workspace, isFirst ? EVERYTHING : [".partial-*", ".berth-ready-*"], [partial]);
      for (const plan of plans) {
        cloned.push(await clone(workspace, plan, join(partial, plan.location), deadline, facts));
      }
      if (!isFirst) {
        await change(workspace, "mv", "-T", "--", partial, ready);
        const { names, expendable } = await oldFolders(workspace, facts);
        replacing = { session, old: names, keepBackup: !expendable };
        await workspace.save({ ...facts, replacing });
      }
    }
    // The first content needs no mark that it is complete: as long as it is not known to be in place, it is a leftover.
    await place(workspace, isFirst ? partial : ready, backup, replacing?.old ?? [], locations);
  } catch (error) {
    if (!signal.aborted) await prepare(workspace, [".partial-*"]).catch(() => undefined);
    const isLate = error instanceof CommandTimeout && Date.now() >= deadline;
    throw isLate ? new ContentError("content was not ready within 30 minutes") : error;
  }
  const warnings = cloned.flatMap((each) => each.warnings);
  if (replacing?.keepBackup) warnings.push(`the content before was moved to ${backup}`);
  else if (!isFirst) await change(workspace, "rm", "-rf", "--", backup);
  const folder = join(paths.workspace, locations[0] ?? ".");
  const checkouts = locations.map((location) => ({ location }));
  return { facts: { session, checkouts, folder }, warnings, pristine: pristineUrl(cloned[0]) };
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
  const env = { HOME: paths.home, BERTH_ENVIRONMENT_ID: environmentId, GIT_CONFIG_NOSYSTEM: "1" };
  const options = { cwd: paths.home, env, user: commandUser(user), timeoutMs: GIT_DEADLINE_MS, signal };
  const trusted = checkouts.map(({ location }) => join(paths.workspace, location));
  const fresh = gitConfiguration(gitUsername, gitEmail, trusted);
  const args = ["-c", CONFIGURE_GIT, "sh", fresh, gitUsername, gitEmail, ...trusted];
  const { code, stderr } = await runCommand("sh", args, options);
  if (code !== 0) throw failed("git config", stderr);
}

/** Git status of the primary checkout; undefined without one. For one that is pristine less has to be looked at. */
export async function contentGitStatus(
  environmentId: string,
  paths: EnvironmentPaths,
  user: Inhabitant,
  { folder, checkouts }: ContentFacts,
  pristine?: string,
): Promise<EnvironmentGitStatus | undefined> {
  if (checkouts.length === 0) return undefined;
  const env = { HOME: paths.home, USER: user.name, PATH: commandPath(), BERTH_ENVIRONMENT_ID: environmentId };
  const options = { directory: folder, env, ...commandUser(user) };
  return await (pristine ? freshGitStatus(options, pristine) : gitStatus(options)).catch(() => undefined);
}
