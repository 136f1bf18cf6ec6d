import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ResourceOperation } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type OrganizationPolicies, OrganizationPoliciesSchema } from "../../gen/gitpod/v1/organization_pb.js";
import { type Secret, SecretSchema } from "../../gen/gitpod/v1/secret_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { type Candidate, type Owner, resourceTypeOf, Scope } from "../domain/secret.ts";
import { actsForServiceAccount, editsProject, readsProject, readsSecret, writesSecret } from "./access.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { seal, unseal } from "./envelope.ts";
import { type Actor, type Change, recorded } from "./record.ts";

/** A secret without its value, and whether the caller may change it. */
export interface StoredSecret extends Candidate {
  organizationId: string;
  writes: boolean;
}

interface SecretRow {
  organization_id: string;
  scope: Scope;
  scope_id: string;
  session: string;
  message: Uint8Array;
  writes: boolean;
}

/** Name of the index that keeps names in a scope apart. */
export const SECRET_NAME_INDEX = "secrets_name";

const columns = (sql: Sql | Tx) => sql`s.organization_id, s.scope, s.scope_id, s.session, s.message`;

const toSecret = (row: SecretRow): StoredSecret => ({
  message: fromBinary(SecretSchema, row.message),
  organizationId: row.organization_id,
  owner: { scope: row.scope, id: row.scope_id },
  session: row.session,
  writes: row.writes,
});

/** What a sealed value is bound to: it opens as the value of this secret of this organization only. */
const sealContext = (id: string, organizationId: string) => `secret ${id} of ${organizationId}`;

/** A value as it is stored with a secret. */
export const sealValue = (
  { id, organizationId }: { id: string; organizationId: string },
  value: string,
  masterKey: Uint8Array,
  random: (bytes: number) => Uint8Array,
): Uint8Array => seal(masterKey, sealContext(id, organizationId), Buffer.from(value), random);

/** The value that was stored with a secret. */
export const openValue = (
  { id, organizationId }: { id: string; organizationId: string },
  sealedValue: Uint8Array,
  masterKey: Uint8Array,
): string => Buffer.from(unseal(masterKey, sealContext(id, organizationId), sealedValue)).toString();

/**
 * Lets no other change of secrets of the organization, and no creation or start of an environment in it, happen until
 * the transaction ends: an environment gets the secrets of before, and is told, or those of after. Take this lock after
 * those on the organization and on owners, and before those on secrets.
 */
export async function holdSecrets(tx: Tx, organizationId: string): Promise<void> {
  await tx`select pg_advisory_xact_lock(hashtextextended(${`secrets ${organizationId}`}, 0))`;
}

/** What a caller may do with the secrets of an owner. */
export interface OwnerRights {
  reads: boolean;
  writes: boolean;
  /** The owner takes no secrets any more. */
  isGone: boolean;
}

const rights = (reads: boolean, writes: boolean, isGone = false): OwnerRights => ({ reads, writes, isGone });

/** Rights on the secrets of an owner, who is held until a transaction ends; NOT_FOUND for one that is not visible. */
export async function ownerRights(sql: Sql | Tx, caller: Caller, owner: Owner, hold = false): Promise<OwnerRights> {
  const locking = hold ? sql`for share` : sql``;
  switch (owner.scope) {
    case Scope.ORGANIZATION:
      if (owner.id !== caller.organizationId) throw notFound("organization", owner.id);
      return rights(true, caller.orgAdmin);
    case Scope.USER: {
      const [user] = await sql<{ status: UserStatus }[]>`
        select status from users where id = ${owner.id} and organization_id = ${caller.organizationId} ${locking}`;
      if (!user) throw notFound("user", owner.id);
      const isSelf = caller.principal === Principal.USER && owner.id === caller.id;
      return rights(isSelf, isSelf, user.status !== UserStatus.ACTIVE);
    }
    case Scope.SERVICE_ACCOUNT: {
      const [account] = await sql<{ suspended: boolean; acts: boolean }[]>`
        select a.suspended, ${actsForServiceAccount(sql, caller, sql`a.id`)} as acts from service_accounts a
        where a.id = ${owner.id} and a.organization_id = ${caller.organizationId} ${locking}`;
      if (!account) throw notFound("service account", owner.id);
      return rights(account.acts, account.acts, account.suspended);
    }
    case Scope.PROJECT: {
      const [project] = await sql<{ edits: boolean; is_deleting: boolean }[]>`
        select ${editsProject(sql, caller)} as edits, p.deleting_at is not null as is_deleting from projects p
        where p.id = ${owner.id} and ${readsProject(sql, caller)} ${locking}`;
      if (!project) throw notFound("project", owner.id);
      return rights(true, project.edits, project.is_deleting);
    }
  }
}

