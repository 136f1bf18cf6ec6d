import { create, type DescMessage, equals, type MessageShape } from "@bufbuild/protobuf";
import { durationMs, type Timestamp, timestampDate, timestampFromDate, timestampMs } from "@bufbuild/protobuf/wkt";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentActivitySignal,
  EnvironmentActivitySignalSchema,
  type EnvironmentMetadata,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentRole,
  type EnvironmentSpec,
  EnvironmentSpec_MachineSchema,
  type EnvironmentSpec_Secret,
  EnvironmentSpecSchema,
  type EnvironmentStatus,
  type EnvironmentStatus_AutomationsFile,
  type EnvironmentStatus_EnvironmentURLs,
  EnvironmentStatus_EnvironmentURLsSchema,
  EnvironmentStatus_MachineSchema,
  type EnvironmentStatus_RunnerACK,
  EnvironmentStatusSchema,
  type KernelControlsConfig,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";

// The state machine of an environment. Every function is pure and returns new values; inputs are never modified, so
// messages may be shared between the old and the new state. Whoever edits spec, status, metadata or facts passes the
// edit through `settle`, which alone derives the phase, the messages for people, the URLs and both versions.

const MINUTE_MS = 60_000;
const DAY_MS = 24 * 60 * MINUTE_MS;

/** How long a start may take while the runner is reachable, in milliseconds. */
export const START_DEADLINE_MS = 60 * MINUTE_MS;
/** After how many milliseconds in STOPPING people are told that a forced delete is the way out; runners need 5 minutes. */
export const STOP_OVERDUE_MS = 10 * MINUTE_MS;
/** The same for DELETING. */
export const DELETE_OVERDUE_MS = 10 * MINUTE_MS;
/** How long a deleted environment stays readable, in milliseconds. */
export const TOMBSTONE_MS = 7 * DAY_MS;
/** Archive delay of an organization without a policy for it, in milliseconds. */
export const DEFAULT_ARCHIVE_AFTER_MS = 3 * DAY_MS;
/** Least distance between two stored activity signals of one source, in milliseconds. */
export const ACTIVITY_SIGNAL_INTERVAL_MS = 5 * MINUTE_MS;

const MESSAGE_LIMIT = 50;
const MESSAGE_LENGTH = 2000;
/** How many items each trigger names that it has left out. */
const LEFT_OUT_LINES = 5;

/** What a row keeps of an environment besides its messages; never on the wire. */
export interface EnvironmentFacts {
  /** When the phase became RUNNING for the first time; null before. */
  firstRunningAt: Date | null;
  /** Since when the phase is RUNNING or UPDATING without a break; null in other phases. */
  runningSince: Date | null;
  /** Since when the phase is STOPPED; null in other phases. */
  stoppedAt: Date | null;
  /** Last time somebody took the environment out of the archive. */
  unarchivedAt: Date | null;
  /** Since when the phase is what it is; for DELETED the time of deletion. */
  phaseSince: Date;
  /** Archive as soon as the phase is STOPPED. */
  archiveRequested: boolean;
  /** Deleted by force, without waiting for the runner. */
  forced: boolean;
  /** The runner has accepted a spec or reported a machine, so there may be something to clean up. */
  acknowledged: boolean;
  /** The `spec.machine.session` for which all gates have passed; empty if none. */
  gatesPassedSession: string;
  /** Newest sign of activity. */
  lastActivityAt: Date | null;
  /** When `status.activity_signal` was last written. */
  signalWrittenAt: Date | null;
  /** Since when the lease of the runner has been expired; null while it is reachable. */
  runnerUnreachableSince: Date | null;
  /** When the runner was last reachable again after an outage. */
  runnerBackSince: Date | null;
  /** Who fixed `metadata.lockdown_at`: the lifetime policy at creation, or an admin by hand. */
  lockdownSource: "policy" | "admin" | null;
  /** URLs of the newest report; the status shows those that the phase allows. */
  reportedUrls: EnvironmentStatus_EnvironmentURLs | null;
  /** What the newest report warns of in the automations file; the status adds what follows. */
  fileWarning: string;
  /** What triggers have left out when they fired last, a line each that begins with the name of the trigger. */
  leftOut: string;
}

/** Everything that is stored about one environment. */
export interface EnvironmentState {
  metadata: EnvironmentMetadata;
  spec: EnvironmentSpec;
  status: EnvironmentStatus;
  facts: EnvironmentFacts;
}

/** Which halves differ from what was stored; `phase` implies `status`. */
export interface Changes {
  metadata: boolean;
  spec: boolean;
  status: boolean;
  facts: boolean;
  phase: boolean;
}

/** A state ready to be stored, and what is new about it. */
export interface Settled extends EnvironmentState {
  changed: Changes;
}

