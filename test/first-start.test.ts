import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fromBinary } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { pino } from "pino";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationPoliciesSchema, OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerKind, RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { ExitCode, exitCodeOf } from "../src/cli/exit.ts";
import { createBerthClient } from "../src/client.ts";
import { ConfigError, readServerConfig } from "../src/config.ts";
import { type ControlPlane, startControlPlane } from "../src/control-plane.ts";
import { ADMINS_GROUP, MEMBERS_GROUP } from "../src/domain/group.ts";
import { defaultPolicies } from "../src/domain/policies.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { WrongMasterKey } from "../src/store/bootstrap.ts";
import type { Db } from "../src/store/db.ts";
import { seal, unseal } from "../src/store/envelope.ts";
import { FakeRunner } from "./harness/fake-runner.ts";
import { createDatabase, type TestDatabase } from "./harness/program.ts";
import { codeOf } from "./harness/refusal.ts";

const TOKEN = /^berth_pat_\w{49}$/;
const DAY_MS = 24 * 60 * 60_000;

let home: string;
/** Without a schema, and so it stays: for starts that fail before they touch it. */
let untouched: TestDatabase;

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "berth-first-"));
  untouched = await createDatabase({ migrated: false });
});

afterAll(async () => {
  const tables = await untouched.db.point`select from pg_tables where schemaname = 'public'`;
  await untouched[Symbol.asyncDispose]();
  await rm(home, { recursive: true, force: true });
  expect(tables).toHaveLength(0);
});

const newHome = () => mkdtemp(join(home, "data-"));
const newKey = () => randomBytes(32).toString("base64");
const newToken = () => tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
const modeOf = async (path: string) => ((await stat(path)).mode & 0o777).toString(8);

/** A control plane that ends with its test, and what it has logged. */
interface Started extends AsyncDisposable {
  plane: ControlPlane;
  logged: () => string;
  identity: (token: string) => Promise<{ organizationId: string }>;
}

async function start(database: { url: string }, env: Record<string, string> = {}): Promise<Started> {
  const lines: string[] = [];
  const log = pino({ level: "debug" }, { write: (line: string) => void lines.push(line) });
  const config = readServerConfig({
    BERTH_PORT: "0",
    BERTH_RUNNER: "off",
    BERTH_DATA_DIR: env.BERTH_DATA_DIR ?? (await newHome()),
    DATABASE_URL: database.url,
    ...env,
  });
  const plane = await startControlPlane(config, log);
  return {
    plane,
    logged: () => lines.join(""),
    identity: (token) => createBerthClient({ baseUrl: plane.server.url, token }).identity.getAuthenticatedIdentity({}),
    [Symbol.asyncDispose]: () => plane.stop(),
  };
}

/** How a start fails. */
async function failure(database: { url: string }, env: Record<string, string>): Promise<Error> {
  try {
    await using _started = await start(database, env);
  } catch (error) {
    if (error instanceof Error) return error;
  }
  throw new Error("the start did not fail");
}

/** Every row of the tables that the first start fills. */
async function contents({ point }: Db) {
  const [row] = await point<{ all: unknown }[]>`
    select json_build_object(
      'organizations', (select json_agg(t) from organizations t), 'accounts', (select json_agg(t) from accounts t),
      'users', (select json_agg(t) from users t), 'groups', (select json_agg(t order by t.id) from groups t),
      'members', (select json_agg(t order by t.id) from group_members t), 'runners', (select json_agg(t order by t.id) from runners t),
      'classes', (select json_agg(t) from environment_classes t), 'shares', (select json_agg(t) from role_assignments t),
      'tokens', (select json_agg(to_jsonb(t) - 'last_used_at' order by t.id) from tokens t),
      'audit', (select json_agg(t order by t.id) from audit_log t), 'installation', (select json_agg(t) from installation t)) as all`;
  return row?.all;
}

const count = async (db: Db, table: string) => (await db.point`select from ${db.point(table)}`).count;

