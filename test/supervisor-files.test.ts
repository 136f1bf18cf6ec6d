import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chownSync,
  linkSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { FindRequest_FileType as FileType, WriteMode } from "../gen/supervisor/v1/environmentopts_pb.js";
import { fuzzyScorer, globMatcher } from "../src/runner/supervisor/patterns.ts";
import { failure, isRoot, type TestEnvironment, testEnvironment } from "./supervisor-harness.ts";

const MIB = 1024 * 1024;
const canMount = isRoot && spawnSync("unshare", ["--mount", "mount", "-t", "tmpfs", "tmpfs", tmpdir()]).status === 0;
let environment: TestEnvironment;
let client: TestEnvironment["client"];
let workspace: string;

beforeAll(async () => {
  environment = await testEnvironment();
  await environment.launch();
  ({ client, workspace } = environment);
});
afterAll(async () => await environment[Symbol.asyncDispose]());

const at = (name: string) => join(workspace, name);
const text = (name: string) => readFileSync(at(name), "utf8");
const sha256 = (content: string) => createHash("sha256").update(content).digest("hex");

/** Makes files as the environment's user; a name ending in `/` is a directory. */
function tree(base: string, names: string[]): void {
  const uid = environment.config.uid ?? -1;
  const own = (path: string) => chownSync(path, uid, uid);
  const directory = (path: string) => {
    const first = mkdirSync(path, { recursive: true });
    for (let made = path; first && made.startsWith(first); made = dirname(made)) own(made);
  };
  directory(at(base));
  for (const name of names) {
    const path = join(at(base), name);
    if (name.endsWith("/")) directory(path.slice(0, -1));
    else {
      directory(dirname(path));
      writeFileSync(path, name);
      own(path);
    }
  }
}

async function content(path: string, offset = 0n, length = 0n) {
  const { result } = await client.readFile({ path, offset, length });
  if (result.case !== "content") throw new Error(`${path} is a directory`);
  return {
    text: Buffer.from(result.value.data).toString(),
    total: result.value.totalSize,
    hash: result.value.contentHash,
  };
}

describe("ReadFile", () => {
  test("returns bytes, the whole size and the hash of what it returns", async () => {
    await environment.put("workspace/repo/read", "0123456789");
    expect(await content("read")).toEqual({ text: "0123456789", total: 10n, hash: sha256("0123456789") });
    expect(await content(at("read"), 2n, 3n)).toEqual({ text: "234", total: 10n, hash: sha256("234") });
    expect(await content("./x/../read", 8n, 100n)).toMatchObject({ text: "89" });
    for (const offset of [10n, 11n, 2n ** 62n])
      expect(await content("read", offset)).toEqual({ text: "", total: 10n, hash: sha256("") });
    await failure(client.readFile({ path: "read", offset: -1n }), Code.InvalidArgument);
    await failure(client.readFile({ path: "read", length: -1n }), Code.InvalidArgument);
  });

  test("returns at most 32 MiB, and files of /proc although they claim to be empty", async () => {
    await environment.put("workspace/repo/big", Buffer.alloc(32 * MIB + 5, "b"));
    const { text: start, total } = await content("big", 0n, 2n ** 40n);
    expect([start.length, total]).toEqual([32 * MIB, BigInt(32 * MIB + 5)]);
    expect((await content("big", BigInt(32 * MIB))).text).toBe("bbbbb");
    expect((await content("/proc/self/comm")).text).not.toBe("");
  });

  test("lists one level of a directory by name, with absolute paths", async () => {
    tree("list", ["b", ".hidden", "a/", "a/deep"]);
    symlinkSync("a", at("list/linked"));
    symlinkSync("nowhere", at("list/dangling"));
    const { result } = await client.readFile({ path: "list" });
    const entries = result.case === "directory" ? result.value.entries : [];
    expect(entries.map(({ path, isDirectory, size }) => [path, isDirectory, size])).toEqual([
      [at("list/.hidden"), false, 7n],
      [at("list/a"), true, 0n],
      [at("list/b"), false, 1n],
      [at("list/dangling"), false, 0n],
      [at("list/linked"), true, 0n],
    ]);
  });

  test("never waits for FIFOs, devices and sockets", async () => {
    execFileSync("mkfifo", [at("fifo")]);
    for (const path of ["fifo", "/dev/zero", "/dev/tty", environment.config.socketPath]) {
      await failure(client.readFile({ path }), Code.FailedPrecondition);
      await failure(client.writeFile({ path, content: Buffer.from("x") }), Code.FailedPrecondition);
    }
    await failure(client.writeFile({ path: "fifo", mode: WriteMode.APPEND }), Code.FailedPrecondition);
  });

  test("hostile paths", async () => {
    symlinkSync("loop", at("loop"));
    await failure(client.readFile({ path: "" }), Code.InvalidArgument);
    await failure(client.readFile({ path: "a\0b" }), Code.InvalidArgument);
    await failure(client.readFile({ path: "loop" }), Code.InvalidArgument);
    await failure(client.writeFile({ path: "loop" }), Code.InvalidArgument);
    await failure(client.readFile({ path: "x".repeat(300) }), Code.InvalidArgument);
    await failure(client.readFile({ path: "x/".repeat(5000) }), Code.InvalidArgument);
    await failure(client.readFile({ path: "missing" }), Code.NotFound);
    await failure(client.readFile({ path: "read/below" }), Code.NotFound);
  });

  test.runIf(isRoot)("what the user may not read is PERMISSION_DENIED", async () => {
    writeFileSync(at("root-only"), "", { mode: 0o600 });
    await failure(client.readFile({ path: "root-only" }), Code.PermissionDenied);
    await failure(client.readFile({ path: "/etc/shadow" }), Code.PermissionDenied);
    await failure(client.readFile({ path: "/root" }), Code.PermissionDenied);
  });
});

