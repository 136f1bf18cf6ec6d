import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import { type TriggerName, triggerNames } from "./automation.ts";
import type { EnvironmentState } from "./lifecycle.ts";

// What a change of an environment means for its services and executions. Both sides of the change are given, because
// each occurrence of a trigger shows up in exactly one change: the one that makes it due.

/** A trigger that fires, and what makes this time differ from every other one. */
export interface Occurrence {
  trigger: TriggerName;
  occurrence: string;
}

/** What follows from a change; several may at once. */
export interface Consequences {
  /** It is not to run any more: services and executions are asked to stop. */
  stop: boolean;
  /** Its dev container is built anew: what runs in it is asked to stop. */
  rebuild: boolean;
  /** It has no processes any more. */
  halt: boolean;
  /** It is deleted, and everything in it with it. */
  end: boolean;
  fire: Occurrence[];
}

const HALTED: ReadonlySet<EnvironmentPhase> = new Set([
  EnvironmentPhase.STOPPED,
  EnvironmentPhase.DELETING,
  EnvironmentPhase.DELETED,
]);

/** No process of the environment is left. */
export const isHalted = ({ status }: EnvironmentState) => HALTED.has(status.phase);

export const isPrebuild = ({ metadata }: EnvironmentState) => metadata.role === EnvironmentRole.PREBUILD;

const wantsRun = ({ spec }: EnvironmentState) => spec.desiredPhase === EnvironmentPhase.RUNNING;
const containerSession = ({ spec }: EnvironmentState) => spec.devcontainer?.session ?? "";

function isMachineUp(state: EnvironmentState): boolean {
  const { machine } = state.status;
  const isCurrent = machine?.session === (state.spec.machine?.session ?? "");
  return wantsRun(state) && isCurrent && machine.phase === MachinePhase.RUNNING;
}

function isContainerUp(state: EnvironmentState): boolean {
  const { devcontainer } = state.status;
  const isCurrent = devcontainer?.session === containerSession(state);
  return isMachineUp(state) && isCurrent && devcontainer.phase === DevContainerPhase.RUNNING;
}

/** The automations file has been applied, is missing, or cannot be applied: nothing of it is still to come. */
function isFileSettled({ spec, status }: EnvironmentState): boolean {
  const file = status.automationsFile;
  const isCurrent = file?.session === (spec.automationsFile?.session ?? "");
  return isCurrent && (file.phase === ContentPhase.READY || file.phase === ContentPhase.FAILED);
}

/** Whether the environment lets a trigger fire. A prebuild knows only its own triggers, and they are for it alone. */
export function admitsTrigger(state: EnvironmentState, trigger: TriggerName): boolean {
  if (trigger === "manual") return false;
  const isOfPrebuild = trigger === "prebuild" || trigger === "beforeSnapshot";
  if (isPrebuild(state) || isOfPrebuild) return isPrebuild(state) && isOfPrebuild;
  const filter = state.spec.automationsFile?.triggerFilter ?? [];
  return filter.length === 0 || triggerNames(filter).includes(trigger);
}

/** Occurrences that a state stands for, as long as it lasts. */
function standing(state: EnvironmentState): Occurrence[] {
  if (!isFileSettled(state)) return [];
  const found: Occurrence[] = [];
  if (isContainerUp(state)) {
    found.push({ trigger: "postDevcontainerStart", occurrence: containerSession(state) });
    // Once and for all.
    found.push({ trigger: "prebuild", occurrence: "" });
  }
  const since = state.facts.runningSince;
  if (since && state.status.phase === EnvironmentPhase.RUNNING)
    found.push({ trigger: "postEnvironmentStart", occurrence: since.toISOString() });
  return found;
}

function due(before: EnvironmentState, next: EnvironmentState): Occurrence[] {
  const isUp = isMachineUp(next) && !(isMachineUp(before) && sameMachine(before, next));
  const machine: Occurrence[] = isUp
    ? [{ trigger: "postMachineStart", occurrence: String(next.status.statusVersion) }]
    : [];
  const stood = standing(before);
  const isNew = (each: Occurrence) =>
    !stood.some(({ trigger, occurrence }) => trigger === each.trigger && occurrence === each.occurrence);
  return [...machine, ...standing(next).filter(isNew)].filter(({ trigger }) => admitsTrigger(next, trigger));
}

const sameMachine = (before: EnvironmentState, next: EnvironmentState) =>
  before.status.machine?.session === next.status.machine?.session;

/** What a change of an environment means for its services and executions; undefined if nothing. */
export function consequences(before: EnvironmentState, next: EnvironmentState): Consequences | undefined {
  const found: Consequences = {
    stop: wantsRun(before) && !wantsRun(next),
    rebuild: wantsRun(next) && containerSession(before) !== containerSession(next),
    halt: isHalted(next) && !isHalted(before),
    end: next.status.phase === EnvironmentPhase.DELETED && before.status.phase !== EnvironmentPhase.DELETED,
    fire: due(before, next),
  };
  return found.stop || found.rebuild || found.halt || found.end || found.fire.length > 0 ? found : undefined;
}
