const AFTER_OPERATION_MS = 1_000;
const REFRESH_MS = 30_000;
const QUIET_REFRESH_MS = 5 * 60_000;
/** A slow repository is looked at less often: the pause is this many times as long as the last look. */
const COST_FACTOR = 10;

/** When to look at the git status: soon after an operation, regularly while it changes, seldom otherwise. */
export class GitWatch {
  readonly #wake: () => void;
  #lookedAt = 0;
  #costMs = 0;
  #intervalMs = REFRESH_MS;
  #isDue = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(wake: () => void) {
    this.#wake = wake;
  }

  get isDue(): boolean {
    return this.#isDue || Date.now() - this.#lookedAt > this.#intervalMs;
  }

  /** Something may have changed. */
  touched(): void {
    if (this.#timer) return;
    const pause = Math.max(AFTER_OPERATION_MS, this.#costMs * COST_FACTOR);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#isDue = true;
      this.#wake();
    }, pause);
    this.#timer.unref();
  }

  /** It has just been looked at by somebody else. */
  seen(): void {
    this.#lookedAt = Date.now();
  }

  /** A look begins; what it returns takes down how it ended. */
  look(): (isChanged: boolean) => void {
    const startedAt = Date.now();
    this.#isDue = false;
    return (isChanged) => {
      this.#lookedAt = Date.now();
      this.#costMs = this.#lookedAt - startedAt;
      this.#intervalMs = isChanged ? REFRESH_MS : QUIET_REFRESH_MS;
    };
  }

  close(): void {
    clearTimeout(this.#timer);
  }
}
