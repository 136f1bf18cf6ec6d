import type { DescMethod, DescService, Message } from "@bufbuild/protobuf";
import {
  Code,
  ConnectError,
  type ContextValues,
  createContextKey,
  createContextValues,
  type HandlerContext,
  type StreamRequest,
  type UnaryRequest,
} from "@connectrpc/connect";
import { callKey } from "../rpc/call.ts";
import { type Exchange, type HttpRequest, toWebHeaders } from "./exchange.ts";

const invocationKey = createContextKey<Invocation | undefined>(undefined, { description: "invocation" });

/** Longest time that a caller may set for a call; timers cannot wait longer. */
export const MAX_TIMEOUT_MS = 2 ** 31 - 1;

/** One call on its way through interceptors and handler; lives until its answer is sent. */
export class Invocation {
  readonly service: DescService;
  readonly method: DescMethod;
  readonly protocolName: string;
  readonly url: string;
  readonly contextValues: ContextValues;
  readonly responseHeader: Headers;
  readonly responseTrailer = new Headers();
  readonly #request: HttpRequest;
  /** Reads the message ahead of its time; see `Entering`. */
  peek?: () => Promise<Message | undefined>;
  #deadline: number | undefined;
  #timer: NodeJS.Timeout | undefined;
  #header: Headers | undefined;
  #controller: AbortController | undefined;
  #reason: ConnectError | undefined;

  constructor(method: DescMethod, exchange: Exchange, format: { protocol: string; contentType: string }) {
    this.service = method.parent;
    this.method = method;
    this.protocolName = format.protocol;
    this.url = exchange.url;
    this.contextValues = createContextValues().set(callKey, exchange.call).set(invocationKey, this);
    this.responseHeader = new Headers({ "content-type": format.contentType });
    this.#request = exchange.request;
  }

  /** Sets the deadline; only once. */
  expireAfter(timeoutMs: number | undefined): void {
    if (timeoutMs === undefined) return;
    this.#deadline = performance.now() + timeoutMs;
    const expired = () => this.abort(new ConnectError("the operation timed out", Code.DeadlineExceeded));
    this.#timer = setTimeout(expired, timeoutMs);
  }

  get header(): Headers {
    this.#header ??= toWebHeaders(this.#request.headers);
    return this.#header;
  }

  /** Made when somebody asks for it: most calls end before anybody does, and it is not cheap. */
  get signal(): AbortSignal {
    this.#controller ??= new AbortController();
    if (this.#reason) this.#controller.abort(this.#reason);
    return this.#controller.signal;
  }

  abort(reason: ConnectError): void {
    this.#reason ??= reason;
    this.#controller?.abort(this.#reason);
  }

  /** Ends the deadline; every call must come here. */
  end(): void {
    clearTimeout(this.#timer);
  }

  readonly timeoutMs = () => (this.#deadline === undefined ? undefined : this.#deadline - performance.now());

  /** What the first interceptor gets. */
  request(message: Message | AsyncIterable<Message>, stream: boolean): UnaryRequest | StreamRequest {
    const invocation = this;
    return {
      stream,
      message,
      method: this.method,
      service: this.service,
      requestMethod: "POST",
      url: this.url,
      contextValues: this.contextValues,
      get header() {
        return invocation.header;
      },
      get signal() {
        return invocation.signal;
      },
    } as UnaryRequest | StreamRequest;
  }
}

/** What the handler gets, for a request that interceptors may have replaced. */
export function handlerContext(request: UnaryRequest | StreamRequest): HandlerContext {
  const invocation = request.contextValues.get(invocationKey);
  if (!invocation) throw new Error("an interceptor dropped the context values");
  return {
    method: invocation.method,
    service: request.service,
    requestMethod: request.requestMethod,
    url: request.url,
    protocolName: invocation.protocolName,
    timeoutMs: invocation.timeoutMs,
    values: request.contextValues,
    responseHeader: invocation.responseHeader,
    responseTrailer: invocation.responseTrailer,
    get requestHeader() {
      return request.header;
    },
    get signal() {
      return request.signal;
    },
  };
}
