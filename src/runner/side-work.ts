// Steps that are done side by side. Whoever begins them waits for all of them, whatever comes of one, so that the next
// pass never meets something that is still under way.

/** The results of all; throws what the first one in the list that has failed has thrown, once none is under way. */
export async function allOf<T extends readonly unknown[]>(
  ...work: { readonly [K in keyof T]: Promise<T[K]> }
): Promise<T> {
  const ended = await Promise.allSettled(work);
  const failed = ended.find((each) => each.status === "rejected");
  if (failed) throw failed.reason;
  return await (Promise.all(work) as unknown as Promise<T>);
}

/** What may fail before anybody waits for it; whoever does hears of it. */
export function unheard<T>(work: Promise<T>): Promise<T> {
  work.catch(() => undefined);
  return work;
}

/** Waits for something, or until it is pointless: throws the signal's reason then. */
export async function unlessOver(awaited: Promise<void>, signal: AbortSignal): Promise<void> {
  if (!signal.aborted) {
    const stop = Promise.withResolvers<void>();
    const over = () => stop.resolve();
    signal.addEventListener("abort", over, { once: true });
    await Promise.race([awaited, stop.promise]).finally(() => signal.removeEventListener("abort", over));
  }
  signal.throwIfAborted();
}

/** Work beside other work, which may turn out to be pointless meanwhile. */
export class SideWork {
  readonly #stop = new AbortController();
  readonly #ended: Promise<void>;
  #isCancelled = false;

  constructor(work: (signal: AbortSignal) => Promise<void>, signal: AbortSignal) {
    this.#ended = work(AbortSignal.any([signal, this.#stop.signal]));
    unheard(this.#ended);
  }

  /** Resolves or rejects with the work; resolves if it was cancelled. */
  get done(): Promise<void> {
    return this.#isCancelled ? this.#ended.catch(() => undefined) : this.#ended;
  }

  /** Ends the work; resolves when it has ended. */
  async cancel(): Promise<void> {
    this.#isCancelled = true;
    this.#stop.abort(new Error("cancelled"));
    await this.#ended.catch(() => undefined);
  }
}
