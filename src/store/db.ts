import { setTimeout as delay } from "node:timers/promises";
import postgres from "postgres";
import { Refusal } from "../domain/errors.ts";

// The second entry is for the types alone: `undefined` is written as null.
type Types = { bigint: number; absent: undefined };
export type Sql = postgres.Sql<Types>;
export type Tx = postgres.TransactionSql<Types>;
/** A piece of a statement. */
export type Fragment = postgres.PendingQuery<postgres.Row[]>;

/**
 * One process, several kinds of connections, because a shared pool lets short queries wait behind long ones: `point` for
 * short reads, `list` for listing reads, `write` for single statements that change something, `begin` for transactions,
 * and one to listen.
 *
 * The driver does not get over a connection that is closed under it (a restart or failover of the database): what it was
 * about to write blocks that connection for ever, and a transaction that goes on writes into nothing, which ends the
 * process, or into the next session. So a client that has lost a connection is replaced as a whole, and a transaction
 * that has lost its own refuses every further statement.
 */
export interface Db {
  readonly point: Sql;
  readonly write: Sql;
  readonly list: Sql;
  /**
   * Runs `work` in a transaction of its own. Throws what `work` throws, after a rollback. Transactions of one `crowd`
   * wait for each other under the same lock: they get half of the connections at most, and longer to wait for one, so
   * that nobody else has to wait behind all of them. If the transaction could not even begin, because its connection had
   * died unnoticed, `work` runs again, after its first statement has failed.
   */
  begin<T>(work: Work<T>, crowd?: string): Promise<T>;
  /** As `begin`, for one statement that is all of the transaction and commits with it. */
  once<T>(statement: (sql: Sql) => Promise<T>, crowd?: string): Promise<T>;
  /**
   * Listens on a channel until it is ended, over lost connections too. `restarted` is called whenever listening begins:
   * what was notified before is lost. Rejects if the first attempt fails.
   */
  listen(channel: string, handlers: ListenHandlers): Promise<Listening>;
  close(): Promise<void>;
}

/**
 * What a transaction does. `last` takes its last statement, for which it then does not wait itself: the commit is sent
 * along with it, and fails if it fails.
 */
export type Work<T> = (tx: Tx, last: (statement: Promise<unknown>) => void) => Promise<T>;

export interface ListenHandlers {
  heard(payload: string): void;
  restarted(): void;
  failed(error: unknown): void;
}

export interface Listening {
  /** Tells everybody who listens; a hint that is dropped while the connection is down. */
  notify(payload: string): Promise<void>;
  end(): Promise<void>;
}

const STATEMENT_TIMEOUT_MS = 15_000;
const IDLE_IN_TRANSACTION_MS = 15_000;
const CONNECT_TIMEOUT_S = 10;
const END_S = 5;
// What may still run on the other connections of a client that has lost one; what hangs in it ends then, too.
const RETIRE_S = 2;
const RELISTEN_MS = 500;
const SESSIONS = 8;
const SESSION_WAIT_MS = 10_000;
const CROWD_SESSIONS = SESSIONS / 2;
const CROWD_WAIT_MS = 30_000;
const NOOP = () => undefined;

/** Elements of a one-dimensional array as Postgres writes it. */
function parseArray<T>(text: string, parse: (element: string) => T): (T | null)[] {
  const elements = text.slice(1, -1).matchAll(/"((?:[^"\\]|\\.)*)"|([^,]+)/g);
  return [...elements].map(([, quoted, plain = ""]) => {
    if (quoted !== undefined) return parse(quoted.replace(/\\(.)/g, "$1"));
    return plain === "NULL" ? null : parse(plain);
  });
}

const arrayType = (oid: number, parse: (element: string) => unknown) => ({
  to: oid,
  from: [oid],
  parse: (text: string) => parseArray(text, parse),
  serialize: (values: readonly unknown[]) =>
    `{${values.map((value) => (value === null ? "NULL" : `"${String(value).replace(/[\\"]/g, "\\$&")}"`)).join(",")}}`,
});

