import { create, type DescMethod, type DescMethodServerStreaming, type DescMethodUnary } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createConnectRouter } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { DeregisterRequest_Reason as Reason } from "../gen/berth/runner/v1/runner_control_pb.js";
import { ServicePhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import type { Environment } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole, OrganizationService } from "../gen/gitpod/v1/organization_pb.js";
import { CreateProjectRequestSchema, ProjectRole } from "../gen/gitpod/v1/project_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, RunnerRole } from "../gen/gitpod/v1/runner_pb.js";
import type { BerthClient } from "../src/client.ts";
import { EDITORS } from "../src/domain/editors.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { routes } from "../src/routes.ts";
import { policy } from "../src/rpc/policy.ts";
import { newService, newTask, startTask } from "./harness/automations.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { builtInGroup } from "./harness/groups.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { addOrganization, addServiceAccount, connectRunner, mint } from "./harness/tenants.ts";

// Every RPC of every registered service, called by every kind of caller. The objects are those of one organization: an
// environment that only its creator may use, on a runner that is shared with all members.

/** The callers, in the order of the columns. */
const CALLERS = [
  "nobody",
  // Its token is a one-time credential of a runner, and none for the API.
  "exchange",
  // A user of another organization.
  "foreign",
  // A member who neither made nor shares the environment.
  "member",
  // The creator of the environment, with a token that may only read.
  "readOnly",
  "creator",
  // An organization admin, who made the runner.
  "admin",
  // A service account of the organization.
  "robot",
  "runner",
  // Another one of the organization, which nobody shares.
  "otherRunner",
  "environment",
  // Another one of the organization, on the other runner.
  "otherEnvironment",
] as const;
type Caller = (typeof CALLERS)[number];

/** What a letter of the table stands for. */
const OUTCOMES: Record<string, string> = {
  "✓": "ok",
  U: "Unauthenticated",
  D: "PermissionDenied",
  N: "NotFound",
  F: "FailedPrecondition",
  E: "AlreadyExists",
  A: "Aborted",
  T: "DeadlineExceeded",
  i: "Unimplemented",
};

/** What the callers see and act on. */
interface World {
  organizationId: string;
  environmentId: string;
  /** Made by the creator of the environment, who shares it with nobody. */
  projectId: string;
  runnerId: string;
  classId: string;
  linkId: string;
  /** What the environment has. */
  serviceId: string;
  taskId: string;
  executionId: string;
  /** The creator of the environment, and the first of its tokens. */
  userId: string;
  tokenId: string;
  /** The group of all members, which may use the runner. */
  groupId: string;
  serviceAccountId: string;
  /** A secret of the creator, which the environment has. */
  secretId: string;
  /** Another exchange token each time. */
  exchangeToken: string;
  unknownId: string;
}

const STATUS = { phase: RunnerPhase.ACTIVE, version: "test", publicKey: new Uint8Array(32) };
const onEnvironment = ({ environmentId }: World) => ({ environmentId });
const onService = ({ serviceId }: World) => ({ id: serviceId });
const onTask = ({ taskId }: World) => ({ id: taskId });
const onExecution = ({ executionId }: World) => ({ id: executionId });
/** A service or task that has no name yet. */
const newItem = ({ environmentId }: World) => ({
  ...{ environmentId, metadata: { reference: uuidv7(), name: "x" }, spec: { command: "x" } },
});
const onRunner = ({ runnerId }: World) => ({ runnerId });
const onClass = ({ classId }: World) => ({ environmentClassId: classId });
const onGroup = ({ groupId }: World) => ({ groupId });
const onPolicy = ({ runnerId, groupId }: World) => ({ runnerId, groupId, role: RunnerRole.USER });
const onMember = ({ groupId, userId }: World) => ({ groupId, subject: { id: userId, principal: Principal.USER } });
/** A share of the environment with its creator. */
const onShare = ({ environmentId, userId }: World) => ({
  ...{ resourceType: ResourceType.ENVIRONMENT, resourceId: environmentId },
  ...{ principal: Principal.USER, principalId: userId, role: ResourceRole.ENVIRONMENT_VIEWER },
});
const onUser = ({ userId }: World) => ({ userId });
/** A request for another secret of the creator. */
const newSecret = ({ userId }: Pick<World, "userId">) => ({
  ...{ name: `SECRET_${uuidv7().replaceAll("-", "_")}`, value: "x" },
  mount: { case: "environmentVariable" as const, value: true },
  scope: { scope: { case: "userId" as const, value: userId } },
});
/** Has whatever RPCs about organizations ask for. */
const onOrganization = ({ organizationId, userId, unknownId }: World) => ({
  ...{ organizationId, userId, role: OrganizationRole.MEMBER, name: "Another", message: "Hello" },
  ...{ domain: "example.org", domainName: "berth.example.org", domainVerificationId: unknownId, inviteId: unknownId },
  ...{ clientId: "x", clientSecret: "x", issuerUrl: "https://login.example.org" },
  ...{
    ssoConfigurationId: unknownId,
    scimConfigurationId: unknownId,
    oidcConfig: { version: { case: "v3", value: {} } },
  },
});
const onProject = ({ projectId }: World) => ({ projectId });
const onUnknownGroup = ({ projectId, unknownId }: World) => ({
  ...{ projectId, groupId: unknownId, role: ProjectRole.USER },
});
const newProject = {
  ...{
    name: "App",
    initializer: { specs: [{ spec: { case: "git" as const, value: { remoteUri: "https://git.example.org/a/b" } } }] },
  },
};
const onServiceAccount = ({ serviceAccountId }: World) => ({ serviceAccountId });
const onUnknown = ({ unknownId }: World) => ({ id: unknownId });

