import { create, fromBinary } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { LOCAL_RUNNERS_OFF } from "../domain/runner.ts";
import type { Tx } from "./db.ts";
import { orderHalt } from "./halts.ts";
import { type Attribution, record } from "./record.ts";
import { setRunnerStatus } from "./runners.ts";

/** How many runners hear of it at once; the others say so themselves with their next heartbeat. */
const FIRST_RUNNERS = 100;

/**
 * What follows when local runners have been switched off in an organization whose row the caller holds: they turn
 * inactive, and the environments on them are asked to stop. Nothing restarts by itself when they are switched on again.
 */
export async function switchOffLocalRunners(
  tx: Tx,
  organizationId: string,
  by: Attribution,
  touched: (runnerId: string) => void,
): Promise<void> {
  await orderHalt(tx, { subjectId: organizationId, organizationId, createdAt: by.at }, by, touched);
  const runners = await tx<{ id: string; creator_id: string; status: Uint8Array }[]>`
    select id, creator_id, status from runners
    where organization_id = ${organizationId} and kind = ${RunnerKind.LOCAL} and deleted_at is null
      and phase = any(${[RunnerPhase.ACTIVE, RunnerPhase.DEGRADED] as number[]})
    order by id limit ${FIRST_RUNNERS} for no key update`;
  for (const runner of runners) {
    const status = create(RunnerStatusSchema, {
      ...fromBinary(RunnerStatusSchema, runner.status),
      ...{ phase: RunnerPhase.INACTIVE, message: LOCAL_RUNNERS_OFF, updatedAt: timestampFromDate(by.at) },
    });
    await setRunnerStatus(tx, { runnerId: runner.id, status, leaseMs: "keep", contact: false });
    await record(tx, {
      organizationId,
      resourceType: ResourceType.RUNNER,
      resourceId: runner.id,
      operation: ResourceOperation.UPDATE_STATUS,
      creatorId: runner.creator_id,
      runnerId: runner.id,
      at: by.at,
      audit: { id: by.newId(), actor: by.actor, action: "Runner is inactive" },
    });
  }
}