// Given here, the driver need not ask each new connection for them: that question, cut short, would end the process.
const TYPES = {
  // Sequence numbers, revisions and epochs stay far below 2^53.
  bigint: { to: 20, from: [20], serialize: String, parse: Number },
  smallints: arrayType(1005, Number),
  integers: arrayType(1007, Number),
  bigints: arrayType(1016, Number),
  texts: arrayType(1009, String),
  uuids: arrayType(2951, String),
};

/** libpq's `?host=/socket/dir` is how a URL names a Unix socket; the driver only takes it as an option. */
function target(url: string): { url: string; host?: string } {
  const parsed = new URL(url);
  const host = parsed.searchParams.get("host");
  if (!host) return { url };
  parsed.searchParams.delete("host");
  return { url: parsed.toString(), host };
}

// Two options are missing in the driver's types.
type ConnectOptions = postgres.Options<{ bigint: postgres.PostgresType<number> }> & {
  max_pipeline?: number;
  onnotify?: (channel: string, payload: string) => void;
};

function connect(url: string, name: string, options: ConnectOptions): Sql {
  const { url: plain, host } = target(url);
  return postgres(plain, {
    ...(host ? { host } : {}),
    connect_timeout: CONNECT_TIMEOUT_S,
    idle_timeout: 0,
    max_lifetime: null,
    onnotice: NOOP,
    transform: { undefined: null },
    fetch_types: false,
    types: TYPES as unknown as { bigint: postgres.PostgresType<number> },
    connection: {
      application_name: `berth ${name}`,
      statement_timeout: STATEMENT_TIMEOUT_MS,
      idle_in_transaction_session_timeout: IDLE_IN_TRANSACTION_MS,
    },
    ...options,
  }) as unknown as Sql;
}

type Open = (onclose: () => void) => Sql;

/** A client that is replaced as soon as one of its connections is lost; what runs on the others may finish. */
class Client {
  readonly #open: Open;
  readonly #retiring = new Set<Promise<void>>();
  #sql: Sql | undefined;
  #ended = false;

  constructor(open: Open) {
    this.#open = open;
  }

  get sql(): Sql {
    if (this.#ended) throw closed();
    this.#sql ??= this.#fresh();
    return this.#sql;
  }

  #fresh(): Sql {
    const sql = this.#open(() => this.#lost(sql));
    return sql;
  }

