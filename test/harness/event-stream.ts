import type { MessageInitShape } from "@bufbuild/protobuf";
import { ConnectError } from "@connectrpc/connect";
import { ResourceOperation, ResourceType, type WatchEventsRequestSchema } from "../../gen/gitpod/v1/event_pb.js";
import type { BerthClient } from "../../src/client.ts";
import { eventually } from "./wait.ts";

/** A stream of events and what it has delivered so far. */
export interface EventStream {
  /** `ENVIRONMENT UPDATE <id>`, or `heartbeat`, in order of arrival. */
  readonly events: readonly string[];
  /** How it ended, once it has; undefined for an end without an error. */
  readonly ended: Promise<ConnectError | undefined>;
  /** Waits for an event. */
  next(text: string): Promise<unknown>;
  stop(): void;
}

export const eventText = (type: ResourceType, operation: ResourceOperation, id: string) =>
  `${ResourceType[type]} ${ResourceOperation[operation]} ${id}`;

/** Opens a stream; resolves once it is open, so that whatever happens from here on arrives. */
export async function watchEvents(
  client: BerthClient,
  request: MessageInitShape<typeof WatchEventsRequestSchema> = {},
): Promise<EventStream> {
  const stop = new AbortController();
  const opened = Promise.withResolvers<void>();
  const events: string[] = [];
  const collect = async () => {
    try {
      const options = { signal: stop.signal, onHeader: () => opened.resolve() };
      for await (const { resourceType, operation, resourceId } of client.events.watchEvents(request, options))
        events.push(resourceId ? eventText(resourceType, operation, resourceId) : "heartbeat");
      return undefined;
    } catch (error) {
      return ConnectError.from(error);
    }
  };
  const ended = collect();
  await Promise.race([opened.promise, ended]);
  return {
    events,
    ended,
    next: (text) => eventually(() => events.includes(text), text),
    stop: () => stop.abort(),
  };
}
