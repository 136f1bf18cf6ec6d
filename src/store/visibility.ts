import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Caller } from "../domain/principal.ts";
import {
  readsClass,
  readsEnvironment,
  readsGroup,
  readsRunner,
  readsSecret,
  readsServiceAccount,
  readsUser,
} from "./access.ts";
import { readsAssignment } from "./assignment-rows.ts";
import type { Fragment, Sql } from "./db.ts";
import type { OutboxEvent } from "./hub.ts";
import { readableResources } from "./shared-resources.ts";

type Subject = Pick<
  OutboxEvent,
  "resourceType" | "resourceId" | "operation" | "environmentId" | "creatorId" | "readers"
>;

/** Parts of an environment: whoever may read it may read them. */
export const PARTS_OF_ENVIRONMENT: ReadonlySet<ResourceType> = new Set([
  ResourceType.TASK,
  ResourceType.TASK_EXECUTION,
  ResourceType.SERVICE,
]);

/** Types that every member of the organization may read. */
const OPEN_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.ORGANIZATION,
  ResourceType.USER,
  ResourceType.SERVICE_ACCOUNT,
  ResourceType.GROUP,
  ResourceType.GROUP_MEMBERSHIP_CHANGED,
  ResourceType.ORGANIZATION_POLICY,
]);

/** Types that concern their owner alone, who is the creator in the event. */
const PERSONAL_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.PERSONAL_ACCESS_TOKEN,
  ResourceType.USER_PREFERENCE,
  ResourceType.USER_SECRET,
  ResourceType.HOST_AUTHENTICATION_TOKEN,
]);

const QUERIED_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.ENVIRONMENT,
  ResourceType.RUNNER,
  ResourceType.ENVIRONMENT_CLASS,
  ResourceType.ROLE_ASSIGNMENT,
  ResourceType.ROLE_ASSIGNMENT_CHANGED,
  ResourceType.SECRET,
  ResourceType.ORGANIZATION_SECRET,
  ResourceType.SERVICE_ACCOUNT_SECRET,
]);

/** Types of which the runner admins of the organization may read all. */
const RUNNER_TYPES: ReadonlySet<ResourceType> = new Set([ResourceType.RUNNER, ResourceType.ENVIRONMENT_CLASS]);

/** The resource whose readers are the readers of an event's resource. */
function guardian(event: Subject): { type: ResourceType; id: string } {
  const ofEnvironment = PARTS_OF_ENVIRONMENT.has(event.resourceType);
  return ofEnvironment
    ? { type: ResourceType.ENVIRONMENT, id: event.environmentId ?? event.resourceId }
    : { type: event.resourceType, id: event.resourceId };
}

function readable(sql: Sql, caller: Caller, type: ResourceType, ids: string[]): Fragment | undefined {
  switch (type) {
    case ResourceType.ENVIRONMENT:
      return sql`select e.id from environments e where e.id = any(${ids}) and ${readsEnvironment(sql, caller)}`;
    case ResourceType.RUNNER:
      return sql`select r.id from runners r where r.id = any(${ids}) and ${readsRunner(sql, caller)}`;
    case ResourceType.ENVIRONMENT_CLASS:
      return sql`select c.id from environment_classes c join runners r on r.id = c.runner_id
        where c.id = any(${ids}) and ${readsClass(sql, caller)}`;
    case ResourceType.GROUP:
    case ResourceType.GROUP_MEMBERSHIP_CHANGED:
      return sql`select g.id from groups g where g.id = any(${ids}) and ${readsGroup(sql, caller)}`;
    case ResourceType.USER:
      return sql`select u.id from users u where u.id = any(${ids}) and ${readsUser(sql, caller)}`;
    case ResourceType.SERVICE_ACCOUNT:
      return sql`select s.id from service_accounts s where s.id = any(${ids}) and ${readsServiceAccount(sql, caller)}`;
    case ResourceType.PERSONAL_ACCESS_TOKEN:
      return sql`select id from tokens where id = any(${ids}) and subject_id = ${caller.id}`;
    case ResourceType.USER_PREFERENCE:
      return sql`select id from user_preferences where id = any(${ids}) and user_id = ${caller.id}`;
    case ResourceType.ROLE_ASSIGNMENT:
      return sql`select a.id from role_assignments a where a.id = any(${ids}) and ${readsAssignment(sql, caller)}`;
    case ResourceType.ROLE_ASSIGNMENT_CHANGED:
      return sql`select id from (${readableResources(sql, caller, ids)}) resources`;
    case ResourceType.SECRET:
    case ResourceType.USER_SECRET:
    case ResourceType.ORGANIZATION_SECRET:
    case ResourceType.SERVICE_ACCOUNT_SECRET:
      return sql`select s.id from secrets s where s.id = any(${ids}) and ${readsSecret(sql, caller)}`;
    default:
      return undefined;
  }
}

/** Ids of those resources that exist and that the caller may read; only types that have a table of their own count. */
async function readableIds(sql: Sql, caller: Caller, events: readonly Subject[]): Promise<Set<string>> {
  const readableIds = new Set<string>();
  for (const [type, group] of Map.groupBy(events.map(guardian), (each) => each.type)) {
    const query = readable(sql, caller, type, [...new Set(group.map((each) => each.id))]);
    if (!query) continue;
    for (const { id } of await sql<{ id: string }[]>`${query}`) readableIds.add(id);
  }
  return readableIds;
}

function couldRead(caller: Caller, event: Subject): boolean {
  const byRole = caller.orgAdmin || (caller.runnersAdmin && RUNNER_TYPES.has(event.resourceType));
  // The id of the organization stands for all its members.
  const readers = event.readers ?? [];
  return byRole || readers.includes(caller.id) || readers.includes(caller.organizationId);
}

/** Those of these events, all of the caller's organization, that it may learn about at this moment. */
export async function visibleEvents<E extends Subject>(sql: Sql, caller: Caller, events: readonly E[]): Promise<E[]> {
  const ids = await readableIds(sql, caller, events);
  return events.filter((event) => {
    if (PERSONAL_TYPES.has(event.resourceType)) return event.creatorId === caller.id;
    if (ids.has(guardian(event).id) || OPEN_TYPES.has(event.resourceType)) return true;
    if (event.operation === ResourceOperation.DELETE) return couldRead(caller, event);
    return caller.orgAdmin && !QUERIED_TYPES.has(guardian(event).type);
  });
}

/** What a stream opens with for resources that its client named: their state may have changed since it read them. */
export async function openingEvents<E extends Subject>(sql: Sql, caller: Caller, named: readonly E[]): Promise<E[]> {
  const ids = await readableIds(sql, caller, named);
  const absent = named.filter((event) => !ids.has(event.resourceId)).map((event) => event.resourceId);
  // The operation is a literal, as in the index: with a parameter the planner could not use it.
  const gone = absent.length
    ? await sql<{ resource_id: string; resource_type: ResourceType; readers: string[] | null }[]>`
        select resource_id, resource_type, readers from events
        where operation = 3 and resource_id = any(${absent}) and organization_id = ${caller.organizationId}`
    : [];
  const deletions = new Map(gone.map((row) => [row.resource_id, row]));
  return named.flatMap((event) => {
    if (ids.has(event.resourceId)) return [event];
    const deletion = deletions.get(event.resourceId);
    if (deletion?.resource_type !== event.resourceType) return [];
    const deleted = { ...event, operation: ResourceOperation.DELETE, readers: deletion.readers };
    return couldRead(caller, deleted) ? [deleted] : [];
  });
}
