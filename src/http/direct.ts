import { type DescMethod, fromBinary, type Message, toBinary, toJsonString } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { encodeEnvelope, mergeNonProtocolHeaders } from "@connectrpc/connect/protocol";
import {
  codeToHttpStatus,
  endStreamFlag,
  endStreamToJson,
  errorToJsonBytes,
  parseTimeout as parseConnectTimeout,
} from "@connectrpc/connect/protocol-connect";
import { parseTimeout as parseGrpcTimeout, setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { trailerFlag, trailerSerialize } from "@connectrpc/connect/protocol-grpc-web";
import type { Logger } from "pino";
import { Refusal } from "../domain/errors.ts";
import { type Entering, encodedForm, type Outlet } from "../rpc/call.ts";
import { recordFailure } from "../rpc/observe.ts";
import { applyPagingQuery } from "../rpc/paging.ts";
import {
  breakOff,
  drained,
  type Exchange,
  type HttpRequest,
  isHttp2,
  type Limits,
  OPEN_AFTER_MS,
  readBody,
  toNodeHeaders,
  tooLarge,
} from "./exchange.ts";
import { Invocation, MAX_TIMEOUT_MS } from "./invocation.ts";
import { messageFromJson } from "./json.ts";
import { COMPRESS_MIN_BYTES, COMPRESSIONS, type JsonTypes, type Rpc } from "./rpcs.ts";

const ENVELOPE_BYTES = 5;
// A body in envelopes holds that of the message, and perhaps another one that says that this was all.
const ENVELOPES_BYTES = 1024;
// Largest body that is read before the caller is known, where that saves a way to the database.
const PEEK_BYTES = 8 * 1024;
const COMPRESSED_FLAG = 1;
const NEWLINE = Buffer.from("\n");

/** How a call is written down. */
export interface Format {
  protocol: "connect" | "grpc" | "grpc-web" | "jsonl";
  json: boolean;
  /** Content type of the answer. */
  contentType: string;
  /** Messages are wrapped in envelopes that tell their length. */
  enveloped: boolean;
  /** Frames of messages that go to many streams, and the same as chunks of HTTP/1.1. */
  frames: WeakMap<Message, Uint8Array>;
  chunks: WeakMap<Message, Uint8Array>;
  /** Request header with the compression of messages. */
  encoding: string;
  /** Request header with the compressions that an answer may have. */
  acceptEncoding: string;
}

function format(protocol: Format["protocol"], type: string, enveloped: boolean): Format {
  const contentType = `application/${type}`;
  const json = type.endsWith("json") || type === "jsonl";
  const common = { protocol, contentType, json, enveloped, frames: new WeakMap(), chunks: new WeakMap() };
  if (protocol.startsWith("grpc")) {
    return { ...common, encoding: "grpc-encoding", acceptEncoding: "grpc-accept-encoding" };
  }
  const prefix = enveloped ? "connect-" : "";
  return { ...common, encoding: `${prefix}content-encoding`, acceptEncoding: `${prefix}accept-encoding` };
}

const GRPC: [string, Format][] = ["grpc", "grpc-web"].flatMap((protocol) => {
  const [proto, json] = ["proto", "json"].map((type) =>
    format(protocol as "grpc" | "grpc-web", `${protocol}+${type}`, true),
  ) as [Format, Format];
  return [
    [protocol, proto],
    [`${protocol}+proto`, proto],
    [`${protocol}+json`, json],
  ];
});
const UNARY = new Map<string, Format>([
  ["json", format("connect", "json", false)],
  ["proto", format("connect", "proto", false)],
  ...GRPC,
]);
const STREAM = new Map<string, Format>([
  ["connect+json", format("connect", "connect+json", true)],
  ["connect+proto", format("connect", "connect+proto", true)],
  ["jsonl", format("jsonl", "jsonl", false)],
  ...GRPC,
]);

/** The format of a call that can be served directly, else undefined. */
export function directFormat({ methodKind }: DescMethod, request: HttpRequest): Format | undefined {
  if (request.method !== "POST" || (methodKind !== "unary" && methodKind !== "server_streaming")) return undefined;
  const type = /^application\/([a-z+-]+)(?:; ?charset=utf-?8)?$/i.exec(request.headers["content-type"] ?? "");
  let name = type?.[1]?.toLowerCase() ?? "";
  const formats = methodKind === "unary" ? UNARY : STREAM;
  if (methodKind !== "unary" && name === "json" && request.headers.accept?.includes("application/jsonl"))
    name = "jsonl";
  const found = formats.get(name);
  if (!found || (found.protocol === "grpc" && !isHttp2(request))) return undefined;
  return (request.headers[found.encoding] ?? "identity") === "identity" ? found : undefined;
}

const asChunk = (bytes: Uint8Array): Uint8Array =>
  Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from("\r\n")]);

