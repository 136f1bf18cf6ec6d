import type { IncomingMessage, ServerResponse } from "node:http";
import { constants, type Http2ServerRequest, type Http2ServerResponse } from "node:http2";
import type { Writable } from "node:stream";
import { Code, ConnectError } from "@connectrpc/connect";
import type { UniversalServerResponse } from "@connectrpc/connect/protocol";
import type { Call } from "../rpc/call.ts";

/** Streams that do not say themselves when they are open are taken to be after this time. */
export const OPEN_AFTER_MS = 200;
// How long what a broken answer says may take to be sent.
const BREAK_OFF_MS = 1000;

export type HttpRequest = IncomingMessage | Http2ServerRequest;
/** Of either version: what HTTP/2 has answers the same calls. */
export type HttpResponse = ServerResponse;

/**
 * Serves one path outside of the RPCs; `peer` is the address of the caller. A promise that rejects is logged and answered
 * with 500.
 */
export type HttpHandler = (request: HttpRequest, response: HttpResponse, peer: string) => void | Promise<void>;

/** Sizes in bytes, times in milliseconds. */
export interface Limits {
  /** Largest request message, and largest request body of a unary call. */
  bodyBytes: number;
  /** Largest response message. */
  answerBytes: number;
  /** All headers of a request together, URL included. */
  headerBytes: number;
  /** Time for the headers of a request. */
  headersMs: number;
  /** Time for a whole request to arrive. */
  requestMs: number;
  /** Time a response may wait for a caller that does not read. */
  stallMs: number;
  /** Time an unused connection stays open. */
  idleMs: number;
  /** Open connections. */
  connections: number;
  /** Open streams of one HTTP/2 connection. */
  streamsPerConnection: number;
  /** Unary calls in flight. */
  calls: number;
  /** Streaming calls in flight. */
  streams: number;
}

/** A request and its answer. */
export interface Exchange {
  readonly request: HttpRequest;
  readonly response: HttpResponse;
  /** Absolute URL of the request, with its query. */
  readonly url: string;
  readonly call: Call;
  /** The answer is sent, or its connection gone. */
  closed: boolean;
  /** Tells whoever serves it to end before the answer is complete; absent if it can not, or learns that elsewhere. */
  abort?: (reason: ConnectError) => void;
}

export const tooLarge = (limit: number) =>
  new ConnectError(`the request is larger than ${limit} bytes`, Code.ResourceExhausted);

export const isHttp2 = (request: HttpRequest): request is Http2ServerRequest => request.httpVersionMajor === 2;

/**
 * Limits the time a request may take to arrive, which Node does for HTTP/1.1 only. Returns what ends the watch.
 */
function withinTime(request: HttpRequest, ms: number, expired: (error: ConnectError) => void): () => void {
  if (!isHttp2(request)) return () => undefined;
  const late = () => expired(new ConnectError("the request took too long to arrive", Code.DeadlineExceeded));
  const timer = setTimeout(late, ms);
  return () => clearTimeout(timer);
}

/**
 * The body of a request as a whole, of at most `overhead` bytes more than a message may have. Too large is
 * RESOURCE_EXHAUSTED, too slow DEADLINE_EXCEEDED.
 */
export function readBody(
  request: HttpRequest,
  limits: Pick<Limits, "bodyBytes" | "requestMs">,
  overhead: number,
): Promise<Uint8Array> {
  const promised = Number(request.headers["content-length"] ?? 0);
  const left = () => new ConnectError("the caller left", Code.Canceled);
  // Its end and its close have been told already, to nobody.
  if ((isHttp2(request) ? request.stream : request).destroyed) return Promise.reject(left());
  return new Promise((resolve, reject) => {
    // What is left of a refused body is read and dropped, so that the caller gets to read the answer.
    const refuse = (error: ConnectError) => {
      stop();
      request.resume();
      reject(error);
    };
    if (promised > limits.bodyBytes + overhead) {
      request.resume();
      return reject(tooLarge(limits.bodyBytes));
    }
    const chunks: Uint8Array[] = [];
    let size = 0;
    const onData = (chunk: Uint8Array) => {
      size += chunk.length;
      if (size > limits.bodyBytes + overhead) refuse(tooLarge(limits.bodyBytes));
      else chunks.push(chunk);
    };
    const onEnd = () => {
      stop();
      const [only] = chunks;
      resolve(chunks.length === 1 && only ? only : Buffer.concat(chunks));
    };
    const onClose = () => {
      stop();
      reject(left());
    };
    const endWatch = withinTime(request, limits.requestMs, refuse);
    const stop = () => {
      endWatch();
      request.off("data", onData);
      request.off("end", onEnd);
      request.off("close", onClose);
    };
    request.on("data", onData);
    request.on("end", onEnd);
    request.on("close", onClose);
  });
}

