import type { ActivityTracker } from "./activity.ts";
import { withDeadline } from "./errors.ts";
import type { Execs } from "./exec.ts";
import { resolvePath } from "./files.ts";
import { gate, streamGate } from "./gate.ts";
import type { Terminals } from "./terminals.ts";
import type { Watches } from "./watches.ts";

const DEADLINE_MS = 60_000;
const HEAVY_PARALLEL = 4;
const HEAVY_WAITING = 64;
const MAX_STREAMS = 200;

/** What the RPCs of one environment work with. */
export interface OpsDeps {
  workspaceFolder(): string;
  /** Variables for processes, read anew at each call. */
  environment(): Record<string, string>;
  execs: Execs;
  terminals: Terminals;
  watches: Watches;
  activity: ActivityTracker;
  /** Errors nobody foresaw; the caller only sees INTERNAL. */
  unforeseen(error: unknown): void;
}

/** What the RPCs share. */
export interface OpsTools {
  /** Absolute form of a path of a request. */
  absolute(path: string): string;
  /** As `absolute`; the workspace folder without one. */
  directory(path: string): string;
  /** Answers DEADLINE_EXCEEDED after a minute. */
  inTime<T>(what: string, work: Promise<T>): Promise<T>;
  /** As `inTime`, for what takes the whole disk: only a few at once. */
  heavyInTime<T>(what: string, work: () => Promise<T>): Promise<T>;
  /** Keeps the number of open streams within bounds. */
  streamed<T>(messages: AsyncIterable<T>): AsyncGenerator<T>;
}

export function opsTools({ workspaceFolder }: OpsDeps): OpsTools {
  const heavy = gate(HEAVY_PARALLEL, HEAVY_WAITING);
  const absolute = (path: string) => resolvePath(workspaceFolder(), path);
  return {
    absolute,
    directory: (path) => (path === "" ? workspaceFolder() : absolute(path)),
    inTime: (what, work) => withDeadline(work, DEADLINE_MS, what),
    heavyInTime: (what, work) => withDeadline(heavy(work), DEADLINE_MS, what),
    streamed: streamGate(MAX_STREAMS),
  };
}
