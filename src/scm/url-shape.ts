import { ScmError } from "./errors.ts";
import {
  AZURE_HOST,
  findIntegration,
  type HostIntegration,
  isHostName,
  type ScmId,
  scmIdOf,
  visualStudioOrganization,
} from "./hosts.ts";
import { isCommit } from "./refs.ts";

const MAX_URL_LENGTH = 2048;
const MAX_NAME_LENGTH = 255;

/** What the part of an address after the repository asks for. */
export type UrlTarget =
  | { kind: "default" }
  /** A ref, then possibly a file path unless `exact`; `only` rules the other kind and commits out. */
  | { kind: "ref"; path: readonly string[]; only?: "branch" | "tag"; exact?: boolean }
  | { kind: "commit"; sha: string }
  | { kind: "pull_request"; number: string }
  | { kind: "issue"; number: string };

/** One way to cut an address into repository and rest. */
export interface UrlSplit {
  owner: string;
  repo: string;
  cloneUrl: string;
  target: UrlTarget;
}

export interface UrlShape {
  scmId: ScmId;
  /** Lower case, with the port unless it is the default; empty for `file`. */
  host: string;
  /** The host belongs to an integration. */
  vouched: boolean;
  /** The repository is the first of these that exists. */
  splits: readonly [UrlSplit, ...UrlSplit[]];
}

export interface ShapeOptions {
  integrations?: readonly HostIntegration[];
  /** Address of this installation; `<publicUrl>/#` in front is removed. */
  publicUrl?: string;
  /** Clone schemes allowed beside https, http and ssh: `file`, `git`. */
  schemes?: readonly string[];
}

interface Place {
  /** Scheme and host of clone addresses. */
  origin: string;
  /** Decoded, without empty ones. */
  segments: readonly string[];
  query: URLSearchParams;
  /** Azure DevOps Server only, without slashes at its ends. */
  virtualDirectory: string;
}

const DEFAULT: UrlTarget = { kind: "default" };
const invalidUrl = (message: string) => new ScmError("invalid_url", message);
const isNumber = (text: string | undefined) => text !== undefined && /^[1-9]\d{0,9}$/.test(text);
const withoutDotGit = (name: string) => name.replace(/\.git$/, "");

/** A segment as it stands in an address: like encodeURIComponent, but marks that are plain in paths stay readable. */
const encoded = (segment: string) =>
  encodeURIComponent(segment).replace(/%(40|3A|2B|2C|24|26|3B|3D)/g, decodeURIComponent);

function decoded(segment: string): string {
  let text: string;
  try {
    text = decodeURIComponent(segment);
  } catch {
    throw invalidUrl("the address has a malformed percent sign");
  }
  if (/\p{Cc}/u.test(text)) throw invalidUrl("the address has control characters");
  return text;
}

const isName = (name: string) => name !== "" && name.length <= MAX_NAME_LENGTH && !/^\.\.?$|[/\\]/.test(name);

/** The split whose repository lies at `path`; throws `invalid_url` where there can be none. */
function splitAt(place: Place, path: readonly string[], target: UrlTarget, suffix = ".git"): UrlSplit {
  const owners = path.slice(0, -1);
  const repo = withoutDotGit(path.at(-1) ?? "");
  if (![...owners, repo].every(isName)) throw invalidUrl("the address names no repository");
  const cloneUrl = `${place.origin}/${[...owners, repo].map(encoded).join("/")}${suffix}`;
  return { owner: owners.join("/"), repo, cloneUrl, target };
}

function ref(segments: readonly string[], more: { only?: "branch" | "tag"; exact?: boolean } = {}): UrlTarget {
  // A slash inside a ref may come encoded.
  const path = segments.flatMap((segment) => segment.split("/")).filter(Boolean);
  const [first, second, ...rest] = path;
  if (first === undefined) return DEFAULT;
  // Addresses of raw files spell the full name of the ref.
  if (first === "refs" && second === "heads" && rest.length > 0)
    return { kind: "ref", path: rest, ...more, only: "branch" };
  if (first === "refs" && second === "tags" && rest.length > 0)
    return { kind: "ref", path: rest, ...more, only: "tag" };
  return { kind: "ref", path, ...more };
}