describe("WriteFile", () => {
  const write = (path: string, content: string, mode = WriteMode.UNSPECIFIED) =>
    client.writeFile({ path, content: Buffer.from(content), mode });

  test("creates with parents, replaces, and tells how much it wrote", async () => {
    expect((await write("new/deep/file", "one")).bytesWritten).toBe(3n);
    expect([statSync(at("new/deep")).mode & 0o777, statSync(at("new/deep/file")).mode & 0o777]).toEqual([0o755, 0o644]);
    await write("new/deep/file", "2");
    expect(text("new/deep/file")).toBe("2");
    expect(readdirSync(at("new/deep"))).toEqual(["file"]);
  });

  test("modes", async () => {
    await write("modes", "a", WriteMode.CREATE);
    await failure(write("modes", "b", WriteMode.CREATE), Code.AlreadyExists);
    await write("modes", "c", WriteMode.TRUNCATE);
    await write("modes", "d", WriteMode.APPEND);
    expect(text("modes")).toBe("cd");
    await write("modes", "e", WriteMode.CREATE_OR_TRUNCATE);
    expect(text("modes")).toBe("e");
    await failure(write("absent", "", WriteMode.TRUNCATE), Code.NotFound);
    await failure(write("absent", "", WriteMode.APPEND), Code.NotFound);
    await failure(write("absent", "", 9 as WriteMode), Code.InvalidArgument);
    await failure(write(".", ""), Code.FailedPrecondition);
    await failure(write(".", "", WriteMode.CREATE), Code.FailedPrecondition);
    await failure(write("modes/below", ""), Code.FailedPrecondition);
  });

  test("one of many that create at once wins", async () => {
    const results = await Promise.allSettled(
      Array.from({ length: 10 }, (_, n) => write("race", `${n}`, WriteMode.CREATE)),
    );
    const winners = results.flatMap(({ status }, n) => (status === "fulfilled" ? [`${n}`] : []));
    expect(winners).toEqual([text("race")]);
  });

  test("keeps the mode and follows links, also to what does not exist yet", async () => {
    await environment.put("workspace/repo/script", "old");
    await client.exec({
      command:
        "chmod 751 script; mkdir links; ln -s ../script links/script; ln -s ../later links/later; ln -s $PWD links/here",
    });
    await write("links/script", "new");
    await write("links/later", "made");
    await write("links/here/via", "through");
    expect([text("script"), text("later"), text("via")]).toEqual(["new", "made", "through"]);
    expect(statSync(at("script")).mode & 0o777).toBe(0o751);
    expect(lstatSync(at("links/script")).isSymbolicLink()).toBe(true);
    await failure(write("links/script", "", WriteMode.CREATE), Code.AlreadyExists);
  });

  test("replaces as a whole: a reader sees old or new content, other names of the file keep the old", async () => {
    await environment.put("workspace/repo/whole", "old");
    linkSync(at("whole"), at("whole-link"));
    await write("whole", "new");
    expect([text("whole"), text("whole-link")]).toEqual(["new", "old"]);
  });

  test("takes at most 32 MiB", async () => {
    expect((await client.writeFile({ path: "full", content: Buffer.alloc(32 * MIB) })).bytesWritten).toBe(
      BigInt(32 * MIB),
    );
    await failure(client.writeFile({ path: "over", content: Buffer.alloc(32 * MIB + 1) }), Code.ResourceExhausted);
    expect(readdirSync(workspace)).not.toContain("over");
  });

  test("a read-only file stays as it is", async () => {
    await client.exec({ command: "echo keep > readonly; chmod 444 readonly" });
    await failure(write("readonly", "x"), Code.PermissionDenied);
    expect(text("readonly")).toBe("keep\n");
    expect(readdirSync(workspace).filter((name) => name.startsWith(".berth"))).toEqual([]);
  });

  test.runIf(isRoot)(
    "a writable file in a directory that is not is written in place; a new one there is refused",
    async () => {
      mkdirSync(at("foreign"), { mode: 0o755 });
      writeFileSync(at("foreign/open"), "long old content");
      chownSync(at("foreign/open"), environment.config.uid ?? 0, 0);
      await write("foreign/open", "new");
      expect(text("foreign/open")).toBe("new");
      await failure(write("foreign/new", ""), Code.PermissionDenied);
      await failure(write("foreign/new", "", WriteMode.CREATE), Code.PermissionDenied);
      await failure(write("foreign/deep/new", ""), Code.PermissionDenied);
    },
  );

  test.runIf(canMount)("a full disk is RESOURCE_EXHAUSTED and leaves no half file", async () => {
    mkdirSync(at("small"));
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", at("small")]);
    onTestFinished(() => void execFileSync("umount", ["-l", at("small")]));
    await write("small/fits", "old");
    await failure(write("small/fits", "x".repeat(100_000)), Code.ResourceExhausted);
    await failure(write("small/new", "x".repeat(100_000)), Code.ResourceExhausted);
    expect([readdirSync(at("small")), text("small/fits")]).toEqual([["fits"], "old"]);
  });
});

