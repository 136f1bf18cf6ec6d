import { create, equals } from "@bufbuild/protobuf";
import { type Timestamp, timestampFromDate, timestampMs } from "@bufbuild/protobuf/wkt";
import {
  type TaskExecutionMetadata,
  TaskExecutionMetadataSchema,
  TaskExecutionPhase,
  type TaskExecutionSpec,
  type TaskExecutionSpec_Group,
  TaskExecutionSpecSchema,
  type TaskExecutionStatus,
  type TaskExecutionStatus_Step,
  TaskExecutionStatusSchema,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import type { Subject } from "../../gen/gitpod/v1/identity_pb.js";
import { isLogUrl, type Move, outputProblems, storedFailure, type TriggerName } from "./automation.ts";
import { stepsOf } from "./automation-plan.ts";

// One run of a task. The plan never changes; the runner says how its steps fare, and only the first word about an end
// counts.

const { PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED } = TaskExecutionPhase;

export interface ExecutionState {
  metadata: TaskExecutionMetadata;
  spec: TaskExecutionSpec;
  status: TaskExecutionStatus;
}

/** Phases that an execution never leaves. */
export const ENDED: ReadonlySet<TaskExecutionPhase> = new Set([SUCCEEDED, FAILED, STOPPED]);

export const hasEnded = ({ status }: ExecutionState) => ENDED.has(status.phase);

/** An execution in PENDING. */
export function newExecution(
  spec: TaskExecutionSpec,
  input: { taskId: string; environmentId: string; creator: Subject; startedBy: TriggerName; now: Date },
): ExecutionState {
  const { now, ...facts } = input;
  return {
    metadata: create(TaskExecutionMetadataSchema, { ...facts, createdAt: timestampFromDate(now) }),
    spec,
    status: create(TaskExecutionStatusSchema, { statusVersion: 1n, phase: PENDING }),
  };
}

const sameStatus = (left: TaskExecutionStatus, right: TaskExecutionStatus) =>
  equals(TaskExecutionStatusSchema, left, { ...right, statusVersion: left.statusVersion });

/** When an execution began and ended. */
export interface Times {
  startedAt: Timestamp;
  completedAt: Timestamp;
}

/** Times are kept once known, never in the future, and always there when the status calls for them. */
function timed(metadata: TaskExecutionMetadata, status: TaskExecutionStatus, times: Partial<Times>, now: Date) {
  const past = (time: Timestamp | undefined) =>
    time && timestampMs(time) < now.getTime() ? time : timestampFromDate(now);
  const hasBegun = status.steps.length > 0 || status.phase === RUNNING;
  const startedAt = metadata.startedAt ?? (hasBegun ? past(times.startedAt) : undefined);
  return { ...metadata, startedAt, completedAt: ENDED.has(status.phase) ? past(times.completedAt) : undefined };
}

function settled(
  stored: ExecutionState,
  edit: { spec?: TaskExecutionSpec; status?: TaskExecutionStatus },
  times: Partial<Times>,
  now: Date,
): Move<ExecutionState> {
  const spec = edit.spec && !equals(TaskExecutionSpecSchema, stored.spec, edit.spec) ? edit.spec : stored.spec;
  const isSame = !edit.status || sameStatus(stored.status, edit.status);
  if (spec === stored.spec && isSame) return { kind: "noop" };
  if (isSame || !edit.status) return { kind: "changed", next: { ...stored, spec } };
  const status = { ...edit.status, statusVersion: stored.status.statusVersion + 1n };
  return { kind: "changed", next: { metadata: timed(stored.metadata, status, times, now), spec, status } };
}

// Wishes.

const stopWanted = ({ spec }: ExecutionState) => spec.desiredPhase === STOPPED;

/** StopTaskExecution: what has not begun is over at once, what runs is asked to end. */
export function requestExecutionStop(state: ExecutionState, now: Date): Move<ExecutionState> {
  if (hasEnded(state)) return { kind: "noop" };
  const spec = { ...state.spec, desiredPhase: STOPPED };
  const status = state.status.phase === PENDING ? { ...state.status, phase: STOPPED } : state.status;
  return settled(state, { spec, status }, {}, now);
}

/** Ends what nobody will report on any more. */
export function failExecution(state: ExecutionState, failureMessage: string, now: Date): Move<ExecutionState> {
  if (hasEnded(state)) return { kind: "noop" };
  const steps = state.status.steps.map((step) =>
    step.phase === RUNNING ? { ...step, phase: FAILED, failureMessage } : step,
  );
  return settled(state, { status: { ...state.status, phase: FAILED, failureMessage, steps } }, {}, now);
}

// Reports.

/**
 * The phase that steps amount to; steps that have not begun are absent. A group begins only when all of the one before
 * succeeded, so after a failure or a stop nothing begins any more.
 */
export function executionPhase(
  plan: readonly TaskExecutionSpec_Group[],
  steps: readonly TaskExecutionStatus_Step[],
  isStopWanted: boolean,
): TaskExecutionPhase {
  const has = (phase: TaskExecutionPhase) => steps.some((step) => step.phase === phase);
  if (has(RUNNING)) return RUNNING;
  if (has(FAILED)) return FAILED;
  if (isStopWanted && steps.length < stepsOf(plan).length) return STOPPED;
  if (has(STOPPED)) return STOPPED;
  if (steps.length === 0) return PENDING;
  return steps.length < stepsOf(plan).length ? RUNNING : SUCCEEDED;
}

/** The step may be what it is now after what it was. */
function follows(before: TaskExecutionPhase | undefined, phase: TaskExecutionPhase): boolean {
  if (phase !== RUNNING && !ENDED.has(phase)) return false;
  return before === undefined || before === RUNNING || before === phase;
}

/** Why the steps cannot be as they are said to be; undefined if they can. */
function stepsRefusal({ spec, status: before }: ExecutionState, steps: readonly TaskExecutionStatus_Step[]) {
  const known = new Map(before.steps.map((step) => [step.id, step.phase]));
  const reported = new Map(steps.map((step) => [step.id, step.phase]));
  if (reported.size !== steps.length) return "a step is named twice";
  if ([...known.keys()].some((id) => !reported.has(id))) return "a step that has begun is missing";
  let mayBegin = true;
  let named = 0;
  for (const group of spec.plan) {
    const phases = group.steps.map(({ id }) => reported.get(id));
    const begun = phases.filter((phase) => phase !== undefined);
    named += begun.length;
    if (begun.length > 0 && !mayBegin) return "a step has begun before those that it waits for";
    mayBegin &&= phases.every((phase) => phase === SUCCEEDED);
  }
  if (named !== steps.length) return "a step is not part of the plan";
  if (steps.some(({ id, phase }) => !follows(known.get(id), phase))) return "a step is in an impossible phase";
  return steps.some(({ output }) => outputProblems(output, "output").length > 0) ? "an output is too large" : undefined;
}

/** Why the phase does not fit the steps; undefined if it does. */
function phaseRefusal(state: ExecutionState, { phase, steps, failureMessage }: TaskExecutionStatus) {
  const { spec, status: before } = state;
  const derived = executionPhase(spec.plan, steps, stopWanted(state));
  const isRunning = steps.some((step) => step.phase === RUNNING);
  switch (phase) {
    case PENDING:
      return before.phase === PENDING && steps.length === 0 ? undefined : "it has begun";
    case RUNNING:
      // A stop or a failure may have been noticed before its end could be.
      return undefined;
    case SUCCEEDED:
      return derived === SUCCEEDED ? undefined : "not all of its steps have succeeded";
    case FAILED:
      return !isRunning && (derived === FAILED || failureMessage) ? undefined : "no step has failed";
    case STOPPED:
      return !isRunning && derived !== FAILED && derived !== SUCCEEDED ? undefined : "it was not stopped";
    default:
      return "the phase is unknown";
  }
}

/** Judges a complete status from the runner. Steps in between may be left out, for only the newest report is sent. */
export function acceptExecutionReport(
  state: ExecutionState,
  status: TaskExecutionStatus,
  times: Partial<Times>,
  now: Date,
): Move<ExecutionState> {
  const kept = {
    ...status,
    failureMessage: storedFailure(status.failureMessage),
    steps: status.steps.map((step) => ({ ...step, failureMessage: storedFailure(step.failureMessage) })),
  };
  if (hasEnded(state)) {
    return sameStatus(state.status, kept) ? { kind: "noop" } : { kind: "refused", reason: "the execution has ended" };
  }
  const logReason = isLogUrl(status.logUrl) ? undefined : "the log address is not one";
  const reason = logReason ?? stepsRefusal(state, kept.steps) ?? phaseRefusal(state, kept);
  return reason ? { kind: "refused", reason } : settled(state, { status: kept }, times, now);
}
