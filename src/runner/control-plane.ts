import { type Client, Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { RunnerControlService } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { type BerthClient, createBerthClient } from "../client.ts";

/** Clients of the control plane. Calls end after 15 s unless told otherwise; the token is read at each call. */
export interface ControlPlane {
  /** The private protocol. */
  control: Client<typeof RunnerControlService>;
  runners: BerthClient["runners"];
  configuration: BerthClient["runnerConfiguration"];
  /** Without a credential. */
  identity: BerthClient["identity"];
  /** The public API with the token of an environment. */
  environments(token: string): BerthClient["environments"];
  automations(token: string): BerthClient["environmentAutomation"];
}

const CALL_TIMEOUT_MS = 15_000;
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
const TRANSIENT: ReadonlySet<Code> = new Set([Code.Unavailable, Code.DeadlineExceeded, Code.ResourceExhausted]);

export function connectControlPlane(baseUrl: string, accessToken: () => string): ControlPlane {
  const options = { baseUrl, defaultTimeoutMs: CALL_TIMEOUT_MS };
  const authorization: Interceptor = (next) => (request) => {
    request.header.set("authorization", `Bearer ${accessToken()}`);
    return next(request);
  };
  const transport = createConnectTransport({
    ...options,
    httpVersion: "1.1",
    interceptors: [authorization],
    readMaxBytes: MAX_MESSAGE_BYTES,
  });
  const { runners, runnerConfiguration } = createBerthClient({ ...options, token: accessToken });
  return {
    control: createClient(RunnerControlService, transport),
    ...{ runners, configuration: runnerConfiguration },
    identity: createBerthClient(options).identity,
    environments: (token) => createBerthClient({ ...options, token }).environments,
    automations: (token) => createBerthClient({ ...options, token }).environmentAutomation,
  };
}

export const codeOf = (error: unknown): Code => ConnectError.from(error).code;

/** The control plane cannot answer at the moment, which is worth another try. */
export const isTransient = (error: unknown): boolean => error instanceof ConnectError && TRANSIENT.has(error.code);

/** Text of an error for logs: code and message, no stack, no credentials. */
export const describe = (error: unknown): string => ConnectError.from(error).message;
