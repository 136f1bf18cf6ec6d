/** Lets one loop wait for something to do. */
export class Waiting {
  #wake: () => void = () => undefined;

  wake(): void {
    this.#wake();
  }

  /** Resolves at once if there is something, else at the next `wake`, or when the signal fires. */
  until(hasWork: () => boolean, signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      if (hasWork() || signal.aborted) return resolve();
      const done = () => {
        signal.removeEventListener("abort", done);
        this.#wake = () => undefined;
        resolve();
      };
      this.#wake = done;
      signal.addEventListener("abort", done);
    });
  }
}
