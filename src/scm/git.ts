import { execFile, spawn } from "node:child_process";
import { mkdtemp, realpath, rm } from "node:fs/promises";
import { request as httpRequest } from "node:http";
import { request as httpsRequest } from "node:https";
import { isIP, isIPv6, type LookupFunction } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import type { Writable } from "node:stream";
import { promisify } from "node:util";
import { ScmError } from "./errors.ts";
import type { AdmittedUrl, Guard } from "./guard.ts";
import type { GitCredentials } from "./hosts.ts";
import { isCommit, isFullCommit, isSafeRef } from "./refs.ts";

const GIT_MS = 15_000;
const KILL_MS = 2_000;
const MAX_BYTES = 32 * 1024 * 1024;
const MAX_ERROR_OUTPUT = 64 * 1024;
const MAX_MEMORY_KIB = 4 * 1024 * 1024;
const MAX_REDIRECTS = 3;
const INFO_REFS = "/info/refs";
const UNKNOWN_BRANCH = "berth/not-advertised";

/** Prefixes that the host itself can filter by. */
const HOST_FILTERS: Readonly<Record<string, string>> = { "refs/heads/": "--heads", "refs/tags/": "--tags" };

export interface RemoteOptions {
  guard: Guard;
  /** Offered when the host asks for them, and to no other host. */
  credentials?: GitCredentials;
  /** The host belongs to an integration, see `Guard.admit`. */
  vouched?: boolean;
  signal?: AbortSignal;
  /** Most that may be read from git, and most that a fetched file may hold; 32 MiB unless told. */
  maxBytes?: number;
}

/** What a repository advertises. Names that git would not accept are left out. */
export interface RemoteRefs {
  /** Branch that HEAD names; undefined when HEAD is detached, unborn or was not asked for. */
  headBranch: string | undefined;
  /** Full ref name (and `HEAD`) to object id; tags are peeled. */
  refs: ReadonlyMap<string, string>;
}

interface GitResult {
  code: number | null;
  stdout: string;
  stderr: string;
}

interface GitRun {
  /** Private empty directory: HOME and working directory. */
  scratch: string;
  target: AdmittedUrl;
  credentials: GitCredentials | undefined;
  deadline: AbortSignal;
  maxBytes: number;
}

/** The host answered git with a redirect, which git was told not to follow. */
const REDIRECTED = new Error("redirected");
const isRedirect = (status: number) => status >= 300 && status <= 399;

const cancelled = () => new ScmError("timeout", "the request was cancelled or ran out of time");
const repositoryMissing = () => new ScmError("not_found", "repository not found or not accessible");

let gitVersion: Promise<void> | undefined;

/** Refuses versions that would ignore the settings below, above all the pinning of addresses (2.37). */
function requireGit(): Promise<void> {
  gitVersion ??= promisify(execFile)("git", ["--version"], { timeout: GIT_MS }).then(
    ({ stdout }) => {
      const [, major = 0, minor = 0] = /(\d+)\.(\d+)/.exec(stdout)?.map(Number) ?? [];
      if (major * 1000 + minor < 2037)
        throw new ScmError("unsupported", "missing capability: git 2.37 or newer is needed");
    },
    () => {
      gitVersion = undefined;
      throw new ScmError("unsupported", "missing capability: git is not installed");
    },
  );
  return gitVersion;
}

const bracketed = (address: string) => (isIPv6(address) ? `[${address}]` : address);

/** Configuration of every git process; nothing else is read, neither of the machine nor of a user. */
function gitSettings({ target, credentials }: GitRun): [string, string][] {
  const { url, host, port, addresses } = target;
  const helper = '!answer() { test "$1" = get && cat <&3; }; answer';
  return [
    ["core.askPass", ""],
    ["core.hooksPath", "/dev/null"],
    ["credential.helper", ""],
    ...(credentials ? [[`credential.${url.protocol}//${url.host}.helper`, helper] satisfies [string, string]] : []),
    ["fetch.unpackLimit", "1"],
    ["gc.auto", "0"],
    ["http.followRedirects", "false"],
    ["http.lowSpeedLimit", "1"],
    ["http.lowSpeedTime", "15"],
    ["http.proxy", ""],
    ...(host && !isIP(host)
      ? [["http.curloptResolve", `${host}:${port}:${addresses.map(bracketed).join(",")}`] satisfies [string, string]]
      : []),
    ["init.defaultBranch", UNKNOWN_BRANCH],
    ["maintenance.auto", "false"],
    ["submodule.recurse", "false"],
    ["transfer.bundleURI", "false"],
  ];
}

