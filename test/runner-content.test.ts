import { readdir } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type EnvironmentInitializer_Spec,
  EnvironmentPhase,
  GitInitializer_CloneTargetMode as Mode,
} from "../gen/gitpod/v1/environment_pb.js";
import { type GitServer, type Repository, startGitServer } from "./harness/git-server.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED } = EnvironmentPhase;

vi.setConfig({ testTimeout: 120_000 });

let git: GitServer;
let plane: FakeControlPlane;
let runner: TestRunner;
let repository: Repository;
beforeAll(async () => {
  git = await startGitServer();
  repository = await git.createRepository("acme/repo", {
    files: { "README.md": "main\n" },
    branches: { "feature/x": { "feature.txt": "x\n" }, same: { "branch.txt": "b\n" } },
    tags: { v1: "feature/x", same: "main" },
    refs: { "refs/hidden/one": { "hidden.txt": "h\n" } },
  });
  plane = await FakeControlPlane.start();
  runner = await TestRunner.create(plane, git.host);
  await runner.start();
});
afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await git.close();
});

type Specs = Parameters<typeof contentOf>;
const run = async (...specs: Specs) => {
  const id = plane.create(contentOf(...specs));
  const environment = await plane.untilPhase(id, RUNNING);
  return { id, content: environment.status?.content };
};
const fail = async (...specs: Specs) => {
  const id = plane.create(contentOf(...specs));
  const environment = await plane.untilPhase(id, STOPPED);
  return { id, messages: environment.status?.failureMessage ?? [], content: environment.status?.content };
};
const fromContext = (url: string) =>
  ({ spec: { case: "contextUrl", value: { url } } }) as unknown as ReturnType<typeof fromGit> &
    EnvironmentInitializer_Spec;
const reinitialize = async (id: string, session: string) => {
  plane.edit(id, (spec) => {
    if (spec.content) spec.content.session = session;
  });
  const done = await plane.until(
    id,
    ({ status }) =>
      status?.content?.session === session && status.content.phase === ContentPhase.READY && status.phase === RUNNING,
    "the new content",
  );
  return done.status?.content;
};

test.concurrent("ENV-39: every target mode ends on its commit, and on a branch where there is one", async () => {
  const head = repository.head;
  const feature = repository.refs["refs/heads/feature/x"] ?? "";
  const hidden = repository.refs["refs/hidden/one"] ?? "";
  const cases = [
    ["head", { targetMode: Mode.REMOTE_HEAD, cloneTarget: "ignored" }, head, "## main...origin/main"],
    [
      "branch",
      { targetMode: Mode.REMOTE_BRANCH, cloneTarget: "feature/x" },
      feature,
      "## feature/x...origin/feature/x",
    ],
    // A tag has the same name.
    ["unsaid", { cloneTarget: "same" }, repository.refs["refs/heads/same"] ?? "", "## same...origin/same"],
    ["local", { targetMode: Mode.LOCAL_BRANCH, cloneTarget: "mine" }, head, "## mine"],
    ["tag", { targetMode: Mode.REMOTE_TAG, cloneTarget: "v1" }, feature, "## HEAD (no branch)"],
    ["commit", { targetMode: Mode.REMOTE_COMMIT, cloneTarget: head.slice(0, 10) }, head, "## HEAD (no branch)"],
    // No branch or tag leads to it.
    ["hidden", { targetMode: Mode.REMOTE_COMMIT, cloneTarget: hidden }, hidden, "## HEAD (no branch)"],
  ] as const;
  const { id, content } = await run(
    ...cases.map(([checkoutLocation, target]) => fromGit(repository.url, { ...target, checkoutLocation })),
  );
  expect(content?.git).toMatchObject({ branch: "main", latestCommit: head });
  for (const [location, , commit, status] of cases) {
    expect(await runner.exec(id, `cd ../${location}; git rev-parse HEAD; git status -sb`)).toBe(`${commit}\n${status}`);
  }
});

test.concurrent("ENV-39: checkout locations, several repositories, an upstream", async () => {
  const { id, content } = await run(
    fromGit(repository.url, { checkoutLocation: "src/one", upstreamRemoteUri: git.url("upstream") }),
    fromGit(repository.url, { checkoutLocation: "two" }),
  );
  expect(content?.contentLocationInMachine).toBe(runner.folder(id, "workspace", "src/one"));
  expect(await runner.exec(id, "pwd; git remote -v | sort | cut -f1 | uniq; ls ../../two; ls -A ../..")).toBe(
    `${runner.folder(id, "workspace", "src/one")}\norigin\nupstream\nREADME.md\nsrc\ntwo`,
  );
});

