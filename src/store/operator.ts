import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { SYSTEM } from "../domain/principal.ts";
import type { Db, Sql, Tx } from "./db.ts";
import { syncBuiltInGroups } from "./groups.ts";
import { record } from "./record.ts";

// What the operator does on the database itself, for all organizations and without a credential.

export interface OrganizationRef {
  id: string;
  name: string;
}

/** Organizations with this id or name; all of them without one. */
export async function findOrganizations(sql: Sql | Tx, idOrName: string | undefined): Promise<OrganizationRef[]> {
  const which = idOrName === undefined ? sql`true` : sql`(id::text = lower(${idOrName}) or name = ${idOrName})`;
  return sql<OrganizationRef[]>`select id, name from organizations where ${which} order by id limit 100`;
}

/** A person in one organization. */
export interface UserRef {
  id: string;
  organization: OrganizationRef;
  role: OrganizationRole;
  status: UserStatus;
}

/** Users with this address, those who are in first; `lock` keeps them still until the transaction ends. */
export async function findUsersByEmail(
  sql: Sql | Tx,
  { email, organizationId, lock = false }: { email: string; organizationId?: string; lock?: boolean },
): Promise<UserRef[]> {
  const where = organizationId === undefined ? sql`true` : sql`u.organization_id = ${organizationId}`;
  const rows = await sql<
    { id: string; role: OrganizationRole; status: UserStatus; organization_id: string; organization_name: string }[]
  >`
    select u.id, u.role, u.status, o.id as organization_id, o.name as organization_name
    from users u join organizations o on o.id = u.organization_id
    where u.email = lower(${email}) and ${where} order by u.status <> ${UserStatus.ACTIVE}, u.id limit 100
    ${lock ? sql`for update of u` : sql``}`;
  return rows.map(({ id, role, status, organization_id, organization_name }) => ({
    ...{ id, role, status },
    organization: { id: organization_id, name: organization_name },
  }));
}

/** How somebody became an admin: not at all, for they were one; as the user they were; or as a new one. */
export type Restored = "unchanged" | "restored" | "added";

/** Makes the person with this address an active admin of an organization, whoever they were in it before. */
export async function restoreAdmin(
  tx: Tx,
  input: { organizationId: string; email: string; name: string; at: Date; newId: () => string },
): Promise<Restored> {
  const { organizationId, at, newId } = input;
  await tx`select from organizations where id = ${organizationId} for update`;
  const [user] = await findUsersByEmail(tx, { email: input.email, organizationId, lock: true });
  if (user?.status === UserStatus.ACTIVE && user.role === OrganizationRole.ADMIN) return "unchanged";
  const userId = user?.id ?? newId();
  if (user) {
    await tx`update users set role = ${OrganizationRole.ADMIN}, status = ${UserStatus.ACTIVE},
      member_since = case status when ${UserStatus.LEFT} then ${at} else member_since end where id = ${userId}`;
  } else {
    await tx`
      with made as (
        insert into accounts (id, email, email_verified, name, login_provider, created_at)
        values (${newId()}, lower(${input.email}), true, ${input.name}, 'local', ${at})
        on conflict (coalesce(owner_organization_id, '00000000-0000-0000-0000-000000000000'), email)
        do update set email = excluded.email returning id
      )
      insert into users (id, organization_id, account_id, role, status, member_since)
      select ${userId}, ${organizationId}, id, ${OrganizationRole.ADMIN}, ${UserStatus.ACTIVE}, ${at} from made`;
  }
  await syncBuiltInGroups(tx, { organizationId, memberId: userId }, { newId, at });
  await record(tx, {
    organizationId,
    resourceType: ResourceType.USER,
    resourceId: userId,
    operation: user ? ResourceOperation.UPDATE : ResourceOperation.CREATE,
    at,
    audit: { id: newId(), actor: SYSTEM, action: user ? "User restored as admin" : "User added as admin" },
  });
  return user ? "restored" : "added";
}

/** An entry in the audit log of every organization about something that concerns them all. */
export async function recordForAll(db: Db, action: string, by: { newId: () => string; at: Date }): Promise<void> {
  for (const { id } of await db.list<{ id: string }[]>`select id from organizations`) {
    await db.write`
      insert into audit_log (id, organization_id, actor_principal, subject_id, subject_type, kind, action, created_at)
      values (${by.newId()}, ${id}, ${SYSTEM.principal}, ${id}, ${ResourceType.ORGANIZATION},
        ${AuditLogEntryKind.RESOURCE_CHANGE}, ${action}, ${by.at})`;
  }
}

/** Runners with a process, by id or name. */
export async function findRunners(
  sql: Sql | Tx,
  idOrName: string,
): Promise<{ id: string; name: string; organizationId: string }[]> {
  return sql<{ id: string; name: string; organizationId: string }[]>`
    select id, name, organization_id as "organizationId" from runners
    where (id::text = lower(${idOrName}) or name = ${idOrName}) and deleted_at is null
      and kind <> ${RunnerKind.LOCAL_CONFIGURATION} and phase <> ${RunnerPhase.DELETING} order by id limit 100`;
}
