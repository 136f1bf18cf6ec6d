import { fromBinary, fromJsonString, toJsonString } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import {
  AdmissionLevel,
  ListEnvironmentsRequest_ArchivalStatus as ArchivalStatus,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentSpecSchema,
  EnvironmentStatus_EnvironmentURLsSchema,
  EnvironmentStatusSchema,
  type ListEnvironmentsRequest,
  ListEnvironmentsRequest_SortField as SortField,
} from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { SortOrder } from "../../gen/gitpod/v1/pagination_pb.js";
import { type EnvironmentClass, EnvironmentClassSchema } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { EncodedEnvironment } from "../domain/environment.ts";
import { invalid, notFound } from "../domain/errors.ts";
import { type EnvironmentFacts, type EnvironmentState, nextDeadline, tombstoneEnd } from "../domain/lifecycle.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { ownsEnvironment, readsEnvironment, sharedWith } from "./access.ts";
import { conjunction, containing, oneOf } from "./conditions.ts";
import type { BesideQuery } from "./credentials.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Link, type LinkRow, linkColumns, toLink } from "./runners.ts";
import { assemble, pieces, run } from "./statement.ts";

/** An environment with the facts that are not on the wire and what the caller is to it. */
export interface StoredEnvironment extends EnvironmentState {
  id: string;
  organizationId: string;
  /** Highest report accepted so far. */
  reportEpoch: number;
  reportSeq: number;
  relation: Relation;
}

/** What a caller is to an environment; the rights of each are in domain/access.ts. */
export interface Relation {
  /** Creator, or ENVIRONMENT_ADMIN through a share. */
  owner: boolean;
  /** ENVIRONMENT_USER through a share, or through the admission of the environment. */
  user: boolean;
  /** The environment itself, by its own token. */
  self: boolean;
  /** The runner that it lies on. */
  runner: boolean;
}

interface EnvironmentRow {
  id: string;
  organization_id: string;
  metadata: Uint8Array;
  spec: Uint8Array;
  status: Uint8Array;
  facts: string;
  report_epoch: number;
  report_seq: number;
  owner: boolean;
  e_user: boolean;
}

const DATES = [
  "firstRunningAt",
  "runningSince",
  "stoppedAt",
  "unarchivedAt",
  "phaseSince",
  "lastActivityAt",
  "signalWrittenAt",
  "runnerUnreachableSince",
  "runnerBackSince",
] as const satisfies (keyof EnvironmentFacts)[];

export function encodeFacts(facts: EnvironmentFacts): string {
  const urls = facts.reportedUrls && toJsonString(EnvironmentStatus_EnvironmentURLsSchema, facts.reportedUrls);
  return JSON.stringify({ ...facts, reportedUrls: urls });
}

function decodeFacts(text: string): EnvironmentFacts {
  const facts = JSON.parse(text);
  for (const name of DATES) facts[name] = facts[name] && new Date(facts[name]);
  // Rows of before do not have them.
  facts.fileWarning ??= "";
  facts.leftOut ??= "";
  if (facts.reportedUrls)
    facts.reportedUrls = fromJsonString(EnvironmentStatus_EnvironmentURLsSchema, facts.reportedUrls);
  return facts;
}

/** When a sweep has to look at an environment again. */
export const nextDueAt = (state: EnvironmentState) => nextDeadline(state) ?? tombstoneEnd(state);

const columns = (sql: Sql | Tx) =>
  sql`e.id, e.organization_id, e.metadata, e.spec, e.status, e.facts, e.report_epoch, e.report_seq`;

const NOBODY: Relation = { owner: false, user: false, self: false, runner: false };
const OPEN_TO_MEMBERS = [AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE] as number[];

function relations(sql: Sql | Tx, caller: Caller): Fragment {
  const shared = (role: ResourceRole) => sql`e.id in ${sharedWith(sql, caller, ResourceType.ENVIRONMENT, [role])}`;
  return sql`${ownsEnvironment(sql, caller)} as owner,
    (e.admission = any(${OPEN_TO_MEMBERS}) or ${shared(ResourceRole.ENVIRONMENT_USER)}) as e_user`;
}

