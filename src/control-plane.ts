import { randomBytes } from "node:crypto";
import { chmod, mkdir, open, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { type App, LIMITS, type Limits } from "./app.ts";
import { ConfigError, type ServerConfig } from "./config.ts";
import { linuxHostSchema } from "./domain/environment-class.ts";
import { TokenKind, tokenKind, tokenText } from "./domain/tokens.ts";
import { routes, services } from "./routes.ts";
import { authentication, callerOf } from "./rpc/authenticate.ts";
import { refusals } from "./rpc/errors.ts";
import { observe } from "./rpc/observe.ts";
import { rateLimit } from "./rpc/rate-limit.ts";
import { validation, warmValidation } from "./rpc/validate.ts";
import { createGuard } from "./scm/guard.ts";
import { type Server, startServer } from "./server.ts";
import { bootstrap, claimInstallation } from "./store/bootstrap.ts";
import { type Db, openDb } from "./store/db.ts";
import { type EmbeddedPostgres, startEmbeddedPostgres } from "./store/embedded-postgres.ts";
import { EventHub } from "./store/hub.ts";
import { isMigrated, migrate } from "./store/migrate.ts";
import { findCaller, touchToken } from "./store/tokens.ts";
import { runSweeps } from "./sweep/sweeps.ts";

const PRIVATE_FOLDER = 0o700;
// Environments run as users of their own and must be able to reach their folders; nobody can list this one.
const PASSABLE_FOLDER = 0o711;
const PRIVATE_FILE = 0o600;
const MASTER_KEY_BYTES = 32;
const DRAIN_MS = 30_000;
const DEFAULT_CPU = "2";
const DEFAULT_MEMORY_MIB = "4096";

/** A control plane that serves. */
export interface ControlPlane {
  app: App;
  server: Server;
  /** Token of the first admin, if this process made the first organization and was not given one. */
  firstToken?: string;
  /** Exchange token for the embedded runner, if one is waiting for it. */
  runnerExchangeToken?: string;
  /** Ends streams and sweeps, lets calls in flight finish, closes the database. */
  stop(): Promise<void>;
}

/** What tests hold still. */
export interface Overrides {
  now?: () => Date;
  limits?: Partial<Limits>;
}

async function writePrivate(path: string, content: string): Promise<void> {
  const partial = `${path}.partial`;
  await writeFile(partial, content, { mode: PRIVATE_FILE });
  await rename(partial, path);
}

/** The folder of everything local. As root it lets other users through, but shows them nothing. */
async function prepareDataDir(path: string): Promise<void> {
  await mkdir(path, { recursive: true, mode: PRIVATE_FOLDER });
  await chmod(path, process.getuid?.() === 0 ? PASSABLE_FOLDER : PRIVATE_FOLDER);
}

/** The configured key, or one that is made once and kept beside the data. */
async function masterKeyOf(config: ServerConfig): Promise<Uint8Array> {
  if (config.masterKey) return config.masterKey;
  const path = join(config.dataDir, "master.key");
  const made = randomBytes(MASTER_KEY_BYTES).toString("base64");
  await open(path, "wx", PRIVATE_FILE).then(
    async (file) => {
      await file.writeFile(`${made}\n`);
      await file.sync();
      await file.close();
    },
    (error: NodeJS.ErrnoException) => {
      if (error.code !== "EEXIST") throw error;
    },
  );
  const key = Buffer.from((await readFile(path, "utf8")).trim(), "base64");
  if (key.length !== MASTER_KEY_BYTES)
    throw new ConfigError("master.key in BERTH_DATA_DIR is damaged: it must hold 32 bytes in base64");
  return key;
}

async function openDatabase(config: ServerConfig, log: Logger): Promise<{ db: Db; embedded?: EmbeddedPostgres }> {
  if (config.databaseUrl) return { db: openDb(config.databaseUrl) };
  const home = join(config.dataDir, "postgres");
  const embedded = await startEmbeddedPostgres(home, (message) => log.warn(message));
  return { db: openDb(embedded.url), embedded };
}

interface First {
  token?: string;
  runnerExchangeToken?: string;
}

/** Where the embedded runner's first credential waits: a crash between the two must not leave it without one. */
const exchangeTokenPath = (config: ServerConfig) => join(config.runner.dataDir, "exchange-token");

/** Makes the first organization if there is none, and finds what the embedded runner needs to sign up. */
async function firstStart(config: ServerConfig, db: Db, log: Logger, at: Date): Promise<First> {
  const path = exchangeTokenPath(config);
  if (!config.bootstrap.enabled) return {};
  const { adminToken, adminEmail, adminName, organizationName, tokenFile } = config.bootstrap;
  if (adminToken && tokenKind(adminToken) !== TokenKind.PERSONAL_ACCESS) {
    throw new ConfigError(
      "BERTH_BOOTSTRAP_ADMIN_TOKEN must be a personal access token: berth_pat_ and 49 characters, the last 6 of them the checksum",
    );
  }
  const token = adminToken ?? tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  const exchangeToken = tokenText(TokenKind.RUNNER_EXCHANGE, randomBytes);
  const waiting = await readFile(path, "utf8").catch(() => undefined);
  if (config.embeddedRunner && !waiting) {
    await mkdir(config.runner.dataDir, { recursive: true, mode: PASSABLE_FOLDER });
    await writePrivate(path, exchangeToken);
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
    if (!waiting) await rm(path, { force: true });
    log.info("an organization exists, so the bootstrap settings are ignored");
    return { runnerExchangeToken: waiting };
  }
  if (tokenFile && !adminToken) await writePrivate(tokenFile, `${token}\n`);
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

/** Brings a control plane up: database, schema, first organization, port, sweeps. */
export async function startControlPlane(
  config: ServerConfig,
  log: Logger,
  overrides: Overrides = {},
): Promise<ControlPlane> {
  const now = overrides.now ?? (() => new Date());
  await prepareDataDir(config.dataDir);
  const masterKey = await masterKeyOf(config);
  const { db, embedded } = await openDatabase(config, log);
  const closeDatabase = async () => {
    await db.close();
    await embedded?.stop();
  };
  try {
    await migrate(db);
    const controlPlaneId = await claimInstallation(db, masterKey, uuidv7, now());
    const first = await firstStart(config, db, log, now());
    const draining = new AbortController();
    const hub = new EventHub(db, uuidv7(), (error) => log.error({ err: error }, "the event hub lost its database"));
    await hub.start();
    const app: App = {
      ...{ config, db, hub, log, controlPlaneId, masterKey, now },
      limits: { ...LIMITS, ...overrides.limits },
      newId: uuidv7,
      random: randomBytes,
      scmGuard: createGuard({ allowHosts: config.scm.allowHosts, schemes: config.scm.schemes }),
      draining: draining.signal,
    };
    const server = await startServer({
      host: config.host,
      port: config.port,
      routes: routes(app),
      interceptors: [
        observe({ log, callerOf }),
        refusals,
        authentication({
          find: (text) => findCaller(db.point, text, now()),
          touch: (tokenId) => {
            touchToken(db.write, tokenId, now()).catch((error) =>
              log.warn({ err: error }, "a token's last use was not written"),
            );
          },
        }),
        rateLimit(config.rateLimit),
        validation(),
      ],
      metricsToken: config.metricsToken,
      trustedProxies: config.trustedProxies,
      ready: async () =>
        (await isMigrated(db)) ? { ok: true } : { ok: false, reason: "the database is not migrated" },
      log,
    });
    warmValidation(services);
    const sweeping = runSweeps(app, draining.signal);
    return {
      app,
      server,
      firstToken: first.token,
      runnerExchangeToken: first.runnerExchangeToken,
      async stop() {
        const drained = server.drain(DRAIN_MS);
        draining.abort();
        await Promise.all([drained, sweeping]);
        await hub.close();
        await closeDatabase();
      },
    };
  } catch (error) {
    await closeDatabase();
    throw error;
  }
}

/** Takes the first credential of the embedded runner away once it has been used. */
export async function forgetExchangeToken(config: ServerConfig): Promise<void> {
  await rm(exchangeTokenPath(config), { force: true });
}
