import { execFile } from "node:child_process";
import { existsSync, globSync, readFileSync } from "node:fs";
import { copyFile, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";

const ROOT = join(import.meta.dirname, "..");
const TIMEOUT_MS = 50_000;

const manifest = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));

/** Runs a script with this Node; rejects with what it printed. */
async function node(cwd: string, ...args: string[]): Promise<string> {
  const ended = promisify(execFile)(process.execPath, args, { cwd, timeout: TIMEOUT_MS });
  return ended.then(
    ({ stdout }) => stdout,
    (error: Error & { stdout: string }) => Promise.reject(new Error(error.stdout + error.message, { cause: error })),
  );
}

/** Every file that a tree of export conditions leads to. */
function targets(conditions: object | string): string[] {
  return typeof conditions === "string" ? [conditions] : Object.values(conditions).flatMap(targets);
}

describe.skipIf(!existsSync(join(ROOT, "src/client.ts")))("the built package", () => {
  let folder: string;

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "berth-package-"));
    await node(ROOT, "scripts/build.ts", join(folder, "dist"));
    await copyFile(join(ROOT, "package.json"), join(folder, "package.json"));
    await symlink(join(ROOT, "node_modules"), join(folder, "node_modules"));
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  test("holds every file that the manifest points at", () => {
    const promised = [...targets(manifest.exports), ...targets(manifest.bin)];
    expect(promised.filter((path) => !path.replace(/^\.\//, "").startsWith("dist/"))).toEqual([]);
    expect(promised.filter((path) => !existsSync(join(folder, path)))).toEqual([]);
    expect(manifest.files).toEqual(["dist"]);
  });

  test("holds everything of src that is not compiled", () => {
    const others = globSync("src/**/*.*", { cwd: ROOT }).filter((path) => !path.endsWith(".ts"));
    expect(others).not.toEqual([]);
    expect(others.filter((path) => !existsSync(join(folder, "dist", path)))).toEqual([]);
  });

  test.each(["node", "browser"])("its client loads by name under the condition %s", async (condition) => {
    const program = `const client = await import("berth/client");
      console.log(Object.keys(client).filter((name) => typeof client[name] === "function").join());`;
    const functions = await node(folder, `--conditions=${condition}`, "--input-type=module", "--eval", program);
    expect(functions.trim()).not.toBe("");
  });

  test.each(["nodenext", "esnext"])("its client has types for consumers with module %s", async (module) => {
    const program = 'import * as client from "berth/client";\nexport const missing: number = client;\n';
    await writeFile(join(folder, `${module}.ts`), program);
    const resolution = module === "esnext" ? "bundler" : module;
    const options = ["--noEmit", "--strict", "--module", module, "--moduleResolution", resolution];
    const compiling = node(folder, "node_modules/.bin/tsc", ...options, "--ignoreConfig", `${module}.ts`);
    // The one mistake in the program is found: the types are there, and are not `any`.
    await expect(compiling).rejects.toThrow(/^\w+\.ts\(2,14\): error TS2322: [^\n]*\nCommand failed/);
  });

  test("its program runs", async () => {
    expect(readFileSync(join(folder, manifest.bin.berth), "utf8")).toMatch(/^#!\/usr\/bin\/env node\n/);
    expect(await node(folder, manifest.bin.berth, "--help")).toContain("berth");
  });
});
