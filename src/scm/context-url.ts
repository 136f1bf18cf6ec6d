import { create } from "@bufbuild/protobuf";
import { PullRequest_RepositorySchema, PullRequestSchema } from "../../gen/gitpod/v1/agent_pb.js";
import { type ParseContextURLResponse, ParseContextURLResponseSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { ScmError } from "./errors.ts";
import { findCommit, lsRemote, type RemoteOptions, type RemoteRefs, unbornHead } from "./git.ts";
import type { Guard } from "./guard.ts";
import type { GitCredentials, HostIntegration, ScmId } from "./hosts.ts";
import { isCommit } from "./refs.ts";
import { parseShape, type UrlShape, type UrlSplit, type UrlTarget } from "./url-shape.ts";

const BUDGET_MS = 20_000;
const HEADS = "refs/heads/";
const TAGS = "refs/tags/";

export interface ContextUrlDeps {
  guard: Guard;
  /** Effective integrations of whoever asks. */
  integrations?: readonly HostIntegration[];
  /** The caller's newest usable token for a host, undefined for none. Called at most once, before the host is contacted. */
  credentials?(host: string, scmId: ScmId, signal: AbortSignal): Promise<GitCredentials | undefined>;
  /** Address of this installation; `<publicUrl>/#` in front of the URL is removed. */
  publicUrl?: string;
  signal?: AbortSignal;
}

/** Revision to check out; at most one of `tag` and `commit` is set, and then `branch` is empty. */
interface Revision {
  branch: string;
  tag: string;
  /** 40 hex digits. */
  commit: string;
}

/** What an address stands for. */
export interface ResolvedContext extends Revision {
  originalContextUrl: string;
  scmId: ScmId;
  host: string;
  owner: string;
  repo: string;
  cloneUrl: string;
  /** Clone address of the repository this one was forked from; empty when it is no fork or the host does not tell. */
  upstreamRemoteUrl: string;
  issue?: { id: string; title: string };
  pullRequest?: { id: string };
}

const revision = (part: Partial<Revision>): Revision => ({ branch: "", tag: "", commit: "", ...part });
const noSuch = (what: string) => new ScmError("not_found", `${what} not found in the repository`);
const pullRequestRef = (number: string) => `refs/pull/${number}/head`;

/** Hosts that number issues and pull requests together and show either at the address of an issue. */
const sharesNumbers = (scmId: ScmId) => scmId === "github" || scmId === "git";

function neededRefs(target: UrlTarget, scmId: ScmId): string[] {
  switch (target.kind) {
    case "default":
      return ["HEAD"];
    case "ref":
      return target.only ? [target.only === "branch" ? HEADS : TAGS] : [HEADS, TAGS];
    case "commit":
      return [HEADS, TAGS];
    case "pull_request":
      return ["HEAD", pullRequestRef(target.number)];
    case "issue":
      return sharesNumbers(scmId) ? ["HEAD", pullRequestRef(target.number)] : ["HEAD"];
  }
}

/** The host does not show the repository here, so it may still be one of the other splits. */
const isAbsence = (error: unknown): error is ScmError =>
  error instanceof ScmError &&
  (error.kind === "not_found" || error.kind === "auth_required" || error.kind === "forbidden");

const WEIGHT: Partial<Record<ScmError["kind"], number>> = { auth_required: 2, forbidden: 1 };
const weightier = (first: ScmError | undefined, second: ScmError) =>
  first && (WEIGHT[first.kind] ?? 0) >= (WEIGHT[second.kind] ?? 0) ? first : second;

interface Opened {
  split: UrlSplit;
  remote: RemoteRefs;
}

/** The first split that is a repository, with the refs its target needs. */
async function openRepository({ splits, scmId }: UrlShape, options: RemoteOptions): Promise<Opened> {
  let failure: ScmError | undefined;
  let closed: UrlSplit | undefined;
  for (const split of splits) {
    // Whoever wants a sign-in for a name wants it for the same name without `.git` too.
    if (closed && closed.owner === split.owner && closed.repo === split.repo) continue;
    try {
      const remote = await lsRemote(split.cloneUrl, { ...options, refPrefixes: neededRefs(split.target, scmId) });
      return { split, remote };
    } catch (error) {
      if (!isAbsence(error)) throw error;
      if (error.kind !== "not_found") closed = split;
      failure = weightier(failure, error);
    }
  }
  throw failure ?? noSuch("repository");
}

async function defaultBranch({ split, remote }: Opened, options: RemoteOptions): Promise<string> {
  if (remote.headBranch !== undefined) return remote.headBranch;
  const head = remote.refs.get("HEAD");
  if (head === undefined) return (await unbornHead(split.cloneUrl, options)) ?? "";
  // Detached, or a server that does not name the branch: guess as git does.
  const { refs } = await lsRemote(split.cloneUrl, { ...options, refPrefixes: [HEADS] });
  const names = [...refs].flatMap(([name, id]) => (id === head ? [name.slice(HEADS.length)] : []));
  return names.find((name) => name === "main") ?? names.find((name) => name === "master") ?? names[0] ?? "";
}

async function fullCommit({ split, remote }: Opened, sha: string, options: RemoteOptions): Promise<string> {
  if (!isCommit(sha)) throw noSuch("commit");
  const wanted = sha.toLowerCase();
  const tips = new Set([...remote.refs.values()].filter((id) => id.startsWith(wanted)));
  const [tip] = tips;
  if (tip !== undefined && tips.size === 1) return tip;
  const commit = await findCommit(split.cloneUrl, wanted, options);
  if (commit === undefined) throw noSuch("commit");
  return commit;
}

/** Longest part of the path that is a branch or tag; a branch wins over a tag of that name. */
function knownRef({ refs }: RemoteRefs, path: readonly string[], exact: boolean): Revision | undefined {
  for (let length = path.length; length >= (exact ? path.length : 1); length--) {
    const name = path.slice(0, length).join("/");
    if (refs.has(HEADS + name)) return revision({ branch: name });
    if (refs.has(TAGS + name)) return revision({ tag: name });
  }
  return undefined;
}

async function refRevision(
  opened: Opened,
  target: UrlTarget & { kind: "ref" },
  options: RemoteOptions,
): Promise<Revision> {
  const known = knownRef(opened.remote, target.path, target.exact ?? false);
  if (known) return known;
  const [first = ""] = target.path;
  if (target.only || !isCommit(first)) throw noSuch(target.only ?? "branch or tag");
  return revision({ commit: await fullCommit(opened, first, options) });
}

type Findings = Revision & Pick<ResolvedContext, "issue" | "pullRequest">;

/** The git server alone tells no more of a pull request than its head commit. */
function pullRequest({ remote }: Opened, number: string, scmId: ScmId): Findings {
  if (scmId !== "git") throw new ScmError("unsupported", "missing capability: pull requests of this host");
  const commit = remote.refs.get(pullRequestRef(number));
  if (commit === undefined) throw noSuch("pull request");
  return { ...revision({ commit }), pullRequest: { id: number } };
}

async function findings(opened: Opened, scmId: ScmId, options: RemoteOptions): Promise<Findings> {
  const { target } = opened.split;
  switch (target.kind) {
    case "default":
      return revision({ branch: await defaultBranch(opened, options) });
    case "ref":
      return refRevision(opened, target, options);
    case "commit":
      return revision({ commit: await fullCommit(opened, target.sha, options) });
    case "pull_request":
      return pullRequest(opened, target.number, scmId);
    case "issue": {
      if (opened.remote.refs.has(pullRequestRef(target.number))) return pullRequest(opened, target.number, scmId);
      const branch = await defaultBranch(opened, options);
      return { ...revision({ branch }), issue: { id: target.number, title: "" } };
    }
  }
}

/**
 * Finds out what an address stands for by asking its git server, within 20 s. Reads with the caller's token if there
 * is one and the host asks for it, else anonymously. Throws ScmError.
 */
export async function resolveContextUrl(text: string, deps: ContextUrlDeps): Promise<ResolvedContext> {
  const { guard, integrations, publicUrl } = deps;
  const shape = parseShape(text, { integrations, publicUrl, schemes: guard.schemes });
  const { scmId, host, vouched } = shape;
  const signal = AbortSignal.any([AbortSignal.timeout(BUDGET_MS), ...(deps.signal ? [deps.signal] : [])]);
  const credentials = await deps.credentials?.(host, scmId, signal);
  const options: RemoteOptions = { guard, vouched, signal, ...(credentials && { credentials }) };
  const opened = await openRepository(shape, options);
  const { owner, repo, cloneUrl } = opened.split;
  const found = await findings(opened, scmId, options);
  return { originalContextUrl: text, scmId, host, owner, repo, cloneUrl, upstreamRemoteUrl: "", ...found };
}

/** The answer to ParseContextURL, without what only the control plane knows: projects and classes. */
export async function parseContextUrl(text: string, deps: ContextUrlDeps): Promise<ParseContextURLResponse> {
  const { pullRequest, issue, ...context } = await resolveContextUrl(text, deps);
  const { cloneUrl, host, owner, repo } = context;
  const repository = create(PullRequest_RepositorySchema, { cloneUrl, host, owner, name: repo });
  return create(ParseContextURLResponseSchema, {
    originalContextUrl: text,
    scmId: context.scmId,
    git: {
      cloneUrl,
      host,
      owner,
      repo,
      branch: context.branch,
      tag: context.tag,
      commit: context.commit,
      upstreamRemoteUrl: context.upstreamRemoteUrl,
    },
    ...(issue && { issue }),
    ...(pullRequest && {
      pr: { id: pullRequest.id },
      pullRequest: create(PullRequestSchema, { id: pullRequest.id, repository }),
    }),
  });
}
