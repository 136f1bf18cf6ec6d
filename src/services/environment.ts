import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { ActionableErrorDetailsSchema } from "../../gen/gitpod/v1/actionable_error_pb.js";
import type {
  EnvironmentService,
  EnvironmentSpec_Secret,
  ListEnvironmentsRequest,
} from "../../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  EnvironmentMaxLifetimeExceededDetailsSchema,
  type OrganizationPolicies,
  PolicyEnforcedFailedPreconditionDetailsSchema,
} from "../../gen/gitpod/v1/organization_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, transact } from "../app.ts";
import { requiredKernelControls, strengthened } from "../domain/environment.ts";
import { denied, precondition, Refusal } from "../domain/errors.ts";
import {
  isLockedDown,
  markActive,
  requestArchive,
  requestDelete,
  requestStart,
  requestStop,
  requestUnarchive,
  type Transition,
} from "../domain/lifecycle.ts";
import { COUNT_CAP, closePage, countAnswer, openPage } from "../domain/pages.ts";
import { policyRefusal } from "../domain/policies.ts";
import type { Caller } from "../domain/principal.ts";
import { TokenKind } from "../domain/tokens.ts";
import { currentSecrets } from "../environment-secrets.ts";
import { principal, readBeside } from "../rpc/authenticate.ts";
import type { Tx } from "../store/db.ts";
import {
  countEnvironments,
  countForQuota,
  countRunningOnRunner,
  getEnvironment,
  holdRunner,
  listEnvironments,
  listPosition,
  type StoredEnvironment,
} from "../store/environments.ts";
import { readPolicies } from "../store/organizations.ts";
import { getOwnRunner, getRunner, type StoredRunner } from "../store/runners.ts";
import { createEnvironment } from "./environment/create.ts";
import { createEnvironmentFromProject } from "./environment/from-project.ts";
import { checkCapacity, checkQuotas, checkRunner, quotaUse } from "./environment/limits.ts";
import { allow, apply } from "./environment/move.ts";
import { readEnvironment } from "./environment/read.ts";
import { issuePortToken, issueToken, mayReachPort } from "./environment/tokens.ts";
import { updateEnvironment } from "./environment/update.ts";
import { shown } from "./environment/view.ts";

async function startEnvironment(app: App, caller: Caller, id: string): Promise<void> {
  const { policies, localRunners } = await readPolicies(app.db.point, caller.organizationId);
  await transact(app, async (tx, touched) => {
    const stored = await getEnvironment(tx, caller, id, true);
    allow(stored.relation.owner, "start");
    const { runnerId } = stored.metadata;
    const runner = await findRunner(tx, caller, runnerId);
    // Whoever may use a runner, nobody may any more when it is gone: then the state of the environment is the answer.
    if (!runner.uses && runner.phase !== RunnerPhase.DELETED) {
      throw denied("starting this environment needs the role user on its runner");
    }
    const kernelControls = strengthened(stored.spec.kernelControlsConfig, requiredKernelControls(policies));
    const started = (secrets: EnvironmentSpec_Secret[]) =>
      requestStart(stored, { machineSession: app.newId(), secrets, kernelControls }, app.now());
    let start = started(stored.spec.secrets);
    if (start.kind === "changed") {
      refuseLockedDown(stored, policies, app.now());
      checkRunner(runner, localRunners);
      const creator = stored.metadata.creator;
      const limited = creator?.principal === Principal.USER;
      const starter = { id: creator?.id ?? "", organizationId: stored.organizationId, limited };
      checkQuotas(await quotaUse(tx, starter, policies), policies, false);
      await holdRunner(tx, runnerId);
      checkCapacity(await countRunningOnRunner(tx, runnerId), runner.maxEnvironments);
      start = started(await currentSecrets(app, tx, stored, true));
    }
    if (await apply(app, tx, caller, stored, start, "Environment started")) touched(runnerId);
  });
}

/** The runner of an environment with the caller's rights on it; one that the caller cannot see gives none. */
async function findRunner(tx: Tx, caller: Caller, runnerId: string): Promise<StoredRunner> {
  return getRunner(tx, caller, runnerId).catch((error: unknown) => {
    if (error instanceof Refusal && error.kind === "not_found") return getOwnRunner(tx, runnerId);
    throw error;
  });
}

function refuseLockedDown(stored: StoredEnvironment, policies: OrganizationPolicies, now: Date): void {
  if (!isLockedDown(stored, policies.maximumEnvironmentLifetimeStrict, now)) return;
  const message = "the lifetime of this environment is over";
  const policyName = "maximum_environment_lifetime_strict";
  const value = create(EnvironmentMaxLifetimeExceededDetailsSchema, {
    expiredAt: stored.metadata.lockdownAt,
    policyValue: policies.maximumEnvironmentLifetime,
  });
  throw precondition(message, [
    { desc: ActionableErrorDetailsSchema, value: { errorCode: policyName, userMessage: message } },
    {
      desc: PolicyEnforcedFailedPreconditionDetailsSchema,
      value: { message, policyName, details: { case: "maxLifetimeExceeded", value } },
    },
  ]);
}

