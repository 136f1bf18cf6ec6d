import { expect, test } from "vitest";
import { ScmError } from "../src/scm/errors.ts";
import { gitCredentials, type HostIntegration, normalizeHost } from "../src/scm/hosts.ts";
import { isSafeRef, safeRef } from "../src/scm/refs.ts";
import { parseShape, type UrlTarget } from "../src/scm/url-shape.ts";

const SHA = "0123456789abcdef0123456789abcdef01234567";
const INTEGRATIONS: HostIntegration[] = [
  { host: "gh.corp.test", scmId: "github" },
  { host: "gl.corp.test:8443", scmId: "gitlab" },
  { host: "tfs.corp.test", scmId: "azuredevops_server", virtualDirectory: "/tfs" },
  { host: "dev.azure.com/special", scmId: "git" },
];

const DEFAULT: UrlTarget = { kind: "default" };
const ref = (path: string, only?: "branch" | "tag"): UrlTarget => ({
  kind: "ref",
  path: path.split("/"),
  ...(only && { only }),
});
const exact = (path: string, only?: "branch" | "tag"): UrlTarget => ({ ...ref(path, only), exact: true }) as UrlTarget;
const commit = (sha: string): UrlTarget => ({ kind: "commit", sha });
const pullRequest = (number: string): UrlTarget => ({ kind: "pull_request", number });
const issue = (number: string): UrlTarget => ({ kind: "issue", number });

const shape = (url: string) => parseShape(url, { integrations: INTEGRATIONS, publicUrl: "https://berth.test" });

function problem(work: () => unknown): string {
  try {
    work();
  } catch (error) {
    return error instanceof ScmError ? error.kind : `threw ${error}`;
  }
  return "accepted";
}

