import { type FSWatcher, lstatSync, watch } from "node:fs";
import { join, resolve } from "node:path";
import { readSmallFile } from "./config.ts";
import { WatchTree } from "./watch-tree.ts";

// What `git status` depends on besides the files of the checkout: where HEAD points, the index, the branches, the
// remotes, and what is in progress.

const MAX_POINTER_BYTES = 4096;
const MAX_REF_DIRECTORIES = 2_000;
const MAX_REFS = 50_000;
const FILES: ReadonlySet<string> = new Set([
  ...["HEAD", "index", "packed-refs", "config", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD"],
  ...["rebase-merge", "rebase-apply"],
]);

/** Where a checkout keeps its state, and where it keeps what it shares with other checkouts of the same repository. */
export function gitDirectories(checkout: string): { own: string; common: string } | undefined {
  const entry = join(checkout, ".git");
  const found = lstatSync(entry, { throwIfNoEntry: false });
  if (!found) return undefined;
  try {
    const [, pointer] = found.isDirectory()
      ? []
      : (/^gitdir: (.+)$/m.exec(readSmallFile(entry, MAX_POINTER_BYTES)) ?? []);
    const own = pointer === undefined ? entry : resolve(checkout, pointer);
    const shared = lstatSync(join(own, "commondir"), { throwIfNoEntry: false });
    const common = shared ? resolve(own, readSmallFile(join(own, "commondir"), MAX_POINTER_BYTES).trim()) : own;
    return { own, common };
  } catch {
    return undefined;
  }
}

/** Whom a git state tells. */
export interface GitListener {
  changed(): void;
  /** Files with rules of what is ignored, or which ones count, may have changed. */
  excludesChanged(): void;
}

/** Watches the state of a git checkout. */
export class GitState {
  readonly #watchers: FSWatcher[] = [];
  readonly #trees: WatchTree[] = [];

  private constructor() {}

  /** Undefined if the directory is no checkout. What cannot be watched of it is not. */
  static async open(checkout: string, listener: GitListener): Promise<GitState | undefined> {
    const directories = gitDirectories(checkout);
    if (!directories) return undefined;
    const state = new GitState();
    const changed = () => listener.changed();
    for (const directory of new Set(Object.values(directories))) {
      state.#watchFiles(directory, (name) => {
        if (name === null || FILES.has(name)) changed();
        if (name === null || name === "config") listener.excludesChanged();
      });
    }
    state.#watchFiles(join(directories.common, "info"), (name) => {
      if (name === null || name === "exclude") listener.excludesChanged();
    });
    for (const name of ["refs", "reftable"]) await state.#watchRefs(join(directories.common, name), changed);
    return state;
  }

  close(): void {
    for (const watcher of this.#watchers) watcher.close();
    for (const tree of this.#trees) tree.close();
  }

  #watchFiles(directory: string, touched: (name: string | null) => void): void {
    try {
      const watcher = watch(directory, { persistent: false }, (_event, name) => touched(name));
      watcher.on("error", () => undefined);
      this.#watchers.push(watcher);
    } catch {}
  }

  async #watchRefs(directory: string, changed: () => void): Promise<void> {
    const bounds = { isCheckout: false, maxDirectories: MAX_REF_DIRECTORIES, maxNames: MAX_REFS };
    try {
      const tree = await WatchTree.open(directory, bounds, {
        changed: (changes) => {
          if (changes.some(({ path }) => !path.endsWith(".lock"))) changed();
        },
        overflowed: changed,
        gitReplaced: () => undefined,
        rootReplaced: changed,
      });
      this.#trees.push(tree);
    } catch {}
  }
}
