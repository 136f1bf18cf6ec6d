import { randomUUID } from "node:crypto";
import { create, type DescMessage, type Message, type MessageShape } from "@bufbuild/protobuf";
import {
  type ContextValues,
  createContextKey,
  type HandlerContext,
  type StreamRequest,
  type UnaryRequest,
} from "@connectrpc/connect";

/** Where the messages of an open stream can be put by somebody else than its handler. */
export interface Outlet {
  /** Sends messages, and does not wait. One that goes into many streams is encoded once for all of them. */
  send(messages: readonly Message[]): void;
  /** The caller does not keep up: nothing more should be sent until `drained` resolves. */
  readonly isFull: boolean;
  /** Resolves when more is taken, or nothing ever will be. */
  drained(): Promise<void>;
}

/** What is known of a call beside its message. */
export interface Call {
  /** Names the call in the log and in the response header `x-request-id`. */
  readonly id: string;
  /** IP address of the caller, as trusted proxies report it; empty if unknown. */
  readonly peer: string;
  /** Host that the request was sent to, with its port if it names one; empty if unknown. */
  readonly host: string;
  /** `performance.now()` at its start. */
  readonly startedAt: number;
  /** How it went, once that is in log and metrics. */
  outcome?: "ok" | "error";
  /** Sends the response headers of a stream, once; absent where nothing can be sent early. */
  open?: () => void;
  /** Answers may be given in the form that is sent, with `encodedAnswer`. */
  takesEncoded?: boolean;
  /** Sends messages of a stream past its handler; absent where only the handler can. */
  outlet?: Outlet;
}

/** A call before its message is read. */
export interface Entering
  extends Pick<UnaryRequest | StreamRequest, "service" | "method" | "header" | "contextValues"> {
  /**
   * Reads the message ahead of its time, if it is small; undefined for every other one, and for one that is wrong, which
   * is told when its time has come. Absent where that cannot be done.
   */
  peek?: () => Promise<Message | undefined>;
}

const REQUEST_ID = /^[\w.:+/=-]{1,128}$/;

/** Set by the server before anything else looks at the call. */
export const callKey = createContextKey<Call | undefined>(undefined, { description: "call" });

/** A call with the id that its caller chose, if that is fit for logs and headers, else with a new one. */
export function newCall(requestId: string | null | undefined, peer = "", host = ""): Call {
  const id = requestId && REQUEST_ID.test(requestId) ? requestId : randomUUID();
  return { id, peer, host, startedAt: performance.now() };
}

/** The call being served; makes one for a router that has no server around it. */
export function callOf(values: ContextValues, header: Headers): Call {
  const found = values.get(callKey);
  if (found) return found;
  const made = newCall(header.get("x-request-id"));
  values.set(callKey, made);
  return made;
}

/**
 * Tells the caller of a stream that it is open: the response headers go out now. Handlers call it once nothing that
 * happens from here on can be missed, usually after they have subscribed. Without it headers follow a little later.
 */
export function streamOpened(context: Pick<HandlerContext, "values">): void {
  context.values.get(callKey)?.open?.();
}

/** Where somebody else than the handler can put the messages of a stream; absent where only the handler can. */
export const outletOf = (context: Pick<HandlerContext, "values">): Outlet | undefined =>
  context.values.get(callKey)?.outlet;

const encodedForms = new WeakMap<Message, Uint8Array>();

/** Whether the caller can be answered with `encodedAnswer`. */
export const takesEncoded = (context: Pick<HandlerContext, "values">): boolean =>
  context.values.get(callKey)?.takesEncoded === true;

/**
 * An answer whose binary form is known, because what it is made of is stored like that. As a message it is empty: only
 * for calls that take it.
 */
export function encodedAnswer<D extends DescMessage>(desc: D, bytes: Uint8Array): MessageShape<D> {
  const message = create(desc);
  encodedForms.set(message, bytes);
  return message;
}

/** The form that an answer already has; undefined if it has to be encoded. */
export const encodedForm = (answer: Message): Uint8Array | undefined => encodedForms.get(answer);