/** The only message in a body of envelopes. */
function unwrap(body: Uint8Array): Uint8Array {
  if (body.length === 0) throw new ConnectError("protocol error: missing input message", Code.Unimplemented);
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  const end = body.length < ENVELOPE_BYTES ? Number.POSITIVE_INFINITY : ENVELOPE_BYTES + view.getUint32(1);
  if (end > body.length) throw new ConnectError("protocol error: incomplete envelope", Code.InvalidArgument);
  const flags = view.getUint8(0);
  if (flags & COMPRESSED_FLAG)
    throw new ConnectError("a compressed message without its encoding", Code.InvalidArgument);
  // Some clients end their side with an envelope of its own.
  const isLast = end === body.length || (view.getUint8(end) & (endStreamFlag | trailerFlag)) !== 0;
  if (!isLast) throw new ConnectError("protocol error: received extra input message", Code.Unimplemented);
  return body.subarray(ENVELOPE_BYTES, end);
}

function messageFromBinary(method: DescMethod, bytes: Uint8Array): Message {
  try {
    return fromBinary(method.input, bytes);
  } catch (error) {
    const { message } = error as Error;
    throw new ConnectError(`parse binary: ${message}`, Code.InvalidArgument, undefined, undefined, error);
  }
}

async function* once(message: Message) {
  yield message;
}

function timeoutOf({ protocol }: Format, { headers }: HttpRequest): number | undefined {
  const isGrpc = protocol.startsWith("grpc");
  const given = headers[isGrpc ? "grpc-timeout" : "connect-timeout-ms"];
  if (typeof given !== "string") return undefined;
  const { timeoutMs, error } = (isGrpc ? parseGrpcTimeout : parseConnectTimeout)(given, MAX_TIMEOUT_MS);
  if (error) throw error;
  return timeoutMs;
}

/** Runs before the message of a request is read; throws to refuse the call. */
export type Gate = (request: Entering) => void | Promise<void>;

export interface DirectOptions {
  limits: Limits;
  log: Logger;
  jsonTypes: JsonTypes;
  gate: Gate | undefined;
}

/** Serves one call in one format: reads the message, runs the RPC, writes the answer. */
class DirectCall implements Outlet {
  readonly #options: DirectOptions;
  readonly #rpc: Rpc;
  readonly #format: Format;
  readonly #exchange: Exchange;
  readonly #invocation: Invocation;
  #reading: Promise<Message> | undefined;
  #full: Promise<void> | undefined;
  #opened = false;
  #opening: NodeJS.Timeout | undefined;

  constructor(options: DirectOptions, rpc: Rpc, format: Format, exchange: Exchange) {
    this.#options = options;
    this.#rpc = rpc;
    this.#format = format;
    this.#exchange = exchange;
    this.#invocation = new Invocation(rpc.method, exchange, format);
  }

