import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code, type ServiceImpl } from "@connectrpc/connect";
import { CallSchema, type CompleteCallRequest, ObjectKind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal, type Subject, SubjectSchema } from "../../gen/gitpod/v1/identity_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import {
  type CheckAuthenticationForHostRequest,
  type CreateRunnerRequest,
  type DeleteRunnerRequest,
  type ParseContextURLRequest,
  type ParseContextURLResponse,
  RunnerPhase,
  RunnerService,
  RunnerStatusSchema,
} from "../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, newTokenText, pacer, runnerChange, transact } from "../app.ts";
import { scmSchemas } from "../domain/environment-class.ts";
import { denied, invalid, precondition, Refusal, type RefusalKind, refuseProblems } from "../domain/errors.ts";
import { requestDelete } from "../domain/lifecycle.ts";
import { closePage, openPage } from "../domain/pages.ts";
import { policyRefusal } from "../domain/policies.ts";
import { type Caller, isPerson } from "../domain/principal.ts";
import { blankedForUsers, checkNewRunner, EXCHANGE_TOKEN_MS, isConnected, newRunnerSpec } from "../domain/runner.ts";
import { tokenPage } from "../domain/scm-sign-in.ts";
import { TokenKind } from "../domain/tokens.ts";
import { withPending } from "../pending.ts";
import { principal } from "../rpc/authenticate.ts";
import { parseContextUrl } from "../scm/context-url.ts";
import { ScmError } from "../scm/errors.ts";
import { normalizeHost } from "../scm/hosts.ts";
import { dropCall, findCompletion, insertCall } from "../store/calls.ts";
import type { Tx } from "../store/db.ts";
import { seal } from "../store/envelope.ts";
import { advanceEnvironment } from "../store/environment-steps.ts";
import {
  environmentIdsOfRunner,
  getEnvironment,
  lockEnvironment,
  type StoredEnvironment,
} from "../store/environments.ts";
import { usableHostToken } from "../store/host-tokens.ts";
import { callTopic, runnerTopic } from "../store/hub.ts";
import { readPolicies } from "../store/organizations.ts";
import { record, recordAccess } from "../store/record.ts";
import {
  bumpRevision,
  connectedRunners,
  countEnvironments,
  getRunner,
  insertRunner,
  listRunners,
  markDeleted,
  markDeleting,
  runnerMessage,
  type StoredRunner,
} from "../store/runners.ts";
import { effectiveIntegrations } from "../store/scm-integrations.ts";
import { insertToken } from "../store/tokens.ts";
import { runnerPolicies } from "./runner/policies.ts";
import { matchingProjects, recommendedClasses } from "./runner/recommendations.ts";

const CALL_POLL_MS = 1_000;
const MAX_PARSE_CANDIDATES = 3;

const hasExchangeTokens = (runner: StoredRunner) => runner.kind !== RunnerKind.LOCAL_CONFIGURATION;

function message(runner: StoredRunner) {
  if (!runner.administers) blankedForUsers(runner.spec, runner.status);
  return runnerMessage(runner);
}

/** A one-time token with which a runner process signs up, put down in the audit log as access to a credential. */
async function issueExchangeToken(
  app: App,
  tx: Tx,
  caller: Caller,
  runner: Pick<StoredRunner, "id" | "organizationId">,
): Promise<string> {
  const text = newTokenText(app, TokenKind.RUNNER_EXCHANGE);
  const at = app.now();
  await insertToken(tx, {
    id: app.newId(),
    text,
    kind: TokenKind.RUNNER_EXCHANGE,
    organizationId: runner.organizationId,
    subjectId: runner.id,
    subjectPrincipal: Principal.RUNNER,
    runnerId: runner.id,
    createdAt: at,
    expiresAt: new Date(at.getTime() + EXCHANGE_TOKEN_MS),
  });
  await recordAccess(tx, {
    id: app.newId(),
    organizationId: runner.organizationId,
    actor: actorOf(caller),
    subjectId: runner.id,
    subjectType: ResourceType.RUNNER,
    action: "Runner exchange token issued",
    at,
  });
  return text;
}