const variables = (...names: string[]): Record<string, string> =>
  Object.fromEntries(names.flatMap((name) => (process.env[name] ? [[name, process.env[name]]] : [])));

/** Variables that name the operator's certificate authorities to git alone; hosts inside a company often need them. */
export const gitAuthorities = () => variables("GIT_SSL_CAINFO", "GIT_SSL_CAPATH");

/** As `gitAuthorities`, with those of its libraries. */
export const authorities = () => ({ ...variables("SSL_CERT_FILE", "SSL_CERT_DIR"), ...gitAuthorities() });

function gitEnvironment(run: GitRun): NodeJS.ProcessEnv {
  const settings = gitSettings(run);
  return {
    PATH: process.env.PATH,
    ...authorities(),
    HOME: run.scratch,
    XDG_CONFIG_HOME: run.scratch,
    LC_ALL: "C",
    GIT_ALLOW_PROTOCOL: run.target.url.protocol.slice(0, -1),
    GIT_CEILING_DIRECTORIES: dirname(run.scratch),
    GIT_CONFIG_GLOBAL: "/dev/null",
    GIT_CONFIG_NOSYSTEM: "1",
    GIT_TERMINAL_PROMPT: "0",
    GIT_CONFIG_COUNT: String(settings.length),
    ...Object.fromEntries(settings.map(([key], index) => [`GIT_CONFIG_KEY_${index}`, key])),
    ...Object.fromEntries(settings.map(([, value], index) => [`GIT_CONFIG_VALUE_${index}`, value])),
  };
}

function giveCredentials(pipe: Writable, { username, password }: GitCredentials): void {
  // A process that ends without asking closes the pipe.
  pipe.on("error", () => {});
  pipe.end(`username=${username}\npassword=${password}\n`);
}

/**
 * Runs git in its own process group, which is killed when time or output run out. Memory and file size are limited
 * because the remote decides how much it sends.
 */
function runGit(run: GitRun, args: readonly string[]): Promise<GitResult> {
  const { scratch, credentials, deadline, maxBytes } = run;
  if (deadline.aborted) return Promise.reject(deadline.reason);
  const limits = `ulimit -f ${Math.ceil(maxBytes / 512)} 2>/dev/null; ulimit -v ${MAX_MEMORY_KIB} 2>/dev/null; exec git "$@"`;
  const child = spawn("/bin/sh", ["-c", limits, "git", ...args], {
    cwd: scratch,
    env: gitEnvironment(run),
    detached: true,
    stdio: ["ignore", "pipe", "pipe", credentials ? "pipe" : "ignore"],
  });
  const { promise, resolve, reject } = Promise.withResolvers<GitResult>();
  let ended: { by: unknown } | undefined;
  const kill = (by: unknown) => {
    ended ??= { by };
    // Normally the end of the process settles this, so that nothing writes to the scratch directory any more.
    setTimeout(() => reject(by), KILL_MS).unref();
    try {
      if (child.pid) process.kill(-child.pid, "SIGKILL");
    } catch {
      // Gone already.
    }
  };
  const onAbort = () => kill(deadline.reason);
  deadline.addEventListener("abort", onAbort);
  const output: Buffer[] = [];
  const errors: Buffer[] = [];
  let outputSize = 0;
  let errorSize = 0;
  child.stdout?.on("data", (chunk: Buffer) => {
    outputSize += chunk.length;
    if (outputSize > maxBytes) kill(new ScmError("unavailable", "the host sent more than can be read"));
    else output.push(chunk);
  });
  child.stderr?.on("data", (chunk: Buffer) => {
    errorSize += chunk.length;
    if (errorSize <= MAX_ERROR_OUTPUT) errors.push(chunk);
  });
  child.on("error", () => {
    deadline.removeEventListener("abort", onAbort);
    reject(new ScmError("unsupported", "missing capability: git cannot be started"));
  });
  child.on("close", (code) => {
    deadline.removeEventListener("abort", onAbort);
    if (ended) return reject(ended.by);
    resolve({ code, stdout: Buffer.concat(output).toString(), stderr: Buffer.concat(errors).toString() });
  });
  if (credentials) giveCredentials(child.stdio[3] as Writable, credentials);
  return promise;
}

