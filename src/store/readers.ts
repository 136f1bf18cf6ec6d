import { AdmissionLevel } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { OutboxEvent } from "../domain/event.ts";
import { ADMIN_ROLES } from "../domain/roles.ts";
import { Scope } from "../domain/secret.ts";
import { TokenKind } from "../domain/tokens.ts";
import { ENVIRONMENT_ROLES, PROJECT_USERS, RUNNER_ROLES } from "./access.ts";
import { union } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";

// Who may read a resource, as data. The conditions in access.ts answer that for one caller and any number of resources;
// to ask it for a thousand callers at once, what they depend on is read here and held against each. A test lets both
// answer for every kind of resource and caller.

/** Who may read a resource. */
export interface Readers {
  id: string;
  organizationId: string;
  /** Every member of the organization may. */
  open: boolean;
  /** Principals who may: whose it is. */
  owners: string[];
  /** Groups whose members may: they hold a role with which it may be read. */
  groups: string[];
  /** Kinds of resources: who may read all of one of them by a role on the organization may read this. */
  kinds: ResourceType[];
}

/** Query for the readers of those of these resources that exist. */
type Query = (sql: Sql | Tx, ids: readonly string[]) => Fragment;

const NOBODY = (sql: Sql | Tx) => sql`'{}'::uuid[]`;
const kinds = (sql: Sql | Tx, ...types: ResourceType[]) => sql`${types as number[]}::int[]`;

/** Query: groups that hold one of the roles on a resource. */
const holders = (sql: Sql | Tx, id: Fragment, type: ResourceType, roles: readonly ResourceRole[]): Fragment => sql`
  select share.group_id from role_assignments share
  where share.resource_id = ${id} and share.resource_type = ${type} and share.resource_role = any(${roles as number[]}::int[])`;

const OPEN_ADMISSIONS = [AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE] as number[];

const environments: Query = (sql, ids) => sql`
  select e.id, e.organization_id, e.admission = any(${OPEN_ADMISSIONS}), array[e.creator_id],
    array(${holders(sql, sql`e.id`, ResourceType.ENVIRONMENT, ENVIRONMENT_ROLES)}), ${kinds(sql, ResourceType.ENVIRONMENT)}
  from environments e where e.id = any(${ids as string[]})`;

const openRunner = (sql: Sql | Tx) => sql`r.kind = ${RunnerKind.LOCAL_CONFIGURATION}`;
const runnerHolders = (sql: Sql | Tx) => holders(sql, sql`r.id`, ResourceType.RUNNER, RUNNER_ROLES);

const ofRunner = (sql: Sql | Tx, id: Fragment) => sql`${id}, r.organization_id, ${openRunner(sql)}, array[r.creator_id],
  array(${runnerHolders(sql)}), ${kinds(sql, ResourceType.RUNNER)}`;

const runners: Query = (sql, ids) => sql`
  select ${ofRunner(sql, sql`r.id`)} from runners r where r.id = any(${ids as string[]}) and r.deleted_at is null`;

const integrations: Query = (sql, ids) => sql`
  select ${ofRunner(sql, sql`i.id`)} from scm_integrations i join runners r on r.id = i.runner_id
  where i.id = any(${ids as string[]}) and r.deleted_at is null`;

// Readers of the runner, and of every project that offers the class.
const classes: Query = (sql, ids) => sql`
  select c.id, r.organization_id, ${openRunner(sql)}, offers.owners || r.creator_id,
    array(${runnerHolders(sql)} union ${holders(sql, sql`any(offers.projects)`, ResourceType.PROJECT, PROJECT_USERS)}),
    case when offers.projects = '{}' then ${kinds(sql, ResourceType.RUNNER)}
      else ${kinds(sql, ResourceType.RUNNER, ResourceType.PROJECT)} end
  from environment_classes c join runners r on r.id = c.runner_id, lateral (
    select coalesce(array_agg(p.id), '{}') as projects, coalesce(array_agg(p.creator_id), '{}') as owners
    from project_environment_classes offer join projects p on p.id = offer.project_id
    where offer.class_id = c.id and p.deleting_at is null
  ) offers
  where c.id = any(${ids as string[]}) and r.deleted_at is null`;

