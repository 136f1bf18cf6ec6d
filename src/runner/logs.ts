import { closeSync, constants, fstatSync, openSync, readSync, renameSync, statSync, writeSync } from "node:fs";
import { create, toJsonString } from "@bufbuild/protobuf";
import {
  CreateLogSectionSchema,
  EndLogSectionSchema,
  LogSectionOutcome,
} from "../../gen/gitpod/v1/environment_logs_pb.js";
import type { OpenSection } from "./record.ts";
import { hiddenTexts, redact } from "./redact.ts";

/** Half of what is kept: the older half is dropped when the newer one is full. */
const SEGMENT_BYTES = 5 * 1024 * 1024;
const READ_BYTES = 64 * 1024;
const MAX_HIDDEN = 10_000;
const MAX_LINE_CHARACTERS = 16 * 1024;
/** Texts that are kept back at most; the rest is dropped. */
const MAX_HELD = 2_000;

/** Bytes from `position` on, and where to go on. */
export interface LogChunk {
  data: Buffer;
  next: number;
}

const sizeOf = (path: string) => statSync(path, { throwIfNoEntry: false })?.size ?? 0;

/**
 * The log of one environment: two files of at most 5 MiB that only the runner can reach. Positions count bytes from
 * the oldest one that was stored when this process opened the log. Writing never throws: a full disk loses lines.
 */
export class EnvironmentLog {
  readonly #path: string;
  readonly #older: string;
  #olderStart = 0;
  #start: number;
  #end: number;
  #live = false;
  #hidden: readonly string[] = [];
  readonly #hiddenValues = new Set<string>();
  readonly #waiting = new Set<() => void>();
  #held: (() => void)[] | undefined;

  constructor(path: string) {
    this.#path = path;
    this.#older = `${path}.1`;
    this.#start = sizeOf(this.#older);
    this.#end = this.#start + sizeOf(path);
  }

  /** Something has been stored. */
  get started(): boolean {
    return this.#end > 0;
  }

  /** More may come. */
  get live(): boolean {
    return this.#live;
  }

  set live(live: boolean) {
    this.#live = live;
    this.#wake();
  }