// Address, owner, repository, clone address, target; of products whose addresses have one reading.
const ADDRESSES: [string, string, string, string, UrlTarget][] = [
  ["https://github.com/o/r", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://GitHub.com:443/o/r.git/", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://berth.test/#https://github.com/o/r", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://me@github.com/o/r?tab=readme#top", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["ssh://git@github.com/o/r.git", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["ssh://git@gh.corp.test:2222/o/r.git", "o", "r", "https://gh.corp.test/o/r.git", DEFAULT],
  ["https://github.com/o/r/tree/feature/x/dir", "o", "r", "https://github.com/o/r.git", ref("feature/x/dir")],
  ["https://github.com/o/r/tree/feature%2Fx", "o", "r", "https://github.com/o/r.git", ref("feature/x", undefined)],
  ["https://github.com/o/r/blob/main/a.ts#L1-L3", "o", "r", "https://github.com/o/r.git", ref("main/a.ts")],
  ["https://github.com/o/r/blame/main/a", "o", "r", "https://github.com/o/r.git", ref("main/a")],
  ["https://github.com/o/r/edit/main/a", "o", "r", "https://github.com/o/r.git", ref("main/a")],
  ["https://github.com/o/r/raw/refs/heads/main/a", "o", "r", "https://github.com/o/r.git", ref("main/a", "branch")],
  ["https://github.com/o/r/raw/refs/tags/v1/a", "o", "r", "https://github.com/o/r.git", ref("v1/a", "tag")],
  ["https://github.com/o/r/commits/main", "o", "r", "https://github.com/o/r.git", ref("main")],
  [`https://github.com/o/r/commit/${SHA}`, "o", "r", "https://github.com/o/r.git", commit(SHA)],
  ["https://github.com/o/r/releases/tag/pkg/v1", "o", "r", "https://github.com/o/r.git", exact("pkg/v1", "tag")],
  ["https://github.com/o/r/releases", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://github.com/o/r/pull/12/files", "o", "r", "https://github.com/o/r.git", pullRequest("12")],
  ["https://github.com/o/r/pull/new", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://github.com/o/r/issues/7", "o", "r", "https://github.com/o/r.git", issue("7")],
  ["https://github.com/o/r/issues", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://github.com/o/r/wiki/Home", "o", "r", "https://github.com/o/r.git", DEFAULT],
  ["https://github.com/o/r/tree", "o", "r", "https://github.com/o/r.git", DEFAULT],

  ["https://gitlab.com/g/p", "g", "p", "https://gitlab.com/g/p.git", DEFAULT],
  ["https://gitlab.com/g/s/t/p.git", "g/s/t", "p", "https://gitlab.com/g/s/t/p.git", DEFAULT],
  ["https://gl.corp.test:8443/g/p", "g", "p", "https://gl.corp.test:8443/g/p.git", DEFAULT],
  ["https://gitlab.com/g/s/p/-/tree/a/b", "g/s", "p", "https://gitlab.com/g/s/p.git", ref("a/b")],
  ["https://gitlab.com/g/p/-/tree/x?ref_type=heads", "g", "p", "https://gitlab.com/g/p.git", ref("x", "branch")],
  ["https://gitlab.com/g/p/-/blob/x/f?ref_type=tags", "g", "p", "https://gitlab.com/g/p.git", ref("x/f", "tag")],
  [`https://gitlab.com/g/p/-/commit/${SHA}`, "g", "p", "https://gitlab.com/g/p.git", commit(SHA)],
  ["https://gitlab.com/g/p/-/tags/v/1", "g", "p", "https://gitlab.com/g/p.git", exact("v/1", "tag")],
  ["https://gitlab.com/g/p/-/releases/v1", "g", "p", "https://gitlab.com/g/p.git", exact("v1", "tag")],
  ["https://gitlab.com/g/s/p/-/merge_requests/3/diffs", "g/s", "p", "https://gitlab.com/g/s/p.git", pullRequest("3")],
  ["https://gitlab.com/g/p/-/issues/3", "g", "p", "https://gitlab.com/g/p.git", issue("3")],
  ["https://gitlab.com/g/p/-/work_items/3", "g", "p", "https://gitlab.com/g/p.git", issue("3")],
  ["https://gitlab.com/g/p/-/wikis/home", "g", "p", "https://gitlab.com/g/p.git", DEFAULT],
  ["https://gitlab.com/g/tree/issues/p.git", "g/tree/issues", "p", "https://gitlab.com/g/tree/issues/p.git", DEFAULT],

  ["https://bitbucket.org/w/r", "w", "r", "https://bitbucket.org/w/r.git", DEFAULT],
  ["https://bitbucket.org/w/r/branch/a/b", "w", "r", "https://bitbucket.org/w/r.git", exact("a/b", "branch")],
  ["https://bitbucket.org/w/r/commits/branch/a/b", "w", "r", "https://bitbucket.org/w/r.git", exact("a/b", "branch")],
  ["https://bitbucket.org/w/r/commits/tag/v1", "w", "r", "https://bitbucket.org/w/r.git", exact("v1", "tag")],
  [`https://bitbucket.org/w/r/commits/${SHA}`, "w", "r", "https://bitbucket.org/w/r.git", commit(SHA)],
  ["https://bitbucket.org/w/r/src/a/b/f", "w", "r", "https://bitbucket.org/w/r.git", ref("a/b/f")],
  [`https://bitbucket.org/w/r/src/${SHA}/f?at=a%2Fb`, "w", "r", "https://bitbucket.org/w/r.git", exact("a/b")],
  [`https://bitbucket.org/w/r/src/${SHA}/f`, "w", "r", "https://bitbucket.org/w/r.git", ref(`${SHA}/f`)],
  ["https://bitbucket.org/w/r/pull-requests/9/diff", "w", "r", "https://bitbucket.org/w/r.git", pullRequest("9")],
  ["https://bitbucket.org/w/r/issues/9/a-slug", "w", "r", "https://bitbucket.org/w/r.git", issue("9")],

  ["https://dev.azure.com/o/p/_git/r", "o/p", "r", "https://dev.azure.com/o/p/_git/r", DEFAULT],
  ["https://o@dev.azure.com/o/p/_git/r", "o/p", "r", "https://dev.azure.com/o/p/_git/r", DEFAULT],
  ["https://dev.azure.com/o/_git/r", "o/r", "r", "https://dev.azure.com/o/r/_git/r", DEFAULT],
  ["https://dev.azure.com/o/p", "o/p", "p", "https://dev.azure.com/o/p/_git/p", DEFAULT],
  ["https://dev.azure.com/o/My%20P/_git/r", "o/My P", "r", "https://dev.azure.com/o/My%20P/_git/r", DEFAULT],
  ["https://o.visualstudio.com/p/_git/r", "o/p", "r", "https://dev.azure.com/o/p/_git/r", DEFAULT],
  ["https://o.visualstudio.com/DefaultCollection/p/_git/r", "o/p", "r", "https://dev.azure.com/o/p/_git/r", DEFAULT],
  ["ssh://git@ssh.dev.azure.com/v3/o/p/r", "o/p", "r", "https://dev.azure.com/o/p/_git/r", DEFAULT],
  [
    "https://dev.azure.com/o/p/_git/r?path=/a&version=GBa%2Fb",
    "o/p",
    "r",
    "https://dev.azure.com/o/p/_git/r",
    exact("a/b", "branch"),
  ],
  ["https://dev.azure.com/o/p/_git/r?version=GTv1", "o/p", "r", "https://dev.azure.com/o/p/_git/r", exact("v1", "tag")],
  [`https://dev.azure.com/o/p/_git/r?version=GC${SHA}`, "o/p", "r", "https://dev.azure.com/o/p/_git/r", commit(SHA)],
  [`https://dev.azure.com/o/p/_git/r/commit/${SHA}`, "o/p", "r", "https://dev.azure.com/o/p/_git/r", commit(SHA)],
  ["https://dev.azure.com/o/p/_git/r/pullrequest/4", "o/p", "r", "https://dev.azure.com/o/p/_git/r", pullRequest("4")],
  ["https://dev.azure.com/o/p/_wiki/wikis/x", "o/p", "p", "https://dev.azure.com/o/p/_git/p", DEFAULT],
  ["https://tfs.corp.test/tfs/c/p/_git/r", "c/p", "r", "https://tfs.corp.test/tfs/c/p/_git/r", DEFAULT],
  [
    "https://tfs.corp.test/TFS/c/_git/r?version=GBmain",
    "c/r",
    "r",
    "https://tfs.corp.test/tfs/c/r/_git/r",
    exact("main", "branch"),
  ],
  ["https://dev.azure.com/special/x/y.git", "special/x", "y", "https://dev.azure.com/special/x/y.git", DEFAULT],

  ["https://git.test/a/b/c.git", "a/b", "c", "https://git.test/a/b/c.git", DEFAULT],
  ["https://git.test/c.git", "", "c", "https://git.test/c.git", DEFAULT],
  ["https://git.test/a/b.git/tree/x", "a", "b", "https://git.test/a/b.git", DEFAULT],
  ["https://git.test/a/b.git/src/branch/x/y", "a", "b", "https://git.test/a/b.git", ref("x/y", "branch")],
  ["http://git.test:3000/~me/b.git", "~me", "b", "http://git.test:3000/~me/b.git", DEFAULT],
  ["https://[2001:db8::1]:3000/a/b.git", "a", "b", "https://[2001:db8::1]:3000/a/b.git", DEFAULT],
];

test.each(ADDRESSES)("RUN-34 RUN-35 RUN-36 RUN-37 RUN-38 reads %s", (url, owner, repo, cloneUrl, target) => {
  const { splits } = shape(url);
  expect(splits).toEqual([{ owner, repo, cloneUrl, target }]);
});

test("RUN-37 older GitLab addresses are cut at the first page name, then at later ones", () => {
  const legacy = shape("https://gitlab.com/g/s/p/merge_requests/3").splits;
  const modern = shape("https://gitlab.com/g/s/p/-/merge_requests/3").splits;
  expect(legacy[0]).toEqual(modern[0]);
  expect(
    shape("https://gitlab.com/g/p/tree/issues/tree/main").splits.map(({ owner, repo }) => `${owner} ${repo}`),
  ).toEqual(["g p", "g/p tree", "g/p/tree issues", "g/p/tree/issues/tree main"]);
});

test.each([
  ["src/branch/a/b", ref("a/b", "branch")],
  ["raw/branch/a/f", ref("a/f", "branch")],
  ["src/tag/v1/f", ref("v1/f", "tag")],
  [`src/commit/${SHA}/f`, commit(SHA)],
  ["commit/0123abc", commit("0123abc")],
  ["pulls/3", pullRequest("3")],
  ["issues/3", issue("3")],
])("RUN-34 /%s of a plain git host is a page only if no repository lies there", (page, target) => {
  const { scmId, splits } = shape(`https://git.test/o/r/${page}`);
  expect(scmId).toBe("git");
  expect(splits.map((split) => split.cloneUrl)).toEqual([
    `https://git.test/o/r/${page}.git`,
    `https://git.test/o/r/${page}`,
    "https://git.test/o/r.git",
    "https://git.test/o/r",
  ]);
  expect(splits.map((split) => split.target)).toEqual([DEFAULT, DEFAULT, target, target]);
});

test("products follow integrations, then their own hosts", () => {
  const kinds = [
    "https://github.com/o/r",
    "https://gh.corp.test/o/r",
    "https://other.test/o/r",
    "https://dev.azure.com/o/p",
  ];
  expect(kinds.map((url) => shape(url).scmId)).toEqual(["github", "github", "git", "azuredevops_entra"]);
  expect(kinds.map((url) => shape(url).vouched)).toEqual([false, true, false, false]);
  expect(shape("https://dev.azure.com/Special/p").scmId).toBe("git");
});

test.each([
  ["no URL", "github.com/o/r"],
  ["empty", ""],
  ["scp form", "git@github.com:o/r.git"],
  ["other scheme", "ftp://github.com/o/r"],
  ["file", "file:///etc/passwd"],
  ["git", "git://github.com/o/r"],
  ["javascript", "javascript:alert(1)"],
  ["remote helper", "ext::sh -c id"],
  ["option", "--upload-pack=id"],
  ["password", "https://u:p@github.com/o/r"],
  ["RUN-38 password with Azure", "https://user:pw@dev.azure.com/o/p/_git/r"],
  ["no path", "https://github.com/"],
  ["no repository", "https://github.com/o"],
  ["no repository in GitLab", "https://gitlab.com/g"],
  ["no project in Azure", "https://dev.azure.com/o"],
  ["no repository on a git host", "https://git.test/"],
  ["nothing but .git", "https://git.test/.git"],
  ["ssh to an unknown host", "ssh://git@git.test/o/r"],
  ["ssh option as host", "ssh://-oProxyCommand=id/o/r"],
  ["newline", "https://github.com/o/r\n--x"],
  ["encoded newline", "https://github.com/o/r%0a"],
  ["NUL", "https://github.com/o/r%00"],
  ["backslash", "https://github.com\\@evil.test/o/r"],
  ["space", "https://github.com/o/r tree"],
  ["encoded slash in a name", "https://github.com/o%2Fx/r"],
  ["encoded parent", "https://github.com/o/%2e%2e%2fr"],
  ["broken percent sign", "https://github.com/o/r%zz"],
  ["too long", `https://github.com/o/${"r".repeat(3000)}`],
])("refuses an address: %s", (_, url) => {
  expect(problem(() => shape(url))).toBe("invalid_url");
});

test("schemes that the operator switched on are taken as they are", () => {
  const { splits, host } = parseShape("file:///srv/git/app.git", { schemes: ["file"] });
  expect({ host, ...splits[0] }).toMatchObject({
    host: "",
    repo: "app",
    owner: "srv/git",
    cloneUrl: "file:///srv/git/app.git",
  });
  expect(parseShape("git://git.test/app", { schemes: ["git"] }).splits[0].cloneUrl).toBe("git://git.test/app");
});

test("names survive the way into an address and back, for every product", () => {
  // A fixed linear congruential generator: the same names in every run.
  let state = 42;
  const random = (bound: number) => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return state % bound;
  };
  const letters = [..."abcXYZ019._-+@~é日#?%& "];
  const name = () => `n${Array.from({ length: 1 + random(8) }, () => letters[random(letters.length)]).join("")}z`;
  for (let round = 0; round < 300; round++) {
    const [owner, repo, first, second] = [name(), name(), name(), name()] as const;
    const path = (...parts: string[]) => parts.map(encodeURIComponent).join("/");
    const cases: [string, string][] = [
      [`https://github.com/${path(owner, repo, "tree", first, second)}`, owner],
      [`https://gitlab.com/${path(owner, first, repo, "-", "tree", first, second)}`, `${owner}/${first}`],
      [`https://bitbucket.org/${path(owner, repo, "src", first, second)}`, owner],
    ];
    for (const [url, wantedOwner] of cases) {
      const [split] = shape(url).splits;
      expect(split).toMatchObject({ owner: wantedOwner, repo, target: { kind: "ref", path: [first, second] } });
      const [again] = shape(split.cloneUrl).splits;
      expect(again).toMatchObject({ owner: wantedOwner, repo, cloneUrl: split.cloneUrl });
    }
  }
});

test.each([
  ["GitHub.com", "github.com", "github"],
  ["https://github.com/", "github.com", "github"],
  ["github.com:443", "github.com", "github"],
  ["http://git.test:80", "git.test", "git"],
  ["localhost:3000", "localhost:3000", "git"],
  ["acme@dev.azure.com", "dev.azure.com", "azuredevops_entra"],
  ["dev.azure.com/Acme/", "dev.azure.com/acme", "azuredevops_entra"],
  ["acme.visualstudio.com", "dev.azure.com/acme", "azuredevops_entra"],
  ["dev.azure.com/special", "dev.azure.com/special", "git"],
  ["gh.corp.test", "gh.corp.test", "github"],
  ["[2001:db8::1]:3000", "[2001:db8::1]:3000", "git"],
])("host %s is %s of %s", (text, host, scmId) => {
  expect(normalizeHost(text, INTEGRATIONS)).toMatchObject({ host, scmId });
});

test.each([
  "",
  "  ",
  "github.com/o",
  "u:p@github.com",
  "u@github.com",
  "a b",
  "-x",
  "ssh://github.com",
  "x/y/z",
  "a?b",
  "a\nb",
])("host %j is none", (text) => expect(normalizeHost(text, INTEGRATIONS)).toBeUndefined());

test("tokens become the basic authentication that each product wants", () => {
  expect(gitCredentials("github", "t")).toEqual({ username: "x-access-token", password: "t" });
  expect(gitCredentials("gitlab", "t")).toEqual({ username: "oauth2", password: "t" });
  expect(gitCredentials("bitbucket", "t")).toEqual({ username: "x-token-auth", password: "t" });
  expect(gitCredentials("bitbucket", "u:t:x")).toEqual({ username: "u", password: "t:x" });
  expect(gitCredentials("git", "u:t:x")).toEqual({ username: "u", password: "t:x" });
  expect(gitCredentials("git", "t")).toEqual({ username: "git", password: "t" });
  expect(gitCredentials("git", ":t")).toEqual({ username: "git", password: ":t" });
});

test("only names that git accepts and cannot take for options are safe", () => {
  for (const name of ["main", "feature/x", "v1.0", "a@b", "日本", "@x", "a-b", "x{y}"])
    expect(isSafeRef(name), name).toBe(true);
  const bad = [
    "",
    "-x",
    "/x",
    "x/",
    "a//b",
    ".x",
    "a/.b",
    "x.lock",
    "a.lock/b",
    "x.",
    "a..b",
    "a b",
    "a~1",
    "a^",
    "a:b",
  ];
  for (const name of [
    ...bad,
    "a?",
    "a*",
    "a[b",
    "a\\b",
    "@",
    "a@{1}",
    "a\nb",
    "a\0b",
    "a\x7fb",
    "\ud800",
    "x".repeat(600),
  ]) {
    expect(isSafeRef(name), JSON.stringify(name)).toBe(false);
  }
  expect(safeRef("feature/x")).toBe("feature/x");
  expect(problem(() => safeRef("--upload-pack=id"))).toBe("invalid_url");
});