async function createRunner(app: App, caller: Caller, request: CreateRunnerRequest) {
  const { kind, provider, problems } = checkNewRunner(request);
  refuseProblems(problems);
  if (!caller.orgAdmin && !caller.runnersAdmin)
    throw denied("only organization admins and runner admins create runners");
  if (kind === RunnerKind.LOCAL && !(await readPolicies(app.db.point, caller.organizationId)).localRunners) {
    throw policyRefusal(
      "failed_precondition",
      "allow_local_runners",
      "local runners are switched off in this organization",
    );
  }
  const at = app.now();
  const id = app.newId();
  const runner = {
    id,
    organizationId: caller.organizationId,
    creatorId: caller.id,
    creatorPrincipal: caller.principal,
    name: request.name,
    kind,
    provider,
    runnerManagerId: request.runnerManagerId,
    spec: newRunnerSpec(request.spec),
    status: create(RunnerStatusSchema, { phase: RunnerPhase.CREATED }),
    createdAt: at,
  };
  const password = request.spec?.configuration?.metrics?.password;
  const sealed = password ? seal(app.masterKey, `runner ${id} metrics`, Buffer.from(password), app.random) : undefined;
  return transact(app, async (tx) => {
    await insertRunner(
      tx,
      runner,
      sealed,
      runnerChange(app, runner, ResourceOperation.CREATE, actorOf(caller), "Runner created"),
    );
    const exchangeToken = await issueExchangeToken(app, tx, caller, runner);
    return { runner: runnerMessage(await getRunner(tx, caller, id)), exchangeToken };
  });
}

/** Ends every environment of a runner by force, in the transaction that ends the runner. */
async function forceDeleteEnvironments(app: App, tx: Tx, caller: Caller, runnerId: string): Promise<void> {
  const environments: StoredEnvironment[] = [];
  // All of them are locked before the first change takes the runner's row.
  for (const id of await environmentIdsOfRunner(tx, runnerId)) {
    const environment = await lockEnvironment(tx, id);
    if (environment) environments.push(environment);
  }
  for (const environment of environments) {
    const end = requestDelete(environment, true, app.now());
    if (end.kind !== "changed") continue;
    const action = "Environment deleted with its runner";
    const by = { actor: actorOf(caller), newId: app.newId, action, at: app.now() };
    await advanceEnvironment(tx, environment, end.next, by);
  }
}

async function deleteRunner(app: App, caller: Caller, request: DeleteRunnerRequest): Promise<void> {
  await transact(app, async (tx, touched) => {
    // Environments are locked before their runner everywhere, or two transactions could wait for each other.
    const visible = await getRunner(tx, caller, request.runnerId);
    if (!visible.administers) throw denied("deleting a runner needs the role admin on it");
    if (visible.kind === RunnerKind.LOCAL_CONFIGURATION)
      throw precondition("the local configuration runner cannot be deleted");
    if (request.force) await forceDeleteEnvironments(app, tx, caller, visible.id);
    const runner = await getRunner(tx, caller, request.runnerId, true);
    touched(runner.id);
    const count = await countEnvironments(tx, runner.id);
    if (count > 0 && !request.force)
      throw precondition(`the runner still has ${count} environments; delete them first or use force`);
    if (count > 0) throw new Refusal("aborted", "an environment was created meanwhile, try again");
    const at = app.now();
    if (runner.phase === RunnerPhase.DELETING && !request.force) return;
    if (request.force || !isConnected(runner.phase)) {
      await record(tx, runnerChange(app, runner, ResourceOperation.DELETE, actorOf(caller), "Runner deleted"));
      await markDeleted(tx, runner.id, at);
      return;
    }
    runner.spec.desiredPhase = RunnerPhase.DELETED;
    runner.status.phase = RunnerPhase.DELETING;
    await markDeleting(tx, runner, at);
    await bumpRevision(tx, runner.id, ObjectKind.RUNNER, runner.id, at);
    await record(tx, runnerChange(app, runner, ResourceOperation.UPDATE, actorOf(caller), "Runner deletion requested"));
  });
}

async function createRunnerToken(app: App, caller: Caller, runnerId: string): Promise<string> {
  return transact(app, async (tx) => {
    const runner = await getRunner(tx, caller, runnerId, true);
    if (!runner.administers && caller.id !== runner.id) throw denied("a token for a runner needs the role admin on it");
    if (!hasExchangeTokens(runner)) throw precondition("the local configuration runner has no process");
    if (runner.phase === RunnerPhase.DELETING) throw precondition("the runner is being deleted");
    return issueExchangeToken(app, tx, caller, runner);
  });
}

/** Which code a failure of source control work has. */
const SCM_KINDS: Record<ScmError["kind"], RefusalKind> = {
  invalid_url: "invalid_argument",
  blocked: "invalid_argument",
  auth_required: "not_found",
  not_found: "not_found",
  forbidden: "permission_denied",
  rate_limited: "resource_exhausted",
  unavailable: "unavailable",
  timeout: "deadline_exceeded",
  unsupported: "failed_precondition",
};