const nameOf = ({ parent, localName }: DescMethod) => `${parent.name}.${localName}`;

/** How each RPC answers the callers, a letter for each in the order above. */
const EXPECTED = `
  AccountService.getAccount                                 U U ✓ ✓ ✓ ✓ ✓ D D D D D
  AccountService.deleteAccount                              U U N N D N N D D D D D
  AccountService.getSSOLoginURL                             N N N N N N N N N N N N
  AccountService.listSSOLogins                              ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  AccountService.listLoginProviders                         ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  AccountService.listJoinableOrganizations                  U U ✓ ✓ ✓ ✓ ✓ D D D D D
  EnvironmentService.getEnvironment                         U U N N ✓ ✓ ✓ N ✓ N ✓ N
  EnvironmentService.listEnvironments                       U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  EnvironmentService.listEnvironmentClasses                 U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  EnvironmentService.createEnvironment                      U U N ✓ D ✓ ✓ ✓ D D D D
  EnvironmentService.createEnvironmentFromProject           U U N N D ✓ ✓ N D D D D
  EnvironmentService.startEnvironment                       U U N N D ✓ D N D D D D
  EnvironmentService.stopEnvironment                        U U N N D ✓ ✓ N D D ✓ N
  EnvironmentService.archiveEnvironment                     U U N N D ✓ ✓ N D D D D
  EnvironmentService.unarchiveEnvironment                   U U N N D ✓ ✓ N D D D D
  EnvironmentService.deleteEnvironment                      U U N N D ✓ ✓ N D D D D
  EnvironmentService.updateEnvironment                      U U N N D ✓ ✓ N D D D N
  EnvironmentService.markEnvironmentActive                  U U N N D ✓ D N D D ✓ N
  EnvironmentService.createEnvironmentLogsToken             U U N N D ✓ D N D D ✓ N
  EnvironmentService.createEnvironmentAccessToken           U U N N D ✓ D N D D D D
  EnvironmentService.createPortAccessToken                  U U N N D F F N D D D D
  EnvironmentService.allowPortAccess                        U U N N D ✓ ✓ N D D D D
  EditorService.listEditors                                 U U ✓ ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  EditorService.getEditor                                   U U ✓ ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  EditorService.resolveEditorURL                            U U N N D F D N D D D D
  GatewayService.listGateways                               U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  EnvironmentAutomationService.createService                U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.getService                   U U N N ✓ ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.listServices                 U U ✓ ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  EnvironmentAutomationService.updateService                U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.deleteService                U U N N D ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.startService                 U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.stopService                  U U N N D ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.upsertAutomationsFile        U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.createTask                   U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.getTask                      U U N N ✓ ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.listTasks                    U U ✓ ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  EnvironmentAutomationService.updateTask                   U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.deleteTask                   U U N N D ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.startTask                    U U N N D ✓ D N D D ✓ N
  EnvironmentAutomationService.listTaskExecutions           U U ✓ ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  EnvironmentAutomationService.getTaskExecution             U U N N ✓ ✓ ✓ N D D ✓ N
  EnvironmentAutomationService.stopTaskExecution            U U N N D ✓ ✓ N D D ✓ N
  EventService.watchEvents                                  U U N N ✓ ✓ ✓ N D D ✓ N
  EventService.listAuditLogs                                U U D D D D ✓ D D D D D
  EventService.getAuditLog                                  U U D D D D N D D D D D
  IdentityService.exchangeToken                             ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  IdentityService.getIDToken                                U U ✓ ✓ D ✓ ✓ ✓ ✓ ✓ ✓ ✓
  IdentityService.getAuthenticatedIdentity                  U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  OrganizationService.createOrganization                    U U i i D i i D D D D D
  OrganizationService.joinOrganization                      U U i i D i i D D D D D
  OrganizationService.getOrganization                       U U N ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  OrganizationService.updateOrganization                    U U i i D i i i D D D D
  OrganizationService.deleteOrganization                    U U i i D i i D D D D D
  OrganizationService.listMembers                           U U N ✓ ✓ ✓ ✓ ✓ D D D D
  OrganizationService.setRole                               U U N D D D ✓ D D D D D
  OrganizationService.createOrganizationInvite              U U i i D i i i D D D D
  OrganizationService.getOrganizationInvite                 U U i i D i i i D D D D
  OrganizationService.getOrganizationInviteSummary          U U i i i i i i D D D D
  OrganizationService.leaveOrganization                     U U N N D N N N D D D D
  OrganizationService.createSSOConfiguration                U U i i D i i i D D D D
  OrganizationService.getSSOConfiguration                   U U i i i i i i D D D D
  OrganizationService.listSSOConfigurations                 U U i i i i i i D D D D
  OrganizationService.deleteSSOConfiguration                U U i i D i i i D D D D
  OrganizationService.updateSSOConfiguration                U U i i D i i i D D D D
  OrganizationService.createSCIMConfiguration               U U i i D i i i D D D D
  OrganizationService.getSCIMConfiguration                  U U i i i i i i D D D D
  OrganizationService.listSCIMConfigurations                U U i i i i i i D D D D
  OrganizationService.updateSCIMConfiguration               U U i i D i i i D D D D
  OrganizationService.deleteSCIMConfiguration               U U i i D i i i D D D D
  OrganizationService.regenerateSCIMToken                   U U i i D i i i D D D D
  OrganizationService.createDomainVerification              U U i i D i i i D D D D
  OrganizationService.getDomainVerification                 U U i i i i i i D D D D
  OrganizationService.listDomainVerifications               U U i i i i i i D D D D
  OrganizationService.verifyDomain                          U U i i D i i i D D D D
  OrganizationService.deleteDomainVerification              U U i i D i i i D D D D
  OrganizationService.getOrganizationPolicies               U U N ✓ ✓ ✓ ✓ ✓ D D ✓ ✓
  OrganizationService.updateOrganizationPolicies            U U N D D D ✓ D D D D D
  OrganizationService.getOIDCConfig                         U U N ✓ ✓ ✓ ✓ ✓ D D D D
  OrganizationService.updateOIDCConfig                      U U N D D D ✓ D D D D D
  OrganizationService.getAnnouncementBanner                 U U i i i i i i D D i i
  OrganizationService.updateAnnouncementBanner              U U i i D i i i D D D D
  OrganizationService.createCustomDomain                    U U i i D i i i D D D D
  OrganizationService.getCustomDomain                       U U i i i i i i D D i i
  OrganizationService.updateCustomDomain                    U U i i D i i i D D D D
  OrganizationService.deleteCustomDomain                    U U i i D i i i D D D D
  ProjectService.createProject                              U U ✓ ✓ D ✓ ✓ ✓ D D D D
  ProjectService.createProjects                             U U ✓ ✓ D ✓ ✓ ✓ D D D D
  ProjectService.createProjectFromEnvironment               U U N N D F D N D D D D
  ProjectService.getProject                                 U U N N ✓ ✓ ✓ N D D N N
  ProjectService.listProjects                               U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  ProjectService.updateProject                              U U N N D ✓ ✓ N D D D D
  ProjectService.updateProjects                             U U ✓ ✓ D ✓ ✓ ✓ D D D D
  ProjectService.deleteProject                              U U N N D ✓ ✓ N D D D D
  ProjectService.deleteProjects                             U U ✓ ✓ D ✓ ✓ ✓ D D D D
  ProjectService.listProjectPolicies                        U U N N ✓ ✓ ✓ N D D D D
  ProjectService.createProjectPolicy                        U U N N D N N N D D D D
  ProjectService.updateProjectPolicy                        U U N N D N N N D D D D
  ProjectService.deleteProjectPolicy                        U U N N D N N N D D D D
  ProjectService.listProjectEnvironmentClasses              U U N N ✓ ✓ ✓ N D D D D
  ProjectService.updateProjectEnvironmentClasses            U U N N D ✓ ✓ N D D D D
  UsageService.getTopProjects                               U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  RunnerService.createRunner                                U U D D D D ✓ D D D D D
  RunnerService.getRunner                                   U U N ✓ ✓ ✓ ✓ ✓ ✓ N ✓ N
  RunnerService.listRunners                                 U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  RunnerService.updateRunner                                U U i i D i i i D D D D
  RunnerService.deleteRunner                                U U N D D D F D D D D D
  RunnerService.createRunnerToken                           U U N D D D ✓ D ✓ N D D
  RunnerService.createRunnerLogsToken                       U U i i D i i i D D D D
  RunnerService.parseContextURL                             U U N T T T T T D D T N
  RunnerService.searchRepositories                          U U i i i i i i D D i i
  RunnerService.listSCMOrganizations                        U U i i i i i i D D i i
  RunnerService.checkAuthenticationForHost                  U U N ✓ ✓ ✓ ✓ ✓ D D ✓ N
  RunnerService.checkRepositoryAccess                       U U i i i i i i D D i i
  RunnerService.listRunnerPolicies                          U U N D D D ✓ D D D D D
  RunnerService.createRunnerPolicy                          U U N D D D E D D D D D
  RunnerService.updateRunnerPolicy                          U U N D D D ✓ D D D D D
  RunnerService.deleteRunnerPolicy                          U U N D D D N D D D D D
  RunnerConfigurationService.createEnvironmentClass         U U N D D D ✓ D D D D D
  RunnerConfigurationService.getEnvironmentClass            U U N ✓ ✓ ✓ ✓ ✓ ✓ N ✓ N
  RunnerConfigurationService.listEnvironmentClasses         U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  RunnerConfigurationService.updateEnvironmentClass         U U N D D D ✓ D D D D D
  RunnerConfigurationService.createHostAuthenticationToken  U U N ✓ D ✓ ✓ ✓ D D D D
  RunnerConfigurationService.getHostAuthenticationToken     U U N N N N N N D D D D
  RunnerConfigurationService.listHostAuthenticationTokens   U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  RunnerConfigurationService.updateHostAuthenticationToken  U U N N D N N N D D D D
  RunnerConfigurationService.deleteHostAuthenticationToken  U U N N D N N N D D D D
  RunnerConfigurationService.getRunnerConfigurationSchema   U U N ✓ ✓ ✓ ✓ ✓ ✓ N ✓ N
  RunnerConfigurationService.createSCMIntegration           U U N D D D ✓ D D D D D
  RunnerConfigurationService.getSCMIntegration              U U N N N N N N D D N N
  RunnerConfigurationService.listSCMIntegrations            U U ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓ ✓
  RunnerConfigurationService.updateSCMIntegration           U U N N D N N N D D D D
  RunnerConfigurationService.deleteSCMIntegration           U U N N D N N N D D D D
  RunnerConfigurationService.validateRunnerConfiguration    U U i i D i i i D D D D
  GroupService.createGroup                                  U U N D D D ✓ D D D D D
  GroupService.getGroup                                     U U N ✓ ✓ ✓ ✓ ✓ D D D D
  GroupService.listGroups                                   U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  GroupService.updateGroup                                  U U N D D D F D D D D D
  GroupService.deleteGroup                                  U U N D D D F D D D D D
  GroupService.createMembership                             U U N D D D F D D D D D
  GroupService.deleteMembership                             U U N N D N N N D D D D
  GroupService.getMembership                                U U N ✓ ✓ ✓ ✓ ✓ D D D D
  GroupService.listMemberships                              U U N ✓ ✓ ✓ ✓ ✓ D D D D
  GroupService.createRoleAssignment                         U U N D D D F D D D D D
  GroupService.listRoleAssignments                          U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  GroupService.deleteRoleAssignment                         U U N N D N N N D D D D
  GroupService.shareResourceWithPrincipal                   U U N N D ✓ D N D D D D
  GroupService.unshareResourceWithPrincipal                 U U N N D ✓ D N D D D D
  ServiceAccountService.createServiceAccount                U U D D D D ✓ D D D D D
  ServiceAccountService.listServiceAccounts                 U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  ServiceAccountService.getServiceAccount                   U U N ✓ ✓ ✓ ✓ ✓ D D D D
  ServiceAccountService.updateServiceAccount                U U N D D D ✓ D D D D D
  ServiceAccountService.deleteServiceAccount                U U N N D N N D D D D D
  ServiceAccountService.createServiceAccountAccessToken     U U N D D D ✓ D D D D D
  ServiceAccountService.createServiceAccountToken           U U D D D D D D D D D D
  ServiceAccountService.listServiceAccountTokens            U U D D D D D D D D D D
  ServiceAccountService.getServiceAccountToken              U U N N N N N D D D D D
  ServiceAccountService.deleteServiceAccountToken           U U N N D N N D D D D D
  UserService.getAuthenticatedUser                          U U ✓ ✓ ✓ ✓ ✓ D D D D D
  UserService.getUser                                       U U N ✓ ✓ ✓ ✓ ✓ D D ✓ N
  UserService.setSuspended                                  U U N D D D ✓ D D D D D
  UserService.deleteUser                                    U U N N D N N D D D D D
  UserService.createPersonalAccessToken                     U U N D D ✓ D D D D D D
  UserService.getPersonalAccessToken                        U U N N ✓ ✓ ✓ D D D D D
  UserService.listPersonalAccessTokens                      U U ✓ ✓ ✓ ✓ ✓ D D D D D
  UserService.deletePersonalAccessToken                     U U N N D N N D D D D D
  UserService.setPreference                                 U U ✓ ✓ D ✓ ✓ D D D D D
  UserService.getPreference                                 U U N N N N N D D D D D
  UserService.listPreferences                               U U ✓ ✓ ✓ ✓ ✓ D D D D D
  UserService.deletePreference                              U U N N D N N D D D D D
  UserService.getDotfilesConfiguration                      U U ✓ ✓ ✓ ✓ ✓ D D D D D
  UserService.setDotfilesConfiguration                      U U ✓ ✓ D ✓ ✓ D D D D D
  SecretService.createSecret                                U U N D D ✓ D D D D D D
  SecretService.updateSecretValue                           U U N N D ✓ N N D D D D
  SecretService.listSecrets                                 U U ✓ ✓ ✓ ✓ ✓ ✓ D D D D
  SecretService.deleteSecret                                U U N N D ✓ N N D D D D
  SecretService.getSecretValue                              U U N N D D N N D D ✓ N
  RunnerControlService.register                             U U D D D D D D F F D D
  RunnerControlService.heartbeat                            U U D D D D D D ✓ A D D
  RunnerControlService.watch                                U U D D D D D D ✓ A D D
  RunnerControlService.reportEnvironments                   U U D D D D D D ✓ A D D
  RunnerControlService.reportAutomations                    U U D D D D D D ✓ A D D
  RunnerControlService.getEnvironmentSecrets                U U D D D D D D ✓ N D D
  RunnerControlService.getHostToken                         U U D D D D D D N N D D
  RunnerControlService.putHostToken                         U U D D D D D D N N D D
  RunnerControlService.createEnvironmentToken               U U D D D D D D F N D D
  RunnerControlService.introspectToken                      U U D D D D D D ✓ ✓ D D
  RunnerControlService.completeCall                         U U D D D D D D ✓ ✓ D D
  RunnerControlService.deregister                           U U D D D D D D A A D D
`;

