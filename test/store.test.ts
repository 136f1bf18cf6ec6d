import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { chmod, mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, inject, test } from "vitest";
import { transact } from "../src/app.ts";
import { databaseRefusal, Refusal } from "../src/domain/errors.ts";
import { type Db, openDb } from "../src/store/db.ts";
import { DatabaseInUse, startEmbeddedPostgres } from "../src/store/embedded-postgres.ts";
import { isMigrated, migrate, NewerDatabase } from "../src/store/migrate.ts";
import { databaseUrl } from "./harness/database.ts";
import { startTestPlane } from "./harness/plane.ts";
import { eventually } from "./harness/wait.ts";

describe("migrations", () => {
  const name = `t_${randomBytes(8).toString("hex")}`;
  let maintenance: Db;
  let db: Db;

  beforeAll(async () => {
    maintenance = openDb(inject("postgresUrl"));
    await maintenance.write.unsafe(`create database ${name}`);
    db = openDb(databaseUrl(inject("postgresUrl"), name));
  });

  afterAll(async () => {
    await db.close();
    await maintenance.write.unsafe(`drop database ${name} with (force)`);
    await maintenance.close();
  });

  test("two processes that migrate an empty database at once apply each migration once; later starts apply none", async () => {
    const other = openDb(databaseUrl(inject("postgresUrl"), name));
    await Promise.all([migrate(db), migrate(other)]);
    await other.close();
    const files = (await readdir(new URL("../src/store/migrations/", import.meta.url))).sort();
    const applied = () => db.point<{ name: string; applied_at: Date }[]>`
      select name, applied_at from schema_migrations order by number`;
    const first = await applied();
    expect(first.map((row) => row.name)).toEqual(files);
    await migrate(db);
    expect(await applied()).toEqual(first);
    expect(await isMigrated(db)).toBe(true);
  });

  test("a database that a newer program has migrated is refused, and still serves the older one that runs", async () => {
    await db.write`insert into schema_migrations (number, name) values (9999, '9999_future.sql')`;
    await expect(migrate(db)).rejects.toThrow(NewerDatabase);
    expect(await isMigrated(db)).toBe(true);
    await db.write`delete from schema_migrations where number in (select max(number) from schema_migrations where number < 9999)`;
    await db.write`delete from schema_migrations where number = 9999`;
    expect(await isMigrated(db)).toBe(false);
  });
});

describe("transactions", () => {
  test("those that wait for one lock leave connections to the others, and are all served", async () => {
    await using plane = await startTestPlane();
    const { db } = plane.plane.app;
    const held = Promise.withResolvers<void>();
    const isHeld = Promise.withResolvers<void>();
    const holder = db.begin(async (tx) => {
      await tx`select pg_advisory_xact_lock(1)`;
      isHeld.resolve();
      await held.promise;
    }, "crowd");
    await isHeld.promise;
    const served: number[] = [];
    const crowd = Array.from({ length: 50 }, (_each, index) =>
      db.begin(async (tx) => {
        await tx`select pg_advisory_xact_lock(1)`;
        served.push(index);
      }, "crowd"),
    );
    const others = Array.from({ length: 20 }, (_each, index) =>
      db.begin(async (tx) => (await tx<{ n: number }[]>`select ${index}::int as n`)[0]?.n),
    );
    expect(await Promise.all(others)).toEqual(Array.from({ length: 20 }, (_each, index) => index));
    expect(served).toEqual([]);
    held.resolve();
    await Promise.all([holder, ...crowd]);
    expect(served.toSorted((a, b) => a - b)).toEqual(Array.from({ length: 50 }, (_each, index) => index));
  });

  test("one that loses a deadlock runs again; one that always loses is ABORTED; a broken connection is UNAVAILABLE", async () => {
    await using plane = await startTestPlane();
    const { app } = plane.plane;
    await app.db.write`create table counters (id int primary key, value int not null)`;
    await app.db.write`insert into counters values (1, 0), (2, 0)`;
    // Both hold their first row before either asks for its second, so that one of them must lose.
    const started = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    const inOrder = (self: 0 | 1, [first, second]: [number, number]) =>
      transact(app, async (tx) => {
        await tx`update counters set value = value + 1 where id = ${first}`;
        started[self]?.resolve();
        await started[1 - self]?.promise;
        await tx`update counters set value = value + 1 where id = ${second}`;
      });
    await Promise.all([inOrder(0, [1, 2]), inOrder(1, [2, 1])]);
    expect(await app.db.point`select value from counters`).toEqual([{ value: 2 }, { value: 2 }]);

    const fails = (code: string) =>
      transact(app, (tx) => tx.unsafe(`do $$ begin raise exception 'x' using errcode = '${code}'; end $$`));
    const kindOf = (work: Promise<unknown>) =>
      work.then(
        () => "",
        (error) => error instanceof Refusal && error.kind,
      );
    expect(await kindOf(fails("40P01"))).toBe("aborted");
    expect(await kindOf(fails("57P01"))).toBe("unavailable");
    const ended = transact(app, (tx) => tx`select pg_terminate_backend(pg_backend_pid())`);
    expect(await kindOf(ended)).toBe("unavailable");
  });
});

