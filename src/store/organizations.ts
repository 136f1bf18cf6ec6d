import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type Organization,
  type OrganizationPolicies,
  OrganizationPoliciesSchema,
  OrganizationRole,
  OrganizationSchema,
  OrganizationTier,
} from "../../gen/gitpod/v1/organization_pb.js";
import { RunnerKind, RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, RunnerSpecSchema, RunnerStatusSchema, RunnerVariant } from "../../gen/gitpod/v1/runner_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { type FieldProblem, notFound } from "../domain/errors.ts";
import { ADMINS_GROUP, MEMBERS_GROUP } from "../domain/group.ts";
import { isUuid } from "../domain/ids.ts";
import type { PolicyReferences } from "../domain/organization-policies.ts";
import { defaultPolicies } from "../domain/policies.ts";
import type { Caller } from "../domain/principal.ts";
import { Scope } from "../domain/secret.ts";
import { insertAssignment } from "./assignment-rows.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { syncBuiltInGroups } from "./groups.ts";
import { type Actor, type Attribution, record } from "./record.ts";
import { policiesRevised } from "./runners.ts";

/** Makes ids; later ones sort after earlier ones. */
type NewId = () => string;

/** An organization with all that belongs to one: policies, built-in groups, the local configuration runner. */
export async function insertOrganization(
  tx: Tx,
  input: { id: string; name: string; creatorId: string; at: Date; actor: Actor; newId: NewId },
): Promise<void> {
  const { id, at, newId } = input;
  await tx`insert into organizations (id, name, policies, created_at)
    values (${id}, ${input.name}, ${toBinary(OrganizationPoliciesSchema, defaultPolicies(id))}, ${at})`;
  for (const name of [MEMBERS_GROUP, ADMINS_GROUP]) {
    await tx`insert into groups (id, organization_id, name, system_managed, created_at, updated_at)
      values (${newId()}, ${id}, ${name}, true, ${at}, ${at})`;
  }
  const spec = create(RunnerSpecSchema, { desiredPhase: RunnerPhase.ACTIVE, variant: RunnerVariant.STANDARD });
  const status = create(RunnerStatusSchema, { phase: RunnerPhase.ACTIVE });
  await tx`
    insert into runners (id, organization_id, creator_id, creator_principal, name, kind, provider, variant, desired_phase, phase, spec, status, created_at, updated_at)
    values (${newId()}, ${id}, ${input.creatorId}, ${Principal.USER}, 'Local runners', ${RunnerKind.LOCAL_CONFIGURATION},
      ${RunnerProvider.UNSPECIFIED}, ${spec.variant}, ${RunnerPhase.ACTIVE}, ${RunnerPhase.ACTIVE},
      ${toBinary(RunnerSpecSchema, spec)}, ${toBinary(RunnerStatusSchema, status)}, ${at}, ${at})`;
  await record(tx, {
    organizationId: id,
    resourceType: ResourceType.ORGANIZATION,
    resourceId: id,
    operation: ResourceOperation.CREATE,
    at,
    audit: { id: newId(), actor: input.actor, action: "Organization created" },
  });
}

/** A user with its account, in the groups that its role implies. */
export async function insertFirstUser(
  tx: Tx,
  input: {
    userId: string;
    accountId: string;
    organizationId: string;
    email: string;
    name: string;
    loginProvider: string;
    at: Date;
    actor: Actor;
    newId: NewId;
  },
): Promise<void> {
  const { userId, organizationId, at, newId } = input;
  await tx`insert into accounts (id, email, email_verified, name, login_provider, created_at)
    values (${input.accountId}, ${input.email}, true, ${input.name}, ${input.loginProvider}, ${at})`;
  await tx`insert into users (id, organization_id, account_id, role, status, member_since)
    values (${userId}, ${organizationId}, ${input.accountId}, ${OrganizationRole.ADMIN}, ${UserStatus.ACTIVE}, ${at})`;
  await syncBuiltInGroups(tx, { organizationId, memberId: userId }, { newId, at });
  await record(tx, {
    organizationId,
    resourceType: ResourceType.USER,
    resourceId: userId,
    operation: ResourceOperation.CREATE,
    at,
    audit: { id: newId(), actor: input.actor, action: "User joined" },
  });
}

/** Gives everybody in the organization the role USER on a runner. */
export async function shareRunnerWithMembers(
  tx: Tx,
  { organizationId, runnerId }: { organizationId: string; runnerId: string },
  by: Attribution,
): Promise<void> {
  const [group] = await tx<{ id: string }[]>`
    select id from groups where organization_id = ${organizationId} and name = ${MEMBERS_GROUP} and system_managed`;
  if (!group) throw new Error(`organization ${organizationId} has no group ${MEMBERS_GROUP}`);
  const resource = { resourceType: ResourceType.RUNNER, resourceId: runnerId, role: ResourceRole.RUNNER_USER };
  const assignment = { id: by.newId(), organizationId, groupId: group.id, groupName: MEMBERS_GROUP, ...resource };
  await insertAssignment(tx, assignment, by);
}