/** Requests that have to say something, by RPC. */
const REQUESTS: Record<string, (world: World) => Record<string, unknown>> = {
  "AccountService.deleteAccount": ({ unknownId }) => ({ accountId: unknownId }),
  "AccountService.getSSOLoginURL": () => ({ email: "somebody@example.org" }),
  "AccountService.listSSOLogins": () => ({ email: "somebody@example.org" }),
  "EnvironmentService.getEnvironment": onEnvironment,
  "EnvironmentService.createEnvironment": ({ classId }) => ({ spec: { machine: { class: classId } } }),
  "EnvironmentService.createEnvironmentFromProject": ({ projectId, classId }) => ({
    ...{ projectId, spec: { machine: { class: classId } } },
  }),
  "EnvironmentService.startEnvironment": onEnvironment,
  "EnvironmentService.stopEnvironment": onEnvironment,
  "EnvironmentService.archiveEnvironment": onEnvironment,
  "EnvironmentService.unarchiveEnvironment": onEnvironment,
  "EnvironmentService.deleteEnvironment": onEnvironment,
  "EnvironmentService.updateEnvironment": ({ environmentId }) => ({ environmentId, metadata: { name: "x" } }),
  "EnvironmentService.markEnvironmentActive": onEnvironment,
  "EnvironmentService.createEnvironmentLogsToken": onEnvironment,
  "EnvironmentService.createEnvironmentAccessToken": onEnvironment,
  "EnvironmentService.createPortAccessToken": ({ environmentId }) => ({ environmentId, port: 3000 }),
  "EnvironmentService.allowPortAccess": ({ environmentId }) => ({ environmentId, port: 3000 }),
  "EditorService.getEditor": () => ({ id: "vscode" }),
  // It is not running.
  "EditorService.resolveEditorURL": ({ environmentId, organizationId }) => ({
    ...{ editorId: EDITORS[0]?.id, environmentId, organizationId },
  }),
  "EnvironmentAutomationService.createService": newItem,
  "EnvironmentAutomationService.getService": onService,
  "EnvironmentAutomationService.updateService": onService,
  "EnvironmentAutomationService.deleteService": onService,
  "EnvironmentAutomationService.startService": onService,
  "EnvironmentAutomationService.stopService": onService,
  "EnvironmentAutomationService.upsertAutomationsFile": ({ environmentId }) => ({ environmentId, automationsFile: {} }),
  "EnvironmentAutomationService.createTask": newItem,
  "EnvironmentAutomationService.getTask": onTask,
  "EnvironmentAutomationService.updateTask": onTask,
  "EnvironmentAutomationService.deleteTask": onTask,
  "EnvironmentAutomationService.startTask": onTask,
  "EnvironmentAutomationService.getTaskExecution": onExecution,
  "EnvironmentAutomationService.stopTaskExecution": onExecution,
  "EventService.watchEvents": ({ environmentId }) => ({ scope: { case: "environmentId", value: environmentId } }),
  "EventService.getAuditLog": ({ unknownId }) => ({ auditLogEntryId: unknownId }),
  "IdentityService.exchangeToken": ({ exchangeToken }) => ({ exchangeToken }),
  "IdentityService.getIDToken": () => ({ audience: ["a"] }),
  ...Object.fromEntries(OrganizationService.methods.map((method) => [nameOf(method), onOrganization])),
  "OrganizationService.leaveOrganization": ({ unknownId }) => ({ userId: unknownId }),
  "ProjectService.createProject": () => newProject,
  "ProjectService.createProjects": () => ({ projects: [newProject] }),
  // It holds no repository.
  "ProjectService.createProjectFromEnvironment": ({ environmentId }) => ({ environmentId, name: "Copy" }),
  "ProjectService.getProject": onProject,
  "ProjectService.updateProject": (world) => ({ ...onProject(world), name: "For all" }),
  // What becomes of each is in the answer.
  "ProjectService.updateProjects": (world) => ({ projects: [onProject(world)] }),
  "ProjectService.deleteProject": onProject,
  "ProjectService.deleteProjects": ({ projectId }) => ({ projectIds: [projectId] }),
  "ProjectService.listProjectPolicies": onProject,
  "ProjectService.createProjectPolicy": onUnknownGroup,
  "ProjectService.updateProjectPolicy": onUnknownGroup,
  "ProjectService.deleteProjectPolicy": onUnknownGroup,
  "ProjectService.listProjectEnvironmentClasses": onProject,
  "ProjectService.updateProjectEnvironmentClasses": (world) => ({
    ...onProject(world),
    projectEnvironmentClasses: [{ environmentClass: { case: "localRunner", value: true } }],
  }),
  "UsageService.getTopProjects": () => ({
    dateRange: { startTime: { seconds: 0n }, endTime: { seconds: 1n } },
  }),
  "RunnerService.createRunner": () => ({ name: "made", provider: RunnerProvider.LINUX_HOST }),
  "RunnerService.getRunner": onRunner,
  "RunnerService.updateRunner": onRunner,
  // It has environments.
  "RunnerService.deleteRunner": onRunner,
  "RunnerService.createRunnerToken": onRunner,
  "RunnerService.createRunnerLogsToken": onRunner,
  // The runner of this test never answers.
  "RunnerService.parseContextURL": ({ runnerId }) => ({ runnerId, contextUrl: "https://git.example.org/a/b" }),
  "RunnerService.searchRepositories": onRunner,
  "RunnerService.listSCMOrganizations": ({ runnerId }) => ({ runnerId, scmHost: "github.com" }),
  "RunnerService.checkAuthenticationForHost": ({ runnerId }) => ({ runnerId, host: "github.com" }),
  "RunnerService.checkRepositoryAccess": ({ runnerId }) => ({ runnerId, repositoryUrl: "https://git.example.org/a/b" }),
  "RunnerService.listRunnerPolicies": onRunner,
  "RunnerService.createRunnerPolicy": onPolicy,
  "RunnerService.updateRunnerPolicy": onPolicy,
  "RunnerService.deleteRunnerPolicy": ({ runnerId, unknownId }) => ({ runnerId, groupId: unknownId }),
  "RunnerConfigurationService.createEnvironmentClass": ({ runnerId }) => ({
    ...{ runnerId, displayName: "Small", description: "For tests" },
    configuration: [
      { key: "cpu", value: "1" },
      { key: "memory", value: "1024" },
    ],
  }),
  "RunnerConfigurationService.getEnvironmentClass": onClass,
  "RunnerConfigurationService.updateEnvironmentClass": (world) => ({ ...onClass(world), description: "For all" }),
  "RunnerConfigurationService.createHostAuthenticationToken": ({ runnerId }) => ({
    ...{ runnerId, host: "github.com", token: "x", source: 2 },
  }),
  "RunnerConfigurationService.getHostAuthenticationToken": onUnknown,
  "RunnerConfigurationService.updateHostAuthenticationToken": onUnknown,
  "RunnerConfigurationService.deleteHostAuthenticationToken": onUnknown,
  "RunnerConfigurationService.getRunnerConfigurationSchema": onRunner,
  "RunnerConfigurationService.createSCMIntegration": ({ runnerId }) => ({
    ...{ runnerId, scmId: "git", host: "git.example.org" },
  }),
  "RunnerConfigurationService.getSCMIntegration": onUnknown,
  "RunnerConfigurationService.updateSCMIntegration": onUnknown,
  "RunnerConfigurationService.deleteSCMIntegration": onUnknown,
  "RunnerConfigurationService.validateRunnerConfiguration": onRunner,
  "GroupService.createGroup": ({ organizationId }) => ({ organizationId, name: "made" }),
  "GroupService.getGroup": ({ groupId }) => ({ group: { case: "id", value: groupId } }),
  "GroupService.updateGroup": ({ groupId }) => ({ groupId, name: "renamed" }),
  "GroupService.deleteGroup": onGroup,
  "GroupService.createMembership": onMember,
  "GroupService.deleteMembership": ({ unknownId }) => ({ membershipId: unknownId }),
  "GroupService.getMembership": onMember,
  "GroupService.listMemberships": onGroup,
  "GroupService.createRoleAssignment": ({ groupId, organizationId }) => ({
    ...{ groupId, resourceType: ResourceType.ORGANIZATION, resourceId: organizationId },
    resourceRole: ResourceRole.ORG_ADMIN,
  }),
  "GroupService.deleteRoleAssignment": ({ unknownId }) => ({ assignmentId: unknownId }),
  "GroupService.shareResourceWithPrincipal": onShare,
  "GroupService.unshareResourceWithPrincipal": onShare,
  "ServiceAccountService.createServiceAccount": () => ({ name: "made", validUntil: timestampFromMs(4e12) }),
  "ServiceAccountService.getServiceAccount": onServiceAccount,
  "ServiceAccountService.updateServiceAccount": (world) => ({ ...onServiceAccount(world), description: "For all" }),
  "ServiceAccountService.deleteServiceAccount": ({ unknownId }) => ({ serviceAccountId: unknownId }),
  "ServiceAccountService.createServiceAccountAccessToken": onServiceAccount,
  "ServiceAccountService.getServiceAccountToken": ({ unknownId }) => ({ serviceAccountTokenId: unknownId }),
  "ServiceAccountService.deleteServiceAccountToken": ({ unknownId }) => ({ serviceAccountTokenId: unknownId }),
  "UserService.getUser": onUser,
  "UserService.setSuspended": onUser,
  "UserService.deleteUser": ({ unknownId }) => ({ userId: unknownId }),
  "UserService.createPersonalAccessToken": onUser,
  "UserService.getPersonalAccessToken": ({ tokenId }) => ({ personalAccessTokenId: tokenId }),
  "UserService.deletePersonalAccessToken": ({ unknownId }) => ({ personalAccessTokenId: unknownId }),
  "UserService.setPreference": () => ({ key: "theme", value: "dark" }),
  "UserService.getPreference": ({ unknownId }) => ({ preference: { case: "preferenceId", value: unknownId } }),
  "UserService.deletePreference": ({ unknownId }) => ({ userPreferenceId: unknownId }),
  "SecretService.createSecret": (world) => newSecret(world),
  "SecretService.updateSecretValue": ({ secretId }) => ({ secretId, value: "another" }),
  "SecretService.deleteSecret": ({ secretId }) => ({ secretId }),
  "SecretService.getSecretValue": ({ secretId }) => ({ secretId }),
  // Of an older protocol, or the link of the test would end.
  "RunnerControlService.register": () => ({ instanceId: "x", protocolVersion: 0, maxEnvironments: 1, status: STATUS }),
  "RunnerControlService.heartbeat": ({ linkId }) => ({ linkId, status: STATUS }),
  "RunnerControlService.watch": ({ linkId }) => ({ linkId }),
  "RunnerControlService.reportEnvironments": ({ linkId, environmentId }) => ({
    ...{ linkId, items: [{ environmentId, seq: 1n }] },
  }),
  "RunnerControlService.reportAutomations": ({ linkId, serviceId }) => ({
    linkId,
    services: [{ id: serviceId, seq: 1n }],
  }),
  "RunnerControlService.getEnvironmentSecrets": ({ environmentId, secretId }) => ({
    ...{ environmentId, secretIds: [secretId] },
  }),
  "RunnerControlService.getHostToken": ({ environmentId }) => ({
    ...{ purpose: { case: "environmentId", value: environmentId }, host: "git.example.org" },
  }),
  "RunnerControlService.putHostToken": ({ unknownId }) => ({
    ...{ tokenId: unknownId, outcome: { case: "invalidReason", value: "x" } },
  }),
  "RunnerControlService.createEnvironmentToken": ({ environmentId }) => ({ environmentId, machineSession: "another" }),
  "RunnerControlService.introspectToken": () => ({ token: "x" }),
  "RunnerControlService.completeCall": ({ unknownId }) => ({ callId: unknownId }),
  // Of another link, or that of the test would end.
  "RunnerControlService.deregister": ({ unknownId }) => ({ linkId: unknownId, reason: Reason.STOPPING }),
};

