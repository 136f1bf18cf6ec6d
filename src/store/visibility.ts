import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type OutboxEvent, PARTS_OF_ENVIRONMENT, resourceKey } from "../domain/event.ts";
import type { Caller } from "../domain/principal.ts";
import type { Sql } from "./db.ts";
import { isStored, type Readers, readersOf } from "./readers.ts";

// Who may learn of an event: whoever could get the resource at that moment, or for one that is gone just before.

/** Types that every member of the organization may read. */
const OPEN_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.ORGANIZATION,
  ResourceType.ORGANIZATION_POLICY,
  ResourceType.ORGANIZATION_SECRET,
  ResourceType.ANNOUNCEMENT_BANNER,
  ResourceType.CUSTOM_DOMAIN,
  ResourceType.USER,
  ResourceType.GROUP,
  ResourceType.GROUP_MEMBERSHIP_CHANGED,
  ResourceType.SERVICE_ACCOUNT,
]);

/** Types that concern their owner alone, who is the creator in the event. */
const PERSONAL_TYPES: ReadonlySet<ResourceType> = new Set([
  ResourceType.PERSONAL_ACCESS_TOKEN,
  ResourceType.USER_PREFERENCE,
  ResourceType.USER_SECRET,
  ResourceType.HOST_AUTHENTICATION_TOKEN,
]);

type Resource = Pick<OutboxEvent, "resourceType" | "resourceId" | "environmentId">;

/** The resource whose readers are those of an event's resource. */
function guardian(event: Resource): { resourceType: ResourceType; resourceId: string } {
  if (!PARTS_OF_ENVIRONMENT.has(event.resourceType)) return event;
  return { resourceType: ResourceType.ENVIRONMENT, resourceId: event.environmentId ?? event.resourceId };
}

/** Whether a role on the organization lets the caller read all of a kind of resource. */
function readsAll(caller: Caller, kind: ResourceType): boolean {
  switch (kind) {
    case ResourceType.ENVIRONMENT:
      return caller.environmentsReader;
    case ResourceType.RUNNER:
      return caller.runnersAdmin;
    case ResourceType.PROJECT:
      return caller.projectsAdmin;
    case ResourceType.GROUP:
      return caller.groupsAdmin;
    default:
      return false;
  }
}

/** The kind of resource whose readers by a role on the organization are those of what is gone. */
const KINDS: Partial<Record<ResourceType, ResourceType>> = {
  [ResourceType.ENVIRONMENT_CLASS]: ResourceType.RUNNER,
  [ResourceType.RUNNER_SCM_INTEGRATION]: ResourceType.RUNNER,
  [ResourceType.PROJECT_ENVIRONMENT_CLASS]: ResourceType.PROJECT,
  [ResourceType.SECRET]: ResourceType.PROJECT,
};

function couldRead(caller: Caller, event: OutboxEvent): boolean {
  const { resourceType } = guardian(event);
  if (caller.orgAdmin || readsAll(caller, KINDS[resourceType] ?? resourceType)) return true;
  return event.readers?.has(caller.id) === true || event.readers?.has(caller.organizationId) === true;
}

type Find = (caller: Caller, resource: Resource) => Readers | undefined;

/** Members of groups, among some callers. */
type Members = ReadonlyMap<string, ReadonlySet<string>>;

async function membersOf(sql: Sql, groups: readonly string[], callers: readonly Caller[]): Promise<Members> {
  if (!groups.length) return new Map();
  const ids = [...new Set(callers.map((caller) => caller.id))];
  const rows = await sql<{ group_id: string; members: string[] }[]>`
    select group_id, array_agg(member_id) as members from group_members
    where group_id = any(${groups as string[]}) and member_id = any(${ids}) group by group_id`;
  return new Map(rows.map((row) => [row.group_id, new Set(row.members)]));
}

function reads(caller: Caller, type: ResourceType, readers: Readers, members: Members): boolean {
  if (readers.organizationId !== caller.organizationId) return false;
  if (caller.principal === Principal.ENVIRONMENT) return readers.id === caller.id;
  if (readers.owners.includes(caller.id)) return true;
  if (PERSONAL_TYPES.has(type)) return false;
  if (readers.open || caller.orgAdmin || readers.kinds.some((kind) => readsAll(caller, kind))) return true;
  return readers.groups.some((id) => members.get(id)?.has(caller.id));
}

