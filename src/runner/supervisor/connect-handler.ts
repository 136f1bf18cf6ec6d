import type { IncomingMessage, ServerResponse } from "node:http";
import {
  Code,
  ConnectError,
  type ConnectRouter,
  type ConnectRouterOptions,
  type ContextValues,
  createConnectRouter,
  createContextKey,
  createContextValues,
  type HandlerContext,
} from "@connectrpc/connect";
import { universalRequestFromNodeRequest } from "@connectrpc/connect-node";
import { answerError } from "../../http/answers.ts";
import { type Limits, sendAnswer, toNodeHeaders } from "../../http/exchange.ts";

// Connect's own adapter sends headers with the first message, which for a stream may be much later or never, and waits
// for ever for a caller that does not read.

/** Serves one request; rejects with what nobody foresaw. */
export type ConnectHandler = (
  request: IncomingMessage,
  response: ServerResponse,
  values?: ContextValues,
) => Promise<void>;

/** The response to a streaming call. */
interface Opening {
  context?: HandlerContext;
  open(context: HandlerContext): void;
}

const openingKey = createContextKey<Opening | undefined>(undefined, { description: "opening" });

/** Sends the headers of a stream: it is established, although there may be nothing to tell yet. */
export function openStream({ values }: HandlerContext): void {
  const opening = values.get(openingKey);
  if (opening?.context) opening.open(opening.context);
}

/** Serves RPCs; a caller that does not read for `stallMs` is cut off. */
export function connectHandler(
  routes: (router: ConnectRouter) => void,
  options: ConnectRouterOptions & Pick<Limits, "stallMs">,
): ConnectHandler {
  const router = createConnectRouter({
    ...options,
    // The first moment at which the headers of the response are known.
    requestGate: (context) => {
      const opening = context.values.get(openingKey);
      if (opening) opening.context = context;
    },
  });
  routes(router);
  const handlers = new Map(router.handlers.map((handler) => [handler.requestPath, handler]));
  return async (request, response, values = createContextValues()) => {
    const path = request.url?.split("?", 1)[0] ?? "";
    const handler = handlers.get(path);
    if (!handler) {
      const name = /^\/([\w.]+\/\w+)$/.exec(path)?.[1] ?? "this";
      return answerError(request, response, new ConnectError(`${name} is not implemented`, Code.Unimplemented));
    }
    let isOver = false;
    response.once("close", () => {
      isOver = true;
    });
    const open = ({ responseHeader }: HandlerContext) => {
      if (isOver || response.headersSent) return;
      response.writeHead(200, toNodeHeaders(responseHeader));
      response.flushHeaders();
    };
    values.set(openingKey, { open });
    try {
      const answer = await handler(universalRequestFromNodeRequest(request, response, undefined, values));
      if (!isOver) await sendAnswer(answer, response, options, () => isOver);
    } catch (error) {
      if (!isOver) throw error;
    }
  };
}
