import {
  type Client,
  type Code,
  ConnectError,
  createClient,
  type Interceptor,
  type Transport,
} from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { RunnerControlService } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { RunnerService } from "../../gen/gitpod/v1/runner_pb.js";

/** Clients of the control plane. Calls end after 15 s unless told otherwise; the token is read at each call. */
export interface ControlPlane {
  control: Client<typeof RunnerControlService>;
  runners: Client<typeof RunnerService>;
  identity: Client<typeof IdentityService>;
  /** The public API with the token of an environment. */
  environments(token: string): Client<typeof EnvironmentService>;
}

export const CALL_TIMEOUT_MS = 15_000;
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

const bearer =
  (token: () => string): Interceptor =>
  (next) =>
  (request) => {
    if (token()) request.header.set("authorization", `Bearer ${token()}`);
    return next(request);
  };

function transport(baseUrl: string, token: () => string): Transport {
  return createConnectTransport({
    baseUrl,
    httpVersion: "1.1",
    defaultTimeoutMs: CALL_TIMEOUT_MS,
    interceptors: [bearer(token)],
    readMaxBytes: MAX_MESSAGE_BYTES,
  });
}

export function connectControlPlane(apiUrl: string, accessToken: () => string): ControlPlane {
  const own = transport(apiUrl, accessToken);
  return {
    control: createClient(RunnerControlService, own),
    runners: createClient(RunnerService, own),
    identity: createClient(
      IdentityService,
      transport(apiUrl, () => ""),
    ),
    environments: (token) =>
      createClient(
        EnvironmentService,
        transport(apiUrl, () => token),
      ),
  };
}

export const codeOf = (error: unknown): Code => ConnectError.from(error).code;

/** Text of an error for logs: code and message, no stack, no credentials. */
export const describe = (error: unknown): string => ConnectError.from(error).message;
