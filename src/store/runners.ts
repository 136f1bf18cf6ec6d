import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ObjectKind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type RunnerConfigurationSchema as ConfigurationSchema,
  RunnerConfigurationSchemaSchema,
  RunnerKind,
  type RunnerProvider,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import {
  type ListRunnersRequest_Filter,
  type Runner,
  RunnerPhase,
  RunnerSchema,
  type RunnerSpec,
  RunnerSpecSchema,
  type RunnerStatus,
  RunnerStatusSchema,
} from "../../gen/gitpod/v1/runner_pb.js";
import { notFound } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { administersRunner, readsRunner, usesRunner } from "./access.ts";
import { assignmentsEnded } from "./assignment-rows.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Change, recorded } from "./record.ts";

/** A runner with what the caller may do with it. */
export interface StoredRunner {
  id: string;
  organizationId: string;
  creatorId: string;
  creatorPrincipal: Principal;
  name: string;
  kind: RunnerKind;
  provider: RunnerProvider;
  runnerManagerId: string;
  phase: RunnerPhase;
  desiredPhase: RunnerPhase;
  spec: RunnerSpec;
  status: RunnerStatus;
  configurationSchema?: ConfigurationSchema;
  maxEnvironments?: number;
  /** X25519 key that secrets for it are sealed to. */
  publicKey?: Uint8Array;
  createdAt: Date;
  updatedAt: Date;
  /** Link in force, if the runner has ever registered. */
  linkId?: string;
  epoch: number;
  headRevision: number;
  lastContactAt?: Date;
  /** The caller holds ADMIN, or USER or better; false where the row was read without a caller. */
  administers: boolean;
  uses: boolean;
}

interface RunnerRow {
  id: string;
  organization_id: string;
  creator_id: string;
  creator_principal: Principal;
  name: string;
  kind: RunnerKind;
  provider: RunnerProvider;
  runner_manager_id: string;
  phase: RunnerPhase;
  desired_phase: RunnerPhase;
  spec: Uint8Array;
  status: Uint8Array;
  configuration_schema: Uint8Array | null;
  max_environments: number | null;
  public_key: Uint8Array | null;
  created_at: Date;
  updated_at: Date;
  link_id: string | null;
  epoch: number;
  head_revision: number;
  last_contact_at: Date | null;
  administers: boolean;
  uses: boolean;
}

const columns = (
  sql: Sql | Tx,
) => sql`r.id, r.organization_id, r.creator_id, r.creator_principal, r.name, r.kind, r.provider,
  r.runner_manager_id, r.phase, r.desired_phase, r.spec, r.status, r.configuration_schema, r.max_environments, r.public_key,
  r.created_at, r.updated_at, r.link_id, r.epoch, r.head_revision, r.last_contact_at`;

const rights = (sql: Sql | Tx, caller: Caller) =>
  sql`${administersRunner(sql, caller)} as administers, ${usesRunner(sql, caller)} as uses`;
const noRights = (sql: Sql | Tx) => sql`false as administers, false as uses`;

function toRunner(row: RunnerRow): StoredRunner {
  return {
    id: row.id,
    organizationId: row.organization_id,
    creatorId: row.creator_id,
    creatorPrincipal: row.creator_principal,
    name: row.name,
    kind: row.kind,
    provider: row.provider,
    runnerManagerId: row.runner_manager_id,
    phase: row.phase,
    desiredPhase: row.desired_phase,
    spec: fromBinary(RunnerSpecSchema, row.spec),
    status: fromBinary(RunnerStatusSchema, row.status),
    configurationSchema: row.configuration_schema
      ? fromBinary(RunnerConfigurationSchemaSchema, row.configuration_schema)
      : undefined,
    maxEnvironments: row.max_environments ?? undefined,
    publicKey: row.public_key ?? undefined,
    createdAt: row.created_at,
    updatedAt: row.updated_at,
    linkId: row.link_id ?? undefined,
    epoch: row.epoch,
    headRevision: row.head_revision,
    lastContactAt: row.last_contact_at ?? undefined,
    administers: row.administers,
    uses: row.uses,
  };
}

