import { constants } from "node:fs";
import { type FileHandle, open, stat } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { LOG_END_FILE, LOG_FILE, NO_TAG, OLDER_LOG_FILE } from "../supervisor/automation/line-log.ts";

// Logs of services and executions lie where the environment's user may write: only regular files of that user count,
// whatever the names lead to.

/** A log, and how it is to be read. */
export interface LogRequest {
  folder: string;
  /** User that its files must belong to; undefined where that is the runner's own. */
  uid: number | undefined;
  /** Go on until the log has ended. */
  follow: boolean;
  /** Only the last so many lines of what is stored. */
  tail?: number;
  /** Only lines of this step. */
  step?: string;
  timestamps: boolean;
}

const READ_BYTES = 256 * 1024;
const LOOK_MS = 200;
const META_FILE = "meta.json";
const META_BYTES = 256 * 1024;
const MAX_TAIL = 100_000;

async function openOwn(path: string, uid: number | undefined): Promise<FileHandle | undefined> {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const file = await open(path, flags).catch(() => undefined);
  const found = await file?.stat();
  if (file && found?.isFile() && (uid === undefined || found.uid === uid)) return file;
  await file?.close();
  return undefined;
}

/** Names of the steps, if there are several: then their lines carry them. */
async function labelsOf({ folder, uid }: LogRequest): Promise<ReadonlyMap<string, string>> {
  const file = await openOwn(join(folder, META_FILE), uid);
  if (!file) return new Map();
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(META_BYTES), 0, META_BYTES, 0);
    const { labels } = JSON.parse(buffer.subarray(0, bytesRead).toString()) as { labels?: Record<string, unknown> };
    const entries = Object.entries(labels ?? {}).map(([id, label]) => [id, String(label)] as const);
    return entries.length > 1 ? new Map(entries) : new Map();
  } catch {
    return new Map();
  } finally {
    await file.close();
  }
}

const LINE = /^(\d{1,15}) (\S+) (.*)$/s;

/** A stored line as readers see it; undefined if it is not for them. */
function shown(line: string, request: LogRequest, labels: ReadonlyMap<string, string>): string | undefined {
  const [, at = "0", tag = NO_TAG, text = ""] = LINE.exec(line) ?? [];
  if (request.step !== undefined && tag !== request.step) return undefined;
  const label = request.step === undefined ? labels.get(tag) : undefined;
  const time = request.timestamps ? `${new Date(Number(at)).toISOString()} ` : "";
  return `${time}${label === undefined ? "" : `[${label}] `}${text}\n`;
}

/** Whether there is such a log. */
export const hasLog = (folder: string): Promise<boolean> =>
  stat(folder).then(
    (found) => found.isDirectory(),
    () => false,
  );

/** Complete lines of an open file from where it was left. */
class LineReader {
  readonly #file: FileHandle;
  readonly inode: number;
  #position = 0;
  #rest = "";

  constructor(file: FileHandle, inode: number) {
    this.#file = file;
    this.inode = inode;
  }

  /** What is there, some lines at a time. */
  async *lines(): AsyncGenerator<string[]> {
    for (;;) {
      const { buffer, bytesRead } = await this.#file.read(Buffer.alloc(READ_BYTES), 0, READ_BYTES, this.#position);
      if (bytesRead === 0) return;
      this.#position += bytesRead;
      const lines = (this.#rest + buffer.subarray(0, bytesRead).toString("latin1")).split("\n");
      this.#rest = lines.pop() ?? "";
      yield lines.map((line) => Buffer.from(line, "latin1").toString());
    }
  }

  close(): Promise<void> {
    return this.#file.close();
  }
}

async function reader(path: string, uid: number | undefined): Promise<LineReader | undefined> {
  const file = await openOwn(path, uid);
  return file && new LineReader(file, (await file.stat()).ino);
}

/** Lines as they are stored and, if followed, as they come, until the log has ended or `isOver` says so. */
async function* stored(request: LogRequest, signal: AbortSignal, isOver: () => boolean): AsyncGenerator<string[]> {
  const { folder, uid, follow } = request;
  let current: LineReader | undefined;
  try {
    const older = await reader(join(folder, OLDER_LOG_FILE), uid);
    if (older) {
      yield* older.lines();
      await older.close();
    }
    while (!signal.aborted) {
      // Asked before reading, so that nothing written before the end is missed.
      const hasEnded = !follow || isOver() || (await hasFile(join(folder, LOG_END_FILE)));
      current ??= await reader(join(folder, LOG_FILE), uid);
      if (current) yield* current.lines();
      const newest = await reader(join(folder, LOG_FILE), uid);
      const isTurned = newest !== undefined && newest.inode !== current?.inode;
      await newest?.close();
      if (isTurned && current) {
        // It has become the older one, and may have grown a little before that.
        yield* current.lines();
        await current.close();
        current = undefined;
        continue;
      }
      if (hasEnded) return;
      await delay(LOOK_MS, undefined, { signal }).catch(() => undefined);
    }
  } finally {
    await current?.close().catch(() => undefined);
  }
}

const hasFile = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false,
  );

/** The text of a log in pieces of whole lines. */
export async function* logText(
  request: LogRequest,
  signal: AbortSignal,
  isOver: () => boolean,
): AsyncGenerator<string> {
  const labels = await labelsOf(request);
  let from = 0;
  if (request.tail !== undefined) {
    const tail = Math.min(request.tail, MAX_TAIL);
    const last: string[] = [];
    for await (const lines of stored({ ...request, follow: false }, signal, () => true)) {
      from += lines.length;
      last.push(...lines.flatMap((line) => shown(line, request, labels) ?? []));
      last.splice(0, Math.max(0, last.length - tail));
    }
    yield last.join("");
    if (!request.follow) return;
  }
  for await (const lines of stored(request, signal, isOver)) {
    const rest = lines.slice(from);
    from = Math.max(0, from - lines.length);
    yield rest.flatMap((line) => shown(line, request, labels) ?? []).join("");
  }
}