  /** From now on these secret values are not written either; of very many only the newest. */
  hide(values: Iterable<string>): void {
    for (const value of values) this.#hiddenValues.add(value);
    for (const value of this.#hiddenValues) {
      if (this.#hiddenValues.size <= MAX_HIDDEN) break;
      this.#hiddenValues.delete(value);
    }
    this.#hidden = hiddenTexts(this.#hiddenValues);
  }

  /** Text as it is written, without credentials. */
  clean(text: string): string {
    return redact(text, this.#hidden);
  }

  /** Keeps back what comes from now on: something that began earlier is still to be told to its end. */
  hold(): void {
    this.#held ??= [];
  }

  /** Tells that end, then what was kept back. */
  release(end: () => void): void {
    const held = this.#held ?? [];
    this.#held = undefined;
    end();
    for (const each of held) each();
  }

  /** Has a part of the log opened or ended at once, or in its turn when that is kept back. */
  inTurn(change: () => void): void {
    if (this.#held) this.#held.push(change);
    else change();
  }

  /** Adds text, credentials removed, with its last line ended. */
  write(text: string): void {
    if (text === "") return;
    if (this.#held) {
      if (this.#held.length < MAX_HELD) this.#held.push(() => this.write(text));
      return;
    }
    const clean = this.clean(text);
    this.#append(clean.endsWith("\n") ? clean : `${clean}\n`);
  }

  #append(text: string): void {
    try {
      if (this.#end - this.#start >= SEGMENT_BYTES) this.#rotate();
      const flags = constants.O_WRONLY | constants.O_APPEND | constants.O_CREAT | constants.O_NOFOLLOW;
      const file = openSync(this.#path, flags, 0o600);
      try {
        writeSync(file, text);
        this.#end = this.#start + fstatSync(file).size;
      } finally {
        closeSync(file);
      }
    } catch {
      // There is no better place to report it.
    }
    this.#wake();
  }

  #rotate(): void {
    renameSync(this.#path, this.#older);
    this.#olderStart = this.#start;
    this.#start = this.#end;
  }

  /** What is stored from a position on, at most 64 KiB; empty at the end. What has been dropped is skipped. */
  read(position: number): LogChunk {
    const from = Math.max(position, this.#olderStart);
    const [path, base, limit] =
      from < this.#start ? [this.#older, this.#olderStart, this.#start] : [this.#path, this.#start, this.#end];
    const data = Buffer.alloc(Math.min(READ_BYTES, limit - from));
    if (data.length === 0) return { data, next: from };
    let file: number;
    try {
      file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW);
    } catch {
      return { data: Buffer.alloc(0), next: limit };
    }
    try {
      const count = readSync(file, data, 0, data.length, from - base);
      return { data: data.subarray(0, count), next: count > 0 ? from + count : limit };
    } finally {
      closeSync(file);
    }
  }

  /** Resolves when something was written, liveness changed, the time is over, or the signal fired. */
  changed(timeoutMs: number, signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer);
        this.#waiting.delete(done);
        signal.removeEventListener("abort", done);
        resolve();
      };
      const timer = setTimeout(done, timeoutMs);
      if (signal.aborted) return done();
      signal.addEventListener("abort", done);
      this.#waiting.add(done);
    });
  }

  #wake(): void {
    for (const done of [...this.#waiting]) done();
  }
}

/** Parts of the log in the order in which they come. */
export type SectionName = "machine" | "secrets" | "content" | "dotfiles" | "devcontainer" | "automations" | "system";

/** Opens and ends sections; which ones are open is kept in the environment's record. */
export class LogSections {
  readonly log: EnvironmentLog;
  readonly #sections: { count: number; open: OpenSection[] };

  constructor(log: EnvironmentLog, sections: { count: number; open: OpenSection[] }) {
    this.log = log;
    this.#sections = sections;
  }

  /** Opens a section; one of the same title that is still open ends as cancelled. */
  open(title: SectionName): void {
    const startedAt = Date.now();
    this.log.inTurn(() => this.#open(title, startedAt));
  }

  #open(title: SectionName, startedAt: number): void {
    const present = this.#find(title);
    if (present) this.#end(present, LogSectionOutcome.CANCELLED);
    const id = `${title}-${++this.#sections.count}`;
    const section = create(CreateLogSectionSchema, { id, title, continuous: title === "system" });
    this.log.write(`[section-create] ${toJsonString(CreateLogSectionSchema, section, { alwaysEmitImplicit: true })}`);
    this.#sections.open.push({ id, startedAt });
  }

  isOpen(title: SectionName): boolean {
    return this.#find(title) !== undefined;
  }

  #find(title: SectionName): OpenSection | undefined {
    return this.#sections.open.find(({ id }) => id.startsWith(`${title}-`));
  }

  end(title: SectionName, outcome: LogSectionOutcome): void {
    const endedAt = Date.now();
    this.log.inTurn(() => {
      const open = this.#find(title);
      if (open) this.#end(open, outcome, endedAt);
    });
  }

  #end(open: OpenSection, outcome: LogSectionOutcome, endedAt = Date.now()): void {
    const { id } = open;
    this.#sections.open = this.#sections.open.filter((section) => section !== open);
    const secondsElapsed = Math.max(0, endedAt - open.startedAt) / 1000;
    const section = create(EndLogSectionSchema, { id, outcome, secondsElapsed });
    this.log.write(`[section-end] ${toJsonString(EndLogSectionSchema, section, { alwaysEmitImplicit: true })}`);
  }

  /** Ends whatever is open, the newest first. */
  endAll(outcome: LogSectionOutcome): void {
    for (const open of [...this.#sections.open].reverse()) this.#end(open, outcome);
  }
}

/** Turns output with carriage returns into lines: of a progress line only the last state of every second is kept. */
export function lineWriter(write: (line: string) => void): { push(chunk: Buffer): void; end(): void } {
  const decoder = new TextDecoder();
  let rest = "";
  let shownAt = 0;
  const push = (chunk: Buffer) => {
    rest += decoder.decode(chunk, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) write(line.slice(line.lastIndexOf("\r") + 1).slice(0, MAX_LINE_CHARACTERS));
    if (rest.length > MAX_LINE_CHARACTERS) rest = rest.slice(-MAX_LINE_CHARACTERS);
    const states = rest.split("\r");
    if (states.length < 2 || Date.now() - shownAt < 1000) return;
    shownAt = Date.now();
    write(states.at(-2) ?? "");
    rest = states.at(-1) ?? "";
  };
  return { push, end: () => rest && write(rest.slice(rest.lastIndexOf("\r") + 1)) };
}
