import { create, equals } from "@bufbuild/protobuf";
import { durationMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type CreateServiceRequest,
  type ServiceMetadata,
  ServiceMetadataSchema,
  ServicePhase,
  ServiceRole,
  type ServiceSpec,
  ServiceSpec_CommandsSchema,
  ServiceSpecSchema,
  type ServiceStatus,
  ServiceStatusSchema,
  type UpdateServiceRequest,
  type UpdateServiceRequest_ServiceSpec,
  type UpdateServiceRequest_ServiceStatus,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import type { Subject } from "../../gen/gitpod/v1/identity_pb.js";
import {
  commandProblems,
  isLogUrl,
  isOwnLog,
  type Move,
  mergedOutput,
  namingProblems,
  outputProblems,
  type SecretUse,
  secretUses,
  sessionProblems,
  storedFailure,
  storedTarget,
  storedTriggers,
  targetProblems,
  triggerNames,
  triggerProblems,
  variableProblems,
} from "./automation.ts";
import type { FieldProblem } from "./errors.ts";

// The state machine of a service. `spec.session` is the start that is wanted, `status.session` the start that the status
// describes: a start happens only when they differ and RUNNING is wanted. Functions are pure and leave their arguments
// as they are; whoever edits passes the edit through `settled`, which alone raises versions.

const { UNSPECIFIED, STARTING, RUNNING, STOPPING, STOPPED, FAILED, DELETED } = ServicePhase;

/** Failure of whatever ran in an environment that ended without a word. */
export const LOST = "environment was lost";

export interface ServiceState {
  metadata: ServiceMetadata;
  spec: ServiceSpec;
  status: ServiceStatus;
}

/** No process of the service is left. */
export const isAtRest = ({ status }: ServiceState) => status.phase === STOPPED || status.phase === FAILED;

/** A start is wanted that the supervisor has not taken over yet. */
export const isStartPending = ({ spec, status }: ServiceState) =>
  spec.desiredPhase === RUNNING && spec.session !== status.session;

export const isBeingDeleted = ({ spec }: ServiceState) => spec.desiredPhase === DELETED;

const commandOf = ({ spec }: ServiceState) => spec.commands?.start ?? "";

const sameSpec = (left: ServiceSpec, right: ServiceSpec) =>
  left === right || equals(ServiceSpecSchema, left, { ...right, specVersion: left.specVersion });
const sameStatus = (left: ServiceStatus, right: ServiceStatus) =>
  left === right || equals(ServiceStatusSchema, left, { ...right, statusVersion: left.statusVersion });

/** An edit of a stored service as the state to store: halves that differ get the next version. */
export function settled(stored: ServiceState, edit: Partial<ServiceState>): Move<ServiceState> {
  const draft = { ...stored, ...edit };
  const specChanged = !sameSpec(stored.spec, draft.spec);
  const statusChanged = !sameStatus(stored.status, draft.status);
  const metadataChanged = !equals(ServiceMetadataSchema, stored.metadata, draft.metadata);
  if (!specChanged && !statusChanged && !metadataChanged) return { kind: "noop" };
  const { spec, status } = stored;
  return {
    kind: "changed",
    next: {
      metadata: metadataChanged ? draft.metadata : stored.metadata,
      spec: specChanged ? { ...draft.spec, specVersion: spec.specVersion + 1n } : spec,
      status: statusChanged ? { ...draft.status, statusVersion: status.statusVersion + 1n } : status,
    },
  };
}

// Creating.

const roleProblems = (role: ServiceRole, field: string): FieldProblem[] =>
  role in ServiceRole ? [] : [{ field, message: "is not a known role" }];

const CREATABLE: ReadonlySet<ServicePhase> = new Set([UNSPECIFIED, RUNNING, STOPPED]);

/** Problems of a request that need no lookup. */
export function newServiceProblems({ metadata, spec }: CreateServiceRequest): FieldProblem[] {
  if (!metadata) return [{ field: "metadata", message: "is required" }];
  return [
    ...namingProblems("metadata", metadata),
    ...triggerProblems(metadata.triggeredBy, "metadata.triggered_by", "service"),
    ...roleProblems(metadata.role, "metadata.role"),
    ...(CREATABLE.has(spec?.desiredPhase ?? UNSPECIFIED)
      ? []
      : [{ field: "spec.desired_phase", message: "must be unset, RUNNING or STOPPED" }]),
    ...sessionProblems(spec?.session ?? "", "spec.session"),
    ...commandProblems({
      "spec.commands.start": spec?.commands?.start,
      "spec.commands.ready": spec?.commands?.ready,
      "spec.commands.stop": spec?.commands?.stop,
    }),
    ...variableProblems(spec?.env ?? [], "spec.env"),
    ...targetProblems(spec?.runsOn, "spec.runs_on"),
  ];
}

export const serviceSecrets = (spec: { env: ServiceSpec["env"] } | undefined): SecretUse[] =>
  secretUses(spec?.env ?? [], "spec.env");

/** What an item has by where it comes from: not what clients say about it. */
export interface Origin {
  creator: Subject;
  now: Date;
}

export function storedServiceMetadata(given: ServiceMetadata, { creator, now }: Origin): ServiceMetadata {
  return {
    ...given,
    creator,
    createdAt: timestampFromDate(now),
    triggeredBy: storedTriggers(triggerNames(given.triggeredBy)),
    role: given.role || ServiceRole.DEFAULT,
  };
}

/** A service that has never run, for a request without problems. */
export function newService({ metadata, spec }: CreateServiceRequest, origin: Origin): ServiceState {
  const given = spec ?? create(ServiceSpecSchema);
  return {
    metadata: storedServiceMetadata(metadata ?? create(ServiceMetadataSchema), origin),
    spec: { ...given, specVersion: 1n, desiredPhase: STOPPED, runsOn: storedTarget(given.runsOn) },
    status: create(ServiceStatusSchema, { statusVersion: 1n, phase: STOPPED }),
  };
}

// Wishes.

/** Why the service cannot be started now, whatever the environment does; undefined if it can. */
export function startRefusal(state: ServiceState): string | undefined {
  if (isBeingDeleted(state)) return "the service is being deleted";
  return commandOf(state) ? undefined : "the service has no start command";
}

/** StartService: `session` is fresh. One that starts, runs, or is about to is left as it is. */
export function requestServiceStart(state: ServiceState, session: string): Move<ServiceState> {
  const reason = startRefusal(state);
  if (reason) return { kind: "refused", reason };
  const { spec, status } = state;
  const isUp = status.phase === STARTING || status.phase === RUNNING;
  if (spec.desiredPhase === RUNNING && (isUp || isStartPending(state))) return { kind: "noop" };
  return settled(state, { spec: { ...spec, desiredPhase: RUNNING, session } });
}

/** StopService. What is being deleted stays so. */
export function requestServiceStop(state: ServiceState): Move<ServiceState> {
  if (isBeingDeleted(state)) return { kind: "noop" };
  return settled(state, { spec: { ...state.spec, desiredPhase: STOPPED } });
}

/** DeleteService without force: the supervisor stops it and says when it is gone. */
export const requestServiceDelete = (state: ServiceState): Move<ServiceState> =>
  settled(state, { spec: { ...state.spec, desiredPhase: DELETED } });

// UpdateService.

/** The request changes the spec; a spec part that says nothing does not. */
export function touchesSpec(spec: UpdateServiceRequest_ServiceSpec | undefined): boolean {
  const { start, ready, stop } = spec?.commands ?? {};
  const commands = [start, ready, stop].some((command) => command !== undefined);
  return commands || spec?.runsOn !== undefined || spec?.readinessTimeout !== undefined || Boolean(spec?.env.length);
}

/** Problems of a request that need neither a lookup nor the stored service. */
export function updateServiceProblems({ metadata, spec, status }: UpdateServiceRequest): FieldProblem[] {
  const { start, ready, stop } = spec?.commands ?? {};
  return [
    ...namingProblems("metadata", metadata ?? {}),
    ...triggerProblems(metadata?.triggeredBy?.trigger ?? [], "metadata.triggered_by.trigger", "service"),
    ...roleProblems(metadata?.role ?? ServiceRole.UNSPECIFIED, "metadata.role"),
    ...(start === "" ? [{ field: "spec.commands.start", message: "must not be empty" }] : []),
    ...commandProblems({
      "spec.commands.start": start,
      "spec.commands.ready": ready,
      "spec.commands.stop": stop,
    }),
    ...variableProblems(spec?.env ?? [], "spec.env"),
    ...targetProblems(spec?.runsOn, "spec.runs_on"),
    ...(status?.phase === UNSPECIFIED ? [{ field: "status.phase", message: "must not be unspecified" }] : []),
    ...outputProblems(status?.output ?? {}, "status.output"),
  ];
}

function updatedMetadata(metadata: ServiceMetadata, changes: UpdateServiceRequest["metadata"]): ServiceMetadata {
  const triggers = changes?.triggeredBy && storedTriggers(triggerNames(changes.triggeredBy.trigger));
  return {
    ...metadata,
    name: changes?.name ?? metadata.name,
    description: changes?.description ?? metadata.description,
    triggeredBy: triggers ?? metadata.triggeredBy,
    role: changes?.role === undefined ? metadata.role : changes.role || ServiceRole.DEFAULT,
  };
}

function updatedSpec(spec: ServiceSpec, changes: UpdateServiceRequest_ServiceSpec): ServiceSpec {
  const { commands } = changes;
  return {
    ...spec,
    commands: commands
      ? create(ServiceSpec_CommandsSchema, {
          start: commands.start ?? spec.commands?.start,
          ready: commands.ready ?? spec.commands?.ready,
          stop: commands.stop ?? spec.commands?.stop,
        })
      : spec.commands,
    runsOn: changes.runsOn ? storedTarget(changes.runsOn) : spec.runsOn,
    env: changes.env.length > 0 ? changes.env : spec.env,
    readinessTimeout: changes.readinessTimeout ?? spec.readinessTimeout,
  };
}

/** The definition after an update, before its versions; `problems` are those that only the stored service shows. */
export function updatedService(
  state: ServiceState,
  request: UpdateServiceRequest,
): { next: Partial<ServiceState>; problems: FieldProblem[]; refusal?: string } {
  const { metadata, spec } = request;
  const next = {
    metadata: updatedMetadata(state.metadata, metadata),
    spec: spec && touchesSpec(spec) ? updatedSpec(state.spec, spec) : state.spec,
  };
  const isBare = next.spec !== state.spec && next.spec.commands && !next.spec.commands.start;
  const problems = isBare ? [{ field: "spec.commands.start", message: "is required" }] : [];
  if (isBeingDeleted(state)) return { next, problems, refusal: "the service is being deleted" };
  if (touchesSpec(spec) && (!isAtRest(state) || isStartPending(state)))
    return { next, problems, refusal: "the service runs or is about to; stop the service first" };
  return { next, problems };
}

// Status.

/** Phases in which a session may be found after each phase of the same session. */
const FOLLOWS: Partial<Record<ServicePhase, readonly ServicePhase[]>> = {
  [STARTING]: [STARTING, RUNNING, STOPPING, STOPPED, FAILED],
  [RUNNING]: [RUNNING, STOPPING, STOPPED, FAILED],
  [STOPPING]: [STOPPING, STOPPED, FAILED],
  [STOPPED]: [STOPPED],
  // The late word of a runner whose environment was given up as lost.
  [FAILED]: [FAILED, STOPPED],
};
const WITH_PROCESSES: ReadonlySet<ServicePhase> = new Set([STARTING, RUNNING, STOPPING]);

/** What became of a status: kept, refused with a sentence, stored, or the end of the record. */
export type StatusMove = Move<ServiceState> | { kind: "removed" };

/**
 * Judges a complete status from whoever runs the service. `isHalted` says that the environment has no processes any
 * more. Steps in between may be left out, for only the newest report is sent.
 */
export function acceptServiceStatus(state: ServiceState, status: ServiceStatus, isHalted: boolean): StatusMove {
  const refused = (reason: string): StatusMove => ({ kind: "refused", reason });
  const { spec, status: before } = state;
  if (status.session !== spec.session && status.session !== before.session) return refused("stale session");
  if (!isLogUrl(status.logUrl)) return refused("the log address is not one");
  if (status.phase === DELETED) return isBeingDeleted(state) ? { kind: "removed" } : refused("deletion is not wanted");
  if (WITH_PROCESSES.has(status.phase) && isHalted) return refused("the environment does not run");
  // A session begins anywhere: at STARTING, or with the failure that kept it from starting.
  const possible = status.session === before.session ? FOLLOWS[before.phase] : FOLLOWS[STARTING];
  if (!possible?.includes(status.phase))
    return refused(`${ServicePhase[before.phase]} is not followed by ${ServicePhase[status.phase] ?? status.phase}`);
  return settled(state, { status: { ...status, failureMessage: storedFailure(status.failureMessage) } });
}

/** Problems of the status that a process of the environment sends; `logsUrl` is where the environment's own log is. */
export function serviceStatusProblems(
  state: ServiceState,
  part: UpdateServiceRequest_ServiceStatus,
  logsUrl: string,
): FieldProblem[] {
  const { output } = mergedStatus(state, part);
  return [
    ...outputProblems(output, "status.output"),
    ...(part.logUrl && !isOwnLog(part.logUrl, logsUrl)
      ? [{ field: "status.log_url", message: "must lie below the environment's own log address" }]
      : []),
  ];
}

/** The complete status that a part of one amounts to; a new session begins without what was left of the old one. */
export function mergedStatus({ status: stored }: ServiceState, part: UpdateServiceRequest_ServiceStatus) {
  const session = part.session ?? stored.session;
  const { statusVersion, phase } = stored;
  const before = session === stored.session ? stored : create(ServiceStatusSchema, { statusVersion, phase, session });
  return {
    ...before,
    phase: part.phase ?? before.phase,
    failureMessage: part.failureMessage ?? before.failureMessage,
    logUrl: part.logUrl ?? before.logUrl,
    output: mergedOutput(before.output, part.output),
  };
}

/** The environment was declared stopped: what did not say that it ended is lost. */
export function loseService(state: ServiceState): Move<ServiceState> {
  if (isAtRest(state)) return { kind: "noop" };
  return settled(state, { status: { ...state.status, phase: FAILED, failureMessage: LOST } });
}

// Replacing, by an automations file.

/** The goal that goes with a new spec: what runs is started again with it, if it can be. `session` is fresh. */
function goalWith(state: ServiceState, spec: ServiceSpec, session: string): Partial<ServiceSpec> {
  if (state.spec.desiredPhase !== RUNNING) return {};
  if (!spec.commands?.start) return { desiredPhase: STOPPED };
  const isUp = state.status.phase === STARTING || state.status.phase === RUNNING;
  return isUp && !isStartPending(state) ? { session } : {};
}

/** A new definition, also of a service that runs. An unset and a zero timeout say the same. */
export function replaceService(
  state: ServiceState,
  { metadata, spec }: Pick<ServiceState, "metadata" | "spec">,
  session: string,
): Move<ServiceState> {
  const limit = ({ readinessTimeout }: ServiceSpec) => (readinessTimeout ? durationMs(readinessTimeout) : 0);
  const { readinessTimeout } = limit(spec) === limit(state.spec) ? state.spec : spec;
  const wanted = { ...spec, readinessTimeout };
  if (sameSpec(state.spec, wanted)) return settled(state, { metadata });
  return settled(state, { metadata, spec: { ...wanted, ...goalWith(state, wanted, session) } });
}
