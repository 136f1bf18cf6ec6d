import { Code, ConnectError } from "@connectrpc/connect";

/** The streams that are open: so many at most, each as long as its token is good and the server goes on. */
export class OpenStreams {
  readonly #max: number;
  readonly #recheckMs: number;
  /** One for each open stream: has it look now instead of later. */
  readonly #looks = new Set<() => void>();
  #isEnding = false;

  constructor(max: number, recheckMs: number) {
    this.#max = max;
    this.#recheckMs = recheckMs;
  }

  /**
   * Passes messages on until the check, made again and again, says that the token has been withdrawn: UNAUTHENTICATED
   * then, UNAVAILABLE when the server ends, RESOURCE_EXHAUSTED for a stream too many.
   */
  async *pass<T>(messages: AsyncIterable<T>, isWithdrawn: () => Promise<boolean>): AsyncGenerator<T> {
    if (this.#looks.size >= this.#max) throw new ConnectError("too many streams are open", Code.ResourceExhausted);
    const iterator = messages[Symbol.asyncIterator]();
    let look = () => {};
    const atOnce = () => look();
    let timer: NodeJS.Timeout | undefined;
    const later = () =>
      new Promise<undefined>((resolve) => {
        look = () => resolve(undefined);
        timer = setTimeout(look, this.#recheckMs);
      });
    this.#looks.add(atOnce);
    try {
      let due = later();
      for (let next = iterator.next(); ; ) {
        // A stream that always has something to say must not put off the check.
        const result = await Promise.race([due, next]);
        if (this.#isEnding) throw new ConnectError("the runner is stopping", Code.Unavailable);
        if (result === undefined) {
          if (await isWithdrawn()) throw new ConnectError("the token has been withdrawn", Code.Unauthenticated);
          due = later();
          continue;
        }
        if (result.done) return;
        yield result.value;
        next = iterator.next();
      }
    } finally {
      clearTimeout(timer);
      this.#looks.delete(atOnce);
      // What is still being waited for ends with the call's signal.
      void iterator.return?.()?.catch(() => undefined);
    }
  }

  endAll(): void {
    this.#isEnding = true;
    for (const look of this.#looks) look();
  }
}
