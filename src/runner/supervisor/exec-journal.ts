import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { readFile, rename, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { type ExecResponse, ExecResponseSchema } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { readSmallFile, writeFileAtomically } from "./config.ts";
import { bootId, type ProcessRef } from "./processes.ts";

// One `<key>.json` per command plus, once it ended, `<key>.result` (ExecResponse, binary). A command is written down
// before it is started, so one that was running when the supervisor died is known afterwards and never runs twice.

/** What the journal knows of one command. */
export interface ExecRecord {
  key: string;
  /** Digest of command and directory: the same operation id must come with the same. */
  fingerprint: string;
  /** `lost`: it was running when the supervisor died, or its result could not be stored. */
  state: "running" | "done" | "lost";
  /** When it started or, once it ended, when that was: milliseconds since the epoch. */
  changedAt: number;
  boot: string;
  process?: ProcessRef;
}

const KEPT_MS = 24 * 60 * 60 * 1000;
const KEPT_RESULTS = 1000;
// Two streams of 8 MiB in which every byte may have become a three-byte replacement character, and some slack.
const MAX_RESULT_BYTES = 64 * 1024 * 1024;
const RECORD_FILE = /^([0-9a-f]{64})\.json$/;

function isRecord(value: unknown): value is ExecRecord {
  if (typeof value !== "object" || value === null) return false;
  const { key, fingerprint, state, changedAt, boot, process } = value as Partial<Record<keyof ExecRecord, unknown>>;
  return (
    [key, fingerprint, boot].every((text) => typeof text === "string") &&
    ["running", "done", "lost"].some((known) => known === state) &&
    typeof changedAt === "number" &&
    (process === undefined || isProcessRef(process))
  );
}

function isProcessRef(value: unknown): value is ProcessRef {
  if (typeof value !== "object" || value === null) return false;
  const { pid, startTime } = value as Partial<Record<keyof ProcessRef, unknown>>;
  return Number.isSafeInteger(pid) && Number.isSafeInteger(startTime);
}

/** Remembers commands and their results on disk: 24 h, newest 1000. */
export class ExecJournal {
  readonly #directory: string;
  readonly #boot = bootId();
  readonly #records = new Map<string, ExecRecord>();

  constructor(directory: string) {
    this.#directory = directory;
  }

  /**
   * Reads what an earlier supervisor left. Commands it had running become `lost`; the processes of those that may
   * still live (same boot) are returned.
   */
  open(): ProcessRef[] {
    mkdirSync(this.#directory, { recursive: true, mode: 0o700 });
    const orphans: ProcessRef[] = [];
    for (const name of readdirSync(this.#directory)) {
      const key = RECORD_FILE.exec(name)?.[1];
      const record = key && this.#readRecord(key);
      if (!record) continue;
      if (record.state === "running") {
        if (record.process && record.boot === this.#boot) orphans.push(record.process);
        record.state = "lost";
        record.changedAt = Date.now();
        this.#tryWrite(record);
      }
      this.#records.set(record.key, record);
    }
    this.prune();
    for (const name of readdirSync(this.#directory)) {
      if (!this.#records.has(name.slice(0, 64))) this.#remove(name);
    }
    return orphans;
  }

  find(key: string): ExecRecord | undefined {
    return this.#records.get(key);
  }

  /** Writes the command down before it starts; throws a system error if the disk refuses. */
  begin(key: string, fingerprint: string): ExecRecord {
    const record: ExecRecord = { key, fingerprint, state: "running", changedAt: Date.now(), boot: this.#boot };
    this.#write(record);
    this.#records.set(key, record);
    return record;
  }

  started(record: ExecRecord, process: ProcessRef): void {
    record.process = process;
    this.#tryWrite(record);
  }

  /** Stores the result; if that fails the command counts as lost, so that it is not run again. */
  async finish(record: ExecRecord, response: ExecResponse): Promise<void> {
    try {
      const path = this.#resultPath(record.key);
      await writeFile(`${path}.tmp`, toBinary(ExecResponseSchema, response), { mode: 0o600 });
      await rename(`${path}.tmp`, path);
      record.changedAt = Date.now();
      record.state = "done";
      this.#write(record);
    } catch {
      record.state = "lost";
    }
    this.prune();
  }

  /** For a command that never started or that nobody can ask for again. */
  forget(key: string): void {
    this.#records.delete(key);
    for (const suffix of [".json", ".result", ".result.tmp"]) this.#remove(key + suffix);
  }

  /** The stored result; undefined if it cannot be read any more. */
  async result(key: string): Promise<ExecResponse | undefined> {
    try {
      const path = this.#resultPath(key);
      if ((await stat(path)).size > MAX_RESULT_BYTES) return undefined;
      return fromBinary(ExecResponseSchema, await readFile(path));
    } catch {
      return undefined;
    }
  }

  prune(): void {
    const ended = [...this.#records.values()].filter(({ state }) => state !== "running");
    ended.sort((a, b) => b.changedAt - a.changedAt);
    const oldest = Date.now() - KEPT_MS;
    for (const [index, { key, changedAt }] of ended.entries()) {
      if (index >= KEPT_RESULTS || changedAt < oldest) this.forget(key);
    }
  }

  #resultPath(key: string): string {
    return join(this.#directory, `${key}.result`);
  }

  #readRecord(key: string): ExecRecord | undefined {
    try {
      const value: unknown = JSON.parse(readSmallFile(join(this.#directory, `${key}.json`), 4096));
      return isRecord(value) && value.key === key ? value : undefined;
    } catch {
      return undefined;
    }
  }

  #remove(name: string): void {
    try {
      rmSync(join(this.#directory, name), { force: true });
    } catch {
      // Something of the user's own making, for example a directory of that name; it is in nobody's way.
    }
  }

  // What is on disk stays "running" then, which the next supervisor reads as lost.
  #tryWrite(record: ExecRecord): void {
    try {
      this.#write(record);
    } catch {}
  }

  #write(record: ExecRecord): void {
    writeFileAtomically(join(this.#directory, `${record.key}.json`), JSON.stringify(record));
  }
}
