import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { type Principal, SubjectSchema } from "../../gen/gitpod/v1/identity_pb.js";
import { SortOrder } from "../../gen/gitpod/v1/pagination_pb.js";
import {
  type ListProjectsRequest,
  type ListProjectsRequest_Filter,
  type Project,
  Project_UsedBySchema,
  ProjectPhase,
  ProjectSchema,
} from "../../gen/gitpod/v1/project_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { type ClassEntry, classMessage } from "../domain/project.ts";
import { administersProject, editsProject, readsProject } from "./access.ts";
import { assignmentsEnded } from "./assignment-rows.ts";
import { conjunction, containing, oneOf } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Change, recorded } from "./record.ts";

/** A project with what the caller may do with it. */
export interface StoredProject {
  id: string;
  organizationId: string;
  /** As clients read it, with its description only where it is read to be changed. */
  message: Project;
  classes: ClassEntry[];
  /** Deletion has begun. */
  isDeleting: boolean;
  popularity: number;
  /** The caller holds EDITOR or more, or ADMIN. */
  edits: boolean;
  administers: boolean;
}

/** What its repositories are found by. */
export interface RepositoryIndex {
  /** Addresses as given. */
  remoteUris: string[];
  /** In the one spelling that all addresses of a repository share. */
  repositories: string[];
  names: string[];
}

interface ProjectRow {
  id: string;
  organization_id: string;
  message: Uint8Array;
  technical_description: string;
  positions: number[] | null;
  class_ids: (string | null)[] | null;
  user_ids: string[] | null;
  user_principals: Principal[] | null;
  user_count: number;
  is_deleting: boolean;
  popularity: number;
  edits: boolean;
  administers: boolean;
}

const SHOWN_USERS = 10;

function columns(sql: Sql | Tx, caller: Caller, withDescription = false): Fragment {
  return sql`p.id, p.organization_id, p.message, ${withDescription ? sql`p.technical_description` : sql`''`} as technical_description,
    offers.positions, offers.class_ids, users.ids as user_ids, users.principals as user_principals, users.count as user_count,
    p.deleting_at is not null as is_deleting, p.popularity,
    ${editsProject(sql, caller)} as edits, ${administersProject(sql, caller)} as administers`;
}

/** Projects `p` with what they offer and who uses them. */
const projects = (sql: Sql | Tx): Fragment => sql`projects p cross join lateral (
    select array_agg(k.position order by k.position) as positions, array_agg(k.class_id order by k.position) as class_ids
    from project_environment_classes k where k.project_id = p.id
  ) offers cross join lateral (
    select count(*)::int as count, (array_agg(u.subject_id order by u.used_at desc))[:${SHOWN_USERS}] as ids,
      (array_agg(u.subject_principal order by u.used_at desc))[:${SHOWN_USERS}] as principals
    from project_users u where u.project_id = p.id
  ) users`;

function toProject(row: ProjectRow): StoredProject {
  const message = fromBinary(ProjectSchema, row.message);
  const classes = (row.positions ?? []).map((order, index) => ({
    order,
    classId: row.class_ids?.[index] ?? undefined,
  }));
  message.technicalDescription = row.technical_description;
  message.environmentClasses = classes.map(classMessage);
  message.environmentClass = message.environmentClasses[0];
  const subjects = (row.user_ids ?? []).map((id, index) =>
    create(SubjectSchema, { id, principal: row.user_principals?.[index] }),
  );
  message.usedBy = create(Project_UsedBySchema, { subjects, totalSubjects: row.user_count });
  return {
    id: row.id,
    organizationId: row.organization_id,
    message,
    classes,
    isDeleting: row.is_deleting,
    popularity: row.popularity,
    edits: row.edits,
    administers: row.administers,
  };
}

/** The message as it is kept: without what has columns or tables of its own. */
const stored = (message: Project) =>
  toBinary(ProjectSchema, {
    ...message,
    technicalDescription: "",
    environmentClass: undefined,
    environmentClasses: [],
    usedBy: undefined,
  });

const searchText = ({ id, metadata }: Project, { names }: RepositoryIndex) =>
  [metadata?.name ?? "", id, ...names].join("\n").toLowerCase();

