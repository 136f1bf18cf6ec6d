import type { DescMethod } from "@bufbuild/protobuf";
import { ConnectError, type HandlerContext, type ServiceImpl } from "@connectrpc/connect";
import { EnvironmentOpsService } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import type { SupervisorClient } from "./client.ts";
import { openStream } from "./connect-handler.ts";

type Call = (request: object, options: object) => unknown;

/**
 * Implements EnvironmentOpsService by passing every call on to the supervisor that `resolve` finds for it, so that the
 * runner ends all public protocols in one place. What `resolve` throws (bad token, environment not running) is the
 * caller's answer.
 */
export function forwardOps(
  resolve: (context: HandlerContext) => Promise<SupervisorClient>,
): ServiceImpl<typeof EnvironmentOpsService> {
  const methods = EnvironmentOpsService.methods.map((method) => [method.localName, forwardCall(method, resolve)]);
  return Object.fromEntries(methods);
}

function forwardCall(method: DescMethod, resolve: (context: HandlerContext) => Promise<SupervisorClient>): unknown {
  const options = (context: HandlerContext) => ({ signal: context.signal, timeoutMs: context.timeoutMs() });
  const callOf = (client: SupervisorClient) =>
    (client as unknown as Record<string, Call>)[method.localName]?.bind(client) as Call;
  switch (method.methodKind) {
    case "unary":
      return async (request: object, context: HandlerContext) => {
        try {
          return await callOf(await resolve(context))(request, options(context));
        } catch (error) {
          throw withoutMetadata(error);
        }
      };
    case "server_streaming":
      return async function* (request: object, context: HandlerContext) {
        const onHeader = () => openStream(context);
        try {
          const call = callOf(await resolve(context));
          yield* call(request, { ...options(context), onHeader }) as AsyncIterable<object>;
        } catch (error) {
          throw withoutMetadata(error);
        }
      };
    default:
      throw new Error(`${method.name} streams requests`);
  }
}

// The supervisor's response headers belong to the hop behind the runner and must not reach its caller.
function withoutMetadata(error: unknown): unknown {
  if (!(error instanceof ConnectError)) return error;
  return new ConnectError(error.rawMessage, error.code, undefined, undefined, error.cause);
}
