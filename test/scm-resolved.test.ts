import { create } from "@bufbuild/protobuf";
import { expect, test } from "vitest";
import {
  EnvironmentGitStatusSchema,
  EnvironmentInitializerSchema,
  GitInitializer_CloneTargetMode as Mode,
} from "../gen/gitpod/v1/environment_pb.js";
import { resolvedInitializer } from "../src/scm/resolved.ts";
import { contextUrl, git } from "./harness/projects.ts";

const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const { REMOTE_HEAD, REMOTE_BRANCH, REMOTE_TAG, REMOTE_COMMIT } = Mode;

/** The git initializer that an address became, by the branch that is checked out; detached without one. */
function resolved(url: string, branch: string, cloneUrl: string) {
  const initializer = create(EnvironmentInitializerSchema, { specs: [contextUrl(url)] });
  const checkout = create(EnvironmentGitStatusSchema, { cloneUrl, branch, latestCommit: COMMIT });
  const { spec } = resolvedInitializer(initializer, checkout)?.specs[0] ?? {};
  if (spec?.case !== "git") return spec?.case;
  const { remoteUri, targetMode, cloneTarget, upstreamRemoteUri } = spec.value;
  return [remoteUri, Mode[targetMode], cloneTarget, upstreamRemoteUri].filter(Boolean).join(" ");
}

const GITHUB = "https://github.com/team/app";

test.each<[page: string, branch: string, mode: Mode, target: string]>([
  ["", "main", REMOTE_HEAD, ""],
  ["/issues/7", "main", REMOTE_HEAD, ""],
  // Somebody has checked out another branch since.
  ["", "mine", REMOTE_HEAD, ""],
  ["/tree/dev", "mine", REMOTE_BRANCH, "dev"],
  ["/tree/a/b/file", "mine", REMOTE_HEAD, ""],
  ["/tree/a/b/file", "a/b", REMOTE_BRANCH, "a/b"],
  ["/tree/ab/file", "a", REMOTE_HEAD, ""],
  ["/tree/v1", "", REMOTE_TAG, "v1"],
  ["/tree/v1/src", "", REMOTE_COMMIT, COMMIT],
  [`/tree/${COMMIT.slice(0, 9)}`, "", REMOTE_COMMIT, COMMIT],
  [`/commit/${COMMIT.slice(0, 9)}`, "", REMOTE_COMMIT, COMMIT],
  [`/commit/${"f".repeat(9)}`, "main", REMOTE_COMMIT, "f".repeat(9)],
  ["/releases/tag/v1/rc", "", REMOTE_TAG, "v1/rc"],
  ["/pull/7", "fix", REMOTE_BRANCH, "fix"],
  ["/pull/7", "", REMOTE_COMMIT, COMMIT],
])("%s on branch '%s'", (page, branch, mode, target) => {
  const expected = [`${GITHUB}.git`, Mode[mode], target].filter(Boolean).join(" ");
  expect(resolved(`${GITHUB}${page}`, branch, `${GITHUB}.git`)).toBe(expected);
});

test("the scheme is that of the address; a renamed repository is the one that was cloned", () => {
  expect(resolved("http://git.example.org/a/b", "main", "https://git.example.org/a/b.git")).toBe(
    "http://git.example.org/a/b.git REMOTE_HEAD",
  );
  expect(resolved(GITHUB, "main", "https://github.com/team/renamed.git")).toBe(
    "https://github.com/team/renamed.git REMOTE_HEAD",
  );
  expect(resolved(`${GITHUB}/pull/7`, "fix", "https://github.com/fork/app.git")).toBe(
    `https://github.com/fork/app.git REMOTE_BRANCH fix ${GITHUB}.git`,
  );
});

test("what is not known stays as it is, and nothing stays nothing", () => {
  expect(resolved(GITHUB, "", "")).toBe("contextUrl");
  const specs = [git(`${GITHUB}.git`, { cloneTarget: "x" }), contextUrl(GITHUB)];
  const initializer = create(EnvironmentInitializerSchema, { specs });
  expect(resolvedInitializer(initializer, undefined)).toEqual(initializer);
  expect(resolvedInitializer(create(EnvironmentInitializerSchema), undefined)).toBeUndefined();
  expect(resolvedInitializer(undefined, undefined)).toBeUndefined();
});