/** The wire message of a stored runner. */
export function runnerMessage(runner: StoredRunner): Runner {
  return create(RunnerSchema, {
    runnerId: runner.id,
    createdAt: timestampFromDate(runner.createdAt),
    updatedAt: timestampFromDate(runner.updatedAt),
    name: runner.name,
    spec: runner.spec,
    status: runner.status,
    creator: { id: runner.creatorId, principal: runner.creatorPrincipal },
    kind: runner.kind,
    provider: runner.provider,
    runnerManagerId: runner.runnerManagerId,
  });
}

export type NewRunner = Pick<
  StoredRunner,
  | "id"
  | "organizationId"
  | "creatorId"
  | "creatorPrincipal"
  | "name"
  | "kind"
  | "provider"
  | "runnerManagerId"
  | "spec"
  | "status"
  | "createdAt"
>;

export async function insertRunner(
  sql: Sql | Tx,
  runner: NewRunner,
  sealedMetricsPassword: Uint8Array | undefined,
  change: Change,
): Promise<void> {
  await sql`
    with ${recorded(sql, change)}
    insert into runners (id, organization_id, creator_id, creator_principal, name, kind, provider, runner_manager_id, variant,
      desired_phase, phase, spec, status, sealed_metrics_password, created_at, updated_at)
    values (${runner.id}, ${runner.organizationId}, ${runner.creatorId}, ${runner.creatorPrincipal}, ${runner.name}, ${runner.kind},
      ${runner.provider}, ${runner.runnerManagerId}, ${runner.spec.variant}, ${runner.spec.desiredPhase}, ${runner.status.phase},
      ${toBinary(RunnerSpecSchema, runner.spec)}, ${toBinary(RunnerStatusSchema, runner.status)}, ${sealedMetricsPassword},
      ${runner.createdAt}, ${runner.createdAt})`;
}

/** A runner that the caller may read; NOT_FOUND otherwise. `lock` keeps it still until the transaction ends. */
export async function getRunner(sql: Sql | Tx, caller: Caller, id: string, lock = false): Promise<StoredRunner> {
  const [row] = await sql<RunnerRow[]>`
    select ${columns(sql)}, ${rights(sql, caller)} from runners r
    where r.id = ${id} and ${readsRunner(sql, caller)} ${lock ? sql`for update of r` : sql``}`;
  if (!row) throw notFound("runner", id);
  return toRunner(row);
}

/** A runner whose own token authenticated the call, deleted or not. */
export async function getOwnRunner(sql: Sql | Tx, id: string, lock = false): Promise<StoredRunner> {
  const [row] = await sql<RunnerRow[]>`
    select ${columns(sql)}, ${noRights(sql)} from runners r where r.id = ${id} ${lock ? sql`for update` : sql``}`;
  if (!row) throw notFound("runner", id);
  return toRunner(row);
}

/** What a call of a runner has to quote, and whether there is still a runner. */
export type Link = Pick<StoredRunner, "linkId" | "epoch" | "phase">;

export interface LinkRow {
  link_id: string | null;
  epoch: number;
  phase: RunnerPhase;
}

/** Columns of a runner `r`. */
export const linkColumns = (sql: Sql | Tx): Fragment => sql`r.link_id, r.epoch, r.phase`;

export const toLink = (row: LinkRow): Link => ({
  linkId: row.link_id ?? undefined,
  epoch: row.epoch,
  phase: row.phase,
});

/** Runners that the caller may read, newest first, one more than the page holds. */
export async function listRunners(
  sql: Sql,
  caller: Caller,
  filter: ListRunnersRequest_Filter | undefined,
  page: Page,
): Promise<StoredRunner[]> {
  const conditions: Fragment[] = [readsRunner(sql, caller)];
  if (filter?.creatorIds.length) conditions.push(sql`r.creator_id = any(${filter.creatorIds})`);
  if (filter?.kinds.length) conditions.push(sql`r.kind = any(${filter.kinds as number[]})`);
  if (filter?.providers.length) conditions.push(sql`r.provider = any(${filter.providers as number[]})`);
  if (page.after) conditions.push(sql`r.id < ${page.after}`);
  const where = conditions.reduce((all, each) => sql`${all} and ${each}`);
  const rows = await sql<RunnerRow[]>`
    select ${columns(sql)}, ${rights(sql, caller)} from runners r where ${where} order by r.id desc limit ${page.limit + 1}`;
  return rows.map(toRunner);
}

