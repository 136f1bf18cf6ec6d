import type { RunsOn } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { CommandProblem, type Surroundings } from "./parts.ts";
import type { Target } from "./start.ts";
import { ContainerTarget } from "./start-container.ts";
import { HostTarget } from "./start-host.ts";

/** The target that an automation names. Throws a CommandProblem where there is none. */
export function targetOf(around: Surroundings, runsOn: RunsOn | undefined): Target {
  if (runsOn?.target.case === "docker") return new ContainerTarget(around, runsOn.target.value);
  if (runsOn?.target.case !== "machine" && around.isContained()) {
    throw new CommandProblem("this runner cannot run it in the dev container yet: set runs_on.machine");
  }
  return new HostTarget(around);
}
