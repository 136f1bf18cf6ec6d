import { Code, ConnectError } from "@connectrpc/connect";
import { Scrollback } from "./scrollback.ts";
import { Waiters } from "./waiters.ts";

const CHUNK_BYTES = 64 * 1024;
const MAX_READERS = 50;
// A shell waits for its readers, as for a slow line: from so many unread bytes on, until so few are left. A reader that
// takes nothing for this time does not hold up the others any longer; its stream ends once it has missed something.
const PAUSE_BYTES = 256 * 1024;
const RESUME_BYTES = 64 * 1024;
const PATIENCE_MS = 5_000;
const LOOK_MS = 250;

/** Somebody who reads, from the moment of its making until it is disposed of. */
export interface OutputReader extends Disposable {
  /** What was remembered when it began. */
  readonly replay: Uint8Array;
  /**
   * What comes after that, until the output is complete or the signal fires. RESOURCE_EXHAUSTED once it is so slow that
   * what it would read next is forgotten.
   */
  rest(signal: AbortSignal): AsyncGenerator<Uint8Array>;
}

/** How far somebody has read. */
interface Progress {
  position: number;
  movedAt: number;
}

/** What a terminal shows: remembered up to the size of the scrollback, and read by many, each at its own pace. */
export class TerminalOutput {
  readonly #scrollback = new Scrollback();
  readonly #readers = new Set<Progress>();
  readonly #news = new Waiters();
  readonly #setFlow: (isFlowing: boolean) => void;
  #looking: NodeJS.Timeout | undefined;
  #isComplete = false;

  /** `setFlow` stops and continues what writes. */
  constructor(setFlow: (isFlowing: boolean) => void) {
    this.#setFlow = setFlow;
  }

  write(chunk: Uint8Array): void {
    this.#scrollback.write(chunk);
    this.#news.wake();
    this.#pace();
  }

  /** Nothing more will come. */
  complete(): void {
    this.#isComplete = true;
    clearInterval(this.#looking);
    this.#news.wake();
  }

  /** Begins to read; RESOURCE_EXHAUSTED for one reader too many. */
  reader(): OutputReader {
    if (this.#readers.size >= MAX_READERS) {
      throw new ConnectError(`${MAX_READERS} readers are attached already`, Code.ResourceExhausted);
    }
    const progress: Progress = { position: this.#scrollback.end, movedAt: Date.now() };
    this.#readers.add(progress);
    return {
      replay: this.#scrollback.all(),
      rest: (signal) => this.#rest(progress, signal),
      [Symbol.dispose]: () => {
        this.#readers.delete(progress);
        this.#pace();
      },
    };
  }

  async *#rest(progress: Progress, signal: AbortSignal): AsyncGenerator<Uint8Array> {
    while (!signal.aborted) {
      if (progress.position < this.#scrollback.start) {
        throw new ConnectError("reading was too slow: output was lost, attach again", Code.ResourceExhausted);
      }
      const data = this.#scrollback.read(progress.position, CHUNK_BYTES);
      if (data.length === 0 && this.#isComplete) return;
      if (data.length === 0) await this.#news.next(signal);
      progress.position += data.length;
      progress.movedAt = Date.now();
      this.#pace();
      if (data.length > 0) yield data;
    }
  }

  #pace(): void {
    const now = Date.now();
    const patient = [...this.#readers].filter(({ movedAt }) => now - movedAt < PATIENCE_MS);
    const unread = Math.max(0, ...patient.map(({ position }) => this.#scrollback.end - position));
    if (!this.#looking && unread > PAUSE_BYTES && !this.#isComplete) {
      this.#setFlow(false);
      this.#looking = setInterval(() => this.#pace(), LOOK_MS);
    } else if (this.#looking && unread <= RESUME_BYTES) {
      clearInterval(this.#looking);
      this.#looking = undefined;
      this.#setFlow(true);
    }
  }
}
