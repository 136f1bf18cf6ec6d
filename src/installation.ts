import { randomBytes } from "node:crypto";
import { access, chmod, link, mkdir, open, readFile, rm } from "node:fs/promises";
import { basename, join } from "node:path";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { ConfigError, parseMasterKey, type ServerConfig } from "./config.ts";
import { RefusedStart } from "./domain/errors.ts";
import { claimInstallation } from "./store/bootstrap.ts";
import { type Db, openDb } from "./store/db.ts";
import { type EmbeddedPostgres, joinEmbeddedPostgres, startEmbeddedPostgres } from "./store/embedded-postgres.ts";
import { checkMigrated, migrate } from "./store/migrate.ts";

const PRIVATE_FOLDER = 0o700;
// Environments run as users of their own and must be able to reach their folders; nobody can list this one.
export const PASSABLE_FOLDER = 0o711;
const PRIVATE_FILE = 0o600;
const MASTER_KEY_BYTES = 32;

/** The state of an installation, opened by a process. */
export interface Installation {
  db: Db;
  masterKey: Uint8Array;
  controlPlaneId: string;
  /** Closes the database, and ends an embedded one that this process keeps running. */
  close(): Promise<void>;
}

/** Writes a file beside `path` that nobody else can read; the caller moves it there, or removes it. */
export async function stagePrivate(path: string, content: string): Promise<string> {
  const staged = `${path}.${randomBytes(8).toString("hex")}`;
  const file = await open(staged, "wx", PRIVATE_FILE);
  try {
    await file.writeFile(content);
    await file.sync();
  } finally {
    await file.close();
  }
  return staged;
}

export const reasonOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** The folder of everything local. As root it lets other users through, but shows them nothing. */
async function prepareDataDir(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true, mode: PRIVATE_FOLDER });
    await chmod(path, process.getuid?.() === 0 ? PASSABLE_FOLDER : PRIVATE_FOLDER);
  } catch (error) {
    throw new ConfigError(`BERTH_DATA_DIR cannot be used: ${reasonOf(error)}`);
  }
}

/** Where a master key is kept that nobody has configured. */
export const masterKeyPath = (config: ServerConfig) => join(config.dataDir, "master.key");

/** The master key in a file that only its owner can read; made if there is none. */
export async function keepMasterKey(path: string): Promise<Uint8Array> {
  const read = () => readFile(path, "utf8").catch(() => undefined);
  if ((await read()) === undefined) {
    const staged = await stagePrivate(path, `${randomBytes(MASTER_KEY_BYTES).toString("base64")}\n`);
    // Appears as a whole or not at all, and never in place of another one.
    await link(staged, path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "EEXIST") throw error;
    });
    await rm(staged);
  }
  const key = parseMasterKey((await read())?.trim() ?? "");
  if (!key) throw new ConfigError(`${basename(path)} in BERTH_DATA_DIR is damaged: it must hold 32 bytes in base64`);
  return key;
}

const postgresHome = (config: ServerConfig) => join(config.dataDir, "postgres");

/** Opens a database and brings its schema up to date, or fails and leaves nothing open. */
async function opened(db: Db, embedded: EmbeddedPostgres | undefined, prepare: () => Promise<string>) {
  const close = async () => {
    await db.close();
    await embedded?.stop();
  };
  try {
    return { db, controlPlaneId: await prepare(), close };
  } catch (error) {
    await close();
    throw error;
  }
}

/**
 * Opens an installation and makes what is missing of it: data directory, master key, database, schema. `shared` allows
 * for another process that keeps the embedded database running. Throws RefusedStart for a database that is newer than
 * this program or belongs to another master key.
 */
export async function openInstallation(
  config: ServerConfig,
  log: Logger,
  { now = () => new Date(), shared = false } = {},
): Promise<Installation> {
  await prepareDataDir(config.dataDir);
  const masterKey = config.masterKey ?? (await keepMasterKey(masterKeyPath(config)));
  const start = shared ? joinEmbeddedPostgres : startEmbeddedPostgres;
  const embedded = config.databaseUrl ? undefined : await start(postgresHome(config), (message) => log.warn(message));
  const db = openDb(embedded?.url ?? config.databaseUrl ?? "");
  const installation = await opened(db, embedded, async () => {
    await migrate(db);
    return claimInstallation(db, masterKey, uuidv7, now());
  });
  return { ...installation, masterKey };
}

/**
 * Opens the database of an installation that exists, whether or not a server runs on it. Throws RefusedStart where
 * there is none, or one of another version of this program.
 */
export async function openExisting(config: ServerConfig, log: Logger): Promise<Pick<Installation, "db" | "close">> {
  const home = postgresHome(config);
  const exists =
    config.databaseUrl ||
    (await access(join(home, "data")).then(
      () => true,
      () => false,
    ));
  if (!exists) throw new RefusedStart(`there is no installation in ${config.dataDir}: start berth there first`);
  const embedded = config.databaseUrl ? undefined : await joinEmbeddedPostgres(home, (message) => log.warn(message));
  const db = openDb(embedded?.url ?? config.databaseUrl ?? "");
  return opened(db, embedded, async () => {
    await checkMigrated(db);
    return "";
  });
}
