import postgres from "postgres";

// The second entry is for the types alone: `undefined` is written as null.
type Types = { bigint: number; absent: undefined };
export type Sql = postgres.Sql<Types>;
export type Tx = postgres.TransactionSql<Types>;
/** A piece of a statement. */
export type Fragment = postgres.PendingQuery<postgres.Row[]>;

/**
 * One process, four kinds of connections, because a shared pool lets short queries wait behind long ones:
 * `point` for short reads, `write` for statements that change something and transactions, `list` for listing reads,
 * and a listener that the event hub opens for itself.
 */
export interface Db {
  point: Sql;
  write: Sql;
  list: Sql;
  /** Opens a connection of its own, for LISTEN or for a session lock; the caller ends it. */
  dedicated(options?: { onclose?: () => void }): Sql;
  close(): Promise<void>;
}

const STATEMENT_TIMEOUT_MS = 15_000;
const IDLE_IN_TRANSACTION_MS = 15_000;
const CONNECT_TIMEOUT_S = 10;

/** libpq's `?host=/socket/dir` is how a URL names a Unix socket; the driver only takes it as an option. */
function target(url: string): { url: string; host?: string } {
  const parsed = new URL(url);
  const host = parsed.searchParams.get("host");
  if (!host) return { url };
  parsed.searchParams.delete("host");
  return { url: parsed.toString(), host };
}

// `max_pipeline` is missing in the driver's types.
type ConnectOptions = postgres.Options<{ bigint: postgres.PostgresType<number> }> & { max_pipeline?: number };

function connect(url: string, name: string, options: ConnectOptions): Sql {
  const { url: plain, host } = target(url);
  return postgres(plain, {
    ...(host ? { host } : {}),
    connect_timeout: CONNECT_TIMEOUT_S,
    idle_timeout: 0,
    max_lifetime: null,
    onnotice: () => undefined,
    transform: { undefined: null },
    // Sequence numbers, revisions and epochs stay far below 2^53.
    types: { bigint: { to: 20, from: [20], serialize: String, parse: Number } },
    connection: {
      application_name: `berth ${name}`,
      statement_timeout: STATEMENT_TIMEOUT_MS,
      idle_in_transaction_session_timeout: IDLE_IN_TRANSACTION_MS,
    },
    ...options,
  }) as unknown as Sql;
}

/** Opens the pools; nothing is contacted before the first query. */
export function openDb(url: string): Db {
  const point = connect(url, "point", { max: 2 });
  const write = connect(url, "write", { max: 8, max_pipeline: 1 });
  const list = connect(url, "list", { max: 2, max_pipeline: 0 });
  return {
    point,
    write,
    list,
    dedicated: (options = {}) => connect(url, "dedicated", { max: 1, ...options }),
    async close() {
      await Promise.all([point, write, list].map((sql) => sql.end({ timeout: 5 })));
    },
  };
}