const CONNECTED = [RunnerPhase.ACTIVE, RunnerPhase.DEGRADED] as number[];

/** Runners of the organization on which the caller may run something now, newest first, at most 100. */
export async function connectedRunners(sql: Sql, caller: Caller): Promise<StoredRunner[]> {
  const rows = await sql<RunnerRow[]>`
    select ${columns(sql)}, ${rights(sql, caller)} from runners r
    where r.organization_id = ${caller.organizationId} and r.deleted_at is null and ${usesRunner(sql, caller)}
      and r.phase = any(${CONNECTED}) and r.link_id is not null
    order by r.id desc limit 100`;
  return rows.map(toRunner);
}

/**
 * CTEs `head` and `revision`, which tell a runner that an object changed: they bump its revision and append to its log.
 * The row lock on the runner makes commit order equal revision order, so a reader never skips one. With `given`, the name
 * of a CTE that comes before, only if that has a row.
 */
export function revised(
  tx: Tx,
  runnerId: string,
  { kind, objectId, removed = false }: Omit<Revision, "revision" | "removed"> & { removed?: boolean },
  at: Date,
  given?: Fragment,
): Fragment {
  return tx`head as (
    update runners r set head_revision = r.head_revision + 1 ${given ? tx`from ${given}` : tx``} where r.id = ${runnerId}
    returning r.id, r.head_revision
  ), revision as (
    insert into runner_revisions (runner_id, revision, object_kind, object_id, removed, created_at)
    select id, head_revision, ${kind}, ${objectId}, ${removed}, ${at} from head
  )`;
}

/** Tells every runner of an organization that its policies have changed; their ids. */
export async function policiesRevised(tx: Tx, organizationId: string, at: Date): Promise<string[]> {
  const rows = await tx<{ id: string }[]>`
    with held as (
      select id from runners where organization_id = ${organizationId} and deleted_at is null
        and kind <> ${RunnerKind.LOCAL_CONFIGURATION} order by id for no key update
    ), head as (
      update runners r set head_revision = head_revision + 1 from held where r.id = held.id returning r.id, r.head_revision
    ), revision as (
      insert into runner_revisions (runner_id, revision, object_kind, object_id, removed, created_at)
      select id, head_revision, ${ObjectKind.ORGANIZATION_POLICIES}, ${organizationId}, false, ${at} from head
    )
    select id from head`;
  return rows.map((row) => row.id);
}

/** Tells a runner of a change that the transaction has already made. */
export async function bumpRevision(
  tx: Tx,
  runnerId: string,
  kind: ObjectKind,
  objectId: string,
  at: Date,
  removed = false,
): Promise<void> {
  await tx`with ${revised(tx, runnerId, { kind, objectId, removed }, at)} select`;
}

/** Gives a runner without a process a key pair, whose private half is sealed. */
export async function keepBoxKeys(tx: Tx, runnerId: string, publicKey: Uint8Array, sealedPrivateKey: Uint8Array) {
  await tx`update runners set public_key = ${publicKey}, sealed_private_key = ${sealedPrivateKey} where id = ${runnerId}`;
}

/** Starts a new link: epoch + 1, lease, published facts. */
export async function startLink(
  tx: Tx,
  input: {
    runner: StoredRunner;
    linkId: string;
    status: RunnerStatus;
    schema?: ConfigurationSchema;
    maxEnvironments: number;
    localEnvironmentIds: string[];
    leaseMs: number;
    at: Date;
  },
): Promise<{ epoch: number; leaseExpiresAt: Date }> {
  const { runner, status } = input;
  const [row] = await tx<{ epoch: number; lease_expires_at: Date }[]>`
    update runners set link_id = ${input.linkId}, epoch = epoch + 1, phase = ${status.phase},
      status = ${toBinary(RunnerStatusSchema, status)}, public_key = ${status.publicKey},
      configuration_schema = coalesce(${input.schema && toBinary(RunnerConfigurationSchemaSchema, input.schema)}, configuration_schema),
      max_environments = ${input.maxEnvironments}, local_environment_ids = ${input.localEnvironmentIds}, last_contact_at = now(),
      lease_expires_at = now() + ${input.leaseMs} * interval '1 millisecond', updated_at = ${input.at}
    where id = ${runner.id} returning epoch, lease_expires_at`;
  if (!row) throw notFound("runner", runner.id);
  return { epoch: row.epoch, leaseExpiresAt: row.lease_expires_at };
}