/** A new project, which offers no classes yet. */
export async function insertProject(
  tx: Tx,
  input: { message: Project; index: RepositoryIndex; at: Date; popularityDueAt: Date },
  change: Change,
): Promise<void> {
  const { message, index, at } = input;
  const { id, metadata } = message;
  const creator = metadata?.creator;
  await tx`
    with ${recorded(tx, change)}
    insert into projects (id, organization_id, creator_id, creator_principal, name, search, remote_uris, repositories, message,
      technical_description, popularity_due_at, created_at)
    values (${id}, ${metadata?.organizationId}, ${creator?.id}, ${creator?.principal}, ${metadata?.name}, ${searchText(message, index)},
      ${index.remoteUris}, ${index.repositories}, ${stored(message)}, ${message.technicalDescription}, ${input.popularityDueAt}, ${at})`;
}

/** Writes a project that the transaction holds locked as it is from now on. */
export async function updateProject(
  tx: Tx,
  message: Project,
  index: RepositoryIndex,
  ...changes: [Change, ...Change[]]
): Promise<void> {
  await tx`
    with ${recorded(tx, ...changes)}
    update projects set name = ${message.metadata?.name}, search = ${searchText(message, index)}, remote_uris = ${index.remoteUris},
      repositories = ${index.repositories}, message = ${stored(message)}, technical_description = ${message.technicalDescription}
    where id = ${message.id}`;
}

/** A project that the caller may read; while it is being deleted only its admins may. NOT_FOUND otherwise. */
export async function getProject(sql: Sql | Tx, caller: Caller, id: string): Promise<StoredProject> {
  const [row] = await sql<ProjectRow[]>`
    select ${columns(sql, caller)} from ${projects(sql)}
    where p.id = ${id} and ${readsProject(sql, caller)} and (p.deleting_at is null or ${administersProject(sql, caller)})`;
  if (!row) throw notFound("project", id);
  return toProject(row);
}

/** A project that the caller may read, being deleted or not, kept still until the transaction ends. */
export async function lockProject(tx: Tx, caller: Caller, id: string): Promise<StoredProject> {
  const [row] = await tx<ProjectRow[]>`
    select ${columns(tx, caller, true)} from ${projects(tx)} where p.id = ${id} and ${readsProject(tx, caller)} for no key update of p`;
  if (!row) throw notFound("project", id);
  return toProject(row);
}

/**
 * A project that the caller may read, being deleted or not, for whoever makes something of it. `hold` keeps it from being
 * changed or deleted until the transaction ends.
 */
export async function getProjectToUse(sql: Sql | Tx, caller: Caller, id: string, hold = false): Promise<StoredProject> {
  const project = await findProjectToUse(sql, caller, id, hold);
  if (!project) throw notFound("project", id);
  return project;
}

/** As `getProjectToUse`; undefined where there is none. */
export async function findProjectToUse(
  sql: Sql | Tx,
  caller: Caller,
  id: string,
  hold = false,
): Promise<StoredProject | undefined> {
  const [row] = await sql<ProjectRow[]>`
    select ${columns(sql, caller)} from ${projects(sql)}
    where p.id = ${id} and ${readsProject(sql, caller)} ${hold ? sql`for share of p` : sql``}`;
  return row && toProject(row);
}

/** Holds every other creation in the organization back until the transaction ends, then counts. */
export async function countProjectsForQuota(tx: Tx, organizationId: string): Promise<number> {
  await tx`select pg_advisory_xact_lock(hashtextextended(${`projects ${organizationId}`}, 0))`;
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from projects where organization_id = ${organizationId}`;
  return row?.count ?? 0;
}

/** The beginning of the end of a project, which the transaction holds locked. */
export async function markProjectDeleting(tx: Tx, project: StoredProject, change: Change): Promise<void> {
  const message = { ...project.message, desiredPhase: ProjectPhase.DELETED };
  await tx`
    with ${recorded(tx, change)}
    update projects set deleting_at = ${change.at}, message = ${stored(message)} where id = ${project.id}`;
}

/** Projects whose deletion has begun, the oldest first. */
export async function deletingProjects(sql: Sql, limit: number): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select id from projects where deleting_at is not null order by deleting_at limit ${limit}`;
  return rows.map((row) => row.id);
}

/** One of them, locked; undefined if somebody else is at it. */
export async function claimDeletingProject(
  tx: Tx,
  id: string,
): Promise<{ id: string; organizationId: string; creatorId: string } | undefined> {
  const [row] = await tx<{ organization_id: string; creator_id: string }[]>`
    select organization_id, creator_id from projects where id = ${id} and deleting_at is not null for update skip locked`;
  return row && { id, organizationId: row.organization_id, creatorId: row.creator_id };
}

