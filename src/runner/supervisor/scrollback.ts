import { wholeStart } from "./output.ts";

export const SCROLLBACK_BYTES = 1024 * 1024;
const FIRST_BYTES = 16 * 1024;

/** The last MiB of an output. Positions count its bytes from the beginning of all output. */
export class Scrollback {
  #store = Buffer.alloc(0);
  #end = 0;

  /** Position of the oldest byte that is still there. */
  get start(): number {
    return Math.max(0, this.#end - SCROLLBACK_BYTES);
  }

  /** Position of the next byte to come. */
  get end(): number {
    return this.#end;
  }

  write(chunk: Uint8Array): void {
    const kept = chunk.subarray(Math.max(0, chunk.length - SCROLLBACK_BYTES));
    this.#end += chunk.length - kept.length;
    this.#reserve(Math.min(this.#end + kept.length, SCROLLBACK_BYTES));
    for (let rest = kept; rest.length > 0; ) {
      const at = this.#end % SCROLLBACK_BYTES;
      const part = rest.subarray(0, SCROLLBACK_BYTES - at);
      this.#store.set(part, at);
      this.#end += part.length;
      rest = rest.subarray(part.length);
    }
  }

  /** A copy of at most `max` bytes from a position that is still there. */
  read(position: number, max: number): Buffer {
    const length = Math.min(max, this.#end - position);
    const at = position % SCROLLBACK_BYTES;
    const first = this.#store.subarray(at, Math.min(at + length, SCROLLBACK_BYTES));
    return Buffer.concat([first, this.#store.subarray(0, length - first.length)]);
  }

  /** All that is there, without the rest of a character whose beginning is not. */
  all(): Uint8Array {
    const bytes = this.read(this.start, SCROLLBACK_BYTES);
    return this.start === 0 ? bytes : wholeStart(bytes);
  }

  #reserve(bytes: number): void {
    if (bytes <= this.#store.length) return;
    const grown = Buffer.alloc(Math.min(Math.max(bytes, this.#store.length * 2, FIRST_BYTES), SCROLLBACK_BYTES));
    this.#store.copy(grown);
    this.#store = grown;
  }
}
