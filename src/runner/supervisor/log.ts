import { closeSync, constants, lstatSync, openSync, renameSync, writeSync } from "node:fs";

const MAX_FILE_BYTES = 1024 * 1024;
const MAX_LINE = 8192;
const { O_WRONLY, O_APPEND, O_CREAT, O_NOFOLLOW, O_NONBLOCK } = constants;
const OPEN_FLAGS = O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK;

/** JSON lines in one file of at most 1 MiB plus one older generation (`.1`). Never throws: a full disk loses lines. */
export class BoundedLog {
  readonly #path: string;

  constructor(path: string) {
    this.#path = path;
  }

  write(level: "info" | "warn" | "error", message: string, fields: Record<string, unknown> = {}): void {
    try {
      if ((lstatSync(this.#path, { throwIfNoEntry: false })?.size ?? 0) > MAX_FILE_BYTES) {
        renameSync(this.#path, `${this.#path}.1`);
      }
      const line = JSON.stringify({ time: new Date().toISOString(), level, message, ...fields });
      const file = openSync(this.#path, OPEN_FLAGS, 0o600);
      try {
        writeSync(file, `${line.slice(0, MAX_LINE)}\n`);
      } finally {
        closeSync(file);
      }
    } catch {
      // There is no better place to report it.
    }
  }
}
