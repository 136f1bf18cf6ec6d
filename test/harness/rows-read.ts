import type { App } from "../../src/app.ts";
import type { Sql } from "../../src/store/db.ts";

/** Does some reading; its result, and how many rows of these tables it looked at. */
export async function rowsRead<T>(
  { db }: App,
  tables: readonly string[],
  work: (sql: Sql) => Promise<T>,
): Promise<{ result: T; rows: number }> {
  return db.begin(async (tx) => {
    const result = await work(tx as unknown as Sql);
    const [counts] = await tx<{ rows: number }[]>`
      select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::int as rows from pg_stat_xact_user_tables
      where relname::text = any(${tables as string[]}::text[])`;
    return { result, rows: counts?.rows ?? 0 };
  });
}
