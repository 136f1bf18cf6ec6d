import { appendFileSync, constants, lstatSync, renameSync } from "node:fs";

const MAX_FILE_BYTES = 1024 * 1024;

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
      const flag =
        constants.O_WRONLY | constants.O_APPEND | constants.O_CREAT | constants.O_NOFOLLOW | constants.O_NONBLOCK;
      appendFileSync(this.#path, `${line.slice(0, 8192)}\n`, { mode: 0o600, flag });
    } catch {
      // There is no better place to report it.
    }
  }
}
