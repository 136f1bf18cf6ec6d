import { setTimeout as delay, setImmediate as nextTurn } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { type WatchEventsResponse, WatchEventsResponseSchema } from "../../../gen/gitpod/v1/event_pb.js";
import type { App } from "../../app.ts";
import { Refusal } from "../../domain/errors.ts";
import { Backlog, type OutboxEvent, resourceKey, type Selection } from "../../domain/event.ts";
import type { Caller } from "../../domain/principal.ts";
import type { Outlet } from "../../rpc/call.ts";
import { refreshCallers } from "../../store/credentials.ts";
import { type Audience, audienceOf } from "../../store/visibility.ts";

const RETRY_MS = 500;
// For how long streams are written to before other calls get their turn.
const SLICE_MS = 1;
const EVENTS_AT_ONCE = 100;
const LOOKS_PER_HEARTBEAT = 20;
const CALLERS_AT_ONCE = 1_000;

const SIGN_OF_LIFE = create(WatchEventsResponseSchema);

/** One open stream, as its handler knows it. */
export interface Watching {
  /** Rejects with the reason for which the stream has to end. */
  readonly ended: Promise<never>;
  /** Sends what the stream opens with, and whatever has happened since it was opened. */
  begin(opening: readonly OutboxEvent[]): void;
  /** Ends it, for a reason if its handler still waits. */
  end(reason: unknown): void;
}

interface Stream {
  caller: Caller;
  readonly outlet: Outlet;
  readonly backlog: Backlog;
  /** It has been sent what it opens with. */
  hasBegun: boolean;
  /** Its client has not taken what was sent before. */
  isBlocked: boolean;
  /** When it was sent something last, by `performance.now()`. */
  quietSince: number;
  end(reason: unknown): void;
}

const tooMany = () => new Refusal("unavailable", "too many changes are waiting: read again and reconnect");

/**
 * Takes events to all the streams of this process. What has come in since the last round goes out together: one question
 * to the database about who may see it, one message for each event, which all streams are sent. What a stream cannot take
 * yet waits in its backlog, merged by resource, and is judged again when it can. Credentials and roles of all streams are
 * looked up together too, a little more often than every five seconds.
 */
export class Dispatcher {
  readonly #app: App;
  readonly #streams = new Set<Stream>();
  /** Those with something to send. */
  readonly #due = new Set<Stream>();
  #isDelivering = false;
  #stopTimers: (() => void) | undefined;

  constructor(app: App) {
    this.#app = app;
  }

  /** Opens a stream; whatever is committed from now on and wanted is kept for it. */
  async open(caller: Caller, wants: Selection, outlet: Outlet): Promise<Watching> {
    const { promise: ended, reject } = Promise.withResolvers<never>();
    // It may end before anybody waits for that, or when nobody does any more.
    ended.catch(() => undefined);
    let leave: (() => void) | undefined;
    const stream: Stream = {
      ...{ caller, outlet, hasBegun: false, isBlocked: false, quietSince: performance.now() },
      backlog: new Backlog(this.#app.limits.pendingEvents),
      end: (reason) => {
        this.#forget(stream);
        leave?.();
        reject(reason);
      },
    };
    leave = await this.#app.hub.subscribe((events) => {
      for (const event of events) if (wants(event)) stream.backlog.add(event);
      this.#consider(stream);
    });
    this.#add(stream);
    return { ended, end: stream.end, begin: (opening) => this.#begin(stream, opening) };
  }