/**
 * The body of a request piece by piece. A reader that stops early does not take the connection down with it, as it
 * would with the iterator that streams have: the answer could not be sent.
 */
export async function* bodyChunks(request: HttpRequest, limits: Limits, unlimitedTime: boolean) {
  const chunks: AsyncIterator<Uint8Array> = request.iterator({ destroyOnReturn: false });
  const expiry = Promise.withResolvers<never>();
  expiry.promise.catch(() => undefined);
  const timed = isHttp2(request) && !unlimitedTime;
  const endWatch = timed ? withinTime(request, limits.requestMs, expiry.reject) : () => undefined;
  try {
    for (;;) {
      const next = await (timed ? Promise.race([chunks.next(), expiry.promise]) : chunks.next());
      if (next.done) return;
      yield next.value;
    }
  } finally {
    endWatch();
    await chunks.return?.();
    request.resume();
  }
}

/**
 * Resolves when a response takes more bytes again, or its connection is gone; one that stalls for long is cut off.
 * `written` is what the bytes are written to, if that is not the response itself.
 */
export function drained(
  response: HttpResponse,
  limits: Pick<Limits, "stallMs">,
  written: Writable = response,
): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => response.destroy(), limits.stallMs);
    const done = () => {
      clearTimeout(timer);
      written.off("drain", done);
      response.off("close", done);
      resolve();
    };
    written.on("drain", done);
    response.on("close", done);
  });
}

/** Headers of a response as Node takes them. */
export function toNodeHeaders(headers: Headers): Record<string, string | string[]> {
  const found: Record<string, string | string[]> = {};
  for (const [name, value] of headers) {
    const before = found[name];
    if (before === undefined) found[name] = value;
    else found[name] = Array.isArray(before) ? [...before, value] : [before, value];
  }
  return found;
}

/** Sends what connect answers, as fast as the caller reads it; `isOver` tells that the caller has left. */
export async function sendAnswer(
  answer: UniversalServerResponse,
  response: HttpResponse,
  limits: Pick<Limits, "stallMs">,
  isOver: () => boolean,
): Promise<void> {
  const chunks = answer.body?.[Symbol.asyncIterator]();
  try {
    if (!response.headersSent) response.writeHead(answer.status, toNodeHeaders(answer.header ?? new Headers()));
    for (let next = await chunks?.next(); next && !next.done && !isOver(); next = await chunks?.next()) {
      if (!response.write(next.value)) await drained(response, limits);
    }
    if (isOver()) return;
    if (answer.trailer) response.addTrailers(toNodeHeaders(answer.trailer));
    response.end();
  } finally {
    chunks?.return?.()?.catch(() => undefined);
  }
}

/** Headers of a request as the web knows them, without the pseudo headers of HTTP/2. */
export function toWebHeaders(headers: HttpRequest["headers"]): Headers {
  const found = new Headers();
  for (const name in headers) {
    const value = headers[name];
    if (value === undefined || name.startsWith(":")) continue;
    if (typeof value === "string") found.append(name, value);
    else for (const each of value) found.append(name, each);
  }
  return found;
}

/** Ends a response that has begun and cannot be finished, so that the caller notices, after what it has been sent. */
export function breakOff(response: HttpResponse): void {
  const { stream } = response as unknown as Partial<Http2ServerResponse>;
  if (!stream) {
    response.socket?.destroySoon();
    return;
  }
  const close = () => stream.close(constants.NGHTTP2_INTERNAL_ERROR);
  const timer = setTimeout(close, BREAK_OFF_MS);
  stream.once("close", () => clearTimeout(timer));
  stream.write("", close);
}

/** A complete JSON response. */
export function answerJson(
  response: HttpResponse,
  status: number,
  body: object,
  headers: Record<string, string> = {},
): void {
  if (response.headersSent || response.writableEnded) return;
  const text = JSON.stringify(body);
  response.writeHead(status, {
    "content-type": "application/json",
    "content-length": String(Buffer.byteLength(text)),
    ...headers,
  });
  response.end(text);
}
