import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import Gitpod from "@gitpod/sdk";
import { afterAll, beforeAll, expect, test } from "vitest";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { openDb } from "../src/store/db.ts";
import { getEnvironment, isGone, operations, reaches, usableClass } from "./harness/environments.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { refusal } from "./harness/refusal.ts";
import { eventually } from "./harness/wait.ts";

// The whole product with values that are looked for wherever they must not be, while an environment works with them.

let berth: Installation;
let admin: BerthClient;
let userId: string;
let organizationId: string;
let environmentId: string;

const canaries = new Map<string, string>();
/** A value that occurs nowhere else; those of before stay forbidden. */
function canary(name: string): string {
  const value = `canary${randomBytes(16).toString("hex")}`;
  canaries.set(`${name} ${canaries.size}`, value);
  return value;
}

beforeAll(async () => {
  berth = await startInstallation({ BERTH_LOG_LEVEL: "debug" });
  admin = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  const identity = await admin.identity.getAuthenticatedIdentity({});
  [userId, organizationId] = [identity.subject?.id ?? "", identity.organizationId];
  await createSecrets();
  const machine = { class: await usableClass(admin) };
  environmentId = (await admin.environments.createEnvironment({ spec: { machine } })).environment?.id ?? "";
  await reaches(admin, environmentId, EnvironmentPhase.RUNNING);
});

afterAll(async () => {
  if (environmentId) {
    await admin.environments.deleteEnvironment({ environmentId, force: true });
    await isGone(join(berth.dataDir, "runner"), environmentId);
  }
  await berth?.[Symbol.asyncDispose]();
});

const ofUser = () => ({ scope: { case: "userId" as const, value: userId } });
const ofOrganization = () => ({ scope: { case: "organizationId" as const, value: organizationId } });

async function createSecrets(): Promise<void> {
  const { secrets } = admin;
  const variable = { case: "environmentVariable" as const, value: true };
  const registry = { case: "containerRegistryBasicAuthHost" as const, value: "registry.example.org" };
  const proxy = { targetHosts: ["api.example.org"], header: "Authorization" };
  const login = Buffer.from(`user:${canary("login")}`).toString("base64");
  canaries.set("encoded login", login);
  for (const request of [
    { name: "SHARED_VARIABLE", mount: variable, scope: ofOrganization(), value: canary("shadowed") },
    { name: "SHARED_VARIABLE", mount: variable, scope: ofUser(), value: canary("variable") },
    {
      name: "KEY_FILE",
      mount: { case: "filePath" as const, value: "/etc/key" },
      scope: ofUser(),
      value: canary("file"),
    },
    { name: "API_ONLY", mount: { case: "apiOnly" as const, value: true }, scope: ofUser(), value: canary("api") },
    { name: "REGISTRY", mount: registry, scope: ofUser(), value: login },
    { name: "PROXIED", mount: variable, scope: ofUser(), value: canary("proxied"), credentialProxy: proxy },
  ])
    await secrets.createSecret(request);
}

const secretId = async (name: string) => {
  const { secrets } = await admin.secrets.listSecrets({ filter: { scope: ofUser() } });
  return secrets.find((each) => each.name === name)?.id ?? "";
};

/** Looks for all canaries, also in base64 and as bytes; what is found is named, never shown. */
function sightings(where: string, text: string): string[] {
  return [...canaries].flatMap(([name, value]) => {
    const forms = [value, Buffer.from(value).toString("base64").slice(0, 40), Buffer.from(value).toString("hex")];
    return forms.some((form) => text.includes(form)) ? [`${name} in ${where}`] : [];
  });
}

const database = () =>
  openDb(`postgres://berth@localhost/berth?host=${encodeURIComponent(join(berth.dataDir, "postgres/data"))}`);

async function inDatabase(): Promise<string[]> {
  const db = database();
  try {
    const tables = await db.write<{ name: string }[]>`
      select tablename as name from pg_tables where schemaname = 'public'`;
    expect(tables.map(({ name }) => name)).toEqual(
      expect.arrayContaining(["secrets", "environments", "audit_log", "events"]),
    );
    const found: string[] = [];
    for (const { name } of tables) {
      const rows = await db.write<{ row: string }[]>`select to_jsonb(t)::text as row from ${db.write(name)} t`;
      for (const { row } of rows) {
        const bytes = [...row.matchAll(/\\\\x([0-9a-f]+)/g)].map(([, hex = ""]) =>
          Buffer.from(hex, "hex").toString("latin1"),
        );
        found.push(...sightings(`table ${name}`, row), ...sightings(`table ${name}`, bytes.join("\n")));
      }
    }
    return found;
  } finally {
    await db.close();
  }
}

