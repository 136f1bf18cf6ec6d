import type { Enclosed, Enclosure } from "./supervisor/enclosure.ts";
import { endWaiting, startWaiting } from "./supervisor/launch.ts";

const REFILL_MS = 1_000;

/**
 * One supervisor that has loaded its program before anybody needs it, which is most of what a start of a small
 * environment takes. It belongs to nobody until it is told its environment, and ends with the runner, however that ends.
 * Another one is started only a while after the last start, so as not to get in its way.
 */
export class WaitingSupervisor {
  readonly #compiledFolder: string;
  readonly #enclosure: Enclosure | undefined;
  #waiting: Enclosed | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isClosed = false;

  constructor(compiledFolder: string, enclosure: Enclosure | undefined) {
    this.#compiledFolder = compiledFolder;
    this.#enclosure = enclosure;
  }

  /** Has one ready in a while. */
  prepare(): void {
    clearTimeout(this.#timer);
    if (!this.#isClosed) this.#timer = setTimeout(() => this.#refill(), REFILL_MS).unref();
  }

  /** The one that waits, if there is one; whoever takes it is to use it. */
  take(): Enclosed | undefined {
    const taken = this.#waiting;
    this.#waiting = undefined;
    this.prepare();
    return taken;
  }

  /** Ends it. */
  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    if (this.#waiting) void endWaiting(this.#waiting);
    this.#waiting = undefined;
  }

  #refill(): void {
    if (this.#waiting) return;
    const waiting = startWaiting(this.#compiledFolder, this.#enclosure);
    this.#waiting = waiting;
    // The next start asks for another one.
    const gone = () => {
      if (this.#waiting === waiting) this.#waiting = undefined;
    };
    waiting.child.once("exit", gone).once("error", gone);
  }
}