/** What became of a request; `reason` is a sentence for the caller, fit for FAILED_PRECONDITION. */
export type Transition = { kind: "noop" } | { kind: "refused"; reason: string } | { kind: "changed"; next: Settled };

/** How a report was judged. STALE is decided before, by its sequence number. */
export type ReportResult = "ok" | "rejected" | "not_assigned";

const UNCHANGED: Changes = { metadata: false, spec: false, status: false, facts: false, phase: false };
const NOOP: Transition = { kind: "noop" };

const SETTLED_PHASES: ReadonlySet<ContentPhase> = new Set([
  ContentPhase.READY,
  ContentPhase.FAILED,
  ContentPhase.UNAVAILABLE,
]);
const BUSY_PHASES: ReadonlySet<ContentPhase> = new Set([
  ContentPhase.CREATING,
  ContentPhase.INITIALIZING,
  ContentPhase.UPDATING,
]);
const BROKEN_PHASES: ReadonlySet<ContentPhase> = new Set([ContentPhase.FAILED, ContentPhase.UNAVAILABLE]);
const STARTING_PHASES: ReadonlySet<EnvironmentPhase> = new Set([EnvironmentPhase.CREATING, EnvironmentPhase.STARTING]);
const RUNNING_PHASES: ReadonlySet<EnvironmentPhase> = new Set([EnvironmentPhase.RUNNING, EnvironmentPhase.UPDATING]);
const GONE_PHASES: ReadonlySet<EnvironmentPhase> = new Set([EnvironmentPhase.DELETING, EnvironmentPhase.DELETED]);

/** Facts of an environment that is created at `now`. */
export function newFacts(now: Date): EnvironmentFacts {
  return {
    firstRunningAt: null,
    runningSince: null,
    stoppedAt: null,
    unarchivedAt: null,
    phaseSince: now,
    archiveRequested: false,
    forced: false,
    acknowledged: false,
    gatesPassedSession: "",
    lastActivityAt: null,
    signalWrittenAt: null,
    runnerUnreachableSince: null,
    runnerBackSince: null,
    lockdownSource: null,
    reportedUrls: null,
    fileWarning: "",
    leftOut: "",
  };
}

/** The phase is one in which an environment works or is on its way there: CREATING, STARTING, RUNNING, UPDATING. */
export const isActive = (phase: EnvironmentPhase) => STARTING_PHASES.has(phase) || RUNNING_PHASES.has(phase);

/** The phase is RUNNING or UPDATING: URLs are served. */
export const isRunning = (phase: EnvironmentPhase) => RUNNING_PHASES.has(phase);

/** Deleted, or on the way there, whatever the phase still shows. */
export const isLeaving = (state: EnvironmentState) =>
  state.spec.desiredPhase === EnvironmentPhase.DELETED || GONE_PHASES.has(state.status.phase);

const sessionOf = (part: { session: string } | undefined) => part?.session ?? "";

/** The reported machine belongs to the newest start. */
const isCurrent = (spec: EnvironmentSpec, status: EnvironmentStatus) =>
  sessionOf(status.machine) === sessionOf(spec.machine);

const hasStarted = (spec: EnvironmentSpec, facts: EnvironmentFacts) =>
  facts.gatesPassedSession !== "" && facts.gatesPassedSession === sessionOf(spec.machine);

function secretsSettled(spec: EnvironmentSpec, status: EnvironmentStatus): boolean {
  const reported = new Map(status.secrets.map((secret) => [secret.id, secret]));
  return spec.secrets.every((secret) => {
    const found = reported.get(secret.id);
    return found?.session === secret.session && SETTLED_PHASES.has(found.phase);
  });
}

function gatesPass(spec: EnvironmentSpec, status: EnvironmentStatus): boolean {
  const { content, devcontainer } = status;
  const contentReady = content?.phase === ContentPhase.READY && content.session === sessionOf(spec.content);
  const containerSettled =
    (devcontainer?.phase === DevContainerPhase.RUNNING || devcontainer?.phase === DevContainerPhase.FAILED) &&
    devcontainer.session === sessionOf(spec.devcontainer);
  return contentReady && containerSettled && secretsSettled(spec, status);
}

function sameMembers(left: readonly string[], right: readonly string[]): boolean {
  const members = new Set(left);
  return members.size === new Set(right).size && right.every((member) => members.has(member));
}