function toEnvironment(row: EnvironmentRow, relation: Relation): StoredEnvironment {
  return {
    id: row.id,
    organizationId: row.organization_id,
    metadata: fromBinary(EnvironmentMetadataSchema, row.metadata),
    spec: fromBinary(EnvironmentSpecSchema, row.spec),
    status: fromBinary(EnvironmentStatusSchema, row.status),
    facts: decodeFacts(row.facts),
    reportEpoch: row.report_epoch,
    reportSeq: row.report_seq,
    relation,
  };
}

function relationOf(row: Pick<EnvironmentRow, "owner" | "e_user">, caller: Caller): Relation {
  const person = caller.principal === Principal.USER || caller.principal === Principal.SERVICE_ACCOUNT;
  return {
    owner: person && row.owner,
    user: person && row.e_user,
    self: caller.principal === Principal.ENVIRONMENT,
    runner: caller.principal === Principal.RUNNER,
  };
}

/** Text that `search` looks through. */
export function searchText(id: string, { metadata, spec, status }: EnvironmentState): string {
  const remotes = spec.content?.initializer?.specs.flatMap(({ spec: each }) => {
    if (each.case === "git") return [each.value.remoteUri, each.value.cloneTarget];
    return each.case === "contextUrl" ? [each.value.url] : [];
  });
  const git = status.content?.git;
  const parts = [
    id,
    metadata.name,
    metadata.originalContextUrl,
    ...(remotes ?? []),
    git?.cloneUrl ?? "",
    git?.branch ?? "",
  ];
  return parts.join("\n").toLowerCase();
}

export const optionalDate = (timestamp: Parameters<typeof timestampDate>[0] | undefined) =>
  timestamp && timestampDate(timestamp);

/** An environment, by its id or a query for it, that the caller may read; undefined if there is none. */
export async function readEnvironment(
  sql: Sql | Tx,
  caller: Caller,
  id: string | Fragment,
  lock = false,
): Promise<StoredEnvironment | undefined> {
  const [row] = await sql<EnvironmentRow[]>`
    select ${columns(sql)}, ${relations(sql, caller)} from environments e
    where e.id = ${id} and ${readsEnvironment(sql, caller)} ${lock ? sql`for update` : sql``}`;
  return row && toEnvironment(row, relationOf(row, caller));
}

/** An environment in the form that is stored, for who only reads it. */
export type EncodedEnvironmentRow = EncodedEnvironment & { relation: Relation };

/** Query for what `getEncodedEnvironment` needs. */
export const encodedEnvironmentQuery = (sql: Sql, caller: Caller, [id]: readonly [string]): Fragment => sql`
  select e.id, e.metadata, e.spec, e.status, ${relations(sql, caller)} from environments e
  where e.id = ${id} and ${readsEnvironment(sql, caller)}`;

/** As `getEnvironment`, without decoding it; `found` is the row of the query, if it has been made already. */
export async function getEncodedEnvironment(
  sql: Sql,
  caller: Caller,
  id: string,
  found?: object,
): Promise<EncodedEnvironmentRow> {
  const query = () => run<EnvironmentRow>(sql, assemble(encodedEnvironmentQuery(pieces, caller, [id])));
  const [row] = found ? [found as EnvironmentRow] : await query();
  if (!row?.id) throw notFound("environment", id);
  const { metadata, spec, status } = row;
  return { id: row.id, metadata, spec, status, relation: relationOf(row, caller) };
}

/** An environment that the caller may read; NOT_FOUND otherwise. `lock` keeps it still until the transaction ends. */
export async function getEnvironment(
  sql: Sql | Tx,
  caller: Caller,
  id: string,
  lock = false,
): Promise<StoredEnvironment> {
  const found = await readEnvironment(sql, caller, id, lock);
  if (!found) throw notFound("environment", id);
  return found;
}

/** An environment of the caller's organization, for questions that do not need the right to read it. */
export async function findEnvironment(
  sql: Sql | Tx,
  caller: Caller,
  id: string,
): Promise<(StoredEnvironment & { readable: boolean }) | undefined> {
  const [row] = await sql<(EnvironmentRow & { readable: boolean })[]>`
    select ${columns(sql)}, ${relations(sql, caller)}, ${readsEnvironment(sql, caller)} as readable from environments e
    where e.id = ${id} and e.organization_id = ${caller.organizationId}`;
  return row && { ...toEnvironment(row, relationOf(row, caller)), readable: row.readable };
}

