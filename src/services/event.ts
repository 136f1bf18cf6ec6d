import type { ServiceImpl } from "@connectrpc/connect";
import type { EventService } from "../../gen/gitpod/v1/event_pb.js";
import type { App } from "../app.ts";
import { actionable } from "../domain/errors.ts";
import { principal } from "../rpc/authenticate.ts";
import { auditLog } from "./event/audit-log.ts";
import { Dispatcher } from "./event/dispatcher.ts";
import { watch } from "./event/watch.ts";

/** How many of something there are, by key. */
class Tally {
  readonly #counts = new Map<string, number>();

  /** Adds to the count of a key, and returns it. */
  add(key: string, by: number): number {
    const count = (this.#counts.get(key) ?? 0) + by;
    if (count) this.#counts.set(key, count);
    else this.#counts.delete(key);
    return count;
  }
}

/** EventService. */
export function eventService(app: App): ServiceImpl<typeof EventService> {
  const { streamsPerPrincipal } = app.limits;
  const dispatcher = new Dispatcher(app);
  const streams = new Tally();
  return {
    ...auditLog(app),
    async *watchEvents(request, context) {
      const caller = principal(context);
      try {
        if (streams.add(caller.id, 1) > streamsPerPrincipal) {
          const message = `at most ${streamsPerPrincipal} streams may be open at once`;
          throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", message);
        }
        yield* watch(app, dispatcher, caller, request, context);
      } finally {
        streams.add(caller.id, -1);
      }
    },
  };
}
