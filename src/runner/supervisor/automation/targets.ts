import type { RunsOn } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import type { Surroundings } from "./parts.ts";
import type { Target } from "./start.ts";
import { ContainerTarget } from "./start-container.ts";
import { HostTarget } from "./start-host.ts";

/** Trigger of what begins before there is a dev container. */
export const EARLY = "postMachineStart";

/** Whether an automation runs in the dev container, where that has a container of its own. */
export const isOfDevContainer = (runsOn: RunsOn | undefined, startedBy: string | undefined): boolean =>
  runsOn?.target.case === undefined && startedBy !== EARLY;

/** The target that an automation names; without a name the dev container, or the machine while there is none. */
export function targetOf(around: Surroundings, runsOn: RunsOn | undefined, startedBy: string | undefined): Target {
  if (runsOn?.target.case === "docker") return new ContainerTarget(around, runsOn.target.value);
  return new HostTarget(around, isOfDevContainer(runsOn, startedBy) ? around.entrance() : undefined);
}