/** RPCs after which the world would not be the same: each caller gets objects of its own. */
const DESTRUCTIVE = new Set([
  "EnvironmentService.stopEnvironment",
  "EnvironmentService.archiveEnvironment",
  "EnvironmentService.deleteEnvironment",
  "EnvironmentAutomationService.deleteService",
  "EnvironmentAutomationService.deleteTask",
  "IdentityService.exchangeToken",
  "SecretService.deleteSecret",
  "ProjectService.deleteProject",
  "ProjectService.deleteProjects",
]);

let plane: TestPlane;
let creator: TestUser;
let runner: FakeRunner;
let otherRunner: FakeRunner;
let world: World;
let tokens: Record<Caller, string>;

beforeAll(async () => {
  plane = await startTestPlane({}, { runnerCallMs: 25 });
  await liftQuotas(plane);
  creator = await plane.addUser();
  const shared = await connectRunner(plane, { maxEnvironments: 1000 });
  const hidden = await connectRunner(plane, { shared: false });
  [runner, otherRunner] = [shared.runner, hidden.runner];
  const secretId = await makeSecret();
  const own = await newEnvironment(creator.client, runner, shared.classId);
  const other = await newEnvironment(plane.admin, otherRunner, hidden.classId);
  const foreign = await plane.addUser({ organizationId: await addOrganization(plane) });
  const readOnly = { kind: TokenKind.PERSONAL_ACCESS, subjectId: creator.id, readOnly: true };
  const { linkId, id: runnerId } = runner;
  const { exchangeToken } = await plane.admin.runners.createRunnerToken({ runnerId });
  const { organizationId } = plane;
  const robot = await addServiceAccount(plane);
  const { personalAccessTokens } = await creator.client.users.listPersonalAccessTokens({});
  world = {
    ...{ organizationId, runnerId, classId: shared.classId, linkId },
    ...own.objects,
    ...{ projectId: await newProjectOf(creator.client) },
    ...{ exchangeToken, unknownId: uuidv7(), userId: creator.id, tokenId: personalAccessTokens[0]?.id ?? "" },
    ...{ secretId, groupId: await builtInGroup(plane, "org-members"), serviceAccountId: robot.id },
  };
  tokens = {
    ...{ nobody: "", exchange: exchangeToken, creator: creator.token, admin: plane.adminToken },
    ...{ runner: runner.token, otherRunner: otherRunner.token, environment: own.token, otherEnvironment: other.token },
    foreign: foreign.token,
    member: (await plane.addUser()).token,
    readOnly: await mint(plane, readOnly),
    robot: robot.token,
  };
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toContain('"code":"unknown"');
  await plane[Symbol.asyncDispose]();
});

