import { randomBytes } from "node:crypto";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { type App, LIMITS, type Limits } from "./app.ts";
import type { ServerConfig } from "./config.ts";
import { cookieRules } from "./domain/browser.ts";
import { checkAdminToken, firstStart } from "./first-start.ts";
import { commandLineRoutes } from "./http/command-line.ts";
import { loginRoutes } from "./http/login.ts";
import { portRoutes } from "./http/ports.ts";
import { wellKnown } from "./http/well-known.ts";
import { openInstallation } from "./installation.ts";
import { besides, routes, services } from "./routes.ts";
import { authentication, callerOf } from "./rpc/authenticate.ts";
import { refusals, refusingGate } from "./rpc/errors.ts";
import { observe } from "./rpc/observe.ts";
import { addressLimit, rateLimit } from "./rpc/rate-limit.ts";
import { validation, warmValidation } from "./rpc/validate.ts";
import { createGuard } from "./scm/guard.ts";
import { type Server, startServer } from "./server.ts";
import { enterPort } from "./services/environment/tokens.ts";
import { createSigner } from "./signing.ts";
import { holdsMasterKey } from "./store/bootstrap.ts";
import { CallerGuesses, findSession, touchToken } from "./store/credentials.ts";
import { EventHub } from "./store/hub.ts";
import { isMigrated } from "./store/migrate.ts";
import { runSweeps } from "./sweep/sweeps.ts";

const DRAIN_MS = 30_000;

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

/** Brings a control plane up: database, schema, first organization, port, sweeps. */
export async function startControlPlane(
  config: ServerConfig,
  log: Logger,
  overrides: Overrides = {},
): Promise<ControlPlane> {
  const now = overrides.now ?? (() => new Date());
  checkAdminToken(config);
  const { db, masterKey, controlPlaneId, close } = await openInstallation(config, log, { now });
  const hub = new EventHub(db, uuidv7(), (error) => log.error({ err: error }, "the event hub lost its database"));
  const closeDatabase = async () => {
    await hub.close();
    await close();
  };
  let server: Server | undefined;
  try {
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
    const guesses = new CallerGuesses();
    const authenticate = authentication({
      find: (text, wanted) => guesses.find(db.point, text, now(), wanted),
      findSession: (text) => findSession(db.point, text, now()),
      cookie: cookieRules(config.publicUrl).session,
      besides,
      touch: (tokenId) => {
        touchToken(db.write, tokenId, now()).catch((error) =>
          log.warn({ err: error }, "a token's last use was not written"),
        );
      },
    });
    const addresses = addressLimit();
    const limit = rateLimit(config.rateLimit, undefined, addresses);
    const limitAddress = config.rateLimit > 0 ? addresses : () => 0;
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
      http: new Map([
        ...wellKnown(config.publicUrl, createSigner(app).publicKeys),
        ...loginRoutes(app, limitAddress),
        ...commandLineRoutes(app, limitAddress),
        ...portRoutes(app, limitAddress, (caller, visit) => enterPort(app, caller, visit)),
      ]),
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