  async serve(): Promise<void> {
    const invocation = this.#invocation;
    this.#exchange.abort = (reason) => invocation.abort(reason);
    this.#exchange.call.takesEncoded = !this.#format.json;
    try {
      const message = await this.#receive();
      if (this.#rpc.method.methodKind === "unary") await this.#unary(message);
      else await this.#stream(message);
    } catch (error) {
      this.#fail(error);
    } finally {
      clearTimeout(this.#opening);
      invocation.end();
    }
  }

  async #receive(): Promise<Message> {
    this.#invocation.expireAfter(timeoutOf(this.#format, this.#exchange.request));
    this.#invocation.peek = () => this.#peek();
    await this.#options.gate?.(this.#invocation);
    return this.#message();
  }

  /** Asked for nobody but callers whose credential was good the last time. Many do not tell the length beforehand. */
  async #peek(): Promise<Message | undefined> {
    const length = Number(this.#exchange.request.headers["content-length"] ?? 0);
    return length <= PEEK_BYTES ? this.#message().catch(() => undefined) : undefined;
  }

  #message(): Promise<Message> {
    this.#reading ??= this.#read();
    return this.#reading;
  }

  async #read(): Promise<Message> {
    const { request } = this.#exchange;
    const { limits, jsonTypes } = this.#options;
    const { method } = this.#rpc;
    const body = await readBody(request, limits, this.#format.enveloped ? ENVELOPES_BYTES : 0);
    const bytes = this.#format.enveloped ? unwrap(body) : body;
    if (bytes.length > limits.bodyBytes) throw tooLarge(limits.bodyBytes);
    const message = this.#format.json
      ? messageFromJson(method.input, bytes, jsonTypes)
      : messageFromBinary(method, bytes);
    if (method.methodKind === "unary") applyPagingQuery(method, message, this.#exchange.url);
    return message;
  }

  #bytes(message: Message): Uint8Array {
    const { output } = this.#rpc.method;
    const { jsonTypes, limits } = this.#options;
    const bytes = this.#format.json
      ? Buffer.from(toJsonString(output, message, jsonTypes))
      : (encodedForm(message) ?? toBinary(output, message));
    if (bytes.length <= limits.answerBytes) return bytes;
    throw new Refusal("resource_exhausted", `the answer is larger than ${limits.answerBytes} bytes`);
  }

  async #unary(message: Message): Promise<void> {
    const response = await this.#rpc.invoke(this.#invocation.request(message, false));
    const bytes = this.#bytes(response.message as Message);
    const compression = this.#compression(bytes);
    const sent = compression ? await compression.compress(bytes) : bytes;
    if (compression) this.#invocation.responseHeader.set(this.#format.encoding, compression.name);
    if (!this.#format.enveloped) return this.#answer(200, sent);
    this.#open();
    this.#exchange.response.write(encodeEnvelope(compression ? COMPRESSED_FLAG : 0, sent));
    this.#end();
  }

  #compression(bytes: Uint8Array) {
    if (bytes.length < COMPRESS_MIN_BYTES) return undefined;
    const accepted = String(this.#exchange.request.headers[this.#format.acceptEncoding] ?? "").split(",");
    return accepted.map((name) => COMPRESSIONS.find((each) => each.name === name.trim())).find(Boolean);
  }

