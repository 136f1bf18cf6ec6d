import { create } from "@bufbuild/protobuf";
import { expect, test } from "vitest";
import {
  GitInitializer_CloneTargetMode as CloneTargetMode,
  type EnvironmentInitializer_Spec,
  EnvironmentInitializer_SpecSchema,
  EnvironmentInitializerSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { checkoutLocation, initializerProblems, repositoryName, sameRepository } from "../src/scm/initializer.ts";

const FIELD = "spec.content.initializer";
const SHA = "0123456789abcdef0123456789abcdef01234567";

type GitFields = Partial<{
  remoteUri: string;
  upstreamRemoteUri: string;
  targetMode: CloneTargetMode;
  cloneTarget: string;
  checkoutLocation: string;
}>;

const git = (value: GitFields): EnvironmentInitializer_Spec =>
  create(EnvironmentInitializer_SpecSchema, {
    spec: { case: "git", value: { remoteUri: "https://github.com/o/r.git", ...value } },
  });
const context = (url: string): EnvironmentInitializer_Spec =>
  create(EnvironmentInitializer_SpecSchema, { spec: { case: "contextUrl", value: { url } } });

/** Fields with a problem. */
function faults(specs: EnvironmentInitializer_Spec[], schemes: string[] = []): string[] {
  const initializer = create(EnvironmentInitializerSchema, { specs });
  return initializerProblems(initializer, { schemes, field: FIELD }).map(({ field }) => field.replace(`${FIELD}.`, ""));
}

test("an absent or empty initializer is fine", () => {
  expect(initializerProblems(undefined, { schemes: [], field: FIELD })).toEqual([]);
  expect(faults([])).toEqual([]);
});

test("ENV-39 problems name the proto path and say what is wrong", () => {
  const initializer = create(EnvironmentInitializerSchema, {
    specs: [git({ remoteUri: "ext::sh -c id" }), context("x")],
  });
  expect(initializerProblems(initializer, { schemes: [], field: FIELD })).toEqual([
    {
      field: "spec.content.initializer.specs[0].git.remote_uri",
      message: "must not contain spaces, control characters or backslashes",
    },
    { field: "spec.content.initializer.specs[1].context_url.url", message: "must be an absolute URL" },
  ]);
});

test.each([
  "https://github.com/o/r.git",
  "https://user@github.com/o/r",
  "https://me%40corp.test@github.com/o/r",
  "HTTPS://GitHub.com/o/r",
  "ssh://git@git.test:2222/o/r.git",
  "git@github.com:o/r.git",
  "git@github.com:/srv/r.git",
  "https://[2001:db8::1]/o/r",
])("clones from %s", (remoteUri) => {
  expect(faults([git({ remoteUri })])).toEqual([]);
  expect(faults([git({ upstreamRemoteUri: remoteUri })])).toEqual([]);
});

const HOSTILE = [
  "ext::sh",
  "ext::sh -c touch% /tmp/x",
  "fd::17",
  "--upload-pack=touch /tmp/x",
  "-oProxyCommand=id",
  "https://u:p@github.com/o/r",
  "https://ghp_0123456789abcdef@github.com/o/r",
  "ssh://git:pw@git.test/o/r",
  "ssh://-oProxyCommand=id/o/r",
  "ssh://-l@git.test/o/r",
  "ssh://git@%2doProxyCommand=id/o/r",
  "git@-oProxyCommand=id:o/r",
  "-git@git.test:o/r",
  "git@git.test:-o/r",
  "file:///etc",
  "/etc/passwd",
  "./r",
  "C:\\repo",
  "http://github.com/o/r",
  "git://github.com/o/r",
  "ftp://github.com/o/r",
  "javascript:alert(1)",
  "https://",
  "https:///o/r",
  "https:github.com/o/r",
  "https://a@b@github.com/o/r",
  "https://git%68ub.com/o/r",
  "https://github\u3002com/o/r",
  "https://github.com",
  "https://github.com/",
  "https://github.com/o/r\n",
  "https://github.com/o/r%0aevil",
  "https://github.com/o/r\0",
  "https://github.com/o/%00r",
  "https://github.com/o/r x",
  "https://github.com\\@evil.test/o/r",
  "https://git hub.com/o/r",
  `https://github.com/${"r".repeat(3000)}`,
  "\ud800https://github.com/o/r",
];

test.each(HOSTILE)("ENV-39 refuses %j as remote, upstream and context URL", (text) => {
  expect(faults([git({ remoteUri: text })])).toEqual(["specs[0].git.remote_uri"]);
  expect(faults([git({ upstreamRemoteUri: text })])).toEqual(["specs[0].git.upstream_remote_uri"]);
  expect(faults([context(text)])).toEqual(["specs[0].context_url.url"]);
});

test("a remote is required, and so is one of the two forms", () => {
  expect(faults([git({ remoteUri: "" })])).toEqual(["specs[0].git.remote_uri"]);
  expect(faults([context("")])).toEqual(["specs[0].context_url.url"]);
  expect(faults([create(EnvironmentInitializer_SpecSchema, {})])).toEqual(["specs[0]"]);
});

test("further schemes are accepted once the operator switched them on", () => {
  for (const [scheme, uri] of [
    ["file", "file:///srv/git/r.git"],
    ["http", "http://git.test/o/r"],
    ["git", "git://git.test/o/r"],
  ] as const) {
    expect(faults([git({ remoteUri: uri })])).toEqual(["specs[0].git.remote_uri"]);
    expect(faults([git({ remoteUri: uri })], [scheme])).toEqual([]);
    expect(faults([context(uri)], [scheme])).toEqual([]);
  }
  expect(faults([git({ remoteUri: "file://evil.test/srv/r" })], ["file"])).toEqual(["specs[0].git.remote_uri"]);
  expect(faults([context("ssh://git@github.com/o/r")])).toEqual(["specs[0].context_url.url"]);
});

const { UNSPECIFIED, REMOTE_HEAD, REMOTE_COMMIT, REMOTE_BRANCH, LOCAL_BRANCH, REMOTE_TAG } = CloneTargetMode;

test.each([
  [UNSPECIFIED, ["", "main", "feature/x"], ["-x", "a b", "a..b"]],
  [REMOTE_HEAD, ["", "ignored ~ anyway"], []],
  [
    REMOTE_COMMIT,
    [SHA, SHA.slice(0, 7), SHA.toUpperCase(), "a".repeat(64)],
    ["", "main", "abc", `${SHA}0`, "--", `${SHA}\n`],
  ],
  [REMOTE_BRANCH, ["main", "feature/x"], ["", "-b", "x\n", "x\0", "a:b", "HEAD^", "@{-1}", "x.lock"]],
  [LOCAL_BRANCH, ["mine"], ["", "--orphan", "a b"]],
  [REMOTE_TAG, ["v1.0"], ["", "-d", "v1^{}"]],
])("ENV-39 clone targets of mode %i", (targetMode, good, bad) => {
  for (const cloneTarget of good) expect(faults([git({ targetMode, cloneTarget })]), cloneTarget).toEqual([]);
  for (const cloneTarget of bad) {
    expect(faults([git({ targetMode, cloneTarget })]), JSON.stringify(cloneTarget)).toEqual([
      "specs[0].git.clone_target",
    ]);
  }
});

test("an unknown mode is refused", () => {
  expect(faults([git({ targetMode: 99 as CloneTargetMode })])).toEqual(["specs[0].git.target_mode"]);
});

test("ENV-39 checkout locations stay inside the workspace", () => {
  for (const checkoutLocation of ["app", "a/b", "./a", "a/", "...", "a..b", ".config"]) {
    expect(faults([git({ checkoutLocation })]), checkoutLocation).toEqual([]);
  }
  const bad = [
    "/a",
    "..",
    "../x",
    "a/../b",
    "a/..",
    ".",
    "./",
    "//",
    "a\\..\\b",
    "a\nb",
    "a\0",
    "-x",
    ".partial-1",
    ".berth-backup-1",
  ];
  for (const checkoutLocation of [...bad, "x".repeat(300), "é".repeat(200), "a/".repeat(300)]) {
    expect(faults([git({ checkoutLocation })]), JSON.stringify(checkoutLocation)).toEqual([
      "specs[0].git.checkout_location",
    ]);
  }
});

test("checkout locations are unique, the defaults included", () => {
  const other = git({ remoteUri: "https://github.com/x/r" });
  expect(faults([git({}), other])).toEqual(["specs[1].git.checkout_location"]);
  expect(faults([git({}), git({ checkoutLocation: "./r/" })])).toEqual(["specs[1].git.checkout_location"]);
  expect(faults([git({}), context("https://github.com/x/r/tree/main")])).toEqual(["specs[1].context_url.url"]);
  expect(faults([git({}), git({ checkoutLocation: "r2" })])).toEqual([]);
  expect(checkoutLocation(git({ checkoutLocation: "./a//b/" }))).toBe("a/b");
  expect(checkoutLocation(git({}))).toBe("r");
});

test("there may be 16 specs, or fewer where the caller says so", () => {
  const specs = Array.from({ length: 17 }, (_, index) => git({ checkoutLocation: `r${index}` }));
  expect(faults(specs)).toEqual(["specs"]);
  expect(faults(specs.slice(0, 16))).toEqual([]);
  const initializer = create(EnvironmentInitializerSchema, { specs: specs.slice(0, 11) });
  expect(initializerProblems(initializer, { schemes: [], field: "initializer", maxSpecs: 10 })).toEqual([
    { field: "initializer.specs", message: "must have at most 10 entries" },
  ]);
});

test.each([
  ["https://github.com/o/r.git", "r"],
  ["https://github.com/o/r/tree/main/dir", "r"],
  ["https://gitlab.com/g/s/p/-/merge_requests/1", "p"],
  ["https://dev.azure.com/o/p/_git/r%20x?version=GBmain", "r x"],
  ["https://git.test/o/r/src/branch/main", "r"],
  ["https://git.test/deep/er/r", "r"],
  ["git@github.com:o/r.git", "r"],
  ["ssh://git@git.test/o/r.git", "r"],
  ["file:///srv/r.git", "r"],
  ["not an address", "repository"],
  ["https://git.test/o/..%2f..%2fetc", "repository"],
  ["https://git.test/o/-x", "repository"],
])("repository of %s is %s", (url, name) => {
  expect(repositoryName(url)).toBe(name);
});

test("a git spec is named after its remote as it stands, no spec has no name", () => {
  expect(repositoryName(git({ remoteUri: "https://git.test/o/r/src/branch/main" }))).toBe("main");
  expect(repositoryName(context("https://github.com/o/r/pull/1"))).toBe("r");
  expect(repositoryName(undefined)).toBe("");
});

test.each([
  ["https://github.com/O/R.git", "https://GITHUB.com/o/r/", true],
  ["https://me@github.com/o/r", "git@github.com:o/r.git", true],
  ["ssh://git@github.com:22/o/r", "https://github.com/o/r", true],
  ["https://git.test/o/r.git", "https://git.test:443/o/r", true],
  ["git@git.test:o/r.git", "https://git.test/o/r", true],
  ["https://git.test/o/R", "https://git.test/o/r", false],
  ["https://git.test:8443/o/r", "https://git.test/o/r", false],
  ["https://github.com/o/r", "https://gitlab.com/o/r", false],
  ["https://github.com/o/r", "https://github.com/o/r2", false],
  ["https://dev.azure.com/o/_git/r", "https://o.visualstudio.com/r/_git/r", true],
  ["nonsense", "nonsense", false],
])("RUN-40 %s and %s are the same repository: %s", (first, second, same) => {
  expect(sameRepository(first, second)).toBe(same);
  expect(sameRepository(second, first)).toBe(same);
});
