import { symlinkSync } from "node:fs";
import { join } from "node:path";
import { Code } from "@connectrpc/connect";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { FileChange_ChangeType as ChangeType, type FileChange } from "../gen/gitpod/v1/environment_pb.js";
import type { GitHunk } from "../gen/supervisor/v1/environmentopts_pb.js";
import { parseHunks } from "../src/runner/supervisor/git-diff.ts";
import { failure, type TestEnvironment, testEnvironment } from "./supervisor-harness.ts";

const MIB = 1024 * 1024;
let environment: TestEnvironment;
let client: TestEnvironment["client"];
const script = (text: string) => environment.script(text);

beforeEach(async () => {
  environment = await testEnvironment();
  await environment.launch();
  client = environment.client;
});
afterEach(async () => await environment[Symbol.asyncDispose]());

/** A repository on `topic`, one commit ahead of `main`, which has moved on since. */
const BRANCHES = `
  git init -q -b main .
  seq 20 > numbers; echo keep > same; seq 100 140 > old-name; echo bye > gone; printf 'a\\0b' > image; mkdir dir; echo x > dir/x
  git add .; git commit -qm base; git tag base
  git checkout -qb topic; sed -i 's/^3$/three/' numbers; git commit -qam topic
  git checkout -q main; echo later > later; git add later; git commit -qm main; git checkout -q topic`;

const shown = (change: FileChange | undefined) =>
  change && [change.path, ChangeType[change.changeType], ...(change.oldPath ? [change.oldPath] : [])];
const plain = (hunk: GitHunk) => {
  const { $typeName, ...fields } = hunk;
  return fields;
};
const text = (content: Uint8Array) => Buffer.from(content).toString();

