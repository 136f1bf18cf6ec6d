import { randomBytes } from "node:crypto";
import { chmod, link, mkdir, open, readFile, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { type App, LIMITS, type Limits } from "./app.ts";
import { ConfigError, parseMasterKey, type ServerConfig } from "./config.ts";
import { linuxHostSchema } from "./domain/environment-class.ts";
import { TokenKind, tokenKind, tokenText } from "./domain/tokens.ts";
import { wellKnown } from "./http/well-known.ts";
import { routes, services } from "./routes.ts";
import { authentication, callerOf } from "./rpc/authenticate.ts";
import { refusals, refusingGate } from "./rpc/errors.ts";
import { observe } from "./rpc/observe.ts";
import { rateLimit } from "./rpc/rate-limit.ts";
import { validation, warmValidation } from "./rpc/validate.ts";
import { createGuard } from "./scm/guard.ts";
import { type Server, startServer } from "./server.ts";
import { createSigner } from "./signing.ts";
import { bootstrap, claimInstallation, hasOrganization, holdsMasterKey } from "./store/bootstrap.ts";
import { type Db, openDb } from "./store/db.ts";
import { type EmbeddedPostgres, startEmbeddedPostgres } from "./store/embedded-postgres.ts";
import { EventHub } from "./store/hub.ts";
import { isMigrated, migrate } from "./store/migrate.ts";
import { findCaller, rearmExchangeToken, touchToken } from "./store/tokens.ts";
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

/** Writes a file beside `path` that nobody else can read; the caller moves it there, or removes it. */
async function stagePrivate(path: string, content: string): Promise<string> {
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

const reasonOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** The folder of everything local. As root it lets other users through, but shows them nothing. */
async function prepareDataDir(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true, mode: PRIVATE_FOLDER });
    await chmod(path, process.getuid?.() === 0 ? PASSABLE_FOLDER : PRIVATE_FOLDER);
  } catch (error) {
    throw new ConfigError(`BERTH_DATA_DIR cannot be used: ${reasonOf(error)}`);
  }
}

/** The configured key, or one that is made once and kept beside the data. */
async function masterKeyOf(config: ServerConfig): Promise<Uint8Array> {
  if (config.masterKey) return config.masterKey;
  const path = join(config.dataDir, "master.key");
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
  if (!key) throw new ConfigError("master.key in BERTH_DATA_DIR is damaged: it must hold 32 bytes in base64");
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

function checkAdminToken({ bootstrap: { enabled, adminToken } }: ServerConfig): void {
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
async function firstStart(config: ServerConfig, db: Db, log: Logger, at: Date): Promise<First> {
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

/** Brings a control plane up: database, schema, first organization, port, sweeps. */
export async function startControlPlane(
  config: ServerConfig,
  log: Logger,
  overrides: Overrides = {},
): Promise<ControlPlane> {
  const now = overrides.now ?? (() => new Date());
  checkAdminToken(config);
  await prepareDataDir(config.dataDir);
  const masterKey = await masterKeyOf(config);
  const { db, embedded } = await openDatabase(config, log);
  const hub = new EventHub(db, uuidv7(), (error) => log.error({ err: error }, "the event hub lost its database"));
  const closeDatabase = async () => {
    await hub.close();
    await db.close();
    await embedded?.stop();
  };
  let server: Server | undefined;
  try {
    await migrate(db);
    const controlPlaneId = await claimInstallation(db, masterKey, uuidv7, now());
    const draining = new AbortController();
    await hub.start();
    const app: App = {
      ...{ config, db, hub, log, controlPlaneId, masterKey, now },
      limits: { ...LIMITS, ...overrides.limits },
      newId: uuidv7,
      random: randomBytes,
      scmGuard: createGuard({ allowHosts: config.scm.allowHosts, schemes: config.scm.schemes }),
      draining: draining.signal,
    };
    const authenticate = authentication({
      find: (text) => findCaller(db.point, text, now()),
      touch: (tokenId) => {
        touchToken(db.write, tokenId, now()).catch((error) =>
          log.warn({ err: error }, "a token's last use was not written"),
        );
      },
    });
    const limit = rateLimit(config.rateLimit);
    let isStarted = false;
    server = await startServer({
      host: config.host,
      port: config.port,
      routes: routes(app),
      gate: refusingGate(async (request) => {
        await authenticate(request);
        limit(request);
      }, config.docsUrl),
      interceptors: [observe({ log, callerOf }), refusals(config.docsUrl), validation()],
      http: wellKnown(config.publicUrl, createSigner(app).publicKeys),
      metricsToken: config.metricsToken,
      trustedProxies: config.trustedProxies,
      ready: async () => {
        if (!isStarted) return { ok: false, reason: "the server is starting" };
        if (!(await isMigrated(db))) return { ok: false, reason: "the database is not migrated" };
        if (!(await holdsMasterKey(db.point, masterKey)))
          return { ok: false, reason: "the master key has been replaced" };
        return { ok: true };
      },
      log,
    });
    warmValidation(services);
    // Last, when nothing else can fail: the token that it makes is shown once, and never again.
    const first = await firstStart(config, db, log, now());
    isStarted = true;
    const sweeping = runSweeps(app, draining.signal);
    const serving = server;
    return {
      app,
      server: serving,
      firstToken: first.token,
      runnerExchangeToken: first.runnerExchangeToken,
      async stop() {
        const drained = serving.drain(DRAIN_MS);
        draining.abort();
        await Promise.all([drained, sweeping]);
        await closeDatabase();
      },
    };
  } catch (error) {
    await server?.close();
    await closeDatabase();
    throw error;
  }
}

/** Takes the first credential of the embedded runner away once it has been used. */
export async function forgetExchangeToken(config: ServerConfig): Promise<void> {
  await rm(exchangeTokenPath(config), { force: true });
}
