import type { SqlLoad } from "../sql-load.ts";
import { bareDriver } from "./connect.ts";
import { serve } from "./serve.ts";

export interface SqlApi {
  run(load: SqlLoad): Promise<number>;
}

async function run(databaseUrl: string, { statement, clients, transactions }: SqlLoad): Promise<number> {
  const sql = bareDriver(databaseUrl, { max: clients, max_pipeline: 1 });
  const client = async (count: number) => {
    for (let done = 0; done < count; done += 1)
      await sql.unsafe(statement, [], { prepare: true, simple: false } as object);
  };
  const all = (count: number) => Promise.all(Array.from({ length: clients }, () => client(count)));
  try {
    // Connects all of them.
    await all(2);
    const from = performance.now();
    await all(transactions);
    return (clients * transactions) / ((performance.now() - from) / 1000);
  } finally {
    await sql.end({ timeout: 1 });
  }
}

serve<{ databaseUrl: string }, SqlApi>(async ({ databaseUrl }) => ({ api: { run: (load) => run(databaseUrl, load) } }));
