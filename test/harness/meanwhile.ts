import type { Db, Tx } from "../../src/store/db.ts";
import { eventually } from "./wait.ts";

/** Takes a lock that some work waits for, and commits a change while it does. */
export async function meanwhile<T>(
  db: Db,
  lock: (tx: Tx) => Promise<unknown>,
  change: (tx: Tx) => Promise<unknown>,
  work: () => Promise<T>,
): Promise<T> {
  const isHeld = Promise.withResolvers<void>();
  const isAwaited = Promise.withResolvers<void>();
  const holder = db.begin(async (tx) => {
    await lock(tx);
    isHeld.resolve();
    await isAwaited.promise;
    await change(tx);
  });
  await isHeld.promise;
  const done = work();
  done.catch(() => undefined);
  const waits = async () => {
    const rows = await db.list`select from pg_stat_activity
      where datname = current_database() and application_name = 'berth transaction' and wait_event_type = 'Lock'`;
    return rows.length > 0;
  };
  await eventually(waits, "somebody waits for the lock").finally(isAwaited.resolve);
  await holder;
  return done;
}