function updatePending(spec: EnvironmentSpec, status: EnvironmentStatus): boolean {
  const mark = (secret: { id: string; session: string }) => `${secret.id}\n${secret.session}`;
  const keyIds = (keys: readonly { id: string }[]) => keys.map((key) => key.id);
  return (
    sessionOf(spec.content) !== sessionOf(status.content) ||
    sessionOf(spec.devcontainer) !== sessionOf(status.devcontainer) ||
    !sameMembers(spec.secrets.map(mark), status.secrets.map(mark)) ||
    !sameMembers(keyIds(spec.sshPublicKeys), keyIds(status.sshPublicKeys)) ||
    status.devcontainer?.phase === DevContainerPhase.CREATING ||
    [status.content, ...status.secrets, ...status.sshPublicKeys].some((part) => part && BUSY_PHASES.has(part.phase))
  );
}

/** The overall phase that goal, observation and facts amount to. Never UNSPECIFIED. */
export function derivePhase(
  spec: EnvironmentSpec,
  status: EnvironmentStatus,
  facts: EnvironmentFacts,
): EnvironmentPhase {
  const machine = status.machine?.phase ?? MachinePhase.UNSPECIFIED;
  switch (spec.desiredPhase) {
    case EnvironmentPhase.DELETED:
      if (facts.forced || machine === MachinePhase.DELETED || !facts.acknowledged) return EnvironmentPhase.DELETED;
      if (machine === MachinePhase.UNSPECIFIED || machine === MachinePhase.STOPPED) return EnvironmentPhase.DELETING;
      return machine === MachinePhase.DELETING ? EnvironmentPhase.DELETING : EnvironmentPhase.STOPPING;
    case EnvironmentPhase.STOPPED:
      if (machine === MachinePhase.UNSPECIFIED || machine === MachinePhase.STOPPED) return EnvironmentPhase.STOPPED;
      return EnvironmentPhase.STOPPING;
    case EnvironmentPhase.RUNNING:
      if (!isCurrent(spec, status) || machine !== MachinePhase.RUNNING) {
        const untouched = machine === MachinePhase.UNSPECIFIED || machine === MachinePhase.CREATING;
        return !facts.firstRunningAt && untouched ? EnvironmentPhase.CREATING : EnvironmentPhase.STARTING;
      }
      if (!hasStarted(spec, facts)) return EnvironmentPhase.STARTING;
      return updatePending(spec, status) ? EnvironmentPhase.UPDATING : EnvironmentPhase.RUNNING;
    default:
      return status.phase || EnvironmentPhase.CREATING;
  }
}

const ackRefuses = (ack: EnvironmentStatus_RunnerACK) =>
  ack.statusCode !== AckCode.UNSPECIFIED && ack.statusCode !== AckCode.OK;
const ackText = (ack: EnvironmentStatus_RunnerACK) => ack.message || "the runner refused the specification";

/**
 * Why a start cannot succeed. Only an acknowledgement of the newest spec counts, and only content that was reported
 * together with the newest machine session: both may still show the attempt before.
 */
function fatalCauses({ spec, status, facts }: EnvironmentState, specVersion: bigint): string[] {
  const { runnerAck, machine, content } = status;
  const causes: string[] = [];
  const starting = !hasStarted(spec, facts);
  if (starting && runnerAck?.specVersion === specVersion && ackRefuses(runnerAck)) causes.push(ackText(runnerAck));
  if (!isCurrent(spec, status)) return causes;
  if (machine?.failureMessage) causes.push(machine.failureMessage);
  if (starting && content?.phase === ContentPhase.FAILED && content.session === sessionOf(spec.content)) {
    causes.push(content.failureMessage || "the content could not be initialized");
  }
  return causes;
}

function bounded(messages: readonly string[]): string[] {
  const distinct = [...new Set(messages.filter(Boolean).map((text) => text.slice(0, MESSAGE_LENGTH)))];
  if (distinct.length <= MESSAGE_LIMIT) return distinct;
  const shown = distinct.slice(0, MESSAGE_LIMIT - 1);
  return [...shown, `and ${distinct.length - shown.length} more`];
}

/** Messages of the parts that concern the newest start. */
function partWarnings({ spec, status, facts }: EnvironmentState): string[] {
  const { runnerAck, machine, content, devcontainer, automationsFile } = status;
  if (!machine || !isCurrent(spec, status)) return [];
  const refusal = runnerAck && hasStarted(spec, facts) && ackRefuses(runnerAck) ? ackText(runnerAck) : "";
  const secrets = status.secrets.flatMap((secret) => {
    const failure = BROKEN_PHASES.has(secret.phase)
      ? secret.failureMessage || (secret.phase === ContentPhase.FAILED ? "failed" : "unavailable")
      : "";
    return [failure, secret.warningMessage]
      .filter(Boolean)
      .map((text) => `secret ${secret.secretName || secret.id}: ${text}`);
  });
  return [
    refusal,
    machine.failureMessage,
    machine.warningMessage,
    content?.phase === ContentPhase.FAILED ? content.failureMessage || "the content could not be initialized" : "",
    content?.warningMessage ?? "",
    devcontainer?.phase === DevContainerPhase.FAILED ? devcontainer.failureMessage || "the dev container failed" : "",
    devcontainer?.warningMessage ?? "",
    ...secrets,
    automationsFile?.phase === ContentPhase.FAILED
      ? automationsFile.failureMessage || "the automations file could not be applied"
      : "",
    automationsFile?.warningMessage ?? "",
  ];
}

