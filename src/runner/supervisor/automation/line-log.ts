import { closeSync, constants, fstatSync, openSync, renameSync, rmSync, writeSync } from "node:fs";
import { join } from "node:path";

// A log of lines: `<milliseconds since the epoch> <tag> <text>`. Two files of at most half the limit each, the older one
// beside the newer, so that the oldest half goes when there is no room; whoever reads finds the gap marked.

export const LOG_FILE = "log";
export const OLDER_LOG_FILE = "log.older";
/** Exists once nothing more will be written. */
export const LOG_END_FILE = "log.end";
/** Tag of lines that belong to no step. */
export const NO_TAG = "-";
export const GAP = "[older lines were dropped]";

const HALF_BYTES = 16 * 1024 * 1024;
const LINE_CHARACTERS = 64 * 1024;

/** Cuts what arrives in pieces into lines; invalid UTF-8 is replaced, lines over 64 KiB are split. */
export class LineSplitter {
  readonly #decoder = new TextDecoder();
  readonly #take: (line: string) => void;
  #rest = "";

  constructor(take: (line: string) => void) {
    this.#take = take;
  }

  write(chunk: Uint8Array): void {
    this.#push(this.#decoder.decode(chunk, { stream: true }));
  }

  /** What is left without a line end is a line, too. */
  end(): void {
    this.#push(this.#decoder.decode());
    if (this.#rest !== "") this.#take(this.#rest);
    this.#rest = "";
  }

  #push(text: string): void {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop() ?? "";
    for (const line of lines) this.#split(line.replace(/\r$/, ""));
    while (this.#rest.length > LINE_CHARACTERS) {
      this.#take(this.#rest.slice(0, LINE_CHARACTERS));
      this.#rest = this.#rest.slice(LINE_CHARACTERS);
    }
  }

  #split(line: string): void {
    for (let at = 0; at === 0 || at < line.length; at += LINE_CHARACTERS) {
      this.#take(line.slice(at, at + LINE_CHARACTERS));
    }
  }
}

/** Passes the output of a command on, all the lines of a piece at once. */
export function lineBatches(take: (lines: string[]) => void): { write(chunk: Uint8Array): void; end(): void } {
  let lines: string[] = [];
  const splitter = new LineSplitter((line) => lines.push(line));
  const flush = () => {
    take(lines);
    lines = [];
  };
  return {
    write(chunk) {
      splitter.write(chunk);
      flush();
    },
    end() {
      splitter.end();
      flush();
    },
  };
}

/** Writes one log. A full disk costs lines, never more. */
export class LineLog {
  readonly #folder: string;
  readonly #halfBytes: number;
  #file: number | undefined;
  #size = 0;

  constructor(folder: string, halfBytes = HALF_BYTES) {
    this.#folder = folder;
    this.#halfBytes = halfBytes;
  }

  write(lines: readonly string[], tag = NO_TAG): void {
    if (lines.length === 0) return;
    const now = Date.now();
    const text = lines.map((line) => `${now} ${tag} ${line}\n`).join("");
    try {
      const file = this.#open();
      writeSync(file, text);
      this.#size += Buffer.byteLength(text);
      if (this.#size > this.#halfBytes) this.#turn();
    } catch {
      this.close();
    }
  }

  /** Nothing more comes: readers that follow may leave. */
  end(): void {
    this.close();
    try {
      closeSync(openSync(join(this.#folder, LOG_END_FILE), "w", 0o600));
    } catch {
      // Readers leave when the environment stops.
    }
  }

  /** More comes after all. */
  reopen(): void {
    rmSync(join(this.#folder, LOG_END_FILE), { force: true });
  }

  close(): void {
    if (this.#file === undefined) return;
    try {
      closeSync(this.#file);
    } catch {
      // It is gone in any case.
    }
    this.#file = undefined;
  }

  #open(): number {
    if (this.#file !== undefined) return this.#file;
    const flags = constants.O_WRONLY | constants.O_APPEND | constants.O_CREAT | constants.O_NOFOLLOW;
    this.#file = openSync(join(this.#folder, LOG_FILE), flags, 0o600);
    this.#size = fstatSync(this.#file).size;
    return this.#file;
  }

  #turn(): void {
    this.close();
    const path = join(this.#folder, LOG_FILE);
    const older = join(this.#folder, OLDER_LOG_FILE);
    const drops = hasFile(older);
    renameSync(path, older);
    if (drops) this.write([GAP]);
  }
}

function hasFile(path: string): boolean {
  try {
    closeSync(openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK));
    return true;
  } catch {
    return false;
  }
}
