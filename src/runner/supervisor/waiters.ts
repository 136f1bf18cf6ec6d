/** Wakes whoever waits for something new. */
export class Waiters {
  readonly #waiting = new Set<() => void>();

  wake(): void {
    for (const done of [...this.#waiting]) done();
  }

  /** Resolves at the next wake, or when the signal fires. */
  next(signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        this.#waiting.delete(done);
        signal.removeEventListener("abort", done);
        resolve();
      };
      if (signal.aborted) return done();
      signal.addEventListener("abort", done);
      this.#waiting.add(done);
    });
  }
}
