import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { Code } from "@connectrpc/connect";
import { pino } from "pino";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerKind, RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { createBerthClient } from "../src/client.ts";
import { readServerConfig } from "../src/config.ts";
import { startControlPlane } from "../src/control-plane.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import type { Db } from "../src/store/db.ts";
import { unseal } from "../src/store/envelope.ts";
import { freePort } from "./harness/free-port.ts";
import { startInstallation } from "./harness/installation.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { createDatabase, startProgram } from "./harness/program.ts";
import { codeOf } from "./harness/refusal.ts";
import { addOrganization } from "./harness/tenants.ts";

// What an operator does with `berth admin`, as processes of their own beside a control plane that serves.

const MAIN = fileURLToPath(new URL("../src/main.ts", import.meta.url));
const DAY_MS = 24 * 60 * 60_000;
const PAT = /^berth_pat_\w{49}\n$/;

let plane: TestPlane;
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-admin-"));
  await chmod(folder, 0o711);
  plane = await startTestPlane();
});

afterAll(async () => {
  await plane?.[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
});

const db = () => plane.plane.app.db;

/** Runs `berth admin` with these words, by default on the database of the control plane. */
async function admin(command: string, more: string[] = [], env: Record<string, string> = {}) {
  const settings = { DATABASE_URL: plane.databaseUrl, BERTH_DATA_DIR: join(folder, "none"), ...env };
  await using program = startProgram(["admin", ...command.split(" ").filter(Boolean), ...more], settings);
  const code = await program.ended();
  return { code, printed: program.printed(), told: program.output().replace(program.printed(), "") };
}

/** What the audit log says of a subject, and by whom. */
const entriesOf = (subjectId: string) =>
  db().point<{ action: string; actor_id: string | null; actor_principal: Principal; subject_type: ResourceType }[]>`
    select action, actor_id, actor_principal, subject_type from audit_log where subject_id = ${subjectId} order by id`;

const identityOf = (token: string) => plane.client(token.trim()).identity.getAuthenticatedIdentity({});
const emailOf = (userId: string) => `${userId}@example.org`;

async function stateOf(userId: string) {
  const [user] = await db().point<{ role: OrganizationRole; status: UserStatus; groups: string[] }[]>`
    select role, status, array(select g.name from group_members m join groups g on g.id = m.group_id
      where m.member_id = u.id and g.system_managed order by g.name) as groups from users u where id = ${userId}`;
  return user;
}

describe("usage", () => {
  test.concurrent.each(["", "help", "--help"])("`admin %s` lists the commands", async (words) => {
    const { code, printed } = await admin(words);
    expect(code).toBe(0);
    for (const command of ["bootstrap", "token create", "restore", "runner token", "rotate-key", "audit export"]) {
      expect(printed).toContain(`berth admin ${command}`);
    }
  });

  test.concurrent.each([
    ["frobnicate", "frobnicate"],
    ["token", "token"],
    ["token create", "--email"],
    ["token create --email x@y --days 91", "--days"],
    ["token create --email x@y --days 0", "--days"],
    ["token create --email x@y --mail z", "--mail"],
    ["token create x@y", "x@y"],
    ["restore --email nobody", "--email"],
    ["runner token", "--runner"],
    ["audit export --from yesterday", "--from"],
    ["audit export --to 2026-13-45", "--to"],
    ["bootstrap now", "now"],
    ["rotate-key --new-key-file x", "BERTH_MASTER_KEY"],
    ["rekey --key x", "--key"],
  ])("`admin %s` ends with 2 and says what is wrong", async (words, what) => {
    const { code, printed, told } = await admin(words);
    expect(told).toContain(what);
    expect([code, printed]).toEqual([2, ""]);
  });

  test.concurrent("a wrong variable ends with 2 and is named", async () => {
    const { code, told } = await admin("restore --email a@b", [], { BERTH_PORT: "x" });
    expect(told).toContain("BERTH_PORT");
    expect(code).toBe(2);
  });
});

describe("token create", () => {
  test("prints a token of the user and nothing else; the log tells that nobody in particular made it", async () => {
    const { id } = await plane.addUser();
    const { code, printed, told } = await admin("token create --email", [emailOf(id).toUpperCase()]);
    expect([code, told]).toEqual([0, expect.stringContaining("30 days")]);
    expect(printed).toMatch(PAT);
    expect(await identityOf(printed)).toMatchObject({
      subject: { id, principal: Principal.USER },
      organizationId: plane.organizationId,
    });
    const [token] = await db().point<
      { id: string }[]
    >`select id from tokens where description = 'Created by the operator'`;
    expect(await entriesOf(token?.id ?? "")).toEqual([
      {
        ...{ action: "Personal access token created", actor_id: null, actor_principal: Principal.UNSPECIFIED },
        subject_type: ResourceType.PERSONAL_ACCESS_TOKEN,
      },
    ]);
    expect(told + plane.logged()).not.toContain(printed.trim());
  });

  test("takes a lifetime, a description and whether it may only read", async () => {
    const { id } = await plane.addUser();
    const options = ["--email", emailOf(id), "--days", "1", "--description", "For a look", "--read-only"];
    const { printed } = await admin("token create", options);
    const client = plane.client(printed.trim());
    expect(await codeOf(client.runners.createRunner({ name: "one", provider: RunnerProvider.LINUX_HOST }))).toBe(
      Code[Code.PermissionDenied],
    );
    const [row] = await db().point<{ ms: number }[]>`
      select extract(epoch from expires_at - created_at)::bigint * 1000 as ms from tokens where description = 'For a look'`;
    expect(row?.ms).toBe(DAY_MS);
  });

  test("is refused for an unknown address, and for users who are not in", async () => {
    const { id } = await plane.addUser();
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${id}`;
    for (const email of [emailOf(id), "nobody@example.org"]) {
      const { code, printed, told } = await admin("token create --email", [email]);
      expect([code, printed]).toEqual([3, ""]);
      expect(told).toContain(email);
    }
  });

  test("asks which organization if somebody is in several", async () => {
    const { id } = await plane.addUser();
    const other = await addOrganization(plane);
    await db().write`insert into users (id, organization_id, account_id, role, status, member_since)
      select ${uuidv7()}, ${other}, account_id, role, status, now() from users where id = ${id}`;
    const vague = await admin("token create --email", [emailOf(id)]);
    expect([vague.code, vague.printed]).toEqual([2, ""]);
    expect(vague.told).toContain(other);
    expect(vague.told).toContain(plane.organizationId);
    for (const organization of [other, "Another"]) {
      const { printed } = await admin("token create --email", [emailOf(id), "--organization", organization]);
      expect((await identityOf(printed)).organizationId).toBe(other);
    }
    await db().write`update organizations set name = 'Elsewhere' where id = ${other}`;
  });
});

describe("restore", () => {
  const restored = { role: OrganizationRole.ADMIN, status: UserStatus.ACTIVE, groups: ["org-admins", "org-members"] };
  const here = () => ["--organization", plane.organizationId];

  test.each([
    ["a member", OrganizationRole.MEMBER, UserStatus.ACTIVE],
    ["a suspended admin", OrganizationRole.ADMIN, UserStatus.SUSPENDED],
    ["somebody who has left", OrganizationRole.MEMBER, UserStatus.LEFT],
  ])("makes %s an active admin, once", async (_who, role, status) => {
    const { id } = await plane.addUser();
    await db().write`update users set role = ${role}, status = ${status} where id = ${id}`;
    if (status === UserStatus.LEFT) await db().write`delete from group_members where member_id = ${id}`;
    const { code, printed } = await admin("restore --email", [emailOf(id), ...here()]);
    expect([code, printed]).toEqual([0, ""]);
    expect(await stateOf(id)).toEqual(restored);
    const again = await admin("restore --email", [emailOf(id), ...here()]);
    expect([again.code, again.told]).toEqual([0, expect.stringContaining("already")]);
    expect(await entriesOf(id)).toMatchObject([
      { action: "User restored as admin", actor_id: null, actor_principal: Principal.UNSPECIFIED },
    ]);
  });

  test("adds somebody who was never in, whose token then works", async () => {
    const { told } = await admin("restore", ["--email", "New@Example.org", "--name", "Jo New", ...here()]);
    expect(told).toContain("was added");
    const { printed } = await admin("token create", ["--email", "new@example.org"]);
    const { subject } = await identityOf(printed);
    expect(await stateOf(subject?.id ?? "")).toEqual(restored);
    const { user } = await plane.client(printed.trim()).users.getAuthenticatedUser({});
    expect(user).toMatchObject({ name: "Jo New", email: "new@example.org" });
  });

  test("is refused for an organization that is none, and asks which if there are several", async () => {
    const unknown = await admin("restore --email a@example.org --organization", [uuidv7()]);
    expect(unknown.code).toBe(3);
    const other = await addOrganization(plane);
    const vague = await admin("restore --email a@example.org");
    expect([vague.code, vague.told]).toEqual([2, expect.stringContaining(other)]);
  });
});

describe("runner token", () => {
  test("prints an exchange token, by the runner's id or name", async () => {
    const { runner } = await plane.admin.runners.createRunner({ name: "builder", provider: RunnerProvider.LINUX_HOST });
    const id = runner?.runnerId ?? "";
    for (const wanted of [id, "builder"]) {
      const { code, printed } = await admin("runner token --runner", [wanted]);
      expect([code, printed]).toEqual([0, expect.stringMatching(/^berth_rxt_\w{49}\n$/)]);
      const { accessToken } = await plane.client("").identity.exchangeToken({ exchangeToken: printed.trim() });
      expect((await identityOf(accessToken)).subject?.id).toBe(id);
    }
    const issued = (await entriesOf(id)).filter(({ action }) => action === "Runner exchange token issued");
    expect(issued.slice(-2)).toMatchObject([
      { actor_id: null, actor_principal: Principal.UNSPECIFIED },
      { actor_id: null, actor_principal: Principal.UNSPECIFIED },
    ]);
  });

  test("is refused for what is no runner or has no process, and asks which if two have the name", async () => {
    for (const wanted of [uuidv7(), "nothing", "Local runners"]) {
      expect((await admin("runner token --runner", [wanted])).code).toBe(3);
    }
    const made = [1, 2].map(() =>
      plane.admin.runners.createRunner({ name: "twin", provider: RunnerProvider.LINUX_HOST }),
    );
    const ids = (await Promise.all(made)).map(({ runner }) => runner?.runnerId ?? "");
    const vague = await admin("runner token --runner twin");
    expect([vague.code, vague.printed]).toEqual([2, ""]);
    for (const id of ids) expect(vague.told).toContain(id);
  });
});

describe("audit export", () => {
  const read = (printed: string) =>
    printed
      .split("\n")
      .filter(Boolean)
      .map((line) => JSON.parse(line));

  test("prints every entry as a line of JSON, oldest first, with the credential", async () => {
    await db()
      .write`insert into audit_log (id, organization_id, actor_principal, subject_type, kind, action, created_at)
      select gen_random_uuid(), ${plane.organizationId}, 0, 0, 1, 'entry ' || number, '2001-02-03T04:05:06Z'::timestamptz + number * interval '1 hour'
      from generate_series(1, 1500) number`;
    await plane.admin.runners.createRunner({ name: "audited", provider: RunnerProvider.LINUX_HOST });
    const { code, printed } = await admin("audit export");
    expect(code).toBe(0);
    const lines = read(printed);
    const [total] = await db().point<{ count: number }[]>`select count(*)::int as count from audit_log`;
    expect(lines).toHaveLength(total?.count ?? 0);
    expect(lines.map(({ id }) => id)).toEqual(lines.map(({ id }) => id).sort());
    const [{ id: tokenId } = { id: "" }] = await db().point<{ id: string }[]>`
      select id from tokens where description = 'First start'`;
    expect(lines.filter(({ action }) => action === "Runner created").at(-1)).toMatchObject({
      organizationId: plane.organizationId,
      ...{ actorPrincipal: "PRINCIPAL_USER", subjectType: "RESOURCE_TYPE_RUNNER" },
      ...{ kind: "AUDIT_LOG_ENTRY_KIND_RESOURCE_CHANGE", credentialId: tokenId, issuerId: null },
      createdAt: expect.stringMatching(/^20\d\d-.*Z$/),
    });
    expect(printed).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  });

  test("of one organization, from one time up to another", async () => {
    const range = ["--from", "2001-02-03T06:05:06Z", "--to", "2001-02-03T08:05:06Z"];
    const { printed } = await admin("audit export", range);
    expect(
      read(printed)
        .map(({ action }) => action)
        .sort(),
    ).toEqual(["entry 2", "entry 3"]);
    const other = await addOrganization(plane);
    const foreign = read((await admin("audit export --organization", [other])).printed);
    expect(foreign.length).toBeGreaterThan(0);
    expect(new Set(foreign.map(({ organizationId }) => organizationId))).toEqual(new Set([other]));
    expect((await admin("audit export --organization nothing")).code).toBe(3);
  });

  test("ends in peace when nobody reads on", async () => {
    const command = `set -o pipefail; ${process.execPath} ${MAIN} admin audit export | head -n 1`;
    const env = { PATH: process.env.PATH, DATABASE_URL: plane.databaseUrl, BERTH_DATA_DIR: join(folder, "none") };
    const { stdout, stderr } = await promisify(execFile)("bash", ["--norc", "-c", command], { env });
    expect([read(stdout).length, stderr]).toEqual([1, ""]);
  });
});

test("no command made anything in the data directory, which a database of one's own does not need", async () => {
  expect(await readdir(folder)).not.toContain("none");
});

describe("bootstrap", () => {
  const TOKEN = /^export BERTH_TOKEN=(berth_pat_\w{49})$/gm;
  const tokensIn = (text: string) => [...text.matchAll(TOKEN)].map(([, token = ""]) => token);

  test("PLT-1 of two at once on an empty database, one prints a token; later ones change nothing", async () => {
    await using database = await createDatabase({ migrated: false });
    const key = Buffer.alloc(32, 1).toString("base64");
    const run = async () =>
      admin("bootstrap", [], {
        ...{ DATABASE_URL: database.url, BERTH_MASTER_KEY: key, BERTH_RUNNER: "off", BERTH_BOOTSTRAP: "off" },
        BERTH_DATA_DIR: await mkdtemp(join(folder, "data-")),
      });
    const [first, second] = await Promise.all([run(), run()]);
    expect([first.code, second.code]).toEqual([0, 0]);
    expect(tokensIn(first.printed + second.printed)).toHaveLength(1);
    const third = await run();
    expect([third.code, third.printed]).toEqual([0, ""]);
    expect(third.told).toContain("organization exists");
    expect((await database.db.point`select from organizations`).length).toBe(1);
    const other = await admin("bootstrap", [], {
      ...{ DATABASE_URL: database.url, BERTH_MASTER_KEY: Buffer.alloc(32, 2).toString("base64"), BERTH_RUNNER: "off" },
      BERTH_DATA_DIR: await mkdtemp(join(folder, "data-")),
    });
    expect([other.code, other.told]).toEqual([3, expect.stringContaining("master key")]);
  });

  test("other commands refuse a database that is empty, or newer than the program", async () => {
    await using empty = await createDatabase({ migrated: false });
    const none = await admin("restore --email a@b", [], { DATABASE_URL: empty.url });
    expect([none.code, none.told]).toEqual([3, expect.stringContaining("not migrated")]);
    expect(await empty.db.point`select from pg_tables where schemaname = 'public'`).toHaveLength(0);
    await using newer = await createDatabase();
    await newer.db.write`insert into schema_migrations (number, name) values (9999, '9999_future.sql')`;
    const refused = await admin("restore --email a@b", [], { DATABASE_URL: newer.url });
    expect([refused.code, refused.told]).toEqual([3, expect.stringContaining("9999")]);
  });

  test("an embedded runner that has lost its credential says how to get one, and takes it", async () => {
    await using database = await createDatabase();
    const [port, runnerPort, dataDir] = [await freePort(), await freePort(), await mkdtemp(join(folder, "data-"))];
    await chmod(dataDir, 0o711);
    const env = {
      ...{ DATABASE_URL: database.url, BERTH_DATA_DIR: dataDir },
      ...{ BERTH_PORT: String(port), BERTH_RUNNER_PORT: String(runnerPort) },
    };
    const { printed } = await admin("bootstrap", [], env);
    const client = createBerthClient({ baseUrl: `http://127.0.0.1:${port}`, token: tokensIn(printed)[0] ?? "" });
    await rm(join(dataDir, "runner", "exchange-token"));
    let runnerName = "";
    {
      await using without = startProgram([], env);
      await without.says("berth admin runner token --runner");
      runnerName = (await client.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL] } })).runners[0]?.name ?? "";
      without.send("SIGTERM");
      expect(await without.ended()).toBe(0);
    }
    const issued = await admin("runner token --runner", [runnerName], env);
    await using restarted = startProgram([], { ...env, BERTH_RUNNER_EXCHANGE_TOKEN: issued.printed.trim() });
    await restarted.says("registered with the control plane");
    restarted.send("SIGTERM");
    expect(await restarted.ended()).toBe(0);
  });
});

