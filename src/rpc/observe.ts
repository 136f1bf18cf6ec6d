import type { DescMethod, DescService } from "@bufbuild/protobuf";
import { Code, ConnectError, type ContextValues, type Interceptor, type StreamResponse } from "@connectrpc/connect";
import { codeToString } from "@connectrpc/connect/protocol-connect";
import type { Logger } from "pino";
import { Histogram } from "prom-client";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { RetryInfoSchema } from "../../gen/google/rpc/error_details_pb.js";
import { Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { type Call, callOf } from "./call.ts";
import { toConnectError } from "./errors.ts";

/** What a call is about, as interceptors and transports both know it. */
interface Rpc {
  readonly service: DescService;
  readonly method: DescMethod;
}

type Named = Pick<Caller, "principal" | "id">;

const MAX_CAUSES = 4;
// Mistakes of this program, in contrast to what its callers do wrong.
const FAULTS: ReadonlySet<Code> = new Set([Code.Internal, Code.Unknown, Code.DataLoss]);

const seconds = new Histogram({
  name: "berth_rpc_seconds",
  help: "Duration of calls by RPC and status code; of streams, the time they were open",
  labelNames: ["rpc", "code"],
  buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
});

/** Kind, text and stack of an error and its causes. Other properties stay out of the log: a database puts values there. */
export function describeError(error: unknown, depth = 0): object {
  if (!(error instanceof Error)) return { type: typeof error };
  const { name, message, stack, cause } = error;
  return {
    type: name,
    message,
    stack,
    ...(cause && depth < MAX_CAUSES ? { cause: describeError(cause, depth + 1) } : {}),
  };
}

/**
 * The error that a caller is told. What is no status of its own becomes the reason why the call was aborted, if it was,
 * else INTERNAL without any detail.
 */
export function statusOf(error: unknown, signal?: AbortSignal): ConnectError {
  if (error instanceof Refusal) return toConnectError(error);
  if (signal?.aborted && (error === signal.reason || !(error instanceof ConnectError))) {
    // A copy: one reason ends many calls, and each gets headers of its own.
    const { rawMessage, code } = ConnectError.from(signal.reason, Code.Canceled);
    return new ConnectError(rawMessage, FAULTS.has(code) ? Code.Canceled : code, undefined, undefined, error);
  }
  if (error instanceof ConnectError) return error;
  return new ConnectError("internal error", Code.Internal, undefined, undefined, error);
}

/** Says in headers what HTTP clients do not read from the body: how to authenticate, and whether to try again. */
function advise(error: ConnectError, requestId?: string): void {
  const { metadata } = error;
  if (requestId) metadata.set("x-request-id", requestId);
  if (error.code === Code.Unauthenticated) metadata.set("www-authenticate", "Bearer");
  if (error.code === Code.AlreadyExists) metadata.set("x-should-retry", "false");
  if (error.code !== Code.ResourceExhausted) return;
  const [retry] = error.findDetails(RetryInfoSchema);
  if (!retry) {
    metadata.set("x-should-retry", "false");
    return;
  }
  const wait = String(Number(retry.retryDelay?.seconds ?? 0n) + (retry.retryDelay?.nanos ? 1 : 0));
  metadata.set("retry-after", wait);
  metadata.set("ratelimit-retryafter", wait);
}

/** Writes a finished call to log and metrics, once; `error` is absent if it went well. */
function record(log: Logger, rpc: Rpc, call: Call, caller: Named | undefined, error?: ConnectError): void {
  if (call.outcome) return;
  call.outcome = error ? "error" : "ok";
  const duration = performance.now() - call.startedAt;
  const name = `${rpc.service.typeName}/${rpc.method.name}`;
  const code = error ? codeToString(error.code) : "ok";
  seconds.observe({ rpc: name, code }, duration / 1000);
  const isFault = error !== undefined && FAULTS.has(error.code);
  const level = isFault ? "error" : error && error.code !== Code.Canceled ? "info" : "debug";
  if (!log.isLevelEnabled(level)) return;
  log[level](
    {
      rpc: name,
      code,
      durationMs: Math.round(duration * 1000) / 1000,
      requestId: call.id,
      ...(caller && { principal: Principal[caller.principal], principalId: caller.id }),
      ...(isFault && { error: describeError(error.cause ?? error) }),
    },
    "call",
  );
}

/**
 * Ends a call that failed before interceptors saw it, or after they were done with it, which counts as another one;
 * returns what to tell the caller.
 */
export function recordFailure(log: Logger, rpc: Rpc, call: Call, error: unknown, signal?: AbortSignal): ConnectError {
  const status = statusOf(error, signal);
  call.outcome = undefined;
  advise(status, call.id);
  record(log, rpc, call, undefined, status);
  return status;
}

/**
 * Passes messages on until the signal ends the stream, whether or not their source heeds it, and reports once how it
 * went. A source that returns because of the signal has not ended well: the caller is told the reason.
 */
function watched<T>(
  messages: AsyncIterable<T>,
  signal: AbortSignal,
  ended: (error: unknown) => unknown,
): AsyncIterable<T> {
  return {
    [Symbol.asyncIterator]() {
      const source = messages[Symbol.asyncIterator]();
      let interrupt: ((reason: unknown) => void) | undefined;
      const onAbort = () => {
        interrupt?.(signal.reason);
        source.return?.().catch(() => undefined);
      };
      signal.addEventListener("abort", onAbort, { once: true });
      const finish = (error?: unknown) => {
        signal.removeEventListener("abort", onAbort);
        return ended(error);
      };
      return {
        next: () =>
          new Promise((resolve, reject) => {
            interrupt = (error) => reject(finish(error));
            if (signal.aborted) return interrupt(signal.reason);
            source.next().then((result) => {
              if (result.done && signal.aborted) return interrupt?.(signal.reason);
              if (result.done) finish();
              resolve(result);
            }, interrupt);
          }),
        async return(value) {
          finish(new ConnectError("the caller left", Code.Canceled));
          // Not waited for: a source that is waiting itself only returns when that is over.
          source.return?.().catch(() => undefined);
          return { done: true, value };
        },
      };
    },
  };
}

/**
 * Outermost of the interceptors: gives every call an id, tells the caller about errors, writes one log line and one
 * measurement for each. Log lines carry neither headers nor messages. `callerOf` names the caller, once known.
 */
export function observe(options: { log: Logger; callerOf: (values: ContextValues) => Named | undefined }): Interceptor {
  const { log, callerOf } = options;
  return (next) => async (request) => {
    const call = callOf(request.contextValues, request.header);
    let isNamed = false;
    const end = (error: unknown) => {
      const status = error === undefined ? undefined : statusOf(error, request.signal);
      if (status) advise(status, isNamed ? undefined : call.id);
      record(log, request, call, callerOf(request.contextValues), status);
      return status;
    };
    try {
      const response = await next(request);
      response.header.set("x-request-id", call.id);
      isNamed = true;
      if (response.stream) {
        return { ...response, message: watched(response.message, request.signal, end) } satisfies StreamResponse;
      }
      end(undefined);
      return response;
    } catch (error) {
      throw end(error);
    }
  };
}
