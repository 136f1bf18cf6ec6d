import { pino } from "pino";
import { readServerConfig, type ServerConfig } from "../../config.ts";
import { openExisting } from "../../installation.ts";
import type { Db } from "../../store/db.ts";
import { UsageError } from "../usage.ts";

/** A command of the operator, on a host that reaches the database. */
export interface AdminCommand {
  /** What follows `berth admin`. */
  name: string;
  /** Its options, as usage shows them. */
  options: string;
  about: string;
  run(args: readonly string[], env: NodeJS.ProcessEnv): Promise<void>;
}

/** Settings of the installation, and a log on standard error. */
export function operatorConfig(env: NodeJS.ProcessEnv): { config: ServerConfig; log: pino.Logger } {
  const config = readServerConfig(env);
  return { config, log: pino({ level: config.logLevel }, pino.destination({ fd: 2, sync: true })) };
}

/** Runs `work` on the database of the installation, and closes it again. */
export async function onInstallation<T>(env: NodeJS.ProcessEnv, work: (db: Db) => Promise<T>): Promise<T> {
  const { config, log } = operatorConfig(env);
  const { db, close } = await openExisting(config, log);
  try {
    return await work(db);
  } finally {
    await close();
  }
}

/** The only one of what was found; which ones there are if the command has to say more. Undefined for none. */
export function only<T>(found: readonly T[], option: string, describe: (each: T) => string): T | undefined {
  if (found.length < 2) return found[0];
  throw new UsageError(
    `there are several, choose one with --${option}:\n${found.map((each) => `  ${describe(each)}`).join("\n")}`,
  );
}