const runLocal = (run: GitRun, args: readonly string[]) => runGit({ ...run, credentials: undefined }, args);

function statusError(status: number, hadCredentials: boolean): ScmError {
  if (status === 401) return authRequired(hadCredentials);
  if (status === 403) return new ScmError("forbidden", "the host does not allow access to this repository");
  if (status === 404 || status === 410) return repositoryMissing();
  if (status === 429) return new ScmError("rate_limited", "the host asks to send fewer requests; try again later");
  return new ScmError("unavailable", `the host answered with status ${status}`);
}

const authRequired = (hadCredentials: boolean) =>
  hadCredentials
    ? new ScmError("auth_required", "the host did not accept the stored token", { credentialsRejected: true })
    : new ScmError("auth_required", "the host asks for a sign-in to read this repository");

const httpStatus = (stderr: string) => Number(/The requested URL returned error: (\d{3})/.exec(stderr)?.[1] ?? 0);

// What git writes on failure, in the order it is looked at. Only the outcome is told, never the text.
const FAILURES: readonly [RegExp, () => ScmError][] = [
  [/could not read (Username|Password)/, () => authRequired(false)],
  [/Authentication failed/, () => authRequired(true)],
  [
    /transport '.*' not allowed/,
    () => new ScmError("blocked", "this kind of address is not allowed for source control"),
  ],
  [/Could not resolve host|unable to look up/, () => new ScmError("not_found", "the host does not exist")],
  [
    /SSL|TLS|gnutls|certificate/i,
    () => new ScmError("unavailable", "no secure connection to the host: its certificate or TLS setup is not accepted"),
  ],
  [
    /is this a git repository|not a git repository|does not appear to be a git|repository .* not found|no such repository|remote error|does not exist/i,
    repositoryMissing,
  ],
  [
    /Failed to connect|Couldn't connect|Connection refused|unable to connect|timed out|too slow/i,
    () => new ScmError("unavailable", "the host cannot be reached"),
  ],
];

function failure(stderr: string, hadCredentials: boolean): Error {
  // Neither what the remote wrote nor the address itself may steer the outcome.
  const own = stderr.replace(/^remote: .*$/gm, "").replace(/'[^']*'/g, "''");
  const status = httpStatus(own);
  if (isRedirect(status)) return REDIRECTED;
  if (status) return statusError(status, hadCredentials);
  const found = FAILURES.find(([pattern]) => pattern.test(own));
  return found ? found[1]() : new ScmError("unavailable", "the host did not answer as a git server does");
}

async function withScratch<T>(work: (directory: string) => Promise<T>): Promise<T> {
  const directory = await mkdtemp(join(await realpath(tmpdir()), "berth-git-"));
  try {
    return await work(directory);
  } finally {
    await rm(directory, { recursive: true, force: true, maxRetries: 3 });
  }
}

interface Glimpse {
  asked: URL;
  status: number;
  location: string | undefined;
  contentType: string | undefined;
  /** Whether the credentials were sent. */
  signedIn: boolean;
}

/** Head of the answer to git's first request, for what git itself does not tell. */
function head({ target, deadline }: GitRun, credentials: GitCredentials | undefined): Promise<Glimpse> {
  const asked = new URL(target.url);
  asked.pathname = `${asked.pathname.replace(/\/$/, "")}${INFO_REFS}`;
  asked.search = "?service=git-upload-pack";
  const pinned = target.addresses.map((address) => ({ address, family: isIPv6(address) ? 6 : 4 }));
  const lookup: LookupFunction = (_host, options, done) => {
    const [first] = pinned;
    if (options.all) done(null, pinned);
    else done(null, first?.address ?? "", first?.family);
  };
  const basic = credentials && Buffer.from(`${credentials.username}:${credentials.password}`).toString("base64");
  const headers = { "user-agent": "git/berth", accept: "*/*", ...(basic && { authorization: `Basic ${basic}` }) };
  const send = asked.protocol === "https:" ? httpsRequest : httpRequest;
  const { promise, resolve, reject } = Promise.withResolvers<Glimpse>();
  const request = send(asked, { agent: false, headers, lookup, signal: deadline }, (response) => {
    const { location, "content-type": contentType } = response.headers;
    resolve({ asked, status: response.statusCode ?? 0, location, contentType, signedIn: credentials !== undefined });
    response.destroy();
  });
  request.on("error", () =>
    reject(deadline.aborted ? deadline.reason : new ScmError("unavailable", "the host cannot be reached")),
  );
  request.end();
  return promise;
}

