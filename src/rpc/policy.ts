import type { DescMethod, DescService } from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import type { RunnerControlService } from "../../gen/berth/runner/v1/runner_control_pb.js";
import type { AccountService } from "../../gen/gitpod/v1/account_pb.js";
import type { EditorService } from "../../gen/gitpod/v1/editor_pb.js";
import type { EnvironmentAutomationService } from "../../gen/gitpod/v1/environment_automation_pb.js";
import type { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import type { EventService } from "../../gen/gitpod/v1/event_pb.js";
import type { GatewayService } from "../../gen/gitpod/v1/gateway_pb.js";
import type { GroupService } from "../../gen/gitpod/v1/group_pb.js";
import type { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { OrganizationService } from "../../gen/gitpod/v1/organization_pb.js";
import type { ProjectService } from "../../gen/gitpod/v1/project_pb.js";
import type { RunnerConfigurationService } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { RunnerService } from "../../gen/gitpod/v1/runner_pb.js";
import type { SecretService } from "../../gen/gitpod/v1/secret_pb.js";
import type { ServiceAccountService } from "../../gen/gitpod/v1/service_account_pb.js";
import type { UsageService } from "../../gen/gitpod/v1/usage_pb.js";
import type { UserService } from "../../gen/gitpod/v1/user_pb.js";
import { TokenKind } from "../domain/tokens.ts";

/** Which kinds of callers may use an RPC; roles on the resource are checked where the resource is known. */
interface Line {
  principals: readonly Principal[];
  /** Kinds of tokens that open it, where not every kind that such a caller can have does. */
  kinds?: readonly TokenKind[];
  /** No credential is needed, and one that is sent is ignored. */
  public?: boolean;
  /** Also open to read-only tokens; RPCs marked free of side effects always are. */
  read?: boolean;
}

/** A line of the table, with what the schema says about the RPC. */
export interface Rule extends Line {
  read: boolean;
}

const { ACCOUNT, USER, SERVICE_ACCOUNT, RUNNER, ENVIRONMENT } = Principal;
const people: Line = { principals: [USER, SERVICE_ACCOUNT] };
const peopleAndEnvironments: Line = { principals: [USER, SERVICE_ACCOUNT, ENVIRONMENT] };
const everybody: Line = { principals: [USER, SERVICE_ACCOUNT, RUNNER, ENVIRONMENT] };
const runners: Line = { principals: [RUNNER] };
const users: Line = { principals: [USER] };
const accounts: Line = { principals: [USER, ACCOUNT] };
// The tokens of a service account are managed with a short-lived one that a person has asked for, never with each other.
const ownAccess: Line = { principals: [SERVICE_ACCOUNT], kinds: [TokenKind.SERVICE_ACCOUNT_ACCESS] };
const accountTokens: Line = {
  principals: [USER, SERVICE_ACCOUNT],
  kinds: [TokenKind.PERSONAL_ACCESS, TokenKind.SESSION, TokenKind.SERVICE_ACCOUNT_ACCESS],
};

type Lines<S extends DescService> = Record<keyof S["method"], Line>;

const environments: Lines<typeof EnvironmentService> = {
  getEnvironment: everybody,
  listEnvironments: everybody,
  listEnvironmentClasses: everybody,
  createEnvironment: people,
  createEnvironmentFromProject: people,
  startEnvironment: people,
  stopEnvironment: peopleAndEnvironments,
  archiveEnvironment: people,
  unarchiveEnvironment: people,
  deleteEnvironment: people,
  updateEnvironment: peopleAndEnvironments,
  markEnvironmentActive: peopleAndEnvironments,
  createEnvironmentLogsToken: peopleAndEnvironments,
  createEnvironmentAccessToken: people,
  createPortAccessToken: people,
  allowPortAccess: people,
};

const automations: Lines<typeof EnvironmentAutomationService> = {
  createService: peopleAndEnvironments,
  getService: peopleAndEnvironments,
  listServices: peopleAndEnvironments,
  updateService: peopleAndEnvironments,
  deleteService: peopleAndEnvironments,
  startService: peopleAndEnvironments,
  stopService: peopleAndEnvironments,
  upsertAutomationsFile: peopleAndEnvironments,
  createTask: peopleAndEnvironments,
  getTask: peopleAndEnvironments,
  listTasks: peopleAndEnvironments,
  updateTask: peopleAndEnvironments,
  deleteTask: peopleAndEnvironments,
  startTask: peopleAndEnvironments,
  listTaskExecutions: peopleAndEnvironments,
  getTaskExecution: peopleAndEnvironments,
  stopTaskExecution: peopleAndEnvironments,
};

const events: Lines<typeof EventService> = {
  watchEvents: { ...peopleAndEnvironments, read: true },
  listAuditLogs: people,
  getAuditLog: people,
};

const identity: Lines<typeof IdentityService> = {
  exchangeToken: { principals: [], public: true },
  getIDToken: everybody,
  getAuthenticatedIdentity: { principals: [...everybody.principals, ACCOUNT] },
};

const runnerService: Lines<typeof RunnerService> = {
  createRunner: people,
  getRunner: everybody,
  listRunners: everybody,
  updateRunner: people,
  deleteRunner: people,
  createRunnerToken: { principals: [USER, SERVICE_ACCOUNT, RUNNER] },
  createRunnerLogsToken: people,
  parseContextURL: { ...peopleAndEnvironments, read: true },
  searchRepositories: { ...peopleAndEnvironments, read: true },
  listSCMOrganizations: { ...peopleAndEnvironments, read: true },
  checkAuthenticationForHost: { ...peopleAndEnvironments, read: true },
  checkRepositoryAccess: { ...peopleAndEnvironments, read: true },
  listRunnerPolicies: people,
  createRunnerPolicy: people,
  updateRunnerPolicy: people,
  deleteRunnerPolicy: people,
};

const runnerConfiguration: Lines<typeof RunnerConfigurationService> = {
  createEnvironmentClass: people,
  getEnvironmentClass: everybody,
  listEnvironmentClasses: everybody,
  updateEnvironmentClass: people,
  createHostAuthenticationToken: people,
  getHostAuthenticationToken: people,
  listHostAuthenticationTokens: people,
  updateHostAuthenticationToken: people,
  deleteHostAuthenticationToken: people,
  getRunnerConfigurationSchema: everybody,
  createSCMIntegration: people,
  getSCMIntegration: peopleAndEnvironments,
  listSCMIntegrations: everybody,
  updateSCMIntegration: people,
  deleteSCMIntegration: people,
  validateRunnerConfiguration: people,
};

const account: Lines<typeof AccountService> = {
  getAccount: accounts,
  deleteAccount: accounts,
  getSSOLoginURL: { principals: [], public: true },
  listSSOLogins: { principals: [], public: true },
  listLoginProviders: { principals: [], public: true },
  listJoinableOrganizations: accounts,
};

const user: Lines<typeof UserService> = {
  getAuthenticatedUser: users,
  getUser: peopleAndEnvironments,
  setSuspended: users,
  deleteUser: users,
  createPersonalAccessToken: users,
  getPersonalAccessToken: users,
  listPersonalAccessTokens: users,
  deletePersonalAccessToken: users,
  setPreference: users,
  getPreference: users,
  listPreferences: users,
  deletePreference: users,
  getDotfilesConfiguration: users,
  setDotfilesConfiguration: users,
};

const groups: Lines<typeof GroupService> = {
  createGroup: people,
  getGroup: people,
  listGroups: people,
  updateGroup: people,
  deleteGroup: people,
  createMembership: people,
  deleteMembership: people,
  getMembership: people,
  listMemberships: people,
  createRoleAssignment: people,
  listRoleAssignments: people,
  deleteRoleAssignment: people,
  shareResourceWithPrincipal: people,
  unshareResourceWithPrincipal: people,
};

const serviceAccounts: Lines<typeof ServiceAccountService> = {
  createServiceAccount: users,
  listServiceAccounts: people,
  getServiceAccount: people,
  updateServiceAccount: users,
  deleteServiceAccount: users,
  createServiceAccountAccessToken: users,
  createServiceAccountToken: ownAccess,
  listServiceAccountTokens: ownAccess,
  getServiceAccountToken: accountTokens,
  deleteServiceAccountToken: accountTokens,
};

const projects: Lines<typeof ProjectService> = {
  createProject: people,
  createProjects: people,
  updateProjects: people,
  deleteProjects: people,
  createProjectFromEnvironment: people,
  getProject: peopleAndEnvironments,
  updateProject: people,
  listProjects: people,
  deleteProject: people,
  listProjectPolicies: people,
  createProjectPolicy: people,
  deleteProjectPolicy: people,
  updateProjectPolicy: people,
  listProjectEnvironmentClasses: people,
  updateProjectEnvironmentClasses: people,
};

const secrets: Lines<typeof SecretService> = {
  createSecret: people,
  updateSecretValue: people,
  listSecrets: people,
  deleteSecret: people,
  getSecretValue: peopleAndEnvironments,
};

const editors: Lines<typeof EditorService> = {
  listEditors: peopleAndEnvironments,
  getEditor: peopleAndEnvironments,
  resolveEditorURL: people,
};

const gateways: Lines<typeof GatewayService> = {
  listGateways: everybody,
};

const usage: Lines<typeof UsageService> = {
  getTopProjects: people,
};

const organization: Lines<typeof OrganizationService> = {
  createOrganization: accounts,
  joinOrganization: accounts,
  getOrganization: { principals: [...peopleAndEnvironments.principals, ACCOUNT] },
  updateOrganization: people,
  deleteOrganization: users,
  listMembers: { principals: [...people.principals, ACCOUNT] },
  setRole: people,
  createOrganizationInvite: people,
  getOrganizationInvite: people,
  getOrganizationInviteSummary: { principals: [...people.principals, ACCOUNT] },
  leaveOrganization: { principals: [...people.principals, ACCOUNT] },
  createSSOConfiguration: people,
  getSSOConfiguration: people,
  listSSOConfigurations: people,
  deleteSSOConfiguration: people,
  updateSSOConfiguration: people,
  createSCIMConfiguration: people,
  getSCIMConfiguration: people,
  listSCIMConfigurations: people,
  updateSCIMConfiguration: people,
  deleteSCIMConfiguration: people,
  regenerateSCIMToken: people,
  createDomainVerification: people,
  getDomainVerification: people,
  listDomainVerifications: people,
  verifyDomain: people,
  deleteDomainVerification: people,
  getOrganizationPolicies: peopleAndEnvironments,
  updateOrganizationPolicies: people,
  getOIDCConfig: people,
  updateOIDCConfig: people,
  getAnnouncementBanner: { ...peopleAndEnvironments, read: true },
  updateAnnouncementBanner: people,
  createCustomDomain: people,
  getCustomDomain: peopleAndEnvironments,
  updateCustomDomain: people,
  deleteCustomDomain: people,
};

const runnerControl: Lines<typeof RunnerControlService> = {
  register: runners,
  heartbeat: runners,
  watch: runners,
  reportEnvironments: runners,
  reportAutomations: runners,
  getEnvironmentSecrets: runners,
  getHostToken: runners,
  putHostToken: runners,
  createEnvironmentToken: runners,
  introspectToken: runners,
  redeemPortToken: runners,
  completeCall: runners,
  deregister: runners,
};

/** One line for every RPC of every service that this server registers. */
export const policy = {
  "gitpod.v1.EnvironmentService": environments,
  "gitpod.v1.EnvironmentAutomationService": automations,
  "gitpod.v1.EventService": events,
  "gitpod.v1.IdentityService": identity,
  "gitpod.v1.RunnerService": runnerService,
  "gitpod.v1.RunnerConfigurationService": runnerConfiguration,
  "gitpod.v1.AccountService": account,
  "gitpod.v1.UserService": user,
  "gitpod.v1.GroupService": groups,
  "gitpod.v1.ServiceAccountService": serviceAccounts,
  "gitpod.v1.ProjectService": projects,
  "gitpod.v1.SecretService": secrets,
  "gitpod.v1.EditorService": editors,
  "gitpod.v1.GatewayService": gateways,
  "gitpod.v1.UsageService": usage,
  "gitpod.v1.OrganizationService": organization,
  "berth.runner.v1.RunnerControlService": runnerControl,
} satisfies Record<string, Record<string, Line>>;

const PUBLIC: Rule = { principals: [], public: true, read: true };
// Health and reflection tell nothing about tenants.
const OPEN_PACKAGES = ["grpc.health.v1.", "grpc.reflection."];

/** The rule of an RPC; a service without lines is a mistake in the program and lets nobody in. */
export function ruleOf(service: DescService, method: DescMethod): Rule {
  if (OPEN_PACKAGES.some((prefix) => service.typeName.startsWith(prefix))) return PUBLIC;
  const line = (policy as Record<string, Record<string, Line>>)[service.typeName]?.[method.localName];
  if (!line) return { principals: [], read: false };
  return { ...line, read: line.read || method.idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS };
}
