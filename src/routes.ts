import type { DescMethod, Message } from "@bufbuild/protobuf";
import type { ConnectRouter } from "@connectrpc/connect";
import { type ReportEnvironmentsRequest, RunnerControlService } from "../gen/berth/runner/v1/runner_control_pb.js";
import { AccountService } from "../gen/gitpod/v1/account_pb.js";
import { EditorService } from "../gen/gitpod/v1/editor_pb.js";
import { EnvironmentAutomationService } from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  type CreateEnvironmentRequest,
  EnvironmentService,
  type GetEnvironmentRequest,
} from "../gen/gitpod/v1/environment_pb.js";
import { EventService } from "../gen/gitpod/v1/event_pb.js";
import { GatewayService } from "../gen/gitpod/v1/gateway_pb.js";
import { GroupService } from "../gen/gitpod/v1/group_pb.js";
import { IdentityService } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationService } from "../gen/gitpod/v1/organization_pb.js";
import { ProjectService } from "../gen/gitpod/v1/project_pb.js";
import { RunnerConfigurationService } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerService } from "../gen/gitpod/v1/runner_pb.js";
import { SecretService } from "../gen/gitpod/v1/secret_pb.js";
import { ServiceAccountService } from "../gen/gitpod/v1/service_account_pb.js";
import { UsageService } from "../gen/gitpod/v1/usage_pb.js";
import { UserService } from "../gen/gitpod/v1/user_pb.js";
import type { App } from "./app.ts";
import { accountService } from "./services/account.ts";
import { automationService } from "./services/automation.ts";
import { editorService } from "./services/editor.ts";
import { besideCreateEnvironment } from "./services/environment/create.ts";
import { besideGetEnvironment } from "./services/environment/read.ts";
import { environmentService } from "./services/environment.ts";
import { eventService } from "./services/event.ts";
import { gatewayService } from "./services/gateway.ts";
import { groupService } from "./services/group.ts";
import { identityService } from "./services/identity.ts";
import { organizationService } from "./services/organization.ts";
import { projectService } from "./services/project.ts";
import { runnerService } from "./services/runner.ts";
import { runnerConfigurationService } from "./services/runner-configuration.ts";
import { besideReport } from "./services/runner-control/environments.ts";
import { runnerControlService } from "./services/runner-control.ts";
import { secretService } from "./services/secret.ts";
import { serviceAccountService } from "./services/service-account.ts";
import { usageService } from "./services/usage.ts";
import { userService } from "./services/user.ts";
import type { Beside } from "./store/credentials.ts";

/** Services that are registered. */
export const services = [
  EnvironmentService,
  EnvironmentAutomationService,
  EventService,
  IdentityService,
  RunnerService,
  RunnerConfigurationService,
  AccountService,
  UserService,
  GroupService,
  ServiceAccountService,
  ProjectService,
  SecretService,
  EditorService,
  GatewayService,
  UsageService,
  OrganizationService,
  RunnerControlService,
] as const;

/** What RPCs that are called most read along with the credential of their caller. */
export const besides = new Map<DescMethod, (request: Message) => Beside | undefined>([
  [EnvironmentService.method.getEnvironment, (request) => besideGetEnvironment(request as GetEnvironmentRequest)],
  [
    EnvironmentService.method.createEnvironment,
    (request) => besideCreateEnvironment(request as CreateEnvironmentRequest),
  ],
  [RunnerControlService.method.reportEnvironments, (request) => besideReport(request as ReportEnvironmentsRequest)],
]);

/** Their implementations; one of which nothing is built yet is absent, and its RPCs answer UNIMPLEMENTED. */
export function routes(app: App): (router: ConnectRouter) => void {
  const configuration = runnerConfigurationService(app);
  return (router) => {
    router.service(EnvironmentService, environmentService(app, configuration.listEnvironmentClasses));
    router.service(EnvironmentAutomationService, automationService(app));
    router.service(EventService, eventService(app));
    router.service(IdentityService, identityService(app));
    router.service(RunnerService, runnerService(app));
    router.service(RunnerConfigurationService, configuration);
    router.service(AccountService, accountService(app));
    router.service(UserService, userService(app));
    router.service(GroupService, groupService(app));
    router.service(ServiceAccountService, serviceAccountService(app));
    router.service(ProjectService, projectService(app));
    router.service(SecretService, secretService(app));
    router.service(EditorService, editorService(app));
    router.service(GatewayService, gatewayService(app));
    router.service(UsageService, usageService(app));
    router.service(OrganizationService, organizationService(app));
    router.service(RunnerControlService, runnerControlService(app));
  };
}