/** As git does it: anonymously, and with credentials only if the host asks for them. */
async function glimpse(run: GitRun): Promise<Glimpse> {
  const anonymous = await head(run, undefined);
  return anonymous.status === 401 && run.credentials ? head(run, run.credentials) : anonymous;
}

/** Where a redirecting host sends git: another path on the same origin, or an error. */
async function redirectTarget(run: GitRun): Promise<URL> {
  const { asked, status, location, signedIn } = await glimpse(run);
  const next = location === undefined ? undefined : URL.parse(location, asked.href);
  if (!next || !isRedirect(status)) throw statusError(status, signedIn);
  if (next.origin !== asked.origin) throw new ScmError("unavailable", "the host redirects to another host");
  // A page for people instead of a repository: nearly always the sign-in page.
  if (!next.pathname.endsWith(INFO_REFS)) throw authRequired(signedIn);
  const moved = new URL(next.origin);
  moved.pathname = next.pathname.slice(0, -INFO_REFS.length);
  return moved;
}

/** git takes a short web page for a repository without refs, so an empty answer must at least say that it is git's. */
async function checkIsGit(run: GitRun): Promise<void> {
  if (!run.target.url.protocol.startsWith("http")) return;
  const { status, contentType, signedIn } = await glimpse(run);
  if (status !== 200) throw statusError(status, signedIn);
  if (contentType !== "application/x-git-upload-pack-advertisement") throw repositoryMissing();
}

/** Admits the URL, then does `work` with it within 15 s; follows redirects that stay on the same host. */
async function onRemote<T>(
  url: string,
  { guard, credentials, vouched, signal, maxBytes = MAX_BYTES }: RemoteOptions,
  work: (run: GitRun) => Promise<T>,
): Promise<T> {
  if (signal?.aborted) throw cancelled();
  if (credentials && /[\n\r\0]/.test(credentials.username + credentials.password)) {
    throw new ScmError("auth_required", "the stored token is not usable", { credentialsRejected: true });
  }
  await requireGit();
  const ending = new AbortController();
  const onAbort = () => ending.abort(cancelled());
  const slow = new ScmError("unavailable", `the host did not answer within ${GIT_MS / 1000} s`);
  const timer = setTimeout(() => ending.abort(slow), GIT_MS);
  signal?.addEventListener("abort", onAbort);
  try {
    const target = await guard.admit(url, { vouched, signal: ending.signal });
    // The address of an ssh connection cannot be pinned, and there is no key to use.
    if (target.url.protocol === "ssh:")
      throw new ScmError("invalid_url", "ssh addresses cannot be read here; use https");
    return await withScratch(async (scratch) => {
      const run = { scratch, target: pinnedInUrl(target), credentials, deadline: ending.signal, maxBytes };
      for (let redirects = 0; ; redirects++) {
        try {
          return await work(run);
        } catch (error) {
          if (error !== REDIRECTED) throw error;
          if (redirects === MAX_REDIRECTS) throw new ScmError("unavailable", "the host redirects too often");
          run.target = { ...run.target, url: await redirectTarget(run) };
        }
      }
    });
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", onAbort);
  }
}

/** git's own protocol has no setting for the address, so it takes the place of the name. */
function pinnedInUrl(target: AdmittedUrl): AdmittedUrl {
  const [address] = target.addresses;
  if (target.url.protocol !== "git:" || !address) return target;
  const url = new URL(target.url);
  url.hostname = bracketed(address);
  return { ...target, url };
}

/** Runs git against the remote; returns its output or throws what went wrong. */
async function askRemote(run: GitRun, args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await runGit(run, args);
  if (code === 0) return stdout;
  throw failure(stderr, run.credentials !== undefined);
}

