import { fromBinary } from "@bufbuild/protobuf";
import { EnvironmentPhase, EnvironmentRole, type EnvironmentSpec_Secret } from "../../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type Secret, SecretSchema } from "../../gen/gitpod/v1/secret_pb.js";
import { type Owner, resourceTypeOf, Scope, specSecrets } from "../domain/secret.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import type { StoredEnvironment } from "./environments.ts";
import type { Actor } from "./record.ts";
import { openValue } from "./secrets.ts";

const NIL = "00000000-0000-0000-0000-000000000000";

/** Whose secrets an environment may get: its organization's, its project's and its creator's. */
export function ownersOf({
  organizationId,
  metadata,
}: Pick<StoredEnvironment, "organizationId" | "metadata">): string[] {
  const { creator, projectId, role } = metadata;
  const isForEverybody = role === EnvironmentRole.PREBUILD && creator?.principal === Principal.USER;
  return [organizationId, projectId, isForEverybody ? "" : (creator?.id ?? "")].filter((id) => id !== "");
}

/**
 * What an environment gets as `spec.secrets` at this moment; entries of other sources stay. With `hold` none of its
 * secrets changes before the transaction ends, so that whoever changes one later finds the environment; take this lock
 * after all others.
 */
export async function environmentSecrets(
  tx: Tx,
  environment: Pick<StoredEnvironment, "organizationId" | "metadata" | "spec">,
  newId: () => string,
  hold: boolean,
): Promise<EnvironmentSpec_Secret[]> {
  const { organizationId, spec } = environment;
  const owners = ownersOf(environment);
  const source = hold
    ? tx`secrets_of(${organizationId}, ${owners}::uuid[])`
    : tx`secrets where organization_id = ${organizationId} and scope_id = any(${owners})`;
  const rows = await tx<{ scope: Scope; scope_id: string; session: string; message: Uint8Array }[]>`
    select scope, scope_id, session, message from ${source}`.execute();
  const candidates = rows.map((row) => ({
    message: fromBinary(SecretSchema, row.message),
    owner: { scope: row.scope, id: row.scope_id },
    session: row.session,
  }));
  return specSecrets(candidates, spec.secrets, newId);
}

/** A secret with its value. */
export interface OpenSecret {
  message: Secret;
  session: string;
  /** Absent where the value is kept elsewhere. */
  value?: string;
}

/**
 * Values for a reader who has been found to be entitled to them, in no order; those that are gone are left out. The first
 * time that a reader gets a value of a secret, the audit log says so.
 */
export async function readValues(
  sql: Sql,
  reader: Actor,
  organizationId: string,
  secretIds: readonly string[],
  by: { masterKey: Uint8Array; newId: () => string; at: Date },
): Promise<OpenSecret[]> {
  const ids = [...new Set(secretIds)].sort();
  const rows = await sql<{ session: string; message: Uint8Array; sealed_value: Uint8Array | null }[]>`
    with asked as (
      select s.*, given.audit_id from unnest(${ids}::uuid[], ${ids.map(() => by.newId())}::uuid[])
        as given (secret_id, audit_id) join secrets s on s.id = given.secret_id and s.organization_id = ${organizationId}
      for key share of s
    ), news as (
      insert into secret_reads (reader_id, secret_id, session) select ${reader.id}, id, session from asked
        where sealed_value is not null order by id
      on conflict (reader_id, secret_id) do update set session = excluded.session where secret_reads.session <> excluded.session
      returning secret_id
    ), audit as (
      insert into audit_log (id, organization_id, actor_id, actor_principal, credential_id, subject_id, subject_type, kind, action, created_at)
      select audit_id, organization_id, ${reader.id}, ${reader.principal}, ${reader.tokenId}, id,
        (${SUBJECT_TYPES}::smallint[])[scope], ${AuditLogEntryKind.CREDENTIAL_ACCESS}, 'Secret value read', ${by.at}
      from asked join news on news.secret_id = asked.id
    )
    select session, message, sealed_value from asked`;
  return rows.map((row) => {
    const message = fromBinary(SecretSchema, row.message);
    const stored = { id: message.id, organizationId };
    const value = row.sealed_value ? openValue(stored, row.sealed_value, by.masterKey) : undefined;
    return { message, session: row.session, value };
  });
}

/** Types of the subjects of audit entries, by scope; scopes count from 1, as positions in an array of Postgres do. */
const SUBJECT_TYPES = Object.values(Scope)
  .sort((left, right) => left - right)
  .map((scope) => resourceTypeOf({ scope, id: "" }) as number);

/** A scope whose secrets have changed, taken up until `until`. */
export interface SecretChange {
  owner: Owner;
  organizationId: string;
  revision: number;
}

/** Takes up the change that has waited longest; nobody else does so before `until`. Undefined if none is due. */
export async function claimSecretChange(sql: Sql, now: Date, until: Date): Promise<SecretChange | undefined> {
  const [row] = await sql<{ scope: Scope; scope_id: string; organization_id: string; revision: number }[]>`
    update secret_changes set due_at = ${until} where (scope, scope_id) = (
      select scope, scope_id from secret_changes where due_at <= ${now} order by due_at limit 1 for update skip locked
    ) returning scope, scope_id, organization_id, revision`;
  return (
    row && {
      owner: { scope: row.scope, id: row.scope_id },
      organizationId: row.organization_id,
      revision: row.revision,
    }
  );
}

/** Keeps a change for oneself for longer. */
export async function keepSecretChange(sql: Sql, { owner, revision }: SecretChange, until: Date): Promise<void> {
  await sql`update secret_changes set due_at = ${until}
    where scope = ${owner.scope} and scope_id = ${owner.id} and revision = ${revision}`;
}

/** Every environment knows this change; one that came after it stays. */
export async function settleSecretChange(sql: Sql, { owner, revision }: SecretChange): Promise<void> {
  await sql`delete from secret_changes
    where scope = ${owner.scope} and scope_id = ${owner.id} and revision = ${revision}`;
}

/** Condition: an environment may get secrets of this owner. */
function concerns(sql: Sql, { scope, id }: Owner): Fragment {
  switch (scope) {
    case Scope.ORGANIZATION:
      return sql`true`;
    case Scope.PROJECT:
      return sql`project_id = ${id}`;
    default:
      return sql`creator_id = ${id}`;
  }
}

/** Environments that are to run and may get secrets of an owner, by id. */
export async function concernedEnvironmentIds(
  sql: Sql,
  { owner, organizationId }: SecretChange,
  after: string,
  limit: number,
): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select id from environments where organization_id = ${organizationId} and ${concerns(sql, owner)}
      and desired_phase = ${EnvironmentPhase.RUNNING} and deleted_at is null and id > ${after || NIL} order by id limit ${limit}`;
  return rows.map((row) => row.id);
}
