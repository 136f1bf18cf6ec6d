import type { FSWatcher, Stats } from "node:fs";
import type { IgnoreRules } from "./ignore-rules.ts";

/** A directory that is watched, and the names in it. */
export interface Folder {
  readonly name: string;
  /** Relative to the root, which is "". */
  readonly path: string;
  readonly parent: Folder | undefined;
  readonly inode: number;
  readonly entries: Map<string, Entry>;
  /** Names that may have changed. */
  readonly dirty: Set<string>;
  watcher: FSWatcher | undefined;
  /** Of its own .gitignore. */
  rules: IgnoreRules | undefined;
  /** Which hold where no .gitignore speaks, the first that does deciding; of the root alone. */
  excludes: readonly IgnoreRules[];
}

/** What a name stands for. Directories that are ignored or could not be watched are not looked into. */
export type Entry = Folder | "file" | "ignored" | "unwatched";

export const isFolder = (entry: Entry | undefined): entry is Folder => typeof entry === "object";
export const isDirectoryEntry = (entry: Entry) => entry !== "file";
export const depthOf = ({ path }: Folder) => (path === "" ? 0 : path.split("/").length);
export const pathOf = (folder: Folder, name: string) => (folder.path === "" ? name : `${folder.path}/${name}`);

export const newFolder = (name: string, parent: Folder | undefined, { ino }: Stats): Folder => ({
  ...{ name, parent, inode: ino, path: parent ? pathOf(parent, name) : "" },
  ...{ entries: new Map(), dirty: new Set(), watcher: undefined, rules: undefined, excludes: [] },
});

/** Whether a directory is still part of the tree that it was read in. */
export function isAttached(folder: Folder): boolean {
  for (let each = folder; each.parent; each = each.parent) {
    if (each.parent.entries.get(each.name) !== each) return false;
  }
  return true;
}

/** What the rules of a directory and of those above it say of a name in it; the nearest that speak of it decide. */
export function isIgnored(folder: Folder, name: string, isDirectory: boolean): boolean {
  const segments = [name];
  for (let each: Folder | undefined = folder; each; each = each.parent) {
    for (const rules of [each.rules, ...each.excludes]) {
      const verdict = rules?.verdict(segments, isDirectory);
      if (verdict !== undefined) return verdict;
    }
    segments.unshift(each.name);
  }
  return false;
}
