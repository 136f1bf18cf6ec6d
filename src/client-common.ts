import type { DescService } from "@bufbuild/protobuf";
import { type Client, createClient, type Interceptor, type Transport } from "@connectrpc/connect";
import { AccountService } from "../gen/gitpod/v1/account_pb.js";
import { EditorService } from "../gen/gitpod/v1/editor_pb.js";
import { EnvironmentAutomationService } from "../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentService } from "../gen/gitpod/v1/environment_pb.js";
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

const SERVICES = {
  accounts: AccountService,
  editors: EditorService,
  environmentAutomation: EnvironmentAutomationService,
  environments: EnvironmentService,
  events: EventService,
  gateways: GatewayService,
  groups: GroupService,
  identity: IdentityService,
  organizations: OrganizationService,
  projects: ProjectService,
  runnerConfiguration: RunnerConfigurationService,
  runners: RunnerService,
  secrets: SecretService,
  serviceAccounts: ServiceAccountService,
  usage: UsageService,
  users: UserService,
} satisfies Record<string, DescService>;

/** A client for each service of the public API, made at its first use. Calls reject with a ConnectError. */
export type BerthClient = { readonly [Name in keyof typeof SERVICES]: Client<(typeof SERVICES)[Name]> };

/** A token, or what gets one: asked before each call, so that it may change. */
export type Token = string | (() => string | Promise<string>);

/** Settings of every client. */
export interface ClientOptions {
  /** URL of the control plane, with or without `/api`. */
  baseUrl: string;
  /** Sent as bearer token; without it only public RPCs can be called. */
  token?: Token;
  /** Binary messages instead of JSON; by default what the protocol prefers. */
  useBinaryFormat?: boolean;
  /** Deadline of calls that bring none of their own, in milliseconds; holds for streams too. None by default. */
  defaultTimeoutMs?: number;
  /** Around every call, outside of the one that adds the token. */
  interceptors?: Interceptor[];
}

function bearer(token: Token): Interceptor {
  return (next) => async (request) => {
    const text = typeof token === "string" ? token : await token();
    if (text) request.header.set("authorization", `Bearer ${text}`);
    return next(request);
  };
}

/** What all transports are told. */
export function transportOptions({ baseUrl, token, interceptors = [], ...options }: ClientOptions) {
  const { useBinaryFormat, defaultTimeoutMs } = options;
  return {
    baseUrl: baseUrl.replace(/\/+$/, ""),
    interceptors: token === undefined ? interceptors : [...interceptors, bearer(token)],
    ...(useBinaryFormat !== undefined && { useBinaryFormat }),
    ...(defaultTimeoutMs !== undefined && { defaultTimeoutMs }),
  };
}

export function clientsOver(transport: Transport): BerthClient {
  const clients = {};
  for (const [name, service] of Object.entries(SERVICES)) {
    let made: Client<DescService> | undefined;
    const get = () => {
      made ??= createClient<DescService>(service, transport);
      return made;
    };
    Object.defineProperty(clients, name, { enumerable: true, get });
  }
  return clients as BerthClient;
}
