import { execFile } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { startChild } from "./child.ts";
import type { SqlApi } from "./children/sql.ts";
import { isInstalled } from "./load.ts";

const run = promisify(execFile);

const TIMEOUT_MS = 60_000;
const THREADS = 2;

/** The same statement over and over, in transactions of its own. */
export interface SqlLoad {
  statement: string;
  clients: number;
  /** Of every client. */
  transactions: number;
}

/** Drives Postgres without the product. */
export interface SqlGenerator {
  /** For the notes of the table. */
  readonly name: string;
  /** Transactions a second. */
  run(load: SqlLoad): Promise<number>;
  stop(): Promise<void>;
}

async function pgbench(databaseUrl: string): Promise<SqlGenerator> {
  const folder = await mkdtemp(join(tmpdir(), "berth-sql-"));
  const { searchParams, hostname, port, username, pathname } = new URL(databaseUrl);
  const target = [
    "-h",
    searchParams.get("host") ?? hostname,
    ...(port ? ["-p", port] : []),
    "-U",
    username,
    pathname.slice(1),
  ];
  return {
    name: "pgbench",
    async run({ statement, clients, transactions }) {
      const script = join(folder, "statement.sql");
      await writeFile(script, `${statement};\n`);
      const size = ["-c", String(clients), "-j", String(THREADS), "-t", String(transactions)];
      const { stdout } = await run("pgbench", ["-n", "-M", "prepared", ...size, "-f", script, ...target], {
        timeout: TIMEOUT_MS,
      });
      const rate = /tps = ([\d.]+)/.exec(stdout)?.[1];
      if (!rate) throw new Error(`pgbench said nothing of its rate:\n${stdout}`);
      return Number(rate);
    },
    stop: () => rm(folder, { recursive: true, force: true }),
  };
}

async function driver(databaseUrl: string): Promise<SqlGenerator> {
  const child = await startChild<SqlApi>("sql.ts", { databaseUrl });
  return {
    name: "the driver, as there is no pgbench here",
    run: (load) => child.call("run", load),
    stop: () => child.stop(),
  };
}

/** pgbench where there is one, else a process of Node with the driver. */
export async function sqlGenerator(databaseUrl: string): Promise<SqlGenerator> {
  return (await isInstalled("pgbench", "--version")) ? pgbench(databaseUrl) : driver(databaseUrl);
}