async function makeSecret(): Promise<string> {
  const { secret } = await creator.client.secrets.createSecret(newSecret({ userId: creator.id }));
  return secret?.id ?? "";
}

async function newEnvironment(client: BerthClient, on: FakeRunner, classId: string) {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const { id, spec } = environment as Environment;
  const session = spec?.machine?.session ?? "";
  const { token } = await on.control.createEnvironmentToken({ environmentId: id, machineSession: session });
  const service = await newService(client, id, "web", { desiredPhase: ServicePhase.RUNNING });
  const task = await newTask(client, id, "test", [], {});
  const execution = await startTask(client, task);
  const objects = { environmentId: id, serviceId: service.id, taskId: task.id, executionId: execution.id };
  return { token, objects };
}

async function newProjectOf(client: BerthClient): Promise<string> {
  const { project } = await client.projects.createProject(create(CreateProjectRequestSchema, newProject));
  return project?.id ?? "";
}

/** The objects of one call, and the caller's token for it. */
async function scene(rpc: string, caller: Caller): Promise<{ world: World; token: string }> {
  if (!DESTRUCTIVE.has(rpc)) return { world, token: tokens[caller] };
  const own = await newEnvironment(creator.client, runner, world.classId);
  const { exchangeToken } = await plane.admin.runners.createRunnerToken({ runnerId: world.runnerId });
  const token = caller === "environment" ? own.token : tokens[caller];
  const projectId = await newProjectOf(creator.client);
  return { world: { ...world, ...own.objects, projectId, exchangeToken, secretId: await makeSecret() }, token };
}

