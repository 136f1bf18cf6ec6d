import { AdmissionLevel } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { type Caller, isPerson } from "../domain/principal.ts";
import { rolesFrom } from "../domain/roles.ts";
import { Scope } from "../domain/secret.ts";
import type { Fragment, Sql, Tx } from "./db.ts";

/**
 * Visibility as SQL. Every query over organization data ands one of these conditions, so that what a caller may not
 * see is simply not there. The conditions name the table by its alias.
 */
/** Resource ids on which one of the caller's groups holds one of the roles. */
export function sharedWith(
  sql: Sql | Tx,
  caller: Caller,
  type: ResourceType,
  roles: readonly ResourceRole[],
): Fragment {
  return sql`(
    select share.resource_id from group_members member
    join role_assignments share on share.group_id = member.group_id
    where member.member_id = ${caller.id} and share.resource_type = ${type} and share.resource_role = any(${roles as number[]})
  )`;
}

export const RUNNER_ROLES = rolesFrom(ResourceRole.RUNNER_USER);
export const ENVIRONMENT_ROLES = rolesFrom(ResourceRole.ENVIRONMENT_VIEWER);

/** Condition: holds ADMIN on runner `r`. */
export function administersRunner(sql: Sql | Tx, caller: Caller): Fragment {
  if (caller.orgAdmin || caller.runnersAdmin) return sql`true`;
  return sql`(r.creator_id = ${caller.id} or r.id in ${sharedWith(sql, caller, ResourceType.RUNNER, [ResourceRole.RUNNER_ADMIN])})`;
}

/** Condition: may create environments on runner `r`. */
export function usesRunner(sql: Sql | Tx, caller: Caller): Fragment {
  if (caller.orgAdmin || caller.runnersAdmin) return sql`true`;
  return sql`(r.creator_id = ${caller.id} or r.id in ${sharedWith(sql, caller, ResourceType.RUNNER, RUNNER_ROLES)})`;
}

/** Condition: may read runner `r`, which must not be deleted. */
export function readsRunner(sql: Sql | Tx, caller: Caller): Fragment {
  const here = sql`r.organization_id = ${caller.organizationId} and r.deleted_at is null`;
  if (caller.principal === Principal.RUNNER) return sql`(${here} and r.id = ${caller.id})`;
  if (caller.principal === Principal.ENVIRONMENT) return sql`(${here} and r.id = ${caller.runnerId})`;
  return sql`(${here} and (r.kind = ${RunnerKind.LOCAL_CONFIGURATION} or ${usesRunner(sql, caller)}))`;
}

export const PROJECT_USERS = rolesFrom(ResourceRole.PROJECT_USER);
const PROJECT_EDITORS = rolesFrom(ResourceRole.PROJECT_EDITOR);

function holdsOnProject(sql: Sql | Tx, caller: Caller, roles: readonly ResourceRole[]): Fragment {
  if (caller.orgAdmin || caller.projectsAdmin) return sql`true`;
  return sql`(p.creator_id = ${caller.id} or p.id in ${sharedWith(sql, caller, ResourceType.PROJECT, roles)})`;
}

/** Condition: holds ADMIN on project `p`. */
export const administersProject = (sql: Sql | Tx, caller: Caller): Fragment =>
  holdsOnProject(sql, caller, [ResourceRole.PROJECT_ADMIN]);

/** Condition: holds EDITOR or more on project `p`. */
export const editsProject = (sql: Sql | Tx, caller: Caller): Fragment => holdsOnProject(sql, caller, PROJECT_EDITORS);

/** Condition: may read project `p` and use it. */
export function readsProject(sql: Sql | Tx, caller: Caller): Fragment {
  const here = sql`p.organization_id = ${caller.organizationId}`;
  if (caller.principal === Principal.RUNNER) return sql`false`;
  if (caller.principal === Principal.ENVIRONMENT) return sql`(${here} and p.id = ${caller.projectId || null})`;
  return sql`(${here} and ${holdsOnProject(sql, caller, PROJECT_USERS)})`;
}

/** Condition: may read environment class `c` on runner `r`: readers of the runner, and of a project that offers it. */
export function readsClass(sql: Sql | Tx, caller: Caller): Fragment {
  if (!isPerson(caller) || caller.orgAdmin || caller.runnersAdmin) return readsRunner(sql, caller);
  return sql`(${readsRunner(sql, caller)} or c.id in (
    select offer.class_id from project_environment_classes offer join projects p on p.id = offer.project_id
    where offer.class_id is not null and p.deleting_at is null and ${readsProject(sql, caller)}
  ))`;
}

