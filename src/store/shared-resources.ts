import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { actionable, denied, notFound, precondition } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { resourceName } from "../domain/roles.ts";
import {
  administersGroup,
  administersProject,
  administersRunner,
  ownsEnvironment,
  readsEnvironment,
  readsGroup,
  readsProject,
  readsRunner,
  readsServiceAccount,
} from "./access.ts";
import { disjunction, union } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";

/** A kind of resource that roles are assigned on. */
interface Kind {
  type: ResourceType;
  /** Its table, under the alias that the conditions use, and the column of its id. */
  from(sql: Sql | Tx): Fragment;
  id(sql: Sql | Tx): Fragment;
  /** Condition: the caller may read it. */
  reads(sql: Sql | Tx, caller: Caller): Fragment;
  /** Condition: the caller may give and take roles on it. */
  assigns(sql: Sql | Tx, caller: Caller): Fragment;
  /** Why roles on it cannot be given and taken now; null if they can. */
  closed(sql: Sql | Tx): Fragment;
  /** Its creator, if that one holds ADMIN on it without an assignment. */
  creator?(sql: Sql | Tx): Fragment;
}

const whether = (sql: Sql | Tx, value: boolean) => (value ? sql`true` : sql`false`);
const never = (sql: Sql | Tx) => sql`null::text`;
const GOING = [EnvironmentPhase.DELETING, EnvironmentPhase.DELETED] as number[];

const KINDS: readonly Kind[] = [
  {
    type: ResourceType.ORGANIZATION,
    from: (sql) => sql`organizations o`,
    id: (sql) => sql`o.id`,
    reads: (sql, caller) => sql`o.id = ${caller.organizationId}`,
    assigns: (sql, caller) => whether(sql, caller.orgAdmin),
    closed: never,
  },
  {
    type: ResourceType.RUNNER,
    from: (sql) => sql`runners r`,
    id: (sql) => sql`r.id`,
    reads: readsRunner,
    assigns: administersRunner,
    closed: (sql) => sql`case
      when r.kind = ${RunnerKind.LOCAL_CONFIGURATION} then 'the local configuration runner is open to every member as it is'
      when r.phase = ${RunnerPhase.DELETING} then 'the runner is being deleted' end`,
    creator: (sql) => sql`r.creator_id`,
  },
  {
    type: ResourceType.PROJECT,
    from: (sql) => sql`projects p`,
    id: (sql) => sql`p.id`,
    reads: readsProject,
    assigns: administersProject,
    closed: (sql) => sql`case when p.deleting_at is not null then 'the project is being deleted' end`,
    creator: (sql) => sql`p.creator_id`,
  },
  {
    type: ResourceType.ENVIRONMENT,
    from: (sql) => sql`environments e`,
    id: (sql) => sql`e.id`,
    reads: readsEnvironment,
    assigns: ownsEnvironment,
    closed: (sql) => sql`case when e.phase = any(${GOING}) then 'the environment is being deleted' end`,
    creator: (sql) => sql`e.creator_id`,
  },
  {
    type: ResourceType.GROUP,
    from: (sql) => sql`groups g`,
    id: (sql) => sql`g.id`,
    reads: readsGroup,
    assigns: administersGroup,
    closed: never,
  },
  {
    type: ResourceType.SERVICE_ACCOUNT,
    from: (sql) => sql`service_accounts s`,
    id: (sql) => sql`s.id`,
    reads: readsServiceAccount,
    assigns: (sql, caller) => whether(sql, caller.orgAdmin),
    closed: (sql) => sql`case when s.suspended then 'the service account is suspended' end`,
  },
];

/**
 * Keeps a resource as it is until the transaction ends, for one who gives or takes a role on it. NOT_FOUND if the caller
 * cannot see it, PERMISSION_DENIED if it may not assign roles there, FAILED_PRECONDITION if nobody may now.
 */
export async function holdSharedResource(tx: Tx, caller: Caller, type: ResourceType, id: string): Promise<void> {
  const kind = KINDS.find((each) => each.type === type);
  if (!kind) throw notFound(resourceName(type), id);
  const [row] = await tx<{ assigns: boolean; closed: string | null }[]>`
    select ${kind.assigns(tx, caller)} as assigns, ${kind.closed(tx)} as closed from ${kind.from(tx)}
    where ${kind.id(tx)} = ${id} and ${kind.reads(tx, caller)} for share`;
  if (!row) throw notFound(resourceName(type), id);
  if (!row.assigns) throw denied(`you may see this ${resourceName(type)}, but not share it`);
  if (!row.closed) return;
  if (type !== ResourceType.PROJECT) throw precondition(row.closed);
  throw actionable("failed_precondition", "PROJECT_STATE_DELETING", row.closed, { project_id: id });
}

/** Condition: may give and take roles on the resource of assignment `a`. */
export function assignsOnResource(sql: Sql | Tx, caller: Caller): Fragment {
  const conditions = KINDS.map(
    (kind) => sql`a.resource_type = ${kind.type} and exists (select from ${kind.from(sql)}
      where ${kind.id(sql)} = a.resource_id and ${kind.reads(sql, caller)} and ${kind.assigns(sql, caller)})`,
  );
  return disjunction(sql, conditions);
}

/** Query: who holds ADMIN on the resource of assignment `a` without an assignment: its creator. */
export function creatorsOfResource(sql: Sql | Tx): Fragment {
  const queries = KINDS.flatMap((kind) =>
    kind.creator ? sql`select ${kind.creator(sql)} from ${kind.from(sql)} where ${kind.id(sql)} = a.resource_id` : [],
  );
  return union(sql, queries);
}

/** Query: those of these ids, of resources of any kind, on which the caller may give and take roles, as `value`. */
export function assignableResources(sql: Sql | Tx, caller: Caller, ids: readonly string[]): Fragment {
  const queries = KINDS.map(
    (kind) => sql`select ${kind.id(sql)} as value from ${kind.from(sql)}
      where ${kind.id(sql)} = any(${ids as string[]}) and ${kind.reads(sql, caller)} and ${kind.assigns(sql, caller)}`,
  );
  return union(sql, queries);
}

/** Query: those of these ids, of resources of any kind, that the caller may read, with their `type`. */
export function readableResources(sql: Sql | Tx, caller: Caller, ids: readonly string[]): Fragment {
  const queries = KINDS.map(
    (kind) => sql`select ${kind.id(sql)} as id, ${kind.type}::int as type from ${kind.from(sql)}
      where ${kind.id(sql)} = any(${ids as string[]}) and ${kind.reads(sql, caller)}`,
  );
  return union(sql, queries);
}
