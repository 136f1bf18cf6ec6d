import {
  type WatchEventsRequest_ResourceTypeFilter as Filter,
  ResourceOperation,
  ResourceType,
} from "../../gen/gitpod/v1/event_pb.js";

const { CREATE, UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;

/** A change of a resource, as it was committed. */
export interface OutboxEvent {
  organizationId: string;
  environmentId: string | null;
  resourceType: ResourceType;
  resourceId: string;
  operation: ResourceOperation;
  creatorId: string | null;
  /** Who could read the resource before it was deleted: principals, or the organization for all of its members. */
  readers: ReadonlySet<string> | null;
}

/** Parts of an environment: whoever may read it may read them, and only streams about it tell of them. */
export const PARTS_OF_ENVIRONMENT: ReadonlySet<ResourceType> = new Set([
  ResourceType.TASK,
  ResourceType.TASK_EXECUTION,
  ResourceType.SERVICE,
]);

/** What a stream is about; who may see it is another matter. */
export type Selection = (event: OutboxEvent) => boolean;

const lowerCase = (ids: readonly string[]) => new Set(ids.map((id) => id.toLowerCase()));

function passage({ resourceType, resourceIds, creatorIds }: Filter): Selection {
  const [resources, creators] = [lowerCase(resourceIds), lowerCase(creatorIds)];
  return (event) => {
    if (event.resourceType !== resourceType) return false;
    if (resources.size && !resources.has(event.resourceId)) return false;
    if (!creators.size || event.operation === DELETE) return true;
    return event.creatorId !== null && creators.has(event.creatorId);
  };
}

/** Everything about an environment, its parts included. */
export const ofEnvironment =
  (environmentId: string): Selection =>
  (event) =>
    event.resourceId === environmentId ||
    (event.environmentId === environmentId && PARTS_OF_ENVIRONMENT.has(event.resourceType));

/** What passes any of the filters, or everything without any, of an organization, but for the parts of environments. */
export function ofOrganization(organizationId: string, filters: readonly Filter[]): Selection {
  const passages = filters.map(passage);
  return (event) =>
    event.organizationId === organizationId &&
    !PARTS_OF_ENVIRONMENT.has(event.resourceType) &&
    (!passages.length || passages.some((passes) => passes(event)));
}

/** Resources that filters name, each once. */
export function namedResources(filters: readonly Filter[]): { resourceType: ResourceType; resourceId: string }[] {
  const all = filters.flatMap(({ resourceType, resourceIds }) =>
    [...lowerCase(resourceIds)].map((resourceId) => ({ resourceType, resourceId })),
  );
  return [...new Map(all.map((each) => [resourceKey(each), each])).values()];
}

/** Names a resource among others; ids of different types may be equal, as those of a project and of its classes. */
export const resourceKey = ({ resourceType, resourceId }: Pick<OutboxEvent, "resourceType" | "resourceId">) =>
  `${resourceType} ${resourceId}`;

// DELETE absorbs everything, CREATE and UPDATE absorb status changes: the newest picture is what counts.
const WEIGHT: Partial<Record<ResourceOperation, number>> = {
  [UPDATE_STATUS]: 1,
  [UPDATE]: 2,
  [CREATE]: 3,
  [DELETE]: 4,
};

/** One event in the place of two of the same resource. */
function merged(before: OutboxEvent, event: OutboxEvent): OutboxEvent {
  const isHeavier = (WEIGHT[before.operation] ?? 0) > (WEIGHT[event.operation] ?? 0);
  return {
    ...event,
    operation: isHeavier ? before.operation : event.operation,
    readers: event.readers ?? before.readers,
  };
}

/** Changes that wait for one stream, at most one per resource, the oldest first. */
export class Backlog {
  readonly #limit: number;
  #events = new Map<string, OutboxEvent>();
  /** More resources changed than may wait; nothing is kept any more. */
  overflowed = false;

  constructor(limit: number) {
    this.#limit = limit;
  }

  get isEmpty(): boolean {
    return this.#events.size === 0;
  }

  add(event: OutboxEvent): void {
    if (this.overflowed) return;
    const key = resourceKey(event);
    const before = this.#events.get(key);
    // Moved to the end, so that a resource's place is that of its newest change.
    if (before) this.#events.delete(key);
    this.#events.set(key, before ? merged(before, event) : event);
    this.overflowed = this.#events.size > this.#limit;
    if (this.overflowed) this.#events.clear();
  }

  take(): OutboxEvent[] {
    const events = [...this.#events.values()];
    this.#events.clear();
    return events;
  }

  /** Puts what was taken and not sent back, before everything that has come since. */
  restore(events: readonly OutboxEvent[]): void {
    const newer = this.take();
    for (const event of [...events, ...newer]) this.add(event);
  }
}