describe("Find", () => {
  const find = async (path: string, options: object = {}) => {
    const { files, truncated } = await client.find({ path, ...options });
    expect(truncated).toBe(false);
    return files.map((file) => file.path.slice(at(path).length + 1));
  };
  beforeAll(() => {
    tree("find", [
      "b.ts",
      "a/x.ts",
      "a/y.js",
      "a-b.ts",
      "a/.git/config",
      ".git/HEAD",
      ".dot.ts",
      "a/deep/er/z.ts",
      "empty/",
    ]);
    symlinkSync("..", at("find/a/up"));
  });

  test("everything below, by path, without .git and without following links", async () => {
    const all = [
      ".dot.ts",
      "a",
      "a-b.ts",
      "a/deep",
      "a/deep/er",
      "a/deep/er/z.ts",
      "a/up",
      "a/x.ts",
      "a/y.js",
      "b.ts",
      "empty",
    ];
    expect(await find("find")).toEqual(all);
    expect(await find("find", { pattern: "*", type: FileType.ANY })).toEqual(all);
    expect(await find("find", { type: FileType.DIRECTORY })).toEqual(["a", "a/deep", "a/deep/er", "empty"]);
    expect(await find("find", { maxDepth: 1 })).toEqual([".dot.ts", "a", "a-b.ts", "b.ts", "empty"]);
    expect(await find("find", { maxDepth: 2, type: FileType.FILE })).toEqual([
      ".dot.ts",
      "a-b.ts",
      "a/x.ts",
      "a/y.js",
      "b.ts",
    ]);
    const { files } = await client.find({ path: "find", pattern: "x.ts" });
    expect(files).toMatchObject([{ path: at("find/a/x.ts"), isDirectory: false, size: 6n }]);
  });

  test("globs on names", async () => {
    expect(await find("find", { pattern: "*.ts" })).toEqual([".dot.ts", "a-b.ts", "a/deep/er/z.ts", "a/x.ts", "b.ts"]);
    expect(await find("find", { pattern: "[xz].?s" })).toEqual(["a/deep/er/z.ts", "a/x.ts"]);
    expect(await find("find", { pattern: "A*" })).toEqual([]);
  });

  test("fuzzy over relative paths, best first", async () => {
    expect((await find("find", { pattern: "ax", fuzzy: true }))[0]).toBe("a/x.ts");
    expect((await find("find", { pattern: "B.TS", fuzzy: true }))[0]).toBe("b.ts");
    expect(await find("find", { pattern: "zzz", fuzzy: true })).toEqual([]);
    expect(await find("find/a", { pattern: "find", fuzzy: true })).toEqual([]);
  });

  test("bad requests", async () => {
    await failure(client.find({ path: "" }), Code.InvalidArgument);
    await failure(client.find({ path: "find/b.ts" }), Code.InvalidArgument);
    await failure(client.find({ path: "find", maxDepth: -1 }), Code.InvalidArgument);
    await failure(client.find({ path: "find", type: 7 as FileType }), Code.InvalidArgument);
    await failure(client.find({ path: "nowhere" }), Code.NotFound);
    if (isRoot) await failure(client.find({ path: "/root" }), Code.PermissionDenied);
  });

  test("more than 65536 hits are truncated, the first ones kept in order", { timeout: 30_000 }, async () => {
    await client.exec({ command: "mkdir many; cd many; seq -f 'f%06g' 0 65540 | xargs touch" });
    const { files, truncated } = await client.find({ path: "many" });
    expect([files.length, truncated, files[0]?.path, files.at(-1)?.path]).toEqual([
      65_536,
      true,
      at("many/f000000"),
      at("many/f065535"),
    ]);
    const { result } = await client.readFile({ path: "many" });
    const entries = result.case === "directory" ? result.value.entries : [];
    expect([entries.length, entries.at(-1)?.path]).toEqual([65_536, at("many/f065535")]);
  });
});

