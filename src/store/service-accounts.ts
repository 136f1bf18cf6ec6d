import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type ListServiceAccountsRequest_Filter,
  type ServiceAccount,
  ServiceAccountSchema,
} from "../../gen/gitpod/v1/service_account_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { actsForServiceAccount, readsServiceAccount } from "./access.ts";
import { conjunction, containing, oneOf } from "./conditions.ts";
import type { Sql, Tx } from "./db.ts";
import type { Attribution, Change } from "./record.ts";
import { recorded } from "./record.ts";

/** A service account with what the caller is to it. */
export interface StoredServiceAccount {
  id: string;
  organizationId: string;
  name: string;
  description: string;
  creatorId: string;
  creatorPrincipal: Principal;
  createdAt: Date;
  validUntil?: Date;
  suspended: boolean;
  systemManaged: boolean;
  /** The caller may have tokens issued that act for it. */
  administers: boolean;
}

interface ServiceAccountRow {
  id: string;
  organization_id: string;
  name: string;
  description: string;
  creator_id: string;
  creator_principal: Principal;
  created_at: Date;
  valid_until: Date | null;
  suspended: boolean;
  system_managed: boolean;
  administers: boolean;
}

const columns = (sql: Sql | Tx, caller: Caller) =>
  sql`s.id, s.organization_id, s.name, s.description, s.creator_id, s.creator_principal, s.created_at, s.valid_until,
    s.suspended, s.system_managed, ${actsForServiceAccount(sql, caller, sql`s.id`)} as administers`;

const toServiceAccount = (row: ServiceAccountRow): StoredServiceAccount => ({
  id: row.id,
  organizationId: row.organization_id,
  name: row.name,
  description: row.description,
  creatorId: row.creator_id,
  creatorPrincipal: row.creator_principal,
  createdAt: row.created_at,
  validUntil: row.valid_until ?? undefined,
  suspended: row.suspended,
  systemManaged: row.system_managed,
  administers: row.administers,
});

/** The wire message of a stored service account. */
export const serviceAccountMessage = (account: StoredServiceAccount): ServiceAccount =>
  create(ServiceAccountSchema, {
    id: account.id,
    organizationId: account.organizationId,
    name: account.name,
    description: account.description,
    creator: { id: account.creatorId, principal: account.creatorPrincipal },
    createdAt: timestampFromDate(account.createdAt),
    validUntil: account.validUntil && timestampFromDate(account.validUntil),
    suspended: account.suspended,
    systemManaged: account.systemManaged,
  });

/** A service account that the caller may read; NOT_FOUND otherwise. `lock` keeps it as it is until the transaction ends. */
export async function getServiceAccount(
  sql: Sql | Tx,
  caller: Caller,
  id: string,
  lock = false,
): Promise<StoredServiceAccount> {
  const [row] = await sql<ServiceAccountRow[]>`
    select ${columns(sql, caller)} from service_accounts s
    where s.id = ${id} and ${readsServiceAccount(sql, caller)} ${lock ? sql`for no key update of s` : sql``}`;
  if (!row) throw notFound("service account", id);
  return toServiceAccount(row);
}

/** Service accounts that the caller may read, newest first, one more than the page holds. */
export async function listServiceAccounts(
  sql: Sql,
  caller: Caller,
  filter: ListServiceAccountsRequest_Filter | undefined,
  page: Page,
): Promise<StoredServiceAccount[]> {
  const conditions = [readsServiceAccount(sql, caller)];
  if (!filter?.includeSuspended) conditions.push(sql`not s.suspended`);
  if (filter?.serviceAccountIds.length) conditions.push(oneOf(sql, sql`s.id`, filter.serviceAccountIds));
  if (filter?.search) conditions.push(sql`s.search like ${containing(filter.search)}`);
  if (page.after) conditions.push(sql`s.id < ${page.after}`);
  const rows = await sql<ServiceAccountRow[]>`
    select ${columns(sql, caller)} from service_accounts s
    where ${conjunction(sql, conditions)} order by s.id desc limit ${page.limit + 1}`;
  return rows.map(toServiceAccount);
}

/** How many service accounts an organization has that are not suspended; nobody makes one until the transaction ends. */
export async function countServiceAccounts(tx: Tx, organizationId: string): Promise<number> {
  await tx`select from organizations where id = ${organizationId} for no key update`;
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from service_accounts where organization_id = ${organizationId} and not suspended`;
  return row?.count ?? 0;
}

function change(
  tx: Tx,
  { id, organizationId, creatorId }: StoredServiceAccount,
  operation: ResourceOperation,
  action: string,
  by: Attribution,
): Change {
  return {
    ...{ organizationId, resourceType: ResourceType.SERVICE_ACCOUNT, resourceId: id, operation, creatorId, at: by.at },
    readers: tx`array[${organizationId}::uuid]`,
    audit: { id: by.newId(), actor: by.actor, action },
  };
}

/** Stores a new service account; its built-in groups are for the caller to bring in step. */
export async function insertServiceAccount(tx: Tx, account: StoredServiceAccount, by: Attribution): Promise<void> {
  await tx`
    with ${recorded(tx, change(tx, account, ResourceOperation.CREATE, "Service account created", by))}
    insert into service_accounts (id, organization_id, name, description, creator_id, creator_principal, created_at, valid_until)
    values (${account.id}, ${account.organizationId}, ${account.name}, ${account.description}, ${account.creatorId},
      ${account.creatorPrincipal}, ${account.createdAt}, ${account.validUntil})`;
}

/** Writes name and description of a service account that the transaction holds, if they are new. */
export async function updateServiceAccount(
  tx: Tx,
  before: StoredServiceAccount,
  next: StoredServiceAccount,
  by: Attribution,
): Promise<void> {
  const changed = (["name", "description"] as const).filter((field) => next[field] !== before[field]);
  if (!changed.length) return;
  const action = `Service account changed: ${changed.join(", ")}`;
  await tx`
    with ${recorded(tx, change(tx, next, ResourceOperation.UPDATE, action, by))}
    update service_accounts set name = ${next.name}, description = ${next.description} where id = ${next.id}`;
}

/** Suspends a service account that the transaction holds, for good; all that follows from it is in departures.ts. */
export async function suspendServiceAccount(tx: Tx, account: StoredServiceAccount, by: Attribution): Promise<void> {
  await tx`
    with ${recorded(tx, change(tx, account, ResourceOperation.DELETE, "Service account deleted", by))}
    update service_accounts set suspended = true where id = ${account.id}`;
}