const overdueText = ({ status, facts }: EnvironmentState) =>
  `${status.phase === EnvironmentPhase.STOPPING ? "stopping" : "deleting"} since ${facts.phaseSince.toISOString()}, longer than expected; deleting by force ends it`;
const lockdownText = (at: Timestamp) => `the lifetime of this environment ended at ${timestampDate(at).toISOString()}`;

function lockdownDue({ metadata, status }: EnvironmentState): Date | null {
  return metadata.lockdownAt && !GONE_PHASES.has(status.phase) ? timestampDate(metadata.lockdownAt) : null;
}

function warnings(state: EnvironmentState, now: Date): string[] {
  const { metadata, spec, status, facts } = state;
  const own: string[] = [];
  const overdue = overdueAt(state);
  const lockdown = lockdownDue(state);
  if (facts.runnerUnreachableSince && status.phase !== EnvironmentPhase.STOPPED) {
    own.push(`runner unreachable since ${facts.runnerUnreachableSince.toISOString()}`);
  }
  if (overdue && overdue <= now) own.push(overdueText(state));
  if (metadata.lockdownAt && lockdown && lockdown <= now) own.push(lockdownText(metadata.lockdownAt));
  if (![EnvironmentPhase.RUNNING, EnvironmentPhase.STOPPED, EnvironmentPhase.DELETED].includes(spec.desiredPhase)) {
    own.push(`unknown desired phase ${spec.desiredPhase}; the last phase is kept`);
  }
  const failures = new Set(status.failureMessage);
  return bounded([...own, ...partWarnings(state).filter((text) => !failures.has(text.slice(0, MESSAGE_LENGTH)))]);
}

function visibleUrls({ spec, status, facts }: EnvironmentState): EnvironmentStatus_EnvironmentURLs | undefined {
  const urls = facts.reportedUrls;
  if (!urls) return undefined;
  if (!isRunning(status.phase)) {
    return urls.logs ? create(EnvironmentStatus_EnvironmentURLsSchema, { logs: urls.logs }) : undefined;
  }
  const open = new Set(spec.ports.map((port) => port.port));
  return { ...urls, ports: urls.ports.filter((port) => open.has(port.port)) };
}

/** The automations file with what its triggers have left out, which is for its readers to hear. */
function visibleFile({ status, facts }: EnvironmentState): EnvironmentStatus_AutomationsFile | undefined {
  const warningMessage = [facts.fileWarning, ...facts.leftOut.split("\n")].filter(Boolean).join("; ");
  return status.automationsFile && { ...status.automationsFile, warningMessage };
}

function factsInPhase(facts: EnvironmentFacts, before: EnvironmentPhase, phase: EnvironmentPhase, now: Date) {
  const running = isRunning(phase);
  return {
    ...facts,
    firstRunningAt: facts.firstRunningAt ?? (running ? now : null),
    runningSince: running ? (facts.runningSince ?? now) : null,
    stoppedAt: phase === EnvironmentPhase.STOPPED ? (facts.stoppedAt ?? now) : null,
    phaseSince: phase === before ? facts.phaseSince : now,
  };
}

/** What stays of a deleted environment: no secrets, keys, annotations, git status, URLs or warnings. */
function tombstone({ metadata, spec, status, facts }: EnvironmentState): EnvironmentState {
  const content = status.content && { ...status.content, git: undefined };
  const stripped = { secrets: [], sshPublicKeys: [], environmentUrls: undefined, warningMessage: [] };
  return {
    metadata: { ...metadata, annotations: {} },
    spec: { ...spec, secrets: [], sshPublicKeys: [] },
    status: { ...status, ...stripped, content },
    facts: { ...facts, archiveRequested: false, reportedUrls: null, runnerUnreachableSince: null },
  };
}

function same<Desc extends DescMessage>(schema: Desc, left: MessageShape<Desc>, right: MessageShape<Desc>): boolean {
  return left === right || equals(schema, left, right);
}

const sameSpec = (left: EnvironmentSpec, right: EnvironmentSpec) =>
  left === right || equals(EnvironmentSpecSchema, left, { ...right, specVersion: left.specVersion });
const sameStatus = (left: EnvironmentStatus, right: EnvironmentStatus) =>
  left === right || equals(EnvironmentStatusSchema, left, { ...right, statusVersion: left.statusVersion });