test("a transaction ends as a whole: not after a failure that nobody minded, with nothing after its end, one after the other", async () => {
  await using plane = await startTestPlane();
  const { db } = plane.plane.app;
  await db.write`create table notes (id int primary key)`;
  const minded = db.begin(async (tx) => {
    await tx`insert into notes values (1)`;
    await tx`insert into notes values (1)`.catch(() => undefined);
  });
  await expect(minded).rejects.toThrow("after one of its statements had failed");
  const thrown = db.begin(async (tx) => {
    await tx`insert into notes values (2)`;
    throw new Error("changed my mind");
  });
  await expect(thrown).rejects.toThrow("changed my mind");
  const leaked = await db.begin(async (tx) => ({ tx }));
  expect(() => leaked.tx`insert into notes values (3)`).toThrow("after the end of its transaction");
  expect(await db.point`select id from notes`).toEqual([]);

  const many = Array.from({ length: 40 }, (_, id) =>
    db.begin(async (tx) => {
      await tx`insert into notes values (${id})`;
      return id;
    }),
  );
  expect(await Promise.all(many)).toEqual(Array.from({ length: 40 }, (_, id) => id));
  const [open] = await db.point<{ count: number }[]>`
    select count(*)::int from pg_stat_activity where datname = current_database() and application_name = 'berth transaction'`;
  expect(open?.count).toBeLessThanOrEqual(8);
});

test("the last statement of a transaction is sent along with the commit, and is part of it", async () => {
  await using plane = await startTestPlane();
  const { db } = plane.plane.app;
  await db.write`create table notes (id int primary key)`;
  const insert = (first: number, second: number) =>
    db.begin(async (tx, last) => {
      await tx`insert into notes values (${first})`;
      last(tx`insert into notes values (${second})`.execute());
      return second;
    });
  expect(await insert(1, 2)).toBe(2);
  await expect(insert(3, 2)).rejects.toMatchObject({ code: "23505" });
  const thrown = db.begin(async (tx, last) => {
    last(tx`insert into notes values (4)`.execute());
    throw new Error("changed my mind");
  });
  await expect(thrown).rejects.toThrow("changed my mind");
  expect(await insert(5, 6)).toBe(6);
  expect((await db.point`select id from notes order by id`).map(({ id }) => id)).toEqual([1, 2, 5, 6]);
});

