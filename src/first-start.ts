import { randomBytes } from "node:crypto";
import { mkdir, readFile, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { ConfigError, type ServerConfig } from "./config.ts";
import { linuxHostSchema } from "./domain/environment-class.ts";
import { TokenKind, tokenKind, tokenText } from "./domain/tokens.ts";
import { PASSABLE_FOLDER, reasonOf, stagePrivate } from "./installation.ts";
import { bootstrap, hasOrganization } from "./store/bootstrap.ts";
import type { Db } from "./store/db.ts";
import { rearmExchangeToken } from "./store/tokens.ts";

const DEFAULT_CPU = "2";
const DEFAULT_MEMORY_MIB = "4096";

/** What a first start has made, or another one left behind. */
export interface First {
  /** Token of the first admin, if this start made the organization and was not given one. */
  token?: string;
  /** Exchange token for the embedded runner, if one is waiting for it. */
  runnerExchangeToken?: string;
}

/** Where the embedded runner's first credential waits: a crash between the two must not leave it without one. */
const exchangeTokenPath = (config: ServerConfig) => join(config.runner.dataDir, "exchange-token");

/**
 * The embedded runner's first credential, if it still waits. If it was used up, but what it was exchanged for has never
 * reached the disk, the runner died in between: then it may be used once more.
 */
async function waitingExchangeToken(config: ServerConfig, db: Db, at: Date): Promise<string | undefined> {
  const waiting = await readFile(exchangeTokenPath(config), "utf8").catch(() => undefined);
  const signedIn = await stat(join(config.runner.dataDir, "credentials.json")).catch(() => undefined);
  if (waiting && !signedIn) await rearmExchangeToken(db, waiting, at);
  return waiting;
}

/** Refuses a pre-seeded token that is none, before anything is made. */
export function checkAdminToken({ bootstrap: { enabled, adminToken } }: ServerConfig): void {
  if (!enabled || !adminToken || tokenKind(adminToken) === TokenKind.PERSONAL_ACCESS) return;
  throw new ConfigError(
    "BERTH_BOOTSTRAP_ADMIN_TOKEN must be a personal access token: berth_pat_ and 49 characters, the last 6 of them the checksum",
  );
}

/** The file for the generated token, not yet in its place: a token that cannot be kept must not be made. */
async function stageTokenFile(path: string, token: string): Promise<string> {
  const present = await stat(path).catch(() => undefined);
  if (present && !present.isFile()) throw new ConfigError("BERTH_BOOTSTRAP_TOKEN_FILE names something that is no file");
  return stagePrivate(path, `${token}\n`).catch((error: unknown) => {
    throw new ConfigError(`BERTH_BOOTSTRAP_TOKEN_FILE cannot be written: ${reasonOf(error)}`);
  });
}

/** Makes the first organization if there is none, and finds what the embedded runner needs to sign up. */
export async function firstStart(config: ServerConfig, db: Db, log: Logger, at: Date): Promise<First> {
  const path = exchangeTokenPath(config);
  const waiting = await waitingExchangeToken(config, db, at);
  if (!config.bootstrap.enabled) return { runnerExchangeToken: waiting };
  const { adminToken, adminEmail, adminName, organizationName, tokenFile } = config.bootstrap;
  const token = adminToken ?? tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  const exchangeToken = tokenText(TokenKind.RUNNER_EXCHANGE, randomBytes);
  if (await hasOrganization(db.point)) {
    log.info("an organization exists, so the bootstrap settings are ignored");
    return { runnerExchangeToken: waiting };
  }
  const staged = tokenFile && !adminToken ? await stageTokenFile(tokenFile, token) : undefined;
  if (config.embeddedRunner && !waiting) {
    await mkdir(config.runner.dataDir, { recursive: true, mode: PASSABLE_FOLDER });
    await rename(await stagePrivate(path, exchangeToken), path);
  }
  const made = await bootstrap(db, {
    ...{ organizationName, adminEmail, adminName, at },
    adminToken: token,
    newId: uuidv7,
    runner: config.embeddedRunner
      ? {
          name: config.runner.name,
          exchangeToken: waiting ?? exchangeToken,
          classConfiguration: standardClass(),
        }
      : undefined,
  });
  if (!made) {
    if (staged) await rm(staged, { force: true });
    if (!waiting) await rm(path, { force: true });
    log.info("another process has made the organization meanwhile, so the bootstrap settings are ignored");
    return { runnerExchangeToken: waiting };
  }
  if (tokenFile && staged) await rename(staged, tokenFile);
  return {
    token: adminToken ? undefined : token,
    runnerExchangeToken: config.embeddedRunner ? (waiting ?? exchangeToken) : undefined,
  };
}

function standardClass() {
  const known = new Set(linuxHostSchema("").environmentClasses.map((field) => field.id));
  const values = { cpu: DEFAULT_CPU, memory: DEFAULT_MEMORY_MIB };
  return Object.entries(values)
    .filter(([key]) => known.has(key))
    .map(([key, value]) => ({ $typeName: "gitpod.v1.FieldValue" as const, key, value }));
}

/** Takes the first credential of the embedded runner away once it has been used. */
export async function forgetExchangeToken(config: ServerConfig): Promise<void> {
  await rm(exchangeTokenPath(config), { force: true });
}