function sameFacts(left: EnvironmentFacts, right: EnvironmentFacts): boolean {
  const { reportedUrls: leftUrls, ...leftRest } = left;
  const { reportedUrls: rightUrls, ...rightRest } = right;
  const plain = (value: unknown) => (value instanceof Date ? value.getTime() : value);
  const keys = Object.keys(leftRest) as (keyof typeof leftRest)[];
  if (keys.some((key) => plain(leftRest[key]) !== plain(rightRest[key]))) return false;
  if (!leftUrls || !rightUrls) return leftUrls === rightUrls;
  return same(EnvironmentStatus_EnvironmentURLsSchema, leftUrls, rightUrls);
}

/**
 * Turns an edit of a stored environment into the state to store, at `now`: decides on failure, gates, phase, times,
 * messages, URLs, archiving and stripping, and raises `spec_version` and `status_version` by one where their half
 * changed. `draft` may carry any edit except of what is decided here; versions in it are ignored. Settling a settled
 * state again changes nothing, and nothing leads out of DELETED.
 */
export function settle(stored: EnvironmentState, draft: EnvironmentState, now: Date): Settled {
  if (stored.status.phase === EnvironmentPhase.DELETED) return { ...stored, changed: UNCHANGED };
  const phaseBefore = stored.status.phase;
  const specVersion = stored.spec.specVersion + (sameSpec(stored.spec, draft.spec) ? 0n : 1n);
  let { metadata, spec, status, facts } = draft;

  if (spec.desiredPhase === EnvironmentPhase.RUNNING) {
    const failureMessage = bounded([...status.failureMessage, ...fatalCauses(draft, specVersion)]);
    status = { ...status, failureMessage };
    if (failureMessage.length > 0) spec = { ...spec, desiredPhase: EnvironmentPhase.STOPPED };
    else if (isCurrent(spec, status) && status.machine?.phase === MachinePhase.RUNNING && gatesPass(spec, status)) {
      facts = { ...facts, gatesPassedSession: sessionOf(spec.machine) };
    }
  }

  const phase = derivePhase(spec, { ...status, phase: phaseBefore }, facts);
  status = { ...status, phase };
  facts = factsInPhase(facts, phaseBefore, phase, now);
  if (phase === EnvironmentPhase.STOPPED && facts.archiveRequested) {
    metadata = { ...metadata, archivedAt: metadata.archivedAt ?? timestampFromDate(now) };
    facts = { ...facts, archiveRequested: false };
  }
  let next: EnvironmentState = { metadata, spec, status, facts };
  if (phase === EnvironmentPhase.DELETED) next = tombstone(next);
  else {
    status = { ...status, environmentUrls: visibleUrls(next), automationsFile: visibleFile(next) };
    next = { ...next, status };
    next = { ...next, status: { ...status, warningMessage: warnings(next, now) } };
  }
  return versioned(stored, next);
}

function versioned(stored: EnvironmentState, next: EnvironmentState): Settled {
  const changed: Changes = {
    metadata: !same(EnvironmentMetadataSchema, stored.metadata, next.metadata),
    spec: !sameSpec(stored.spec, next.spec),
    status: !sameStatus(stored.status, next.status),
    facts: !sameFacts(stored.facts, next.facts),
    phase: stored.status.phase !== next.status.phase,
  };
  return {
    metadata: changed.metadata ? next.metadata : stored.metadata,
    spec: changed.spec ? { ...next.spec, specVersion: stored.spec.specVersion + 1n } : stored.spec,
    status: changed.status ? { ...next.status, statusVersion: stored.status.statusVersion + 1n } : stored.status,
    facts: changed.facts ? next.facts : stored.facts,
    changed,
  };
}

/** An edit as the answer to a request: settled, or a no-op if nothing is new. */
export function transition(stored: EnvironmentState, edit: Partial<EnvironmentState>, now: Date): Transition {
  const next = settle(stored, { ...stored, ...edit }, now);
  return Object.values(next.changed).some(Boolean) ? { kind: "changed", next } : NOOP;
}

const refused = (reason: string): Transition => ({ kind: "refused", reason });
const withGoal = (spec: EnvironmentSpec, desiredPhase: EnvironmentPhase): EnvironmentSpec => ({
  ...spec,
  desiredPhase,
});

function leavingReason({ status }: EnvironmentState): string {
  return status.phase === EnvironmentPhase.DELETED ? "the environment is deleted" : "the environment is being deleted";
}

/** Archived, or going to be as soon as it has stopped. */
export const isArchived = ({ metadata, facts }: EnvironmentState) =>
  metadata.archivedAt !== undefined || facts.archiveRequested;

