import { mkdirSync, readdirSync, rmSync, statSync } from "node:fs";
import { join } from "node:path";

const DAY_MS = 24 * 60 * 60_000;

const changedAt = (path: string) => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;

/** Makes a folder for a log; of those beside it the newest `keep` stay, this one included. */
export function newLogFolder(parent: string, name: string, keep: number): string {
  const path = join(parent, name);
  mkdirSync(path, { recursive: true, mode: 0o700 });
  const others = readdirSync(parent).filter((each) => each !== name);
  const oldestFirst = others.sort((left, right) => changedAt(join(parent, left)) - changedAt(join(parent, right)));
  for (const each of oldestFirst.slice(0, Math.max(0, others.length - keep + 1))) {
    rmSync(join(parent, each), { recursive: true, force: true });
  }
  return path;
}

/** Removes logs that nobody has written to for so many days. */
export function pruneLogs(logs: string, days: number): void {
  const before = Date.now() - days * DAY_MS;
  for (const kind of ["services", "tasks"]) {
    const owners = join(logs, kind);
    for (const owner of entriesOf(owners)) {
      for (const name of entriesOf(join(owners, owner))) {
        const path = join(owners, owner, name);
        const newest = Math.max(changedAt(path), ...entriesOf(path).map((file) => changedAt(join(path, file))));
        if (newest < before) rmSync(path, { recursive: true, force: true });
      }
    }
  }
}

function entriesOf(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}
