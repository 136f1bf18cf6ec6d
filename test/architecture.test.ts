import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import type { DescService } from "@bufbuild/protobuf";
import type { ConnectRouter } from "@connectrpc/connect";
import { expect, test } from "vitest";
import { parseAst } from "vitest/node";
import type { App } from "../src/app.ts";

const ROOT = join(import.meta.dirname, "..");

// What a folder or top-level file may import: others by name, "store/tokens" for one file of a folder. Of packages,
// "protobuf", "connect", "postgres" and "node" stand for themselves and "library" for all the rest.
const EVERYONE = ["gen", "config", "pending", "protobuf"];
const CODE = [
  "app",
  "client",
  "control-plane",
  "environment-secrets",
  "first-start",
  "installation",
  "routes",
  "server",
  "signing",
];
const FOLDERS = ["cli", "domain", "http", "login", "rpc", "runner", "scm", "services", "store", "sweep"];
const PACKAGES = ["connect", "postgres", "node", "library"];
const EVERYTHING = [...CODE, ...FOLDERS, ...PACKAGES];
const TABLE: Record<string, readonly string[]> = {
  domain: ["domain"],
  store: ["domain", "store", "postgres", "node", "library"],
  // The insides of server.ts: how bytes become calls, or pages for browsers.
  http: ["app", "domain", "http", "login", "rpc", "connect", "node", "library"],
  login: ["app", "domain", "login", "scm", "store", "node", "library"],
  rpc: ["domain", "rpc", "store/credentials", "connect", "node", "library"],
  services: ["app", "domain", "environment-secrets", "rpc", "scm", "signing", "store", "connect", "node", "library"],
  sweep: ["app", "domain", "environment-secrets", "signing", "store", "sweep", "node", "library"],
  scm: ["domain", "scm", "node", "library"],
  runner: [
    "client",
    "domain",
    "http/answers",
    "http/exchange",
    "http/listener",
    "runner",
    "scm",
    "connect",
    "node",
    "library",
  ],
  cli: [
    ...["cli", "client", "control-plane", "domain", "first-start", "installation", "runner", "store"],
    ...["connect", "node", "library"],
  ],
  app: ["domain", "scm", "store", "node", "library"],
  client: ["client", "connect", "node", "library"],
  config: ["domain/browser", "node"],
  pending: ["connect"],
  installation: ["domain", "store", "node", "library"],
  "first-start": ["domain", "installation", "store", "node", "library"],
  signing: ["app", "domain", "store", "library"],
  "environment-secrets": ["app", "domain", "scm", "store"],
  routes: EVERYTHING,
  server: EVERYTHING,
  "control-plane": EVERYTHING,
  main: EVERYTHING,
};

// Functions of the runtime and of libraries that depend on nothing but their arguments, and so are open to `domain`.
const PURE: Record<string, readonly string[]> = {
  "node:crypto": ["createHash", "createHmac", "timingSafeEqual"],
  "node:net": ["isIP", "isIPv4", "isIPv6"],
  // Evaluates a foreign pattern so that it can be interrupted.
  "node:vm": ["createContext", "runInContext"],
  "node:zlib": ["crc32"],
  // Texts that people write.
  yaml: ["Lexer", "Node", "Pair", "Scalar", "YAMLMap", "isAlias", "isMap", "isScalar", "isSeq", "parseDocument"],
};

// Clocks and randomness come in through `App`, or as arguments; how long something takes is `performance.now`.
const IMPURE = ["Date", "Date.now", "Math.random", "crypto.*", "random(UUID|Bytes|Int)"];
// Whatever reaches outside of `domain` or comes back later.
const OUTSIDE = [
  "performance",
  "process",
  "console",
  "fetch",
  "setTimeout",
  "setInterval",
  "setImmediate",
  "queueMicrotask",
];

interface Node {
  type: string;
  start: number;
  [property: string]: unknown;
}

interface Import {
  line: number;
  specifier: string;
  names: string[];
}

interface Module {
  /** Path below src. */
  path: string;
  /** Key of its row in the table. */
  layer: string;
  line: (node: Node) => number;
  nodes: Node[];
  imports: Import[];
}

const isNode = (value: unknown): value is Node => typeof (value as Node | null)?.type === "string";

function* walk(node: Node): Generator<Node> {
  yield node;
  for (const value of Object.values(node)) {
    for (const child of Array.isArray(value) ? value : [value]) if (isNode(child)) yield* walk(child);
  }
}