/** An environment, by its id or a query for it, read for the system's own work; undefined if there is none. */
export async function lockEnvironment(tx: Tx, id: string | Fragment): Promise<StoredEnvironment | undefined> {
  const query = (sql: Tx) => sql`
    select ${columns(sql)}, false as owner, false as e_user from environments e where e.id = ${id} for update`;
  const [row] = (await (typeof id === "string" ? run(tx, assemble(query(pieces))) : query(tx))) as EnvironmentRow[];
  return row && toEnvironment(row, NOBODY);
}

/** Of a report, what its runner has to quote, and the environment as it is, with the version of its row. */
export interface Reported {
  link: Link;
  environment?: StoredEnvironment;
  version: string;
}

interface ReportedRow extends LinkRow, Omit<EnvironmentRow, "id"> {
  id: string | null;
  home: string;
  version: string;
}

/** Query for a runner that reports, and the environment that it reports if that is its own. */
export const reportedQuery: BesideQuery<[id: string | null]> = (sql, caller, [id]) => sql`
  select ${linkColumns(sql)}, e.* from runners r left join (
    select e.id, e.organization_id as home, e.metadata, e.spec, e.status, e.facts, e.report_epoch, e.report_seq,
      e.runner_id as place, e.xmin::text as version from environments e
  ) e on e.id = ${id} and e.place = r.id where r.id = ${caller.id}`;

export async function readReported(sql: Sql, caller: Caller, id: string | null, found?: object): Promise<Reported> {
  const query = () => run<ReportedRow>(sql, assemble(reportedQuery(pieces, caller, [id], new Date())));
  const [row] = found ? [found as ReportedRow] : await query();
  if (!row) throw notFound("runner", caller.id);
  const stored = row.id ? toEnvironment({ ...row, id: row.id, organization_id: row.home }, NOBODY) : undefined;
  return { link: toLink(row), environment: stored, version: row.version };
}

/** As `lockEnvironment` for many, in the order of their ids. */
export async function lockEnvironments(tx: Tx, ids: readonly string[]): Promise<StoredEnvironment[]> {
  const rows = await tx<EnvironmentRow[]>`
    select ${columns(tx)}, false as owner, false as e_user from environments e
    where e.id = any(${ids as string[]}) order by e.id for update`;
  return rows.map((row) => toEnvironment(row, NOBODY));
}

/** Environments of a runner by id, as the runner sees them; deleted ones are left out. */
export async function runnerEnvironments(
  sql: Sql,
  runnerId: string,
  ids: readonly string[] | undefined,
  after: string,
  limit: number,
): Promise<{ environment: StoredEnvironment; environmentClass?: EnvironmentClass }[]> {
  const query = pieces`
    select ${columns(pieces)}, false as owner, false as e_user, c.message as class
    from environments e left join environment_classes c on c.id = e.class_id
    where e.runner_id = ${runnerId} and e.deleted_at is null and ${ids ? pieces`e.id = any(${ids as string[]})` : pieces`e.id > ${after || NIL}`}
    order by e.id limit ${limit}`;
  const rows = await run<EnvironmentRow & { class: Uint8Array | null }>(sql, assemble(query));
  return rows.map((row) => ({
    environment: toEnvironment(row, NOBODY),
    ...(row.class && { environmentClass: fromBinary(EnvironmentClassSchema, row.class) }),
  }));
}

const NIL = "00000000-0000-0000-0000-000000000000";

/** Which of the environments that a runner said it still holds are deleted. */
export async function deletedAmongHeld(sql: Sql, runnerId: string): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select e.id from runners r join environments e on e.id = any(r.local_environment_ids)
    where r.id = ${runnerId} and e.runner_id = r.id and e.deleted_at is not null`;
  return rows.map((row) => row.id);
}

/** Ids of a runner's environments that are not deleted. */
export async function environmentIdsOfRunner(sql: Sql | Tx, runnerId: string): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select id from environments where runner_id = ${runnerId} and deleted_at is null order by id`;
  return rows.map((row) => row.id);
}

