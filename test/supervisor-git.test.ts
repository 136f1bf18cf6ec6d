import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Code } from "@connectrpc/connect";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { FileChange_ChangeType as ChangeType } from "../gen/gitpod/v1/environment_pb.js";
import { gitStatus, httpsCloneUrl } from "../src/runner/supervisor/git-status.ts";
import { failure, isRoot, type TestEnvironment, testEnvironment } from "./supervisor-harness.ts";

let environment: TestEnvironment;

beforeEach(async () => {
  environment = await testEnvironment();
});
afterEach(async () => await environment[Symbol.asyncDispose]());

const script = (text: string) => environment.script(text);

const status = (directory = environment.workspace, timeoutMs?: number) => {
  const { root, uid, gid } = environment.config;
  return gitStatus({ directory, env: { PATH: process.env.PATH ?? "", HOME: join(root, "home") }, uid, gid, timeoutMs });
};

const CLONE = `
  git init -q -b main --bare ../origin.git
  git init -q -b main .
  git remote add upstream https://example.com/upstream.git
  git remote add origin https://user:secret@example.com/group/repo.git
  git config remote.origin.pushurl ../origin.git
  seq 100 > kept; seq 200 300 > moved; echo gone > gone; echo 'a b' > 'with space'
  git add .; git commit -qm base; git push -q origin main; git update-ref refs/remotes/origin/main main`;