/** A name as the table spells it: the folder, or the top-level file; `client-web.ts` is a form of `client.ts`. */
function layerOf(path: string): string {
  const [first = ""] = path.split("/");
  return first.replace(/\.ts$/, "").replace(/^client-.*/, "client");
}

function nameOf(node: Node): string {
  if (node.type === "MemberExpression") return `${nameOf(node.object as Node)}.${nameOf(node.property as Node)}`;
  return String(node.name ?? node.value ?? "");
}

function importOf(node: Node, line: number): Import[] {
  const source = isNode(node.source) ? node.source.value : undefined;
  if (typeof source !== "string") return [];
  const specifiers = (node.specifiers ?? []) as Node[];
  const names = specifiers.map(({ imported, local }) => nameOf((imported ?? local) as Node));
  return [{ line, specifier: source, names }];
}

function parse(path: string): Module {
  const text = readFileSync(join(ROOT, "src", path), "utf8");
  const line = (node: Node) => text.slice(0, node.start).split("\n").length;
  const nodes = [...walk(parseAst(text, { lang: "ts" }) as unknown as Node)];
  return { path, layer: layerOf(path), line, nodes, imports: nodes.flatMap((node) => importOf(node, line(node))) };
}

const sources = readdirSync(join(ROOT, "src"), { recursive: true, withFileTypes: true })
  .filter((entry) => entry.isFile())
  .map((entry) => relative(join(ROOT, "src"), join(entry.parentPath, entry.name)));
const modules = sources.filter((path) => path.endsWith(".ts")).map(parse);

/** What an import leads to, as the table spells it: `{ layer, path }` inside src, else a package or `gen`. */
function targetOf(module: Module, specifier: string): { layer: string; path?: string } {
  if (specifier.startsWith(".")) {
    const path = join(dirname(module.path), specifier);
    return path.startsWith("../gen/") ? { layer: "gen" } : { layer: layerOf(path), path };
  }
  if (specifier.startsWith("node:")) return { layer: "node" };
  if (/^@bufbuild\/protobuf(\/|$)/.test(specifier)) return { layer: "protobuf" };
  if (specifier.startsWith("@connectrpc/")) return { layer: "connect" };
  return { layer: specifier === "postgres" ? "postgres" : "library" };
}

/** The service a file of `services` belongs to; larger services are folders of slices. */
const serviceOf = (path: string) => path.split("/")[1]!.replace(/\.ts$/, "");

function isAllowed(module: Module, { specifier, names }: Import): boolean {
  const { layer, path } = targetOf(module, specifier);
  if (module.layer === "services" && layer === "services") return serviceOf(module.path) === serviceOf(path!);
  if (module.layer === "domain" && (layer === "node" || layer === "library"))
    return names.length > 0 && names.every((name) => PURE[specifier]?.includes(name));
  const file = path?.replace(/\.ts$/, "");
  return [...EVERYONE, ...(TABLE[module.layer] ?? [])].some((allowed) => allowed === layer || allowed === file);
}

test("imports keep to the table", () => {
  const broken = modules.flatMap((module) =>
    module.imports
      .filter((each) => !isAllowed(module, each))
      .map(({ line, specifier }) => `src/${module.path}:${line} imports ${specifier}: not open to ${module.layer}`),
  );
  expect(broken).toEqual([]);
});

test("every folder and top-level file has a row in the table", () => {
  expect([...new Set(modules.map(({ layer }) => layer))].filter((layer) => !TABLE[layer])).toEqual([]);
});

test("no modules import each other in a circle", () => {
  const edges = new Map(
    modules.map((module) => [
      module.path,
      module.imports.flatMap(({ specifier }) => targetOf(module, specifier).path ?? []),
    ]),
  );
  const done = new Set<string>();
  const circles: string[] = [];
  const visit = (path: string, trail: string[]) => {
    if (trail.includes(path)) circles.push([...trail.slice(trail.indexOf(path)), path].join(" -> "));
    if (trail.includes(path) || done.has(path)) return;
    for (const next of edges.get(path) ?? []) visit(next, [...trail, path]);
    done.add(path);
  };
  for (const path of edges.keys()) visit(path, []);
  expect(circles).toEqual([]);
});