/** Environments at which a sweep has to look, those that fell due first at the head. */
export async function dueEnvironmentIds(sql: Sql, now: Date, limit: number): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select id from environments where due_at <= ${now} order by due_at limit ${limit}`;
  return rows.map((row) => row.id);
}

/** A moment for each organization; what happened before it is due. */
type Cutoffs = readonly { organizationId: string; before: Date }[];

const unnested = (sql: Sql, cutoffs: Cutoffs) => sql`unnest(${cutoffs.map((each) => each.organizationId)}::uuid[],
    ${cutoffs.map((each) => each.before.toISOString())}::text[]::timestamptz[]) as due (organization_id, before)`;

/** Environments that have been stopped since before the cutoff of their organization, at most `limit` of each. */
export async function archivableEnvironmentIds(sql: Sql, cutoffs: Cutoffs, limit: number): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select e.id from ${unnested(sql, cutoffs)} cross join lateral (
      select id from environments where organization_id = due.organization_id and archivable_since <= due.before
      order by archivable_since limit ${limit}
    ) e limit ${limit}`;
  return rows.map((row) => row.id);
}

/** Environments that have been archived since before the cutoff of their organization, at most `limit` of each. */
export async function deletableEnvironmentIds(sql: Sql, cutoffs: Cutoffs, limit: number): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select e.id from ${unnested(sql, cutoffs)} cross join lateral (
      select id from environments where organization_id = due.organization_id and archived_at <= due.before
        and desired_phase <> 80 order by archived_at limit ${limit}
    ) e limit ${limit}`;
  return rows.map((row) => row.id);
}

/** One of them, locked; undefined if somebody else holds it or has looked at it since. */
export async function claimDueEnvironment(tx: Tx, id: string, now: Date): Promise<StoredEnvironment | undefined> {
  const [row] = await tx<EnvironmentRow[]>`
    select ${columns(tx)}, false as owner, false as e_user from environments e
    where e.id = ${id} and e.due_at <= ${now} for update skip locked`;
  return row && toEnvironment(row, NOBODY);
}

/** Puts a row off that was due but had nothing to do. */
export async function postpone(tx: Tx, id: string, until: Date | null): Promise<void> {
  await tx`update environments set due_at = ${until} where id = ${id}`;
}

/** The end of a tombstone. */
export async function purgeEnvironment(tx: Tx, id: string): Promise<void> {
  await tx`with reads as (delete from secret_reads where reader_id = ${id}) delete from environments where id = ${id}`;
}

/** What counts towards the quotas of a person. */
export interface QuotaUse {
  total: number;
  running: number;
}

/**
 * Holds every other creation and start of the same person back until the transaction ends, then counts: all
 * environments that are neither archived nor going, and those of them that want to run. Both are sent at once, the lock
 * before whatever is called after this.
 */
export async function countForQuota(tx: Tx, organizationId: string, creatorId: string): Promise<QuotaUse> {
  const held =
    tx`select pg_advisory_xact_lock(hashtextextended(${`quota ${organizationId} ${creatorId}`}, 0))`.execute();
  const counted = tx<QuotaUse[]>`select total, running from quota_use(${organizationId}, ${creatorId})`.execute();
  const [, [row]] = await Promise.all([held, counted]);
  return row ?? { total: 0, running: 0 };
}

/** Holds every other creation and start on a runner back until the transaction ends. */
export async function holdRunner(tx: Tx, runnerId: string): Promise<void> {
  await tx`select from runners where id = ${runnerId} for no key update`;
}

/** Environments that want to run on a runner, which the transaction holds. */
export async function countRunningOnRunner(tx: Tx, runnerId: string): Promise<number> {
  const [row] = await tx<{ count: number }[]>`select running_on(${runnerId}) as count`.execute();
  return row?.count ?? 0;
}

/** Whether a session exists and belongs to this creator. */
export async function ownsSession(sql: Sql | Tx, caller: Caller, sessionId: string): Promise<boolean> {
  const rows = await sql`select from environment_sessions
    where id = ${sessionId} and organization_id = ${caller.organizationId} and creator_id = ${caller.id}`;
  return rows.length > 0;
}

type ListFilter = ListEnvironmentsRequest["filter"];

const DEFAULT_ROLES = [EnvironmentRole.DEFAULT, EnvironmentRole.WORKFLOW];

function filterConditions(sql: Sql, caller: Caller, filter: ListFilter): Fragment[] {
  const conditions: Fragment[] = [readsEnvironment(sql, caller)];
  const among = (column: Fragment, values: readonly (string | number)[] | undefined) => {
    if (values?.length) conditions.push(oneOf(sql, column, values));
  };
  const phases = filter?.statusPhases ?? [];
  const wantsDeleted = phases.includes(EnvironmentPhase.DELETED);
  among(sql`e.phase`, phases);
  if (!wantsDeleted) conditions.push(sql`e.deleted_at is null`);
  among(sql`e.runner_id`, filter?.runnerIds);
  among(sql`e.creator_id`, filter?.creatorIds);
  among(sql`e.project_id`, filter?.projectIds);
  among(sql`e.session_id`, filter?.sessionIds);
  among(sql`e.role`, filter?.roles.length ? filter.roles : DEFAULT_ROLES);
  if (filter?.runnerKinds.length) {
    conditions.push(
      sql`exists (select from runners r where r.id = e.runner_id and r.kind = any(${filter.runnerKinds as number[]}))`,
    );
  }
  const archival = filter?.archivalStatus || ArchivalStatus.ACTIVE;
  if (archival === ArchivalStatus.ARCHIVED) conditions.push(sql`e.archived_at is not null`);
  if (archival === ArchivalStatus.ACTIVE) conditions.push(sql`(e.archived_at is null or e.deleted_at is not null)`);
  if (filter?.createdBefore) conditions.push(sql`e.created_at < ${timestampDate(filter.createdBefore)}`);
  if (filter?.lockdownBefore) conditions.push(sql`e.lockdown_at < ${timestampDate(filter.lockdownBefore)}`);
  if (filter?.search) conditions.push(sql`e.search like ${containing(filter.search)}`);
  return conditions;
}

/** Where a page by archival time goes on: time in ms (empty for never archived) and id. */
function archivedPosition(after: string): { at: Date | null; id: string } {
  const [time = "", id = ""] = after.split("/");
  const at = time ? new Date(Number(time)) : null;
  if (at && Number.isNaN(at.getTime())) throw invalid({ field: "pagination.token", message: "is malformed" });
  return { at, id };
}

function ordering(
  sql: Sql,
  sort: ListEnvironmentsRequest["sort"],
  after: string,
): { order: Fragment; position?: Fragment } {
  const ascending = sort?.order === SortOrder.ASC;
  if (sort?.field !== SortField.ARCHIVED_AT) {
    const position = after ? (ascending ? sql`e.id > ${after}` : sql`e.id < ${after}`) : undefined;
    return { order: ascending ? sql`e.id asc` : sql`e.id desc`, position };
  }
  const order = ascending ? sql`e.archived_at asc nulls last, e.id asc` : sql`e.archived_at desc nulls last, e.id desc`;
  if (!after) return { order };
  const { at, id } = archivedPosition(after);
  const later = ascending ? sql`e.id > ${id}` : sql`e.id < ${id}`;
  if (!at) return { order, position: sql`(e.archived_at is null and ${later})` };
  const beyond = ascending ? sql`e.archived_at > ${at}` : sql`e.archived_at < ${at}`;
  return { order, position: sql`(e.archived_at is null or ${beyond} or (e.archived_at = ${at} and ${later}))` };
}

/** Position of an environment in the order that was asked for. */
export function listPosition(sort: ListEnvironmentsRequest["sort"], state: StoredEnvironment): string {
  if (sort?.field !== SortField.ARCHIVED_AT) return state.id;
  return `${optionalDate(state.metadata.archivedAt)?.getTime() ?? ""}/${state.id}`;
}

/** Environments that the caller may read, one more than the page holds. */
export async function listEnvironments(
  sql: Sql,
  caller: Caller,
  request: ListEnvironmentsRequest,
  page: Page,
): Promise<StoredEnvironment[]> {
  const { order, position } = ordering(sql, request.sort, page.after);
  const conditions = filterConditions(sql, caller, request.filter);
  if (position) conditions.push(position);
  const rows = await sql<EnvironmentRow[]>`
    select ${columns(sql)}, ${relations(sql, caller)} from environments e
    where ${conjunction(sql, conditions)} order by ${order} limit ${page.limit + 1}`;
  return rows.map((row) => toEnvironment(row, relationOf(row, caller)));
}

/** How many the filter matches, counted up to `cap`. */
export async function countEnvironments(sql: Sql, caller: Caller, filter: ListFilter, cap: number): Promise<number> {
  const [row] = await sql<{ count: number }[]>`
    select count(*)::int as count from (
      select from environments e where ${conjunction(sql, filterConditions(sql, caller, filter))} limit ${cap}
    ) as matching`;
  return row?.count ?? 0;
}
