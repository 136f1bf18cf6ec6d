import { setTimeout as delay } from "node:timers/promises";
import type { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { OutboxEvent } from "../domain/event.ts";
import type { Db, Listening } from "./db.ts";

/** What somebody can wait for. */
export const Topic = { EVENTS: "events", SECRETS: "secrets" } as const;
export const runnerTopic = (runnerId: string) => `runner:${runnerId}`;
export const callTopic = (callId: string) => `call:${callId}`;

type Listener = () => void;
type EventListener = (events: readonly OutboxEvent[]) => void;

const CHANNEL = "berth";
const NOTIFY_EVERY_MS = 10;
const NOTIFY_BYTES = 7_000;
const EVERYTHING = "*";
const POLL_MS = 1_000;
const RETRY_MS = 500;
const BATCH = 1_000;
// First wait for transactions that hold finished events back; doubled up to the poll.
const BEHIND_MS = 10;

/** Waits without losing a wake-up that comes while nobody waits. */
export class Latch {
  #woken = false;
  #release: () => void = () => undefined;

  wake(): void {
    this.#woken = true;
    this.#release();
  }

  /**
   * Resolves at the next wake-up (at once if there was one since the last wait), after `ms`, or when a signal aborts,
   * whichever comes first.
   */
  async wait(ms: number, ...signals: AbortSignal[]): Promise<void> {
    if (!this.#woken && !signals.some((signal) => signal.aborted)) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#release = resolve;
      const timer = setTimeout(resolve, ms);
      const onAbort = () => resolve();
      for (const signal of signals) signal.addEventListener("abort", onAbort);
      await promise;
      clearTimeout(timer);
      // The signals may live for days, with a wait every few seconds.
      for (const signal of signals) signal.removeEventListener("abort", onAbort);
    }
    this.#woken = false;
  }
}

interface EventRow {
  horizon: string;
  behind: boolean;
  xid: string | null;
  seq: number | null;
  organization_id: string;
  environment_id: string | null;
  resource_type: ResourceType;
  resource_id: string;
  operation: ResourceOperation;
  creator_id: string | null;
  readers: string[] | null;
}

/** What had committed at a moment, as Postgres writes it: `xmin:xmax:xid,xid,...`, the last ones still running. */
class Snapshot {
  readonly xmin: string;
  readonly #xmax: bigint;
  readonly #running: ReadonlySet<string>;

  constructor(text: string) {
    const [xmin = "", xmax = "", running = ""] = text.split(":");
    this.xmin = xmin;
    this.#xmax = BigInt(xmax);
    this.#running = new Set(running.split(","));
  }

  /** Whether a transaction that has an end now had it then. */
  covers(xid: string): boolean {
    return BigInt(xid) < this.#xmax && !this.#running.has(xid);
  }

  /** Whether nothing from `horizon` on is covered. */
  isOver(horizon: string): boolean {
    return BigInt(horizon) >= this.#xmax;
  }
}

interface Subscriber {
  listener: EventListener;
  /** What had committed when it came; absent once all that is behind. */
  since?: Snapshot | undefined;
}

/**
 * Wakes waiters in this process and in every other one, and reads the outbox once for all streams of this process.
 *
 * Waking: at once inside the process; for the others one NOTIFY per few milliseconds on a connection of its own, never
 * inside a transaction, where it would serialise every commit of the database. Notifications are hints that may be
 * lost: a poll each second makes up for them.
 *
 * Reading: rows of a transaction become visible at its commit, which may be long after a later `seq` was seen. So the
 * outbox is read in windows of transaction ids, from the last horizon up to the oldest transaction still running;
 * everything in a window is final. Within it `seq` gives the order.
 */
export class EventHub {
  readonly #db: Db;
  readonly #origin: string;
  readonly #onError: (error: unknown) => void;
  readonly #listeners = new Map<string, Set<Listener>>();
  readonly #subscribers = new Set<Subscriber>();
  readonly #pending = new Set<string>();
  readonly #stop = new AbortController();
  #listening?: Listening;
  #notifyTimer?: NodeJS.Timeout;
  #notifiedAt = Number.NEGATIVE_INFINITY;
  #poll?: NodeJS.Timeout;
  #behindTimer?: NodeJS.Timeout;
  #behindMs = BEHIND_MS;
  #horizon?: string;
  #dispatching?: Promise<void>;
  #again = false;

  /** `origin` names this process, so that it ignores its own notifications. */
  constructor(db: Db, origin: string, onError: (error: unknown) => void) {
    this.#db = db;
    this.#origin = origin;
    this.#onError = onError;
  }

  /** Starts to listen to other processes; until then only this one is heard. */
  async start(): Promise<void> {
    this.#listening = await this.#db.listen(CHANNEL, {
      heard: (payload) => this.#heard(payload),
      // Whatever was missed meanwhile has to be looked for.
      restarted: () => this.#emitAll(),
      failed: this.#onError,
    });
    this.#poll = setInterval(() => this.#emit(Topic.EVENTS), POLL_MS);
    this.#poll.unref();
  }

  /** Calls `listener` whenever the topic is woken; returns how to leave. */
  on(topic: string, listener: Listener): () => void {
    const listeners = this.#listeners.get(topic) ?? new Set();
    listeners.add(listener);
    this.#listeners.set(topic, listeners);
    return () => {
      listeners.delete(listener);
      if (!listeners.size && this.#listeners.get(topic) === listeners) this.#listeners.delete(topic);
    };
  }

  /** A latch that the topic wakes; `leave` ends it. */
  latch(topic: string): { latch: Latch; leave: () => void } {
    const latch = new Latch();
    return { latch, leave: this.on(topic, () => latch.wake()) };
  }

  /** Says, after a commit, that there is something new about these topics. */
  wake(...topics: string[]): void {
    for (const topic of topics) {
      this.#pending.add(topic);
      this.#emit(topic);
    }
    // At once after a pause, and what comes soon after that together.
    const waitMs = Math.max(0, this.#notifiedAt + NOTIFY_EVERY_MS - performance.now());
    this.#notifyTimer ??= setTimeout(() => void this.#notify(), waitMs);
  }

  /**
   * Hands every event that commits from now on to `listener`, and none from before, in batches and in order. Resolves
   * once nothing can be missed any more.
   */
  async subscribe(listener: EventListener): Promise<() => void> {
    const [row] = await this.#db.point<{ snapshot: string }[]>`select pg_current_snapshot()::text as snapshot`;
    const since = new Snapshot(row?.snapshot ?? "");
    this.#horizon ??= since.xmin;
    const subscriber: Subscriber = { listener, since };
    this.#subscribers.add(subscriber);
    return () => {
      this.#subscribers.delete(subscriber);
      if (!this.#subscribers.size) this.#horizon = undefined;
    };
  }

  async close(): Promise<void> {
    clearTimeout(this.#notifyTimer);
    // What this process did last matters to the others too.
    if (this.#pending.size) await this.#notify();
    this.#stop.abort();
    clearInterval(this.#poll);
    clearTimeout(this.#behindTimer);
    await this.#dispatching;
    await this.#listening?.end();
  }

  #heard(payload: string): void {
    const [origin, ...topics] = payload.split(" ");
    if (origin === this.#origin) return;
    if (topics.includes(EVERYTHING)) this.#emitAll();
    else for (const topic of topics) this.#emit(topic);
  }

  #emitAll(): void {
    for (const topic of [Topic.EVENTS, ...this.#listeners.keys()]) this.#emit(topic);
  }

  #emit(topic: string): void {
    if (topic === Topic.EVENTS) this.#dispatch();
    for (const listener of [...(this.#listeners.get(topic) ?? [])]) listener();
  }

  async #notify(): Promise<void> {
    const topics = [...this.#pending].join(" ");
    this.#pending.clear();
    this.#notifyTimer = undefined;
    this.#notifiedAt = performance.now();
    if (this.#stop.signal.aborted) return;
    const payload = `${this.#origin} ${topics.length < NOTIFY_BYTES ? topics : EVERYTHING}`;
    await this.#listening?.notify(payload).catch(this.#onError);
  }

  #dispatch(): void {
    this.#again = true;
    if (this.#dispatching || !this.#subscribers.size) return;
    this.#dispatching = this.#run().finally(() => {
      this.#dispatching = undefined;
      if (this.#again && !this.#stop.signal.aborted) this.#dispatch();
    });
  }

  async #run(): Promise<void> {
    while (this.#again && this.#subscribers.size && !this.#stop.signal.aborted) {
      this.#again = false;
      try {
        await this.#readWindow();
      } catch (error) {
        this.#onError(error);
        await delay(RETRY_MS, undefined, { ref: false });
        this.#again = true;
      }
    }
    this.#again &&= this.#subscribers.size > 0;
  }

  /** Finished events wait for the oldest transaction: looks again soon, for its end need not be told to anybody. */
  #lookAgain(): void {
    clearTimeout(this.#behindTimer);
    this.#behindTimer = setTimeout(() => this.#dispatch(), this.#behindMs);
    this.#behindTimer.unref();
    this.#behindMs = Math.min(this.#behindMs * 2, POLL_MS);
  }

  async #readWindow(): Promise<void> {
    const from = this.#horizon;
    if (!from) return;
    let until: string | undefined;
    let behind = false;
    for (let after = 0; ; ) {
      const rows: EventRow[] = await this.#db.point<EventRow[]>`
        with edge as (select ${until ? this.#db.point`${until}::xid8` : this.#db.point`pg_snapshot_xmin(pg_current_snapshot())`} as horizon)
        select edge.horizon::text as horizon, exists (select from events where xid >= edge.horizon) as behind, e.*
        from edge left join lateral (
          select xid::text as xid, seq, organization_id, environment_id, resource_type, resource_id, operation, creator_id, readers from events
          where xid >= ${from}::xid8 and xid < edge.horizon and seq > ${after} order by seq limit ${BATCH}
        ) e on true order by e.seq`;
      until = rows[0]?.horizon;
      behind = rows[0]?.behind ?? false;
      this.#deliver(rows.filter((row) => row.seq !== null));
      if (rows.length < BATCH) break;
      after = rows.at(-1)?.seq ?? after;
    }
    if (until !== from) this.#behindMs = BEHIND_MS;
    // A subscriber that joined meanwhile set no horizon of its own, and one that left may have cleared it.
    if (this.#horizon === from) this.#horizon = until;
    for (const each of this.#subscribers) if (until && each.since?.isOver(until)) each.since = undefined;
    if (behind) this.#lookAgain();
  }

  #deliver(rows: readonly EventRow[]): void {
    if (!rows.length) return;
    const events = rows.map((row) => ({
      xid: row.xid ?? "",
      organizationId: row.organization_id,
      environmentId: row.environment_id,
      resourceType: row.resource_type,
      resourceId: row.resource_id,
      operation: row.operation,
      creatorId: row.creator_id,
      readers: row.readers && new Set(row.readers),
    }));
    for (const { listener, since } of [...this.#subscribers]) {
      const news = since ? events.filter((event) => !since.covers(event.xid)) : events;
      if (news.length) listener(news);
    }
  }
}
