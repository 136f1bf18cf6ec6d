import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { fileURLToPath } from "node:url";
import { inject } from "vitest";
import { type Db, openDb } from "../../src/store/db.ts";
import { databaseUrl } from "./database.ts";
import { eventually } from "./wait.ts";

const MAIN = fileURLToPath(new URL("../../src/main.ts", import.meta.url));
const END_MS = 45_000;

/** A `berth` process as an operator starts it. */
export interface Program extends AsyncDisposable {
  /** Everything it has printed so far, on both streams in the order in which it came. */
  output(): string;
  /** What of that was on standard output. */
  printed(): string;
  /** Resolves once it has printed a text; rejects if it ends before. */
  says(text: string): Promise<void>;
  send(signal: NodeJS.Signals): void;
  /** Its exit code, null after a fatal signal; rejects if it goes on for 45 s. */
  ended(): Promise<number | null>;
}

/** Starts `berth` with these arguments, and of all variables only these and a few that make it the same everywhere. Disposing of it kills it. */
export function startProgram(args: readonly string[], env: Record<string, string>): Program {
  const child = spawn(process.execPath, [MAIN, ...args], {
    env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "/", BERTH_RUNNER_CONTAINER_ENGINE: "none", ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let output = "";
  let printed = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding("utf8").on("data", (chunk: string) => {
      output += chunk;
      if (stream === child.stdout) printed += chunk;
    });
  }
  let hasEnded = false;
  const closed = new Promise<number | null>((resolve) => {
    child.once("close", (code) => {
      hasEnded = true;
      resolve(code);
    });
  });
  return {
    output: () => output,
    printed: () => printed,
    async says(text) {
      await eventually(() => output.includes(text) || hasEnded, `berth says "${text}"`);
      if (!output.includes(text)) throw new Error(`berth ended without saying "${text}":\n${output}`);
    },
    send: (signal) => void child.kill(signal),
    async ended() {
      await eventually(() => hasEnded, "berth ends", END_MS);
      return closed;
    },
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await closed;
    },
  };
}

/** A database of its own in the cluster of this run. */
export interface TestDatabase extends AsyncDisposable {
  url: string;
  db: Db;
}

/** Makes a database, without a schema unless it is to be a clone of the migrated one. */
export async function createDatabase({ migrated = true } = {}): Promise<TestDatabase> {
  const cluster = inject("postgresUrl");
  const name = `t_${randomBytes(8).toString("hex")}`;
  const maintenance = openDb(cluster);
  await maintenance.write.unsafe(`create database ${name}${migrated ? " template berth_template" : ""}`);
  const url = databaseUrl(cluster, name);
  const db = openDb(url);
  return {
    url,
    db,
    async [Symbol.asyncDispose]() {
      await db.close();
      await maintenance.write.unsafe(`drop database ${name} with (force)`);
      await maintenance.close();
    },
  };
}
