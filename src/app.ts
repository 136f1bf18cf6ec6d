import { setTimeout as delay } from "node:timers/promises";
import type { Logger } from "pino";
import { type ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import type { ServerConfig } from "./config.ts";
import { databaseRefusal, isConflict } from "./domain/errors.ts";
import type { Caller } from "./domain/principal.ts";
import { type TokenKind, tokenText } from "./domain/tokens.ts";
import type { Guard } from "./scm/guard.ts";
import type { Db, Sql, Tx, Work } from "./store/db.ts";
import { type EventHub, runnerTopic, Topic } from "./store/hub.ts";
import type { Actor, Attribution, Change } from "./store/record.ts";
import type { StoredRunner } from "./store/runners.ts";

/** Bounds of streams, relayed calls and what one may have many of; times in milliseconds. Tests make them small. */
export interface Limits {
  /** Silence after which a stream of events shows a sign of life. */
  eventHeartbeatMs: number;
  /** How long an open stream trusts its credential and the roles that came with it. */
  credentialCheckMs: number;
  /** How long a caller waits for all the runners that are asked for it. */
  runnerCallMs: number;
  /** Changed resources that may wait for one stream. */
  pendingEvents: number;
  /** Streams of events of one principal on this replica. */
  streamsPerPrincipal: number;
  /** Unexpired personal access tokens of one user. */
  personalAccessTokens: number;
  /** Preferences of one user. */
  preferences: number;
  /** Service accounts of one organization that are not suspended, and unexpired tokens of one of them. */
  serviceAccounts: number;
  serviceAccountTokens: number;
  /** Secrets of one owner. */
  secrets: number;
  /** Groups of one organization, direct shares aside, and members of one group. */
  groups: number;
  groupMembers: number;
}

export const LIMITS: Limits = {
  eventHeartbeatMs: 20_000,
  credentialCheckMs: 4_000,
  runnerCallMs: 20_000,
  pendingEvents: 10_000,
  streamsPerPrincipal: 50,
  personalAccessTokens: 100,
  preferences: 500,
  serviceAccounts: 500,
  serviceAccountTokens: 50,
  secrets: 500,
  groups: 1_000,
  groupMembers: 10_000,
};

/** What handlers and jobs work with. Time, ids and randomness come in here so that tests can hold them still. */
export interface App {
  config: ServerConfig;
  limits: Limits;
  db: Db;
  hub: EventHub;
  log: Logger;
  /** Identifies the installation; runners refuse another one. */
  controlPlaneId: string;
  /** Wraps the data keys of secrets. */
  masterKey: Uint8Array;
  now(): Date;
  /** A new UUIDv7: later ids sort after earlier ones. */
  newId(): string;
  random(bytes: number): Uint8Array;
  scmGuard: Guard;
  /** Aborted when the process drains; ends streams and waits. */
  draining: AbortSignal;
}

/** Text of a new token. */
export const newTokenText = (app: App, kind: TokenKind) => tokenText(kind, app.random);

/** A caller as the audit log names it. */
export const actorOf = (caller: Caller): Actor => ({
  id: caller.id,
  principal: caller.principal,
  tokenId: caller.tokenId,
  issuerId: caller.issuerId,
});

/** To whom what a caller does now is put down. */
export const attribution = (app: App, caller: Caller): Attribution => ({
  actor: actorOf(caller),
  newId: app.newId,
  at: app.now(),
});

/** A deadline that starts anew each time it has passed, measured by a clock that nobody sets. */
export function pacer(intervalMs: number) {
  let next = performance.now() + intervalMs;
  const restart = () => {
    next = performance.now() + intervalMs;
  };
  return {
    restart,
    leftMs: () => Math.max(0, next - performance.now()),
    /** True once per interval. */
    isDue(): boolean {
      if (performance.now() < next) return false;
      restart();
      return true;
    },
  };
}

const ATTEMPTS = 5;
const RETRY_MS = 10;

/** Runs what lost against another transaction (deadlock, serialization) again a few times, then ABORTED. */
async function retried<T>(app: App, attempt: () => Promise<T>): Promise<T> {
  for (let count = 1; ; count++) {
    try {
      return await attempt();
    } catch (error) {
      if (!isConflict(error) || count === ATTEMPTS) throw databaseRefusal(error) ?? error;
      const [jitter = 0] = app.random(1);
      await delay(RETRY_MS * 2 ** count * (0.5 + jitter / 255));
    }
  }
}

/**
 * Runs a transaction and, once it has committed, wakes whoever waits for its events and for changes of these runners.
 * One that lost against another runs again: `work` must have no effects outside of it. For `last` and `crowd` see
 * `Db.begin`.
 */
export function transact<T>(
  app: App,
  work: (tx: Tx, touched: (runnerId: string) => void, last: Parameters<Work<T>>[1]) => Promise<T>,
  crowd?: string,
): Promise<T> {
  return retried(app, async () => {
    const runners = new Set<string>();
    const result = await app.db.begin((tx, last) => work(tx, (runnerId) => runners.add(runnerId), last), crowd);
    app.hub.wake(Topic.EVENTS, ...[...runners].map(runnerTopic));
    return result as T;
  });
}

/** As `transact`, for one statement, whose answer is undefined if it has changed nothing, and at most one runner. */
export function transactOnce<T>(
  app: App,
  statement: (sql: Sql) => Promise<T | undefined>,
  { touched, crowd }: { touched?: string; crowd?: string } = {},
): Promise<T | undefined> {
  return retried(app, async () => {
    const result = await app.db.once(statement, crowd);
    if (result !== undefined) app.hub.wake(Topic.EVENTS, ...(touched ? [runnerTopic(touched)] : []));
    return result;
  });
}

/** As `transact`, for what may change the secrets of environments: those that run are told once it has committed. */
export async function transactSecrets<T>(app: App, work: Parameters<typeof transact<T>>[1]): Promise<T> {
  const result = await transact(app, work);
  app.hub.wake(Topic.SECRETS);
  return result;
}

/** A change of a runner for watchers and, with an `action`, for the audit log. */
export function runnerChange(
  app: App,
  runner: Pick<StoredRunner, "id" | "organizationId" | "creatorId">,
  operation: ResourceOperation,
  actor: Actor,
  action?: string,
): Change {
  return {
    organizationId: runner.organizationId,
    resourceType: ResourceType.RUNNER,
    resourceId: runner.id,
    operation,
    creatorId: runner.creatorId,
    runnerId: runner.id,
    at: app.now(),
    audit: action ? { id: app.newId(), actor, action } : undefined,
  };
}