  #lost(sql: Sql): void {
    if (this.#ended || this.#sql !== sql) return;
    this.#sql = undefined;
    const retired = sql
      .end({ timeout: RETIRE_S })
      .catch(NOOP)
      .finally(() => this.#retiring.delete(retired));
    this.#retiring.add(retired);
  }

  async end(): Promise<void> {
    this.#ended = true;
    await Promise.all([this.#sql?.end({ timeout: END_S }), ...this.#retiring]);
  }
}

/**
 * Clients of one connection each, which take turns. A client of several connections would share statements out itself,
 * but keeps lists for it that grow with every statement, and searches them, until by chance all of its connections are
 * busy, or idle, at the same time.
 */
class Turns {
  readonly #clients: readonly Client[];
  #next = 0;

  constructor(count: number, open: Open) {
    this.#clients = Array.from({ length: count }, () => new Client(open));
  }

  get sql(): Sql {
    this.#next = (this.#next + 1) % this.#clients.length;
    return this.#clients[this.#next]!.sql;
  }

  async end(): Promise<void> {
    await Promise.all(this.#clients.map((client) => client.end()));
  }
}

/** One connection for transactions, one at a time. */
class Session {
  readonly #sql: Sql;
  /** The connection is gone, and with it whatever it was in. */
  isLost = false;
  #isConnected = false;

  constructor(open: Open) {
    this.#sql = open(() => {
      this.isLost = true;
      // The driver forgets what was asked for after the connection had failed and before it was closed.
      void this.#sql.end({ timeout: 0 }).catch(NOOP);
    });
  }

  once<T>(statement: (sql: Sql) => Promise<T>): Promise<T> {
    return statement(this.#sql);
  }

  /**
   * Runs `work` in a transaction; NotBegun if that could not even begin. Its beginning is sent along with the first
   * statement, but not to make a connection: what follows would go into the next one if that fails.
   */
  async run<T>(work: Work<T>): Promise<T> {
    let isOver = false;
    let last: Promise<unknown> | undefined;
    const check = () => {
      if (this.isLost) throw lost();
      if (isOver) throw new Error("a statement came after the end of its transaction");
    };
    const tx = new Proxy(this.#sql as unknown as Tx, {
      apply(sql, _self, args) {
        check();
        return Reflect.apply(sql, undefined, args);
      },
      get(sql, name) {
        check();
        return Reflect.get(sql, name);
      },
    });
    const begun = this.#sql.unsafe("begin").then(
      () => undefined,
      (error: unknown) => new NotBegun(error),
    );
    if (!this.#isConnected) {
      const failure = await begun;
      if (failure) throw failure;
      this.#isConnected = true;
    }
    try {
      const result = await work(tx, (statement) => {
        statement.catch(NOOP);
        last = statement;
      });
      check();
      const [, { command }] = await Promise.all([last, this.#sql.unsafe("commit")]);
      // What Postgres answers when a statement had failed and nobody minded.
      if (command !== "COMMIT") throw new Error("a transaction went on after one of its statements had failed");
      return result;
    } catch (error) {
      if (!this.isLost) await this.#sql.unsafe("rollback").catch(() => this.end());
      throw (await begun) ?? error;
    } finally {
      isOver = true;
    }
  }

  async end(): Promise<void> {
    this.isLost = true;
    await this.#sql.end({ timeout: END_S }).catch(NOOP);
  }
}

const lost = () => Object.assign(new Error("the connection of the transaction is lost"), { code: "CONNECTION_CLOSED" });
const closed = () => Object.assign(new Error("the database has been closed"), { code: "CONNECTION_ENDED" });

/** A transaction that has not even begun, and why. */
class NotBegun extends Error {
  constructor(cause: unknown) {
    super("the transaction could not begin", { cause });
  }
}

/** Somebody who waits for a connection. */
interface Waiter {
  crowd: string | undefined;
  start(): void;
}

/** The connections of transactions. */
class Sessions {
  readonly #open: Open;
  readonly #idle: Session[] = [];
  readonly #waiting: Waiter[] = [];
  readonly #busyCrowds = new Map<string, number>();
  #busy = 0;
  #ended = false;

  constructor(open: Open) {
    this.#open = open;
  }

  async begin<T>(work: Work<T>, crowd?: string): Promise<T> {
    return this.#inTurn(crowd, async () => {
      for (;;) {
        const { session, isNew } = this.#take();
        try {
          return await this.#use(session, () => session.run(work));
        } catch (error) {
          if (!(error instanceof NotBegun)) throw error;
          // An idle one may have died unnoticed; nothing is lost by trying the next.
          if (isNew) throw error.cause;
        }
      }
    });
  }

  async once<T>(statement: (sql: Sql) => Promise<T>, crowd?: string): Promise<T> {
    return this.#inTurn(crowd, () => {
      const { session } = this.#take();
      return this.#use(session, () => session.once(statement));
    });
  }

  async #inTurn<T>(crowd: string | undefined, work: () => Promise<T>): Promise<T> {
    await this.#turn(crowd);
    try {
      return await work();
    } finally {
      this.#count(crowd, -1);
      this.#startNext();
    }
  }

  async #use<T>(session: Session, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } finally {
      if (session.isLost || this.#ended) void session.end();
      else this.#idle.push(session);
    }
  }

  /** One that is not known to be lost. */
  #take(): { session: Session; isNew: boolean } {
    for (let session = this.#idle.pop(); session; session = this.#idle.pop()) {
      if (!session.isLost) return { session, isNew: false };
    }
    return { session: new Session(this.#open), isNew: true };
  }

  /** Waits until fewer than the allowed number of transactions run, in the order of asking. */
  async #turn(crowd: string | undefined): Promise<void> {
    if (this.#ended) throw closed();
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const waiter = { crowd, start: resolve };
    this.#waiting.push(waiter);
    const refuse = () => {
      this.#waiting.splice(this.#waiting.indexOf(waiter), 1);
      reject(new Refusal("unavailable", "the database is too busy, try again"));
    };
    const timer = setTimeout(refuse, crowd === undefined ? SESSION_WAIT_MS : CROWD_WAIT_MS);
    this.#startNext();
    await promise;
    clearTimeout(timer);
  }

  /** Starts those that have waited longest and may. */
  #startNext(): void {
    for (;;) {
      const index = this.#busy < SESSIONS ? this.#waiting.findIndex(({ crowd }) => this.#hasRoomFor(crowd)) : -1;
      if (index < 0) return;
      const [waiter] = this.#waiting.splice(index, 1);
      this.#count(waiter?.crowd, 1);
      waiter?.start();
    }
  }

  #hasRoomFor(crowd: string | undefined): boolean {
    return crowd === undefined || (this.#busyCrowds.get(crowd) ?? 0) < CROWD_SESSIONS;
  }

  #count(crowd: string | undefined, change: 1 | -1): void {
    this.#busy += change;
    if (crowd === undefined) return;
    const busy = (this.#busyCrowds.get(crowd) ?? 0) + change;
    if (busy > 0) this.#busyCrowds.set(crowd, busy);
    else this.#busyCrowds.delete(crowd);
  }

  async end(): Promise<void> {
    this.#ended = true;
    await Promise.all(this.#idle.splice(0).map((session) => session.end()));
  }
}