test("files are named in kebab-case, migrations NNNN_name.sql", () => {
  const kebab = /^([a-z0-9]+(-[a-z0-9]+)*\/)*[a-z0-9]+(-[a-z0-9]+)*\.ts$/;
  const migration = /^store\/migrations\/\d{4}_[a-z0-9]+(_[a-z0-9]+)*\.sql$/;
  expect(sources.filter((path) => !kebab.test(path) && !migration.test(path))).toEqual([]);
});

test("exports have names", () => {
  const isDefault = (node: Node) =>
    node.type === "ExportDefaultDeclaration" ||
    (node.type === "ExportSpecifier" && nameOf(node.exported as Node) === "default");
  const found = modules.flatMap(({ path, nodes, line }) =>
    nodes.filter(isDefault).map((node) => `src/${path}:${line(node)}`),
  );
  expect(found).toEqual([]);
});

/** What a call or a property access names, if it reads the clock, chance or the world when the name is a global one. */
function useOf(node: Node): string | undefined {
  if (node.type === "MemberExpression") return nameOf(node);
  if (node.type !== "CallExpression" && node.type !== "NewExpression") return undefined;
  const isGivenDate = node.type === "NewExpression" && (node.arguments as Node[]).length > 0;
  return isGivenDate ? undefined : nameOf(node.callee as Node);
}

test("domain is pure; services and sweeps take time, ids and randomness from App", () => {
  const forbidden: Record<string, RegExp> = {
    domain: new RegExp(`^(${[...IMPURE, ...OUTSIDE].join("|")})(\\.|$)`),
    services: new RegExp(`^(${IMPURE.join("|")})$`),
    sweep: new RegExp(`^(${IMPURE.join("|")})$`),
  };
  const found = modules.flatMap(({ path, layer, nodes, line }) =>
    nodes.flatMap((node) => {
      const use = useOf(node);
      return use && forbidden[layer]?.test(use) ? `src/${path}:${line(node)} uses ${use}` : [];
    }),
  );
  expect([...new Set(found)]).toEqual([]);
});

/** The services that the server registers. Their factories only close over the app, so any stand-in will do. */
async function registered(): Promise<{ service: DescService; implementation: Record<string, unknown> }[]> {
  const { routes } = await import("../src/routes.ts");
  const app = new Proxy(() => app, { get: () => app }) as unknown as App;
  const found: Awaited<ReturnType<typeof registered>> = [];
  const router = {
    service: (service: DescService, implementation: Record<string, unknown>) => found.push({ service, implementation }),
  };
  routes(app)(router as unknown as ConnectRouter);
  return found;
}

test("every registered service implements its RPCs and nothing else", async () => {
  for (const { service, implementation } of await registered()) {
    expect(Object.keys(implementation).sort(), service.typeName).toEqual(Object.keys(service.method).sort());
  }
});

test("the policy table has one line for every RPC of every registered service", async () => {
  const { policy } = await import("../src/rpc/policy.ts");
  const services = (await registered()).map(({ service }) => service);
  expect(Object.keys(policy).sort()).toEqual(services.map(({ typeName }) => typeName).sort());
  for (const service of services) {
    const lines: Record<string, unknown> = (policy as Record<string, Record<string, unknown>>)[service.typeName]!;
    expect(Object.keys(lines).sort(), service.typeName).toEqual(Object.keys(service.method).sort());
  }
});

test("no RPC is implemented twice within a service", async () => {
  const services = (await registered()).map(({ service }) => service);
  const bySlices = Map.groupBy(
    modules.filter(({ layer }) => layer === "services"),
    ({ path }) => serviceOf(path),
  );
  const twice = [...bySlices.values()].flatMap((slices) => {
    const imported = new Set(slices.flatMap(({ imports }) => imports.flatMap(({ names }) => names)));
    const own = services.filter(({ name }) => imported.has(name));
    const rpcs = new Set(own.flatMap(({ method }) => Object.keys(method)));
    const places = slices.flatMap(({ path, nodes, line }) =>
      nodes
        .filter(({ type }) => type === "ObjectExpression")
        .flatMap(({ properties }) => properties as Node[])
        .filter(({ type, key }) => type === "Property" && rpcs.has(nameOf(key as Node)))
        .map((node) => ({ rpc: nameOf(node.key as Node), at: `src/${path}:${line(node)}` })),
    );
    return [...Map.groupBy(places, ({ rpc }) => rpc).values()].filter((found) => found.length > 1);
  });
  expect(twice.map((found) => `${found[0]!.rpc} at ${found.map(({ at }) => at).join(" and ")}`)).toEqual([]);
});