/**
 * Asks once for all these callers which of these resources they may read. The answer gives the readers of one that exists
 * and that the caller may read.
 */
export async function readableBy(sql: Sql, callers: readonly Caller[], resources: readonly Resource[]): Promise<Find> {
  const found = await readersOf(sql, resources.map(guardian));
  const members = await membersOf(sql, [...new Set(found.flatMap((each) => each.groups))], callers);
  const byKey = new Map(found.map((each) => [resourceKey({ ...each, resourceId: each.id }), each]));
  return (caller, resource) => {
    const readers = byKey.get(resourceKey(guardian(resource)));
    return readers && reads(caller, resource.resourceType, readers, members) ? readers : undefined;
  };
}

/** Whether a caller, of the event's organization, may learn of an event. */
export type Audience = (caller: Caller, event: OutboxEvent) => boolean;

/** Asks once for all these callers who may learn of which of these events. */
export async function audienceOf(
  sql: Sql,
  callers: readonly Caller[],
  events: readonly OutboxEvent[],
): Promise<Audience> {
  const isAsked = ({ resourceType }: OutboxEvent) => !OPEN_TYPES.has(resourceType) && !PERSONAL_TYPES.has(resourceType);
  const find = await readableBy(sql, callers, events.filter(isAsked));
  return (caller, event) => {
    if (PERSONAL_TYPES.has(event.resourceType)) return event.creatorId === caller.id;
    if (OPEN_TYPES.has(event.resourceType) || find(caller, event)) return true;
    if (event.operation === ResourceOperation.DELETE) return couldRead(caller, event);
    return caller.orgAdmin && !isStored(guardian(event).resourceType);
  };
}

/** Deletions of the last day among these resources: who could read what is gone, by resource. */
async function deletionsOf(sql: Sql, organizationId: string, resources: readonly Resource[]) {
  if (!resources.length) return new Map<string, OutboxEvent>();
  // The operation is a literal, as in the index: with a parameter the planner could not use it.
  const rows = await sql<
    (Pick<OutboxEvent, "resourceType" | "resourceId" | "creatorId"> & { readers: string[] | null })[]
  >`
    select resource_id as "resourceId", resource_type as "resourceType", creator_id as "creatorId", readers from events
    where operation = 3 and resource_id = any(${resources.map((each) => each.resourceId)})
      and organization_id = ${organizationId}`;
  const operation = ResourceOperation.DELETE;
  return new Map(
    rows.map((row): [string, OutboxEvent] => [
      resourceKey(row),
      { ...row, organizationId, environmentId: null, operation, readers: row.readers && new Set(row.readers) },
    ]),
  );
}

/**
 * What a stream opens with for resources that its client named, having read them just before, when a change would have
 * been lost to it: the state of each that the caller may read, and the end of each that it could.
 */
export async function openingEvents(
  sql: Sql,
  caller: Caller,
  named: readonly Pick<OutboxEvent, "resourceType" | "resourceId">[],
): Promise<OutboxEvent[]> {
  const { organizationId } = caller;
  const resources = named.map((each) => ({ ...each, environmentId: null }));
  const find = await readableBy(sql, [caller], resources);
  const absent = resources.filter((each) => !find(caller, each));
  const deletions = await deletionsOf(sql, organizationId, absent);
  return resources.flatMap((each): OutboxEvent[] => {
    const found = find(caller, each);
    const common = { ...each, organizationId, readers: null };
    // Its owner stands for its creator, by whom those who may see what is personal are told.
    if (found) return [{ ...common, operation: ResourceOperation.UPDATE_STATUS, creatorId: found.owners[0] ?? null }];
    const deletion = deletions.get(resourceKey(each));
    if (!deletion) return [];
    const isPersonal = PERSONAL_TYPES.has(each.resourceType);
    const wasReadable = isPersonal ? deletion.creatorId === caller.id : couldRead(caller, deletion);
    return wasReadable ? [deletion] : [];
  });
}
