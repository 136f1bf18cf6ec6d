import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { chmod, cp, mkdtemp, readFile, rm, stat } from "node:fs/promises";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { RunnerKind, RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { freePort } from "./harness/free-port.ts";
import { createDatabase, type Program, startProgram, type TestDatabase } from "./harness/program.ts";
import { eventually } from "./harness/wait.ts";

// What an operator sees of the program itself: how it ends, and what it prints.

const TOKEN = /berth_[a-z]{3,4}_[0-9A-Za-z]{20,}/g;
const ready = "berth is ready";

let database: TestDatabase;
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-process-"));
  // Users of environments must be able to pass.
  await chmod(folder, 0o711);
  database = await createDatabase();
});

afterAll(async () => {
  await database?.[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
});

interface Settings {
  env: Record<string, string>;
  url: string;
}

/** Settings of a control plane without a runner, in a data folder of its own. */
async function settings(env: Record<string, string> = {}): Promise<Settings> {
  const port = String(await freePort());
  const dataDir = await mkdtemp(join(folder, "data-"));
  return {
    url: `http://127.0.0.1:${port}`,
    env: {
      BERTH_DATA_DIR: dataDir,
      BERTH_PORT: port,
      BERTH_RUNNER: "off",
      BERTH_RATE_LIMIT: "0",
      DATABASE_URL: database.url,
      ...env,
    },
  };
}

/** Runs the program to its end. */
async function run(args: readonly string[], env: Record<string, string>) {
  await using program = startProgram(args, env);
  const code = await program.ended();
  return { code, output: program.output() };
}

const tokensIn = (output: string) => [...new Set(output.match(TOKEN))];
const newToken = () => tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
const newKey = () => randomBytes(32).toString("base64");
const secretParts = (key: string) => [key, Buffer.from(key, "base64").toString("hex")];

describe("usage and configuration", () => {
  test.concurrent.each(["--help", "help"])("%s explains the commands", async (flag) => {
    const { code, output } = await run([flag], {});
    expect(code).toBe(0);
    expect(output).toContain("berth runner");
  });

  test.concurrent.each([["launch"], ["runner", "twice"]])("unknown arguments end with 2: %s %s", async (...args) => {
    const { code, output } = await run(args.filter(Boolean), {});
    expect(code).toBe(2);
    expect(output).toContain(args.filter(Boolean).join(" "));
    expect(output).toContain("berth runner");
  });

  const secret = newToken();
  test.concurrent.each([
    { name: "an unknown variable", variable: "BERTH_RUNER", value: "off" },
    { name: "a port that is none", variable: "BERTH_PORT", value: "80a" },
    { name: "a database that is none", variable: "DATABASE_URL", value: "mysql://user:pw-in-url@localhost/x" },
    { name: "a short master key", variable: "BERTH_MASTER_KEY", value: Buffer.from(secret).toString("base64") },
    { name: "a token that is none", variable: "BERTH_BOOTSTRAP_ADMIN_TOKEN", value: secret.slice(0, -1) },
  ])("$name ends with 2 and names $variable, not its value", async ({ variable, value }) => {
    const { env } = await settings({ [variable]: value });
    const { code, output } = await run([], env);
    expect(output).toContain(variable);
    expect(code).toBe(2);
    expect(output).not.toContain(value);
    expect(output.trim().split("\n")).toHaveLength(1);
  });

  test.concurrent("a runner without a control plane ends with 2 and names the variable", async () => {
    const { code, output } = await run(["runner"], { BERTH_DATA_DIR: folder });
    expect(code).toBe(2);
    expect(output).toContain("BERTH_RUNNER_API_URL");
  });
});

describe("first start and restart", () => {
  test("PLT-2 a generated token is printed once, and nothing secret ever again", async () => {
    await using fresh = await createDatabase({ migrated: false });
    const key = newKey();
    const { env, url } = await settings({ DATABASE_URL: fresh.url, BERTH_MASTER_KEY: key, BERTH_LOG_LEVEL: "debug" });
    let token = "";
    {
      await using first = startProgram([], env);
      await first.says(ready);
      token = /berth_pat_\w{49}/.exec(first.output())?.[0] ?? "";
      const client = createBerthClient({ baseUrl: url, token });
      const { organizationId } = await client.identity.getAuthenticatedIdentity({});
      expect(organizationId).not.toBe("");
      const stranger = createBerthClient({ baseUrl: url, token: newToken() });
      await expect(stranger.identity.getAuthenticatedIdentity({})).rejects.toMatchObject({
        code: Code.Unauthenticated,
      });
      first.send("SIGTERM");
      expect(await first.ended()).toBe(0);
      expect(tokensIn(first.output())).toEqual([token]);
      for (const part of secretParts(key)) expect(first.output()).not.toContain(part);
    }

    await using second = startProgram([], {
      ...env,
      BERTH_BOOTSTRAP_ORG_NAME: "Another",
      BERTH_BOOTSTRAP_ADMIN_EMAIL: "another@example.org",
      BERTH_BOOTSTRAP_ADMIN_TOKEN: newToken(),
    });
    await second.says(ready);
    const client = createBerthClient({ baseUrl: url, token });
    const { organizationId } = await client.identity.getAuthenticatedIdentity({});
    expect(await fresh.db.point`select id, name from organizations`).toEqual([{ id: organizationId, name: "Default" }]);
    expect(await fresh.db.point`select email from accounts`).toEqual([{ email: "admin@localhost" }]);
    second.send("SIGINT");
    expect(await second.ended()).toBe(0);
    expect(tokensIn(second.output())).toEqual([]);
  });

  test("PLT-2 a first start that cannot have the runner's port has shown the token, and the next one goes on", async () => {
    await using fresh = await createDatabase();
    const taken = createServer();
    taken.listen(0, "127.0.0.1");
    await once(taken, "listening");
    const port = String((taken.address() as AddressInfo).port);
    const { env, url } = await settings({ DATABASE_URL: fresh.url, BERTH_RUNNER: "on", BERTH_RUNNER_PORT: port });
    const first = await run([], env);
    expect(first.code).toBe(1);
    const [token = ""] = tokensIn(first.output);
    expect(tokensIn(first.output)).toHaveLength(1);

    taken.close();
    await using second = startProgram([], env);
    await second.says(ready);
    expect(tokensIn(second.output())).toEqual([]);
    const client = createBerthClient({ baseUrl: url, token });
    await eventually(async () => {
      const { runners } = await client.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL] } });
      return runners[0]?.status?.phase === RunnerPhase.ACTIVE;
    }, "the embedded runner is active");
    second.send("SIGTERM");
    expect(await second.ended()).toBe(0);
  });

  test("PLT-2 with a token file nothing secret is printed, and only its owner can read the file", async () => {
    await using fresh = await createDatabase();
    const file = join(folder, "admin-token");
    const { env, url } = await settings({ DATABASE_URL: fresh.url, BERTH_BOOTSTRAP_TOKEN_FILE: file });
    await using program = startProgram([], env);
    await program.says(ready);
    expect((await stat(file)).mode & 0o777).toBe(0o600);
    const client = createBerthClient({ baseUrl: url, token: (await readFile(file, "utf8")).trim() });
    expect((await client.identity.getAuthenticatedIdentity({})).organizationId).not.toBe("");
    program.send("SIGTERM");
    expect(await program.ended()).toBe(0);
    expect(tokensIn(program.output())).toEqual([]);
    expect((await stat(join(env.BERTH_DATA_DIR ?? "", "master.key"))).mode & 0o777).toBe(0o600);
  });

  test("a given first token is not printed", async () => {
    await using fresh = await createDatabase();
    const token = newToken();
    const { env, url } = await settings({ DATABASE_URL: fresh.url, BERTH_BOOTSTRAP_ADMIN_TOKEN: token });
    await using program = startProgram([], env);
    await program.says(ready);
    const client = createBerthClient({ baseUrl: url, token });
    expect((await client.identity.getAuthenticatedIdentity({})).organizationId).not.toBe("");
    expect(tokensIn(program.output())).toEqual([]);
  });
});