/** Writes what a heartbeat or a lost lease means for the runner itself. */
export async function setRunnerStatus(
  tx: Tx,
  input: { runnerId: string; status: RunnerStatus; leaseMs: number | "keep"; contact: boolean },
): Promise<Date | null> {
  const lease =
    input.leaseMs === "keep" ? tx`lease_expires_at` : tx`now() + ${input.leaseMs} * interval '1 millisecond'`;
  const [row] = await tx<{ lease_expires_at: Date | null }[]>`
    update runners set phase = ${input.status.phase}, status = ${toBinary(RunnerStatusSchema, input.status)},
      lease_expires_at = ${lease},
      last_contact_at = ${input.contact ? tx`now()` : tx`last_contact_at`}
    where id = ${input.runnerId} returning lease_expires_at`;
  return row?.lease_expires_at ?? null;
}

/**
 * Notes of runners whose lease is over that they are lost, and returns them locked; others that look at the same time
 * skip them.
 */
export async function claimLostRunners(tx: Tx, limit: number): Promise<StoredRunner[]> {
  const rows = await tx<RunnerRow[]>`
    update runners r set lost_at = date_trunc('milliseconds', coalesce(r.last_contact_at, now()))
    from (
      select id from runners where lease_expires_at < now() and deleted_at is null
      order by lease_expires_at limit ${limit} for update skip locked
    ) due
    where r.id = due.id returning ${columns(tx)}, ${noRights(tx)}`;
  return rows.map(toRunner);
}

/** A runner whose environments have to learn that it is lost, or that it is back. */
export interface Lapse {
  runnerId: string;
  lostAt: Date;
}

/** Lapses that the environments may not all know of, by id of the runner. */
export async function openLapses(sql: Sql, after: string, limit: number): Promise<Lapse[]> {
  const rows = await sql<{ id: string; lost_at: Date }[]>`
    select id, lost_at from runners
    where lost_at is not null and lease_expires_at is not null and deleted_at is null and id > ${after}
    order by id limit ${limit}`;
  return rows.map((row) => ({ runnerId: row.id, lostAt: row.lost_at }));
}

/** Since when a runner is out of contact; undefined while its lease is in force. */
export async function lostSince(sql: Sql | Tx, runnerId: string): Promise<Date | undefined> {
  const [row] = await sql<{ lost_at: Date }[]>`
    select lost_at from runners where id = ${runnerId} and lost_at is not null and coalesce(lease_expires_at < now(), true)`;
  return row?.lost_at;
}

/**
 * All environments know of a lapse: the expired lease goes, or, if the runner is back, the lapse. A runner that was
 * lost, or came back, meanwhile is left for the next look.
 */
export async function closeLapse(sql: Sql, { runnerId, lostAt }: Lapse, isBack: boolean): Promise<void> {
  await (isBack
    ? sql`update runners set lost_at = null where id = ${runnerId} and lost_at = ${lostAt} and lease_expires_at >= now()`
    : sql`update runners set lease_expires_at = null where id = ${runnerId} and lost_at = ${lostAt} and lease_expires_at < now()
        and phase <> all(${CONNECTED})`);
}

/** Runners that were told to go before `before` and have not said goodbye, locked. */
export async function claimSilentDeletions(tx: Tx, before: Date, limit: number): Promise<StoredRunner[]> {
  const rows = await tx<RunnerRow[]>`
    select ${columns(tx)}, ${noRights(tx)} from runners r
    where r.deleting_at < ${before} and r.deleted_at is null order by r.deleting_at limit ${limit} for update skip locked`;
  return rows.map(toRunner);
}

export async function markDeleting(tx: Tx, runner: StoredRunner, at: Date): Promise<void> {
  await tx`
    update runners set phase = ${RunnerPhase.DELETING}, desired_phase = ${RunnerPhase.DELETED}, deleting_at = ${at}, updated_at = ${at},
      spec = ${toBinary(RunnerSpecSchema, runner.spec)}, status = ${toBinary(RunnerStatusSchema, runner.status)}
    where id = ${runner.id}`;
}

/**
 * The end of a runner: its row stays as a tombstone, everything that opens it or hangs on it goes, and whoever could see
 * its classes is told that they are gone, as is whoever could see a project that offered them.
 */