async function inProcesses(): Promise<string[]> {
  const found: string[] = [];
  for (const pid of (await readdir("/proc")).filter((name) => /^\d+$/.test(name)).map(Number)) {
    const read = (file: string) => readFile(`/proc/${pid}/${file}`, "latin1").catch(() => "");
    found.push(...sightings(`cmdline of ${pid}`, await read("cmdline")));
    const environ = await read("environ");
    const isOwn = environ.includes(`BERTH_ENVIRONMENT_ID=${environmentId}`);
    if (!isOwn) found.push(...sightings(`environ of ${pid}`, environ));
  }
  return found;
}

/** Files of the data folder that hold a canary, without those in folders for secrets. */
async function inFiles(folder: string): Promise<string[]> {
  const found: string[] = [];
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    if (!entry.isFile() || path.includes("/secrets/")) continue;
    found.push(...sightings(path, await readFile(path, "latin1").catch(() => "")));
  }
  return found;
}

async function inApi(): Promise<string[]> {
  const text = (value: unknown) => JSON.stringify(value, (_key, each) => (typeof each === "bigint" ? `${each}` : each));
  const { accessToken } = await admin.environments.createEnvironmentLogsToken({ environmentId });
  const environment = await getEnvironment(admin, environmentId);
  const logs = await fetch(`${environment.status?.environmentUrls?.logs}?follow=false`, {
    headers: { authorization: `Bearer ${accessToken}` },
  });
  return [
    ...sightings("the environment", text(environment)),
    ...sightings("the list of secrets", text(await admin.secrets.listSecrets({}))),
    ...sightings("the audit log", text(await admin.events.listAuditLogs({ pagination: { pageSize: 100 } }))),
    ...sightings("the log of the environment", await logs.text()),
  ];
}

const everywhere = async () => [
  ...(await inDatabase()),
  ...(await inProcesses()),
  ...(await inFiles(join(berth.dataDir, "runner"))),
  ...(await inApi()),
  ...sightings("the log of the server", berth.output()),
];

test("the search finds what is planted in a table, a file and a command line", async () => {
  const value = canary("planted");
  const file = join(berth.dataDir, "runner", "planted");
  await writeFile(file, `x${value}x`);
  const shell = spawn("sh", ["-c", "read line", value], { stdio: ["pipe", "ignore", "ignore"] });
  const db = database();
  await db.write`create table planted (words text, bytes bytea)`;
  await db.write`insert into planted values (${value}, null), (null, ${Buffer.from(value)})`;
  expect((await inDatabase()).length).toBeGreaterThanOrEqual(2);
  expect(await inFiles(join(berth.dataDir, "runner"))).toHaveLength(1);
  expect(await inProcesses()).toHaveLength(1);
  await db.write`drop table planted`;
  await db.close();
  await rm(file);
  const exited = once(shell, "exit");
  shell.kill();
  await exited;
  expect(await everywhere()).toEqual([]);
});

test("ENV-34 an environment works with values that appear nowhere else", { timeout: 120_000 }, async () => {
  const ops = await operations(admin, environmentId);
  const run = async (command: string) => (await ops.exec({ command })).stdout.trim();
  const value = (name: string) => [...canaries].find(([key]) => key.startsWith(`${name} `))?.[1] ?? name;
  const digest = async (command: string) => run(`${command} | tr -d '\\n' | sha256sum | cut -d' ' -f1`);
  const digestOf = async (text: string) =>
    Buffer.from(await crypto.subtle.digest("SHA-256", Buffer.from(text))).toString("hex");
  expect(await digest("printenv SHARED_VARIABLE")).toBe(await digestOf(value("variable")));
  expect(await digest('cat "$BERTH_SECRET_FILE_KEY_FILE"')).toBe(await digestOf(value("file")));
  // A process that goes on with the value it started with.
  await run(
    "nohup sh -c 'while [ ! -e ~/stop ]; do sleep 0.1; done; printenv SHARED_VARIABLE | sha256sum > ~/seen' > /dev/null 2>&1 &",
  );
  expect(await everywhere()).toEqual([]);

  const [variable, file] = [await secretId("SHARED_VARIABLE"), await secretId("KEY_FILE")];
  const [nextVariable, nextFile] = [canary("variable"), canary("file")];
  await admin.secrets.updateSecretValue({ secretId: variable, value: nextVariable });
  await admin.secrets.updateSecretValue({ secretId: file, value: nextFile });
  const nextFileDigest = await digestOf(nextFile);
  await eventually(
    async () => (await digest('cat "$BERTH_SECRET_FILE_KEY_FILE"')) === nextFileDigest,
    "the file changes in place",
    110_000,
  );
  await eventually(
    async () => (await digest("printenv SHARED_VARIABLE")) === (await digestOf(nextVariable)),
    "new processes see the new value",
  );
  await run("touch ~/stop; while [ ! -s ~/seen ]; do sleep 0.1; done");
  const printed = `${value("variable")}\n`;
  expect(await run("cut -d' ' -f1 ~/seen")).toBe(await digestOf(printed));
  expect(await everywhere()).toEqual([]);
});