describe("GetGitDiff", () => {
  test("hunks of a changed file against HEAD, with the context that is asked for", async () => {
    script(`${BRANCHES}; sed -i -e 's/^5$/five/' -e '18d' numbers`);
    const { fileChange, hunks, isBinary } = await client.getGitDiff({ path: "numbers", unified: 1 });
    expect(shown(fileChange)).toEqual(["numbers", "MODIFIED"]);
    expect(isBinary).toBe(false);
    expect(hunks.map(plain)).toEqual([
      {
        ...{ originalStartLine: 4, originalLines: 3, newStartLine: 4, newLines: 3 },
        ...{ originalNoNewlineAt: 0, section: "three", startPosition: 1 },
        body: " 4\n-5\n+five\n 6\n",
      },
      {
        ...{ originalStartLine: 17, originalLines: 3, newStartLine: 17, newLines: 2 },
        ...{ originalNoNewlineAt: 0, section: "three", startPosition: 6 },
        body: " 17\n-18\n 19\n",
      },
    ]);
    const bare = await client.getGitDiff({ path: "numbers" });
    expect(bare.hunks.map(({ body }) => body)).toEqual(["-5\n+five\n", "-18\n"]);
    expect(bare.hunks[1]).toMatchObject({ originalStartLine: 18, originalLines: 1, newStartLine: 17, newLines: 0 });
    const all = await client.getGitDiff({ path: join(environment.workspace, "numbers"), unified: 2_147_483_647 });
    expect(all.hunks).toHaveLength(1);
  });

  test("with a base it starts where the branches parted, whatever is committed", async () => {
    script(`${BRANCHES}; echo more >> numbers`);
    const { hunks } = await client.getGitDiff({ path: "numbers", baseRef: "main" });
    expect(hunks.map(({ body }) => body)).toEqual(["-3\n+three\n", "+more\n"]);
    expect(await client.getGitDiff({ path: "later", baseRef: "base" }).catch(({ code }) => code)).toBe(Code.NotFound);
    const tagged = await client.getGitDiff({ path: "numbers", baseRef: "HEAD~1" });
    expect(tagged.hunks).toEqual(hunks);
  });

  test("staged, untracked, deleted, renamed and unchanged files", async () => {
    script(`${BRANCHES}
      echo s > staged; git add staged; printf 'u\\n\\nv' > untracked; rm gone; git mv old-name 'new name'; echo 141 >> 'new name'
      echo ignored > .gitignore; echo i > ignored; : > empty; chmod +x same`);
    const diff = async (path: string) => {
      const { fileChange, hunks } = await client.getGitDiff({ path, unified: 3 });
      return [shown(fileChange), hunks.map(({ body }) => body)];
    };
    expect(await diff("staged")).toEqual([["staged", "ADDED"], ["+s\n"]]);
    expect(await diff("untracked")).toEqual([["untracked", "UNTRACKED"], ["+u\n+\n+v"]]);
    expect(await diff("gone")).toEqual([["gone", "DELETED"], ["-bye\n"]]);
    expect(await diff("new name")).toEqual([["new name", "RENAMED", "old-name"], [" 138\n 139\n 140\n+141\n"]]);
    expect(await diff("empty")).toEqual([["empty", "UNTRACKED"], []]);
    expect(await diff("same")).toEqual([["same", "MODIFIED"], []]);
    expect(await diff("numbers")).toEqual([undefined, []]);
    expect(await diff("ignored")).toEqual([undefined, []]);
  });

  test("names that mean something to git or to a shell are only names", async () => {
    script(BRANCHES);
    const names = ["-", "--cached", "*", ":(top)numbers", "a'b\"c", "ü\n.txt", "-U5"];
    for (const name of names) await environment.put(`workspace/repo/${name}`, "new\n");
    for (const name of names) {
      const { fileChange, hunks } = await client.getGitDiff({ path: `./${name}` });
      expect([shown(fileChange), hunks[0]?.body]).toEqual([[name, "UNTRACKED"], "+new\n"]);
    }
  });

  test("binary files have no hunks", async () => {
    script(
      `${BRANCHES}; printf 'a\\0c' > image; printf '\\0' > fresh; echo 'dir/x -diff' > .gitattributes; echo y > dir/x`,
    );
    for (const [path, type] of [
      ["image", "MODIFIED"],
      ["fresh", "UNTRACKED"],
      ["dir/x", "MODIFIED"],
    ]) {
      const { fileChange, hunks, isBinary } = await client.getGitDiff({ path });
      expect([shown(fileChange), hunks, isBinary]).toEqual([[path, type], [], true]);
    }
  });

  test("a missing final newline is told for the side that lacks it", async () => {
    script(`${BRANCHES}; printf 'a\\nb' > one; printf 'a\\nb\\n' > other; printf 'a\\nb' > both; git add .; git commit -qm ends
      printf 'a\\nb\\n' > one; printf 'a\\nb' > other; printf 'c\\nb' > both`);
    const of = async (path: string) => (await client.getGitDiff({ path, unified: 3 })).hunks[0];
    expect(await of("one")).toMatchObject({ body: " a\n-b\n+b\n", originalNoNewlineAt: 6 });
    expect(await of("other")).toMatchObject({ body: " a\n-b\n+b", originalNoNewlineAt: 0 });
    expect(await of("both")).toMatchObject({ body: "-a\n+c\n b", originalNoNewlineAt: 0 });
  });

  test("a repository without a commit: everything is new", async () => {
    script("git init -q .; echo a > staged; git add staged; echo b > loose");
    expect(shown((await client.getGitDiff({ path: "staged" })).fileChange)).toEqual(["staged", "ADDED"]);
    expect(shown((await client.getGitDiff({ path: "loose" })).fileChange)).toEqual(["loose", "UNTRACKED"]);
    await failure(client.getGitDiff({ path: "loose", baseRef: "main" }), Code.NotFound);
  });

  test("what the configuration would have git do is not done", async () => {
    script(`${BRANCHES}
      printf '#!/bin/sh\\ntouch ${environment.workspace}/started\\n' > ../evil; chmod +x ../evil
      git config diff.external ../evil; git config diff.x.textconv ../evil; git config diff.x.command ../evil
      git config color.ui always; git config diff.noprefix true; git config diff.suppressBlankEmpty true
      git config diff.interHunkContext 50; git config core.fsmonitor ../evil; git config diff.renames copies
      echo '* diff=x' > .gitattributes; sed -i -e 's/^1$/one/' -e 's/^20$/twenty/' numbers; echo >> same; echo z >> same`);
    const { hunks } = await client.getGitDiff({ path: "numbers" });
    expect(hunks.map(({ body }) => body)).toEqual(["-1\n+one\n", "-20\n+twenty\n"]);
    expect((await client.getGitDiff({ path: "same", unified: 1 })).hunks[0]?.body).toBe(" keep\n+\n+z\n");
    await failure(client.readFile({ path: "started" }), Code.NotFound);
  });

  test("a diff above 8 MiB is RESOURCE_EXHAUSTED", async () => {
    script(`${BRANCHES}; seq 2000000 > numbers`);
    await failure(client.getGitDiff({ path: "numbers" }), Code.ResourceExhausted);
  });
});