// One that is being deleted is left to its admins.
const projectHolders = (sql: Sql | Tx) => sql`
  ${holders(sql, sql`p.id`, ResourceType.PROJECT, PROJECT_USERS)}
    and (p.deleting_at is null or share.resource_role = ${ResourceRole.PROJECT_ADMIN})`;

const ofProject = (sql: Sql | Tx, id: Fragment) => sql`${id}, p.organization_id, false, array[p.creator_id],
  array(${projectHolders(sql)}), ${kinds(sql, ResourceType.PROJECT)}`;

const projects: Query = (sql, ids) => sql`
  select ${ofProject(sql, sql`p.id`)} from projects p where p.id = any(${ids as string[]})`;

const projectSecrets: Query = (sql, ids) => sql`
  select ${ofProject(sql, sql`s.id`)} from secrets s join projects p on p.id = s.scope_id
  where s.id = any(${ids as string[]}) and s.scope = ${Scope.PROJECT}`;

const serviceAccountSecrets: Query = (sql, ids) => sql`
  select s.id, s.organization_id, false, array[s.scope_id],
    array(${holders(sql, sql`s.scope_id`, ResourceType.SERVICE_ACCOUNT, [ResourceRole.SERVICE_ACCOUNT_ADMIN])}), ${kinds(sql)}
  from secrets s where s.id = any(${ids as string[]}) and s.scope = ${Scope.SERVICE_ACCOUNT}`;

/** What every member may read, if it exists. */
const open = (sql: Sql | Tx, id: Fragment, organizationId: Fragment) =>
  sql`${id}, ${organizationId}, true, ${NOBODY(sql)}, ${NOBODY(sql)}, ${kinds(sql)}`;

const organizations: Query = (sql, ids) => sql`
  select ${open(sql, sql`o.id`, sql`o.id`)} from organizations o where o.id = any(${ids as string[]})`;

const organizationSecrets: Query = (sql, ids) => sql`
  select ${open(sql, sql`s.id`, sql`s.organization_id`)} from secrets s
  where s.id = any(${ids as string[]}) and s.scope = ${Scope.ORGANIZATION}`;

const users: Query = (sql, ids) => sql`
  select ${open(sql, sql`u.id`, sql`u.organization_id`)} from users u where u.id = any(${ids as string[]})`;

const groups: Query = (sql, ids) => sql`
  select ${open(sql, sql`g.id`, sql`g.organization_id`)} from groups g where g.id = any(${ids as string[]})`;

const serviceAccounts: Query = (sql, ids) => sql`
  select ${open(sql, sql`s.id`, sql`s.organization_id`)} from service_accounts s where s.id = any(${ids as string[]})`;

/** What belongs to somebody; without an owner, what only admins may read. */
const owned = (sql: Sql | Tx, id: Fragment, organizationId: Fragment, owners: Fragment) =>
  sql`${id}, ${organizationId}, false, ${owners}, ${NOBODY(sql)}, ${kinds(sql)}`;

const personalAccessTokens: Query = (sql, ids) => sql`
  select ${owned(sql, sql`t.id`, sql`t.organization_id`, sql`array[t.subject_id]`)} from tokens t
  where t.id = any(${ids as string[]}) and t.kind = ${TokenKind.PERSONAL_ACCESS}`;

const serviceAccountTokens: Query = (sql, ids) => sql`
  select ${owned(sql, sql`t.id`, sql`t.organization_id`, NOBODY(sql))} from tokens t
  where t.id = any(${ids as string[]}) and t.kind = ${TokenKind.SERVICE_ACCOUNT}`;

const userSecrets: Query = (sql, ids) => sql`
  select ${owned(sql, sql`s.id`, sql`s.organization_id`, sql`array[s.scope_id]`)} from secrets s
  where s.id = any(${ids as string[]}) and s.scope = ${Scope.USER}`;

const preferences: Query = (sql, ids) => sql`
  select ${owned(sql, sql`v.id`, sql`u.organization_id`, sql`array[u.id]`)}
  from user_preferences v join users u on u.id = v.user_id where v.id = any(${ids as string[]})`;

const hostTokens: Query = (sql, ids) => sql`
  select ${owned(sql, sql`t.id`, sql`t.organization_id`, sql`array[t.subject_id]`)} from host_tokens t
  where t.id = any(${ids as string[]})`;

