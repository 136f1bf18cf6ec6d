import { rm } from "node:fs/promises";
import { join } from "node:path";
import { readSmall, writeAtomically } from "./files.ts";
import type { RecordedProcess } from "./record.ts";
import { bootId, isAlive, readProcess } from "./supervisor/processes.ts";

const MAX_LOCK_BYTES = 1024;

/**
 * Claims a data folder for this process; throws if a living process holds it. One that died without letting go does
 * not count. Returns what lets go of it.
 */
export async function lockDataDir(dataDir: string): Promise<() => Promise<void>> {
  const path = join(dataDir, "runner.lock");
  const holder = parse(await readSmall(path, MAX_LOCK_BYTES));
  if (holder && holder.pid !== process.pid && holder.bootId === bootId() && isAlive(holder)) {
    throw new Error(`another runner (process ${holder.pid}) uses the data folder ${dataDir}`);
  }
  const own = readProcess(process.pid);
  await writeAtomically(path, JSON.stringify({ pid: process.pid, startTime: own?.startTime ?? 0, bootId: bootId() }));
  return async () => await rm(path, { force: true });
}

function parse(text: string | undefined): RecordedProcess | undefined {
  try {
    return text ? (JSON.parse(text) as RecordedProcess) : undefined;
  } catch {
    return undefined;
  }
}