function scmRefusal(error: unknown): unknown {
  if (!(error instanceof ScmError)) return error;
  const kind = SCM_KINDS[error.kind];
  if (kind === "invalid_argument") return invalid({ field: "context_url", message: error.message });
  return new Refusal(kind, error.message);
}

const REFUSAL_OF_CODE: Partial<Record<number, RefusalKind>> = {
  [Code.InvalidArgument]: "invalid_argument",
  [Code.NotFound]: "not_found",
  [Code.PermissionDenied]: "permission_denied",
  [Code.FailedPrecondition]: "failed_precondition",
  [Code.ResourceExhausted]: "resource_exhausted",
  [Code.DeadlineExceeded]: "deadline_exceeded",
};

function answerOf(completion: CompleteCallRequest): ParseContextURLResponse {
  const { outcome } = completion;
  if (outcome.case === "parseContext" && outcome.value.response) return outcome.value.response;
  if (outcome.case !== "failure") throw new Refusal("unavailable", "the runner gave no answer");
  const kind = REFUSAL_OF_CODE[outcome.value.code] ?? "unavailable";
  if (kind === "invalid_argument") throw invalid({ field: "context_url", message: outcome.value.message });
  throw new Refusal(kind, outcome.value.message);
}

/** Whose access to repositories counts: an environment acts for its creator. */
async function subjectOf(app: App, caller: Caller): Promise<Subject> {
  if (isPerson(caller)) return create(SubjectSchema, { id: caller.id, principal: caller.principal });
  const { metadata } = await getEnvironment(app.db.point, caller, caller.id);
  return metadata.creator ?? create(SubjectSchema);
}

/** Asks a runner, through the database: whichever replica holds its watch stream delivers the question. */
async function askRunner(
  app: App,
  subject: Subject,
  runner: StoredRunner,
  contextUrl: string,
  patienceMs: number,
  signal: AbortSignal,
): Promise<ParseContextURLResponse> {
  const callId = app.newId();
  const call = create(CallSchema, {
    callId,
    deadline: timestampFromDate(new Date(app.now().getTime() + patienceMs)),
    subject,
    request: { case: "parseContext", value: { contextUrl } },
  });
  const deadline = AbortSignal.timeout(patienceMs);
  const { latch, leave } = app.hub.latch(callTopic(callId));
  await insertCall(app.db.write, runner.id, call, app.now());
  app.hub.wake(runnerTopic(runner.id));
  try {
    while (!signal.aborted && !deadline.aborted) {
      const completion = await findCompletion(app.db.point, callId);
      if (completion) return answerOf(completion);
      if (app.draining.aborted) throw new Refusal("unavailable", "the server is shutting down");
      await latch.wait(CALL_POLL_MS, signal, deadline, app.draining);
    }
    throw new Refusal("deadline_exceeded", "the runner did not answer in time");
  } finally {
    leave();
    await dropCall(app.db.write, callId);
  }
}

async function parseHere(app: App, contextUrl: string, signal: AbortSignal): Promise<ParseContextURLResponse> {
  if (!app.config.scm.fallback) throw new Refusal("unavailable", "runner is not connected");
  try {
    return await parseContextUrl(contextUrl, { guard: app.scmGuard, publicUrl: app.config.publicUrl, signal });
  } catch (error) {
    throw scmRefusal(error);
  }
}

/** Tries the runners in turn, each with its share of the time that is left: the first success counts. */
async function parseOnRunners(
  app: App,
  caller: Caller,
  runners: StoredRunner[],
  contextUrl: string,
  signal: AbortSignal,
) {
  const candidates = runners.slice(0, MAX_PARSE_CANDIDATES);
  if (!candidates.length) return { response: await parseHere(app, contextUrl, signal), runner: undefined };
  const subject = await subjectOf(app, caller);
  const time = pacer(app.limits.runnerCallMs);
  let failure: unknown;
  for (const [index, runner] of candidates.entries()) {
    const patienceMs = Math.ceil(time.leftMs() / (candidates.length - index));
    try {
      return { response: await askRunner(app, subject, runner, contextUrl, patienceMs, signal), runner };
    } catch (error) {
      // A malformed URL is malformed everywhere.
      if (error instanceof Refusal && error.kind === "invalid_argument") throw error;
      failure ??= error;
    }
  }
  throw failure;
}