export async function markDeleted(tx: Tx, runnerId: string, at: Date): Promise<void> {
  await tx`
    with gone as (
      update runners set phase = ${RunnerPhase.DELETED}, desired_phase = ${RunnerPhase.DELETED}, deleted_at = ${at}, updated_at = ${at},
        lease_expires_at = null, lost_at = null, link_id = null where id = ${runnerId} returning organization_id, creator_id
    ), credentials as (delete from tokens where runner_id = ${runnerId} or subject_id = ${runnerId}),
    ${assignmentsEnded(tx, runnerId, at)},
    revisions as (delete from runner_revisions where runner_id = ${runnerId}),
    calls as (delete from runner_calls where runner_id = ${runnerId}),
    host_credentials as (delete from host_tokens where runner_id = ${runnerId} returning id, subject_id),
    readers as (
      select array(select member.member_id from role_assignments share join group_members member on member.group_id = share.group_id
        where share.resource_id = ${runnerId} union select creator_id from gone) as ids
    ), classes as (delete from environment_classes where runner_id = ${runnerId} returning id),
    offering as (
      select distinct p.id, p.organization_id, p.creator_id from projects p
      join project_environment_classes offer on offer.project_id = p.id join environment_classes c on c.id = offer.class_id
      where c.runner_id = ${runnerId}
    ), project_events as (
      insert into events (organization_id, resource_type, resource_id, operation, creator_id, created_at)
      select organization_id, type, id, ${ResourceOperation.UPDATE}, creator_id, ${at}
      from offering, unnest(${[ResourceType.PROJECT, ResourceType.PROJECT_ENVIRONMENT_CLASS]}::int[]) as type
    ),
    integrations as (delete from scm_integrations where runner_id = ${runnerId} returning id),
    ended as (
      select ${ResourceType.ENVIRONMENT_CLASS}::smallint as type, classes.id, null::uuid as owner, readers.ids from classes, readers
      union all select ${ResourceType.RUNNER_SCM_INTEGRATION}, integrations.id, null, readers.ids from integrations, readers
      union all select ${ResourceType.HOST_AUTHENTICATION_TOKEN}, id, subject_id, array[subject_id] from host_credentials
    )
    insert into events (organization_id, runner_id, resource_type, resource_id, operation, creator_id, readers, created_at)
    select gone.organization_id, ${runnerId}, ended.type, ended.id, ${ResourceOperation.DELETE}, ended.owner, ended.ids, ${at}
    from gone, ended`;
}

/** Environments of a runner that are not deleted, in any state. */
export async function countEnvironments(sql: Sql | Tx, runnerId: string): Promise<number> {
  const [row] = await sql<{ count: number }[]>`
    select count(*)::int as count from environments where runner_id = ${runnerId} and deleted_at is null`;
  return row?.count ?? 0;
}

/** One change that a runner has to learn about. */
export interface Revision {
  revision: number;
  kind: ObjectKind;
  objectId: string;
  removed: boolean;
}

/** Changes after `after`, in order; undefined when the log no longer reaches back that far. */
export async function readRevisions(
  sql: Sql,
  runnerId: string,
  after: number,
  limit: number,
): Promise<{ head: number; revisions: Revision[] } | undefined> {
  const rows = await sql<
    { head: number; revision: number | null; object_kind: ObjectKind; object_id: string; removed: boolean }[]
  >`
    select r.head_revision as head, l.revision, l.object_kind, l.object_id, l.removed
    from runners r left join lateral (
      select * from runner_revisions v where v.runner_id = r.id and v.revision > ${after} order by v.revision limit ${limit}
    ) l on true where r.id = ${runnerId} order by l.revision`;
  const head = rows[0]?.head ?? 0;
  if (after > head) return undefined;
  const revisions = rows.flatMap((row) =>
    row.revision === null
      ? []
      : [{ revision: row.revision, kind: row.object_kind, objectId: row.object_id, removed: row.removed }],
  );
  // Revisions grow by one, so a log that was cut shows in its numbers.
  const isComplete = revisions.every((each, index) => each.revision === after + 1 + index);
  const reachesBack = after === head || (revisions.length > 0 && isComplete);
  return reachesBack ? { head, revisions } : undefined;
}
