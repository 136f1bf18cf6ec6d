import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { type ContextUrlDeps, parseContextUrl, resolveContextUrl } from "../src/scm/context-url.ts";
import { ScmError } from "../src/scm/errors.ts";
import { findCommit, lsRemote } from "../src/scm/git.ts";
import { BLOCKED_ADDRESS, classifyAddress, createGuard, type Guard } from "../src/scm/guard.ts";
import { type GitServer, type Repository, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";

const SECRET = "s3cr3t-token-4711";
const LOGIN = { user: "alice", password: SECRET };

let server: GitServer;
let guard: Guard;
let app: Repository;

const machineTmp = process.env.TMPDIR;
let ownTmp = "";

beforeAll(async () => {
  // Scratch directories of this file alone, so that leftovers show.
  ownTmp = await mkdtemp(join(tmpdir(), "scm-test-"));
  process.env.TMPDIR = ownTmp;
  server = await startGitServer();
  guard = createGuard({ allowHosts: [server.host], schemes: [] });
  app = await server.createRepository("acme/app", {
    branches: { "feature/x": { "dir/file": "x" }, both: { b: "b" }, deadbeef: { d: "d" } },
    tags: { feature: "main", both: "main", v1: "feature/x", "rel/1.0": "main" },
    refs: { "refs/pull/1/head": { p: "p" } },
  });
  await server.createRepository("acme/empty", { empty: true, defaultBranch: "trunk" });
  await server.createRepository("acme/secret", { private: LOGIN });
});

afterAll(async () => {
  await server.close();
  if (machineTmp === undefined) delete process.env.TMPDIR;
  else process.env.TMPDIR = machineTmp;
  await rm(ownTmp, { recursive: true });
});

/** What an address stands for, its repository read as one of that product. */
function resolve(path: string, scmId = "git", more: Partial<ContextUrlDeps> = {}) {
  const integrations = [{ host: server.host, scmId }];
  return resolveContextUrl(`http://${server.host}/${path}`, { guard, integrations, ...more });
}

/** Kind and text of the refusal; fails the test if there is none. */
async function refusal(work: Promise<unknown>): Promise<ScmError> {
  const outcome = await work.then(
    (value) => new Error(`resolved with ${JSON.stringify(value)}`),
    (error: unknown) => error,
  );
  if (outcome instanceof ScmError) return outcome;
  throw outcome;
}

test.each([
  ["github", "acme/app/tree/feature/x/dir/file"],
  ["github", "acme/app/blob/feature%2Fx/dir/file"],
  ["gitlab", "acme/app/-/tree/feature/x/dir/file?ref_type=heads"],
  ["gitlab", "acme/app/tree/feature/x/dir/file"],
  ["bitbucket", "acme/app/src/feature/x/dir/file"],
  ["git", "acme/app/src/branch/feature/x/dir/file"],
])("RUN-34 %s: the longest known ref of /%s is the branch", async (scmId, path) => {
  const found = await resolve(path, scmId);
  expect(found).toMatchObject({ owner: "acme", repo: "app", cloneUrl: app.url, scmId, host: server.host });
  expect(found).toMatchObject({ branch: "feature/x", tag: "", commit: "" });
});

test.each([
  ["github", "acme/app/tree/nope"],
  ["github", "acme/app/tree/nope/deadbee"],
  ["github", "acme/app/releases/tag/main"],
  ["github", "acme/app/releases/tag/feature/x"],
  ["gitlab", "acme/app/-/tree/v1?ref_type=heads"],
  ["github", "acme/app/commit/main"],
  ["github", `acme/app/commit/${"1".repeat(40)}`],
  ["github", "acme/app/commit/1111111"],
  ["git", "acme/app/src/branch/v1"],
  ["git", "acme/app/pulls/99"],
  ["git", "acme/nope"],
  ["git", "acme/app/src/branch"],
])("RUN-34 %s: /%s is NOT_FOUND", async (scmId, path) => {
  expect((await refusal(resolve(path, scmId))).kind).toBe("not_found");
});

test("RUN-34 a branch wins over a tag of its name, unless the address asks for tags", async () => {
  expect(await resolve("acme/app/tree/both", "github")).toMatchObject({ branch: "both", tag: "" });
  expect(await resolve("acme/app/-/tree/both?ref_type=tags", "gitlab")).toMatchObject({ branch: "", tag: "both" });
  expect(await resolve("acme/app/tree/v1/README.md", "github")).toMatchObject({ branch: "", tag: "v1", commit: "" });
});

test("RUN-34 what looks like a commit but is a branch is the branch", async () => {
  expect(await resolve("acme/app/tree/deadbeef", "github")).toMatchObject({ branch: "deadbeef", commit: "" });
});

test.each(["acme/app", "acme/app.git", "acme/app/", "acme/app.git/"])(
  "RUN-35 /%s alone gives the default branch and no commit",
  async (path) => {
    expect(await resolve(path)).toEqual({
      originalContextUrl: `http://${server.host}/${path}`,
      scmId: "git",
      host: server.host,
      owner: "acme",
      repo: "app",
      cloneUrl: app.url,
      upstreamRemoteUrl: "",
      branch: "main",
      tag: "",
      commit: "",
    });
  },
);

test.each([
  ["github", "acme/app/releases/tag/rel/1.0"],
  ["gitlab", "acme/app/-/tags/rel/1.0"],
  ["gitlab", "acme/app/-/releases/rel/1.0"],
  ["bitbucket", "acme/app/commits/tag/rel/1.0"],
  ["git", "acme/app/src/tag/rel/1.0/README.md"],
])("RUN-35 %s: /%s sets only the tag", async (scmId, path) => {
  expect(await resolve(path, scmId)).toMatchObject({ branch: "", tag: "rel/1.0", commit: "" });
});

test("RUN-35 a commit address sets only the commit, in full: tip, history, short, upper case", async () => {
  await server.createRepository("acme/history");
  const older = await server.commit("acme/history", { files: { a: "1" } });
  const tip = await server.commit("acme/history", { files: { a: "2" } });
  const only = (commit: string) => ({ branch: "", tag: "", commit, cloneUrl: server.url("acme/history") });
  expect(await resolve(`acme/history/commit/${tip}`, "github")).toMatchObject(only(tip));
  expect(await resolve(`acme/history/commit/${older}`, "github")).toMatchObject(only(older));
  expect(await resolve(`acme/history/-/commit/${tip.slice(0, 7)}`, "gitlab")).toMatchObject(only(tip));
  expect(await resolve(`acme/history/commit/${older.slice(0, 9)}`)).toMatchObject(only(older));
  expect(await resolve(`acme/history/tree/${older.toUpperCase()}/a`, "github")).toMatchObject(only(older));
});

test("RUN-38 Azure addresses: versions, a project without repository, older hosts", async () => {
  const name = "org/my project/_git/my project";
  const { refs } = await server.createRepository(name, { branches: { "feature/x": { a: "a" } }, tags: { v1: "main" } });
  const azure = (path: string) => resolve(path, "azuredevops_server");
  const base = { owner: "org/my project", repo: "my project" };
  expect(await azure("org/my%20project")).toMatchObject({ ...base, branch: "main", tag: "", commit: "" });
  expect(await azure("org/_git/my%20project?version=GBfeature%2Fx")).toMatchObject({ ...base, branch: "feature/x" });
  expect(await azure("org/my%20project/_git/my%20project?version=GTv1")).toMatchObject({
    ...base,
    branch: "",
    tag: "v1",
  });
  const commit = refs["refs/heads/feature/x"] ?? "";
  expect(await azure(`org/my%20project/_git/my%20project?version=GC${commit}`)).toMatchObject({
    ...base,
    tag: "",
    commit,
  });
  expect((await refusal(azure("org/my%20project?version=GBnope"))).kind).toBe("not_found");
});

test("an empty repository has the branch its HEAD names", async () => {
  expect(await resolve("acme/empty")).toMatchObject({ branch: "trunk", tag: "", commit: "" });
  const credentials = async () => ({ username: "x", password: "expired" });
  expect(await resolve("acme/empty", "git", { credentials })).toMatchObject({ branch: "trunk" });
});

test("a detached HEAD is guessed as git does", async () => {
  const { directory, head } = await server.createRepository("acme/detached", { branches: { other: { a: "a" } } });
  execFileSync("git", ["-C", directory, "update-ref", "--no-deref", "HEAD", head]);
  expect(await resolve("acme/detached")).toMatchObject({ branch: "main", commit: "" });
});

test("the full path of a plain git host wins over the page it looks like", async () => {
  const deep = await server.createRepository("acme/app/src/branch/main");
  expect(await resolve("acme/app/src/branch/main")).toMatchObject({
    owner: "acme/app/src/branch",
    repo: "main",
    cloneUrl: deep.url,
  });
});

test("older GitLab addresses fall back to later cuts", async () => {
  await server.createRepository("group/sub/issues");
  expect(await resolve("group/sub/issues", "gitlab")).toMatchObject({
    owner: "group/sub",
    repo: "issues",
    branch: "main",
  });
});

test("a server that knows a repository only without .git gets that address", async () => {
  server.answer("/plain/repo.git/", { status: 404 });
  await server.createRepository("plain/repo");
  expect(await resolve("plain/repo")).toMatchObject({ cloneUrl: server.webUrl("plain/repo"), repo: "repo" });
});

test("issues and Gitea pull requests are answered without REST, other pull requests name what is missing", async () => {
  const integrations = [{ host: server.host, scmId: "git" }];
  const parse = (path: string) => parseContextUrl(server.webUrl(path), { guard, integrations });
  const issue = await parse("acme/app/issues/2");
  expect(issue).toMatchObject({ issue: { id: "2", title: "" }, git: { branch: "main", commit: "" }, scmId: "git" });
  const pull = await parse("acme/app/pulls/1");
  expect(pull.git).toMatchObject({ cloneUrl: app.url, branch: "", commit: app.refs["refs/pull/1/head"] });
  expect(pull.pr?.id).toBe("1");
  expect(pull.pullRequest).toMatchObject({ id: "1", repository: { cloneUrl: app.url, owner: "acme", name: "app" } });
  const missing = await refusal(resolve("acme/app/pull/1", "github"));
  expect(missing).toMatchObject({ kind: "unsupported", message: "missing capability: pull requests of this host" });
  expect((await refusal(resolve("acme/app/issues/1", "github"))).kind).toBe("unsupported");
});

test("a private repository asks for a sign-in, takes a good token and reports a bad one", async () => {
  const withToken = (password: string) => ({ credentials: async () => ({ username: LOGIN.user, password }) });
  expect(await refusal(resolve("acme/secret"))).toMatchObject({ kind: "auth_required", credentialsRejected: false });
  expect(await resolve("acme/secret", "git", withToken(SECRET))).toMatchObject({ branch: "main" });
  const rejected = await refusal(resolve("acme/secret", "git", withToken("wrong-4711")));
  expect(rejected).toMatchObject({ kind: "auth_required", credentialsRejected: true });
  expect(rejected.message).not.toContain("wrong-4711");
  expect((await refusal(resolve("acme/secret", "git", withToken("a\npassword=b")))).credentialsRejected).toBe(true);
});

test("a public repository is read although the token is bad", async () => {
  const credentials = async () => ({ username: "x", password: "expired" });
  expect(await resolve("acme/app", "git", { credentials })).toMatchObject({ branch: "main" });
});

test.each([
  [401, "auth_required"],
  [403, "forbidden"],
  [404, "not_found"],
  [429, "rate_limited"],
  [500, "unavailable"],
  [503, "unavailable"],
  [200, "not_found"],
])("status %i of the host is %s and its text is never repeated", async (status, kind) => {
  const body = "internal-host-name.corp stack trace";
  server.answer(`/status/${status}.git`, { status, headers: { "content-type": "text/html" }, body });
  const error = await refusal(lsRemote(`http://${server.host}/status/${status}.git`, { guard }));
  expect(error.kind).toBe(kind);
  expect(error.message).not.toMatch(/internal-host-name|stack|127\.0\.0\.1/);
});

test("names that a hostile server advertises are left out", async () => {
  const id = app.head;
  const packet = (line: string) => `${(line.length + 4).toString(16).padStart(4, "0")}${line}`;
  const lines = [
    `${id} HEAD\0symref=HEAD:refs/heads/--upload-pack=id agent=x\n`,
    ...["refs/heads/--upload-pack=id", "refs/heads/../../x", "refs/heads/good"].map((ref) => `${id} ${ref}\n`),
  ];
  server.answer("/hostile.git", {
    status: 200,
    headers: { "content-type": "application/x-git-upload-pack-advertisement" },
    body: `${packet("# service=git-upload-pack\n")}0000${lines.map(packet).join("")}0000`,
  });
  const { headBranch, refs } = await lsRemote(`http://${server.host}/hostile.git`, { guard });
  expect(headBranch).toBeUndefined();
  expect([...refs.keys()]).toEqual(["HEAD", "refs/heads/good"]);
});

test("output beyond the limit ends the call", async () => {
  const packet = (line: string) => `${(line.length + 4).toString(16).padStart(4, "0")}${line}`;
  const long = "x".repeat(400);
  const lines = Array.from({ length: 5_000 }, (_, index) => packet(`${app.head} refs/heads/${long}${index}\n`));
  server.answer("/huge.git", {
    status: 200,
    headers: { "content-type": "application/x-git-upload-pack-advertisement" },
    body: `${packet("# service=git-upload-pack\n")}0000${lines.join("")}0000`,
  });
  const error = await refusal(
    lsRemote(`http://${server.host}/huge.git`, { guard, refPrefixes: ["refs/heads/"], maxBytes: 2 ** 20 }),
  );
  expect(error).toMatchObject({ kind: "unavailable", message: "the host sent more than can be read" });
});

test("a history too large to look through accepts full ids and refuses short ones", async () => {
  const { directory, head } = await server.createRepository("acme/large", { filter: false });
  const size = 2 ** 20 + 1;
  const input = Buffer.concat([
    Buffer.from(
      `commit refs/heads/main\ncommitter T <t@example.com> 1 +0000\ndata 0\nfrom ${head}\nM 644 inline big\ndata ${size}\n`,
    ),
    Buffer.alloc(size, "x"),
    Buffer.from("\ndone\n"),
  ]);
  execFileSync(
    "git",
    [
      "-C",
      directory,
      ...["-c", "core.compression=0", "-c", "fastimport.unpackLimit=1", "fast-import"],
      "--quiet",
      "--done",
    ],
    { input },
  );
  const tip = await server.commit("acme/large", { files: { a: "1" } });
  const middle = execFileSync("git", ["-C", directory, "rev-parse", "main~1"]).toString().trim();
  expect(await findCommit(server.url("acme/large"), middle, { guard, maxBytes: 2 ** 20 })).toBe(middle);
  expect(tip).not.toBe(middle);
  const short = await refusal(findCommit(server.url("acme/large"), middle.slice(0, 8), { guard, maxBytes: 2 ** 20 }));
  expect(short.kind).toBe("unsupported");
});

test("redirects on the same host are followed, at most three times, and end at sign-in pages", async () => {
  const to = (location: string) => ({ status: 301, headers: { location } });
  server.answer("/moved.git/", ({ path, query }) => to(`${path.replace("/moved.git", "/acme/app.git")}?${query}`));
  expect((await lsRemote(`http://${server.host}/moved.git`, { guard })).headBranch).toBe("main");
  server.answer("/loop.git/", ({ path, query }) => to(`${path}?${query}`));
  const loop = await refusal(lsRemote(`http://${server.host}/loop.git`, { guard }));
  expect(loop).toMatchObject({ kind: "unavailable", message: "the host redirects too often" });
  server.answer("/login.git/", () => to("/users/sign_in"));
  expect((await refusal(lsRemote(`http://${server.host}/login.git`, { guard }))).kind).toBe("auth_required");
});

test("RUN-43 a redirect to another host is UNAVAILABLE and nothing reaches that host", async () => {
  const other = await startGitServer();
  try {
    await other.createRepository("acme/app");
    server.answer("/away.git/", ({ path, query }) => ({
      status: 302,
      headers: { location: `http://${other.host}${path.replace("/away.git", "/acme/app.git")}?${query}` },
    }));
    const both = createGuard({ allowHosts: [server.host, other.host], schemes: [] });
    const credentials = { username: "u", password: SECRET };
    const error = await refusal(lsRemote(`http://${server.host}/away.git`, { guard: both, credentials }));
    expect(error).toMatchObject({ kind: "unavailable", message: "the host redirects to another host" });
    expect(other.requests).toEqual([]);
  } finally {
    await other.close();
  }
});

test.each([
  "https://127.0.0.1:PORT/acme/app",
  "https://localhost:PORT/acme/app",
  "https://LOCALHOST.:PORT/acme/app",
  "https://2130706433:PORT/acme/app",
  "https://0x7f.1:PORT/acme/app",
  "https://[::ffff:127.0.0.1]:PORT/acme/app",
  "https://[::1]:PORT/acme/app",
  "https://0.0.0.0:PORT/acme/app",
  "https://169.254.169.254/latest/meta-data",
  "https://both.test:PORT/acme/app",
  "https://private.test:PORT/acme/app",
])("RUN-43 %s is refused without a request", async (url) => {
  const names: Record<string, string[]> = {
    "both.test": ["203.0.113.7", "127.0.0.1"],
    "private.test": ["10.1.2.3"],
    localhost: ["127.0.0.1", "::1"],
  };
  const strict = createGuard({ allowHosts: [], schemes: [], resolve: async (host) => names[host] ?? [] });
  const port = server.host.split(":")[1] ?? "";
  const before = server.requests.length;
  const error = await refusal(resolveContextUrl(url.replace("PORT", port), { guard: strict }));
  expect(error).toMatchObject({ kind: "blocked", message: BLOCKED_ADDRESS });
  expect(server.requests.length).toBe(before);
});

test("RUN-43 the checked address is the one that is contacted, whatever the name resolves to later", async () => {
  const port = server.host.split(":")[1] ?? "";
  const answers = [["127.0.0.1"], ["169.254.169.254"]];
  const rebinding = createGuard({
    allowHosts: [`rebind.test:${port}`],
    schemes: [],
    resolve: async () => answers.shift() ?? [],
  });
  // No resolver of this machine knows the name, so only the pinned address can have been used.
  const { headBranch } = await lsRemote(`http://rebind.test:${port}/acme/app.git`, { guard: rebinding });
  expect(headBranch).toBe("main");
  const second = await refusal(lsRemote(`http://rebind.test:${port}/acme/app.git`, { guard: rebinding }));
  expect(second.kind).toBe("blocked");
});

test("RUN-43 integrations and the allow-list open private addresses, nothing opens metadata", async () => {
  const resolve = async (host: string) => (host === "meta.test" ? ["169.254.169.254"] : ["10.1.2.3"]);
  const strict = createGuard({ allowHosts: ["listed.test", "meta.test", "[fd00::1]:3000"], schemes: [], resolve });
  const kind = (url: string, vouched = false) =>
    strict.admit(url, { vouched }).then(
      ({ addresses }) => addresses.join(),
      (error: ScmError) => error.kind,
    );
  expect(await kind("https://git.test/o/r")).toBe("blocked");
  expect(await kind("https://git.test/o/r", true)).toBe("10.1.2.3");
  expect(await kind("https://127.0.0.1/o/r", true)).toBe("blocked");
  expect(await kind("http://git.test/o/r", true)).toBe("blocked");
  expect(await kind("http://listed.test:8080/o/r")).toBe("10.1.2.3");
  expect(await kind("http://[fd00::1]:3000/o/r")).toBe("fd00::1");
  expect(await kind("http://[fd00::1]:3001/o/r")).toBe("blocked");
  expect(await kind("https://meta.test/o/r")).toBe("blocked");
  expect(await kind("https://meta.test/o/r", true)).toBe("blocked");
  expect(await kind("ftp://listed.test/o/r")).toBe("invalid_url");
  expect(await kind("https://u:p@listed.test/o/r")).toBe("invalid_url");
  expect(() => createGuard({ allowHosts: ["a/b"], schemes: [] })).toThrow("not a host[:port]: a/b");
});

test.each([
  ["public", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2002:5db8:d822::1"]],
  [
    "private",
    ["10.0.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"],
  ],
  ["loopback", ["127.0.0.1", "127.9.9.9", "::1", "0:0:0:0:0:0:0:1", "::ffff:7f00:1", "::127.0.0.1", "2002:7f00:1::"]],
  [
    "never",
    [
      ...["0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "100.100.100.200", "168.63.129.16", "::"],
      ...["fe80::1", "fe80::1%eth0", "ff02::1", "fd00:ec2::254", "::ffff:169.254.169.254", "2001::1", "nonsense", ""],
    ],
  ],
] as const)("RUN-43 addresses that are %s", (kind, addresses) => {
  for (const address of addresses) expect(classifyAddress(address), address).toBe(kind);
});

test("names that do not exist are NOT_FOUND, a resolver that fails for now is UNAVAILABLE", async () => {
  const failing = (code: string) =>
    createGuard({
      allowHosts: [],
      schemes: [],
      resolve: () => Promise.reject(Object.assign(new Error(code), { code })),
    });
  const kind = async (code: string) => (await refusal(lsRemote("https://x.test/o/r", { guard: failing(code) }))).kind;
  expect(await kind("ENOTFOUND")).toBe("not_found");
  expect(await kind("EAI_AGAIN")).toBe("unavailable");
});

test("a token is in no argument and no environment of a process, and an abort leaves no process and no directory", async () => {
  const read = (path: string) => {
    try {
      return readFileSync(path, "utf8");
    } catch {
      return "";
    }
  };
  const processes = () =>
    readdirSync("/proc")
      .filter((name) => /^\d+$/.test(name))
      .map((id) => ({ arguments: read(`/proc/${id}/cmdline`), environment: read(`/proc/${id}/environ`) }));
  const ours = () => processes().filter((each) => each.arguments.includes(`${server.host}/acme/secret.git`));
  await server.commit("acme/secret", { files: { a: "1" } });
  const head = await server.commit("acme/secret", { files: { a: "2" } });
  const stop = new AbortController();
  server.holdRequests();
  try {
    const credentials = { username: LOGIN.user, password: SECRET };
    const url = server.url("acme/secret");
    const outcome = refusal(findCommit(url, head, { guard, credentials, signal: stop.signal }));
    await server.held();
    expect(ours().length).toBeGreaterThan(0);
    expect(processes().filter((each) => each.arguments.includes(SECRET) || each.environment.includes(SECRET))).toEqual(
      [],
    );
    stop.abort();
    expect((await outcome).kind).toBe("timeout");
    await eventually(() => ours().length === 0, "the end of the processes", 5_000);
    expect(readdirSync(tmpdir()).filter((name) => name.startsWith("berth-git-"))).toEqual([]);
  } finally {
    server.release();
  }
});

test("a host that never answers is given up after 15 s, and a cancelled call at once", async () => {
  const silent = createServer(() => {});
  silent.listen(0, "127.0.0.1");
  await once(silent, "listening");
  const host = `127.0.0.1:${(silent.address() as AddressInfo).port}`;
  const patient = createGuard({ allowHosts: [host], schemes: [] });
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
  try {
    const outcome = refusal(lsRemote(`http://${host}/o/r.git`, { guard: patient }));
    await once(silent, "connection");
    await vi.advanceTimersByTimeAsync(15_000);
    expect(await outcome).toMatchObject({ kind: "unavailable", message: "the host did not answer within 15 s" });
  } finally {
    vi.useRealTimers();
    silent.close();
  }
  const gone = AbortSignal.abort();
  expect((await refusal(resolve("acme/app", "git", { signal: gone }))).kind).toBe("timeout");
});

test("settings of the machine and of the user are not read", async () => {
  const keep = { ...process.env };
  process.env.GIT_CONFIG_COUNT = "1";
  process.env.GIT_CONFIG_KEY_0 = `url.http://127.0.0.1:9/.insteadOf`;
  process.env.GIT_CONFIG_VALUE_0 = `http://${server.host}/`;
  process.env.http_proxy = "http://127.0.0.1:9";
  try {
    expect((await lsRemote(app.url, { guard })).headBranch).toBe("main");
  } finally {
    process.env = keep;
  }
});

test("schemes that nobody switched on, and ssh, are not used to read refs", async () => {
  expect((await refusal(lsRemote("ssh://git@203.0.113.1/o/r", { guard }))).kind).toBe("invalid_url");
  expect((await refusal(lsRemote(`file://${app.directory}`, { guard }))).kind).toBe("invalid_url");
  const local = createGuard({ allowHosts: [], schemes: ["file"] });
  expect((await lsRemote(`file://${app.directory}`, { guard: local })).headBranch).toBe("main");
});
