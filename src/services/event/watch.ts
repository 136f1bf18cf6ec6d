import type { Message } from "@bufbuild/protobuf";
import type { HandlerContext } from "@connectrpc/connect";
import { ResourceType, type WatchEventsRequest, type WatchEventsResponse } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../../app.ts";
import { denied, invalid, notFound } from "../../domain/errors.ts";
import { namedResources, ofEnvironment, ofOrganization, type Selection } from "../../domain/event.ts";
import type { Caller } from "../../domain/principal.ts";
import { type Outlet, outletOf, streamOpened } from "../../rpc/call.ts";
import { getEnvironment } from "../../store/environments.ts";
import { Latch } from "../../store/hub.ts";
import { openingEvents } from "../../store/visibility.ts";
import type { Dispatcher } from "./dispatcher.ts";

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const QUEUED_MESSAGES = 100;
const LONG_MS = 60_000;

/** What a stream is about, and what its client has named: it is told at once how that is now. */
interface Scope {
  wants: Selection;
  named: { resourceType: ResourceType; resourceId: string }[];
}

async function scopeOf(app: App, caller: Caller, request: WatchEventsRequest): Promise<Scope> {
  const { scope, resourceTypeFilters: filters } = request;
  if (scope.case !== "environmentId") {
    if (caller.principal === Principal.ENVIRONMENT) throw denied("an environment may only watch itself");
    return { wants: ofOrganization(caller.organizationId, filters), named: namedResources(filters) };
  }
  if (filters.length) {
    throw invalid({ field: "resource_type_filters", message: "cannot be combined with the scope of an environment" });
  }
  if (!UUID.test(scope.value)) throw notFound("environment", scope.value);
  const { id } = await getEnvironment(app.db.point, caller, scope.value);
  return { wants: ofEnvironment(id), named: [{ resourceType: ResourceType.ENVIRONMENT, resourceId: id }] };
}

/** An outlet for protocols in which only the handler of a stream can send: it passes on what was put here. */
class Queue implements Outlet {
  readonly #news = new Latch();
  readonly #space = new Latch();
  #messages: Message[] = [];

  get isFull(): boolean {
    return this.#messages.length >= QUEUED_MESSAGES;
  }

  send(messages: readonly Message[]): void {
    this.#messages.push(...messages);
    this.#news.wake();
  }

  async drained(): Promise<void> {
    while (this.isFull) await this.#space.wait(LONG_MS);
  }

  async *messages(ended: Promise<never>): AsyncGenerator<Message> {
    let end: { reason: unknown } | undefined;
    ended.catch((reason: unknown) => {
      end = { reason };
      this.#news.wake();
    });
    while (!end) {
      const messages = this.#messages;
      this.#messages = [];
      this.#space.wake();
      yield* messages;
      await this.#news.wait(LONG_MS);
    }
    throw end.reason;
  }
}

/** WatchEvents: what the dispatcher sends to this stream, until one of them ends it. */
export async function* watch(
  app: App,
  dispatcher: Dispatcher,
  caller: Caller,
  request: WatchEventsRequest,
  context: HandlerContext,
): AsyncGenerator<WatchEventsResponse> {
  const { signal } = context;
  const { wants, named } = await scopeOf(app, caller, request);
  const outlet = outletOf(context);
  const queue = new Queue();
  const watching = await dispatcher.open(caller, wants, outlet ?? queue);
  const onAbort = () => watching.end(signal.reason);
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    streamOpened(context);
    watching.begin(await openingEvents(app.db.list, caller, named));
    if (signal.aborted) onAbort();
    if (outlet) await watching.ended;
    else yield* queue.messages(watching.ended) as AsyncGenerator<WatchEventsResponse>;
  } finally {
    signal.removeEventListener("abort", onAbort);
    watching.end(signal.reason);
  }
}