test("no refusal repeats a value", async () => {
  const scope = ofUser();
  const registry = { case: "containerRegistryBasicAuthHost" as const, value: "registry.example.org" };
  const variable = { case: "environmentVariable" as const, value: true };
  const refusals = [
    await refusal(
      admin.secrets.createSecret({ name: "REGISTRY_2", mount: registry, scope, value: canary("bad login") }),
    ),
    await refusal(admin.secrets.createSecret({ name: "PATH", mount: variable, scope, value: canary("reserved") })),
    await refusal(
      admin.secrets.createSecret({ name: "SHARED_VARIABLE", mount: variable, scope, value: canary("taken") }),
    ),
    await refusal(admin.secrets.createSecret({ name: "NUL", mount: variable, scope, value: `${canary("nul")}\0` })),
    await refusal(
      admin.secrets.createSecret({ name: "LONG", mount: variable, scope, value: canary("long").repeat(500) }),
    ),
    await refusal(admin.secrets.updateSecretValue({ secretId: organizationId, value: canary("lost") })),
    await refusal(admin.secrets.getSecretValue({ secretId: await secretId("API_ONLY") })),
  ];
  for (const error of refusals) {
    const details = JSON.stringify(error.details, (_key, each) => (typeof each === "bigint" ? `${each}` : each));
    expect(sightings(error.message, `${error.message} ${error.rawMessage} ${details}`)).toEqual([]);
  }
  expect(await everywhere()).toEqual([]);
});

test("the official SDK manages secrets unmodified, and reads a value from inside of the environment", async () => {
  const baseURL = `${berth.url}/api`;
  const sdk = new Gitpod({ baseURL, bearerToken: berth.adminToken });
  const value = canary("sdk");
  const { secret } = await sdk.secrets.create({
    name: "FROM_SDK",
    value,
    environmentVariable: true,
    scope: { userId },
  });
  expect(secret).toMatchObject({
    name: "FROM_SDK",
    environmentVariable: true,
    scope: { userId },
    creator: { id: userId },
  });
  const listed: string[] = [];
  for await (const each of sdk.secrets.list({ filter: { scope: { userId } }, pageSize: 2 }))
    listed.push(each.name ?? "");
  expect(listed).toEqual(["FROM_SDK", "PROXIED", "REGISTRY", "API_ONLY", "KEY_FILE", "SHARED_VARIABLE"]);
  const id = secret?.id ?? "";
  await eventually(async () => {
    const { environment } = await sdk.environments.retrieve({ environmentId });
    return environment.spec?.secrets?.some((each) => each.sourceRef === id);
  }, "the environment has it");
  const ops = await operations(admin, environmentId);
  const token = (await ops.exec({ command: "printenv GITPOD_API_KEY" })).stdout.trim();
  const inside = new Gitpod({ baseURL, bearerToken: token });
  expect(await inside.secrets.getValue({ secretId: id })).toEqual({ value });
  await expect(sdk.secrets.getValue({ secretId: id })).rejects.toMatchObject({ status: 403 });
  const next = canary("sdk");
  await sdk.secrets.updateValue({ secretId: id, value: next });
  expect(await inside.secrets.getValue({ secretId: id })).toEqual({ value: next });
  await sdk.secrets.delete({ secretId: id });
  await expect(sdk.secrets.delete({ secretId: id })).rejects.toMatchObject({ status: 404 });
  expect(await everywhere()).toEqual([]);
});
