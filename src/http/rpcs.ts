import {
  create,
  createRegistry,
  type DescMethod,
  type DescService,
  type Message,
  type MessageInitShape,
  type Registry,
} from "@bufbuild/protobuf";
import {
  Code,
  ConnectError,
  type ConnectRouter,
  createConnectRouter,
  createMethodImplSpec,
  createServiceImplSpec,
  type HandlerContext,
  type Interceptor,
  type StreamRequest,
  type UnaryRequest,
} from "@connectrpc/connect";
import type { UniversalHandler } from "@connectrpc/connect/protocol";
import { compressionBrotli, compressionGzip } from "@connectrpc/connect-node";
import type { Limits } from "./exchange.ts";
import { handlerContext, MAX_TIMEOUT_MS } from "./invocation.ts";
import { checkedJsonText } from "./json.ts";

type Spec = ReturnType<typeof createMethodImplSpec>;
/** Interceptors and handler of an RPC as one function. */
export type Invoke = Parameters<Interceptor>[0];

export interface Rpc {
  readonly method: DescMethod;
  /** Interceptors and handler, for whoever has read the request message already. */
  readonly invoke: Invoke;
  /** The same behind the protocols of connect, with everything they know. */
  readonly handler: UniversalHandler;
}

/** Smallest message that is worth compressing: below, it costs more time than it saves. */
export const COMPRESS_MIN_BYTES = 16 * 1024;
export const COMPRESSIONS = [compressionGzip, compressionBrotli];

async function* normalized(method: DescMethod, messages: AsyncIterable<MessageInitShape<DescMethod["output"]>>) {
  for await (const message of messages) yield create(method.output, message);
}

/** The one message of a request that is a stream only for the sake of interceptors. */
async function only(messages: AsyncIterable<Message>): Promise<Message> {
  for await (const message of messages) return message;
  throw new ConnectError("protocol error: missing input message", Code.Unimplemented);
}

/** The innermost link of the chain: the handler itself. Only kinds with one request message come here. */
function callHandler(spec: Spec): Invoke {
  const method: DescMethod = spec.method;
  const implementation = spec.impl as (input: Message, context: HandlerContext) => unknown;
  return async (request: UnaryRequest | StreamRequest) => {
    const context = handlerContext(request);
    const answer = { method, service: method.parent, header: context.responseHeader, trailer: context.responseTrailer };
    if (!request.stream) {
      const output = (await implementation(request.message, context)) as MessageInitShape<typeof method.output>;
      return { ...answer, stream: false, message: create(method.output, output) } as Awaited<ReturnType<Invoke>>;
    }
    const output = implementation(await only(request.message), context) as AsyncIterable<Message>;
    return { ...answer, stream: true, message: normalized(method, output) } as Awaited<ReturnType<Invoke>>;
  };
}

/** What JSON needs to know beyond the message: types of what google.protobuf.Any may hold. */
export interface JsonTypes {
  readonly registry: Registry;
}

/** All RPCs of a server. */
export interface Rpcs {
  /** By path, for example `/gitpod.v1.RunnerService/GetRunner`. */
  readonly byPath: ReadonlyMap<string, Rpc>;
  readonly services: readonly DescService[];
  readonly jsonTypes: JsonTypes;
}

/** Collects what `routes` registers. */
function registered(routes: readonly ((router: ConnectRouter) => void)[]): Spec[] {
  const specs: Spec[] = [];
  const router: ConnectRouter = {
    handlers: [],
    service(service, implementation) {
      specs.push(...Object.values(createServiceImplSpec(service, implementation).methods));
      return router;
    },
    rpc(method, implementation) {
      specs.push(createMethodImplSpec(method, implementation));
      return router;
    },
  };
  for (const register of routes) register(router);
  return specs;
}

/** All RPCs that `routes` registers, ready to be called. */
export function collectRpcs(
  routes: readonly ((router: ConnectRouter) => void)[],
  options: {
    interceptors: Interceptor[];
    /** Runs first in connect's protocols, where it can see how requests were read. */
    entry: Interceptor;
    requestGate: (context: HandlerContext) => Promise<void>;
    limits: Limits;
    /** Aborted when the server wants streams, or all calls, to end. */
    shutdown: { streams: AbortSignal; calls: AbortSignal };
  },
): Rpcs {
  const { interceptors, entry, limits, shutdown } = options;
  const specs = registered(routes);
  const services = [...new Set(specs.map(({ method }) => method.parent))];
  const registry = createRegistry(...new Set(services.map(({ file }) => file)));
  const connect = createConnectRouter();
  const byPath = new Map<string, Rpc>();
  for (const spec of specs) {
    const method: DescMethod = spec.method;
    // JSON is read by the rules of this server, whatever the protocol.
    const textDecoder = { decode: (bytes: Uint8Array = new Uint8Array()) => checkedJsonText(method.input, bytes) };
    const jsonOptions = { registry, ignoreUnknownFields: true, textDecoder };
    connect.rpc(method, spec.impl as never, {
      acceptCompression: COMPRESSIONS,
      compressMinBytes: COMPRESS_MIN_BYTES,
      readMaxBytes: limits.bodyBytes,
      writeMaxBytes: limits.answerBytes,
      maxTimeoutMs: MAX_TIMEOUT_MS,
      shutdownSignal: method.methodKind === "unary" ? shutdown.calls : shutdown.streams,
      interceptors: [entry, ...interceptors],
      requestGate: options.requestGate,
      jsonOptions,
    });
    const handler = connect.handlers.at(-1)!;
    const invoke = interceptors.reduceRight<Invoke>((next, interceptor) => interceptor(next), callHandler(spec));
    byPath.set(handler.requestPath, { method, invoke, handler });
  }
  return { byPath, services, jsonTypes: { registry } };
}
