import type { Logger } from "pino";
import type { ServerConfig } from "./config.ts";
import type { Caller } from "./domain/principal.ts";
import { type TokenKind, tokenText } from "./domain/tokens.ts";
import type { Guard } from "./scm/guard.ts";
import type { Db, Tx } from "./store/db.ts";
import { type EventHub, runnerTopic, Topic } from "./store/hub.ts";
import type { Actor } from "./store/record.ts";

/** What handlers and jobs work with. Time, ids and randomness come in here so that tests can hold them still. */
export interface App {
  config: ServerConfig;
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
});

/** Runs a transaction and, once it has committed, wakes whoever waits for its events and for changes of these runners. */
export async function transact<T>(
  app: App,
  work: (tx: Tx, touched: (runnerId: string) => void) => Promise<T>,
): Promise<T> {
  const runners = new Set<string>();
  const result = await app.db.write.begin((tx) => work(tx, (runnerId) => runners.add(runnerId)));
  app.hub.wake(Topic.EVENTS, ...[...runners].map(runnerTopic));
  return result as T;
}
