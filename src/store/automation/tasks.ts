import { fromBinary, toBinary } from "@bufbuild/protobuf";
import {
  type ListTasksRequest_Filter,
  TaskMetadataSchema,
  TaskSpecSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { TaskState } from "../../domain/automation-task.ts";
import type { Page } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import type { Sql, Tx } from "../db.ts";
import { type Attribution, type Change, recorded } from "../record.ts";
import { type HomeEnvironment, listParts, noSuchPart, type PartRows, readablePart } from "./parts.ts";

/** A task with what is not on the wire. Runners learn of tasks by the plans of their executions. */
export interface StoredTask extends TaskState {
  id: string;
  organizationId: string;
  environmentId: string;
}

interface TaskRow {
  id: string;
  organization_id: string;
  environment_id: string;
  depends_on: string[];
  metadata: Uint8Array;
  spec: Uint8Array;
}

const columns = (sql: Sql | Tx) => sql`p.id, p.organization_id, p.environment_id, p.depends_on, p.metadata, p.spec`;

const toTask = (row: TaskRow): StoredTask => ({
  id: row.id,
  organizationId: row.organization_id,
  environmentId: row.environment_id,
  metadata: fromBinary(TaskMetadataSchema, row.metadata),
  spec: fromBinary(TaskSpecSchema, row.spec),
  dependsOn: row.depends_on,
});

/** A task of an environment that is not stored yet. */
export const taskIn = ({ id: environmentId, organizationId }: HomeEnvironment, id: string, state: TaskState) => ({
  ...state,
  id,
  organizationId,
  environmentId,
});

/** A task that the caller may read; NOT_FOUND otherwise. */
export async function getTask(sql: Sql, caller: Caller, id: string): Promise<StoredTask> {
  const [row] = await sql<TaskRow[]>`select ${columns(sql)} from tasks p where ${readablePart(sql, caller, id)}`;
  if (!row) throw noSuchPart("tasks", id);
  return toTask(row);
}

/** All tasks of an environment, at most as many as one may have. */
export async function tasksOf(tx: Tx, environmentId: string): Promise<StoredTask[]> {
  const rows = await tx<TaskRow[]>`
    select ${columns(tx)} from tasks p where p.environment_id = ${environmentId} order by p.id`;
  return rows.map(toTask);
}

/** Tasks that the caller may read, newest first. */
export async function listTasks(
  sql: Sql,
  caller: Caller,
  filter: ListTasksRequest_Filter | undefined,
  page: Page,
): Promise<PartRows<StoredTask>> {
  const { rows, isCut } = await listParts<TaskRow>(sql, caller, {
    part: "tasks",
    columns: columns(sql),
    bytes: sql`octet_length(p.metadata) + octet_length(p.spec)`,
    filters: [
      { column: "id", values: filter?.taskIds },
      { column: "environment_id", values: filter?.environmentIds },
      { column: "reference", values: filter?.references },
    ],
    conditions: [],
    page,
  });
  return { rows: rows.map(toTask), isCut };
}

function changeOf(task: StoredTask, operation: ResourceOperation, by: Attribution, action: string): Change {
  return {
    organizationId: task.organizationId,
    resourceType: ResourceType.TASK,
    resourceId: task.id,
    operation,
    creatorId: task.metadata.creator?.id,
    environmentId: task.environmentId,
    at: by.at,
    audit: { id: by.newId(), actor: by.actor, action },
  };
}

/** Stores a new task, in an environment that the transaction holds. */
export async function insertTask(tx: Tx, task: StoredTask, by: Attribution): Promise<void> {
  const { id, metadata, spec } = task;
  await tx`
    with ${recorded(tx, changeOf(task, ResourceOperation.CREATE, by, "Task created"))}
    insert into tasks (id, organization_id, environment_id, reference, depends_on, metadata, spec)
    values (${id}, ${task.organizationId}, ${task.environmentId}, ${metadata.reference}, ${task.dependsOn as string[]}::uuid[],
      ${toBinary(TaskMetadataSchema, metadata)}, ${toBinary(TaskSpecSchema, spec)})`;
}

/** Stores what is new about a task whose environment the transaction holds. */
export async function saveTask(tx: Tx, task: StoredTask, by: Attribution): Promise<void> {
  await tx`
    with ${recorded(tx, changeOf(task, ResourceOperation.UPDATE, by, "Task updated"))}
    update tasks set depends_on = ${task.dependsOn as string[]}::uuid[], metadata = ${toBinary(TaskMetadataSchema, task.metadata)},
      spec = ${toBinary(TaskSpecSchema, task.spec)}
    where id = ${task.id}`;
}

export async function removeTask(tx: Tx, task: StoredTask, by: Attribution): Promise<void> {
  await tx`
    with ${recorded(tx, changeOf(task, ResourceOperation.DELETE, by, "Task deleted"))}
    delete from tasks where id = ${task.id}`;
}
