import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  type FileChangeEventsSchema,
  FileChangeType,
  WatchEventType,
  type WatchRequest,
  type WatchResponseSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { invalidArgument } from "./errors.ts";
import { IgnoreRules } from "./ignore-rules.ts";
import { Waiters } from "./waiters.ts";
import type { TreeChange } from "./watch-tree.ts";

const MAX_EVENTS = 1000;
const MAX_PATTERNS = 100;
const MAX_PATTERN_CHARACTERS = 1024;
const { CREATED, UPDATED, DELETED } = FileChangeType;

type WatchMessage = MessageInitShape<typeof WatchResponseSchema>;

function wantedTypes({ eventTypes }: WatchRequest): ReadonlySet<WatchEventType> {
  for (const type of eventTypes) {
    if (type === WatchEventType.UNSPECIFIED || WatchEventType[type] === undefined) {
      throw invalidArgument("event_types holds an unspecified or unknown type");
    }
  }
  return new Set(eventTypes.length > 0 ? eventTypes : [WatchEventType.FILE_CHANGE, WatchEventType.GIT_STATUS]);
}

function excluded({ fileExcludePatterns: patterns }: WatchRequest): IgnoreRules {
  const isFine = (pattern: string) => pattern.length <= MAX_PATTERN_CHARACTERS && !/[\0\n]/.test(pattern);
  if (patterns.length > MAX_PATTERNS || !patterns.every(isFine)) {
    const each = `each of up to ${MAX_PATTERN_CHARACTERS} characters on one line`;
    throw invalidArgument(`file_exclude_patterns: at most ${MAX_PATTERNS}, ${each}`);
  }
  return new IgnoreRules(patterns.join("\n"));
}

/** What has happened to a path altogether; undefined if that amounts to nothing. */
function merged(before: FileChangeType, now: FileChangeType): FileChangeType | undefined {
  if (before === CREATED) return now === DELETED ? undefined : CREATED;
  if (before === DELETED) return now === DELETED ? DELETED : UPDATED;
  return now === CREATED ? UPDATED : now;
}

/** One caller of Watch. What it has not been told yet is summed up, so that it takes bounded memory however slow it is. */
export class WatchSubscriber {
  readonly #wanted: ReadonlySet<WatchEventType>;
  readonly #excluded: IgnoreRules;
  readonly #news = new Waiters();
  readonly #changes = new Map<string, TreeChange>();
  #gitChanged = false;
  #overflow: string | undefined;
  #failure: Error | undefined;

  /** INVALID_ARGUMENT for event types and patterns that mean nothing. */
  constructor(request: WatchRequest) {
    this.#wanted = wantedTypes(request);
    this.#excluded = excluded(request);
  }

  filesChanged(changes: readonly TreeChange[]): void {
    // Whoever is told of an overflow reads everything anew, these changes as well.
    if (!this.#wanted.has(WatchEventType.FILE_CHANGE) || this.#overflow) return;
    for (const change of changes) {
      if (!this.#excluded.ignores(change.path, change.isDirectory)) this.#add(change);
    }
    if (this.#changes.size > MAX_EVENTS) this.overflowed(`more than ${MAX_EVENTS} changes at once`);
    else this.#news.wake();
  }

  gitChanged(): void {
    this.#gitChanged ||= this.#wanted.has(WatchEventType.GIT_STATUS);
    this.#news.wake();
  }

  /** Changes of files were lost, and with them those of the git status. */
  overflowed(reason: string): void {
    if (this.#wanted.has(WatchEventType.FILE_CHANGE)) this.#overflow = reason;
    this.#changes.clear();
    this.gitChanged();
  }

  fail(error: Error): void {
    this.#failure = error;
    this.#news.wake();
  }

  async *messages(signal: AbortSignal): AsyncGenerator<WatchMessage> {
    while (!signal.aborted) {
      if (this.#failure) throw this.#failure;
      const message = this.#next();
      if (message) yield message;
      else await this.#news.next(signal);
    }
  }

  #next(): WatchMessage | undefined {
    if (this.#overflow !== undefined) {
      const reason = this.#overflow;
      this.#overflow = undefined;
      return { event: { case: "overflow", value: { reason } } };
    }
    if (this.#changes.size > 0) {
      const value: MessageInitShape<typeof FileChangeEventsSchema> = { events: [...this.#changes.values()] };
      this.#changes.clear();
      return { event: { case: "fileChanges", value } };
    }
    if (!this.#gitChanged) return undefined;
    this.#gitChanged = false;
    return { event: { case: "gitStatusChanged", value: {} } };
  }

  #add(change: TreeChange): void {
    const key = `${change.isDirectory ? "d" : "f"}${change.path}`;
    const before = this.#changes.get(key);
    const type = before ? merged(before.type, change.type) : change.type;
    if (type === undefined) this.#changes.delete(key);
    else this.#changes.set(key, { ...change, type });
  }
}