/** The end of a project and of all that hangs on it, except its environments. */
export async function eraseProject(tx: Tx, id: string, change: Change): Promise<void> {
  await tx`
    with ${recorded(tx, change)},
    ${assignmentsEnded(tx, id, change.at)}
    delete from projects where id = ${id}`;
}

function onRunners(sql: Sql, condition: Fragment): Fragment {
  return sql`exists (select from project_environment_classes k join environment_classes c on c.id = k.class_id
    join runners r on r.id = c.runner_id where k.project_id = p.id and ${condition})`;
}

function filterConditions(sql: Sql, caller: Caller, filter: ListProjectsRequest_Filter | undefined): Fragment[] {
  const conditions = [readsProject(sql, caller), sql`p.deleting_at is null`];
  if (filter?.projectIds.length) conditions.push(oneOf(sql, sql`p.id`, filter.projectIds));
  if (filter?.search) conditions.push(sql`p.search like ${containing(filter.search)}`);
  if (filter?.creatorIds.length) conditions.push(oneOf(sql, sql`p.creator_id`, filter.creatorIds));
  if (filter?.specRemoteUris.length) conditions.push(sql`p.remote_uris && ${filter.specRemoteUris}::text[]`);
  if (filter?.runnerIds.length) conditions.push(onRunners(sql, oneOf(sql, sql`r.id`, filter.runnerIds)));
  if (filter?.runnerKinds.length) {
    const ofKind = onRunners(sql, oneOf(sql, sql`r.kind`, filter.runnerKinds));
    const local = sql`exists (select from project_environment_classes k where k.project_id = p.id and k.class_id is null)`;
    conditions.push(filter.runnerKinds.includes(RunnerKind.LOCAL) ? sql`(${ofKind} or ${local})` : ofKind);
  }
  return conditions;
}

/** Position of a project in the order that was asked for. */
export const projectPosition = (sort: ListProjectsRequest["sort"], project: StoredProject): string =>
  sort?.field === "id" ? project.id : `${project.popularity}/${project.id}`;

function ordering(
  sql: Sql,
  sort: ListProjectsRequest["sort"],
  after: string,
): { order: Fragment; position?: Fragment } {
  const ascending = sort?.order === SortOrder.ASC;
  const direction = ascending ? sql`asc` : sql`desc`;
  const beyond = ascending ? sql`>` : sql`<`;
  if (sort?.field === "id") {
    return { order: sql`p.id ${direction}`, position: after ? sql`p.id ${beyond} ${after}` : undefined };
  }
  const [popularity = "", id = ""] = after.split("/");
  const position = after ? sql`(p.popularity, p.id) ${beyond} (${Number(popularity)}, ${id}::uuid)` : undefined;
  return { order: sql`p.popularity ${direction}, p.id ${direction}`, position };
}

/** Projects that the caller may read, those being deleted left out, one more than the page holds. */
export async function listProjects(
  sql: Sql,
  caller: Caller,
  request: Pick<ListProjectsRequest, "filter" | "sort">,
  page: Page,
): Promise<StoredProject[]> {
  const { order, position } = ordering(sql, request.sort, page.after);
  const conditions = filterConditions(sql, caller, request.filter);
  if (position) conditions.push(position);
  const rows = await sql<ProjectRow[]>`
    select ${columns(sql, caller)} from ${projects(sql)} where ${conjunction(sql, conditions)} order by ${order} limit ${page.limit + 1}`;
  return rows.map(toProject);
}

/** How many the filter matches, counted up to `cap`. */
export async function countProjects(
  sql: Sql,
  caller: Caller,
  filter: ListProjectsRequest_Filter | undefined,
  cap: number,
): Promise<number> {
  const [row] = await sql<{ count: number }[]>`
    select count(*)::int as count from (
      select from projects p where ${conjunction(sql, filterConditions(sql, caller, filter))} limit ${cap}
    ) as matching`;
  return row?.count ?? 0;
}

/** Projects that the caller may read and that hold a repository, which is in its one spelling, the oldest first. */
export async function projectsOfRepository(
  sql: Sql,
  caller: Caller,
  repository: string,
  limit: number,
): Promise<string[]> {
  const rows = await sql<{ id: string }[]>`
    select p.id from projects p
    where p.repositories @> ${[repository]}::text[] and p.deleting_at is null and ${readsProject(sql, caller)}
    order by p.id limit ${limit}`;
  return rows.map((row) => row.id);
}