/** An organization that the caller may read: its own or, for an account, one with an active user of it. */
export async function getOrganization(sql: Sql | Tx, caller: Caller, id: string): Promise<Organization> {
  const isHere =
    caller.principal === Principal.ACCOUNT
      ? sql`exists (select from users u where u.organization_id = o.id and u.account_id = ${caller.id} and u.status = ${UserStatus.ACTIVE})`
      : sql`o.id = ${caller.organizationId}`;
  const [row] = await sql<
    { id: string; name: string; created_at: Date; updated_at: Date | null; invite_domains: string[] }[]
  >`select o.id, o.name, o.created_at, o.updated_at, o.invite_domains from organizations o where o.id = ${id} and ${isHere}`;
  if (!row) throw notFound("organization", id);
  return create(OrganizationSchema, {
    id: row.id,
    name: row.name,
    createdAt: timestampFromDate(row.created_at),
    updatedAt: timestampFromDate(row.updated_at ?? row.created_at),
    inviteDomains: { domains: row.invite_domains },
    tier: OrganizationTier.ENTERPRISE,
  });
}

/** Policies of an organization, which nobody else can change, nor its members' roles, until the transaction ends. */
export async function holdPolicies(tx: Tx, organizationId: string): Promise<OrganizationPolicies> {
  const [row] = await tx<{ policies: Uint8Array }[]>`
    select policies from organizations where id = ${organizationId} for no key update`;
  if (!row) throw notFound("organization", organizationId);
  return fromBinary(OrganizationPoliciesSchema, row.policies);
}

export async function setPolicies(tx: Tx, policies: OrganizationPolicies): Promise<void> {
  await tx`update organizations set policies = ${toBinary(OrganizationPoliciesSchema, policies)}
    where id = ${policies.organizationId}`;
}

/** Whatever policies refer to and the organization does not have. What it has stays while the policies are held. */
export async function missingReferences(
  tx: Tx,
  organizationId: string,
  { group, secretIds, secretNames }: PolicyReferences,
): Promise<FieldProblem[]> {
  if (!group && !secretIds.length && !secretNames.length) return [];
  const groupId = group && isUuid(group.id) ? group.id : undefined;
  const owned = tx`organization_id = ${organizationId} and scope = ${Scope.ORGANIZATION}`;
  const [row] = await tx<{ has_group: boolean; ids: string[]; names: string[] }[]>`
    select exists (select from groups where id = ${groupId} and organization_id = ${organizationId}) as has_group,
      array(select id from secrets where ${owned} and id = any(${secretIds.map(({ id }) => id)})) as ids,
      array(select name from secrets where ${owned} and name = any(${secretNames.map(({ name }) => name)})) as names`;
  const missing = [
    ...(group && !row?.has_group ? [group] : []),
    ...secretIds.filter(({ id }) => !row?.ids.includes(id)),
    ...secretNames.filter(({ name }) => !row?.names.includes(name)),
  ];
  return missing.map(({ field }) => ({ field, message: "does not exist in this organization" }));
}

/** The policies of every organization. */
export async function allPolicies(sql: Sql): Promise<{ organizationId: string; policies: OrganizationPolicies }[]> {
  const rows = await sql<{ id: string; policies: Uint8Array }[]>`select id, policies from organizations order by id`;
  return rows.map((row) => ({
    organizationId: row.id,
    policies: fromBinary(OrganizationPoliciesSchema, row.policies),
  }));
}

/** What limits the members of an organization, and whether its LOCAL runners are switched on. */
export interface Limits {
  policies: OrganizationPolicies;
  localRunners: boolean;
}

export interface LimitsRow {
  policies: Uint8Array;
  local_active: boolean | null;
}

/** Columns of an organization `o`. */
export const limitsColumns = (sql: Sql | Tx): Fragment => sql`o.policies,
  (select r.desired_phase = ${RunnerPhase.ACTIVE} from runners r
    where r.organization_id = o.id and r.kind = ${RunnerKind.LOCAL_CONFIGURATION}) as local_active`;

export function toLimits(row: LimitsRow): Limits {
  const policies = fromBinary(OrganizationPoliciesSchema, row.policies);
  return { policies, localRunners: policies.allowLocalRunners && row.local_active === true };
}

export async function readPolicies(sql: Sql | Tx, organizationId: string): Promise<Limits> {
  const [row] = await sql<
    LimitsRow[]
  >`select ${limitsColumns(sql)} from organizations o where o.id = ${organizationId}`;
  if (!row) throw new Error(`organization ${organizationId} is gone`);
  return toLimits(row);
}

/** Clears, in policies that the transaction holds, the one that names a group which is about to go as the one that may use tools of source control. */
export async function forgetAllowedGroup(
  tx: Tx,
  policies: OrganizationPolicies,
  groupId: string,
  by: Attribution,
): Promise<void> {
  const { organizationId } = policies;
  if (policies.agentPolicy?.scmToolsAllowedGroupId.toLowerCase() !== groupId) return;
  policies.agentPolicy.scmToolsAllowedGroupId = "";
  await setPolicies(tx, policies);
  await record(tx, {
    ...{ organizationId, resourceType: ResourceType.ORGANIZATION_POLICY, resourceId: organizationId },
    ...{ operation: ResourceOperation.UPDATE, at: by.at },
    audit: { id: by.newId(), actor: by.actor, action: "Policy scm_tools_allowed_group_id cleared with its group" },
  });
  await policiesRevised(tx, organizationId, by.at);
}