/** What a start brings along. */
export interface Start {
  /** Fresh marker of this start, never used before. */
  machineSession: string;
  /** Secrets resolved anew; replace those of the spec. */
  secrets: EnvironmentSpec_Secret[];
  /** Kernel controls with the rules now in force; absent keeps those of the spec. */
  kernelControls?: KernelControlsConfig | undefined;
}

/**
 * StartEnvironment. The phase after it is STARTING or CREATING, never STOPPED. Lockdown, quotas and the state of the
 * runner are checked by the caller.
 */
export function requestStart(state: EnvironmentState, start: Start, now: Date): Transition {
  const { metadata, spec, status, facts } = state;
  if (isLeaving(state)) return refused(leavingReason(state));
  if (isActive(status.phase)) return NOOP;
  if (isArchived(state)) return refused("the environment is archived; unarchive it first");
  if (status.phase !== EnvironmentPhase.STOPPED) return refused("the environment is still stopping");
  const machine = { ...(spec.machine ?? create(EnvironmentSpec_MachineSchema)), session: start.machineSession };
  const kernelControlsConfig = start.kernelControls ?? spec.kernelControlsConfig;
  return transition(
    state,
    {
      metadata: { ...metadata, lastStartedAt: timestampFromDate(now) },
      spec: { ...withGoal(spec, EnvironmentPhase.RUNNING), machine, secrets: start.secrets, kernelControlsConfig },
      status: { ...status, failureMessage: [], machine: status.machine && { ...status.machine, timeout: "" } },
      facts: { ...facts, leftOut: "" },
    },
    now,
  );
}

/** StopEnvironment, and every stop that the control plane decides on except the idle one. */
export function requestStop(state: EnvironmentState, now: Date): Transition {
  if (isLeaving(state) || !isActive(state.status.phase)) return NOOP;
  return transition(state, { spec: withGoal(state.spec, EnvironmentPhase.STOPPED) }, now);
}

/** DeleteEnvironment. With `force` the environment is DELETED at once, whatever its state. */
export function requestDelete(state: EnvironmentState, force: boolean, now: Date): Transition {
  if (state.status.phase === EnvironmentPhase.DELETED) return NOOP;
  const facts = { ...state.facts, forced: state.facts.forced || force };
  return transition(state, { spec: withGoal(state.spec, EnvironmentPhase.DELETED), facts }, now);
}

/** ArchiveEnvironment: at once if STOPPED, else after the stop that it asks for. */
export function requestArchive(state: EnvironmentState, now: Date): Transition {
  if (isLeaving(state)) return refused(leavingReason(state));
  if (isArchived(state)) return NOOP;
  const facts = { ...state.facts, archiveRequested: true };
  return transition(state, { spec: withGoal(state.spec, EnvironmentPhase.STOPPED), facts }, now);
}

/** UnarchiveEnvironment: also withdraws a pending archive request. The quota is checked by the caller. */
export function requestUnarchive(state: EnvironmentState, now: Date): Transition {
  if (isLeaving(state)) return refused(leavingReason(state));
  if (!isArchived(state)) return NOOP;
  const metadata = { ...state.metadata, archivedAt: undefined };
  return transition(state, { metadata, facts: { ...state.facts, archiveRequested: false, unarchivedAt: now } }, now);
}

/** MarkEnvironmentActive. A signal with timestamp zero says "no activity" and does not extend the time. */
export function markActive(
  state: EnvironmentState,
  signal: EnvironmentActivitySignal | undefined,
  now: Date,
): Transition {
  const { status, facts } = state;
  if (isLeaving(state)) return refused(leavingReason(state));
  if (!isActive(status.phase)) return refused("the environment is not active");
  const source = signal?.source ?? "API";
  const at = new Date(Math.min(signal?.timestamp ? timestampMs(signal.timestamp) : now.getTime(), now.getTime()));
  const idle = at.getTime() === 0;
  if (!idle && facts.lastActivityAt && at < facts.lastActivityAt) return NOOP;
  const quiet =
    facts.signalWrittenAt &&
    status.activitySignal?.source === source &&
    now.getTime() - facts.signalWrittenAt.getTime() < ACTIVITY_SIGNAL_INTERVAL_MS;
  const activitySignal = create(EnvironmentActivitySignalSchema, { source, timestamp: timestampFromDate(at) });
  return transition(
    state,
    {
      status: quiet ? status : { ...status, activitySignal },
      facts: {
        ...facts,
        lastActivityAt: idle ? facts.lastActivityAt : at,
        signalWrittenAt: quiet ? facts.signalWrittenAt : now,
      },
    },
    now,
  );
}

/**
 * A report of the runner, complete: a part that it leaves out is unset, except the acknowledgement, which then stays.
 * Only the parts that the runner owns are read. A report with a new machine session describes that start: content that
 * is FAILED in it has failed in that start.
 */