describe("the git status of a checkout", () => {
  test("branch, commit, address, changes and unpushed commits, as GetGitStatus answers them", async () => {
    script(`${CLONE}
      git mv moved 'new name'; rm gone; echo more >> kept; echo x > added; git add added
      mkdir dir; echo u > dir/u1; echo u > dir/u2; echo 'changed' > 'with space'
      git commit -q --allow-empty -m 'ahead: one'`);
    script("echo again >> kept; git checkout -q -b other; git commit -q --allow-empty -m two; git checkout -q main");
    const commit = script("git rev-parse HEAD");
    const found = await status();
    expect(found).toMatchObject({
      branch: "main",
      latestCommit: commit,
      cloneUrl: "https://example.com/group/repo.git",
    });
    const ids = script("git log --format=%h -1 main; git log --format=%h -1 other").split("\n");
    expect(found.unpushedCommits.toSorted()).toEqual([`${ids[0]}: ahead: one`, `${ids[1]}: two`].toSorted());
    expect(found.totalUnpushedCommits).toBe(2);
    const changes = found.changedFiles.map(({ path, changeType, oldPath }) => [path, ChangeType[changeType], oldPath]);
    // The commit above took what had been staged: the rename and the added file.
    expect(changes).toEqual([
      ["gone", "DELETED", ""],
      ["kept", "MODIFIED", ""],
      ["with space", "MODIFIED", ""],
      ["dir/u1", "UNTRACKED", ""],
      ["dir/u2", "UNTRACKED", ""],
    ]);
    expect(found.totalChangedFiles).toBe(5);
    await environment.launch();
    expect((await environment.client.getGitStatus({})).status).toEqual(found);
  });

  test("staged renames, additions, deletions and conflicts", async () => {
    script(`${CLONE}
      git checkout -q -b side; echo side > kept; git commit -qam side; git checkout -q main; echo main > kept; git commit -qam main
      git merge side || true
      git mv moved 'new name'; git rm -q gone; echo x > added; git add added; echo y > both; git add both; rm both`);
    const { changedFiles } = await status();
    expect(changedFiles.map(({ path, changeType, oldPath }) => [path, ChangeType[changeType], oldPath])).toEqual([
      ["added", "ADDED", ""],
      ["both", "DELETED", ""],
      ["gone", "DELETED", ""],
      ["new name", "RENAMED", "moved"],
      ["kept", "UPDATED_BUT_UNMERGED", ""],
    ]);
  });

  test("at most 100 files and commits are listed, totals are exact, long paths are shortened", async () => {
    const deep = `${"d".repeat(200)}/${"e".repeat(200)}`;
    script(`${CLONE}
      mkdir -p ${deep.split("/")[0]}; echo x > ${deep}
      seq -f 'file-%04g' 150 | xargs touch
      for n in $(seq 105); do git commit -q --allow-empty -m "commit $n"; done`);
    const found = await status();
    expect([found.changedFiles.length, found.totalChangedFiles]).toEqual([100, 151]);
    expect([found.unpushedCommits.length, found.totalUnpushedCommits]).toEqual([100, 105]);
    expect(found.unpushedCommits[0]).toMatch(/: commit 105$/);
    expect(found.changedFiles[0]?.path).toBe(`…${deep.slice(-254)}`);
  });

  test("a hundred thousand files, all of them changed, are counted and soon", async () => {
    script("git init -q -b main .");
    const files = Array.from({ length: 100_000 }, (_, n) => `M 644 :1 d${n % 100}/f${n}\n`).join("");
    const stream = `blob\nmark :1\ndata 2\nx\ncommit refs/heads/main\ncommitter T <t@example.com> 0 +0000\ndata 0\n${files}`;
    await environment.put("workspace/stream", stream);
    script("git fast-import --quiet < ../stream; git reset -q --mixed");
    const started = performance.now();
    const found = await status();
    expect([found.changedFiles.length, found.totalChangedFiles]).toEqual([100, 100_000]);
    await environment.launch();
    const { changedFiles, totalChangedFiles } = await environment.client.getGitDiffFiles({});
    expect([changedFiles.length, totalChangedFiles]).toEqual([10_000, 100_000]);
    expect(performance.now() - started).toBeLessThan(20_000);
  });

  test("no commit yet, a detached head, no remote", async () => {
    script("git init -q -b start .");
    expect(await status()).toMatchObject({ branch: "start", latestCommit: "", cloneUrl: "", totalUnpushedCommits: 0 });
    script("git commit -q --allow-empty -m only; git checkout -q --detach; git commit -q --allow-empty -m loose");
    expect(await status()).toMatchObject({
      branch: "",
      latestCommit: script("git rev-parse HEAD"),
      totalUnpushedCommits: 2,
    });
  });

  test("no repository is FAILED_PRECONDITION, also below one and in a bare one", async () => {
    await failure(status(), Code.FailedPrecondition);
    script("git init -q ..");
    await failure(status(), Code.FailedPrecondition);
    script("git init -q --bare .");
    await failure(status(), Code.FailedPrecondition);
    await failure(status(join(environment.workspace, "missing")), Code.FailedPrecondition);
    await environment.launch();
    await failure(environment.client.getGitStatus({}), Code.FailedPrecondition);
  });

  test("what the repository's configuration would start is not started", async () => {
    script(`${CLONE}
      printf '#!/bin/sh\\ntouch ${environment.workspace}/started\\n' > ../evil; chmod +x ../evil
      git config core.fsmonitor ${environment.config.root}/workspace/evil
      git config core.pager ../evil; git config log.showSignature true; git config gpg.program ../evil
      mkdir -p .git/hooks; cp ../evil .git/hooks/post-index-change; touch kept`);
    expect((await status()).branch).toBe("main");
    expect(existsSync(join(environment.workspace, "started"))).toBe(false);
  });

  test("a git that hangs is given up, with everything it started", async () => {
    script(`${CLONE}
      git config filter.slow.clean 'sleep 300'; echo 'kept filter=slow' > .gitattributes; tr 1 2 < kept > same-size; mv same-size kept`);
    await failure(status(environment.workspace, 500), Code.DeadlineExceeded);
  });

  test.runIf(isRoot)("a repository of somebody else is refused, not trusted", async () => {
    rmSync(environment.workspace, { recursive: true });
    mkdirSync(environment.workspace);
    execFileSync("git", ["init", "-q", environment.workspace]);
    writeFileSync(join(environment.workspace, "file"), "");
    const { rawMessage } = await failure(status(), Code.FailedPrecondition);
    expect(rawMessage).toContain("dubious ownership");
  });
});

test.each([
  ["git@github.com:owner/repo.git", "https://github.com/owner/repo.git"],
  ["github.com:owner/repo", "https://github.com/owner/repo"],
  ["ssh://git@host.example:2222/owner/repo.git", "https://host.example/owner/repo.git"],
  ["git+ssh://git@host/owner/repo", "https://host/owner/repo"],
  ["git://host/owner/repo.git", "https://host/owner/repo.git"],
  ["https://user:token@host/owner/repo.git", "https://host/owner/repo.git"],
  ["http://user:token@host:3000/owner/repo.git", "http://host:3000/owner/repo.git"],
  ["file:///srv/repo.git", "file:///srv/repo.git"],
  ["/srv/a:b.git", "/srv/a:b.git"],
  ["../relative", "../relative"],
])("clone address of %s is %s", (remote, shown) => {
  expect(httpsCloneUrl(remote)).toBe(shown);
});
