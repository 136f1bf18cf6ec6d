import { execFileSync } from "node:child_process";
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import {
  Capability,
  FileChangeType,
  WatchEventType,
  WatchRequestSchema,
} from "../gen/supervisor/v1/environmentopts_pb.js";
import { IgnoreRules } from "../src/runner/supervisor/ignore-rules.ts";
import { WatchSubscriber } from "../src/runner/supervisor/watch-subscriber.ts";
import { type TreeChange, type TreeOptions, WatchTree } from "../src/runner/supervisor/watch-tree.ts";
import { eventually } from "./harness/wait.ts";
import { failure, gone, type TestEnvironment, testEnvironment, waitFor } from "./supervisor-harness.ts";

const { FILE_CHANGE, GIT_STATUS } = WatchEventType;
const { CREATED, UPDATED, DELETED } = FileChangeType;
let environment: TestEnvironment;
let supervisor: number;

beforeAll(async () => {
  environment = await testEnvironment();
  supervisor = (await environment.launch()).pid;
});
afterAll(async () => await environment[Symbol.asyncDispose]());

type Request = Parameters<TestEnvironment["client"]["watch"]>[0];

/** One caller of Watch and all it was told. */
class Observer implements AsyncDisposable {
  readonly seen: string[] = [];
  readonly batches: number[] = [];
  readonly overflows: string[] = [];
  git = 0;
  readonly ended: Promise<unknown>;
  readonly #left = new AbortController();
  readonly #ready = Promise.withResolvers<void>();

