import {
  Code,
  ConnectError,
  type ContextValues,
  createContextKey,
  createContextValues,
  type HandlerContext,
  type Interceptor,
} from "@connectrpc/connect";
import { universalRequestFromNodeRequest } from "@connectrpc/connect-node";
import type { Logger } from "pino";
import { callKey, callOf } from "../rpc/call.ts";
import { recordFailure, statusOf } from "../rpc/observe.ts";
import { applyPagingQuery } from "../rpc/paging.ts";
import type { Gate } from "./direct.ts";
import {
  answerJson,
  bodyChunks,
  breakOff,
  type Exchange,
  type Limits,
  OPEN_AFTER_MS,
  sendAnswer,
  toNodeHeaders,
} from "./exchange.ts";
import type { Rpc } from "./rpcs.ts";

/** A call that connect reads and writes. */
interface Bridged {
  /** Interceptors have begun: whatever fails now is theirs to report. */
  entered: boolean;
  /** Set once connect has understood what kind of call it is. */
  context?: HandlerContext;
}

const bridgedKey = createContextKey<Bridged | undefined>(undefined, { description: "bridged" });

/** A request that cannot be read is never the fault of the server, although connect says so for binary messages. */
function asInputFault(error: unknown): unknown {
  if (error instanceof ConnectError && error.code === Code.Internal)
    Object.assign(error, { code: Code.InvalidArgument });
  return error;
}

async function* readable<T>(messages: AsyncIterable<T>): AsyncGenerator<T> {
  try {
    yield* messages;
  } catch (error) {
    throw asInputFault(error);
  }
}

/** Runs before all other interceptors. */
export const entry: Interceptor = (next) => (request) => {
  if (!request.stream && request.requestMethod === "POST") {
    try {
      applyPagingQuery(request.method, request.message, request.url);
    } catch (error) {
      throw statusOf(error);
    }
  }
  const bridged = request.contextValues.get(bridgedKey);
  if (bridged) bridged.entered = true;
  return next(request.stream ? { ...request, message: readable(request.message) } : request);
};

/**
 * Runs once connect knows the kind of call, before it reads the body. What fails before interceptors run, connect turns
 * into an answer by itself: it aborts the context with the error first, and that is the place to see and correct it.
 */
export function requestGate(log: Logger, gate: Gate | undefined) {
  return async (context: HandlerContext): Promise<void> => {
    const { values, signal } = context;
    const bridged = values.get(bridgedKey);
    const call = callOf(values, context.requestHeader);
    if (bridged) bridged.context = context;
    const onAbort = () => {
      const { reason } = signal;
      if (!(reason instanceof ConnectError)) return;
      // What interceptors end with an error is told by them; what they ended well may fail when it is written.
      if (call.outcome === "error" || (bridged?.entered && !call.outcome)) return;
      if (!bridged?.entered) asInputFault(reason);
      recordFailure(log, context, call, reason);
    };
    signal.addEventListener("abort", onAbort, { once: true });
    try {
      await gate?.({ ...context, header: context.requestHeader, contextValues: values });
    } catch (error) {
      throw statusOf(error, signal);
    }
  };
}

/** The request as connect takes it; undefined if it has no usable URL. */
function universalRequest({ request, response }: Exchange, values: ContextValues) {
  try {
    return universalRequestFromNodeRequest(request, response, undefined, values);
  } catch {
    return undefined;
  }
}

/** What connect refuses without a word. */
function refuse(rpc: Rpc, { request, response }: Exchange, status: number): void {
  request.resume();
  if (status === 405) response.setHeader("allow", rpc.handler.allowedMethods.join(", "));
  if (status === 505) response.setHeader("connection", "close");
  answerJson(response, status, { message: REFUSALS[status] ?? "the request is not understood" });
}

const REFUSALS: Record<number, string> = {
  405: "this method is not allowed here: use POST, or GET for RPCs without side effects",
  415: "use application/json, application/proto, application/connect+json, application/connect+proto, application/grpc or application/grpc-web",
  505: "bidirectional streams need HTTP/2",
};

/** Serves one call through the protocols of connect. */
export async function serveBridged(limits: Limits, rpc: Rpc, exchange: Exchange): Promise<void> {
  const { request, response, call } = exchange;
  const bridged: Bridged = { entered: false };
  const values = createContextValues().set(callKey, call).set(bridgedKey, bridged);
  const universal = universalRequest(exchange, values);
  if (!universal) return answerJson(response, 400, { code: "invalid_argument", message: "the host is no host" });
  const isUnary = rpc.method.methodKind === "unary";
  const manyRequests = rpc.method.methodKind === "bidi_streaming" || rpc.method.methodKind === "client_streaming";
  const open = () => {
    if (!bridged.context || response.headersSent || exchange.closed) return;
    response.writeHead(200, toNodeHeaders(bridged.context.responseHeader));
    response.flushHeaders();
  };
  if (!isUnary) call.open = open;
  const opening = isUnary ? undefined : setTimeout(open, OPEN_AFTER_MS);
  try {
    const answer = await rpc.handler({ ...universal, body: bodyChunks(request, limits, manyRequests) });
    clearTimeout(opening);
    if (!answer.body && answer.status >= 400) refuse(rpc, exchange, answer.status);
    else await sendAnswer(answer, response, limits, () => exchange.closed);
  } catch (error) {
    if (!exchange.closed) throw error;
  } finally {
    clearTimeout(opening);
    if (!exchange.closed && !response.writableEnded && response.headersSent) breakOff(response);
  }
}
