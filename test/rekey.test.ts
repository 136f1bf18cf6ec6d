import { randomBytes } from "node:crypto";
import { pino } from "pino";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import type { Environment } from "../gen/gitpod/v1/environment_pb.js";
import { HostAuthenticationTokenSource, RunnerKind, RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { readServerConfig } from "../src/config.ts";
import { startControlPlane } from "../src/control-plane.ts";
import { RefusedStart } from "../src/domain/errors.ts";
import { holdsMasterKey, UnfinishedRekey, WrongMasterKey } from "../src/store/bootstrap.ts";
import type { Db } from "../src/store/db.ts";
import { unseal } from "../src/store/envelope.ts";
import { rekey, SEALED_COLUMNS } from "../src/store/rekey.ts";
import { sealValue } from "../src/store/secrets.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";
import { connectRunner } from "./harness/tenants.ts";

const SECRETS = 250;

let plane: TestPlane;
let db: Db;
let environmentToken: string;
let secretId: string;
let keys: { from: Uint8Array; to: Uint8Array };

beforeAll(async () => {
  const from = randomBytes(32);
  keys = { from, to: randomBytes(32) };
  plane = await startTestPlane({ BERTH_MASTER_KEY: from.toString("base64") });
  db = plane.plane.app.db;
  const scope = { scope: { case: "organizationId" as const, value: plane.organizationId } };
  const mount = { case: "apiOnly" as const, value: true };
  for (let index = 0; index < SECRETS; index++) {
    const { secret } = await plane.admin.secrets.createSecret({
      name: `SECRET_${index}`,
      value: `${index}`,
      mount,
      scope,
    });
    secretId = secret?.id ?? "";
  }
  const metrics = { enabled: true, url: "https://metrics.example.org", password: "metrics" };
  const spec = { configuration: { metrics } };
  await plane.admin.runners.createRunner({ name: "measured", provider: RunnerProvider.LINUX_HOST, spec });
  const { runner, classId } = await connectRunner(plane);
  await addSourceControl(runner.id);
  const created = await plane.admin.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const { id: environmentId, spec: wanted } = created.environment as Environment;
  const machineSession = wanted?.machine?.session ?? "";
  environmentToken = (await runner.control.createEnvironmentToken({ environmentId, machineSession })).token;
});

afterAll(async () => {
  await plane[Symbol.asyncDispose]();
});

/** Secrets that have to do with source control: a token that can be renewed, and the key of the local runners. */
async function addSourceControl(runnerId: string): Promise<void> {
  const configuration = plane.admin.runnerConfiguration;
  const token = { host: "github.com", token: "t", refreshToken: "r", source: HostAuthenticationTokenSource.OAUTH };
  const { runners } = await plane.admin.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL_CONFIGURATION] } });
  const oauth = { oauthClientId: "id", oauthPlaintextClientSecret: "s" };
  const shared = runners[0]?.runnerId ?? "";
  await configuration.createSCMIntegration({ runnerId: shared, scmId: "github", host: "github.com", ...oauth });
  await configuration.createHostAuthenticationToken({ runnerId, ...token });
}

interface Sealed {
  column: string;
  sealed: Uint8Array;
  context: string;
}

async function sealedValues(): Promise<Sealed[]> {
  const found: Sealed[] = [];
  for (const { table, column, context } of SEALED_COLUMNS) {
    const rows = await db.write<{ sealed: Uint8Array; context: string }[]>`
      select ${db.write(column)} as sealed, ${db.write.unsafe(context)} as context from ${db.write(table)}
      where ${db.write(column)} is not null`;
    found.push(...rows.map((row) => ({ column: `${table}.${column}`, ...row })));
  }
  return found;
}

const opens = (key: Uint8Array, { sealed, context }: Sealed) => {
  try {
    return unseal(key, context, sealed).length > 0;
  } catch {
    return false;
  }
};

/** Starts another process on the database with a key; it ends at once if it may start. */
async function start(masterKey: Uint8Array, work?: (url: string) => Promise<void>): Promise<void> {
  const config = readServerConfig({
    ...{ BERTH_PORT: "0", BERTH_RUNNER: "off", BERTH_BOOTSTRAP: "off", BERTH_DATA_DIR: plane.dataDir },
    ...{ DATABASE_URL: plane.databaseUrl, BERTH_MASTER_KEY: Buffer.from(masterKey).toString("base64") },
  });
  const started = await startControlPlane(config, pino({ level: "silent" }));
  try {
    await work?.(started.server.url);
  } finally {
    await started.stop();
  }
}

