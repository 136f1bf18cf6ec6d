import { create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, type ConnectRouter, type HandlerContext } from "@connectrpc/connect";
import { EventService, ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerService } from "../../gen/gitpod/v1/runner_pb.js";
import { RetryInfoSchema } from "../../gen/google/rpc/error_details_pb.js";
import { denied } from "../../src/domain/errors.ts";
import { callOf, streamOpened } from "../../src/rpc/call.ts";

/** Never given to a caller by a server that keeps its errors to itself. */
export const SECRET = "password=hunter2";
export const EVENT_ID = "01900000-0000-7000-8000-0000000000e1";
const RUNNERS = 5;

/** Services without a state, told by ids what to do. */
export interface Echo {
  routes: (router: ConnectRouter) => void;
  /** Resolves when so many calls or streams wait. */
  waiting(count: number): Promise<void>;
  /** Lets waiting unary calls finish. */
  release(): void;
}

const failures: Record<string, () => unknown> = {
  crash: () => new TypeError(SECRET),
  refusal: () => denied("not you"),
  "not-found": () => new ConnectError("no such runner", Code.NotFound),
  exists: () => new ConnectError("there is one", Code.AlreadyExists),
  aborted: () => new ConnectError("somebody was faster", Code.Aborted),
  unauthenticated: () => new ConnectError("who are you?", Code.Unauthenticated),
  quota: () => new ConnectError("too many", Code.ResourceExhausted),
  rate: () => {
    const value = create(RetryInfoSchema, { retryDelay: durationFromMs(1500) });
    return new ConnectError("too fast", Code.ResourceExhausted, undefined, [{ desc: RetryInfoSchema, value }]);
  },
};

const aborted = (signal: AbortSignal) =>
  new Promise<void>((resolve) => {
    if (signal.aborted) resolve();
    signal.addEventListener("abort", () => resolve(), { once: true });
  });

export function echo(): Echo {
  let held = 0;
  let watchers: (() => void)[] = [];
  let release = Promise.withResolvers<void>();

  function hold(): void {
    held += 1;
    for (const check of watchers) check();
  }

  async function* watch(what: string, context: HandlerContext) {
    const event = {
      operation: ResourceOperation.UPDATE,
      resourceType: ResourceType.RUNNER,
      resourceId: EVENT_ID,
    };
    if (failures[what]) throw failures[what]();
    if (what === "silent") streamOpened(context);
    if (what === "two" || what === "break") yield event;
    if (what === "two") yield {};
    if (what === "break") throw new TypeError(SECRET);
    if (what === "two") return;
    if (what === "many") {
      // More than any buffer on the way holds.
      for (;;) {
        hold();
        yield { ...event, resourceId: "x".repeat(100_000) };
      }
    }
    hold();
    // A deaf source waits for ever, whatever its signal says.
    if (what === "deaf") await new Promise(() => undefined);
    await aborted(context.signal);
  }

  return {
    routes(router) {
      router.service(RunnerService, {
        listRunners({ pagination, filter }) {
          const start = Number(pagination?.token || 0);
          const size = pagination?.pageSize || RUNNERS;
          const end = Math.min(start + size, RUNNERS);
          const ids = Array.from({ length: end - start }, (_, index) => start + index);
          return {
            runners: ids.map((id) => ({ runnerId: String(id), kind: filter?.kinds[0] ?? 0 })),
            pagination: { nextToken: end < RUNNERS ? String(end) : "" },
          };
        },
        async getRunner({ runnerId }, context) {
          if (failures[runnerId]) throw failures[runnerId]();
          if (runnerId === "large") return { runner: { runnerId, name: "large ".repeat(50_000) } };
          if (runnerId === "too-large") return { runner: { runnerId, name: "x".repeat(9_000_000) } };
          if (runnerId === "invalid") return { runner: { runnerId, name: 5 as never } };
          if (runnerId === "peer") return { runner: { name: callOf(context.values, context.requestHeader).peer } };
          if (runnerId === "wait") {
            hold();
            await release.promise;
          }
          if (runnerId === "until-abort") {
            hold();
            await aborted(context.signal);
            throw context.signal.reason;
          }
          if (runnerId === "timeout") return { runner: { name: String(Math.ceil(context.timeoutMs() ?? -1)) } };
          context.responseHeader.set("x-echo", "header");
          context.responseTrailer.set("x-echo-trailer", "trailer");
          return { runner: { runnerId, name: context.requestHeader.get("x-name") ?? "" } };
        },
        createRunner: ({ name, kind }) => ({ runner: { runnerId: "new", name, kind } }),
      });
      router.service(EventService, {
        async *watchEvents({ scope }, context) {
          yield* watch(scope.case === "environmentId" ? scope.value : "two", context);
        },
      });
    },
    waiting: (count) =>
      new Promise((resolve) => {
        const check = () => {
          if (held < count) return;
          held = 0;
          watchers = watchers.filter((each) => each !== check);
          resolve();
        };
        watchers.push(check);
        check();
      }),
    release() {
      release.resolve();
      release = Promise.withResolvers<void>();
    },
  };
}