  #add(stream: Stream): void {
    this.#streams.add(stream);
    this.#stopTimers ??= this.#startTimers();
  }

  #forget(stream: Stream): void {
    this.#streams.delete(stream);
    this.#due.delete(stream);
    if (this.#streams.size) return;
    this.#stopTimers?.();
    this.#stopTimers = undefined;
  }

  #begin(stream: Stream, opening: readonly OutboxEvent[]): void {
    stream.hasBegun = true;
    this.#send(stream, opening, messages());
    this.#consider(stream);
  }

  /** Has a stream served if it has something to send and its client would take it. */
  #consider(stream: Stream): void {
    if (stream.backlog.overflowed) stream.end(tooMany());
    if (!stream.hasBegun || stream.isBlocked || stream.backlog.isEmpty) return;
    this.#due.add(stream);
    if (this.#isDelivering) return;
    this.#isDelivering = true;
    // Not before all streams have been handed the events that this one has.
    queueMicrotask(() => void this.#deliver());
  }

  async #deliver(): Promise<void> {
    while (this.#due.size) await this.#round();
    this.#isDelivering = false;
  }

  async #round(): Promise<void> {
    const batch = [...this.#due].map((stream) => ({ stream, events: stream.backlog.take() }));
    this.#due.clear();
    const audience = await this.#audience(batch);
    if (!audience) {
      for (const { stream, events } of batch) stream.backlog.restore(events);
      await delay(RETRY_MS, undefined, { ref: false });
      for (const { stream } of batch) if (this.#streams.has(stream)) this.#consider(stream);
      return;
    }
    const messageOf = messages();
    let sliceEnd = performance.now() + SLICE_MS;
    for (const { stream, events } of batch) {
      if (this.#streams.has(stream)) {
        const visible = events.filter((event) => audience(stream.caller, event));
        this.#send(stream, visible, messageOf);
      }
      if (performance.now() < sliceEnd) continue;
      await nextTurn();
      sliceEnd = performance.now() + SLICE_MS;
    }
  }

  /** Undefined if the database does not answer. */
  async #audience(batch: readonly { stream: Stream; events: OutboxEvent[] }[]): Promise<Audience | undefined> {
    const callers = batch.map(({ stream }) => stream.caller);
    const events = new Map(batch.flatMap((each) => each.events).map((event) => [resourceKey(event), event]));
    try {
      return await audienceOf(this.#app.db.list, callers, [...events.values()]);
    } catch (error) {
      this.#app.log.error({ err: error }, "events wait because the database does not say who may see them");
      return undefined;
    }
  }

  #send(stream: Stream, events: readonly OutboxEvent[], messageOf: (event: OutboxEvent) => WatchEventsResponse): void {
    const { outlet, backlog } = stream;
    for (let from = 0; from < events.length; from += EVENTS_AT_ONCE) {
      if (outlet.isFull) {
        backlog.restore(events.slice(from));
        break;
      }
      outlet.send(events.slice(from, from + EVENTS_AT_ONCE).map(messageOf));
      stream.quietSince = performance.now();
    }
    if (!outlet.isFull || stream.isBlocked) return;
    stream.isBlocked = true;
    void outlet.drained().then(() => {
      stream.isBlocked = false;
      if (this.#streams.has(stream)) this.#consider(stream);
    });
  }

  #startTimers(): () => void {
    const { draining, limits } = this.#app;
    const stop = new AbortController();
    const onDraining = () => this.#endAll(new Refusal("unavailable", "the server is shutting down"));
    draining.addEventListener("abort", onDraining, { once: true, signal: stop.signal });
    if (draining.aborted) queueMicrotask(onDraining);
    const every = async (ms: number, work: () => void | Promise<void>) => {
      while (!stop.signal.aborted) {
        await delay(ms, undefined, { signal: stop.signal, ref: false }).catch(() => undefined);
        if (!stop.signal.aborted) await work();
      }
    };
    void every(limits.eventHeartbeatMs / LOOKS_PER_HEARTBEAT, () => this.#showLife());
    void every(limits.credentialCheckMs, () => this.#check());
    return () => stop.abort();
  }

  #showLife(): void {
    const quietSince = performance.now() - this.#app.limits.eventHeartbeatMs;
    for (const stream of this.#streams) {
      if (!stream.hasBegun || stream.isBlocked || stream.quietSince > quietSince) continue;
      stream.outlet.send([SIGN_OF_LIFE]);
      stream.quietSince = performance.now();
    }
  }

  /** Ends streams whose credential opens nothing any more, and lets the others have the roles of this moment. */
  async #check(): Promise<void> {
    const streams = [...this.#streams];
    for (let from = 0; from < streams.length; from += CALLERS_AT_ONCE) {
      const some = streams.slice(from, from + CALLERS_AT_ONCE);
      const now = await this.#refreshed(some.map((stream) => stream.caller));
      for (const stream of some) {
        const caller = now?.get(stream.caller.tokenId);
        if (caller) stream.caller = caller;
        else if (now) stream.end(new Refusal("unauthenticated", "the token is no longer valid"));
        else stream.end(new Refusal("unavailable", "the token cannot be checked: reconnect"));
      }
    }
  }

  /** Undefined if the database does not answer, also when asked again. */
  async #refreshed(callers: readonly Caller[]): Promise<ReadonlyMap<string, Caller> | undefined> {
    const refresh = () => refreshCallers(this.#app.db.list, callers, this.#app.now());
    try {
      return await refresh().catch(() => delay(RETRY_MS).then(refresh));
    } catch (error) {
      this.#app.log.error({ err: error }, "streams end because their credentials could not be checked");
      return undefined;
    }
  }

  #endAll(reason: Refusal): void {
    for (const stream of [...this.#streams]) stream.end(reason);
  }
}

/** Messages for events, one for all streams that are told the same. */
function messages(): (event: OutboxEvent) => WatchEventsResponse {
  const known = new Map<string, WatchEventsResponse>();
  return (event) => {
    const { operation, resourceType, resourceId } = event;
    const key = `${operation} ${resourceKey(event)}`;
    const found = known.get(key) ?? create(WatchEventsResponseSchema, { operation, resourceType, resourceId });
    known.set(key, found);
    return found;
  };
}