/** How a call ends: ok once there is an answer, or the first message of a stream. */
async function outcome(method: DescMethod, request: Record<string, unknown>, token: string): Promise<string> {
  const transport = createConnectTransport({ baseUrl: plane.url, httpVersion: "1.1" });
  const header = token ? { authorization: `Bearer ${token}` } : undefined;
  const message = create(method.input, request);
  const stop = new AbortController();
  try {
    if (method.methodKind === "unary") {
      await transport.unary(method as DescMethodUnary, undefined, 10_000, header, message);
      return "ok";
    }
    const messages = (async function* () {
      yield message;
    })();
    const streaming = method as DescMethodServerStreaming;
    const answer = await transport.stream(streaming, stop.signal, 10_000, header, messages);
    for await (const _first of answer.message) return "ok";
    return "an empty stream";
  } catch (error) {
    return Code[ConnectError.from(error).code] ?? "";
  } finally {
    stop.abort();
  }
}

/** Every RPC that the control plane serves, from the router that it serves with. */
function registered(): DescMethod[] {
  const router = createConnectRouter();
  routes(plane.plane.app)(router);
  return router.handlers.map(({ method }) => method);
}

const rows = EXPECTED.trim()
  .split("\n")
  .map((line) => {
    const [rpc = "", ...letters] = line.trim().split(/ +/);
    return [rpc, letters.join(" ")] as const;
  });