/** The runners to ask, best first: the one that was named, the one an environment lies on, or all that can be used. */
async function parseCandidates(app: App, caller: Caller, named: StoredRunner | undefined): Promise<StoredRunner[]> {
  if (named) return isConnected(named.phase) && named.linkId ? [named] : [];
  return connectedRunners(app.db.list, caller);
}

async function parseContext(
  app: App,
  caller: Caller,
  request: ParseContextURLRequest,
  signal: AbortSignal,
): Promise<ParseContextURLResponse> {
  const isEnvironment = !isPerson(caller);
  const runnerId = request.runnerId || (isEnvironment ? caller.runnerId : "");
  const named = runnerId ? await getRunner(app.db.point, caller, runnerId) : undefined;
  // An environment sees no runner but its own.
  if (named && !named.uses && !isEnvironment) throw denied("using a runner needs the role user on it");
  const candidates = await parseCandidates(app, caller, named);
  const { response, runner } = await parseOnRunners(app, caller, candidates, request.contextUrl, signal);
  // A runner knows nothing of these.
  response.originalContextUrl = request.contextUrl;
  response.projectIds = await matchingProjects(app, caller, response);
  response.recommendedEnvironmentClasses = isEnvironment
    ? []
    : await recommendedClasses(app, caller, response.projectIds, named, runner);
  return response;
}

/**
 * Whether the caller has signed in to a host on a runner, and how it would. Without a way to do so the answer is yes:
 * there is nothing to sign in to, and clients refuse to go on when they read no.
 */
async function checkSignIn(app: App, caller: Caller, request: CheckAuthenticationForHostRequest) {
  const runner = await getRunner(app.db.point, caller, request.runnerId);
  if (!runner.uses && caller.principal !== Principal.ENVIRONMENT)
    throw denied("using a runner needs the role user on it");
  const parsed = normalizeHost(request.host);
  if (!parsed) throw invalid({ field: "host", message: "is not a host name" });
  const names = [parsed.host, parsed.host.split("/")[0] ?? ""];
  const integrations = await effectiveIntegrations(app.db.point, runner.id, names);
  const integration = integrations.get(names[0] ?? "") ?? integrations.get(names[1] ?? "");
  const { scmId, scmName } = normalizeHost(request.host, integration ? [integration] : []) ?? parsed;
  if (!integration?.pat && !integration?.oauth) return { authenticated: true, scmId, scmName };
  const subject = await subjectOf(app, caller);
  const which = { runnerId: runner.id, host: integration.host, subjectId: subject.id };
  const authenticated = (await usableHostToken(app.db.point, which, app.now())) !== undefined;
  const docsUrl = scmSchemas("").find((each) => each.scmId === scmId)?.pat?.docsLink ?? "";
  const supportsPat = integration.pat ? tokenPage(scmId, integration.host, docsUrl) : undefined;
  return {
    ...{
      authenticated,
      scmId,
      scmName,
      patSupported: integration.pat,
      authenticationUrl: supportsPat?.createUrl ?? "",
    },
    supportsPat: supportsPat && { ...supportsPat, requiredScopes: [...supportsPat.requiredScopes] },
  };
}

/** RunnerService, as far as it is built. */
export function runnerService(app: App): ServiceImpl<typeof RunnerService> {
  return withPending(
    RunnerService,
    ["updateRunner", "createRunnerLogsToken", "searchRepositories", "listSCMOrganizations", "checkRepositoryAccess"],
    {
      ...runnerPolicies(app),
      createRunner: (request, context) => createRunner(app, principal(context), request),
      async getRunner(request, context) {
        return { runner: message(await getRunner(app.db.point, principal(context), request.runnerId)) };
      },
      async listRunners(request, context) {
        const caller = principal(context);
        const page = openPage(request.pagination, ["runners", caller.id, request.filter]);
        const rows = await listRunners(app.db.list, caller, request.filter, page);
        const { items, nextToken } = closePage(page, rows, (runner) => runner.id);
        return { runners: items.map(message), pagination: { nextToken } };
      },
      async deleteRunner(request, context) {
        await deleteRunner(app, principal(context), request);
        return {};
      },
      async createRunnerToken(request, context) {
        return { exchangeToken: await createRunnerToken(app, principal(context), request.runnerId) };
      },
      parseContextURL: (request, context) => parseContext(app, principal(context), request, context.signal),
      checkAuthenticationForHost: (request, context) => checkSignIn(app, principal(context), request),
    },
  );
}