test.concurrent("PLT-1 two replicas that start at once on an empty database make one organization, one runner and one token", async () => {
  await using database = await createDatabase({ migrated: false });
  const env = { BERTH_MASTER_KEY: newKey(), BERTH_RUNNER: "on" };
  const folders = [await newHome(), await newHome()] as const;
  const tokenFile = (folder: string) => ({ BERTH_BOOTSTRAP_TOKEN_FILE: join(folder, "token") });
  const both = await Promise.all([
    start(database, { ...env, ...tokenFile(folders[0]) }),
    start(database, { ...env, ...tokenFile(folders[1]) }),
  ]);
  await using _first = both[0];
  await using _second = both[1];
  const tokens = both.flatMap(({ plane }) => plane.firstToken ?? []);
  expect(tokens).toEqual([expect.stringMatching(TOKEN)]);
  expect(both.filter(({ plane }) => plane.runnerExchangeToken)).toHaveLength(1);
  expect([...(await readdir(folders[0])), ...(await readdir(folders[1]))]).toEqual(["token"]);
  for (const { identity } of both) expect((await identity(tokens[0] ?? "")).organizationId).not.toBe("");

  const { db } = database;
  expect(await count(db, "organizations")).toBe(1);
  expect(await db.point`select role from users`).toEqual([{ role: OrganizationRole.ADMIN }]);
  expect((await db.point`select name from groups where system_managed order by name`).map((row) => row.name)).toEqual([
    ADMINS_GROUP,
    MEMBERS_GROUP,
  ]);
  expect(await db.point`select from runners where provider = ${RunnerProvider.LINUX_HOST}`).toHaveLength(1);
  expect(await count(db, "environment_classes")).toBe(1);
  for (const { logged } of both) expect(logged()).not.toMatch(/berth_(pat|rxt)_/);
});

test.concurrent("what the first start makes", async () => {
  await using database = await createDatabase();
  await using started = await start(database, {
    BERTH_BOOTSTRAP_ORG_NAME: "Acme",
    BERTH_BOOTSTRAP_ADMIN_EMAIL: "Jo@Acme.org",
    BERTH_BOOTSTRAP_ADMIN_NAME: "Jo",
  });
  const { db } = database;
  const token = started.plane.firstToken ?? "";
  const [organization] = await db.point<{ id: string; name: string; policies: Uint8Array }[]>`
    select id, name, policies from organizations`;
  const organizationId = organization?.id ?? "";
  expect(organization?.name).toBe("Acme");
  expect(fromBinary(OrganizationPoliciesSchema, organization?.policies ?? new Uint8Array())).toEqual(
    defaultPolicies(organizationId),
  );
  expect(await db.point`select email, name, login_provider, owner_organization_id from accounts`).toEqual([
    { email: "jo@acme.org", name: "Jo", login_provider: "local", owner_organization_id: null },
  ]);
  expect((await started.identity(token)).organizationId).toBe(organizationId);
  const memberships = await db.point`select g.name from group_members m join groups g on g.id = m.group_id
    join users u on u.id = m.member_id where u.role = ${OrganizationRole.ADMIN} order by g.name`;
  expect(memberships.map((row) => row.name)).toEqual([ADMINS_GROUP, MEMBERS_GROUP]);

  const [pat] = await db.point<{ created_at: Date; expires_at: Date; read_only: boolean }[]>`
    select created_at, expires_at, read_only from tokens`;
  expect(pat?.read_only).toBe(false);
  expect((pat?.expires_at.getTime() ?? 0) - (pat?.created_at.getTime() ?? 0)).toBe(90 * DAY_MS);

  // Without a runner of its own the organization still has the one that stands for all local ones.
  expect(await db.point`select kind, phase, desired_phase from runners`).toEqual([
    { kind: RunnerKind.LOCAL_CONFIGURATION, phase: RunnerPhase.ACTIVE, desired_phase: RunnerPhase.ACTIVE },
  ]);
  expect(started.plane.runnerExchangeToken).toBeUndefined();
  const actors = await db.point`select distinct actor_id, actor_principal from audit_log`;
  expect(actors).toEqual([{ actor_id: null, actor_principal: Principal.UNSPECIFIED }]);
  expect((await db.point`select action from audit_log order by id`).map((row) => row.action)).toEqual([
    "Organization created",
    "User joined",
    "Personal access token created",
  ]);
});

