import {
  GitInitializer_CloneTargetMode as CloneTargetMode,
  type EnvironmentInitializer,
  type EnvironmentInitializer_Spec,
  type GitInitializer,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { FieldProblem } from "../domain/errors.ts";
import { AZURE_HOST, isHostName, normalizeHost } from "./hosts.ts";
import { isCommit, isFullCommit, isSafeRef } from "./refs.ts";
import { parseShape } from "./url-shape.ts";

const MAX_SPECS = 16;
const MAX_URL_LENGTH = 2048;
const MAX_PATH_LENGTH = 512;
const MAX_PART_BYTES = 255;
const FALLBACK_NAME = "repository";
/** Names the runner uses for its own directories beside the checkouts. */
const RESERVED_PART = /^\.(partial|berth)-/;
const SCP_FORM = /^(?<user>[A-Za-z0-9_][\w.+-]*)@(?<host>[A-Za-z0-9][A-Za-z0-9.-]*):(?<path>[^-/:][^:]*|\/[^:]+)$/;
/** Spelled so that every parser finds the same host in it. */
const PLAIN_AUTHORITY = /^[a-z][a-z\d+.-]*:\/\/(?:[^@/?#:]+@)?(?:[a-z\d._-]+|\[[a-f\d:.]+\])(?::\d+)?(?:\/|$)/i;
const TOKEN_AS_USER = /^(gh[pousr]_|github_pat_|glpat-)/;

export interface InitializerRules {
  /** Clone schemes beside https and ssh: `file`, `http`, `git`. */
  schemes: readonly string[];
  /** Proto path of the initializer, such as `spec.content.initializer`. */
  field: string;
  /** Most specs there may be; 16 unless told. */
  maxSpecs?: number;
}

/** What every address has to fulfil, whatever its scheme. */
function textProblem(text: string): string | undefined {
  if (text === "") return "must not be empty";
  if (text.length > MAX_URL_LENGTH) return `must have at most ${MAX_URL_LENGTH} characters`;
  if (!text.isWellFormed() || /[\s\p{Cc}\\]|%[01][0-9a-f]|%7f/iu.test(text)) {
    return "must not contain spaces, control characters or backslashes";
  }
  if (text.startsWith("-")) return "must not begin with a dash";
  if (/^[\w+.-]*::/.test(text)) return "must not name a remote helper";
  return undefined;
}

function userProblem({ username, password }: URL): string | undefined {
  if (password) return "must not contain a password";
  if (TOKEN_AS_USER.test(username)) return "must not contain a token";
  return username === "" || /^[A-Za-z0-9_](?:[\w.+-]|%40)*$/.test(username) ? undefined : "has an unusable user name";
}

function urlProblem(text: string, schemes: readonly string[]): string | undefined {
  const url = URL.parse(text);
  if (!url) return "must be an absolute URL";
  if (!schemes.includes(url.protocol.slice(0, -1))) return `must have one of the schemes ${schemes.join(", ")}`;
  if (url.protocol === "file:") {
    return url.host === "" && url.pathname !== "/" ? undefined : "must be a file URL with a path and without a host";
  }
  const problem = userProblem(url);
  if (problem) return problem;
  if (!PLAIN_AUTHORITY.test(text) || !isHostName(url.hostname.toLowerCase())) return "must name a host";
  return /^\/*$/.test(url.pathname) ? "must name a repository" : undefined;
}

/** What is wrong with an address to clone from: https, ssh, `user@host:path`, or one of `schemes`; undefined if nothing. */
export function remoteUriProblem(text: string, schemes: readonly string[]): string | undefined {
  const problem = textProblem(text);
  if (problem || SCP_FORM.test(text)) return problem;
  return urlProblem(text, ["https", "ssh", ...schemes]);
}

/** What is wrong with a context URL: https, or one of `schemes`; undefined if nothing. */
export function contextUrlProblem(text: string, schemes: readonly string[]): string | undefined {
  return textProblem(text) ?? urlProblem(text, ["https", ...schemes]);
}

function targetProblem({ targetMode, cloneTarget }: GitInitializer): string | undefined {
  switch (targetMode) {
    case CloneTargetMode.REMOTE_HEAD:
      return undefined;
    case CloneTargetMode.REMOTE_COMMIT:
      return isCommit(cloneTarget) || isFullCommit(cloneTarget)
        ? undefined
        : "must be a commit id of at least 7 hex digits";
    case CloneTargetMode.UNSPECIFIED:
      return cloneTarget === "" || isSafeRef(cloneTarget) ? undefined : "must be a valid branch name";
    case CloneTargetMode.REMOTE_BRANCH:
    case CloneTargetMode.LOCAL_BRANCH:
      return isSafeRef(cloneTarget) ? undefined : "must be a valid branch name";
    case CloneTargetMode.REMOTE_TAG:
      return isSafeRef(cloneTarget) ? undefined : "must be a valid tag name";
  }
}

const pathParts = (path: string) => path.split("/").filter((part) => part !== "" && part !== ".");

function locationProblem(path: string): string | undefined {
  const parts = pathParts(path);
  if (path.length > MAX_PATH_LENGTH || parts.some((part) => Buffer.byteLength(part) > MAX_PART_BYTES))
    return "is too long";
  if (!path.isWellFormed() || /[\p{Cc}\\]/u.test(path)) return "must not contain control characters or backslashes";
  if (path.startsWith("/") || parts.length === 0 || parts.includes(".."))
    return "must be a relative path inside the workspace";
  if (path.startsWith("-")) return "must not begin with a dash";
  return parts[0] !== undefined && RESERVED_PART.test(parts[0]) ? "is a name the runner needs itself" : undefined;
}

const sourceUrl = ({ spec }: EnvironmentInitializer_Spec): string =>
  (spec.case === "git" ? spec.value.remoteUri : spec.value?.url) ?? "";

/** The ssh form of `user@host:path`; other texts as they are. */
function asUrl(text: string): string {
  const { user, host, path } = SCP_FORM.exec(text)?.groups ?? {};
  return user && host && path ? `ssh://${user}@${host}/${path.replace(/^\/+/, "")}` : text;
}

function lastSegment(url: string): string {
  const segment = URL.parse(asUrl(url))?.pathname.split("/").filter(Boolean).at(-1) ?? "";
  try {
    return decodeURIComponent(segment).replace(/\.git$/, "");
  } catch {
    return segment;
  }
}

/**
 * Name of the repository that a clone address, web address or initializer spec means, without `.git`; empty if there
 * is no spec, `repository` where the address gives no usable name.
 */
export function repositoryName(source: string | EnvironmentInitializer_Spec | undefined): string {
  if (source === undefined) return "";
  const isAddress = typeof source === "string";
  const url = isAddress ? source : sourceUrl(source);
  const isClone = !isAddress && source.spec.case === "git";
  let name = lastSegment(url);
  if (!isClone) {
    try {
      const { scmId, splits } = parseShape(url, { schemes: ["file", "git"] });
      // Without asking the server, a page of a Gitea-style address is likelier than a repository of that path.
      name = (scmId === "git" ? splits.at(-1) : splits[0])?.repo ?? name;
    } catch {
      // Whoever resolves the address reports what is wrong with it.
    }
  }
  return locationProblem(name) === undefined && !name.includes("/") ? name : FALLBACK_NAME;
}

/** Where a spec is checked out, relative to the workspace: normalised, without `.` parts and slashes at the ends. */
export function checkoutLocation(spec: EnvironmentInitializer_Spec): string {
  const given = spec.spec.case === "git" ? pathParts(spec.spec.value.checkoutLocation).join("/") : "";
  return given || repositoryName(spec);
}

/**
 * Hosts that the specs of an initializer are fetched from over HTTP, one list for each spec: normalised, what is more
 * exact first. Whoever goes by ssh needs no token of the host.
 */
export function initializerHosts(initializer: EnvironmentInitializer | undefined): string[][] {
  return (initializer?.specs ?? []).flatMap((spec) => {
    const url = URL.parse(sourceUrl(spec));
    const host = url && /^https?:$/.test(url.protocol) ? normalizeHost(url.host)?.host : undefined;
    if (!url || !host) return [];
    const [organization = ""] = url.pathname.toLowerCase().split("/").filter(Boolean);
    return [host === AZURE_HOST && organization ? [`${host}/${organization}`, host] : [host]];
  });
}

function gitProblems(git: GitInitializer, field: string, schemes: readonly string[]): FieldProblem[] {
  const found: [string, string | undefined][] = [
    ["remote_uri", remoteUriProblem(git.remoteUri, schemes)],
    ["upstream_remote_uri", git.upstreamRemoteUri ? remoteUriProblem(git.upstreamRemoteUri, schemes) : undefined],
    ["clone_target", targetProblem(git)],
    ["checkout_location", git.checkoutLocation ? locationProblem(git.checkoutLocation) : undefined],
  ];
  if (CloneTargetMode[git.targetMode] === undefined) found.push(["target_mode", "is not a known mode"]);
  return found.flatMap(([name, message]) => (message ? [{ field: `${field}.${name}`, message }] : []));
}

function specProblems(
  { spec }: EnvironmentInitializer_Spec,
  field: string,
  schemes: readonly string[],
): FieldProblem[] {
  if (spec.case === "git") return gitProblems(spec.value, `${field}.git`, schemes);
  if (spec.case === undefined) return [{ field, message: "must have git or context_url" }];
  const message = contextUrlProblem(spec.value.url, schemes);
  return message ? [{ field: `${field}.context_url.url`, message }] : [];
}

/** Everything that is wrong with an initializer; none at all is fine and means an empty workspace. */
export function initializerProblems(
  initializer: EnvironmentInitializer | undefined,
  { schemes, field, maxSpecs = MAX_SPECS }: InitializerRules,
): FieldProblem[] {
  const specs = initializer?.specs ?? [];
  if (specs.length > maxSpecs) return [{ field: `${field}.specs`, message: `must have at most ${maxSpecs} entries` }];
  const problems = specs.flatMap((spec, index) => specProblems(spec, `${field}.specs[${index}]`, schemes));
  if (problems.length > 0) return problems;
  const locations = specs.map(checkoutLocation);
  return locations.flatMap((location, index) => {
    if (locations.indexOf(location) === index) return [];
    const kind = specs[index]?.spec.case === "git" ? "git.checkout_location" : "context_url.url";
    return [
      { field: `${field}.specs[${index}].${kind}`, message: `${location} is the checkout of another spec already` },
    ];
  });
}

/**
 * The one spelling that all addresses of a repository share, as far as the addresses tell; undefined if it names none.
 * Scheme, user, port of the scheme and `.git` do not matter; letter case does only on plain git servers.
 */
export function repositoryKey(text: string): string | undefined {
  const url = URL.parse(asUrl(text));
  if (!url) return undefined;
  const isDefaultPort = url.port === "" || (url.protocol === "ssh:" && url.port === "22");
  const host = `${url.hostname.toLowerCase()}${isDefaultPort ? "" : `:${url.port}`}`;
  try {
    const shape = parseShape(asUrl(text));
    const [{ owner, repo }] = shape.splits;
    if (shape.scmId !== "git") return `${shape.host}/${owner}/${repo}`.toLowerCase();
  } catch {
    // Not a form that products have; compared as it stands.
  }
  const path = url.pathname
    .split("/")
    .filter(Boolean)
    .join("/")
    .replace(/\.git$/, "");
  return path === "" ? undefined : `${host}/${path}`;
}

/** Whether two clone addresses mean the same repository, as far as the addresses tell. */
export function sameRepository(first: string, second: string): boolean {
  const key = repositoryKey(first);
  return key !== undefined && key === repositoryKey(second);
}

/** Addresses of all repositories that an initializer names, as given; `upstreams` adds those that forks come from. */
export function repositoryAddresses(initializer: EnvironmentInitializer | undefined, upstreams = false): string[] {
  return (initializer?.specs ?? []).flatMap((each) => {
    const upstream = upstreams && each.spec.case === "git" ? each.spec.value.upstreamRemoteUri : "";
    return [sourceUrl(each), upstream].filter(Boolean);
  });
}
