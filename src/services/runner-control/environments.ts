import { create } from "@bufbuild/protobuf";
import {
  type EnvironmentReport,
  ReportResult_Outcome as Outcome,
  type ReportEnvironmentsRequest,
  type ReportResult,
  ReportResultSchema,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentPhase, EnvironmentStatusSchema } from "../../../gen/gitpod/v1/environment_pb.js";
import { type App, attribution, transact, transactOnce } from "../../app.ts";
import { consequences } from "../../domain/automation-environment.ts";
import { Refusal } from "../../domain/errors.ts";
import { isUuid } from "../../domain/ids.ts";
import { applyReport, type Settled } from "../../domain/lifecycle.ts";
import type { Caller } from "../../domain/principal.ts";
import type { Beside } from "../../store/credentials.ts";
import { advanceEnvironment, advanceStatus, isStatusAlone, noteReport } from "../../store/environment-steps.ts";
import {
  lockEnvironment,
  type Reported,
  readReported,
  reportedQuery,
  type StoredEnvironment,
} from "../../store/environments.ts";
import { checkLink } from "./link.ts";

/** What is to be answered, and what becomes of the environment if the report is news. */
interface Judgement {
  result: ReportResult;
  next?: Settled & { reportEpoch: number; reportSeq: number };
}

function judge(
  caller: Caller,
  epoch: number,
  report: EnvironmentReport,
  stored: StoredEnvironment | undefined,
  now: Date,
): Judgement {
  const { environmentId } = report;
  const answer = (outcome: Outcome, state?: Pick<StoredEnvironment, "spec" | "status">): Judgement => {
    const versions = { statusVersion: state?.status.statusVersion, specVersion: state?.spec.specVersion };
    return { result: create(ReportResultSchema, { environmentId, outcome, ...versions }) };
  };
  if (!stored || stored.metadata.runnerId !== caller.id || stored.status.phase === EnvironmentPhase.DELETED) {
    return answer(Outcome.NOT_ASSIGNED);
  }
  const seq = Number(report.seq);
  if (!Number.isSafeInteger(seq)) return answer(Outcome.REJECTED, stored);
  const older = epoch < stored.reportEpoch || (epoch === stored.reportEpoch && seq <= stored.reportSeq);
  if (older) return answer(Outcome.STALE, stored);
  const { result, next } = applyReport(stored, report.status ?? create(EnvironmentStatusSchema), now);
  if (result === "not_assigned") return answer(Outcome.NOT_ASSIGNED);
  if (result === "rejected") return answer(Outcome.REJECTED, stored);
  return { ...answer(Outcome.OK, next), next: { ...next, reportEpoch: epoch, reportSeq: seq } };
}

async function reportEnvironment(
  app: App,
  caller: Caller,
  epoch: number,
  report: EnvironmentReport,
): Promise<ReportResult> {
  return transact(app, async (tx, touched, last) => {
    const stored = await lockEnvironment(tx, report.environmentId);
    const { result, next } = judge(caller, epoch, report, stored, app.now());
    if (!stored || !next) return result;
    const advanced = await advanceEnvironment(tx, stored, next, { ...attribution(app, caller), last });
    // The order counts even where the content is the same: an older report may still be on its way.
    if (!advanced) await noteReport(tx, stored.id, next.reportEpoch, next.reportSeq);
    const isNews = next.changed.spec || next.status.phase === EnvironmentPhase.DELETED;
    if (isNews || consequences(stored, next)) touched(caller.id);
    return result;
  });
}

/**
 * Most reports change the status of an environment that nobody else changes at the time: one statement does, on the
 * condition that the environment still is what has been read. Undefined for every other one.
 */
async function reportStatus(
  app: App,
  caller: Caller,
  epoch: number,
  report: EnvironmentReport,
  { environment, version }: Reported,
): Promise<ReportResult | undefined> {
  const { result, next } = judge(caller, epoch, report, environment, app.now());
  if (!environment || environment.id !== report.environmentId.toLowerCase()) return undefined;
  if (!next || !isStatusAlone(environment, next)) return undefined;
  const by = attribution(app, caller);
  return transactOnce(app, async (sql) =>
    (await advanceStatus(sql, environment, version, next, by)) ? result : undefined,
  );
}

const firstId = ({ items: [first] }: ReportEnvironmentsRequest) =>
  first && isUuid(first.environmentId) ? first.environmentId : null;

/** What ReportEnvironments reads along with the credential of its runner. */
export const besideReport = (request: ReportEnvironmentsRequest): Beside => ({
  query: reportedQuery,
  values: [firstId(request)],
});

/** ReportEnvironments: each report is judged for itself. `beside` is what has been read already. */
export async function reportEnvironments(
  app: App,
  caller: Caller,
  request: ReportEnvironmentsRequest,
  beside?: object,
): Promise<ReportResult[]> {
  const reported = await readReported(app.db.point, caller, firstId(request), beside);
  const { epoch } = checkLink(reported.link, request.linkId);
  const results: ReportResult[] = [];
  for (const item of request.items) {
    // A report that cannot be stored will not get better by being sent again, and must not block the others.
    const rejected = (error: unknown) => {
      if (error instanceof Refusal && error.kind === "invalid_argument")
        return create(ReportResultSchema, { environmentId: item.environmentId, outcome: Outcome.REJECTED });
      throw error;
    };
    const report = async () =>
      (await reportStatus(app, caller, epoch, item, reported)) ?? (await reportEnvironment(app, caller, epoch, item));
    results.push(await report().catch(rejected));
  }
  return results;
}
