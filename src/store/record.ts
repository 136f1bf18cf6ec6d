import { AuditLogEntryKind, ResourceOperation, type ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { Fragment, Sql, Tx } from "./db.ts";
import { principalsOf } from "./readers.ts";

/** Who is written into the audit log. */
export interface Actor {
  /** Null for work of the system itself. */
  id: string | null;
  principal: Principal;
  tokenId: string | null;
  /** Who had the credential issued, where that is somebody else. */
  issuerId?: string;
}

/** To whom changes are put down, when, and where the ids of their audit entries come from. */
export interface Attribution {
  actor: Actor;
  /** Makes ids; later ones sort after earlier ones. */
  newId(): string;
  at: Date;
}

/** A change of one resource, told to watchers and, with an `action`, to the audit log. */
export interface Change {
  organizationId: string;
  resourceType: ResourceType;
  resourceId: string;
  operation: ResourceOperation;
  creatorId?: string;
  environmentId?: string;
  runnerId?: string;
  at: Date;
  /**
   * Who could read what has been deleted, an expression of type uuid[]; by default its creator, whoever holds a role on
   * it, and if the statement that deletes it is the one that records it, whoever may read it for any other reason. The
   * id of the organization stands for all its members.
   */
  readers?: Fragment;
  /** Text of the audit entry; without it only the event is written. */
  audit?: { id: string; actor: Actor; action: string; kind?: AuditLogEntryKind; subjectType?: ResourceType };
}

// A deleted resource can no longer be asked who may read it, so the event keeps the answer.
function readersOf(sql: Sql | Tx, change: Change): Fragment {
  if (change.operation !== ResourceOperation.DELETE) return sql`null`;
  const held = sql`select member.member_id from role_assignments share
    join group_members member on member.group_id = share.group_id where share.resource_id = ${change.resourceId}`;
  const now = principalsOf(sql, change);
  return (
    change.readers ?? sql`array(${held} union select ${change.creatorId}::uuid ${now ? sql`union ${now}` : sql``})`
  );
}

/** What is inserted: rows, or one row if there is something in the CTE `given`. */
function source(sql: Sql | Tx, [row, ...rows]: [Fragment, ...Fragment[]], given: Fragment | undefined): Fragment {
  if (given) return sql`select ${row} from ${given}`;
  return rows.reduce((all, each) => sql`${all}, (${each})`, sql`values (${row})`);
}

function ctes(sql: Sql | Tx, [first, ...others]: [Change, ...Change[]], given?: Fragment): Fragment {
  const eventRow = (change: Change) =>
    sql`${change.organizationId}, ${change.environmentId}, ${change.runnerId}, ${change.resourceType},
      ${change.resourceId}, ${change.operation}, ${change.creatorId}, ${readersOf(sql, change)}, ${change.at}`;
  const event = sql`event as (
    insert into events (organization_id, environment_id, runner_id, resource_type, resource_id, operation, creator_id, readers, created_at)
    ${source(sql, [eventRow(first), ...others.map(eventRow)], given)}
  )`;
  const [entry, ...entries] = [first, ...others].flatMap(({ audit, ...change }) =>
    audit
      ? sql`${audit.id}, ${change.organizationId}, ${audit.actor.id}, ${audit.actor.principal}, ${audit.actor.tokenId}, ${audit.actor.issuerId},
      ${change.resourceId}, ${audit.subjectType ?? change.resourceType}, ${audit.kind ?? AuditLogEntryKind.RESOURCE_CHANGE}, ${audit.action},
      ${change.at}`
      : [],
  );
  if (!entry) return event;
  return sql`${event}, audit as (
    insert into audit_log (id, organization_id, actor_id, actor_principal, credential_id, issuer_id, subject_id, subject_type, kind, action, created_at)
    ${source(sql, [entry, ...entries], given)}
  )`;
}

/**
 * CTEs `event` and `audit` that belong into the statement that makes these changes, which happen together; start the
 * statement with `with`.
 */
export const recorded = (sql: Sql | Tx, ...changes: [Change, ...Change[]]): Fragment => ctes(sql, changes);

/** As `recorded`, for a change that is made if the CTE `given`, which comes before, has a row. */
export const recordedIf = (sql: Sql | Tx, given: Fragment, change: Change): Fragment => ctes(sql, [change], given);

/** Writes changes in a transaction that has already made them. */
export async function record(tx: Tx, ...changes: [Change, ...Change[]]): Promise<void> {
  await tx`with ${recorded(tx, ...changes)} select`;
}

/** An audit entry about the use of a credential, or another kind of entry without an event: nothing changed. */
export async function recordAccess(
  sql: Sql | Tx,
  entry: {
    id: string;
    organizationId: string;
    actor: Actor;
    subjectId: string;
    subjectType: ResourceType;
    action: string;
    kind?: AuditLogEntryKind;
    at: Date;
  },
): Promise<void> {
  const kind = entry.kind ?? AuditLogEntryKind.CREDENTIAL_ACCESS;
  await sql`
    insert into audit_log (id, organization_id, actor_id, actor_principal, credential_id, issuer_id, subject_id, subject_type, kind, action, created_at)
    values (${entry.id}, ${entry.organizationId}, ${entry.actor.id}, ${entry.actor.principal}, ${entry.actor.tokenId}, ${entry.actor.issuerId},
      ${entry.subjectId}, ${entry.subjectType}, ${kind}, ${entry.action}, ${entry.at})`;
}
