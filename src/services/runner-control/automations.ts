import { create } from "@bufbuild/protobuf";
import {
  AutomationReportResultSchema,
  ReportResult_Outcome as Outcome,
  type ReportAutomationsRequest,
  type ServiceReport,
  type TaskExecutionReport,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { ServiceStatusSchema, TaskExecutionStatusSchema } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { type App, actorOf, transact } from "../../app.ts";
import { outputProblems } from "../../domain/automation.ts";
import { isHalted } from "../../domain/automation-environment.ts";
import { acceptExecutionReport, hasEnded } from "../../domain/automation-execution.ts";
import { acceptServiceStatus } from "../../domain/automation-service.ts";
import { Refusal } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { noteExecutionReport, readExecution, saveExecution } from "../../store/automation/executions.ts";
import { lockEnvironmentOf } from "../../store/automation/hold.ts";
import type { Part } from "../../store/automation/parts.ts";
import { noteServiceReport, readService, removeService, saveService } from "../../store/automation/services.ts";
import { fireBeforeSnapshot } from "../../store/automation/triggers.ts";
import type { Tx } from "../../store/db.ts";
import { noteFirings } from "../../store/environment-steps.ts";
import type { StoredEnvironment } from "../../store/environments.ts";

/** What became of a report, and the status version that is stored from now on. */
interface Judgement {
  outcome: Outcome;
  statusVersion?: bigint;
}

const NOT_ASSIGNED: Judgement = { outcome: Outcome.NOT_ASSIGNED };

/** Where a report stands among those of its object. */
interface Place {
  epoch: number;
  seq: number;
}

const isOlder = ({ epoch, seq }: Place, stored: { reportEpoch: number; reportSeq: number }) =>
  epoch < stored.reportEpoch || (epoch === stored.reportEpoch && seq <= stored.reportSeq);

const attribution = (app: App, caller: Caller) => ({ actor: actorOf(caller), newId: app.newId, at: app.now() });

async function judgeService(
  app: App,
  tx: Tx,
  caller: Caller,
  environment: StoredEnvironment,
  report: ServiceReport,
  place: Place,
): Promise<Judgement> {
  const service = await readService(tx, report.id);
  const { statusVersion } = service.status;
  if (isOlder(place, service)) return { outcome: Outcome.STALE, statusVersion };
  const status = report.status ?? create(ServiceStatusSchema);
  const rejected = { outcome: Outcome.REJECTED, statusVersion };
  if (outputProblems(status.output, "output").length > 0) return rejected;
  const move = acceptServiceStatus(service, status, isHalted(environment));
  const [reportEpoch, reportSeq] = [place.epoch, place.seq];
  switch (move.kind) {
    case "refused":
      return rejected;
    case "removed":
      await removeService(tx, service, attribution(app, caller));
      return { outcome: Outcome.OK, statusVersion };
    case "noop":
      // The order counts even where the content is the same: an older report may still be on its way.
      await noteServiceReport(tx, service.id, reportEpoch, reportSeq);
      return { outcome: Outcome.OK, statusVersion };
    case "changed":
      await saveService(tx, service, { ...move.next, reportEpoch, reportSeq }, attribution(app, caller));
      return { outcome: Outcome.OK, statusVersion: move.next.status.statusVersion };
  }
}

async function judgeExecution(
  app: App,
  tx: Tx,
  caller: Caller,
  environment: StoredEnvironment,
  report: TaskExecutionReport,
  place: Place,
): Promise<Judgement & { isNews?: boolean }> {
  const execution = await readExecution(tx, report.id);
  const { statusVersion } = execution.status;
  if (isOlder(place, execution)) return { outcome: Outcome.STALE, statusVersion };
  const { startedAt, completedAt } = report;
  const times = { ...(startedAt && { startedAt }), ...(completedAt && { completedAt }) };
  const status = report.status ?? create(TaskExecutionStatusSchema);
  const move = acceptExecutionReport(execution, status, times, app.now());
  if (move.kind === "refused") return { outcome: Outcome.REJECTED, statusVersion };
  if (move.kind === "noop") {
    await noteExecutionReport(tx, execution.id, place.epoch, place.seq);
    return { outcome: Outcome.OK, statusVersion };
  }
  const by = attribution(app, caller);
  await saveExecution(tx, execution, move.next, by, place);
  const isNews = hasEnded(move.next);
  if (isNews) await noteFirings(tx, environment, await fireBeforeSnapshot(tx, environment, by), by);
  return { outcome: Outcome.OK, statusVersion: move.next.status.statusVersion, isNews };
}

/** Judges one report in a transaction of its own, in which its environment is held. */
async function judged(
  app: App,
  caller: Caller,
  part: Part,
  { id, seq }: { id: string; seq: bigint },
  judge: (tx: Tx, environment: StoredEnvironment, seq: number) => Promise<Judgement & { isNews?: boolean }>,
) {
  const work = transact(app, async (tx, touched): Promise<Judgement> => {
    const environment = await lockEnvironmentOf(tx, part, id);
    if (environment?.metadata.runnerId !== caller.id) return NOT_ASSIGNED;
    if (!Number.isSafeInteger(Number(seq))) return { outcome: Outcome.REJECTED };
    const { isNews, ...judgement } = await judge(tx, environment, Number(seq));
    if (isNews) touched(caller.id);
    return judgement;
  });
  const judgement = await work.catch((error: unknown): Judgement => {
    // It went between two statements.
    if (error instanceof Refusal && error.kind === "not_found") return NOT_ASSIGNED;
    // A report that cannot be stored will not get better by being sent again, and must not block the others.
    if (error instanceof Refusal && error.kind === "invalid_argument") return { outcome: Outcome.REJECTED };
    throw error;
  });
  return create(AutomationReportResultSchema, { id, ...judgement });
}

/** Judges reports one by one; `epoch` is that of the link that they came by. */
export async function reportAutomations(app: App, caller: Caller, epoch: number, request: ReportAutomationsRequest) {
  const services = [];
  for (const report of request.services)
    services.push(
      await judged(app, caller, "services", report, (tx, environment, seq) =>
        judgeService(app, tx, caller, environment, report, { epoch, seq }),
      ),
    );
  const executions = [];
  for (const report of request.executions)
    executions.push(
      await judged(app, caller, "task_executions", report, (tx, environment, seq) =>
        judgeExecution(app, tx, caller, environment, report, { epoch, seq }),
      ),
    );
  return { services, executions };
}
