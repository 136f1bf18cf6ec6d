import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { readSmallFile, writeFileAtomically } from "../config.ts";

const MAX_BYTES = 8 * 1024 * 1024;

/** What is remembered of items of one kind, a file each. A record that cannot be read counts as absent. */
export class Records<T extends object> {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true, mode: 0o700 });
  }

  ids(): string[] {
    return readdirSync(this.#folder)
      .filter((name) => name.endsWith(".json"))
      .map((name) => name.slice(0, -".json".length));
  }

  read(id: string): T | undefined {
    try {
      const value: unknown = JSON.parse(readSmallFile(this.#path(id), MAX_BYTES));
      return typeof value === "object" && value !== null ? (value as T) : undefined;
    } catch {
      return undefined;
    }
  }

  /** Throws when it cannot be written: what nobody would find again must not begin. */
  write(id: string, record: T): void {
    writeFileAtomically(this.#path(id), JSON.stringify(record));
  }

  remove(id: string): void {
    rmSync(this.#path(id), { force: true });
  }

  #path(id: string): string {
    return join(this.#folder, `${id}.json`);
  }
}
