import { RefusedStart } from "../domain/errors.ts";
import { WrongMasterKey } from "./bootstrap.ts";
import type { Db, Tx } from "./db.ts";
import { masterKeyCheck, masterKeyId, rewrap } from "./envelope.ts";

// A new master key, value by value. While that goes on the installation names both: the old key opens what has not been
// reached, the new one is that of every value that is written, which a trigger makes sure of. A process that still has
// the old key can no longer store secrets from the first moment on, read fewer and fewer, and none is started before the
// end. Whoever dies in between leaves values under either key, each saying which: it is run again with the same keys.

/** A column with sealed values. */
export interface SealedColumn {
  table: string;
  column: string;
  /** The context that its values are sealed with, in SQL over the row. */
  context: string;
}

/** Every column with sealed values; all of these tables have ids. */
export const SEALED_COLUMNS: readonly SealedColumn[] = [
  { table: "host_tokens", column: "sealed_refresh_token", context: "'host token ' || id || ' refresh'" },
  { table: "host_tokens", column: "sealed_token", context: "'host token ' || id || ' token'" },
  { table: "runners", column: "sealed_metrics_password", context: "'runner ' || id || ' metrics'" },
  { table: "runners", column: "sealed_private_key", context: "'runner ' || id || ' private key'" },
  { table: "secrets", column: "sealed_value", context: "'secret ' || id || ' of ' || organization_id" },
  { table: "signing_keys", column: "sealed_private_key", context: "'signing key ' || id" },
];

/** The master key that goes and the one that comes, 32 bytes each. */
export interface Keys {
  from: Uint8Array;
  to: Uint8Array;
}

type Random = (bytes: number) => Uint8Array;

const BATCH = 200;
const NIL = "00000000-0000-0000-0000-000000000000";

/** Says that the keys change from now on; false if they have changed already. */
async function begin(tx: Tx, { from, to }: Keys): Promise<boolean> {
  const [oldCheck, newCheck] = [masterKeyCheck(from), masterKeyCheck(to)];
  const isSame = (left: Uint8Array, right: Uint8Array) => Buffer.compare(left, right) === 0;
  const [row] = await tx<{ master_key_check: Uint8Array; next_master_key_check: Uint8Array | null }[]>`
    select master_key_check, next_master_key_check from installation for update`;
  if (!row) throw new RefusedStart("the database has not been set up yet");
  if (!row.next_master_key_check && isSame(row.master_key_check, newCheck)) return false;
  if (!isSame(row.master_key_check, oldCheck)) throw new WrongMasterKey("the database has another master key");
  if (row.next_master_key_check && !isSame(row.next_master_key_check, newCheck))
    throw new RefusedStart("another new master key has been begun with: finish with that one first");
  await tx`update installation set next_master_key_check = ${newCheck}`;
  return true;
}

/** At most a batch of a column, in the order of ids; the ids of it. */
async function rewrapBatch(
  tx: Tx,
  { table, column, context }: SealedColumn,
  { from, to }: Keys,
  random: Random,
  after: string,
): Promise<string[]> {
  const rows = await tx<{ id: string; sealed: Uint8Array; context: string }[]>`
    select id, ${tx(column)} as sealed, ${tx.unsafe(context)} as context from ${tx(table)}
    where ${tx(column)} is not null and substring(${tx(column)} from 2 for 8) <> ${masterKeyId(to)} and id > ${after}
    order by id limit ${BATCH} for update`;
  for (const row of rows) {
    const sealed = rewrap(from, to, row.context, row.sealed, random);
    await tx`update ${tx(table)} set ${tx(column)} = ${sealed} where id = ${row.id}`;
  }
  return rows.map((row) => row.id);
}

async function rewrapColumn(db: Db, column: SealedColumn, keys: Keys, random: Random): Promise<number> {
  let count = 0;
  for (let after = NIL; ; ) {
    const position = after;
    const ids = await db.begin((tx) => rewrapBatch(tx, column, keys, random, position));
    count += ids.length;
    after = ids.at(-1) ?? after;
    if (ids.length < BATCH) return count;
  }
}

async function end(tx: Tx, { to }: Keys): Promise<void> {
  for (const { table, column } of SEALED_COLUMNS) {
    const left = await tx`select from ${tx(table)}
      where ${tx(column)} is not null and substring(${tx(column)} from 2 for 8) <> ${masterKeyId(to)} limit 1`;
    if (left.length) throw new Error(`values in ${table}.${column} are still sealed with another master key`);
  }
  await tx`update installation set master_key_check = next_master_key_check, next_master_key_check = null
    where next_master_key_check = ${masterKeyCheck(to)}`;
}

/**
 * Seals the data key of every sealed value with a new master key, which must have been put in a safe place before;
 * returns how many there were. May be interrupted at any moment and run again with the same keys; once it has ended,
 * running it again does nothing. Only processes with the new key start from then on, and until then none.
 */
export async function rekey(db: Db, keys: Keys, random: Random): Promise<number> {
  if (Buffer.compare(keys.from, keys.to) === 0) throw new RefusedStart("the new master key is the old one");
  if (!(await db.begin((tx) => begin(tx, keys)))) return 0;
  let count = 0;
  for (const column of SEALED_COLUMNS) count += await rewrapColumn(db, column, keys, random);
  await db.begin((tx) => end(tx, keys));
  return count;
}