  private constructor(client: TestEnvironment["client"], request: Request) {
    const options = { signal: this.#left.signal, onHeader: () => this.#ready.resolve() };
    const reading = async () => {
      for await (const { event } of client.watch(request, options)) {
        if (event.case === "overflow") this.overflows.push(event.value.reason);
        if (event.case === "gitStatusChanged") this.git++;
        if (event.case !== "fileChanges") continue;
        this.batches.push(event.value.events.length);
        for (const { type, path, isDirectory } of event.value.events) {
          this.seen.push(`${FileChangeType[type]} ${path}${isDirectory ? "/" : ""}`);
        }
      }
    };
    this.ended = reading().catch((error: unknown) => {
      this.#ready.reject(error);
      return error;
    });
  }

  /** Resolves once the stream is established: from then on it misses nothing. */
  static async open(request: Request = {}, { client } = environment): Promise<Observer> {
    const observer = new Observer(client, request);
    await observer.#ready.promise;
    return observer;
  }

  /** Waits until something was seen; what was seen so far is taken. */
  async sees(...expected: string[]): Promise<string[]> {
    await waitFor(() => expected.every((each) => this.seen.includes(each))).catch(() => {
      throw new Error(`${expected} is not in ${JSON.stringify(this.seen)}`);
    });
    return this.seen.splice(0);
  }

  async overflow(): Promise<string> {
    return await waitFor(() => this.overflows.shift());
  }

  async gitEvent(): Promise<void> {
    await waitFor(() => this.git > 0);
    this.git = 0;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#left.abort();
    await this.ended;
  }
}

/** A fresh workspace with a script run in it. */
async function workspace(text: string): Promise<TestEnvironment> {
  const fresh = await testEnvironment();
  onTestFinished(async () => await fresh[Symbol.asyncDispose]());
  fresh.script(text);
  await fresh.launch();
  return fresh;
}

const inotifyWatches = (pid: number): number => {
  const infos = readdirSync(`/proc/${pid}/fdinfo`).map((fd) => {
    try {
      return readFileSync(`/proc/${pid}/fdinfo/${fd}`, "utf8");
    } catch {
      return "";
    }
  });
  return infos.join("").match(/^inotify wd/gm)?.length ?? 0;
};

describe("Watch", () => {
  test("files and directories that appear, change, move and disappear", async () => {
    const place = await workspace("mkdir -p a/b; echo 1 > a/one; echo 2 > a/b/two");
    await using observer = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    place.script("echo x > new; echo more >> a/one; rm a/b/two");
    expect((await observer.sees("CREATED new", "UPDATED a/one", "DELETED a/b/two")).length).toBe(3);
    place.script("mkdir -p c/d/e; echo deep > c/d/e/deep");
    const appeared = ["CREATED c/", "CREATED c/d/", "CREATED c/d/e/", "CREATED c/d/e/deep"];
    expect((await observer.sees(...appeared)).sort()).toEqual([...appeared].sort());
    place.script("echo changed > c/d/e/deep");
    expect(await observer.sees("UPDATED c/d/e/deep")).toEqual(["UPDATED c/d/e/deep"]);
    place.script("mv c moved");
    const moved = [...appeared.map((each) => each.replace("CREATED", "DELETED"))];
    await observer.sees(...moved, ...appeared.map((each) => each.replace(" c", " moved")));
    place.script("echo again > moved/d/e/deep");
    await observer.sees("UPDATED moved/d/e/deep");
    // As editors save: a new file takes the place of the old one.
    place.script("echo saved > new.tmp; mv new.tmp new");
    expect(await observer.sees("UPDATED new")).not.toContain("CREATED new");
    place.script("rm -r moved; ln -s a link; rm new; mkdir new");
    await observer.sees("DELETED moved/", "DELETED moved/d/e/deep", "CREATED link", "DELETED new", "CREATED new/");
    place.script("rmdir new; echo 'file now' > new; chmod +x a/one");
    await observer.sees("DELETED new/", "CREATED new", "UPDATED a/one");
    expect([observer.git, observer.overflows]).toEqual([0, []]);
  });

  test("what comes and goes within a moment is not told; a batch is collected for at most 200 ms", async () => {
    const place = await workspace("true");
    await using observer = await Observer.open({}, place);
    const started = Date.now();
    place.script("echo x > passing; rm passing; for n in $(seq 50); do echo $n > f$n; done");
    const seen = await observer.sees("CREATED f50");
    expect(Date.now() - started).toBeLessThan(2000);
    expect(seen.filter((each) => each.includes("passing"))).toEqual([]);
    expect(observer.batches.length).toBeLessThan(20);
  });

  test(".git, what .gitignore names and further patterns are left out", async () => {
    const place = await workspace(`
      git init -q .; mkdir -p node_modules/pkg src/build docs
      printf 'node_modules/\\n*.log\\n!keep.log\\n' > .gitignore; printf '/build\\n' > src/.gitignore`);
    await using all = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    const fileExcludePatterns = ["docs/", "**/*.tmp", "/top"];
    await using fewer = await Observer.open({ eventTypes: [FILE_CHANGE], fileExcludePatterns }, place);
    place.script(`
      echo x > node_modules/pkg/index.js; echo x > src/build/out; echo x > a.log; echo x > src/keep.log; git add .
      echo x > docs/page; echo x > src/a.tmp; mkdir sub; echo x > sub/top; echo x > top; echo x > src/last`);
    const seen = await all.sees(
      "CREATED src/keep.log",
      "CREATED docs/page",
      "CREATED src/a.tmp",
      "CREATED top",
      "CREATED src/last",
    );
    expect(seen.filter((each) => /node_modules|build|a\.log|\.git\//.test(each))).toEqual([]);
    const less = await fewer.sees("CREATED src/last", "CREATED sub/top");
    expect(less.filter((each) => /docs|tmp| top/.test(each))).toEqual([]);
    // What is ignored changes while it is watched.
    place.script("printf 'docs\\n*.log\\n' > .gitignore");
    await all.sees("UPDATED .gitignore");
    place.script("echo y > node_modules/pkg/index.js; echo y > docs/page; echo y > src/last");
    const now = await all.sees("UPDATED node_modules/pkg/index.js", "UPDATED src/last");
    expect(now.filter((each) => /docs|CREATED|DELETED/.test(each))).toEqual([]);
    place.script("rm .gitignore; echo z > docs/page; echo z > b.log");
    await all.sees("DELETED .gitignore", "CREATED b.log");
    place.script("echo zz > docs/page");
    await all.sees("UPDATED docs/page");
  });

  test("what git ignores by other files than .gitignore is left out as well", async () => {
    const place = await workspace(`
      git init -q .; mkdir -p build out kept ~/.config/git; echo /build/ > .git/info/exclude
      printf '*.swp\nkept\n' > ~/.config/git/ignore; printf '!kept\n' > .gitignore`);
    await using observer = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    place.script("echo x > build/a; echo x > .file.swp; echo x > out/a; echo x > kept/a; echo x > last");
    const seen = await observer.sees("CREATED out/a", "CREATED kept/a", "CREATED last");
    expect(seen.filter((each) => /build|swp|\.git\//.test(each))).toEqual([]);
    // They count as soon as they have changed.
    place.script("printf '/out\n' > .git/info/exclude");
    await eventually(async () => {
      place.script("echo x >> build/a; echo x >> out/a; echo x >> last");
      const next = await observer.sees("UPDATED last");
      return next.includes("UPDATED build/a") && !next.some((each) => each.includes("out"));
    }, "what the repository excludes is seen to have changed");
    place.script("echo '/kept*' > ~/ignored; git config core.excludesFile '~/ignored'; rm .gitignore");
    await eventually(async () => {
      place.script("echo x >> kept/a; echo x >> other.swp; echo x >> last");
      const next = await observer.sees("UPDATED last");
      return next.some((each) => each.includes("swp")) && !next.some((each) => each.includes("kept"));
    }, "the file that the configuration names counts");
    expect(observer.overflows).toEqual([]);
  });

  test("the state of git: files, index, commits, branches, remotes", async () => {
    const place = await workspace("git init -q -b main .; echo 1 > file; git add .; git commit -qm one");
    await using observer = await Observer.open({ eventTypes: [GIT_STATUS] }, place);
    for (const step of [
      "echo 2 > file",
      "git add file",
      "git commit -qm two",
      "git checkout -qb topic/deep",
      "git commit -q --allow-empty -m three",
      "git branch -q -D main",
      "git remote add origin https://example.com/r.git",
      "git update-ref refs/remotes/origin/x HEAD",
      "git pack-refs --all",
    ]) {
      place.script(step);
      await observer.gitEvent().catch(() => {
        throw new Error(`nothing after ${step}`);
      });
    }
    expect([observer.seen, observer.overflows]).toEqual([[], []]);
    await place.client.getGitStatus({});
    await place.client.getGitDiffFiles({});
    place.script("echo ignored > .git/COMMIT_EDITMSG; mkdir .git/own; echo x > .git/own/file");
    // The next change comes alone: looking at the status was none.
    await using files = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    place.script("echo 3 > file");
    await files.sees("UPDATED file");
    await observer.gitEvent();
    expect(observer.git).toBe(0);
  });

  test("a repository that is made, removed or lies elsewhere", async () => {
    const place = await workspace("echo 1 > file");
    await using observer = await Observer.open({ eventTypes: [GIT_STATUS] }, place);
    place.script("git init -q -b main .");
    await observer.gitEvent();
    place.script("git commit -q --allow-empty -m x");
    await observer.gitEvent();
    place.script("mv .git ../stored; echo 'gitdir: ../stored' > .git");
    await observer.gitEvent();
    place.script("git commit -q --allow-empty -m y; git worktree add -q ../tree");
    await observer.gitEvent();
    await place.client.setWorkspaceFolder(join(place.workspace, "../tree"));
    await observer.gitEvent();
    // Branches are shared with the other working tree, HEAD is not.
    place.script("git -C ../tree checkout -q --detach");
    await observer.gitEvent();
    place.script("git -C ../tree checkout -q tree; git branch new");
    await observer.gitEvent();
    place.script("rm ../tree/.git");
    await observer.gitEvent();
  });

  test("more than 1000 changes at once are an overflow, after which nothing is missing", async () => {
    const place = await workspace("mkdir ../many; cd ../many; seq 3000 | xargs touch; echo 1 > ../repo/file");
    await using observer = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    place.script("mv ../many many");
    expect(await observer.overflow()).toMatch(/changes/);
    place.script("echo 2 > file; rm many/1; mkdir many/deep; echo x > many/deep/x");
    await observer.sees("UPDATED file", "DELETED many/1", "CREATED many/deep/x");
    expect(Math.max(...observer.batches)).toBeLessThanOrEqual(1000);
    place.script("mv many elsewhere");
    await observer.overflow();
    place.script("echo y > elsewhere/deep/x");
    await observer.sees("UPDATED elsewhere/deep/x");
  });

  test("the workspace folder is exchanged, moved or gone for a while", async () => {
    const place = await workspace("echo 1 > file; mkdir ../other; echo 1 > ../other/there");
    await using observer = await Observer.open({ eventTypes: [FILE_CHANGE] }, place);
    place.script("mkdir ../fresh; echo 1 > ../fresh/file; cd ..; mv repo old; mv fresh repo");
    expect(await observer.overflow()).toBe("the workspace folder was replaced");
    place.script("echo 2 > file; echo 2 > ../old/file; echo n > new");
    const seen = await observer.sees("UPDATED file", "CREATED new");
    expect(seen.sort()).toEqual(["CREATED new", "UPDATED file"]);
    place.script("cd ..; rm -r repo; sleep 0.5; mkdir repo; echo > repo/start");
    await observer.overflow();
    place.script("echo > again");
    await observer.sees("CREATED again");
    await place.client.setWorkspaceFolder(join(place.workspace, "../other"));
    await observer.overflow();
    await waitFor(() => {
      place.script("echo 2 > ../other/there");
      return observer.seen.includes("UPDATED there");
    });
    await observer[Symbol.asyncDispose]();
    await place.client.setWorkspaceFolder(join(place.workspace, "nowhere"));
    await failure(place.client.watch({})[Symbol.asyncIterator]().next(), Code.NotFound);
  });

  test("bad requests", async () => {
    const refused = async (request: Request) =>
      await failure(environment.client.watch(request)[Symbol.asyncIterator]().next(), Code.InvalidArgument);
    await refused({ eventTypes: [FILE_CHANGE, WatchEventType.UNSPECIFIED] });
    await refused({ eventTypes: [99 as WatchEventType] });
    await refused({ fileExcludePatterns: ["a\0b"] });
    await refused({ fileExcludePatterns: ["a\nb"] });
    await refused({ fileExcludePatterns: ["x".repeat(1025)] });
    await refused({ fileExcludePatterns: Array(101).fill("x") });
  });

  test("many callers share what is watched, and it is let go with the last one", async () => {
    environment.script("mkdir -p shared/a/b/c; git init -q .");
    const before = inotifyWatches(supervisor);
    const observers = await Promise.all(Array.from({ length: 20 }, () => Observer.open()));
    const shared = inotifyWatches(supervisor) - before;
    expect(shared).toBeGreaterThan(5);
    expect(shared).toBeLessThan(20);
    environment.script("echo x > shared/a/b/c/file");
    await Promise.all(observers.map((each) => each.sees("CREATED shared/a/b/c/file")));
    for (const observer of observers) await observer[Symbol.asyncDispose]();
    await waitFor(() => inotifyWatches(supervisor) === before);
  });

  test("is neither activity nor in the way of a stop", async () => {
    const place = await testEnvironment();
    onTestFinished(async () => await place[Symbol.asyncDispose]());
    const record = await place.launch();
    await using observer = await Observer.open({}, place);
    expect((await place.client.health()).activity).toBeUndefined();
    const started = Date.now();
    process.kill(record.pid, "SIGTERM");
    expect(await observer.ended).toMatchObject({ code: Code.Unavailable });
    await gone(record);
    expect(Date.now() - started).toBeLessThan(1900);
  });

  test("is the capability that is announced", async () => {
    expect((await environment.client.listCapabilities({})).capabilities).toEqual([Capability.WATCH]);
  });
});

describe("a watched tree", () => {
  /** A directory of its own, watched in this process. */
  async function tree(prepare: (root: string) => void, options: Partial<TreeOptions> = {}) {
    const root = mkdtempSync(join(tmpdir(), "berth-tree-"));
    prepare(root);
    const changes: TreeChange[] = [];
    const overflows: string[] = [];
    const watched = await WatchTree.open(
      root,
      { isCheckout: true, ...options },
      {
        changed: (batch) => changes.push(...batch),
        overflowed: (reason) => overflows.push(reason),
        gitReplaced: () => undefined,
        rootReplaced: () => undefined,
      },
    );
    onTestFinished(() => {
      watched.close();
      rmSync(root, { recursive: true, force: true });
    });
    const paths = (type: FileChangeType) => changes.filter((each) => each.type === type).map(({ path }) => path);
    return { root, watched, overflows, paths };
  }

  test("a full queue of the kernel is noticed and made up for", async () => {
    const queue = Number(readFileSync("/proc/sys/fs/inotify/max_queued_events", "utf8"));
    const { root, overflows, paths } = await tree((root) => {
      writeFileSync(join(root, "a"), "");
      writeFileSync(join(root, "b"), "");
    });
    // Nothing is read meanwhile, and hints that are the same as the one before are dropped by the kernel itself.
    for (let n = 0; n < queue; n++) utimesSync(join(root, n % 2 ? "a" : "b"), n, n);
    mkdirSync(join(root, "lost"));
    writeFileSync(join(root, "lost", "file"), "");
    await waitFor(() => overflows.includes("the system dropped changes"));
    writeFileSync(join(root, "lost", "file"), "changed");
    await waitFor(() => paths(UPDATED).includes("lost/file"));
  });

  test("bounds: what is not watched is said at once and to whoever asks", async () => {
    const prepare = (root: string) => {
      for (const path of ["a", "a/b", "a/b/c", "d", "e"]) mkdirSync(join(root, path));
    };
    const few = await tree(prepare, { maxDirectories: 4 });
    expect(few.watched.incomplete).toBe("only 4 directories are watched");
    for (const name of ["a", "d", "e", "a/b"]) writeFileSync(join(few.root, name, "file"), "");
    await waitFor(() => ["a/file", "d/file", "e/file"].every((path) => few.paths(CREATED).includes(path)));
    expect(few.paths(CREATED)).not.toContain("a/b/file");
    rmSync(join(few.root, "a/b"), { recursive: true });
    await waitFor(() => few.paths(DELETED).includes("a/b"));
    const names = await tree(prepare, { maxNames: 3 });
    expect(names.watched.incomplete).toBe("only 3 names are watched");
    const enough = await tree(prepare);
    expect(enough.watched.incomplete).toBeUndefined();
  });

  test("directories that may not be read are passed over, and a link is not followed", async () => {
    const { root, paths } = await tree((root) => {
      mkdirSync(join(root, "closed"));
      chmodSync(join(root, "closed"), 0);
      execFileSync("ln", ["-s", "/", join(root, "link")]);
      execFileSync("ln", ["-s", "/etc/passwd", join(root, ".gitignore")]);
    });
    writeFileSync(join(root, "file"), "");
    await waitFor(() => paths(CREATED).includes("file"));
    renameSync(join(root, "file"), join(root, "other"));
    await waitFor(() => paths(CREATED).includes("other") && paths(DELETED).includes("file"));
  });
});

describe("a subscriber that does not read", () => {
  const change = (type: FileChangeType, path: string, isDirectory = false): TreeChange => ({ type, path, isDirectory });
  const subscriber = (eventTypes = [FILE_CHANGE]) =>
    new WatchSubscriber(create(WatchRequestSchema, { eventTypes, fileExcludePatterns: ["skipped"] }));
  const next = async (from: WatchSubscriber) => (await from.messages(new AbortController().signal).next()).value?.event;

  test("is told what it all amounts to", async () => {
    const slow = subscriber();
    slow.filesChanged([
      change(CREATED, "kept"),
      change(CREATED, "passing"),
      change(UPDATED, "gone"),
      change(DELETED, "back"),
    ]);
    slow.filesChanged([change(CREATED, "skipped/deep"), change(UPDATED, "skipped")]);
    slow.filesChanged([
      change(UPDATED, "kept"),
      change(DELETED, "passing"),
      change(DELETED, "gone"),
      change(CREATED, "back"),
    ]);
    slow.filesChanged([change(DELETED, "path", true), change(CREATED, "path")]);
    expect(await next(slow)).toEqual({
      case: "fileChanges",
      value: {
        events: [
          change(CREATED, "kept"),
          change(DELETED, "gone"),
          change(UPDATED, "back"),
          change(DELETED, "path", true),
          change(CREATED, "path"),
        ],
      },
    });
  });

  test("is told of 1000 changes, and of more only that there were", async () => {
    const slow = subscriber([FILE_CHANGE, GIT_STATUS]);
    const many = (count: number) => Array.from({ length: count }, (_, n) => change(UPDATED, `f${n}`));
    slow.filesChanged(many(1000));
    expect(await next(slow)).toMatchObject({ case: "fileChanges", value: { events: { length: 1000 } } });
    slow.filesChanged(many(600));
    slow.filesChanged(many(1001));
    slow.filesChanged(many(10));
    expect(await next(slow)).toEqual({ case: "overflow", value: { reason: "more than 1000 changes at once" } });
    expect(await next(slow)).toEqual({ case: "gitStatusChanged", value: {} });
    slow.filesChanged(many(10));
    expect(await next(slow)).toMatchObject({ case: "fileChanges", value: { events: { length: 10 } } });
  });
});

test("ignore rules say what git says", () => {
  const root = mkdtempSync(join(tmpdir(), "berth-ignore-"));
  onTestFinished(() => rmSync(root, { recursive: true, force: true }));
  execFileSync("git", ["init", "-q", root]);
  // Git compares bytes, so names that are more than that are left to their own.
  const names = [
    "a",
    "b",
    "foo",
    "foo.o",
    "foo.log",
    "x y",
    "a?",
    "[b]",
    "!bang",
    "#hash",
    "Foo",
    ".hidden",
    "ab",
    "a-b",
  ];
  const paths = [
    ...names,
    ...names.flatMap((name) => [`dir/${name}`, `dir/sub/${name}`, `foo/${name}`, `a/b/${name}`, `a/x/y/b/${name}`]),
  ];
  const files = [
    "foo",
    "/foo",
    "foo/",
    "/dir/foo",
    "dir/foo\n!dir/foo",
    "*.o",
    "*.o\n!foo.o",
    "**/foo",
    "foo/**",
    "a/**/b",
    "**",
    "*",
    "*\n!*/\n!foo.o",
    "dir/*\n!dir/a",
    "/*\n!/dir",
    "a?",
    "a\\?",
    "[ab]",
    "[!ab]",
    "[^ab]*",
    "\\[b\\]",
    "\\!bang",
    "\\#hash\n#foo",
    "x y",
    "x\\ y",
    "foo ",
    "foo\\ ",
    "foo\r",
    "f*o",
    "f**o",
    "**foo",
    "*/foo",
    "*/*/foo",
    "dir/**/foo.log\n",
    "\n\n \n.*",
    "[a-",
    "a-b\n[a-c]-b",
    "**/dir/**",
    "/**/b",
    "b/**/",
    "!foo\nfoo",
    "dir\n!dir/a",
    "\\",
    "/",
    "//",
    "\ufefffoo",
  ];
  for (const text of files) {
    writeFileSync(join(root, ".gitignore"), text);
    const input = paths.map((path) => `${path}\0`).join("");
    const git = ["-c", "core.excludesFile=", "check-ignore", "--no-index", "--stdin", "-z"];
    let output = "";
    try {
      output = execFileSync("git", git, { cwd: root, input, encoding: "utf8" });
    } catch (error) {
      if ((error as { status?: number }).status !== 1) throw error;
    }
    const rules = new IgnoreRules(text);
    expect(
      paths.filter((path) => rules.ignores(path, false)),
      JSON.stringify(text),
    ).toEqual(output.split("\0").slice(0, -1));
  }
});