test.concurrent("PLT-2 a restart with other bootstrap values changes nothing and makes no token", async () => {
  await using database = await createDatabase();
  const key = { BERTH_MASTER_KEY: newKey() };
  let token = "";
  {
    await using first = await start(database, key);
    token = first.plane.firstToken ?? "";
  }
  const before = await contents(database.db);
  const other = newToken();
  const tokenFile = join(await newHome(), "token");
  await using second = await start(database, {
    ...key,
    BERTH_BOOTSTRAP_ORG_NAME: "Another",
    BERTH_BOOTSTRAP_ADMIN_EMAIL: "another@example.org",
    BERTH_BOOTSTRAP_ADMIN_TOKEN: other,
    BERTH_BOOTSTRAP_TOKEN_FILE: tokenFile,
    BERTH_RUNNER: "on",
  });
  expect(second.plane.firstToken).toBeUndefined();
  expect(second.plane.runnerExchangeToken).toBeUndefined();
  expect(await contents(database.db)).toEqual(before);
  await expect(stat(tokenFile)).rejects.toThrow("ENOENT");
  expect(await codeOf(second.identity(other))).toBe(Code[Code.Unauthenticated]);
  expect((await second.identity(token)).organizationId).not.toBe("");
  const ignored = second.logged().match(/the bootstrap settings are ignored/g);
  expect(ignored).toHaveLength(1);
});

test.concurrent("with BERTH_BOOTSTRAP=off there is no organization until a start without it", async () => {
  await using database = await createDatabase();
  const key = { BERTH_MASTER_KEY: newKey() };
  {
    await using off = await start(database, { ...key, BERTH_BOOTSTRAP: "off" });
    expect(off.plane.firstToken).toBeUndefined();
    expect(await count(database.db, "organizations")).toBe(0);
  }
  await using on = await start(database, key);
  expect(on.plane.firstToken).toMatch(TOKEN);
  expect(await count(database.db, "organizations")).toBe(1);
});

test.concurrent("PLT-3 a pre-seeded token authenticates and is shown nowhere", async () => {
  await using database = await createDatabase();
  const token = newToken();
  await using started = await start(database, { BERTH_BOOTSTRAP_ADMIN_TOKEN: token });
  expect((await started.identity(token)).organizationId).not.toBe("");
  expect(started.plane.firstToken).toBeUndefined();
  expect(started.logged()).not.toContain(token);
});

test.concurrent.each([
  ["another prefix", tokenText(TokenKind.SERVICE_ACCOUNT, randomBytes)],
  ["a wrong checksum", newToken().replace(/.$/, (last) => (last === "0" ? "1" : "0"))],
  ["no token at all", "swordfish"],
])("PLT-3 a malformed pre-seeded token stops the start before anything is made: %s", async (_what, token) => {
  const error = await failure(untouched, { BERTH_BOOTSTRAP_ADMIN_TOKEN: token });
  expect(error).toBeInstanceOf(ConfigError);
  expect(error.message).toMatch(/^BERTH_BOOTSTRAP_ADMIN_TOKEN must be a personal access token/);
  expect(error.message).not.toContain(token);
});

test.concurrent("PLT-4 another master key is refused with exit code 3, and changes nothing", async () => {
  await using database = await createDatabase();
  const keys = [newKey(), newKey()] as const;
  {
    await using _first = await start(database, { BERTH_MASTER_KEY: keys[0] });
  }
  const before = await contents(database.db);
  const error = await failure(database, { BERTH_MASTER_KEY: keys[1] });
  expect(error).toBeInstanceOf(WrongMasterKey);
  expect(error.message).toContain("another master key");
  expect(exitCodeOf(error)).toBe(ExitCode.REFUSED);
  // So is a new data folder, which would have made a key of its own.
  expect(await failure(database, {})).toBeInstanceOf(WrongMasterKey);
  expect(await contents(database.db)).toEqual(before);
  await using _again = await start(database, { BERTH_MASTER_KEY: keys[0] });
});