/** Condition: may read environment `e`. */
export function readsEnvironment(sql: Sql | Tx, caller: Caller): Fragment {
  const here = sql`e.organization_id = ${caller.organizationId}`;
  if (caller.principal === Principal.RUNNER) return sql`(${here} and e.runner_id = ${caller.id})`;
  if (caller.principal === Principal.ENVIRONMENT) return sql`(${here} and e.id = ${caller.id})`;
  if (caller.orgAdmin || caller.environmentsReader) return here;
  return sql`(${here} and (e.creator_id = ${caller.id}
    or e.admission = any(${[AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE] as number[]})
    or e.id in ${sharedWith(sql, caller, ResourceType.ENVIRONMENT, ENVIRONMENT_ROLES)}))`;
}

/** Condition: may read user `u`, whatever its status. An environment knows its creator alone, an account its own users. */
export function readsUser(sql: Sql | Tx, caller: Caller): Fragment {
  if (caller.principal === Principal.ACCOUNT) return sql`u.account_id = ${caller.id}`;
  const here = sql`u.organization_id = ${caller.organizationId}`;
  if (caller.principal === Principal.RUNNER) return sql`false`;
  if (caller.principal === Principal.ENVIRONMENT) return sql`(${here} and u.id = ${caller.creatorId})`;
  return here;
}

/** Condition: made environment `e` or holds ADMIN on it; organization admins do not, who could let themselves in. */
export const ownsEnvironment = (sql: Sql | Tx, caller: Caller): Fragment =>
  sql`(e.creator_id = ${caller.id}
    or e.id in ${sharedWith(sql, caller, ResourceType.ENVIRONMENT, [ResourceRole.ENVIRONMENT_ADMIN])})`;

/** Condition: may read group `g`, as every member of the organization may. */
export const readsGroup = (sql: Sql | Tx, caller: Caller): Fragment =>
  isPerson(caller) ? sql`g.organization_id = ${caller.organizationId}` : sql`false`;

/** Condition: holds ADMIN on group `g`. */
export function administersGroup(sql: Sql | Tx, caller: Caller): Fragment {
  if (caller.orgAdmin || caller.groupsAdmin) return sql`true`;
  return sql`g.id in ${sharedWith(sql, caller, ResourceType.GROUP, [ResourceRole.GROUP_ADMIN])}`;
}

/** Condition: may read service account `s`, as every member of the organization may. */
export const readsServiceAccount = (sql: Sql | Tx, caller: Caller): Fragment =>
  isPerson(caller) ? sql`s.organization_id = ${caller.organizationId}` : sql`false`;

/** Condition: the service account with this id is the caller, or one that it administers. */
export function actsForServiceAccount(sql: Sql | Tx, caller: Caller, id: Fragment): Fragment {
  if (caller.orgAdmin) return sql`true`;
  return sql`(${id} = ${caller.id}
    or ${id} in ${sharedWith(sql, caller, ResourceType.SERVICE_ACCOUNT, [ResourceRole.SERVICE_ACCOUNT_ADMIN])})`;
}

/** Condition: may read everything about secret `s` but its value. */
export function readsSecret(sql: Sql | Tx, caller: Caller): Fragment {
  if (!isPerson(caller)) return sql`false`;
  return sql`(s.organization_id = ${caller.organizationId} and case s.scope
    when ${Scope.ORGANIZATION} then true
    when ${Scope.PROJECT} then exists (select from projects p where p.id = s.scope_id and ${readsProject(sql, caller)})
    when ${Scope.USER} then s.scope_id = ${caller.id}
    when ${Scope.SERVICE_ACCOUNT} then ${actsForServiceAccount(sql, caller, sql`s.scope_id`)}
    else false end)`;
}

/** Condition: may change secret `s`, which the caller may read. */
export function writesSecret(sql: Sql | Tx, caller: Caller): Fragment {
  return sql`(case s.scope
    when ${Scope.ORGANIZATION} then ${caller.orgAdmin}
    when ${Scope.PROJECT} then exists (select from projects p where p.id = s.scope_id and ${editsProject(sql, caller)})
    else true end)`;
}
