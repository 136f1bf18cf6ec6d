import type { ConnectRouter } from "@connectrpc/connect";
import { RunnerControlService } from "../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentService } from "../gen/gitpod/v1/environment_pb.js";
import { EventService } from "../gen/gitpod/v1/event_pb.js";
import { IdentityService } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerConfigurationService } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerService } from "../gen/gitpod/v1/runner_pb.js";
import type { App } from "./app.ts";
import { environmentService } from "./services/environment.ts";
import { eventService } from "./services/event.ts";
import { identityService } from "./services/identity.ts";
import { runnerService } from "./services/runner.ts";
import { runnerConfigurationService } from "./services/runner-configuration.ts";
import { runnerControlService } from "./services/runner-control.ts";

/** Services that are registered. */
export const services = [
  EnvironmentService,
  EventService,
  IdentityService,
  RunnerService,
  RunnerConfigurationService,
  RunnerControlService,
] as const;

/** Their implementations; one of which nothing is built yet is absent, and its RPCs answer UNIMPLEMENTED. */
export function routes(app: App): (router: ConnectRouter) => void {
  const configuration = runnerConfigurationService(app);
  return (router) => {
    router.service(EnvironmentService, environmentService(app, configuration.listEnvironmentClasses));
    router.service(EventService, eventService(app));
    router.service(IdentityService, identityService(app));
    router.service(RunnerService, runnerService(app));
    router.service(RunnerConfigurationService, configuration);
    router.service(RunnerControlService, runnerControlService(app));
  };
}