test.concurrent("PLT-46 with a runner of its own: a LINUX_HOST runner, shared with org-members, with one enabled class, that turns ACTIVE", async () => {
  await using database = await createDatabase();
  const dataDir = await newHome();
  await using started = await start(database, { BERTH_DATA_DIR: dataDir, BERTH_RUNNER: "on" });
  const { plane } = started;
  const client = createBerthClient({ baseUrl: plane.server.url, token: plane.firstToken ?? "" });
  const { runners } = await client.runners.listRunners({ filter: { providers: [RunnerProvider.LINUX_HOST] } });
  expect(runners).toMatchObject([
    {
      kind: RunnerKind.LOCAL,
      provider: RunnerProvider.LINUX_HOST,
      name: plane.app.config.runner.name,
      status: { phase: RunnerPhase.CREATED },
    },
  ]);
  const runnerId = runners[0]?.runnerId ?? "";
  expect(runners[0]?.creator?.id).toBe((await client.identity.getAuthenticatedIdentity({})).subject?.id);
  expect(
    await database.db.point`select g.name, a.resource_role from role_assignments a join groups g on g.id = a.group_id
      where a.resource_id = ${runnerId}`,
  ).toEqual([{ name: MEMBERS_GROUP, resource_role: ResourceRole.RUNNER_USER }]);
  const { environmentClasses } = await client.runnerConfiguration.listEnvironmentClasses({});
  expect(environmentClasses).toMatchObject([
    {
      displayName: "Standard",
      enabled: true,
      runnerId,
      configuration: [
        { key: "cpu", value: "2" },
        { key: "memory", value: "4096" },
      ],
    },
  ]);

  // The token outlives a crash before its use, in a file that only this user can read.
  const tokenPath = join(dataDir, "runner", "exchange-token");
  expect(await readFile(tokenPath, "utf8")).toBe(plane.runnerExchangeToken);
  expect(await modeOf(tokenPath)).toBe("600");
  const { accessToken } = await client.identity.exchangeToken({ exchangeToken: plane.runnerExchangeToken ?? "" });
  await using runner = new FakeRunner(plane.server.url, accessToken);
  await runner.register();
  expect(runner.id).toBe(runnerId);
  const { runner: active } = await client.runners.getRunner({ runnerId });
  expect(active?.status?.phase).toBe(RunnerPhase.ACTIVE);
  const usable = await client.environments.listEnvironmentClasses({ filter: { canCreateEnvironments: true } });
  expect(usable.environmentClasses).toHaveLength(1);
});

test.concurrent("a first sign-in that died before its result was on disk can be made once more", async () => {
  await using database = await createDatabase();
  const env = { BERTH_DATA_DIR: await newHome(), BERTH_RUNNER: "on" };
  const signIn = async (plane: ControlPlane) => {
    const client = createBerthClient({ baseUrl: plane.server.url, token: "" });
    return client.identity.exchangeToken({ exchangeToken: plane.runnerExchangeToken ?? "" });
  };
  const lost = await start(database, env);
  const { accessToken } = await signIn(lost.plane);
  await lost[Symbol.asyncDispose]();

  await using again = await start(database, env);
  const held = await signIn(again.plane);
  const identityOf = (token: string) =>
    createBerthClient({ baseUrl: again.plane.server.url, token }).identity.getAuthenticatedIdentity({});
  expect((await identityOf(held.accessToken)).subject?.principal).toBe(Principal.RUNNER);
  expect(await codeOf(identityOf(accessToken))).toBe(Code[Code.Unauthenticated]);
  expect(await codeOf(signIn(again.plane))).toBe(Code[Code.Unauthenticated]);
});

test.concurrent("the exchange token of a first start is found again until it is used", async () => {
  await using database = await createDatabase();
  const env = { BERTH_DATA_DIR: await newHome(), BERTH_RUNNER: "on" };
  let waiting: string | undefined;
  {
    await using first = await start(database, env);
    waiting = first.plane.runnerExchangeToken;
  }
  await using second = await start(database, { ...env, BERTH_BOOTSTRAP: "off" });
  expect(second.plane.runnerExchangeToken).toBe(waiting);
});

test.concurrent("a generated token goes to the file that was asked for, which only this user can read", async () => {
  await using database = await createDatabase();
  const folder = await newHome();
  const file = join(folder, "token");
  await writeFile(file, "of an earlier installation", { mode: 0o644 });
  await using started = await start(database, { BERTH_BOOTSTRAP_TOKEN_FILE: file });
  const token = (await readFile(file, "utf8")).trim();
  expect(token).toBe(started.plane.firstToken);
  expect(await modeOf(file)).toBe("600");
  expect(await readdir(folder)).toEqual(["token"]);
  expect((await started.identity(token)).organizationId).not.toBe("");
});

test.concurrent.each(["absent/token", ""])("a token that could not be kept is not made: file %j", async (name) => {
  await using database = await createDatabase();
  const folder = await newHome();
  const error = await failure(database, { BERTH_BOOTSTRAP_TOKEN_FILE: join(folder, name) });
  expect(error).toBeInstanceOf(ConfigError);
  expect(error.message).toMatch(/^BERTH_BOOTSTRAP_TOKEN_FILE /);
  expect(await count(database.db, "organizations")).toBe(0);
  expect(await readdir(folder)).toEqual([]);
});

