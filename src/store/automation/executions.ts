import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { ObjectKind } from "../../../gen/berth/runner/v1/runner_control_pb.js";
import {
  type ListTaskExecutionsRequest_Filter,
  TaskExecutionMetadataSchema,
  TaskExecutionPhase,
  TaskExecutionSpecSchema,
  TaskExecutionStatusSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { ExecutionState } from "../../domain/automation-execution.ts";
import { plannedSecrets } from "../../domain/automation-plan.ts";
import type { Page } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { oneOf } from "../conditions.ts";
import type { Fragment, Sql, Tx } from "../db.ts";
import { type Attribution, type Change, recorded } from "../record.ts";
import { revised } from "../runners.ts";
import { listParts, noSuchPart, type PartRows, readablePart } from "./parts.ts";

/** Executions of one task that are kept, counted without those that have not ended. */
const KEPT_PER_TASK = 50;

/** An execution with what is not on the wire. */
export interface StoredExecution extends ExecutionState {
  id: string;
  organizationId: string;
  runnerId: string;
  /** The firing of a trigger that made it; empty for a manual start. */
  firingId: string;
  /** Highest report accepted so far. */
  reportEpoch: number;
  reportSeq: number;
}

interface ExecutionRow {
  id: string;
  organization_id: string;
  runner_id: string;
  firing_id: string | null;
  metadata: Uint8Array;
  spec: Uint8Array;
  status: Uint8Array;
  report_epoch: number;
  report_seq: number;
}

const columns = (sql: Sql | Tx) => sql`p.id, p.organization_id, p.runner_id, p.firing_id, p.metadata, p.spec, p.status,
  p.report_epoch, p.report_seq`;

const toExecution = (row: ExecutionRow): StoredExecution => ({
  id: row.id,
  organizationId: row.organization_id,
  runnerId: row.runner_id,
  firingId: row.firing_id ?? "",
  metadata: fromBinary(TaskExecutionMetadataSchema, row.metadata),
  spec: fromBinary(TaskExecutionSpecSchema, row.spec),
  status: fromBinary(TaskExecutionStatusSchema, row.status),
  reportEpoch: row.report_epoch,
  reportSeq: row.report_seq,
});

/** An execution that the caller may read; NOT_FOUND otherwise. */
export async function getExecution(sql: Sql, caller: Caller, id: string): Promise<StoredExecution> {
  const [row] = await sql<ExecutionRow[]>`
    select ${columns(sql)} from task_executions p where ${readablePart(sql, caller, id)}`;
  if (!row) throw noSuchPart("task_executions", id);
  return toExecution(row);
}

/** An execution in an environment that the transaction holds; NOT_FOUND if it is gone. */
export async function readExecution(tx: Tx, id: string): Promise<StoredExecution> {
  const [row] = await tx<ExecutionRow[]>`select ${columns(tx)} from task_executions p where p.id = ${id}`;
  if (!row) throw noSuchPart("task_executions", id);
  return toExecution(row);
}

/**
 * Ids of executions of an environment that have not ended, the oldest first; with `taskId` those of one task. Together
 * their plans may be large, so they are read one by one.
 */
export async function unfinishedIds(tx: Tx, environmentId: string, taskId?: string): Promise<string[]> {
  const rows = await tx<{ id: string }[]>`
    select id from task_executions
    where environment_id = ${environmentId} and completed_at is null ${taskId ? tx`and task_id = ${taskId}` : tx``}
    order by id`;
  return rows.map(({ id }) => id);
}

/** How many executions of an environment have not ended; with `startedBy` of those that it started. */
export async function countUnfinished(tx: Tx, environmentId: string, startedBy?: string): Promise<number> {
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from task_executions
    where environment_id = ${environmentId} and completed_at is null ${startedBy ? tx`and started_by = ${startedBy}` : tx``}`;
  return row?.count ?? 0;
}

/** Executions that the caller may read, newest first. */
export async function listExecutions(
  sql: Sql,
  caller: Caller,
  filter: ListTaskExecutionsRequest_Filter | undefined,
  page: Page,
): Promise<PartRows<StoredExecution>> {
  const { rows, isCut } = await listParts<ExecutionRow>(sql, caller, {
    part: "task_executions",
    columns: columns(sql),
    bytes: sql`octet_length(p.spec) + octet_length(p.status)`,
    filters: [
      { column: "task_id", values: filter?.taskIds },
      { column: "environment_id", values: filter?.environmentIds },
      { column: "task_reference", values: filter?.taskReferences },
    ],
    conditions: filter?.phases.length ? [oneOf(sql, sql`p.phase`, filter.phases)] : [],
    page,
  });
  return { rows: rows.map(toExecution), isCut };
}

/** Executions of a runner by id, for the runner itself: these, or a page of those that have not ended. */
export async function runnerExecutions(
  sql: Sql,
  runnerId: string,
  ids: readonly string[] | undefined,
  after: string,
  limit: number,
): Promise<StoredExecution[]> {
  const which = ids ? sql`p.id = any(${ids as string[]})` : sql`p.id > ${after} and p.completed_at is null`;
  const rows = await sql<ExecutionRow[]>`
    select ${columns(sql)} from task_executions p where p.runner_id = ${runnerId} and ${which} order by p.id limit ${limit}`;
  return rows.map(toExecution);
}

function changeOf(execution: StoredExecution, operation: ResourceOperation, by: Attribution, action?: string): Change {
  return {
    organizationId: execution.organizationId,
    resourceType: ResourceType.TASK_EXECUTION,
    resourceId: execution.id,
    operation,
    creatorId: execution.metadata.creator?.id,
    environmentId: execution.metadata.environmentId,
    runnerId: execution.runnerId,
    at: by.at,
    audit: action ? { id: by.newId(), actor: by.actor, action } : undefined,
  };
}

const revision = (execution: StoredExecution) => ({ kind: ObjectKind.TASK_EXECUTION, objectId: execution.id });
const completedAt = ({ metadata }: ExecutionState) => metadata.completedAt && timestampDate(metadata.completedAt);

/** CTEs that delete executions and tell whoever watches their environments. */
const removed = (sql: Sql | Tx, which: Fragment, at: Date): Fragment => sql`
  gone as (delete from task_executions where id in (${which}) returning id, organization_id, environment_id),
  gone_events as (
    insert into events (organization_id, environment_id, resource_type, resource_id, operation, created_at)
    select organization_id, environment_id, ${ResourceType.TASK_EXECUTION}, id, ${ResourceOperation.DELETE}, ${at} from gone
  )`;

/** Stores a new execution, in an environment that the transaction holds; the oldest of its task make room for it. */
export async function insertExecution(
  tx: Tx,
  execution: StoredExecution,
  taskReference: string,
  by: Attribution,
): Promise<void> {
  const { id, metadata, spec, status } = execution;
  const surplus = tx`select id from task_executions where task_id = ${metadata.taskId} and completed_at is not null
    order by id desc offset ${KEPT_PER_TASK - 1}`;
  await tx`
    with ${recorded(tx, changeOf(execution, ResourceOperation.CREATE, by, "Task execution created"))},
    ${revised(tx, execution.runnerId, revision(execution), by.at)}, ${removed(tx, surplus, by.at)}
    insert into task_executions (id, organization_id, environment_id, runner_id, task_id, task_reference, started_by, firing_id,
      phase, desired_phase, completed_at, secret_ids, metadata, spec, status)
    values (${id}, ${execution.organizationId}, ${metadata.environmentId}, ${execution.runnerId}, ${metadata.taskId},
      ${taskReference}, ${metadata.startedBy}, ${execution.firingId || null}, ${status.phase}, ${spec.desiredPhase},
      ${completedAt(execution)}, ${plannedSecrets(spec)}::uuid[], ${toBinary(TaskExecutionMetadataSchema, metadata)},
      ${toBinary(TaskExecutionSpecSchema, spec)}, ${toBinary(TaskExecutionStatusSchema, status)})`;
}

/** How a change of a stored execution is told; without `action` only a new phase is put down in the audit log. */
export type ExecutionAttribution = Attribution & { action?: string };

/**
 * Stores the next state of an execution whose environment the transaction holds, with its event, and the runner's
 * revision if something else is wanted of it. `report` is the place of the report that it comes from.
 */
export async function saveExecution(
  tx: Tx,
  before: StoredExecution,
  next: ExecutionState,
  by: ExecutionAttribution,
  report: { epoch: number; seq: number } = { epoch: before.reportEpoch, seq: before.reportSeq },
): Promise<void> {
  const { id, runnerId } = before;
  const { metadata, spec, status } = next;
  const isRedefined = spec !== before.spec;
  const operation = isRedefined ? ResourceOperation.UPDATE : ResourceOperation.UPDATE_STATUS;
  const isNewPhase = status.phase !== before.status.phase;
  const phase = `Task execution is ${TaskExecutionPhase[status.phase].toLowerCase()}`;
  const action = by.action ?? (isNewPhase ? phase : undefined);
  const desired = tx`, desired_phase = ${spec.desiredPhase}, spec = ${toBinary(TaskExecutionSpecSchema, spec)}`;
  await tx`
    with ${recorded(tx, changeOf(before, operation, by, action))}
    ${isRedefined ? tx`, ${revised(tx, runnerId, revision(before), by.at)}` : tx``}
    update task_executions set phase = ${status.phase}, completed_at = ${completedAt(next)},
      metadata = ${toBinary(TaskExecutionMetadataSchema, metadata)}, status = ${toBinary(TaskExecutionStatusSchema, status)},
      report_epoch = ${report.epoch}, report_seq = ${report.seq} ${isRedefined ? desired : tx``}
    where id = ${id}`;
}

/** Keeps the place of a report that changed nothing else. */
export async function noteExecutionReport(tx: Tx, id: string, epoch: number, seq: number): Promise<void> {
  await tx`update task_executions set report_epoch = ${epoch}, report_seq = ${seq} where id = ${id}`;
}

/** Removes executions that ended before `before`, at most `limit`; returns how many. */
export async function purgeExecutions(sql: Sql, before: Date, at: Date, limit: number): Promise<number> {
  const old = sql`select id from task_executions where completed_at < ${before} order by completed_at limit ${limit} for update skip locked`;
  const [row] = await sql<{ count: number }[]>`
    with ${removed(sql, old, at)} select count(*)::int as count from gone`;
  return row?.count ?? 0;
}