describe("refused by state or failed", () => {
  test("another master key ends with 3, and neither key is printed", async () => {
    await using fresh = await createDatabase();
    const [first, other] = [newKey(), newKey()];
    const { env } = await settings({ DATABASE_URL: fresh.url, BERTH_MASTER_KEY: first });
    {
      await using program = startProgram([], env);
      await program.says(ready);
    }
    const { code, output } = await run([], { ...env, BERTH_MASTER_KEY: other });
    expect(code).toBe(3);
    expect(output).toContain("master key");
    for (const part of [first, other].flatMap(secretParts)) expect(output).not.toContain(part);
  });

  test("a database newer than the program ends with 3", async () => {
    await using fresh = await createDatabase();
    await fresh.db.write`insert into schema_migrations (number, name) values (9999, '9999_future.sql')`;
    const { env } = await settings({ DATABASE_URL: fresh.url });
    const { code, output } = await run([], env);
    expect(code).toBe(3);
    expect(output).toContain("9999");
  });

  test("a port that is taken ends with 1, and a password in the database's URL is not printed", async () => {
    const { env } = await settings();
    const nothing = await freePort();
    const unreachable = { ...env, DATABASE_URL: `postgres://berth:pw-in-url@127.0.0.1:${nothing}/berth` };
    const { code, output } = await run([], unreachable);
    expect(code).toBe(1);
    expect(output).not.toContain("pw-in-url");

    await using program = startProgram([], env);
    await program.says(ready);
    const second = await run([], {
      ...env,
      BERTH_DATA_DIR: await mkdtemp(join(folder, "data-")),
      BERTH_MASTER_KEY: await keyOf(env),
    });
    expect(second.code).toBe(1);
    expect(second.output).toContain("EADDRINUSE");
  });
});