describe("rotate-key", () => {
  const newKey = () => randomBytes(32).toString("base64");

  /** An installation with something sealed, made by a server that has ended. */
  async function sealed(env: Record<string, string>) {
    await using plane = await startTestPlaneOn(env);
    const { user } = await plane.client.users.getAuthenticatedUser({});
    const scope = { scope: { case: "userId" as const, value: user?.id ?? "" } };
    const mount = { case: "environmentVariable" as const, value: true };
    await plane.client.secrets.createSecret({ name: "API_KEY", value: "s3cret", scope, mount });
    await plane.client.identity.getIDToken({ audience: ["a"] });
  }

  async function startTestPlaneOn(env: Record<string, string>) {
    const adminToken = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
    const settings = { BERTH_PORT: "0", BERTH_RUNNER: "off", BERTH_BOOTSTRAP_ADMIN_TOKEN: adminToken, ...env };
    const plane = await startControlPlane(readServerConfig(settings), pino({ level: "silent" }));
    const client = createBerthClient({ baseUrl: plane.server.url, token: adminToken });
    return { plane, client, [Symbol.asyncDispose]: () => plane.stop() };
  }

  test("replaces a key of the operator's own: the old one opens nothing any more, the new one all", async () => {
    await using database = await createDatabase();
    const [before, after] = [newKey(), newKey()];
    const env = { DATABASE_URL: database.url, BERTH_DATA_DIR: await mkdtemp(join(folder, "data-")) };
    await sealed({ ...env, BERTH_MASTER_KEY: before });
    const file = join(env.BERTH_DATA_DIR, "next");

    const without = await admin("rotate-key", [], { ...env, BERTH_MASTER_KEY: before });
    expect([without.code, without.told]).toEqual([2, expect.stringContaining("--new-key-file")]);
    const absent = await admin("rotate-key --new-key-file", [file], { ...env, BERTH_MASTER_KEY: before });
    expect(absent.code).toBe(2);
    await writeFile(file, after.slice(4));
    const damaged = await admin("rotate-key --new-key-file", [file], { ...env, BERTH_MASTER_KEY: before });
    expect([damaged.code, damaged.told]).toEqual([2, expect.stringContaining("base64")]);
    await writeFile(file, `${after}\n`);
    const wrong = await admin("rotate-key --new-key-file", [file], { ...env, BERTH_MASTER_KEY: newKey() });
    expect([wrong.code, wrong.told]).toEqual([3, expect.stringContaining("master key")]);

    const done = await admin("rotate-key --new-key-file", [file], { ...env, BERTH_MASTER_KEY: before });
    expect([done.code, done.printed]).toEqual([0, ""]);
    expect(done.told).toContain("2 sealed values");
    for (const key of [before, after]) expect(done.told).not.toContain(key);
    const again = await admin("rekey --new-key-file", [file], { ...env, BERTH_MASTER_KEY: before });
    expect([again.code, again.told]).toEqual([0, expect.stringContaining("0 sealed values")]);
    const entries = await database.db
      .point`select actor_id, actor_principal from audit_log where action = 'Master key replaced'`;
    expect(entries).toEqual([{ actor_id: null, actor_principal: Principal.UNSPECIFIED }]);

    const refused = startTestPlaneOn({ ...env, BERTH_MASTER_KEY: before });
    await expect(refused).rejects.toThrow(/master key/);
    const keys = { from: Buffer.from(after, "base64"), row: await sealedSecret(database.db) };
    expect(open(keys.from, keys.row)).toBe("s3cret");
  });

  test("replaces the key beside the data by one that it makes, whatever interrupts it", async () => {
    await using database = await createDatabase();
    const env = { DATABASE_URL: database.url, BERTH_DATA_DIR: await mkdtemp(join(folder, "data-")) };
    await sealed(env);
    const path = join(env.BERTH_DATA_DIR, "master.key");
    const before = await readFile(path, "utf8");
    const done = await admin("rekey", [], env);
    expect([done.code, done.told]).toEqual([0, expect.stringContaining("2 sealed values")]);
    const after = await readFile(path, "utf8");
    expect(after).not.toBe(before);
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    expect(open(Buffer.from(after, "base64"), await sealedSecret(database.db))).toBe("s3cret");
    // As if it had been killed before it put the new key into its place.
    await writeFile(path, before);
    await writeFile(`${path}.next`, after);
    expect((await admin("rekey", [], env)).code).toBe(0);
    expect(await readFile(path, "utf8")).toBe(after);
    expect((await readdir(env.BERTH_DATA_DIR)).filter((name) => name.startsWith("master"))).toEqual(["master.key"]);
  });

  async function sealedSecret(db: Db) {
    const [row] = await db.point<{ id: string; organization: string; sealed: Uint8Array }[]>`
      select id, organization_id as organization, sealed_value as sealed from secrets`;
    if (!row) throw new Error("no secret");
    return row;
  }

  const open = (key: Uint8Array, { id, organization, sealed }: Awaited<ReturnType<typeof sealedSecret>>) =>
    Buffer.from(unseal(key, `secret ${id} of ${organization}`, sealed)).toString();
});

test("the embedded database serves commands beside a server, after one that was killed, and before the next", async () => {
  const nowhere = { DATABASE_URL: "", BERTH_DATA_DIR: join(folder, "empty") };
  const refused = await admin("restore --email a@b", [], nowhere);
  expect([refused.code, refused.told]).toEqual([3, expect.stringContaining("no installation")]);
  expect(await readdir(folder)).not.toContain("empty");

  await using berth = await startInstallation({ BERTH_RUNNER: "off" });
  const env = { DATABASE_URL: "", BERTH_DATA_DIR: berth.dataDir };
  const works = async (token: string) => {
    const client = createBerthClient({ baseUrl: berth.url, token: token.trim() });
    return (await client.identity.getAuthenticatedIdentity({})).subject?.principal;
  };
  const beside = await admin("token create --email admin@localhost", [], env);
  expect([beside.code, await works(beside.printed)]).toEqual([0, Principal.USER]);
  await berth.kill();
  const after = await admin("token create --email admin@localhost", [], env);
  expect(after.code).toBe(0);
  const alone = await admin("token create --email admin@localhost", [], env);
  expect(alone.code).toBe(0);
  await berth.start();
  for (const { printed } of [beside, after, alone]) expect(await works(printed)).toBe(Principal.USER);
});