describe("paths and refs that git calls refuse", () => {
  test("paths outside of the repository, and those that are no files", async () => {
    script(`${BRANCHES}; git init -q sub; cd sub; git commit -q --allow-empty -m sub; cd ..
      git -c protocol.file.allow=always submodule --quiet add ./sub sub 2>/dev/null || git add sub; echo s > sub/file`);
    symlinkSync("/etc", join(environment.workspace, "link"));
    for (const call of [client.getGitDiff, client.getFileDiffContent]) {
      for (const path of ["", "a\0b", ".", "..", "../x", "/etc/passwd", ".git/config", ".git", environment.workspace]) {
        await failure(call({ path }), Code.InvalidArgument);
      }
      await failure(call({ path: "link/passwd" }), Code.InvalidArgument);
      await failure(call({ path: "sub/file" }), Code.InvalidArgument);
      await failure(call({ path: "dir" }), Code.FailedPrecondition);
      await failure(call({ path: "missing" }), Code.NotFound);
      await failure(call({ path: "x".repeat(300) }), Code.NotFound);
    }
    await failure(client.getGitDiff({ path: "numbers", unified: -1 }), Code.InvalidArgument);
  });

  test("refs: what looks like an option, what is unknown, what has nothing in common", async () => {
    script(`${BRANCHES}; git checkout -q --orphan other; git commit -qm other; git checkout -q topic`);
    const calls = [
      (baseRef: string) => client.getGitDiff({ path: "numbers", baseRef }),
      (baseRef: string) => client.getFileDiffContent({ path: "numbers", baseRef }),
      (baseRef: string) => client.getGitDiffFiles({ baseRef }),
    ];
    for (const call of calls) {
      for (const ref of ["-p", "--output=/tmp/x", "a\0b", "x".repeat(2000)]) {
        await failure(call(ref), Code.InvalidArgument);
      }
      for (const ref of ["nowhere", "main..topic", "^main", "HEAD:numbers", "main^{tree}", " ", "0".repeat(40)]) {
        await failure(call(ref), Code.NotFound);
      }
      await failure(call("other"), Code.FailedPrecondition);
    }
  });

  test("no repository is FAILED_PRECONDITION, also below one", async () => {
    const calls = [
      () => client.getGitDiff({ path: "a" }),
      () => client.getGitDiff({ path: "a", baseRef: "main" }),
      () => client.getFileDiffContent({ path: "a" }),
      () => client.getGitDiffFiles({}),
      () => client.getGitDiffFiles({ baseRef: "main" }),
      () => client.getDefaultBranch({}),
    ];
    for (const call of calls) await failure(call(), Code.FailedPrecondition);
    script("git init -q ..; git -C .. commit -q --allow-empty -m above");
    for (const call of calls) await failure(call(), Code.FailedPrecondition);
  });
});

describe("GetGitDiffFiles", () => {
  test("uncommitted changes, or everything since the merge base", async () => {
    script(
      `${BRANCHES}; git mv old-name new-name; rm gone; echo u > untracked; echo ignored > .gitignore; echo i > ignored`,
    );
    const files = async (baseRef = "") => {
      const { changedFiles, totalChangedFiles } = await client.getGitDiffFiles({ baseRef });
      expect(totalChangedFiles).toBe(changedFiles.length);
      return changedFiles.map(shown).sort();
    };
    const uncommitted = [
      [".gitignore", "UNTRACKED"],
      ["gone", "DELETED"],
      ["new-name", "RENAMED", "old-name"],
      ["untracked", "UNTRACKED"],
    ];
    expect(await files()).toEqual(uncommitted);
    expect(await files("main")).toEqual([...uncommitted.slice(0, 3), ["numbers", "MODIFIED"], ...uncommitted.slice(3)]);
    expect(await files("topic")).toEqual(uncommitted);
  });

  test("a file in conflict is listed once", async () => {
    script(
      `${BRANCHES}; git checkout -q main; sed -i 's/^3$/drei/' numbers; git commit -qam main; git merge -q topic || true`,
    );
    expect((await client.getGitDiffFiles({})).changedFiles.map(shown)).toEqual([["numbers", "UPDATED_BUT_UNMERGED"]]);
    const { changedFiles, totalChangedFiles } = await client.getGitDiffFiles({ baseRef: "base" });
    expect([changedFiles.map(({ path }) => path), totalChangedFiles]).toEqual([["later", "numbers"], 2]);
    expect((await client.getGitDiff({ path: "numbers", unified: 9 })).hunks[0]?.body).toContain("+>>>>>>> topic\n");
  });

  test("10000 are listed, all are counted, long paths are whole", async () => {
    const deep = `${"d".repeat(200)}/${"e".repeat(200)}`;
    script(`${BRANCHES}; mkdir ${"d".repeat(200)}; echo x > ${deep}; mkdir many; cd many; seq 10050 | xargs touch`);
    for (const baseRef of ["", "main"]) {
      const { changedFiles, totalChangedFiles } = await client.getGitDiffFiles({ baseRef });
      expect([changedFiles.length, totalChangedFiles]).toEqual([10_000, baseRef ? 10_052 : 10_051]);
      expect(changedFiles.map(({ path }) => path)).toContain(deep);
    }
  });
});

