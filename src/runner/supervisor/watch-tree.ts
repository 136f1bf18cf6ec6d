import { type Dirent, type FSWatcher, readFileSync, type Stats, watch } from "node:fs";
import { lstat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { FileChangeType } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { inBatches } from "./batches.ts";
import { readSmallFile } from "./config.ts";
import { errnoOf } from "./errors.ts";
import { sortedEntries } from "./files.ts";
import { IgnoreRules, MAX_IGNORE_BYTES } from "./ignore-rules.ts";
import {
  depthOf,
  type Folder,
  isAttached,
  isDirectoryEntry,
  isFolder,
  isIgnored,
  newFolder,
  pathOf,
} from "./watch-folder.ts";

// One inotify watch per directory and the names that are in it. What the kernel says is only a hint of where to look:
// what changed is what is different from what was known, so that lost, doubled and late hints do no harm, and a look at
// everything makes up for any number of them.

/** Something that appeared, changed or disappeared; the path is relative to the root. */
export interface TreeChange {
  path: string;
  type: FileChangeType;
  isDirectory: boolean;
}

/** Whom a tree tells. */
export interface TreeListener {
  changed(changes: TreeChange[]): void;
  /** Changes were lost, or are not seen everywhere. */
  overflowed(reason: string): void;
  /** `.git` in the root may have appeared, disappeared or become another one. */
  gitReplaced(): void;
  /** The root has become another directory or is gone; the tree is of no use any more. */
  rootReplaced(): void;
}

export interface TreeOptions {
  /** Leaves out `.git` and what .gitignore files name. */
  isCheckout: boolean;
  /** Rules that hold where no .gitignore speaks; the first that does decides. */
  excludes?: readonly IgnoreRules[];
  maxDirectories?: number;
  maxNames?: number;
}

type Report = (change: TreeChange) => void;

const IGNORE_FILE = ".gitignore";
const MAX_DIRECTORIES = 20_000;
const MAX_NAMES = 250_000;
const MAX_DIRTY = 10_000;
const MAX_CHANGES = 10_000;
const COLLECT_MS = 100;
/** After a look at everything, pause this many times as long as it took. */
const COST_FACTOR = 5;
const REMIND_MS = 30_000;
const DEFAULT_QUEUE = 16_384;

const { CREATED, UPDATED, DELETED } = FileChangeType;
const silent: Report = () => undefined;

/** Length of the kernel's queue of hints, at which it begins to drop them. */
function queueLength(): number {
  try {
    return Number(readFileSync("/proc/sys/fs/inotify/max_queued_events", "utf8")) || DEFAULT_QUEUE;
  } catch {
    return DEFAULT_QUEUE;
  }
}

/** Watches a directory and everything below it. Memory is bounded by the number of directories and names. */
export class WatchTree {
  readonly #root: string;
  readonly #options: Required<TreeOptions>;
  readonly #listener: TreeListener;
  readonly #queueLength = queueLength();
  #top: Folder | undefined;
  #above: FSWatcher | undefined;
  #directories = 0;
  #names = 0;
  /** Rules that have changed since the last look. */
  #newExcludes: readonly IgnoreRules[] | undefined;
  readonly #dirty = new Set<Folder>();
  #dirtyNames = 0;
  #burst = 0;
  /** Why what is known cannot be trusted. */
  #lost: string | undefined;
  /** Why not everything is watched. */
  #incomplete: string | undefined;
  #reminder: NodeJS.Timeout | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isLooking = false;
  #isClosed = false;

  private constructor(root: string, options: TreeOptions, listener: TreeListener) {
    this.#root = root;
    this.#options = { maxDirectories: MAX_DIRECTORIES, maxNames: MAX_NAMES, excludes: [], ...options };
    this.#listener = listener;
  }

  /** Resolves once everything is watched; rejects with a system error if the root cannot be. */
  static async open(root: string, options: TreeOptions, listener: TreeListener): Promise<WatchTree> {
    const tree = new WatchTree(root, options, listener);
    try {
      await tree.#start();
    } catch (error) {
      tree.close();
      throw error;
    }
    return tree;
  }

  /** Why changes are not seen everywhere; undefined if they are. */
  get incomplete(): string | undefined {
    return this.#incomplete;
  }

  /** Other rules than so far hold where no .gitignore speaks. */
  exclude(rules: readonly IgnoreRules[]): void {
    this.#newExcludes = rules;
    this.#schedule(COLLECT_MS);
  }

  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    clearInterval(this.#reminder);
    this.#above?.close();
    if (this.#top) this.#forget(this.#top);
  }

  async #start(): Promise<void> {
    const top = newFolder("", undefined, await lstat(this.#root));
    top.excludes = this.#options.excludes;
    this.#watchAbove();
    this.#top = top;
    this.#directories++;
    // Only here a failure is the caller's to hear.
    top.watcher = this.#watch(top);
    await this.#read(top, silent);
  }

  /** The root itself is seen from the directory above. */
  #watchAbove(): void {
    const name = basename(this.#root);
    try {
      this.#above = watch(dirname(this.#root), { persistent: false }, (_event, changed) => {
        if (changed === name) void this.#checkRoot();
      });
      this.#above.on("error", () => undefined);
    } catch {
      // It may not be ours to read; then a root that is exchanged is not noticed.
    }
  }

  async #checkRoot(): Promise<void> {
    const found = await lstat(this.#root).catch(() => undefined);
    if (!this.#isClosed && found?.ino !== this.#top?.inode) this.#listener.rootReplaced();
  }

  #watch(folder: Folder): FSWatcher {
    const watcher = watch(join(this.#root, folder.path), { persistent: false }, (_event, name) => {
      this.#hint(folder, name);
    });
    // A directory that is removed is noticed by the one above.
    watcher.on("error", () => undefined);
    return watcher;
  }

  #hint(folder: Folder, name: string | null): void {
    // The runtime keeps to itself that the kernel's queue was full, but then at least so many hints come in one go.
    if (++this.#burst === 1) {
      setImmediate(() => {
        if (this.#burst >= this.#queueLength) this.#lose("the system dropped changes");
        this.#burst = 0;
      });
    }
    if (name === null) this.#lose("the system dropped changes");
    else if (this.#options.isCheckout && name === ".git") {
      if (folder === this.#top) this.#listener.gitReplaced();
    } else if (!folder.dirty.has(name) && !this.#lost) {
      folder.dirty.add(name);
      this.#dirty.add(folder);
      if (++this.#dirtyNames > MAX_DIRTY) this.#lose("too many changes at once");
    }
    this.#schedule(COLLECT_MS);
  }

  #lose(reason: string): void {
    this.#lost = reason;
    this.#takeDirty();
    this.#schedule(COLLECT_MS);
  }

  #schedule(ms: number): void {
    if (this.#isClosed || this.#isLooking || this.#timer) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      void this.#look();
    }, ms);
    this.#timer.unref();
  }

  #takeDirty(): { folder: Folder; names: string[] }[] {
    const taken = [...this.#dirty].map((folder) => ({ folder, names: [...folder.dirty] }));
    for (const { folder } of taken) folder.dirty.clear();
    this.#dirty.clear();
    this.#dirtyNames = 0;
    return taken.sort((a, b) => depthOf(a.folder) - depthOf(b.folder));
  }

  /** Looks where the hints point, or at everything, and tells what is different. */
  async #look(): Promise<void> {
    this.#isLooking = true;
    const lost = this.#lost;
    const startedAt = Date.now();
    const changes: TreeChange[] = [];
    let excess = 0;
    const report: Report = (change) => {
      if (changes.length < MAX_CHANGES) changes.push(change);
      else excess++;
    };
    try {
      this.#lost = undefined;
      await this.#takeExcludes();
      if (lost && this.#top) await this.#read(this.#top, silent);
      else {
        for (const { folder, names } of this.#takeDirty()) {
          // What has changed with them is judged by the new rules.
          if (names.includes(IGNORE_FILE)) await this.#lookAt(folder, IGNORE_FILE, report);
          const others = names.filter((name) => name !== IGNORE_FILE);
          await inBatches(others, (name) => this.#lookAt(folder, name, report));
        }
      }
    } catch {
      // Files that change while they are looked at make new hints.
    }
    this.#isLooking = false;
    if (this.#isClosed) return;
    if (lost || excess > 0) this.#listener.overflowed(lost ?? "too many changes at once");
    else if (changes.length > 0) this.#listener.changed(changes);
    if (this.#dirty.size > 0 || this.#lost || this.#newExcludes) {
      const costMs = (Date.now() - startedAt) * COST_FACTOR;
      this.#schedule(lost ? Math.max(COLLECT_MS, costMs) : COLLECT_MS);
    }
  }

  /** Compares one name with what is known of it. */
  async #lookAt(folder: Folder, name: string, report: Report): Promise<void> {
    const found = await statOf(this.#absolute(folder, name));
    if (this.#isClosed || !isAttached(folder)) return;
    const before = folder.entries.get(name);
    if (this.#options.isCheckout && name === IGNORE_FILE) {
      folder.rules = this.#rulesOf(folder, found !== undefined);
      await this.#reconsider(folder);
    }
    if (!found) return this.#remove(folder, name, report);
    const isDirectory = found.isDirectory();
    if (before !== undefined && isDirectory && isDirectoryEntry(before)) {
      if (!isFolder(before) || before.inode === found.ino) return;
    }
    if (before !== undefined && (isDirectory || isDirectoryEntry(before))) this.#remove(folder, name, report);
    if (isDirectory) return await this.#addDirectory(folder, name, report);
    this.#addFile(folder, name);
    const change = { path: pathOf(folder, name), type: before === "file" ? UPDATED : CREATED, isDirectory };
    if (!isIgnored(folder, name, false)) report(change);
  }

  /** Reads a directory and everything below, the upper ones first, and reports what is different. */
  async #read(start: Folder, report: Report): Promise<void> {
    for (let level = [start]; level.length > 0 && !this.#isClosed; ) {
      const below = await inBatches(level, (folder) => this.#readFolder(folder, report));
      level = below.flat();
    }
  }

  /** Reads one directory; the answer is those in it that are watched. */
  async #readFolder(folder: Folder, report: Report): Promise<Folder[]> {
    const present = await this.#present(folder);
    if (!present || this.#isClosed) return [];
    const names = new Map(present.map((entry) => [entry.name, entry]));
    if (this.#options.isCheckout) folder.rules = this.#rulesOf(folder, names.has(IGNORE_FILE));
    for (const name of [...folder.entries.keys()]) if (!names.has(name)) this.#remove(folder, name, report);
    for (const [name, entry] of names) {
      if (this.#options.isCheckout && name === ".git") continue;
      if (entry.isDirectory()) await this.#meetDirectory(folder, name, report);
      else this.#meetFile(folder, name, report);
    }
    return [...folder.entries.values()].filter(isFolder);
  }

  /** What is in a directory that is still the one that is known; undefined if it cannot be read. */
  async #present(folder: Folder): Promise<Dirent[] | undefined> {
    const path = join(this.#root, folder.path);
    try {
      const room = Math.max(0, this.#options.maxNames - this.#names + folder.entries.size);
      const { entries, more } = await sortedEntries(path, room);
      if (more) this.#miss(`only ${this.#options.maxNames} names are watched`);
      return entries;
    } catch {
      return undefined;
    }
  }

  #meetFile(folder: Folder, name: string, report: Report): void {
    const before = folder.entries.get(name);
    if (before === "file") return;
    if (before !== undefined) this.#remove(folder, name, report);
    this.#addFile(folder, name);
    if (report === silent || isIgnored(folder, name, false)) return;
    report({ path: pathOf(folder, name), type: CREATED, isDirectory: false });
  }

  async #meetDirectory(folder: Folder, name: string, report: Report): Promise<void> {
    const before = folder.entries.get(name);
    const isLeftOut = isIgnored(folder, name, true);
    if (before === "ignored" && isLeftOut) return;
    if (isFolder(before) && !isLeftOut) {
      const found = await statOf(this.#absolute(folder, name));
      if (found?.ino === before.inode) return;
    }
    if (before !== undefined) this.#remove(folder, name, silent);
    await this.#addDirectory(folder, name, report, false);
  }

  #addFile(folder: Folder, name: string): void {
    if (!folder.entries.has(name)) this.#names++;
    folder.entries.set(name, "file");
  }

  /** Takes up a directory that is not known, unless it is ignored; what is in it as well, if it is to be read now. */
  async #addDirectory(folder: Folder, name: string, report: Report, isRead = true): Promise<void> {
    const path = this.#absolute(folder, name);
    const found = await statOf(path);
    if (!found?.isDirectory() || this.#isClosed || folder.entries.has(name)) return;
    this.#names++;
    if (isIgnored(folder, name, true)) {
      folder.entries.set(name, "ignored");
      return;
    }
    report({ path: pathOf(folder, name), type: CREATED, isDirectory: true });
    const added = newFolder(name, folder, found);
    added.watcher = this.#watchBelow(added);
    folder.entries.set(name, added.watcher ? added : "unwatched");
    if (!added.watcher) return;
    this.#directories++;
    if (isRead) await this.#read(added, report);
  }

  /** Undefined if the directory cannot be watched, for a reason that is remembered if it is nobody's fault. */
  #watchBelow(folder: Folder): FSWatcher | undefined {
    if (this.#directories >= this.#options.maxDirectories) {
      this.#miss(`only ${this.#options.maxDirectories} directories are watched`);
      return undefined;
    }
    try {
      return this.#watch(folder);
    } catch (error) {
      if (["ENOSPC", "EMFILE", "ENFILE", "ENOMEM"].includes(errnoOf(error) ?? "")) {
        this.#miss("the system's limit of watches is reached (fs.inotify.max_user_watches)");
      }
      return undefined;
    }
  }

  #miss(reason: string): void {
    if (this.#incomplete || this.#isClosed) return;
    this.#incomplete = reason;
    this.#reminder = setInterval(() => this.#listener.overflowed(reason), REMIND_MS);
    this.#reminder.unref();
  }

  /** Forgets a name and all below it, and reports them as gone. */
  #remove(folder: Folder, name: string, report: Report): void {
    const entry = folder.entries.get(name);
    if (entry === undefined) return;
    folder.entries.delete(name);
    this.#names--;
    const isDirectory = isDirectoryEntry(entry);
    const isReported = entry !== "ignored" && !isIgnored(folder, name, isDirectory);
    if (isReported) report({ path: pathOf(folder, name), type: DELETED, isDirectory });
    if (!isFolder(entry)) return;
    for (const below of [...entry.entries.keys()]) this.#remove(entry, below, isReported ? report : silent);
    this.#forget(entry);
  }

  #forget(folder: Folder): void {
    folder.watcher?.close();
    folder.watcher = undefined;
    this.#directories--;
    this.#dirty.delete(folder);
    for (const entry of folder.entries.values()) if (isFolder(entry)) this.#forget(entry);
  }

  #absolute = (folder: Folder, name: string) => join(this.#root, folder.path, name);

  #rulesOf(folder: Folder, hasFile: boolean): IgnoreRules | undefined {
    try {
      return hasFile
        ? new IgnoreRules(readSmallFile(this.#absolute(folder, IGNORE_FILE), MAX_IGNORE_BYTES))
        : undefined;
    } catch {
      // Git does not follow a link here either.
      return undefined;
    }
  }

  async #takeExcludes(): Promise<void> {
    const top = this.#top;
    if (!this.#newExcludes || !top) return;
    top.excludes = this.#newExcludes;
    this.#newExcludes = undefined;
    await this.#reconsider(top);
  }

  /** What is ignored has changed: directories come in and go out without having appeared or disappeared. */
  async #reconsider(folder: Folder): Promise<void> {
    for (const [name, entry] of [...folder.entries]) {
      const isLeftOut = isIgnored(folder, name, true);
      if (isFolder(entry) && !isLeftOut) await this.#reconsider(entry);
      else if (isFolder(entry) || (entry === "ignored" && !isLeftOut)) {
        this.#remove(folder, name, silent);
        await this.#addDirectory(folder, name, silent);
      }
    }
  }
}

async function statOf(path: string): Promise<Stats | undefined> {
  return await lstat(path).catch(() => undefined);
}