function parseRefs(output: string, prefixes: readonly string[]): RemoteRefs {
  let headBranch: string | undefined;
  const refs = new Map<string, string>();
  for (const line of output.split("\n")) {
    const [value = "", name = ""] = line.split("\t");
    const symref = /^ref: refs\/heads\/(.*)$/.exec(value)?.[1];
    if (symref && name === "HEAD" && isSafeRef(symref)) headBranch = symref;
    const plain = name.replace(/\^\{\}$/, "");
    const wanted = prefixes.some((prefix) => (prefix.endsWith("/") ? plain.startsWith(prefix) : plain === prefix));
    const shown = plain.replace(/^refs\/(heads|tags)\//, "");
    if (wanted && isFullCommit(value) && isSafeRef(shown)) refs.set(plain, value);
  }
  return { headBranch, refs };
}

/**
 * What a repository advertises below `refPrefixes`: `HEAD`, full ref names, or prefixes ending in a slash.
 * Throws ScmError; a repository that does not exist and one that must not be seen look alike.
 */
export function lsRemote(
  url: string,
  {
    refPrefixes = ["HEAD", "refs/heads/", "refs/tags/"],
    ...options
  }: RemoteOptions & { refPrefixes?: readonly string[] },
): Promise<RemoteRefs> {
  const filters = refPrefixes.map((prefix) => HOST_FILTERS[prefix]);
  const byHost = filters.filter((filter) => filter !== undefined);
  const patterns = refPrefixes.map((prefix) => (prefix.endsWith("/") ? `${prefix}*` : prefix));
  const isFiltered = byHost.length === filters.length;
  return onRemote(url, options, async (run) => {
    const args = ["ls-remote", "--symref", ...(isFiltered ? byHost : []), "--", run.target.url.href];
    const output = await askRemote(run, [...args, ...(isFiltered ? [] : patterns)]);
    if (output === "") await checkIsGit(run);
    return parseRefs(output, refPrefixes);
  });
}

/** Branch that HEAD of an empty repository names; undefined if the host does not tell. Transfers no objects of one. */
export function unbornHead(url: string, options: RemoteOptions): Promise<string | undefined> {
  return onRemote(url, options, async (run) => {
    const shallow = ["--bare", "--depth=1", "--filter=tree:0", "--single-branch", "--no-tags", "--template="];
    await askRemote(run, ["clone", "--quiet", ...shallow, "--", run.target.url.href, "head"]);
    const { stdout } = await runLocal(run, ["-C", "head", "symbolic-ref", "--short", "HEAD"]);
    const branch = stdout.trim();
    return branch !== UNKNOWN_BRANCH && isSafeRef(branch) ? branch : undefined;
  });
}

/** The commit that a (short) id names among the fetched objects. */
async function verifyCommit(run: GitRun, sha: string): Promise<string | undefined> {
  const { stdout, stderr } = await runLocal(run, ["rev-parse", "--verify", `${sha}^{commit}`]);
  if (/ambiguous/.test(stderr))
    throw new ScmError("not_found", `more than one commit begins with ${sha}; use the full id`);
  const commit = stdout.trim();
  return isFullCommit(commit) && commit.startsWith(sha) ? commit : undefined;
}

/** What a fetch of commits without their files came to; `too_large` only where the host cannot leave the files out. */
async function fetchCommits(run: GitRun, args: readonly string[]): Promise<"ok" | "missing" | "refused" | "too_large"> {
  const { code, stderr } = await runGit(run, [
    ...["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--filter=tree:0"],
    ...args,
  ]);
  if (code === 0) return "ok";
  if (/index-pack/.test(stderr)) return "too_large";
  if (/not our ref|couldn't find remote ref/.test(stderr)) return "missing";
  if (/unadvertised object/.test(stderr)) return "refused";
  throw failure(stderr, run.credentials !== undefined);
}

/**
 * Full id of a commit of the repository, given 7 to 40 lower-case hex digits of it; undefined if there is none.
 * Fetches the commit, or for a short id the history without files, into a scratch repository.
 * Throws ScmError, `unsupported` when the history is too large for that.
 */
export async function findCommit(url: string, sha: string, options: RemoteOptions): Promise<string | undefined> {
  if (!isCommit(sha)) return undefined;
  return onRemote(url, options, async (run) => {
    await runLocal(run, ["init", "--bare", "--quiet", "--template=", "."]);
    const remote = run.target.url.href;
    if (isFullCommit(sha)) {
      const outcome = await fetchCommits(run, ["--depth=1", "--", remote, sha]);
      // The host began to send it, so it exists.
      if (outcome === "too_large") return sha;
      if (outcome === "missing") return undefined;
      if (outcome === "ok") return verifyCommit(run, sha);
    }
    const outcome = await fetchCommits(run, ["--", remote, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]);
    if (outcome === "too_large") {
      throw new ScmError(
        "unsupported",
        "missing capability: short commit ids in a repository of this size; use the full id",
      );
    }
    return outcome === "ok" ? verifyCommit(run, sha) : undefined;
  });
}