test("every registered RPC has a row, and every row and request an RPC", () => {
  const known = registered().map(nameOf).sort();
  expect(rows.map(([rpc]) => rpc).sort()).toEqual(known);
  expect([...Object.keys(REQUESTS), ...DESTRUCTIVE].filter((rpc) => !known.includes(rpc))).toEqual([]);
  expect(known.length).toBeGreaterThan(60);
});

test("the policy has a line for every registered RPC, and no other", () => {
  const lines = Object.entries(policy).flatMap(([service, methods]) =>
    Object.keys(methods).map((name) => `${service}/${name}`),
  );
  expect(lines.sort()).toEqual(
    registered()
      .map(({ parent, localName }) => `${parent.typeName}/${localName}`)
      .sort(),
  );
});

test.each(rows)("%s answers %s", async (rpc, letters) => {
  const method = registered().find((each) => nameOf(each) === rpc);
  if (!method) throw new Error("is not registered");
  const expected = letters.split(" ").map((letter) => OUTCOMES[letter] ?? `the unknown letter ${letter}`);
  expect(expected).toHaveLength(CALLERS.length);
  const found = await Promise.all(
    CALLERS.map(async (caller) => {
      const { world, token } = await scene(rpc, caller);
      return [caller, await outcome(method, REQUESTS[rpc]?.(world) ?? {}, token)];
    }),
  );
  expect(Object.fromEntries(found)).toEqual(Object.fromEntries(CALLERS.map((each, index) => [each, expected[index]])));
});