test.concurrent("ENV-39: locations outside the workspace and foreign transports are refused", async () => {
  for (const bad of [
    fromGit(repository.url, { checkoutLocation: "../x" }),
    fromGit(repository.url, { checkoutLocation: ".partial-x" }),
    fromGit("ext::sh -c touch% /tmp/pwned"),
    fromGit("--upload-pack=touch /tmp/pwned"),
    fromGit("file:///etc"),
    fromGit(repository.url, { targetMode: Mode.REMOTE_BRANCH, cloneTarget: "--help" }),
  ]) {
    const { messages } = await fail(bad);
    expect(messages).toHaveLength(1);
    expect(messages[0]).toContain("content.initializer");
  }
  const { messages } = await fail(fromGit("http://127.0.0.1:9/x.git"));
  expect(messages[0]).toContain("http is only allowed");
});

test.concurrent("a context URL is resolved by the runner", async () => {
  const { content } = await run(fromContext(`${git.webUrl("acme/repo")}/src/branch/feature/x`));
  expect(content?.git?.branch).toBe("feature/x");
  const { messages } = await fail(fromContext(`${git.webUrl("acme/repo")}/src/branch/nope`));
  expect(messages.join()).toContain("not found");
});

test.concurrent("an empty workspace, and empty repositories", async () => {
  const scratch = await run();
  expect(scratch.content).toMatchObject({
    phase: ContentPhase.READY,
    contentLocationInMachine: runner.folder(scratch.id, "workspace"),
  });
  expect(scratch.content?.git).toBeUndefined();
  const empty = await git.createRepository("empty", { empty: true });
  const local = { targetMode: Mode.LOCAL_BRANCH, cloneTarget: "first", checkoutLocation: "local" };
  const { id } = await run(fromGit(empty.url), fromGit(empty.url, local));
  expect(await runner.exec(id, "git rev-parse --is-inside-work-tree; git -C ../local symbolic-ref HEAD")).toBe(
    "true\nrefs/heads/first",
  );
});

test.concurrent("ENV-13: what cannot be cloned fails the start in few words; the next start may work", async () => {
  const { id, messages, content } = await fail(fromGit(git.url("missing")));
  expect(messages).toEqual([`repository not found: ${git.url("missing")}`]);
  expect(content?.phase).toBe(ContentPhase.FAILED);
  expect(plane.environment(id).spec?.desiredPhase).toBe(STOPPED);
  await git.createRepository("missing");
  plane.startEnvironment(id);
  const again = await plane.untilPhase(id, RUNNING);
  expect(again.status?.failureMessage).toEqual([]);
  expect(await runner.exec(id, "ls -A ..")).toBe("missing");
});

test.concurrent("ENV-13: a sign-in, a missing ref and a dead host each have their text", async () => {
  const secret = await git.createRepository("secret", { private: { user: "u", password: "p" } });
  expect((await fail(fromGit(secret.url))).messages).toEqual([
    `authentication needed for ${new URL(secret.url).hostname}`,
  ]);
  for (const [targetMode, cloneTarget] of [
    [Mode.REMOTE_BRANCH, "nope"],
    [Mode.REMOTE_TAG, "nope"],
    [Mode.REMOTE_COMMIT, "0123456789012345678901234567890123456789"],
  ] as const) {
    const { messages } = await fail(fromGit(repository.url, { targetMode, cloneTarget }));
    expect(messages).toEqual([`ref not found: ${cloneTarget}`]);
  }
});

test.concurrent("a host that has moved a repository on itself is followed, not to other hosts", async () => {
  git.answer("/old.git", ({ path, query }) => ({
    status: 301,
    headers: { location: `${path.replace("/old.git", "/acme/repo.git")}?${query}` },
  }));
  const { id } = await run(fromGit(git.url("old")));
  expect(await runner.exec(id, "git remote get-url origin; git rev-parse HEAD")).toBe(
    `${repository.url}\n${repository.head}`,
  );
  git.answer("/away.git", { status: 302, headers: { location: "http://169.254.169.254/repo.git/info/refs" } });
  const { messages } = await fail(fromGit(git.url("away")));
  expect(messages.join()).toContain("redirects elsewhere");
});

test.concurrent("submodules come along, theirs too; those that must not or cannot be fetched are a warning", async () => {
  await git.createRepository("leaf", { files: { "leaf.txt": "l\n" } });
  await git.createRepository("part", { submodules: { leaf: "leaf" } });
  await git.createRepository("hidden-part", { private: { user: "u", password: "p" } });
  const whole = await git.createRepository("whole", { submodules: { sub: "part", hidden: "hidden-part" } });
  const closed = createServer();
  let reached = 0;
  closed.on("connection", (socket) => {
    reached++;
    socket.destroy();
  });
  await new Promise<void>((resolve) => closed.listen(0, "127.0.0.1", resolve));
  try {
    const { port } = closed.address() as AddressInfo;
    const foreign = `[submodule "foreign"]\n\tpath = sub\n\turl = http://127.0.0.1:${port}/x.git\n`;
    await git.commit("whole", { branch: "foreign", files: { ".gitmodules": foreign } });
    const { id, content } = await run(fromGit(whole.url));
    expect(await runner.exec(id, "cat sub/leaf/leaf.txt")).toBe("l");
    expect(content?.warningMessage).toBe("submodule hidden could not be fetched: authentication needed for 127.0.0.1");
    const other = await run(fromGit(whole.url, { cloneTarget: "foreign" }));
    expect(other.content?.warningMessage).toContain("submodule sub could not be fetched: http is only allowed");
    expect(reached).toBe(0);
  } finally {
    closed.close();
  }
});