export function applyReport(
  stored: EnvironmentState,
  report: EnvironmentStatus,
  now: Date,
): { result: ReportResult; next: Settled } {
  const { spec, status, facts } = stored;
  const judged = (result: ReportResult) => ({ result, next: { ...stored, changed: UNCHANGED } });
  if (status.phase === EnvironmentPhase.DELETED) return judged("not_assigned");
  const acknowledged = report.runnerAck?.specVersion;
  if (acknowledged !== undefined) {
    const before = status.runnerAck?.specVersion ?? 0n;
    if (acknowledged > spec.specVersion || acknowledged < before) return judged("rejected");
  }
  if (report.machine?.phase === MachinePhase.DELETED && spec.desiredPhase !== EnvironmentPhase.DELETED) {
    return judged("rejected");
  }
  const timeout = status.machine?.timeout ?? "";
  const machine = report.machine ?? (timeout ? create(EnvironmentStatus_MachineSchema) : undefined);
  const urls = report.environmentUrls ?? create(EnvironmentStatus_EnvironmentURLsSchema);
  const known =
    Boolean(acknowledged) || (report.machine?.phase ?? MachinePhase.UNSPECIFIED) !== MachinePhase.UNSPECIFIED;
  const draft: EnvironmentState = {
    ...stored,
    status: {
      ...status,
      runnerAck: report.runnerAck ?? status.runnerAck,
      machine: machine && { ...machine, timeout },
      content: report.content,
      devcontainer: report.devcontainer,
      secrets: report.secrets,
      sshPublicKeys: report.sshPublicKeys,
      automationsFile: report.automationsFile,
    },
    facts: {
      ...facts,
      acknowledged: facts.acknowledged || known,
      reportedUrls: { ...urls, logs: urls.logs || facts.reportedUrls?.logs || "" },
      fileWarning: report.automationsFile?.warningMessage ?? "",
    },
  };
  return { result: "ok", next: settle(stored, draft, now) };
}

/** What triggers have left out now that they have fired, as ends of sentences; what they said before is over. */
export function triggersFired(
  state: EnvironmentState,
  firings: readonly { trigger: string; leftOut: readonly string[] }[],
  now: Date,
): Transition {
  const fired = new Set(firings.map(({ trigger }) => trigger));
  const kept = state.facts.leftOut.split("\n").filter((line) => line && !fired.has(line.split(" ", 1)[0] ?? ""));
  const news = firings.flatMap(({ trigger, leftOut }) => {
    const more = leftOut.length - LEFT_OUT_LINES;
    const shown = leftOut.slice(0, LEFT_OUT_LINES);
    return [...shown, ...(more > 0 ? [`left out ${more} more`] : [])].map((text) => `${trigger} ${text}`);
  });
  return transition(state, { facts: { ...state.facts, leftOut: [...kept, ...news].join("\n") } }, now);
}

/** The lease of the runner has expired at `since`. For every environment of the runner; active ones show it. */
export function runnerUnreachable(state: EnvironmentState, since: Date, now: Date): Transition {
  if (state.facts.runnerUnreachableSince) return NOOP;
  return transition(state, { facts: { ...state.facts, runnerUnreachableSince: since } }, now);
}

/** The runner is reachable again: its warning goes, idle clock and start deadline begin anew. */
export function runnerReturned(state: EnvironmentState, now: Date): Transition {
  if (!state.facts.runnerUnreachableSince) return NOOP;
  return transition(state, { facts: { ...state.facts, runnerUnreachableSince: null, runnerBackSince: now } }, now);
}

function later(base: number, ...others: (Date | null | undefined)[]): number {
  return Math.max(base, ...others.map((date) => date?.getTime() ?? 0));
}

/** When the current start counts as failed; null if nothing is starting or the runner is unreachable. */
export function startDeadline({ metadata, spec, status, facts }: EnvironmentState): Date | null {
  if (!STARTING_PHASES.has(status.phase) || facts.runnerUnreachableSince) return null;
  // A machine that was lost after a successful start gets the full time for its restart.
  const restartSince = hasStarted(spec, facts) ? facts.phaseSince : null;
  const startedAt = metadata.lastStartedAt ? timestampMs(metadata.lastStartedAt) : facts.phaseSince.getTime();
  return new Date(later(startedAt, facts.runnerBackSince, restartSince) + START_DEADLINE_MS);
}

/** When the environment stops for lack of activity; null if it does not run, never times out or the clock rests. */
export function idleDeadline({ metadata, spec, status, facts }: EnvironmentState): Date | null {
  const timeout = spec.timeout?.disconnected ? durationMs(spec.timeout.disconnected) : 0;
  const counts = isRunning(status.phase) && metadata.role !== EnvironmentRole.PREBUILD;
  if (!counts || timeout <= 0 || facts.runnerUnreachableSince) return null;
  return new Date(later(0, facts.lastActivityAt, facts.runningSince, facts.runnerBackSince) + timeout);
}

