import { toBinary } from "@bufbuild/protobuf";
import { ObjectKind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { consequences } from "../domain/automation-environment.ts";
import { archivableSince, type EnvironmentState, triggersFired } from "../domain/lifecycle.ts";
import { TokenKind } from "../domain/tokens.ts";
import { assignmentsEnded } from "./assignment-rows.ts";
import { followEnvironment } from "./automation/environment.ts";
import type { Firing } from "./automation/triggers.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { encodeFacts, nextDueAt, optionalDate, type StoredEnvironment, searchText } from "./environments.ts";
import { ranProject } from "./project-usage.ts";
import { type Attribution, recorded, recordedIf } from "./record.ts";
import { revised } from "./runners.ts";
import { assemble, pieces, run } from "./statement.ts";

// Steps of environments from one state to the next, with all that has to be written along with them.

/** Phases in which no process of an environment is left, and its own token opens nothing any more. */
const HALTED: ReadonlySet<EnvironmentPhase> = new Set([EnvironmentPhase.STOPPED, EnvironmentPhase.DELETING]);

function same(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}

type Next = EnvironmentState & { reportEpoch?: number; reportSeq?: number };

/** A step as watchers and, with an `action` or a new overall phase, the audit log are told of it. */
function stepOf(
  before: StoredEnvironment,
  next: Next,
  operation: ResourceOperation,
  by: Attribution & { action?: string },
) {
  const { metadata, status } = next;
  const phase =
    status.phase === before.status.phase ? undefined : `Environment is ${EnvironmentPhase[status.phase].toLowerCase()}`;
  const action = by.action ?? phase;
  return {
    ...{
      organizationId: before.organizationId,
      resourceType: ResourceType.ENVIRONMENT,
      resourceId: before.id,
      operation,
    },
    ...{ creatorId: metadata.creator?.id, environmentId: before.id, runnerId: metadata.runnerId, at: by.at },
    audit: action ? { id: by.newId(), actor: by.actor, action } : undefined,
  };
}

/** Assignments that write the status and all that depends on it. */
const statusColumns = (sql: Sql | Tx, before: StoredEnvironment, next: Next): Fragment => sql`
  phase = ${next.status.phase}, search = ${searchText(before.id, next)}, status = ${toBinary(EnvironmentStatusSchema, next.status)},
  facts = ${encodeFacts(next.facts)}, report_epoch = ${next.reportEpoch ?? before.reportEpoch},
  report_seq = ${next.reportSeq ?? before.reportSeq}, due_at = ${nextDueAt(next)}, archivable_since = ${archivableSince(next)}`;

/**
 * Writes the next state of an environment that this transaction holds locked, with its event, its audit entry and, if
 * the runner has to act, the runner's revision. Nothing is written when nothing changed. `action` is the audit text for
 * people; without it an entry is written only when the overall phase changes. Its services and executions follow. `last`
 * is given if nothing more is to come in the transaction (see `Db.begin`).
 */
export async function advanceEnvironment(
  tx: Tx,
  before: StoredEnvironment,
  next: Next,
  by: Attribution & { action?: string; last?: (statement: Promise<unknown>) => void },
): Promise<boolean> {
  const { id, organizationId } = before;
  const { metadata, spec, status } = next;
  const metadataBytes = metadata === before.metadata ? undefined : toBinary(EnvironmentMetadataSchema, metadata);
  const specChanged = spec.specVersion !== before.spec.specVersion;
  const metadataChanged =
    metadataBytes !== undefined && !same(metadataBytes, toBinary(EnvironmentMetadataSchema, before.metadata));
  const statusChanged = status.statusVersion !== before.status.statusVersion;
  const phaseChanged = status.phase !== before.status.phase;
  const silent = !specChanged && !metadataChanged && !statusChanged;
  if (silent && encodeFacts(next.facts) === encodeFacts(before.facts)) return false;

  const deleted = phaseChanged && status.phase === EnvironmentPhase.DELETED;
  const operation = deleted
    ? ResourceOperation.DELETE
    : specChanged || metadataChanged
      ? ResourceOperation.UPDATE
      : ResourceOperation.UPDATE_STATUS;
  const told = silent ? pieces`quiet as (select)` : recorded(pieces, stepOf(before, next, operation, by));
  const object = { kind: ObjectKind.ENVIRONMENT, objectId: id, removed: deleted };
  const revision = specChanged || deleted ? pieces`, ${revised(pieces, metadata.runnerId, object, by.at)}` : pieces``;
  const tokens = deleted
    ? pieces`, tokens_gone as (delete from tokens where environment_id = ${id} or subject_id = ${id}),
      ${assignmentsEnded(pieces, id, by.at)}`
    : phaseChanged && HALTED.has(status.phase)
      ? pieces`, tokens_gone as (delete from tokens where environment_id = ${id} and kind = ${TokenKind.ENVIRONMENT})`
      : pieces``;
  const { projectId } = metadata;
  const ran = projectId
    ? ranProject(pieces, { id, organizationId, projectId }, before.facts.runningSince, next.facts.runningSince, by.at)
    : pieces``;
  const newMetadata = metadataBytes
    ? pieces`archived_at = ${optionalDate(metadata.archivedAt)}, lockdown_at = ${optionalDate(metadata.lockdownAt)},
      metadata = ${metadataBytes},`
    : pieces``;
  const newSpec =
    spec === before.spec
      ? pieces``
      : pieces`desired_phase = ${spec.desiredPhase}, admission = ${spec.admission}, spec = ${toBinary(EnvironmentSpecSchema, spec)},`;
  const update = pieces`
    with ${told} ${revision} ${tokens} ${ran}
    update environments set ${newMetadata} ${newSpec} ${statusColumns(pieces, before, next)},
      deleted_at = ${status.phase === EnvironmentPhase.DELETED ? pieces`coalesce(deleted_at, ${by.at})` : pieces`null`}
    where id = ${id}`;
  const stored = { ...before, ...next };
  const written = run(tx, assemble(update));
  if (by.last && !consequences(before, stored)) {
    by.last(written);
    return true;
  }
  await written;
  await noteFirings(tx, stored, await followEnvironment(tx, before, stored, by), by);
  return true;
}

/** Whether a step changes the status alone, and nothing else has to be written with it or follows from it. */
export function isStatusAlone(before: StoredEnvironment, next: EnvironmentState): boolean {
  const { metadata, spec, status, facts } = next;
  const isEnd = HALTED.has(status.phase) || status.phase === EnvironmentPhase.DELETED;
  const isRun = Boolean(facts.runningSince) !== Boolean(before.facts.runningSince);
  const isAlone = metadata === before.metadata && spec === before.spec;
  const isNew = status.statusVersion !== before.status.statusVersion;
  return isAlone && isNew && !isEnd && !(isRun && metadata.projectId) && !consequences(before, next);
}

/**
 * As `advanceEnvironment`, for a step that changes the status alone, and for an environment that nobody holds: one
 * statement, which needs no transaction around it. False if the environment is not any more in the version that was read.
 */
export async function advanceStatus(
  sql: Sql,
  before: StoredEnvironment,
  version: string,
  next: Next,
  by: Attribution,
): Promise<boolean> {
  const step = stepOf(before, next, ResourceOperation.UPDATE_STATUS, by);
  const update = pieces`
    with changed as (
      update environments set ${statusColumns(pieces, before, next)} where id = ${before.id} and xmin::text = ${version}
      returning id
    ), ${recordedIf(pieces, pieces`changed`, step)}
    select id from changed`;
  return (await run(sql, assemble(update))).length > 0;
}

/** Lets users see what triggers that have fired had to leave out, in the transaction that holds the environment. */
export async function noteFirings(
  tx: Tx,
  environment: StoredEnvironment,
  firings: readonly Firing[],
  { actor, newId, at }: Attribution,
): Promise<void> {
  const move = triggersFired(environment, firings, at);
  if (move.kind === "changed") await advanceEnvironment(tx, environment, move.next, { actor, newId, at });
}

/** Keeps the place of a report that changed nothing else. */
export async function noteReport(tx: Tx, id: string, epoch: number, seq: number): Promise<void> {
  await tx`update environments set report_epoch = ${epoch}, report_seq = ${seq} where id = ${id}`;
}