test.concurrent("commits carry the name of the specification, which can change while it runs", async () => {
  const { id } = await run(fromGit(repository.url));
  expect(await runner.exec(id, "git config user.name; git config user.email")).toBe("Ada Lovelace\nada@example.com");
  plane.edit(id, (spec) => {
    if (spec.content) Object.assign(spec.content, { gitUsername: "-Grace", gitEmail: "" });
  });
  await expect
    .poll(() => runner.exec(id, "git config user.name; git config user.email || true"), { timeout: 10_000 })
    .toBe("-Grace");
});

test.concurrent("the git status follows what people do", async () => {
  const { id } = await run(fromGit(repository.url));
  await runner.exec(id, "git switch -qc work; echo more >> README.md; touch new; git commit -qam more");
  const seen = await plane.until(id, ({ status }) => status?.content?.git?.totalUnpushedCommits === 1, "the commit");
  expect(seen.status?.content?.git).toMatchObject({ branch: "work", totalChangedFiles: 1 });
});

test.concurrent("ENV-38: a new session replaces a clean checkout and sets changed files aside", async () => {
  const name = "renewed";
  const renewed = await git.createRepository(name);
  const { id } = await run(fromGit(renewed.url));
  const next = await git.commit(name, { files: { "next.txt": "n\n" } });
  const clean = await reinitialize(id, "second");
  expect(clean).toMatchObject({ warningMessage: "", git: { latestCommit: next } });
  expect(await readdir(runner.folder(id, "workspace"))).toEqual([name]);

  await runner.exec(id, "echo precious > work.txt");
  const changed = await reinitialize(id, "third");
  const backup = runner.folder(id, "workspace", ".berth-backup-second");
  expect(changed?.warningMessage).toContain(backup);
  expect(await runner.exec(id, `cat ${backup}/${name}/work.txt; git status --porcelain`)).toBe("precious");
  expect((await readdir(runner.folder(id, "workspace"))).sort()).toEqual([".berth-backup-second", name]);
});

test.concurrent("ENV-38: commits and stashes that were never pushed are set aside too", async () => {
  const { id } = await run(fromGit(repository.url));
  await runner.exec(id, "echo x >> README.md; git stash -q");
  expect((await reinitialize(id, "stashed"))?.warningMessage).toContain(".berth-backup-");
  await runner.exec(id, "git switch -qc other; git commit -q --allow-empty -m x; git switch -q main");
  expect((await reinitialize(id, "unpushed"))?.warningMessage).toContain(".berth-backup-stashed");
});

test.concurrent("a replacement that fails keeps the old tree and says so", async () => {
  const { id } = await run(fromGit(repository.url));
  await runner.exec(id, "echo precious > work.txt");
  plane.edit(id, (spec) => {
    const [first] = spec.content?.initializer?.specs ?? [];
    if (first?.spec.case === "git") first.spec.value.remoteUri = git.url("gone");
  });
  const kept = await reinitialize(id, "failing");
  expect(kept?.warningMessage).toContain("the content was not replaced: repository not found");
  expect(plane.environment(id).status?.failureMessage).toEqual([]);
  expect(await runner.exec(id, "cat work.txt; ls -A ..")).toBe("precious\nrepo");
});

test.concurrent("a hostile session name stays a name", async () => {
  const id = plane.create({ content: { ...contentOf(fromGit(repository.url)).content, session: "../../../../tmp/x" } });
  await plane.untilPhase(id, RUNNING);
  await runner.exec(id, "echo precious > work.txt");
  const content = await reinitialize(id, "plain");
  expect(content?.warningMessage).toMatch(/workspace\/\.berth-backup-[0-9a-f]{16}/);
});

test.concurrent("the workspace may hold links to anywhere: nothing outside is touched", async () => {
  const { id } = await run(fromGit(repository.url, { checkoutLocation: "deep/repo" }));
  await runner.exec(id, "cd ../..; mv deep old; ln -s /etc deep; rm -rf .devcontainer.json; ln -s /etc/shadow x");
  const content = await reinitialize(id, "linked");
  expect(content?.warningMessage).not.toBe("");
  const { readdirSync } = await import("node:fs");
  expect(readdirSync("/etc")).not.toContain("repo");
});
