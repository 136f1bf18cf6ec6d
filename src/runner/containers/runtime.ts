import { createHash } from "node:crypto";
import { chmod, cp, lstat, mkdir, readdir, readFile, realpath, rename, stat } from "node:fs/promises";
import { basename, dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { runCommand } from "../commands.ts";
import { exists, makeFolder, readSmall, removeTree } from "../files.ts";
import { environmentsFolder, runtimeFolder } from "../paths.ts";
import { ENTRANCE } from "../supervisor/config.ts";

// What a supervisor needs to run in a container whose image has nothing of it: this program, the packages it uses, Node
// and the loader and libraries that Node was linked with. They are copied to one folder, which every container sees
// read-only, so that neither an update nor the place of the program on the host matters to one that exists.

/** Commands that run the program inside of a container, as words without the program's arguments. */
export interface ContainerRuntime {
  supervisor: readonly string[];
  /** Runs a command in a container, from outside of it. */
  enter: readonly string[];
  /** Logs in to a container, from outside of it. */
  login: readonly string[];
  program: readonly string[];
}

const isSource = import.meta.url.endsWith(".ts");
const SUFFIX = isSource ? "ts" : "js";
const HERE = dirname(fileURLToPath(import.meta.url));
const LDD_MS = 20_000;
const MAX_PROGRAM_BYTES = 64 * 1024;
const NATIVE = /\.node$/;

interface Manifest {
  dependencies?: Record<string, string>;
  optionalDependencies?: Record<string, string>;
}

const manifestOf = async (folder: string) =>
  JSON.parse(await readFile(join(folder, "package.json"), "utf8")) as Manifest;

/** Folders from one up to the root of the file system. */
function* upwards(folder: string): Generator<string> {
  for (let at = folder; ; at = dirname(at)) {
    yield at;
    if (at === dirname(at)) return;
  }
}

/** Folder of this program's package. */
async function packageRoot(): Promise<string> {
  for (const folder of upwards(HERE)) if (await exists(join(folder, "package.json"))) return folder;
  throw new Error("the program has no package.json");
}

async function packageFolder(name: string, from: string): Promise<string | undefined> {
  for (const folder of upwards(from)) {
    const found = join(folder, "node_modules", name);
    if (await exists(join(found, "package.json"))) return found;
  }
  return undefined;
}

/** Folders of the packages that one needs, with those that these need in turn. */
async function packagesOf(root: string): Promise<string[]> {
  const found = new Set<string>();
  const visit = async (folder: string, names: readonly string[]): Promise<void> => {
    for (const name of names) {
      const wanted = await packageFolder(name, folder);
      if (!wanted || found.has(wanted)) continue;
      found.add(wanted);
      const { dependencies, optionalDependencies } = await manifestOf(wanted);
      await visit(wanted, Object.keys({ ...dependencies, ...optionalDependencies }));
    }
  };
  // Its own optional ones are the database, which has no business in a container.
  await visit(root, Object.keys((await manifestOf(root)).dependencies ?? {}));
  return [...found];
}

async function* filesBelow(path: string): AsyncGenerator<string> {
  const found = await lstat(path);
  if (found.isFile()) yield path;
  if (!found.isDirectory() || basename(path) === "node_modules") return;
  for (const name of (await readdir(path)).sort()) yield* filesBelow(join(path, name));
}

/** The loader, and everything that it loads for these. */
async function librariesOf(files: readonly string[]): Promise<{ loader: string; libraries: string[] }> {
  const { code, stdout } = await runCommand("ldd", files, { timeoutMs: LDD_MS });
  const paths = [...stdout.matchAll(/^\s+(?:\S+ => )?(\/\S+) \(0x/gm)].flatMap(([, path]) => path ?? []);
  const loader = paths.find((path) => /^ld[-.]|^ld-musl|\/ld-/.test(basename(path)));
  if (code !== 0 || !loader) throw new Error("the libraries of Node cannot be found: containers cannot be entered");
  return { loader, libraries: [...new Set(paths)] };
}

interface Parts {
  /** Where the paths of `sources` start. */
  base: string;
  sources: string[];
  node: string;
  loader: string;
  libraries: string[];
  key: string;
}

function commonFolder(paths: readonly string[]): string {
  const [first = "/", ...rest] = paths;
  for (const folder of upwards(first)) if (rest.every((each) => each.startsWith(`${folder}/`))) return folder;
  return "/";
}

/** What has to be copied, and a key that changes with it. */
async function parts(): Promise<Parts> {
  const root = await realpath(await packageRoot());
  const packages = await packagesOf(root);
  const own = (isSource ? ["src", "gen", "package.json"] : ["dist", "package.json"]).map((name) => join(root, name));
  const sources = [...own, ...packages];
  const node = await realpath(process.execPath);
  const hash = createHash("sha256");
  const native: string[] = [];
  const note = async (path: string) => {
    const { size, mtimeMs } = await stat(path);
    hash.update(`${path} ${size} ${mtimeMs}\n`);
  };
  for (const source of sources) {
    for await (const file of filesBelow(source)) {
      if (NATIVE.test(file)) native.push(file);
      await note(file);
    }
  }
  const { loader, libraries } = await librariesOf([node, ...native]);
  for (const file of [node, ...libraries]) await note(file);
  const base = commonFolder([root, ...packages.map(dirname)].map((path) => join(path, ".")));
  return { base, sources, node, loader, libraries, key: hash.digest("hex").slice(0, 32) };
}

async function copyParts({ base, sources, node, libraries }: Parts, folder: string): Promise<void> {
  const program = join(folder, "program");
  for (const source of sources) {
    const options = {
      recursive: true,
      dereference: true,
      filter: (path: string) => path === source || !isNested(path),
    };
    await mkdir(join(program, relative(base, dirname(source))), { recursive: true });
    await cp(source, join(program, relative(base, source)), options);
  }
  await mkdir(join(folder, "lib"));
  await cp(node, join(folder, "node"));
  for (const library of libraries) await cp(library, join(folder, "lib", basename(library)), { dereference: true });
  // Whatever the umask of whoever has installed the program: users of environments read it.
  const { code } = await runCommand("chmod", ["-R", "u=rwX,go=rX", "--", folder], { timeoutMs: LDD_MS });
  if (code !== 0) throw new Error("the program could not be made readable for containers");
}

const isNested = (path: string) => basename(path) === "node_modules";

/** Keys of the folders that programs of environments lead to: their containers may have been started before an update. */
async function keysInUse(dataDir: string): Promise<Set<string>> {
  const folder = environmentsFolder(dataDir);
  const keys = new Set<string>();
  for (const name of await readdir(folder)) {
    const text = await readSmall(join(folder, name, ENTRANCE), MAX_PROGRAM_BYTES).catch(() => "");
    for (const [, key = ""] of text?.matchAll(/\/([0-9a-f]{32})\//g) ?? []) keys.add(key);
  }
  return keys;
}

/**
 * Makes the folder for containers, if it is not there as this program needs it, and forgets those of earlier programs
 * that no container leads to any more.
 */
export async function prepareRuntime(dataDir: string): Promise<ContainerRuntime> {
  const all = runtimeFolder(dataDir);
  makeFolder(all, 0o755);
  const found = await parts();
  const folder = join(all, found.key);
  if (!(await exists(folder))) {
    const partial = `${folder}.partial`;
    await removeTree(partial);
    await mkdir(partial);
    await copyParts(found, partial);
    await chmod(partial, 0o755);
    await rename(partial, folder);
  }
  const kept = (await keysInUse(dataDir)).add(found.key);
  for (const name of await readdir(all)) if (!kept.has(name)) await removeTree(join(all, name));
  const source = join(folder, "program", relative(found.base, HERE), "..");
  const node = [
    join(folder, "lib", basename(found.loader)),
    "--library-path",
    join(folder, "lib"),
    join(folder, "node"),
  ];
  // The signal by which Node is told to be debugged would let anybody of its user in.
  const outside = [...node, "--disable-sigusr1"];
  return {
    enter: [...outside, join(source, "supervisor", `enter.${SUFFIX}`)],
    login: [...outside, join(source, "supervisor", `login.${SUFFIX}`)],
    supervisor: [...node, join(source, "supervisor", `main.${SUFFIX}`)],
    program: [...node, join(source, "..", `main.${SUFFIX}`)],
  };
}