/** How many secrets an owner has. */
export async function countSecrets(tx: Tx, { scope, id }: Owner): Promise<number> {
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from secrets where scope = ${scope} and scope_id = ${id}`;
  return row?.count ?? 0;
}

/** CTE that has the environments told of the secrets of an owner, whose organization's the transaction holds. */
export function told(tx: Tx, { scope, id }: Owner, organizationId: string, at: Date): Fragment {
  return tx`told as (
    insert into secret_changes (scope, scope_id, organization_id, due_at) values (${scope}, ${id}, ${organizationId}, ${at})
    on conflict (scope, scope_id) do update set revision = secret_changes.revision + 1, due_at = excluded.due_at
  )`;
}

/** A secret of an owner whom the transaction holds. A name that is taken violates SECRET_NAME_INDEX. */
export async function insertSecret(
  tx: Tx,
  { message, organizationId, owner, session }: Omit<StoredSecret, "writes">,
  sealedValue: Uint8Array | undefined,
  change: Change,
): Promise<void> {
  await tx`
    with ${recorded(tx, change)}, ${told(tx, owner, organizationId, change.at)}
    insert into secrets (id, organization_id, scope, scope_id, name, session, sealed_value, message)
    values (${message.id}, ${organizationId}, ${owner.scope}, ${owner.id}, ${message.name}, ${session}, ${sealedValue},
      ${toBinary(SecretSchema, message)})`;
}

/** A secret that the caller may read; NOT_FOUND otherwise. `lock` keeps it still until the transaction ends. */
export async function getSecret(sql: Sql | Tx, caller: Caller, id: string, lock = false): Promise<StoredSecret> {
  const [row] = await sql<SecretRow[]>`
    select ${columns(sql)}, ${writesSecret(sql, caller)} as writes from secrets s
    where s.id = ${id} and ${readsSecret(sql, caller)} ${lock ? sql`for no key update of s` : sql``}`;
  if (!row) throw notFound("secret", id);
  return toSecret(row);
}

/** Gives a secret that the transaction holds another value. */
export async function replaceSecret(
  tx: Tx,
  { message, organizationId, owner, session }: Omit<StoredSecret, "writes">,
  sealedValue: Uint8Array,
  change: Change,
): Promise<void> {
  await tx`
    with ${recorded(tx, change)}, ${told(tx, owner, organizationId, change.at)}
    update secrets set session = ${session}, sealed_value = ${sealedValue}, message = ${toBinary(SecretSchema, message)}
    where id = ${message.id}`;
}

export async function deleteSecret(tx: Tx, { message, organizationId, owner }: StoredSecret, change: Change) {
  await tx`
    with ${recorded(tx, change)}, ${told(tx, owner, organizationId, change.at)}
    delete from secrets where id = ${message.id}`;
}

/**
 * Deletes all secrets of an owner that is going, each with its event and audit entry; returns how many there were.
 * Environments that had them are told soon after the commit.
 */
export async function deleteSecretsOf(
  tx: Tx,
  owner: Owner,
  by: { organizationId: string; actor: Actor; newId: () => string; at: Date },
): Promise<number> {
  const { organizationId, actor, newId, at } = by;
  await holdSecrets(tx, organizationId);
  const rows = await tx<{ message: Uint8Array }[]>`
    select message from secrets where scope = ${owner.scope} and scope_id = ${owner.id} order by id for update`;
  for (const row of rows) {
    const message = fromBinary(SecretSchema, row.message);
    const stored = { message, organizationId, owner, session: "", writes: true };
    const audit = { id: newId(), actor, action: "Secret deleted with its owner" };
    await deleteSecret(tx, stored, changeOf(stored, ResourceOperation.DELETE, at, audit));
  }
  return rows.length;
}

/** A change of a secret for watchers and the audit log. Events of a user's secrets name the user, who alone reads them. */
export function changeOf(
  { message, organizationId, owner }: Pick<StoredSecret, "message" | "organizationId" | "owner">,
  operation: ResourceOperation,
  at: Date,
  audit: Change["audit"],
): Change {
  return {
    organizationId,
    resourceType: resourceTypeOf(owner),
    resourceId: message.id,
    operation,
    creatorId: owner.scope === Scope.USER ? owner.id : message.creator?.id,
    at,
    audit,
  };
}

/** What limits an organization, held until the transaction ends, so that it cannot begin to name a secret meanwhile. */
export async function holdPolicies(tx: Tx, organizationId: string): Promise<OrganizationPolicies> {
  const [row] = await tx<{ policies: Uint8Array }[]>`
    select policies from organizations where id = ${organizationId} for share`;
  if (!row) throw new Error(`organization ${organizationId} is gone`);
  return fromBinary(OrganizationPoliciesSchema, row.policies);
}

/** Which secrets of each kind of owner a caller may list. */
function branches(sql: Sql, caller: Caller, owner: Owner | undefined): Fragment[] {
  const organization = sql`s.organization_id = ${caller.organizationId}`;
  if (owner) return [sql`${organization} and s.scope = ${owner.scope} and s.scope_id = ${owner.id}`];
  return [
    sql`${organization} and s.scope = ${Scope.ORGANIZATION}`,
    sql`${organization} and s.scope = ${Scope.USER} and s.scope_id = ${caller.id}`,
    sql`${organization} and s.scope = ${Scope.PROJECT}
      and s.scope_id in (select p.id from projects p where ${readsProject(sql, caller)})`,
    sql`${organization} and s.scope = ${Scope.SERVICE_ACCOUNT} and ${actsForServiceAccount(sql, caller, sql`s.scope_id`)}`,
  ];
}

/**
 * Secrets that the caller may read, newest first, one more than the page holds: of one owner, on whose secrets its
 * rights were checked, or of all. Each kind of owner has an index of its own to read a page from.
 */
export async function listSecrets(sql: Sql, caller: Caller, owner: Owner | undefined, page: Page): Promise<Secret[]> {
  const after = page.after ? sql`and s.id < ${page.after}` : sql``;
  const limit = page.limit + 1;
  const pages = branches(sql, caller, owner).map(
    (condition) =>
      sql`(select s.id, s.message from secrets s where ${condition} ${after} order by s.id desc limit ${limit})`,
  );
  const all = pages.reduce((union, each) => sql`${union} union all ${each}`);
  const rows = await sql<{ message: Uint8Array }[]>`
    select message from (${all}) as visible order by id desc limit ${limit}`;
  return rows.map((row) => fromBinary(SecretSchema, row.message));
}
