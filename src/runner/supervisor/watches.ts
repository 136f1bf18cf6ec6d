import { setTimeout as delay } from "node:timers/promises";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import type { WatchRequest, WatchResponseSchema } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { CheckoutWatch } from "./checkout-watch.ts";
import { errnoOf } from "./errors.ts";
import { WatchSubscriber } from "./watch-subscriber.ts";

/** Whoever waits longer than this until everything is watched may have missed so much that it has to be said. */
const LATE_MS = 2_000;
const RETRY_MS = 200;
/** How long the workspace folder may be missing before the streams end with NOT_FOUND. */
const ABSENT_MS = 60_000;

/** Resolves when the signal fires. */
const aborted = (signal: AbortSignal) =>
  new Promise<undefined>((resolve) => {
    if (signal.aborted) resolve(undefined);
    signal.addEventListener("abort", () => resolve(undefined), { once: true });
  });

/** Watches the workspace folder for all callers of Watch together, as long as there are any. */
export class Watches {
  readonly #folder: () => string;
  readonly #env: () => Record<string, string>;
  readonly #subscribers = new Set<WatchSubscriber>();
  #watched: Promise<CheckoutWatch> | undefined;

  /** `env` has the variables of the environment's processes, for git. */
  constructor(folder: () => string, env: () => Record<string, string>) {
    this.#folder = folder;
    this.#env = env;
  }

  /**
   * Changes from the moment of `onReady` on, until the signal fires. INVALID_ARGUMENT as `WatchSubscriber`, a system
   * error if the workspace folder cannot be watched.
   */
  async *watch(
    request: WatchRequest,
    signal: AbortSignal,
    onReady: () => void,
  ): AsyncGenerator<MessageInitShape<typeof WatchResponseSchema>> {
    const subscriber = new WatchSubscriber(request);
    const startedAt = Date.now();
    this.#subscribers.add(subscriber);
    try {
      this.#watched ??= this.#open();
      const watched = await Promise.race([this.#watched, aborted(signal)]);
      if (!watched) return;
      const { incomplete } = watched;
      if (incomplete) subscriber.overflowed(incomplete);
      else if (Date.now() - startedAt > LATE_MS) subscriber.overflowed("it took long until everything was watched");
      onReady();
      yield* subscriber.messages(signal);
    } finally {
      this.#subscribers.delete(subscriber);
      if (this.#subscribers.size === 0) this.#close();
    }
  }

  /** The workspace folder is another one, or has been replaced. */
  moved(): void {
    if (!this.#watched) return;
    this.#close();
    const watched = this.#openWhenThere();
    this.#watched = watched;
    const tell = (what: (subscriber: WatchSubscriber) => void) => {
      if (this.#watched === watched) this.#tell(what);
    };
    watched.then(
      () => tell((subscriber) => subscriber.overflowed("the workspace folder was replaced")),
      (error) => tell((subscriber) => subscriber.fail(error)),
    );
  }

  /** Ends every stream. */
  stopAll(): void {
    const stopping = new ConnectError("the environment is stopping", Code.Unavailable);
    this.#tell((subscriber) => subscriber.fail(stopping));
  }

  #tell(what: (subscriber: WatchSubscriber) => void): void {
    for (const subscriber of this.#subscribers) what(subscriber);
  }

  #close(): void {
    const watched = this.#watched;
    this.#watched = undefined;
    watched?.then(
      (each) => each.close(),
      () => undefined,
    );
  }

  /** Between two checkouts there is no folder for a moment. */
  async #openWhenThere(): Promise<CheckoutWatch> {
    const deadline = Date.now() + ABSENT_MS;
    for (;;) {
      try {
        return await this.#open();
      } catch (error) {
        const isHopeless = Date.now() > deadline || this.#subscribers.size === 0;
        if (errnoOf(error) !== "ENOENT" || isHopeless) throw error;
        await delay(RETRY_MS, undefined, { ref: false });
      }
    }
  }

  #open(): Promise<CheckoutWatch> {
    return CheckoutWatch.open(this.#folder(), this.#env(), {
      filesChanged: (changes) => this.#tell((subscriber) => subscriber.filesChanged(changes)),
      gitChanged: () => this.#tell((subscriber) => subscriber.gitChanged()),
      overflowed: (reason) => this.#tell((subscriber) => subscriber.overflowed(reason)),
      replaced: () => this.moved(),
    });
  }
}