  async #stream(message: Message): Promise<void> {
    const { response, call } = this.#exchange;
    const { limits } = this.#options;
    const answer = await this.#rpc.invoke(this.#invocation.request(once(message), true));
    call.open = () => this.#open(true);
    call.outlet = this;
    this.#opening = setTimeout(call.open, OPEN_AFTER_MS);
    const messages = (answer.message as AsyncIterable<Message>)[Symbol.asyncIterator]();
    try {
      for (let next = await messages.next(); !next.done && !this.#exchange.closed; next = await messages.next()) {
        const frame = this.#frame(next.value);
        this.#open();
        if (!response.write(frame)) await drained(response, limits);
      }
      this.#end();
    } finally {
      messages.return?.()?.catch(() => undefined);
    }
  }

  #frame(message: Message): Uint8Array {
    const bytes = this.#bytes(message);
    return this.#format.enveloped ? encodeEnvelope(0, bytes) : Buffer.concat([bytes, NEWLINE]);
  }

  get isFull(): boolean {
    return this.#full !== undefined;
  }

  drained(): Promise<void> {
    return this.#full ?? Promise.resolve();
  }

  send(messages: readonly Message[]): void {
    const { closed, request, response } = this.#exchange;
    if (closed) return;
    this.#open(true);
    // Node writes a chunk of HTTP/1.1 in four pieces, which takes longer than the write itself. Chunks that many streams
    // share are made once, and go to the socket as they are.
    const socket = !isHttp2(request) && response.chunkedEncoding ? response.socket : undefined;
    const { chunks, frames } = this.#format;
    const known = socket ? chunks : frames;
    const pieces = messages.map((message) => {
      const piece = known.get(message) ?? (socket ? asChunk(this.#frame(message)) : this.#frame(message));
      known.set(message, piece);
      return piece;
    });
    const target = socket ?? response;
    const [only] = pieces;
    const takesMore = target.write(only && pieces.length === 1 ? only : Buffer.concat(pieces));
    if (takesMore || this.#full) return;
    this.#full = drained(response, this.#options.limits, target).then(() => {
      this.#full = undefined;
    });
  }

  /** Sends the headers of an answer in frames; at once if nothing follows that would take them along. */
  #open(atOnce = false): void {
    clearTimeout(this.#opening);
    if (this.#opened || this.#exchange.closed) return;
    this.#opened = true;
    const { response } = this.#exchange;
    response.writeHead(200, toNodeHeaders(this.#invocation.responseHeader));
    if (atOnce) response.flushHeaders();
  }

  /** Ends an answer in frames. */
  #end(error?: ConnectError): void {
    if (this.#exchange.closed) return;
    this.#open();
    const { response } = this.#exchange;
    // Lines of JSON have no other way to say that something went wrong.
    if (error && this.#format.protocol === "jsonl") breakOff(response);
    else response.end(this.#ending(error));
  }

  /** What follows the last message: a frame, or trailers, which are set here. */
  #ending(error: ConnectError | undefined): Uint8Array | undefined {
    const trailer = this.#invocation.responseTrailer;
    switch (this.#format.protocol) {
      case "jsonl":
        return undefined;
      case "connect": {
        const json = endStreamToJson(trailer, error, this.#options.jsonTypes);
        return encodeEnvelope(endStreamFlag, Buffer.from(JSON.stringify(json)));
      }
      case "grpc-web":
        return encodeEnvelope(trailerFlag, trailerSerialize(setTrailerStatus(trailer, error)));
      case "grpc":
        this.#exchange.response.addTrailers(toNodeHeaders(setTrailerStatus(trailer, error)));
        return undefined;
    }
  }

  /** A complete answer without frames. */
  #answer(status: number, bytes: Uint8Array): void {
    if (this.#exchange.closed) return;
    const { responseHeader, responseTrailer } = this.#invocation;
    const headers = toNodeHeaders(responseHeader);
    headers["content-length"] = String(bytes.length);
    for (const [name, value] of responseTrailer) headers[`trailer-${name}`] = value;
    this.#exchange.response.writeHead(status, headers);
    this.#exchange.response.end(bytes);
  }

  #fail(cause: unknown) {
    const { call, request } = this.#exchange;
    // Whatever was not read is dropped; the answer could not arrive otherwise.
    request.resume();
    const invocation = this.#invocation;
    const isKnown = call.outcome === "error" && cause instanceof ConnectError;
    const error = isKnown ? cause : recordFailure(this.#options.log, invocation, call, cause, invocation.signal);
    if (this.#format.enveloped || this.#opened) return this.#end(error);
    invocation.responseHeader.set("content-type", "application/json");
    invocation.responseHeader.delete(this.#format.encoding);
    // Headers of an error that came from another server are none of ours.
    if (!error.isWireError) mergeNonProtocolHeaders(invocation.responseHeader, error.metadata);
    this.#answer(codeToHttpStatus(error.code), errorToJsonBytes(error, this.#options.jsonTypes));
  }
}

/**
 * A short way for the calls that nearly everybody makes: one uncompressed request message, POSTed. The protocols of
 * connect are general and pay for it with several times the time of such a call; here the message is read, interceptors
 * and handler run, and the answer is written, without streams of streams in between. Everything else, such as GET,
 * compressed requests and bidirectional streams, goes through connect, and both ways answer alike.
 */
export function serveDirectly(options: DirectOptions, rpc: Rpc, format: Format, exchange: Exchange): Promise<void> {
  return new DirectCall(options, rpc, format, exchange).serve();
}
