import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import {
  type Call,
  type CreateEnvironmentTokenRequest,
  type DeregisterRequest,
  Directive,
  type HeartbeatRequest,
  IntrospectTokenResponse_Kind as Kind,
  DeregisterRequest_Reason as Reason,
  type RegisterRequest,
  type RunnerControlService,
  type WatchRequest,
  type WatchResponse,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { RunnerKind } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, type RunnerStatus } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, newTokenText, pacer, runnerChange, transact } from "../app.ts";
import { validateConfiguration } from "../domain/environment-class.ts";
import { invalid, precondition, Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import {
  acceptStatus,
  HEARTBEAT_MS,
  isConnected,
  LEASE_MS,
  LOCAL_RUNNERS_OFF,
  PROTOCOL_VERSION,
} from "../domain/runner.ts";
import { RUNNER_ACCESS_MS, TokenKind } from "../domain/tokens.ts";
import { principal, readBeside } from "../rpc/authenticate.ts";
import { streamOpened } from "../rpc/call.ts";
import { completeCall, openCalls } from "../store/calls.ts";
import { refreshCaller } from "../store/credentials.ts";
import type { Tx } from "../store/db.ts";
import { refitClasses } from "../store/environment-classes.ts";
import { lockEnvironment } from "../store/environments.ts";
import { callTopic, runnerTopic } from "../store/hub.ts";
import { readPolicies } from "../store/organizations.ts";
import { record } from "../store/record.ts";
import {
  getOwnRunner,
  markDeleted,
  runnerMessage,
  type StoredRunner,
  setRunnerStatus,
  startLink,
} from "../store/runners.ts";
import { findRunnerToken, insertToken, redeemPortToken, revokeEnvironmentToken } from "../store/tokens.ts";
import { reportAutomations } from "./runner-control/automations.ts";
import { reportEnvironments } from "./runner-control/environments.ts";
import { hostToken, putHostToken } from "./runner-control/host-tokens.ts";
import { checkExists, checkLink } from "./runner-control/link.ts";
import { bookmark, changesSince, step } from "./runner-control/objects.ts";
import { environmentSecrets } from "./runner-control/secrets.ts";

const OLDEST_PROTOCOL_VERSION = PROTOCOL_VERSION;
const BOOKMARK_MS = 10_000;
const POLL_MS = 5_000;
const CALLS_PAGE = 50;

/** The runner of a call, if the link that it quotes is the one in force. */
async function ownRunner(app: App, caller: Caller, linkId: string): Promise<StoredRunner> {
  return checkLink(await getOwnRunner(app.db.point, caller.id), linkId);
}

/** What the runner says about itself, with the phase that the rules make of it. */
async function judgedStatus(
  app: App,
  tx: Tx,
  runner: StoredRunner,
  reported: RunnerStatus | undefined,
): Promise<RunnerStatus> {
  const phase = reported?.phase ?? RunnerPhase.UNSPECIFIED;
  if (!reported || !isConnected(phase)) throw invalid({ field: "status.phase", message: "must be active or degraded" });
  if (reported.publicKey.length !== 0 && reported.publicKey.length !== 32) {
    throw invalid({ field: "status.public_key", message: "must be 32 bytes" });
  }
  const at = timestampFromDate(app.now());
  if (runner.phase === RunnerPhase.DELETING) return acceptStatus(reported, RunnerPhase.DELETING, at);
  const off = runner.kind === RunnerKind.LOCAL && !(await readPolicies(tx, runner.organizationId)).localRunners;
  const status = acceptStatus(reported, off ? RunnerPhase.INACTIVE : phase, at);
  if (off) status.message = LOCAL_RUNNERS_OFF;
  return status;
}

/** Compares what people can see; the time of the last contact changes with every heartbeat. */
function sameStatus(left: RunnerStatus, right: RunnerStatus): boolean {
  const plain = (status: RunnerStatus) =>
    JSON.stringify(
      { ...status, updatedAt: undefined, publicKey: Buffer.from(status.publicKey).toString("hex") },
      (_key, value) => (typeof value === "bigint" ? String(value) : value),
    );
  return plain(left) === plain(right);
}

/** What of a new status belongs into the audit log: a new phase, and a key that replaces the one secrets were sealed to. */
function changeWorthNoting({ phase, status: before }: StoredRunner, status: RunnerStatus): string | undefined {
  const isNewKey = before.publicKey.length > 0 && Buffer.compare(before.publicKey, status.publicKey) !== 0;
  const parts = [
    ...(phase === status.phase ? [] : [`Runner is ${RunnerPhase[status.phase].toLowerCase()}`]),
    ...(isNewKey ? ["Runner has a new public key"] : []),
  ];
  return parts.join(", ") || undefined;
}

async function recordStatus(
  app: App,
  tx: Tx,
  runner: StoredRunner,
  caller: Caller,
  status: RunnerStatus,
): Promise<void> {
  if (sameStatus(runner.status, status)) return;
  const action = changeWorthNoting(runner, status);
  await record(tx, runnerChange(app, runner, ResourceOperation.UPDATE_STATUS, actorOf(caller), action));
}

async function register(app: App, caller: Caller, request: RegisterRequest) {
  if (request.protocolVersion < OLDEST_PROTOCOL_VERSION || request.protocolVersion > PROTOCOL_VERSION) {
    throw precondition(
      `protocol version ${request.protocolVersion} is not supported: ${OLDEST_PROTOCOL_VERSION} to ${PROTOCOL_VERSION} are`,
    );
  }
  const linkId = app.newId();
  const { runner, epoch } = await transact(app, async (tx, touched) => {
    const before = checkExists(await getOwnRunner(tx, caller.id, true));
    const status = await judgedStatus(app, tx, before, request.status);
    const schema = request.configurationSchema;
    const { maxEnvironments, localEnvironmentIds } = request;
    const link = {
      runner: before,
      linkId,
      status,
      schema,
      maxEnvironments,
      localEnvironmentIds,
      leaseMs: LEASE_MS,
      at: app.now(),
    };
    const started = await startLink(tx, link);
    if (schema) await refitClasses(tx, before.id, (each) => !validateConfiguration(schema, each.configuration).length);
    await recordStatus(app, tx, before, caller, status);
    touched(before.id);
    return { runner: await getOwnRunner(tx, caller.id), epoch: started.epoch };
  });
  return {
    linkId,
    epoch: BigInt(epoch),
    heartbeatInterval: durationFromMs(HEARTBEAT_MS),
    lease: durationFromMs(LEASE_MS),
    runner: runnerMessage(runner),
    controlPlaneId: app.controlPlaneId,
  };
}

async function heartbeat(app: App, caller: Caller, request: HeartbeatRequest) {
  const { runner, leaseExpiresAt } = await transact(app, async (tx) => {
    const before = checkLink(await getOwnRunner(tx, caller.id, true), request.linkId);
    const status = await judgedStatus(app, tx, before, request.status);
    const lease = await setRunnerStatus(tx, { runnerId: before.id, status, leaseMs: LEASE_MS, contact: true });
    await recordStatus(app, tx, before, caller, status);
    return { runner: before, leaseExpiresAt: lease };
  });
  return {
    leaseExpiresAt: leaseExpiresAt ? timestampFromDate(leaseExpiresAt) : undefined,
    headRevision: BigInt(runner.headRevision),
    directive: directiveOf(runner),
  };
}

const directiveOf = (runner: StoredRunner) =>
  runner.phase === RunnerPhase.DELETING ? Directive.SHUTDOWN : Directive.UNSPECIFIED;

// The watch stream.

async function* watch(
  app: App,
  caller: Caller,
  request: WatchRequest,
  context: HandlerContext,
): AsyncGenerator<WatchResponse> {
  const { signal } = context;
  const { latch: news, leave } = app.hub.latch(runnerTopic(caller.id));
  const check = pacer(app.limits.credentialCheckMs);
  const bookmarks = pacer(BOOKMARK_MS);
  const sentCalls = new Set<string>();
  try {
    let runner = await ownRunner(app, caller, request.linkId);
    streamOpened(context);
    const resume = Math.min(Number(request.resumeRevision), Number.MAX_SAFE_INTEGER);
    let at = yield* changesSince(app, runner, resume || undefined);
    let isTold = false;
    yield bookmark(at.revision);
    for (;;) {
      if (directiveOf(runner) === Directive.SHUTDOWN && !isTold) {
        isTold = true;
        yield step({ case: "directive", value: Directive.SHUTDOWN });
      }
      yield* unsent(await openCalls(app.db.point, runner.id, app.now(), CALLS_PAGE), sentCalls);
      if (bookmarks.isDue()) yield bookmark(at.revision);
      const patienceMs = Math.min(POLL_MS, check.leftMs(), bookmarks.leftMs());
      if (!at.more) await news.wait(patienceMs, signal, app.draining);
      if (signal.aborted) return;
      if (app.draining.aborted) throw new Refusal("unavailable", "the server is shutting down");
      runner = await getOwnRunner(app.db.point, caller.id);
      // Deleted by force: the process is told to end before its credential stops to work.
      if (runner.phase === RunnerPhase.DELETED && !isTold) yield step({ case: "directive", value: Directive.SHUTDOWN });
      checkLink(runner, request.linkId);
      if (check.isDue() && !(await refreshCaller(app.db.point, caller, app.now())))
        throw new Refusal("unauthenticated", "the token is no longer valid");
      if (runner.headRevision !== at.revision) at = yield* changesSince(app, runner, at.revision);
    }
  } finally {
    leave();
  }
}

function* unsent(calls: readonly Call[], sent: Set<string>): Generator<WatchResponse> {
  for (const call of calls) {
    if (sent.has(call.callId)) continue;
    sent.add(call.callId);
    yield step({ case: "call", value: call });
  }
  for (const id of sent) if (!calls.some((call) => call.callId === id)) sent.delete(id);
}

async function createEnvironmentToken(
  app: App,
  caller: Caller,
  request: CreateEnvironmentTokenRequest,
): Promise<string> {
  const text = newTokenText(app, TokenKind.ENVIRONMENT);
  await transact(app, async (tx) => {
    const stored = await lockEnvironment(tx, request.environmentId);
    if (!stored || stored.metadata.runnerId !== caller.id)
      throw new Refusal("not_found", "the environment is not assigned to this runner");
    const current = stored.spec.machine?.session === request.machineSession;
    if (!current || stored.spec.desiredPhase !== EnvironmentPhase.RUNNING)
      throw precondition("this start of the environment is over");
    await revokeEnvironmentToken(tx, stored.id);
    await insertToken(tx, {
      id: app.newId(),
      text,
      kind: TokenKind.ENVIRONMENT,
      organizationId: stored.organizationId,
      subjectId: stored.id,
      subjectPrincipal: Principal.ENVIRONMENT,
      environmentId: stored.id,
      createdAt: app.now(),
    });
  });
  return text;
}

const KINDS: Partial<Record<TokenKind, Kind>> = {
  [TokenKind.ENVIRONMENT]: Kind.ENVIRONMENT,
  [TokenKind.ENVIRONMENT_ACCESS]: Kind.ENVIRONMENT_ACCESS,
  [TokenKind.PORT_ACCESS]: Kind.PORT_ACCESS,
};

async function introspect(app: App, caller: Caller, text: string) {
  const found = await findRunnerToken(app.db.point, caller.id, text, app.now());
  if (!found) return { active: false };
  const kind =
    found.kind === TokenKind.LOGS
      ? found.environmentId
        ? Kind.ENVIRONMENT_LOGS
        : Kind.RUNNER_LOGS
      : KINDS[found.kind];
  return {
    active: kind !== undefined,
    kind,
    environmentId: found.environmentId,
    port: found.port,
    authNonce: BigInt(found.authNonce ?? 0),
    subject: { id: found.subjectId, principal: found.subjectPrincipal },
    expiresAt: found.expiresAt && timestampFromDate(found.expiresAt),
  };
}

/** Text of the token that a browser is to have in place of the one in the address. */
async function redeem(app: App, caller: Caller, text: string): Promise<string> {
  const next = newTokenText(app, TokenKind.PORT_ACCESS);
  const expiresAt = new Date(app.now().getTime() + RUNNER_ACCESS_MS);
  const isRedeemed = await redeemPortToken(app.db.write, caller.id, text, { text: next, expiresAt }, app.now());
  return isRedeemed ? next : "";
}

async function deregister(app: App, caller: Caller, request: DeregisterRequest): Promise<void> {
  await transact(app, async (tx, touched) => {
    const runner = checkLink(await getOwnRunner(tx, caller.id, true), request.linkId);
    touched(runner.id);
    if (request.reason === Reason.DELETED && runner.phase === RunnerPhase.DELETING) {
      await record(tx, runnerChange(app, runner, ResourceOperation.DELETE, actorOf(caller), "Runner deleted"));
      await markDeleted(tx, runner.id, app.now());
      return;
    }
    const phase = runner.phase === RunnerPhase.DELETING ? RunnerPhase.DELETING : RunnerPhase.INACTIVE;
    const status = acceptStatus(runner.status, phase, timestampFromDate(app.now()));
    status.message = "the runner process has stopped";
    await setRunnerStatus(tx, { runnerId: runner.id, status, leaseMs: 0, contact: true });
    await recordStatus(app, tx, runner, caller, status);
  });
}

/** RunnerControlService: the private protocol that runners dial in with. */
export function runnerControlService(app: App): ServiceImpl<typeof RunnerControlService> {
  return {
    register: (request, context) => register(app, principal(context), request),
    heartbeat: (request, context) => heartbeat(app, principal(context), request),
    watch: (request, context) => watch(app, principal(context), request, context),
    async reportEnvironments(request, context) {
      return { results: await reportEnvironments(app, principal(context), request, readBeside(context)) };
    },
    async reportAutomations(request, context) {
      const caller = principal(context);
      const { epoch } = await ownRunner(app, caller, request.linkId);
      return reportAutomations(app, caller, epoch, request);
    },
    async getEnvironmentSecrets(request, context) {
      return { secrets: await environmentSecrets(app, principal(context), request) };
    },
    getHostToken: (request, context) => hostToken(app, principal(context), request),
    async putHostToken(request, context) {
      await putHostToken(app, principal(context), request);
      return {};
    },
    async createEnvironmentToken(request, context) {
      return { token: await createEnvironmentToken(app, principal(context), request) };
    },
    introspectToken: (request, context) => introspect(app, principal(context), request.token),
    async redeemPortToken(request, context) {
      return { token: await redeem(app, principal(context), request.token) };
    },
    async completeCall(request, context) {
      await completeCall(app.db.write, principal(context).id, request, app.now());
      app.hub.wake(callTopic(request.callId));
      return {};
    },
    async deregister(request, context) {
      await deregister(app, principal(context), request);
      return {};
    },
  };
}
