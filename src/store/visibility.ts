import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Caller } from "../domain/principal.ts";
import { readsEnvironment, readsRunner } from "./access.ts";
import type { Fragment, Sql } from "./db.ts";
import type { OutboxEvent } from "./hub.ts";

type Subject = Pick<OutboxEvent, "resourceType" | "resourceId" | "operation" | "readers">;

/** Types that every member of the organization may read. */
const OPEN_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.ORGANIZATION,
  ResourceType.USER,
  ResourceType.GROUP,
  ResourceType.GROUP_MEMBERSHIP_CHANGED,
  ResourceType.ORGANIZATION_POLICY,
]);

const QUERIED_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.ENVIRONMENT,
  ResourceType.RUNNER,
  ResourceType.ENVIRONMENT_CLASS,
]);

function readable(sql: Sql, caller: Caller, type: ResourceType, ids: string[]): Fragment | undefined {
  switch (type) {
    case ResourceType.ENVIRONMENT:
      return sql`select e.id from environments e where e.id = any(${ids}) and ${readsEnvironment(sql, caller)}`;
    case ResourceType.RUNNER:
      return sql`select r.id from runners r where r.id = any(${ids}) and ${readsRunner(sql, caller)}`;
    case ResourceType.ENVIRONMENT_CLASS:
      return sql`select c.id from environment_classes c join runners r on r.id = c.runner_id
        where c.id = any(${ids}) and ${readsRunner(sql, caller)}`;
    default:
      return undefined;
  }
}

/** Ids of those resources that exist and that the caller may read; only types that have a table of their own count. */
async function readableIds(sql: Sql, caller: Caller, events: readonly Subject[]): Promise<Set<string>> {
  const readableIds = new Set<string>();
  for (const [type, group] of Map.groupBy(events, (event) => event.resourceType)) {
    const query = readable(sql, caller, type, [...new Set(group.map((event) => event.resourceId))]);
    if (!query) continue;
    for (const { id } of await sql<{ id: string }[]>`${query}`) readableIds.add(id);
  }
  return readableIds;
}

/** Those of these events, all of the caller's organization, that it may learn about at this moment. */
export async function visibleEvents<E extends Subject>(sql: Sql, caller: Caller, events: readonly E[]): Promise<E[]> {
  const ids = await readableIds(sql, caller, events);
  return events.filter((event) => {
    if (ids.has(event.resourceId) || OPEN_TYPES.has(event.resourceType)) return true;
    if (event.operation === ResourceOperation.DELETE) return caller.orgAdmin || event.readers?.includes(caller.id);
    return caller.orgAdmin && !QUERIED_TYPES.has(event.resourceType);
  });
}

/** What a stream opens with for resources that its client named: their state may have changed since it read them. */
export async function openingEvents<E extends Subject>(sql: Sql, caller: Caller, named: readonly E[]): Promise<E[]> {
  const ids = await readableIds(sql, caller, named);
  const absent = named.filter((event) => !ids.has(event.resourceId)).map((event) => event.resourceId);
  const gone = absent.length
    ? await sql<{ resource_id: string }[]>`
        select resource_id from events where operation = ${ResourceOperation.DELETE} and resource_id = any(${absent})
          and organization_id = ${caller.organizationId} and (${caller.orgAdmin} or ${caller.id} = any(readers))`
    : [];
  const deleted = new Set(gone.map((row) => row.resource_id));
  return named.flatMap((event) => {
    if (ids.has(event.resourceId)) return [event];
    return deleted.has(event.resourceId) ? [{ ...event, operation: ResourceOperation.DELETE }] : [];
  });
}