const keyOf = async (env: Record<string, string>) =>
  (await readFile(join(env.BERTH_DATA_DIR ?? "", "master.key"), "utf8")).trim();

describe("a control plane at work", () => {
  let url: string;
  let env: Record<string, string>;
  let program: Program;
  let admin: BerthClient;
  const token = newToken();

  async function start() {
    program = startProgram([], env);
    await program.says(ready);
  }

  let fresh: TestDatabase;
  beforeAll(async () => {
    fresh = await createDatabase();
    ({ env, url } = await settings({ DATABASE_URL: fresh.url, BERTH_BOOTSTRAP_ADMIN_TOKEN: token }));
    admin = createBerthClient({ baseUrl: url, token });
    await start();
  });
  afterAll(async () => {
    await program?.[Symbol.asyncDispose]();
    await fresh?.[Symbol.asyncDispose]();
  });

  /** Holds every call that reads a table. */
  async function holdCalls(table: "environment_classes" | "tokens"): Promise<{ release(): Promise<void> }> {
    const { promise: released, resolve } = Promise.withResolvers<void>();
    const { promise: held, resolve: isHeld, reject } = Promise.withResolvers<void>();
    const holding = fresh.db.begin(async (tx) => {
      await tx`lock table ${tx(table)} in access exclusive mode`;
      isHeld();
      await released;
    });
    holding.catch(reject);
    await held;
    return {
      async release() {
        resolve();
        await holding;
      },
    };
  }

  /** Resolves when a statement with this text, not far from its beginning, waits for `holdCalls`. */
  const blocked = (text: string) =>
    eventually(async () => {
      const rows = await fresh.db.point`select from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock' and query like ${`%${text}%`}`;
      return rows.length > 0;
    }, "a call is in flight");

  test("PLT-51 SIGTERM: not ready, streams end UNAVAILABLE, the call in flight finishes, exit 0", async () => {
    const { runners } = await admin.runners.listRunners({});
    const request = {
      scope: { case: "organization" as const, value: true },
      resourceTypeFilters: [{ resourceType: ResourceType.RUNNER, resourceIds: [runners[0]?.runnerId ?? ""] }],
    };
    const streams = await Promise.all(
      (["connect", "grpc", "grpc-web"] as const).map(async (transport) => {
        const client = createBerthClient({ baseUrl: url, token, transport });
        const stream = client.events.watchEvents(request)[Symbol.asyncIterator]();
        expect((await stream.next()).done).toBe(false);
        return stream;
      }),
    );
    const lock = await holdCalls("environment_classes");
    const call = admin.runnerConfiguration.listEnvironmentClasses({});
    await blocked("environment_classes");
    expect((await fetch(`${url}/readyz`)).status).toBe(200);

    program.send("SIGTERM");
    const ends = streams.map(async (stream) => {
      for (;;) if ((await stream.next()).done) return undefined;
    });
    for (const end of await Promise.allSettled(ends)) {
      expect(end.status === "rejected" && ConnectError.from(end.reason).code).toBe(Code.Unavailable);
    }
    expect((await fetch(`${url}/readyz`)).status).toBe(503);
    expect((await fetch(`${url}/healthz`)).status).toBe(200);
    const late = admin.identity.getAuthenticatedIdentity({});
    await expect(late).rejects.toMatchObject({ code: Code.Unavailable });
    await lock.release();
    expect((await call).environmentClasses).toEqual([]);
    expect(await program.ended()).toBe(0);
    expect(tokensIn(program.output())).toEqual([]);
    await start();
  });

  test.each(["SIGTERM", "SIGINT"] as const)(
    "a second signal ends with 1 at once, with a call in flight: %s",
    async (signal) => {
      const lock = await holdCalls("environment_classes");
      const call = admin.runnerConfiguration
        .listEnvironmentClasses({})
        .catch((error: unknown) => ConnectError.from(error).code);
      await blocked("environment_classes");
      program.send("SIGTERM");
      await eventually(async () => (await fetch(`${url}/readyz`)).status === 503, "it drains");
      program.send(signal);
      expect(await program.ended()).toBe(1);
      expect([Code.Aborted, Code.Unavailable]).toContain(await call);
      await lock.release();
      await start();
    },
  );

  test.each(["connect", "grpc", "grpc-web"] as const)(
    "a caller who leaves before it is known who it is leaves nothing in flight: %s",
    async (transport) => {
      const client = createBerthClient({ baseUrl: url, token, transport });
      const leaving = new AbortController();
      const lock = await holdCalls("tokens");
      const calls = [
        client.identity.getAuthenticatedIdentity({}, { signal: leaving.signal }),
        client.events.watchEvents({}, { signal: leaving.signal })[Symbol.asyncIterator]().next(),
      ];
      await blocked("token_id");
      const inFlight = async () => {
        const metrics = await (await fetch(`${url}/metrics`)).text();
        return [...metrics.matchAll(/^berth_rpc_in_flight\{.*\} (\d+)$/gm)].map(([, count]) => Number(count));
      };
      await eventually(async () => (await inFlight()).every((count) => count === 1), "both calls are in flight");
      leaving.abort();
      for (const call of calls) await expect(call).rejects.toMatchObject({ code: Code.Canceled });
      await lock.release();
      await eventually(async () => (await inFlight()).every((count) => count === 0), "nothing is in flight");
    },
  );

  /** A runner alone, against the control plane of this test. */
  async function runner(exchangeToken: string, dataDir?: string) {
    const port = String(await freePort());
    return startProgram(["runner"], {
      BERTH_DATA_DIR: dataDir ?? (await mkdtemp(join(folder, "runner-"))),
      BERTH_RUNNER_PORT: port,
      BERTH_RUNNER_API_URL: url,
      BERTH_RUNNER_EXCHANGE_TOKEN: exchangeToken,
    });
  }

  test("a refused credential ends a runner with 3, and is not printed", async () => {
    const bogus = tokenText(TokenKind.RUNNER_EXCHANGE, randomBytes);
    await using refused = await runner(bogus);
    expect(await refused.ended()).toBe(3);
    expect(refused.output()).toContain("credential");
    expect(tokensIn(refused.output())).toEqual([]);
  });

  test("RUN-14 a runner whose link was replaced ends with 3, its successor with 0 at SIGTERM", async () => {
    const { runner: made, exchangeToken } = await admin.runners.createRunner({
      name: "Twice",
      provider: RunnerProvider.LINUX_HOST,
    });
    const phaseOf = async () =>
      (await admin.runners.getRunner({ runnerId: made?.runnerId ?? "" })).runner?.status?.phase;
    const dataDir = await mkdtemp(join(folder, "runner-"));
    await using first = await runner(exchangeToken, dataDir);
    await first.says("registered with the control plane");
    const copy = await mkdtemp(join(folder, "runner-"));
    await cp(join(dataDir, "runner", "credentials.json"), join(copy, "runner", "credentials.json"));
    await using second = await runner("", copy);
    await second.says("registered with the control plane");
    expect(await first.ended()).toBe(3);
    expect(await phaseOf()).toBe(RunnerPhase.ACTIVE);
    second.send("SIGTERM");
    expect(await second.ended()).toBe(0);
    expect(await phaseOf()).toBe(RunnerPhase.INACTIVE);
    expect(tokensIn(first.output() + second.output())).toEqual([]);
  });
});