describe("GetFileDiffContent", () => {
  test("both sides of files of every kind", async () => {
    script(`${BRANCHES}; echo changed > same; rm gone; git mv old-name new-name; echo u > untracked; ln -sf /nowhere link; git add link
      rm dir/x; rmdir dir; ln -s same dir; rm numbers; mkdir numbers; echo n > numbers/n`);
    const sides = async (path: string, baseRef = "") => {
      const { fileChange, originalContent, newContent } = await client.getFileDiffContent({ path, baseRef });
      return [shown(fileChange)?.[1], text(originalContent), text(newContent)];
    };
    expect(await sides("same")).toEqual(["MODIFIED", "keep\n", "changed\n"]);
    expect(await sides("gone")).toEqual(["DELETED", "bye\n", ""]);
    expect(await sides("untracked")).toEqual(["UNTRACKED", "", "u\n"]);
    const hundred = script("seq 100 140");
    expect(await sides("new-name")).toEqual(["RENAMED", `${hundred}\n`, `${hundred}\n`]);
    expect(await sides("link")).toEqual(["ADDED", "", "/nowhere"]);
    expect(await sides("numbers")).toEqual(["DELETED", expect.stringContaining("three"), ""]);
    expect(await sides("numbers", "main")).toEqual(["DELETED", expect.not.stringContaining("three"), ""]);
    script("git checkout -q same; rm dir; ln -s ../../home dir; echo hidden > dir/x");
    expect(await sides("same")).toEqual([undefined, "keep\n", "keep\n"]);
    expect(await sides("dir/x")).toEqual(["DELETED", "x\n", ""]);
  });

  test("bytes of a binary file only on request", async () => {
    script(`${BRANCHES}; printf 'a\\0c' > image`);
    const without = await client.getFileDiffContent({ path: "image" });
    expect([without.isBinary, without.originalContent.length, without.newContent.length]).toEqual([true, 0, 0]);
    const all = await client.getFileDiffContent({ path: "image", includeBinaryContent: true });
    expect([all.isBinary, text(all.originalContent), text(all.newContent)]).toEqual([true, "a\0b", "a\0c"]);
  });

  test("a side above 8 MiB is RESOURCE_EXHAUSTED, one of just that size is not", async () => {
    script(BRANCHES);
    const large = (bytes: number) => environment.put("workspace/repo/large", Buffer.alloc(bytes, "x"));
    await large(8 * MIB);
    expect((await client.getFileDiffContent({ path: "large" })).newContent).toHaveLength(8 * MIB);
    await large(8 * MIB + 1);
    await failure(client.getFileDiffContent({ path: "large" }), Code.ResourceExhausted);
    script("git add large; git commit -qm large; echo small > large");
    await failure(client.getFileDiffContent({ path: "large" }), Code.ResourceExhausted);
  });

  test("what is neither file nor link is FAILED_PRECONDITION and not read", async () => {
    script(`${BRANCHES}; rm same; mkfifo same`);
    await failure(client.getFileDiffContent({ path: "same" }), Code.FailedPrecondition);
  });
});

test("GetDefaultBranch: origin's HEAD, else main or master of origin, else the current branch", async () => {
  const branch = async () => (await client.getDefaultBranch({})).branch;
  script("git init -q -b work .");
  expect(await branch()).toBe("work");
  script("git commit -q --allow-empty -m x; git update-ref refs/remotes/origin/master HEAD");
  expect(await branch()).toBe("master");
  script("git update-ref refs/remotes/origin/main HEAD");
  expect(await branch()).toBe("main");
  script("git symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/team/trunk");
  // What it names is not there.
  expect(await branch()).toBe("main");
  script("git update-ref refs/remotes/origin/team/trunk HEAD");
  expect(await branch()).toBe("team/trunk");
  script(
    "git checkout -q --detach; for r in HEAD main master team/trunk; do git update-ref --no-deref -d refs/remotes/origin/$r; done",
  );
  await failure(client.getDefaultBranch({}), Code.FailedPrecondition);
});

test("a hunk reader keeps lines that look like headers", () => {
  const body = ["-@@ -1 +1 @@", "+--- a/x", "+diff --git a b", ""].join("\n");
  const diff = `diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1,2 @@ @@ -9 +9 @@\n${body}@@ -5 +6 @@\n-a\r\n+b\n`;
  const hunks = parseHunks(diff);
  expect(hunks.map(({ body, section, startPosition }) => [body, section, startPosition])).toEqual([
    [body, "@@ -9 +9 @@", 1],
    ["-a\r\n+b\n", "", 5],
  ]);
  expect(parseHunks("")).toEqual([]);
});