test.concurrent("a start that cannot have its port makes nothing, so that the next one still shows the token", async () => {
  await using database = await createDatabase();
  const key = { BERTH_MASTER_KEY: newKey() };
  const other = createServer();
  await once(other.listen(0, "127.0.0.1"), "listening");
  const port = String((other.address() as AddressInfo).port);
  const error = await failure(database, { ...key, BERTH_PORT: port });
  other.close();
  expect(error.message).toContain("EADDRINUSE");
  expect(await count(database.db, "organizations")).toBe(0);
  await using again = await start(database, key);
  expect(again.plane.firstToken).toMatch(TOKEN);
});

test.concurrent("the data folder shows nothing to others and keeps one master key for ever", async () => {
  await using database = await createDatabase();
  const dataDir = join(await newHome(), "deep", "data");
  const path = join(dataDir, "master.key");
  const env = { BERTH_DATA_DIR: dataDir };
  {
    await using _first = await start(database, env);
  }
  const key = await readFile(path, "utf8");
  expect(Buffer.from(key, "base64")).toHaveLength(32);
  expect(await modeOf(path)).toBe("600");
  expect(await modeOf(dataDir)).toBe(process.getuid?.() === 0 ? "711" : "700");
  expect(await readdir(dataDir)).toEqual(["master.key"]);
  // A folder that somebody opened is closed again.
  await chmod(dataDir, 0o777);
  {
    await using _second = await start(database, env);
  }
  expect(await readFile(path, "utf8")).toBe(key);
  expect(await modeOf(dataDir)).toBe(process.getuid?.() === 0 ? "711" : "700");
});

test.concurrent("processes that start at once in one new data folder agree on the master key", async () => {
  await using database = await createDatabase();
  const env = { BERTH_DATA_DIR: await newHome() };
  const started = await Promise.all([1, 2, 3].map(() => start(database, env)));
  const keys = new Set(started.map(({ plane }) => Buffer.from(plane.app.masterKey).toString("hex")));
  for (const each of started) await each[Symbol.asyncDispose]();
  expect(keys.size).toBe(1);
  expect(await readdir(env.BERTH_DATA_DIR)).toEqual(["master.key"]);
});

test.concurrent("a configured master key is used, and not written down", async () => {
  await using database = await createDatabase();
  const [dataDir, key] = [await newHome(), newKey()];
  await using started = await start(database, { BERTH_DATA_DIR: dataDir, BERTH_MASTER_KEY: key });
  expect(Buffer.from(started.plane.app.masterKey).toString("base64")).toBe(key);
  expect(await readdir(dataDir)).toEqual([]);
});

test.concurrent.each(["", "c2hvcnQ=", "not base64 but of the right length, isn't it"])(
  "a damaged master.key stops the start and stays as it is: %j",
  async (content) => {
    const dataDir = await newHome();
    await writeFile(join(dataDir, "master.key"), content);
    const error = await failure(untouched, { BERTH_DATA_DIR: dataDir });
    expect(error).toBeInstanceOf(ConfigError);
    expect(error.message).toContain("master.key in BERTH_DATA_DIR is damaged");
    expect(await readFile(join(dataDir, "master.key"), "utf8")).toBe(content);
  },
);

test.concurrent("what is sealed opens with its key and its context only, and not if a single bit differs", () => {
  const [key, other] = [randomBytes(32), randomBytes(32)];
  const plain = Buffer.from("swordfish");
  const sealed = seal(key, "runner 1", plain, randomBytes);
  expect(Buffer.from(unseal(key, "runner 1", sealed))).toEqual(plain);
  expect(Buffer.from(sealed).includes(plain)).toBe(false);
  expect(Buffer.compare(sealed, seal(key, "runner 1", plain, randomBytes))).not.toBe(0);
  expect(() => unseal(other, "runner 1", sealed)).toThrow();
  expect(() => unseal(key, "runner 2", sealed)).toThrow();
  for (let index = 0; index < sealed.length; index += 1) {
    const changed = Buffer.from(sealed);
    changed[index] = (changed[index] ?? 0) ^ 1;
    expect(() => unseal(key, "runner 1", changed)).toThrow();
    expect(() => unseal(key, "runner 1", sealed.subarray(0, index))).toThrow();
  }
});

test.concurrent("a data folder that cannot be used stops the start and names the variable", async () => {
  const file = join(await newHome(), "file");
  await writeFile(file, "");
  const error = await failure(untouched, { BERTH_DATA_DIR: join(file, "data") });
  expect(error).toBeInstanceOf(ConfigError);
  expect(error.message).toMatch(/^BERTH_DATA_DIR /);
});