test("every column that holds sealed values is known, and takes those of the master key in force only", async () => {
  const columns = await db.write<{ name: string }[]>`
    select table_name || '.' || column_name as name from information_schema.columns
    where table_schema = 'public' and data_type = 'bytea' and column_name like 'sealed%' order by 1`;
  const known = SEALED_COLUMNS.map(({ table, column }) => `${table}.${column}`).sort();
  expect(columns.map(({ name }) => name)).toEqual(known);
  const values = await sealedValues();
  expect([...new Set(values.map(({ column }) => column))].sort()).toEqual(known);
  expect(values.every((value) => opens(keys.from, value))).toBe(true);
  for (const { table, column } of SEALED_COLUMNS) {
    const sealed = sealValue({ id: secretId, organizationId: plane.organizationId }, "x", keys.to, randomBytes);
    const write = db.write`update ${db.write(table)} set ${db.write(column)} = ${sealed}`;
    await expect(write).rejects.toMatchObject({ code: "BK001" });
  }
});

test("a new master key: killed in between, nothing is lost, nobody starts, and the same keys finish it", async () => {
  const total = (await sealedValues()).length;
  await expect(rekey(db, { from: keys.from, to: keys.from }, randomBytes)).rejects.toThrow(RefusedStart);
  await expect(rekey(db, { from: randomBytes(32), to: keys.to }, randomBytes)).rejects.toThrow(WrongMasterKey);
  expect(await holdsMasterKey(db.write, keys.from)).toBe(true);

  // Dies after the first batch of secrets, which are the first of which there are more than one.
  let left = 1 + SEALED_COLUMNS.findIndex(({ table }) => table === "secrets") + 1;
  const dying = new Proxy(db, {
    get: (target, name) => {
      if (name !== "begin") return Reflect.get(target, name);
      return (work: Parameters<Db["begin"]>[0]) => {
        if (left-- === 0) throw new Error("killed");
        return target.begin(work);
      };
    },
  });
  await expect(rekey(dying, keys, randomBytes)).rejects.toThrow("killed");
  const halfway = await sealedValues();
  const done = halfway.filter((value) => opens(keys.to, value));
  expect(done.length).toBeGreaterThan(0);
  expect(done.length).toBeLessThan(total);
  expect(halfway.filter((value) => !opens(keys.to, value)).every((value) => opens(keys.from, value))).toBe(true);
  await expect(start(keys.from)).rejects.toThrow(UnfinishedRekey);
  await expect(start(keys.to)).rejects.toThrow(UnfinishedRekey);
  await expect(rekey(db, { from: keys.from, to: randomBytes(32) }, randomBytes)).rejects.toThrow(RefusedStart);

  // The process that runs with the old key stores nothing under it any more.
  const scope = { scope: { case: "organizationId" as const, value: plane.organizationId } };
  const mount = { case: "apiOnly" as const, value: true };
  expect(await codeOf(plane.admin.secrets.createSecret({ name: "LATE", value: "x", mount, scope }))).toBe(
    "Unavailable",
  );
  expect(await codeOf(plane.admin.secrets.updateSecretValue({ secretId, value: "x" }))).toBe("Unavailable");
  expect((await fetch(`${plane.url}/readyz`)).status).toBe(503);

  expect(await rekey(db, keys, randomBytes)).toBe(total - done.length);
  expect((await sealedValues()).every((value) => opens(keys.to, value) && !opens(keys.from, value))).toBe(true);
  expect(await rekey(db, keys, randomBytes)).toBe(0);
  await expect(start(keys.from)).rejects.toThrow(WrongMasterKey);
  expect(await codeOf(plane.client(environmentToken).secrets.getSecretValue({ secretId }))).toBe("Unavailable");
  await start(keys.to, async (url) => {
    const answer = await fetch(`${url}/gitpod.v1.SecretService/GetSecretValue`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${environmentToken}` },
      body: JSON.stringify({ secretId }),
    });
    expect(await answer.json()).toEqual({ value: `${SECRETS - 1}` });
    expect((await fetch(`${url}/readyz`)).status).toBe(200);
  });
});

test("a value that is being stored when the key changes is found", async () => {
  const next = { from: keys.to, to: randomBytes(32) };
  const id = uuidv7();
  const { organizationId } = plane;
  const sealed = sealValue({ id, organizationId }, "in flight", next.from, randomBytes);
  const stored = Promise.withResolvers<void>();
  const committing = Promise.withResolvers<void>();
  const storing = db.begin(async (tx) => {
    await tx`insert into secrets (id, organization_id, scope, scope_id, name, session, sealed_value, message)
      values (${id}, ${organizationId}, 3, ${organizationId}, 'IN_FLIGHT', ${uuidv7()}, ${sealed}, ''::bytea)`;
    stored.resolve();
    await committing.promise;
  });
  await stored.promise;
  const changing = rekey(db, next, randomBytes);
  committing.resolve();
  await Promise.all([storing, changing]);
  const [row] = await db.write<{ sealed_value: Uint8Array }[]>`select sealed_value from secrets where id = ${id}`;
  const value = unseal(next.to, `secret ${id} of ${organizationId}`, row?.sealed_value ?? new Uint8Array());
  expect(Buffer.from(value).toString()).toBe("in flight");
});