// Every member those on the organization; others the members of the group, and who may give roles on the resource.
const assignments: Query = (sql, ids) => sql`
  select a.id, a.organization_id, a.resource_type = ${ResourceType.ORGANIZATION},
    array(select r.creator_id from runners r where r.id = a.resource_id
      union all select p.creator_id from projects p where p.id = a.resource_id
      union all select e.creator_id from environments e where e.id = a.resource_id),
    array(select share.group_id from role_assignments share where share.resource_id = a.resource_id
      and share.resource_role = any(${ADMIN_ROLES as number[]}::int[])
      and share.resource_role <> ${ResourceRole.SERVICE_ACCOUNT_ADMIN}) || a.group_id,
    case when a.resource_type = ${ResourceType.ENVIRONMENT} then ${kinds(sql)} else array[a.resource_type]::int[] end
  from role_assignments a where a.id = any(${ids as string[]})`;

// The id is that of the resource on which somebody has another role now, whatever it is.
const shared: Query = (sql, ids) =>
  union(
    sql,
    [organizations, runners, projects, environments, groups, serviceAccounts].map((query) => query(sql, ids)),
  );

const QUERIES: Partial<Record<ResourceType, Query>> = {
  [ResourceType.ENVIRONMENT]: environments,
  [ResourceType.RUNNER]: runners,
  [ResourceType.ENVIRONMENT_CLASS]: classes,
  [ResourceType.RUNNER_SCM_INTEGRATION]: integrations,
  [ResourceType.HOST_AUTHENTICATION_TOKEN]: hostTokens,
  [ResourceType.PROJECT]: projects,
  [ResourceType.PROJECT_ENVIRONMENT_CLASS]: projects,
  [ResourceType.SECRET]: projectSecrets,
  [ResourceType.USER_SECRET]: userSecrets,
  [ResourceType.ORGANIZATION_SECRET]: organizationSecrets,
  [ResourceType.SERVICE_ACCOUNT_SECRET]: serviceAccountSecrets,
  [ResourceType.ORGANIZATION]: organizations,
  [ResourceType.ORGANIZATION_POLICY]: organizations,
  [ResourceType.USER]: users,
  [ResourceType.USER_PREFERENCE]: preferences,
  [ResourceType.PERSONAL_ACCESS_TOKEN]: personalAccessTokens,
  [ResourceType.SERVICE_ACCOUNT]: serviceAccounts,
  [ResourceType.SERVICE_ACCOUNT_TOKEN]: serviceAccountTokens,
  [ResourceType.GROUP]: groups,
  [ResourceType.GROUP_MEMBERSHIP_CHANGED]: groups,
  [ResourceType.ROLE_ASSIGNMENT]: assignments,
  [ResourceType.ROLE_ASSIGNMENT_CHANGED]: shared,
};

type Resource = Pick<OutboxEvent, "resourceType" | "resourceId">;

/** Whether there is a table of this kind of resource. */
export const isStored = (type: ResourceType): boolean => QUERIES[type] !== undefined;

const columns = (sql: Sql | Tx) => sql`found (id, "organizationId", open, owners, groups, kinds)`;

/**
 * Query: principals who may read a resource that still exists, but for those who may by a role on the organization; the
 * id of the organization stands for all its members. Undefined for what has no table.
 */
export function principalsOf(sql: Sql | Tx, { resourceType, resourceId }: Resource): Fragment | undefined {
  const query = QUERIES[resourceType]?.(sql, [resourceId]);
  return (
    query &&
    sql`
      select reader from (${query}) ${columns(sql)}, lateral (
        select unnest(owners) union select member_id from group_members where group_id = any(groups)
        union select "organizationId" where open
      ) readers (reader)`
  );
}

/** The readers of those of these resources that exist, all in one question. */
export async function readersOf(
  sql: Sql,
  resources: readonly Resource[],
): Promise<(Readers & { resourceType: ResourceType })[]> {
  const queries = [...Map.groupBy(resources, (each) => each.resourceType)].flatMap(([type, group]) => {
    const query = QUERIES[type]?.(sql, [...new Set(group.map((each) => each.resourceId))]);
    return query ? [sql`select ${type}::int as "resourceType", found.* from (${query}) ${columns(sql)}`] : [];
  });
  return queries.length ? sql<(Readers & { resourceType: ResourceType })[]>`${union(sql, queries)}` : [];
}
