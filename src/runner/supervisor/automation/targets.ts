import type { RunsOn } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import type { Surroundings } from "./parts.ts";
import type { Target } from "./start.ts";
import { ContainerTarget } from "./start-container.ts";
import { HostTarget } from "./start-host.ts";

/** The target that an automation names. */
export function targetOf(around: Surroundings, runsOn: RunsOn | undefined): Target {
  if (runsOn?.target.case === "docker") return new ContainerTarget(around, runsOn.target.value);
  return new HostTarget(around, runsOn?.target.case === "machine" ? undefined : around.entrance());
}