/** Listens on one connection after the other, for as long as it is wanted. */
class Listener implements Listening {
  readonly #stop = new AbortController();
  readonly #channel: string;
  #sql?: Sql;
  #kept: Promise<void> = Promise.resolve();

  constructor(channel: string) {
    this.#channel = channel;
  }

  async start(open: (onnotify: (payload: string) => void, onclose: () => void) => Sql, handlers: ListenHandlers) {
    const first = Promise.withResolvers<void>();
    this.#kept = this.#keep(open, {
      ...handlers,
      restarted() {
        first.resolve();
        handlers.restarted();
      },
      failed(error) {
        first.reject(error);
        handlers.failed(error);
      },
    });
    try {
      await first.promise;
    } catch (error) {
      await this.end();
      throw error;
    }
  }

  async #keep(open: (onnotify: (payload: string) => void, onclose: () => void) => Sql, handlers: ListenHandlers) {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      const closed = Promise.withResolvers<void>();
      const sql = open(handlers.heard, closed.resolve);
      signal.addEventListener("abort", () => closed.resolve(), { once: true });
      try {
        await sql.unsafe(`listen ${this.#channel}`);
        this.#sql = sql;
        handlers.restarted();
        await closed.promise;
      } catch (error) {
        if (!signal.aborted) handlers.failed(error);
      }
      this.#sql = undefined;
      await sql.end({ timeout: 1 }).catch(NOOP);
      await delay(RELISTEN_MS, undefined, { signal, ref: false }).catch(NOOP);
    }
  }

  async notify(payload: string): Promise<void> {
    const sql = this.#sql;
    if (sql) await sql`select pg_notify(${this.#channel}, ${payload})`;
  }

  async end(): Promise<void> {
    this.#stop.abort();
    await this.#kept;
  }
}

/** Opens the pools; nothing is contacted before the first query. */
export function openDb(url: string): Db {
  const point = new Turns(2, (onclose) => connect(url, "point", { max: 1, onclose }));
  const write = new Turns(4, (onclose) => connect(url, "write", { max: 1, max_pipeline: 1, onclose }));
  const list = new Turns(2, (onclose) => connect(url, "list", { max: 1, max_pipeline: 0, onclose }));
  const sessions = new Sessions((onclose) => connect(url, "transaction", { max: 1, onclose }));
  return {
    get point() {
      return point.sql;
    },
    get write() {
      return write.sql;
    },
    get list() {
      return list.sql;
    },
    begin: (work, crowd) => sessions.begin(work, crowd),
    once: (statement, crowd) => sessions.once(statement, crowd),
    async listen(channel, handlers) {
      const listener = new Listener(channel);
      const open = (heard: (payload: string) => void, onclose: () => void) =>
        connect(url, "listen", { max: 1, onnotify: (_channel, payload) => heard(payload), onclose });
      await listener.start(open, handlers);
      return listener;
    },
    async close() {
      await Promise.all([point.end(), write.end(), list.end(), sessions.end()]);
    },
  };
}
