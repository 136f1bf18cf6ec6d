import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import {
  EventService,
  type WatchEventsRequest_ResourceTypeFilter as Filter,
  ResourceOperation,
  ResourceType,
  type WatchEventsRequest,
  type WatchEventsResponse,
  WatchEventsResponseSchema,
} from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../app.ts";
import { denied, invalid, notFound, Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { withPending } from "../pending.ts";
import { principal } from "../rpc/authenticate.ts";
import { getEnvironment } from "../store/environments.ts";
import type { OutboxEvent } from "../store/hub.ts";
import { isTokenAlive } from "../store/tokens.ts";
import { openingEvents, visibleEvents } from "../store/visibility.ts";

const HEARTBEAT_MS = 20_000;
const CREDENTIAL_CHECK_MS = 4_000;
const MAX_PENDING = 10_000;
const MAX_STREAMS_PER_PRINCIPAL = 50;

const OF_ENVIRONMENTS: ReadonlySet<ResourceType> = new Set([
  ResourceType.TASK,
  ResourceType.TASK_EXECUTION,
  ResourceType.SERVICE,
]);
const { CREATE, UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;

/** DELETE absorbs everything, CREATE and UPDATE absorb status changes: the newest picture is what counts. */
const WEIGHT: Partial<Record<ResourceOperation, number>> = {
  [UPDATE_STATUS]: 1,
  [UPDATE]: 2,
  [CREATE]: 3,
  [DELETE]: 4,
};
const heavier = (left: ResourceOperation, right: ResourceOperation) =>
  (WEIGHT[left] ?? 0) > (WEIGHT[right] ?? 0) ? left : right;

function passes(filter: Filter, event: OutboxEvent): boolean {
  if (filter.resourceType !== event.resourceType) return false;
  if (filter.resourceIds.length && !filter.resourceIds.includes(event.resourceId)) return false;
  if (!filter.creatorIds.length || event.operation === DELETE) return true;
  return event.creatorId !== null && filter.creatorIds.includes(event.creatorId);
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
      (event.environmentId === environmentId && OF_ENVIRONMENTS.has(event.resourceType));
  }
  const filters = request.resourceTypeFilters;
  return (event) =>
    event.organizationId === caller.organizationId &&
    !OF_ENVIRONMENTS.has(event.resourceType) &&
    (!filters.length || filters.some((filter) => passes(filter, event)));
}

/** Changes that a stream has not sent yet, at most one per resource. */
class Backlog {
  readonly #events = new Map<string, OutboxEvent>();
  #wake: () => void = () => undefined;
  overflowed = false;

  add(event: OutboxEvent): void {
    const key = `${event.resourceType} ${event.resourceId}`;
    const before = this.#events.get(key);
    // Moved to the end, so that a resource's place is that of its newest change.
    this.#events.delete(key);
    this.#events.set(key, before ? { ...event, operation: heavier(before.operation, event.operation) } : event);
    if (this.#events.size > MAX_PENDING) this.overflowed = true;
    this.#wake();
  }

  take(): OutboxEvent[] {
    const events = [...this.#events.values()];
    this.#events.clear();
    return events;
  }

  /** Resolves when there is something to take, when the time is over, or when the signal aborts. */
  async changed(ms: number, signal: AbortSignal): Promise<void> {
    if (this.#events.size || signal.aborted) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#wake = resolve;
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(), { once: true });
    await promise;
    clearTimeout(timer);
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
  return request.resourceTypeFilters.flatMap((filter) =>
    filter.resourceIds.map((id) => opening(filter.resourceType, id)),
  );
}

async function scopeOf(app: App, caller: Caller, request: WatchEventsRequest): Promise<string | undefined> {
  const environmentId = request.scope.case === "environmentId" ? request.scope.value : undefined;
  if (!environmentId) {
    if (caller.principal === Principal.ENVIRONMENT) throw denied("an environment may only watch itself");
    return undefined;
  }
  if (request.resourceTypeFilters.length) {
    throw invalid({ field: "resource_type_filters", message: "cannot be combined with the scope of an environment" });
  }
  if (!/^[0-9a-f-]{36}$/i.test(environmentId)) throw notFound("environment", environmentId);
  return (await getEnvironment(app.db.point, caller, environmentId)).id;
}

async function* watch(
  app: App,
  caller: Caller,
  request: WatchEventsRequest,
  signal: AbortSignal,
): AsyncGenerator<WatchEventsResponse> {
  const environmentId = await scopeOf(app, caller, request);
  const wanted = selector(caller, request, environmentId);
  const backlog = new Backlog();
  const leave = await app.hub.subscribe((events) => {
    for (const event of events) if (wanted(event)) backlog.add(event);
  });
  try {
    for (const event of await openingEvents(app.db.list, caller, named(request, environmentId))) yield message(event);
    let quietSince = Date.now();
    let checkedAt = Date.now();
    while (!signal.aborted) {
      if (app.draining.aborted) throw new Refusal("unavailable", "the server is shutting down");
      if (backlog.overflowed)
        throw new Refusal("unavailable", "too many changes are waiting: read again and reconnect");
      for (const event of await visibleEvents(app.db.list, caller, backlog.take())) {
        yield message(event);
        quietSince = Date.now();
      }
      if (Date.now() - quietSince >= HEARTBEAT_MS) {
        yield create(WatchEventsResponseSchema);
        quietSince = Date.now();
      }
      if (Date.now() - checkedAt >= CREDENTIAL_CHECK_MS) {
        if (!(await isTokenAlive(app.db.point, caller, app.now())))
          throw new Refusal("unauthenticated", "the token is no longer valid");
        checkedAt = Date.now();
      }
      await backlog.changed(CREDENTIAL_CHECK_MS, AbortSignal.any([signal, app.draining]));
    }
  } finally {
    leave();
  }
}

/** EventService, as far as it is built. */
export function eventService(app: App): ServiceImpl<typeof EventService> {
  const streams = new Map<string, number>();
  const count = (id: string, by: number) => {
    const next = (streams.get(id) ?? 0) + by;
    if (next) streams.set(id, next);
    else streams.delete(id);
    return next;
  };
  return withPending(EventService, ["listAuditLogs", "getAuditLog"], {
    async *watchEvents(request, context) {
      const caller = principal(context);
      try {
        if (count(caller.id, 1) > MAX_STREAMS_PER_PRINCIPAL) {
          throw new Refusal("resource_exhausted", `at most ${MAX_STREAMS_PER_PRINCIPAL} streams may be open at once`);
        }
        yield* watch(app, caller, request, context.signal);
      } finally {
        count(caller.id, -1);
      }
    },
  });
}
