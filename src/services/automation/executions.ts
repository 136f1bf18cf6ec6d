import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import {
  type EnvironmentAutomationService,
  type TaskExecution,
  TaskExecutionSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { type App, transact } from "../../app.ts";
import { hasEnded, requestExecutionStop } from "../../domain/automation-execution.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  getExecution,
  listExecutions,
  readExecution,
  type StoredExecution,
  saveExecution,
} from "../../store/automation/executions.ts";
import { holdEnvironmentOf } from "../../store/automation/hold.ts";
import { fireBeforeSnapshot } from "../../store/automation/triggers.ts";
import type { Tx } from "../../store/db.ts";
import { noteFirings } from "../../store/environment-steps.ts";
import type { StoredEnvironment } from "../../store/environments.ts";
import type { Attribution } from "../../store/record.ts";
import { byCaller, checkStop, decided } from "./environment.ts";

export const executionMessage = ({ id, metadata, spec, status }: StoredExecution): TaskExecution =>
  create(TaskExecutionSchema, { id, metadata, spec, status });

/**
 * Asks an execution to end, in an environment that the transaction holds; one that has not begun is over at once. True if
 * it was not asked before.
 */
export async function stopExecution(
  tx: Tx,
  environment: StoredEnvironment,
  execution: StoredExecution,
  by: Attribution,
): Promise<boolean> {
  const state = decided(requestExecutionStop(execution, by.at));
  if (!state) return false;
  await saveExecution(tx, execution, state, { ...by, action: "Task execution stop requested" });
  if (hasEnded(state)) await noteFirings(tx, environment, await fireBeforeSnapshot(tx, environment, by), by);
  return true;
}

async function stopTaskExecution(app: App, caller: Caller, id: string): Promise<void> {
  await transact(app, async (tx, touched) => {
    const environment = await holdEnvironmentOf(tx, caller, "task_executions", id);
    checkStop(caller, environment);
    const isNew = await stopExecution(tx, environment, await readExecution(tx, id), byCaller(app, caller));
    if (isNew) touched(environment.metadata.runnerId);
  });
}

/** Runs of tasks. */
export function executions(app: App) {
  return {
    async getTaskExecution({ id }, context) {
      return { taskExecution: executionMessage(await getExecution(app.db.point, principal(context), id)) };
    },
    async listTaskExecutions({ pagination, filter }, context) {
      const caller = principal(context);
      const page = openPage(pagination, ["task executions", caller.id, filter]);
      const { rows, isCut } = await listExecutions(app.db.list, caller, filter, page);
      const { items, nextToken } = closePage(page, rows, (execution) => execution.id, isCut);
      return { taskExecutions: items.map(executionMessage), pagination: { nextToken } };
    },
    async stopTaskExecution({ id }, context) {
      await stopTaskExecution(app, principal(context), id);
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof EnvironmentAutomationService>>;
}
