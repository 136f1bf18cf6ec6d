import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ObjectKind } from "../../../gen/berth/runner/v1/runner_control_pb.js";
import {
  type ListServicesRequest_Filter,
  ServiceMetadataSchema,
  ServicePhase,
  type ServiceSpec,
  ServiceSpecSchema,
  ServiceStatusSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { TriggerName } from "../../domain/automation.ts";
import { requestServiceStart, type ServiceState, serviceSecrets } from "../../domain/automation-service.ts";
import type { Page } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import type { Sql, Tx } from "../db.ts";
import { type Attribution, type Change, recorded } from "../record.ts";
import { revised } from "../runners.ts";
import { type HomeEnvironment, listParts, noSuchPart, type PartRows, readablePart } from "./parts.ts";

/** A service with what is not on the wire. */
export interface StoredService extends ServiceState {
  id: string;
  organizationId: string;
  environmentId: string;
  runnerId: string;
  /** What asked for the session of the spec; empty before the first start. */
  startedBy: TriggerName | "";
  /** Highest report accepted so far. */
  reportEpoch: number;
  reportSeq: number;
}

interface ServiceRow {
  id: string;
  organization_id: string;
  environment_id: string;
  runner_id: string;
  metadata: Uint8Array;
  spec: Uint8Array;
  status: Uint8Array;
  started_by: TriggerName | "";
  report_epoch: number;
  report_seq: number;
}

const columns = (
  sql: Sql | Tx,
) => sql`p.id, p.organization_id, p.environment_id, p.runner_id, p.metadata, p.spec, p.status,
  p.started_by, p.report_epoch, p.report_seq`;

function toService(row: ServiceRow): StoredService {
  return {
    id: row.id,
    organizationId: row.organization_id,
    environmentId: row.environment_id,
    runnerId: row.runner_id,
    metadata: fromBinary(ServiceMetadataSchema, row.metadata),
    spec: fromBinary(ServiceSpecSchema, row.spec),
    status: fromBinary(ServiceStatusSchema, row.status),
    startedBy: row.started_by,
    reportEpoch: row.report_epoch,
    reportSeq: row.report_seq,
  };
}

/** A service of an environment that is not stored yet. */
export const serviceIn = (environment: HomeEnvironment, id: string, state: ServiceState): StoredService => ({
  ...state,
  id,
  organizationId: environment.organizationId,
  environmentId: environment.id,
  runnerId: environment.metadata.runnerId,
  startedBy: "",
  reportEpoch: 0,
  reportSeq: 0,
});

/** A service that the caller may read; NOT_FOUND otherwise. */
export async function getService(sql: Sql, caller: Caller, id: string): Promise<StoredService> {
  const [row] = await sql<ServiceRow[]>`
    select ${columns(sql)} from services p where ${readablePart(sql, caller, id)}`;
  if (!row) throw noSuchPart("services", id);
  return toService(row);
}

/** A service of an environment that the transaction holds; NOT_FOUND if it is gone. */
export async function readService(tx: Tx, id: string): Promise<StoredService> {
  const [row] = await tx<ServiceRow[]>`select ${columns(tx)} from services p where p.id = ${id}`;
  if (!row) throw noSuchPart("services", id);
  return toService(row);
}

/** All services of an environment, at most as many as one may have. */
export async function servicesOf(tx: Tx, environmentId: string): Promise<StoredService[]> {
  const rows = await tx<ServiceRow[]>`
    select ${columns(tx)} from services p where p.environment_id = ${environmentId} order by p.id`;
  return rows.map(toService);
}

/** Services that the caller may read, newest first. */
export async function listServices(
  sql: Sql,
  caller: Caller,
  filter: ListServicesRequest_Filter | undefined,
  page: Page,
): Promise<PartRows<StoredService>> {
  const { rows, isCut } = await listParts<ServiceRow>(sql, caller, {
    part: "services",
    columns: columns(sql),
    bytes: sql`octet_length(p.metadata) + octet_length(p.spec) + octet_length(p.status)`,
    filters: [
      { column: "id", values: filter?.serviceIds },
      { column: "environment_id", values: filter?.environmentIds },
      { column: "reference", values: filter?.references },
    ],
    conditions: filter?.roles.length ? [sql`p.role = any(${filter.roles as number[]}::int[])`] : [],
    page,
  });
  return { rows: rows.map(toService), isCut };
}

/** Services of a runner by id, for the runner itself: these, or a page of all. */
export async function runnerServices(
  sql: Sql,
  runnerId: string,
  ids: readonly string[] | undefined,
  after: string,
  limit: number,
): Promise<StoredService[]> {
  const rows = await sql<ServiceRow[]>`
    select ${columns(sql)} from services p
    where p.runner_id = ${runnerId} and ${ids ? sql`p.id = any(${ids as string[]})` : sql`p.id > ${after}`}
    order by p.id limit ${limit}`;
  return rows.map(toService);
}

function changeOf(service: StoredService, operation: ResourceOperation, by: Attribution, action?: string): Change {
  return {
    organizationId: service.organizationId,
    resourceType: ResourceType.SERVICE,
    resourceId: service.id,
    operation,
    creatorId: service.metadata.creator?.id,
    environmentId: service.environmentId,
    runnerId: service.runnerId,
    at: by.at,
    audit: action ? { id: by.newId(), actor: by.actor, action } : undefined,
  };
}

const secretIds = (spec: ServiceSpec) => serviceSecrets(spec).map(({ secretId }) => secretId);
const revision = (service: StoredService) => ({ kind: ObjectKind.SERVICE, objectId: service.id });

/** Stores a new service, in an environment that the transaction holds. */
export async function insertService(tx: Tx, service: StoredService, by: Attribution): Promise<void> {
  const { id, metadata, spec, status } = service;
  await tx`
    with ${recorded(tx, changeOf(service, ResourceOperation.CREATE, by, "Service created"))},
    ${revised(tx, service.runnerId, revision(service), by.at)}
    insert into services (id, organization_id, environment_id, runner_id, reference, role, phase, desired_phase, secret_ids,
      metadata, spec, status, started_by)
    values (${id}, ${service.organizationId}, ${service.environmentId}, ${service.runnerId}, ${metadata.reference},
      ${metadata.role}, ${status.phase}, ${spec.desiredPhase}, ${secretIds(spec)}::uuid[],
      ${toBinary(ServiceMetadataSchema, metadata)}, ${toBinary(ServiceSpecSchema, spec)}, ${toBinary(ServiceStatusSchema, status)},
      ${service.startedBy})`;
}

/** How a change of a stored service is told; without `action` only a new phase is put down in the audit log. */
export type ServiceAttribution = Attribution & { action?: string };

/**
 * Stores the next state of a service whose environment the transaction holds, with its event, and the runner's revision
 * if its definition is new.
 */
export async function saveService(
  tx: Tx,
  before: StoredService,
  next: ServiceState & Partial<Pick<StoredService, "startedBy" | "reportEpoch" | "reportSeq">>,
  by: ServiceAttribution,
): Promise<StoredService> {
  const { metadata, spec, status } = next;
  const isRedefined = metadata !== before.metadata || spec !== before.spec;
  const operation = isRedefined ? ResourceOperation.UPDATE : ResourceOperation.UPDATE_STATUS;
  const isNewPhase = status.phase !== before.status.phase;
  const action = by.action ?? (isNewPhase ? `Service is ${ServicePhase[status.phase].toLowerCase()}` : undefined);
  const stored = { ...before, ...next };
  await tx`
    with ${recorded(tx, changeOf(stored, operation, by, action))}
    ${isRedefined ? tx`, ${revised(tx, stored.runnerId, revision(stored), by.at)}` : tx``}
    update services set role = ${metadata.role}, phase = ${status.phase}, desired_phase = ${spec.desiredPhase},
      secret_ids = ${secretIds(spec)}::uuid[], metadata = ${toBinary(ServiceMetadataSchema, metadata)}, spec = ${toBinary(ServiceSpecSchema, spec)},
      status = ${toBinary(ServiceStatusSchema, status)}, started_by = ${stored.startedBy},
      report_epoch = ${stored.reportEpoch}, report_seq = ${stored.reportSeq}
    where id = ${stored.id}`;
  return stored;
}

/** Starts a service of an environment that runs, if it can be and is not up or about to; what it is then. */
export async function startService(
  tx: Tx,
  service: StoredService,
  startedBy: TriggerName,
  by: Attribution,
): Promise<StoredService> {
  const move = requestServiceStart(service, by.newId());
  if (move.kind !== "changed") return service;
  return saveService(tx, service, { ...move.next, startedBy }, { ...by, action: "Service start requested" });
}

/** Keeps the place of a report that changed nothing else. */
export async function noteServiceReport(tx: Tx, id: string, epoch: number, seq: number): Promise<void> {
  await tx`update services set report_epoch = ${epoch}, report_seq = ${seq} where id = ${id}`;
}

/** The end of a service; its runner is told. */
export async function removeService(tx: Tx, service: StoredService, by: ServiceAttribution): Promise<void> {
  const action = by.action ?? "Service deleted";
  await tx`
    with ${recorded(tx, changeOf(service, ResourceOperation.DELETE, by, action))},
    ${revised(tx, service.runnerId, { ...revision(service), removed: true }, by.at)}
    delete from services where id = ${service.id}`;
}
