import { readdir, readFile } from "node:fs/promises";
import { RefusedStart } from "../domain/errors.ts";
import type { Db } from "./db.ts";

const FOLDER = new URL("./migrations/", import.meta.url);
// Any constant will do as long as every version of the program uses the same.
const MIGRATION_LOCK = 7_482_931;

/** The database was migrated by a newer program than this one. */
export class NewerDatabase extends RefusedStart {}

const newer = (found: number, known: number) =>
  new NewerDatabase(`the database is at migration ${found}, this program knows ${known}`);

async function migrations(): Promise<{ number: number; name: string }[]> {
  const names = (await readdir(FOLDER)).filter((name) => /^\d{4}_\w+\.sql$/.test(name)).sort();
  return names.map((name) => ({ number: Number(name.slice(0, 4)), name }));
}

/**
 * Brings the schema up to date. Replicas that start together wait for each other on an advisory lock; each migration
 * commits together with its row in `schema_migrations`, so a crash changes nothing.
 */
export async function migrate(db: Db): Promise<void> {
  const known = await migrations();
  const newest = known.at(-1)?.number ?? 0;
  await db.begin(async (tx) => {
    await tx`set local statement_timeout = 0`;
    await tx`select pg_advisory_xact_lock(${MIGRATION_LOCK})`;
    await tx`create table if not exists schema_migrations (number integer primary key, name text not null, applied_at timestamptz not null default now())`;
    const applied = new Set(
      (await tx<{ number: number }[]>`select number from schema_migrations`).map((row) => row.number),
    );
    const beyond = Math.max(0, ...applied);
    if (beyond > newest) throw newer(beyond, newest);
    for (const { number, name } of known) {
      if (applied.has(number)) continue;
      await tx.unsafe(await readFile(new URL(name, FOLDER), "utf8"));
      await tx`insert into schema_migrations (number, name) values (${number}, ${name})`;
    }
    if (known.some(({ number }) => !applied.has(number))) await tx`select guard_sealed_columns()`;
  });
}

/** True when every migration that this program knows has been applied. */
export async function isMigrated(db: Db): Promise<boolean> {
  const newest = (await migrations()).at(-1)?.number ?? 0;
  const [row] = await db.point<{ number: number | null }[]>`select max(number) as number from schema_migrations`;
  return (row?.number ?? 0) >= newest;
}

/** Throws RefusedStart unless the database has exactly the schema that this program knows. */
export async function checkMigrated(db: Db): Promise<void> {
  const newest = (await migrations()).at(-1)?.number ?? 0;
  const [table] = await db.point`select from pg_tables where tablename = 'schema_migrations' and schemaname = 'public'`;
  const [row] = table ? await db.point<{ number: number }[]>`select max(number) as number from schema_migrations` : [];
  const found = row?.number ?? 0;
  if (found > newest) throw newer(found, newest);
  if (found === newest) return;
  throw new RefusedStart("the database is not migrated: start berth, or run `berth admin bootstrap`, first");
}