/** A request that needs a right, a rule of the state machine, and nothing else. */
async function request(
  app: App,
  caller: Caller,
  id: string,
  allowed: (stored: StoredEnvironment) => boolean,
  verb: string,
  move: (stored: StoredEnvironment) => Transition,
  action?: string,
): Promise<Record<string, never>> {
  await transact(app, async (tx, touched) => {
    const stored = await getEnvironment(tx, caller, id, true);
    allow(allowed(stored), verb);
    if (await apply(app, tx, caller, stored, move(stored), action)) touched(stored.metadata.runnerId);
  });
  return {};
}

async function unarchiveEnvironment(app: App, caller: Caller, id: string): Promise<void> {
  const { policies } = await readPolicies(app.db.point, caller.organizationId);
  await transact(app, async (tx) => {
    const stored = await getEnvironment(tx, caller, id, true);
    allow(stored.relation.owner || caller.orgAdmin, "unarchive");
    const creator = stored.metadata.creator;
    if (stored.metadata.archivedAt && creator?.principal === Principal.USER) {
      const { total } = await countForQuota(tx, stored.organizationId, creator.id);
      const most = Number(policies.maximumEnvironmentsPerUser);
      if (most > 0 && total >= most) {
        throw policyRefusal(
          "resource_exhausted",
          "maximum_environments_per_user",
          `the creator has ${total} of at most ${most} environments`,
        );
      }
    }
    await apply(app, tx, caller, stored, requestUnarchive(stored, app.now()), "Environment unarchived");
  });
}

async function list(app: App, caller: Caller, req: ListEnvironmentsRequest) {
  const page = openPage(req.pagination, ["environments", caller.id, req.filter, req.sort]);
  const wantsCount = req.count?.include === true && !page.after;
  const [rows, total] = await Promise.all([
    listEnvironments(app.db.list, caller, req, page),
    wantsCount ? countEnvironments(app.db.list, caller, req.filter, COUNT_CAP + 1) : undefined,
  ]);
  const { items, nextToken } = closePage(page, rows, (state) => listPosition(req.sort, state));
  const count = total === undefined ? undefined : countAnswer(total);
  return { environments: items.map((state) => shown(caller, state)), pagination: { nextToken }, count };
}

/** EnvironmentService. ListEnvironmentClasses is one answer that the contract offers in two services; it is handed in. */
export function environmentService(
  app: App,
  listEnvironmentClasses: ServiceImpl<typeof EnvironmentService>["listEnvironmentClasses"],
): ServiceImpl<typeof EnvironmentService> {
  return {
    getEnvironment: (req, context) => readEnvironment(app, req, context),
    listEnvironments: (req, context) => list(app, principal(context), req),
    listEnvironmentClasses,
    async createEnvironment(req, context) {
      return { environment: await createEnvironment(app, principal(context), req, readBeside(context)) };
    },
    async createEnvironmentFromProject(req, context) {
      return { environment: await createEnvironmentFromProject(app, principal(context), req) };
    },
    async startEnvironment(req, context) {
      await startEnvironment(app, principal(context), req.environmentId);
      return {};
    },
    stopEnvironment(req, context) {
      const caller = principal(context);
      const may = ({ relation }: StoredEnvironment) => relation.owner || relation.self || caller.orgAdmin;
      return request(
        app,
        caller,
        req.environmentId,
        may,
        "stop",
        (state) => requestStop(state, app.now()),
        "Environment stop requested",
      );
    },
    archiveEnvironment(req, context) {
      const caller = principal(context);
      const may = ({ relation }: StoredEnvironment) => relation.owner || caller.orgAdmin;
      return request(
        app,
        caller,
        req.environmentId,
        may,
        "archive",
        (state) => requestArchive(state, app.now()),
        "Environment archived",
      );
    },
    async unarchiveEnvironment(req, context) {
      await unarchiveEnvironment(app, principal(context), req.environmentId);
      return {};
    },
    deleteEnvironment(req, context) {
      const caller = principal(context);
      const may = ({ relation }: StoredEnvironment) => relation.owner || caller.orgAdmin;
      const action = req.force ? "Environment deleted by force" : "Environment deletion requested";
      return request(
        app,
        caller,
        req.environmentId,
        may,
        "delete",
        (state) => requestDelete(state, req.force, app.now()),
        action,
      );
    },
    markEnvironmentActive(req, context) {
      const may = ({ relation }: StoredEnvironment) => relation.owner || relation.user || relation.self;
      return request(app, principal(context), req.environmentId, may, "use", (state) =>
        markActive(state, req.activitySignal, app.now()),
      );
    },
    async updateEnvironment(req, context) {
      await updateEnvironment(app, principal(context), req);
      return {};
    },
    async createEnvironmentLogsToken(req, context) {
      return { accessToken: await issueToken(app, principal(context), req.environmentId, TokenKind.LOGS) };
    },
    async createEnvironmentAccessToken(req, context) {
      const kind = TokenKind.ENVIRONMENT_ACCESS;
      return { accessToken: await issueToken(app, principal(context), req.environmentId, kind) };
    },
    async createPortAccessToken(req, context) {
      return { accessToken: await issuePortToken(app, principal(context), req.environmentId, req.port) };
    },
    async allowPortAccess(req, context) {
      return { allowed: await mayReachPort(app, principal(context), req.environmentId, req.port) };
    },
  };
}
