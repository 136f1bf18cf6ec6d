import { join } from "node:path";
import { readSmallFile, writeFileAtomically } from "./config.ts";
import { type ProcessRef, readProcess, userOf } from "./processes.ts";

/** Content of `run/supervisor.json`: which process serves the environment. */
export interface SupervisorRecord extends ProcessRef {
  version: string;
}

const recordPath = (root: string) => join(root, "run", "supervisor.json");

export function writeSupervisorRecord(root: string, record: SupervisorRecord): void {
  writeFileAtomically(recordPath(root), JSON.stringify(record));
}

/**
 * The supervisor that is alive for an environment, if any. The file can be written from inside the environment, so the
 * process must also have the recorded start time and, if given, run as `uid`.
 */
export function liveSupervisor(root: string, uid?: number): SupervisorRecord | undefined {
  let value: unknown;
  try {
    value = JSON.parse(readSmallFile(recordPath(root), 4096));
  } catch {
    return undefined;
  }
  const { pid, startTime, version } = (value ?? {}) as Partial<Record<keyof SupervisorRecord, unknown>>;
  if (typeof pid !== "number" || typeof startTime !== "number" || typeof version !== "string") return undefined;
  if (!Number.isInteger(pid) || pid <= 1 || readProcess(pid)?.startTime !== startTime) return undefined;
  return uid === undefined || userOf(pid) === uid ? { pid, startTime, version } : undefined;
}