/** When a stop or deletion has taken longer than it should; null in other phases or while the runner is unreachable. */
export function overdueAt({ status, facts }: EnvironmentState): Date | null {
  if (facts.runnerUnreachableSince) return null;
  const since = later(facts.phaseSince.getTime(), facts.runnerBackSince);
  if (status.phase === EnvironmentPhase.STOPPING) return new Date(since + STOP_OVERDUE_MS);
  return status.phase === EnvironmentPhase.DELETING ? new Date(since + DELETE_OVERDUE_MS) : null;
}

/** Since when an environment has been waiting for its archival; null if it never archives by itself as it is. */
export function archivableSince(state: EnvironmentState): Date | null {
  const { metadata, status, facts } = state;
  if (metadata.role !== EnvironmentRole.DEFAULT || status.phase !== EnvironmentPhase.STOPPED) return null;
  if (isArchived(state) || !facts.stoppedAt) return null;
  return new Date(later(facts.stoppedAt.getTime(), facts.unarchivedAt));
}

/** When a stopped environment is archived by itself, `afterMs` being the policy or its default; null if never. */
export function archiveDeadline(state: EnvironmentState, afterMs: number): Date | null {
  const since = archivableSince(state);
  return since && new Date(since.getTime() + afterMs);
}

/** When an archived environment is deleted by itself; `afterMs` is the policy, 0 means never. */
export function deleteDeadline(state: EnvironmentState, afterMs: number): Date | null {
  const { archivedAt } = state.metadata;
  if (!archivedAt || afterMs <= 0 || isLeaving(state)) return null;
  return new Date(timestampMs(archivedAt) + afterMs);
}

/** When the row of a deleted environment goes; null before its deletion. */
export function tombstoneEnd({ status, facts }: EnvironmentState): Date | null {
  return status.phase === EnvironmentPhase.DELETED ? new Date(facts.phaseSince.getTime() + TOMBSTONE_MS) : null;
}

/** Start is refused for age: past lockdown, and the policy is strict or an admin fixed the time by hand. */
export function isLockedDown({ metadata, facts }: EnvironmentState, strict: boolean, now: Date): boolean {
  const past = metadata.lockdownAt !== undefined && timestampMs(metadata.lockdownAt) <= now.getTime();
  return past && (strict || facts.lockdownSource === "admin");
}

/** Ends a start that has taken too long; a no-op before the deadline. */
export function expireStartDeadline(state: EnvironmentState, now: Date): Transition {
  const deadline = startDeadline(state);
  if (!deadline || deadline > now) return NOOP;
  const text = `the environment did not start within ${START_DEADLINE_MS / MINUTE_MS} minutes`;
  return transition(
    state,
    { status: { ...state.status, failureMessage: [...state.status.failureMessage, text] } },
    now,
  );
}

/** Stops an environment that nobody uses and says so in `machine.timeout`; a no-op before the deadline. */
export function idleStop(state: EnvironmentState, now: Date): Transition {
  const deadline = idleDeadline(state);
  if (!deadline || deadline > now) return NOOP;
  const disconnected = state.spec.timeout?.disconnected;
  const minutes = Math.round((disconnected ? durationMs(disconnected) : 0) / MINUTE_MS);
  const timeout = `stopped after ${minutes} minutes without activity`;
  const machine = { ...(state.status.machine ?? create(EnvironmentStatus_MachineSchema)), timeout };
  const spec = withGoal(state.spec, EnvironmentPhase.STOPPED);
  return transition(state, { spec, status: { ...state.status, machine } }, now);
}

/**
 * The next time at which `runTimers` has something to do; null if only an event can move this environment. Archive and
 * delete delays are not part of it, since their policies are read when they fire.
 */
export function nextDeadline(state: EnvironmentState): Date | null {
  const { metadata, status } = state;
  const shown = (text: string) => status.warningMessage.includes(text);
  const dates = [
    startDeadline(state),
    idleDeadline(state),
    shown(overdueText(state)) ? null : overdueAt(state),
    metadata.lockdownAt && shown(lockdownText(metadata.lockdownAt)) ? null : lockdownDue(state),
  ].filter((date) => date !== null);
  return dates.length > 0 ? new Date(Math.min(...dates.map((date) => date.getTime()))) : null;
}

/** Applies whatever is due at `now`: start deadline, idle stop, or a warning whose time has come. */
export function runTimers(state: EnvironmentState, now: Date): Transition {
  const expired = expireStartDeadline(state, now);
  if (expired.kind !== "noop") return expired;
  const stopped = idleStop(state, now);
  return stopped.kind === "noop" ? transition(state, {}, now) : stopped;
}