const branch = (path: readonly string[]) => ref(path, { only: "branch", exact: true });
const tag = (path: readonly string[]) => ref(path, { only: "tag", exact: true });
const commit = (sha: string | undefined): UrlTarget => (sha === undefined ? DEFAULT : { kind: "commit", sha });

const numbered = (kind: "pull_request" | "issue", number: string | undefined): UrlTarget =>
  number !== undefined && isNumber(number) ? { kind, number } : DEFAULT;

function githubTarget(page: string | undefined, rest: readonly string[]): UrlTarget {
  switch (page) {
    case "tree":
    case "blob":
    case "blame":
    case "raw":
    case "edit":
    case "commits":
      return ref(rest);
    case "commit":
      return commit(rest[0]);
    case "releases":
      return rest[0] === "tag" ? tag(rest.slice(1)) : DEFAULT;
    case "pull":
      return numbered("pull_request", rest[0]);
    case "issues":
      return numbered("issue", rest[0]);
    default:
      return DEFAULT;
  }
}

function githubSplits(place: Place): UrlSplit[] {
  const [owner = "", repo = "", page, ...rest] = place.segments;
  return [splitAt(place, [owner, repo], githubTarget(page, rest))];
}

const GITLAB_PAGES = new Set([
  ...["tree", "blob", "raw", "blame", "commits", "commit", "tags", "releases"],
  ...["merge_requests", "issues", "work_items", "wikis", "pipelines", "settings"],
]);

function gitlabTarget([page, ...rest]: readonly string[], query: URLSearchParams): UrlTarget {
  const refType = query.get("ref_type");
  const only = refType === "heads" ? "branch" : refType === "tags" ? "tag" : undefined;
  switch (page) {
    case "tree":
    case "blob":
    case "raw":
    case "blame":
    case "commits":
      return ref(rest, only && { only });
    case "commit":
      return commit(rest[0]);
    case "tags":
    case "releases":
      return tag(rest);
    case "merge_requests":
      return numbered("pull_request", rest[0]);
    case "issues":
    case "work_items":
      return numbered("issue", rest[0]);
    default:
      return DEFAULT;
  }
}

function gitlabSplits(place: Place): UrlSplit[] {
  const { segments, query } = place;
  const at = (index: number, pages: readonly string[]) =>
    splitAt(place, segments.slice(0, index), gitlabTarget(pages, query));
  if (segments.length < 2) throw invalidUrl("the address names no repository");
  const dash = segments.indexOf("-", 2);
  if (dash > 0) return [at(dash, segments.slice(dash + 1))];
  const whole = at(segments.length, []);
  if (segments.at(-1)?.endsWith(".git")) return [whole];
  // Before pages stood behind a dash, the name of the page was all there is to tell it from a group.
  const cuts = segments.flatMap((segment, index) => (index >= 2 && GITLAB_PAGES.has(segment) ? [index] : []));
  return [...cuts.slice(0, 3).map((cut) => at(cut, segments.slice(cut))), whole];
}

function bitbucketTarget(page: string | undefined, rest: readonly string[], query: URLSearchParams): UrlTarget {
  const [first] = rest;
  const at = query.get("at");
  switch (page) {
    case "branch":
      return branch(rest);
    case "src":
      return at && first !== undefined && isCommit(first) ? ref([at], { exact: true }) : ref(rest);
    case "commits":
      if (first === "branch") return branch(rest.slice(1));
      if (first === "tag") return tag(rest.slice(1));
      return first !== undefined && isCommit(first) ? commit(first) : ref(rest);
    case "pull-requests":
      return numbered("pull_request", first);
    case "issues":
      return numbered("issue", first);
    default:
      return DEFAULT;
  }
}