describe("patterns", () => {
  test.each([
    ["", "", true],
    ["*", "", true],
    ["a*c", "abbbc", true],
    ["a*c", "abbbd", false],
    ["*a*b*", "xxaxxbxx", true],
    ["?", "𝄞", true],
    ["?", "ab", false],
    ["[!a-c]x", "dx", true],
    ["[!a-c]x", "bx", false],
    ["[]]", "]", true],
    ["[a-]", "-", true],
    ["[ab", "[ab", true],
    ["\\*", "*", true],
    ["\\*", "a", false],
    ["a.b", "axb", false],
  ])("glob %j on %j: %j", (pattern, name, expected) => {
    expect(globMatcher(pattern)(name)).toBe(expected);
  });

  test("no pattern makes matching explode", () => {
    const started = performance.now();
    expect(globMatcher(`${"*a".repeat(500)}b`)("a".repeat(4000))).toBe(false);
    expect(fuzzyScorer("a".repeat(1000))(`${"a".repeat(999)}${"b".repeat(3000)}`)).toBeUndefined();
    expect(performance.now() - started).toBeLessThan(2000);
  });

  test("fuzzy prefers the file name, starts of words and runs", () => {
    const order = (query: string, ...paths: string[]) => {
      const score = fuzzyScorer(query);
      return paths.toSorted((a, b) => (score(b) ?? -1) - (score(a) ?? -1));
    };
    expect(order("main", "mxaxixn.ts", "src/main.ts", "main/other.ts")[0]).toBe("src/main.ts");
    expect(order("fb", "afab.ts", "foo-bar.ts")[0]).toBe("foo-bar.ts");
    expect(order("src main", "src/main.ts", "main/src.ts")[0]).toBe("src/main.ts");
  });
});
