import {
  create,
  type DescMethod,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type Message,
  toJsonString,
} from "@bufbuild/protobuf";
import { Code, ConnectError, type Transport } from "@connectrpc/connect";

const TIMEOUT_MS = 30_000;
const PAGE_SIZE = 100;

interface Paged {
  pagination?: { nextToken?: string };
}

async function unary(transport: Transport, method: DescMethod, headers: Record<string, string>, request: object) {
  const message = create(method.input, request as Record<string, unknown>);
  const answer = await transport.unary(method as DescMethodUnary, undefined, TIMEOUT_MS, headers, message);
  return answer.message as Message;
}

/** Whether an answer holds a text, a list on whatever of its pages. */
async function holds(
  transport: Transport,
  method: DescMethod,
  headers: Record<string, string>,
  request: object,
  text: string,
): Promise<boolean> {
  for (let token = ""; ; ) {
    const page = method.input.field.pagination ? { pagination: { pageSize: PAGE_SIZE, token } } : {};
    const message = await unary(transport, method, headers, { ...request, ...page });
    if (toJsonString(method.output, message).includes(text)) return true;
    token = (message as Message & Paged).pagination?.nextToken ?? "";
    if (!token) return false;
  }
}

async function* once(message: Message) {
  yield message;
}

/**
 * How a call ends: the name of its code, or "ok" once there is an answer, or the first message of a stream. An answer that
 * does not hold `text` is "ok, but not in it".
 */
export async function outcome(
  transport: Transport,
  method: DescMethod,
  headers: Record<string, string>,
  request: object,
  text?: string,
): Promise<string> {
  const stop = new AbortController();
  try {
    if (text !== undefined)
      return (await holds(transport, method, headers, request, text)) ? "ok" : "ok, but not in it";
    if (method.methodKind === "unary") {
      await unary(transport, method, headers, request);
      return "ok";
    }
    const message = create(method.input, request as Record<string, unknown>);
    const streaming = method as DescMethodServerStreaming;
    const answer = await transport.stream(streaming, stop.signal, TIMEOUT_MS, headers, once(message));
    for await (const _first of answer.message) return "ok";
    return "an empty stream";
  } catch (error) {
    return Code[ConnectError.from(error).code] ?? "";
  } finally {
    stop.abort();
  }
}