function bitbucketSplits(place: Place): UrlSplit[] {
  const [workspace = "", repo = "", page, ...rest] = place.segments;
  return [splitAt(place, [workspace, repo], bitbucketTarget(page, rest, place.query))];
}

function azureTarget([page, first]: readonly string[], query: URLSearchParams): UrlTarget {
  if (page === "commit") return commit(first);
  if (page === "pullrequest") return numbered("pull_request", first);
  const [, kind, name = ""] = /^(GB|GT|GC)(.+)$/.exec(query.get("version") ?? "") ?? [];
  if (kind === "GB") return branch([name]);
  if (kind === "GT") return tag([name]);
  return kind === "GC" ? commit(name) : DEFAULT;
}

/** `{collection}/{project}/_git/{repo}`; without project or without repository they have the same name. */
function azureSplits(place: Place): UrlSplit[] {
  const prefix = place.virtualDirectory.split("/").filter(Boolean);
  const isBelow = prefix.every((name, index) => place.segments[index]?.toLowerCase() === name.toLowerCase());
  const [collection = "", ...segments] = isBelow ? place.segments.slice(prefix.length) : place.segments;
  const marker = segments.indexOf("_git");
  const hasMarker = marker === 0 || marker === 1;
  const named = hasMarker ? segments[marker + 1] : undefined;
  const project = (marker === 0 ? named : segments[0]) ?? "";
  const repo = withoutDotGit(named ?? project);
  if (![collection, project, repo].every(isName)) throw invalidUrl("the address names no repository");
  const base = isBelow && prefix.length > 0 ? `${place.origin}/${prefix.map(encoded).join("/")}` : place.origin;
  const path = [collection, withoutDotGit(project), "_git", repo].map(encoded).join("/");
  return [
    {
      owner: `${collection}/${withoutDotGit(project)}`,
      repo,
      cloneUrl: `${base}/${path}`,
      target: azureTarget(hasMarker ? segments.slice(marker + 2) : [], place.query),
    },
  ];
}

/** Gitea-style pages; undefined for what is no such page. */
function giteaTarget([page, first, ...rest]: readonly string[]): UrlTarget | undefined {
  if (first === undefined) return undefined;
  if (page === "commit" && isCommit(first)) return commit(first);
  if (page === "pulls" && isNumber(first)) return { kind: "pull_request", number: first };
  if (page === "issues" && isNumber(first)) return { kind: "issue", number: first };
  if (!/^(src|raw|blame|commits)$/.test(page ?? "") || rest.length === 0) return undefined;
  if (first === "branch") return ref(rest, { only: "branch" });
  if (first === "tag") return ref(rest, { only: "tag" });
  return first === "commit" && rest[0] !== undefined && isCommit(rest[0]) ? commit(rest[0]) : undefined;
}

function gitSplits(place: Place): UrlSplit[] {
  const { segments } = place;
  const marked = segments.findIndex((segment) => segment.endsWith(".git") && segment !== ".git");
  if (marked >= 0) {
    return [splitAt(place, segments.slice(0, marked + 1), giteaTarget(segments.slice(marked + 1)) ?? DEFAULT)];
  }
  const page = segments.findIndex((_, index) => index >= 2 && giteaTarget(segments.slice(index)) !== undefined);
  // Some servers know the repository only by the name without `.git`.
  const cut = (path: readonly string[], target: UrlTarget) =>
    [".git", ""].map((suffix) => splitAt(place, path, target, suffix));
  const whole = cut(segments, DEFAULT);
  return page < 0 ? whole : [...whole, ...cut(segments.slice(0, page), giteaTarget(segments.slice(page)) ?? DEFAULT)];
}

