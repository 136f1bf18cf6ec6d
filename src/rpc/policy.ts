import type { DescMethod, DescService } from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import type { RunnerControlService } from "../../gen/berth/runner/v1/runner_control_pb.js";
import type { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import type { EventService } from "../../gen/gitpod/v1/event_pb.js";
import type { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { RunnerConfigurationService } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { RunnerService } from "../../gen/gitpod/v1/runner_pb.js";

/** Which kinds of callers may use an RPC; roles on the resource are checked where the resource is known. */
interface Line {
  principals: readonly Principal[];
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

const runnerControl: Lines<typeof RunnerControlService> = {
  register: runners,
  heartbeat: runners,
  watch: runners,
  reportEnvironments: runners,
  createEnvironmentToken: runners,
  introspectToken: runners,
  completeCall: runners,
  deregister: runners,
};

/** One line for every RPC of every service that this server registers. */
export const policy = {
  "gitpod.v1.EnvironmentService": environments,
  "gitpod.v1.EventService": events,
  "gitpod.v1.IdentityService": identity,
  "gitpod.v1.RunnerService": runnerService,
  "gitpod.v1.RunnerConfigurationService": runnerConfiguration,
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
