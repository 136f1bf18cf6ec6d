import { create } from "@bufbuild/protobuf";
import { type Timestamp, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type AuditLogEntryKind,
  type ListAuditLogsRequest_Filter as Filter,
  type ListAuditLogsResponse_AuditLogEntry,
  ListAuditLogsResponse_AuditLogEntrySchema,
  type ResourceType,
} from "../../gen/gitpod/v1/event_pb.js";
import type { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { invalid, notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { conjunction, oneOf } from "./conditions.ts";
import type { Fragment, Sql } from "./db.ts";

/** One entry of the audit log; absent ids are null. */
export interface AuditEntry {
  id: string;
  actorId: string | null;
  actorPrincipal: Principal;
  subjectId: string | null;
  subjectType: ResourceType;
  kind: AuditLogEntryKind;
  action: string;
  createdAt: Date;
  /** `createdAt` in microseconds since 1970, as exact as it is stored. */
  at: number;
}

/** The wire message of an entry. */
export function auditEntryMessage(entry: AuditEntry): ListAuditLogsResponse_AuditLogEntry {
  const { id, actorId, actorPrincipal, subjectId, subjectType, action, kind, createdAt } = entry;
  return create(ListAuditLogsResponse_AuditLogEntrySchema, {
    ...{ id, actorPrincipal, subjectType, action, kind },
    actorId: actorId ?? "",
    subjectId: subjectId ?? "",
    createdAt: timestampFromDate(createdAt),
  });
}

const columns = (sql: Sql) => sql`l.id, l.actor_id as "actorId", l.actor_principal as "actorPrincipal",
  l.subject_id as "subjectId", l.subject_type as "subjectType", l.kind, l.action, l.created_at as "createdAt",
  (extract(epoch from l.created_at) * 1000000)::bigint as at`;

const timeOf = (sql: Sql, micros: number) => sql`timestamptz 'epoch' + ${micros}::bigint * interval '1 microsecond'`;

/** The first microsecond that is not before a time: entries are no more exact than that. */
const microsOf = ({ seconds, nanos }: Timestamp): number => Number(seconds) * 1e6 + Math.ceil(nanos / 1000);

/** Where a page of the list goes on: time in microseconds, and id. */
export const auditPosition = ({ at, id }: AuditEntry): string => `${at}/${id}`;

const POSITION = /^(-?\d+)\/([0-9a-f-]{36})$/;

function positionOf(sql: Sql, after: string): Fragment {
  const [, at, id] = POSITION.exec(after) ?? [];
  if (!at || !id) throw invalid({ field: "pagination.token", message: "is malformed" });
  return sql`${timeOf(sql, Number(at))}, ${id}::uuid`;
}

interface Named {
  column: Fragment;
  type: Fragment;
  values: readonly (string | number)[];
}

/** What a filter names by value, the rarest first. */
const named = (sql: Sql, filter: Filter | undefined): Named[] =>
  [
    { column: sql`l.subject_id`, type: sql`uuid[]`, values: filter?.subjectIds ?? [] },
    { column: sql`l.actor_id`, type: sql`uuid[]`, values: filter?.actorIds ?? [] },
    { column: sql`l.subject_type`, type: sql`int[]`, values: filter?.subjectTypes ?? [] },
    { column: sql`l.actor_principal`, type: sql`int[]`, values: filter?.actorPrincipals ?? [] },
  ].filter(({ values }) => values.length);

/**
 * Entries of the caller's organization by time, newest first unless `ascending`, one more than the page holds. For each
 * value of the rarest thing that the filter names there is one walk along an index, bounded by rows of that value and
 * time: with `=` in their place, statistics would make the planner look for a rare value through the whole organization.
 */
export async function listAuditEntries(
  sql: Sql,
  caller: Caller,
  filter: Filter | undefined,
  ascending: boolean,
  page: Page,
): Promise<AuditEntry[]> {
  const [first, ...others] = named(sql, filter);
  const walked = first ? sql`${first.column},` : sql``;
  const value = first ? sql`one.value,` : sql``;
  const conditions = [sql`l.organization_id = ${caller.organizationId}`];
  for (const { column, values } of others) conditions.push(oneOf(sql, column, values));
  const from = filter?.from ? timeOf(sql, microsOf(filter.from)) : sql`'-infinity'`;
  const to = filter?.to ? timeOf(sql, microsOf(filter.to)) : sql`'infinity'`;
  // Where the page begins takes the place of the bound on that side: of two, the database walks from either.
  const position = page.after ? sql`(${value} ${positionOf(sql, page.after)})` : sql``;
  conditions.push(
    page.after && ascending
      ? sql`(${walked} l.created_at, l.id) > ${position}`
      : sql`(${walked} l.created_at) >= (${value} ${from})`,
    page.after && !ascending
      ? sql`(${walked} l.created_at, l.id) < ${position}`
      : sql`(${walked} l.created_at) < (${value} ${to})`,
  );
  const direction = ascending ? sql`asc` : sql`desc`;
  const byTime = sql`l.created_at ${direction}, l.id ${direction} limit ${page.limit + 1}`;
  if (!first) {
    return sql<AuditEntry[]>`
      select ${columns(sql)} from audit_log l where ${conjunction(sql, conditions)} order by ${byTime}`;
  }
  const { column, type, values } = first;
  const walk = sql`
    select * from audit_log l where ${conjunction(sql, conditions)} order by ${column} ${direction}, ${byTime}`;
  return sql<AuditEntry[]>`
    select ${columns(sql)}
    from (select distinct unnest(${values as string[]}::${type}) as value) one, lateral (${walk}) l order by ${byTime}`;
}

/** An entry of the caller's organization; NOT_FOUND otherwise. */
export async function getAuditEntry(sql: Sql, caller: Caller, id: string): Promise<AuditEntry> {
  const [entry] = await sql<AuditEntry[]>`
    select ${columns(sql)} from audit_log l where l.id = ${id} and l.organization_id = ${caller.organizationId}`;
  if (!entry) throw notFound("audit log entry", id);
  return entry;
}

/** An entry with what only the operator is told. */
export interface ExportedEntry extends AuditEntry {
  organizationId: string;
  /** Credential that it was done with. */
  credentialId: string | null;
  /** Who had that credential issued, where that is somebody else. */
  issuerId: string | null;
}

/** Entries of all organizations in the order of their ids, at most `limit` after one. */
export async function exportAuditEntries(sql: Sql, after: string, limit: number): Promise<ExportedEntry[]> {
  return sql<ExportedEntry[]>`
    select ${columns(sql)}, l.organization_id as "organizationId", l.credential_id as "credentialId", l.issuer_id as "issuerId"
    from audit_log l where l.id > ${after} order by l.id limit ${limit}`;
}
