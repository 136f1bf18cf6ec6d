import { create } from "@bufbuild/protobuf";
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import {
  type EventService,
  type WatchEventsRequest_ResourceTypeFilter as Filter,
  ResourceOperation,
  ResourceType,
  type WatchEventsRequest,
  type WatchEventsResponse,
  WatchEventsResponseSchema,
} from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type App, pacer } from "../app.ts";
import { denied, invalid, notFound, Refusal } from "../domain/errors.ts";
import { isUuid } from "../domain/ids.ts";
import type { Caller } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import { streamOpened } from "../rpc/call.ts";
import { getEnvironment } from "../store/environments.ts";
import { Latch, type OutboxEvent } from "../store/hub.ts";
import { refreshCaller } from "../store/tokens.ts";
import { openingEvents, PARTS_OF_ENVIRONMENT, visibleEvents } from "../store/visibility.ts";
import { auditLog } from "./event/audit-log.ts";

const { CREATE, UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;

/** DELETE absorbs everything, CREATE and UPDATE absorb status changes: the newest picture is what counts. */
const WEIGHT: Partial<Record<ResourceOperation, number>> = {
  [UPDATE_STATUS]: 1,
  [UPDATE]: 2,
  [CREATE]: 3,
  [DELETE]: 4,
};

function merged(before: OutboxEvent, event: OutboxEvent): OutboxEvent {
  const isHeavier = (WEIGHT[before.operation] ?? 0) > (WEIGHT[event.operation] ?? 0);
  return {
    ...event,
    operation: isHeavier ? before.operation : event.operation,
    readers: event.readers ?? before.readers,
  };
}

/** A filter of the request in the spelling of the events. */
interface Passage {
  resourceType: ResourceType;
  resourceIds: ReadonlySet<string>;
  creatorIds: ReadonlySet<string>;
}

const lowerCase = (ids: readonly string[]) => new Set(ids.map((id) => id.toLowerCase()));

const passageOf = ({ resourceType, resourceIds, creatorIds }: Filter): Passage => ({
  resourceType,
  resourceIds: lowerCase(resourceIds),
  creatorIds: lowerCase(creatorIds),
});

function passes({ resourceType, resourceIds, creatorIds }: Passage, event: OutboxEvent): boolean {
  if (resourceType !== event.resourceType) return false;
  if (resourceIds.size && !resourceIds.has(event.resourceId)) return false;
  if (!creatorIds.size || event.operation === DELETE) return true;
  return event.creatorId !== null && creatorIds.has(event.creatorId);
}

/** Whether a stream is about an event at all; whether its caller may see it is asked when it is delivered. */
function selector(
  caller: Caller,
  request: WatchEventsRequest,
  environmentId: string | undefined,
): (event: OutboxEvent) => boolean {
  if (environmentId) {
    return (event) =>
      event.resourceId === environmentId ||
      (event.environmentId === environmentId && PARTS_OF_ENVIRONMENT.has(event.resourceType));
  }
  const filters = request.resourceTypeFilters.map(passageOf);
  return (event) =>
    event.organizationId === caller.organizationId &&
    !PARTS_OF_ENVIRONMENT.has(event.resourceType) &&
    (!filters.length || filters.some((filter) => passes(filter, event)));
}

/** Changes that a stream has not sent yet, at most one per resource. */
class Backlog {
  readonly news = new Latch();
  readonly #events = new Map<string, OutboxEvent>();
  readonly #limit: number;
  /** More resources changed than may wait; nothing is kept any more. */
  overflowed = false;

  constructor(limit: number) {
    this.#limit = limit;
  }

  add(event: OutboxEvent): void {
    if (this.overflowed) return;
    const key = `${event.resourceType} ${event.resourceId}`;
    const before = this.#events.get(key);
    // Moved to the end, so that a resource's place is that of its newest change.
    this.#events.delete(key);
    this.#events.set(key, before ? merged(before, event) : event);
    this.overflowed = this.#events.size > this.#limit;
    if (this.overflowed) this.#events.clear();
    this.news.wake();
  }

  take(): OutboxEvent[] {
    const events = [...this.#events.values()];
    this.#events.clear();
    return events;
  }
}

const message = (event: Pick<OutboxEvent, "operation" | "resourceType" | "resourceId">): WatchEventsResponse =>
  create(WatchEventsResponseSchema, {
    operation: event.operation,
    resourceType: event.resourceType,
    resourceId: event.resourceId,
  });

/**
 * Resources that a client named: it has read them just before, and a change between the read and this stream would be
 * lost to it. They open the stream.
 */
function named(request: WatchEventsRequest, environmentId: string | undefined): OutboxEvent[] {
  const opening = (resourceType: ResourceType, resourceId: string): OutboxEvent => ({
    organizationId: "",
    environmentId: null,
    resourceType,
    resourceId,
    operation: UPDATE_STATUS,
    creatorId: null,
    readers: null,
  });
  if (environmentId) return [opening(ResourceType.ENVIRONMENT, environmentId)];
  const events = request.resourceTypeFilters.flatMap(({ resourceType, resourceIds }) =>
    [...lowerCase(resourceIds)].map((id) => opening(resourceType, id)),
  );
  return [...new Map(events.map((event) => [`${event.resourceType} ${event.resourceId}`, event])).values()];
}

async function scopeOf(app: App, caller: Caller, request: WatchEventsRequest): Promise<string | undefined> {
  const environmentId = request.scope.case === "environmentId" ? request.scope.value : undefined;
  if (environmentId === undefined) {
    if (caller.principal === Principal.ENVIRONMENT) throw denied("an environment may only watch itself");
    return undefined;
  }
  if (request.resourceTypeFilters.length) {
    throw invalid({ field: "resource_type_filters", message: "cannot be combined with the scope of an environment" });
  }
  if (!isUuid(environmentId)) throw notFound("environment", environmentId);
  return (await getEnvironment(app.db.point, caller, environmentId)).id;
}

async function* watch(
  app: App,
  opener: Caller,
  request: WatchEventsRequest,
  context: HandlerContext,
): AsyncGenerator<WatchEventsResponse> {
  const { signal } = context;
  let caller = opener;
  const environmentId = await scopeOf(app, caller, request);
  const wanted = selector(caller, request, environmentId);
  const backlog = new Backlog(app.limits.pendingEvents);
  const leave = await app.hub.subscribe((events) => {
    for (const event of events) if (wanted(event)) backlog.add(event);
  });
  try {
    streamOpened(context);
    for (const event of await openingEvents(app.db.list, caller, named(request, environmentId))) yield message(event);
    const heartbeat = pacer(app.limits.eventHeartbeatMs);
    const check = pacer(app.limits.credentialCheckMs);
    while (!signal.aborted) {
      if (app.draining.aborted) throw new Refusal("unavailable", "the server is shutting down");
      if (backlog.overflowed)
        throw new Refusal("unavailable", "too many changes are waiting: read again and reconnect");
      if (check.isDue()) caller = await stillValid(app, caller);
      for (const event of await visibleEvents(app.db.list, caller, backlog.take())) {
        yield message(event);
        heartbeat.restart();
      }
      if (heartbeat.isDue()) yield create(WatchEventsResponseSchema);
      await backlog.news.wait(Math.min(heartbeat.leftMs(), check.leftMs()), signal, app.draining);
    }
  } finally {
    leave();
  }
}

/** The caller with the roles that it has now; UNAUTHENTICATED once its token opens nothing any more. */
async function stillValid(app: App, caller: Caller): Promise<Caller> {
  const now = await refreshCaller(app.db.point, caller, app.now());
  if (!now) throw new Refusal("unauthenticated", "the token is no longer valid");
  return now;
}

/** EventService. */
export function eventService(app: App): ServiceImpl<typeof EventService> {
  const { streamsPerPrincipal } = app.limits;
  const streams = new Map<string, number>();
  const count = (id: string, by: number) => {
    const next = (streams.get(id) ?? 0) + by;
    if (next) streams.set(id, next);
    else streams.delete(id);
    return next;
  };
  return {
    ...auditLog(app),
    async *watchEvents(request, context) {
      const caller = principal(context);
      try {
        if (count(caller.id, 1) > streamsPerPrincipal) {
          throw new Refusal("resource_exhausted", `at most ${streamsPerPrincipal} streams may be open at once`);
        }
        yield* watch(app, caller, request, context);
      } finally {
        count(caller.id, -1);
      }
    },
  };
}