describe("embedded Postgres", () => {
  let folder: string;
  let home: string;
  const logged: string[] = [];

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "berth-embedded-"));
    // The user that Postgres runs as must be able to pass.
    await chmod(folder, 0o711);
    home = join(folder, "pg");
  });

  afterAll(() => rm(folder, { recursive: true, force: true }));

  const postmasterPid = async () =>
    Number((await readFile(join(home, "data", "postmaster.pid"), "utf8")).split("\n")[0]);
  const isAlive = (pid: number) =>
    readFile(`/proc/${pid}/stat`).then(
      () => true,
      () => false,
    );
  const start = () => startEmbeddedPostgres(home, (message) => void logged.push(message));

  async function query<T>(url: string, work: (db: Db) => Promise<T>): Promise<T> {
    const db = openDb(url);
    try {
      return await work(db);
    } finally {
      await db.close();
    }
  }

  const readNotes = (url: string) => query(url, (db) => db.point`select text from notes`);

  test("keeps its data over a restart, and over a kill -9 of the server", async () => {
    const first = await start();
    await query(first.url, (db) => db.write`create table notes as select 'kept' as text`);
    await expect(start()).rejects.toThrow(DatabaseInUse);
    await first.stop();
    await first.stop();

    const second = await start();
    expect(await readNotes(second.url)).toEqual([{ text: "kept" }]);
    await query(second.url, async (db) => {
      const heard: string[] = [];
      let restarts = 0;
      const listening = await db.listen("berth_test", {
        heard: (payload) => void heard.push(payload),
        restarted: () => void restarts++,
        failed: () => undefined,
      });
      const underWay = Array.from({ length: 20 }, (_, index) =>
        index % 2
          ? db.begin(async (tx) => {
              await tx`insert into notes values ('lost')`;
              await tx`select pg_sleep(5)`;
              await tx`insert into notes values ('lost')`;
            })
          : db.point`select pg_sleep(5)`,
      );
      await eventually(async () => {
        const [row] = await db.list<{ count: number }[]>`
          select count(*)::int from pg_stat_activity where query like '%pg_sleep%' and state = 'active'`;
        return (row?.count ?? 0) > 5;
      }, "statements under way");
      const pid = await postmasterPid();
      process.kill(pid, "SIGKILL");

      // Whatever was under way ends as a failure that callers can act on; nothing hangs.
      const outcomes = await Promise.all(underWay.map((each) => each.then(() => "done", databaseRefusal)));
      expect(new Set(outcomes.map((each) => each instanceof Refusal && each.kind))).toEqual(new Set(["unavailable"]));

      const notes = () => db.begin((tx) => tx`select text from notes`);
      expect(await eventually(notes, "the restart of Postgres")).toEqual([{ text: "kept" }]);
      expect(await db.point`select text from notes`).toEqual([{ text: "kept" }]);
      expect(await db.write`select text from notes`).toEqual([{ text: "kept" }]);
      expect(await db.list`select text from notes`).toEqual([{ text: "kept" }]);
      expect(await postmasterPid()).not.toBe(pid);
      await eventually(() => restarts === 2, "listening again");
      await listening.notify("hello");
      await eventually(() => heard.includes("hello"), "a notification after the restart");
      await listening.end();
    });
    expect(logged.join("\n")).toMatch(/ended unexpectedly \(SIGKILL\)/);
    await second.stop();
    expect(await isAlive(await postmasterPid().catch(() => 0))).toBe(false);
  });

  test("is taken over when the process that started it was killed, and kept running by the next one", async () => {
    const parent = await startInOtherProcess(home);
    const pid = await postmasterPid();
    parent.kill("SIGKILL");
    await once(parent, "exit");

    const heir = await start();
    expect(await readNotes(heir.url)).toEqual([{ text: "kept" }]);
    expect(await postmasterPid()).toBe(pid);
    process.kill(pid, "SIGKILL");
    expect(await eventually(() => readNotes(heir.url), "the restart of Postgres")).toEqual([{ text: "kept" }]);
    await heir.stop();
  });
});

/** A process that starts the database and then does nothing; resolves once the database answers. */
async function startInOtherProcess(home: string): Promise<ChildProcess> {
  const module = new URL("../src/store/embedded-postgres.ts", import.meta.url).href;
  const script = `import { startEmbeddedPostgres } from ${JSON.stringify(module)};
    await startEmbeddedPostgres(${JSON.stringify(home)}, () => undefined);
    process.stdout.write("ready");
    setInterval(() => undefined, 60_000);`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", script], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const failed = once(child, "exit").then(([code]) => {
    throw new Error(`the other process ended with ${code}`);
  });
  await Promise.race([once(child.stdout!, "data"), failed]);
  failed.catch(() => undefined);
  return child;
}