const SPLITS: Readonly<Record<ScmId, (place: Place) => UrlSplit[]>> = {
  github: githubSplits,
  gitlab: gitlabSplits,
  bitbucket: bitbucketSplits,
  azuredevops_entra: azureSplits,
  azuredevops_server: azureSplits,
  git: gitSplits,
};

function readUrl(text: string, publicUrl: string | undefined): URL {
  const prefix = publicUrl && `${publicUrl.replace(/\/+$/, "")}/#`;
  const address = prefix && text.startsWith(prefix) ? text.slice(prefix.length) : text;
  if (address.length > MAX_URL_LENGTH) throw invalidUrl(`the address is longer than ${MAX_URL_LENGTH} characters`);
  if (/[\s\p{Cc}\\]/u.test(address)) throw invalidUrl("the address has spaces, control characters or backslashes");
  const url = URL.parse(address);
  if (!url) throw invalidUrl("the address is not a URL");
  if (url.password) throw invalidUrl("the address must not contain a password");
  return url;
}

/** Repositories in schemes that only operators switch on: the whole path, as it is. */
function plainShape(url: URL): UrlShape {
  const segments = url.pathname.split("/").filter(Boolean).map(decoded);
  const { owner, repo } = splitAt(
    { origin: "", segments, query: url.searchParams, virtualDirectory: "" },
    segments,
    DEFAULT,
  );
  const cloneUrl = `${url.protocol}//${url.host}${url.pathname}`;
  return { scmId: "git", host: url.host, vouched: false, splits: [{ owner, repo, cloneUrl, target: DEFAULT }] };
}

/** Host and path in the web form of what was given in an ssh or an older form. */
function canonicalPlace(url: URL): { host: string; path: string[] } {
  const isSsh = url.protocol === "ssh:";
  const hostname = url.hostname.toLowerCase().replace(/\.$/, "");
  if (!isHostName(hostname)) throw invalidUrl("the address names no host");
  const segments = url.pathname.split("/").filter(Boolean).map(decoded);
  if (isSsh && /^(ssh\.dev\.azure|vs-ssh\.visualstudio)\.com$/.test(hostname) && segments[0] === "v3") {
    const [, organization = "", project = "", ...rest] = segments;
    return { host: AZURE_HOST, path: [organization, project, "_git", ...rest] };
  }
  const organization = visualStudioOrganization(hostname);
  if (organization) {
    const isDefault = segments[0]?.toLowerCase() === "defaultcollection";
    return { host: AZURE_HOST, path: [organization, ...segments.slice(isDefault ? 1 : 0)] };
  }
  return { host: isSsh || !url.port ? hostname : `${hostname}:${url.port}`, path: segments };
}

/**
 * Reads an address without contacting anybody: product, host, and the ways to cut the path into repository and
 * revision. Throws ScmError `invalid_url`.
 */
export function parseShape(text: string, { integrations = [], publicUrl, schemes = [] }: ShapeOptions = {}): UrlShape {
  const url = readUrl(text, publicUrl);
  const scheme = url.protocol.slice(0, -1);
  if ((scheme === "file" || scheme === "git") && schemes.includes(scheme)) return plainShape(url);
  if (!/^(https?|ssh)$/.test(scheme)) throw invalidUrl("the scheme of the address is not allowed; use https");
  const { host, path: segments } = canonicalPlace(url);
  const [first = ""] = segments;
  const integration = findIntegration(host, first, integrations);
  const scmId = scmIdOf(host, first, integrations);
  if (scheme === "ssh" && scmId === "git" && !integration) {
    throw invalidUrl("ssh addresses are only understood for known hosts; use https");
  }
  const origin = `${scheme === "http" ? "http" : "https"}://${host}`;
  const virtualDirectory = integration?.virtualDirectory ?? "";
  const [best, ...others] = SPLITS[scmId]({ origin, segments, query: url.searchParams, virtualDirectory });
  if (!best) throw invalidUrl("the address names no repository");
  return { scmId, host, vouched: integration !== undefined, splits: [best, ...others] };
}
