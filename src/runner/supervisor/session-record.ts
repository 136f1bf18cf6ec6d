import { readSmallFile, writeFileAtomically } from "./config.ts";
import { bootId, type ProcessRef } from "./processes.ts";

const MAX_BYTES = 64 * 1024;

const isReference = (value: unknown): value is ProcessRef => {
  const { pid, startTime } = (value ?? {}) as Partial<Record<keyof ProcessRef, unknown>>;
  return Number.isSafeInteger(pid) && Number.isSafeInteger(startTime);
};

/** Leaders of the sessions that an earlier supervisor wrote down during this boot. */
export function recordedSessions(path: string): ProcessRef[] {
  try {
    const { boot, sessions } = JSON.parse(readSmallFile(path, MAX_BYTES)) as Record<string, unknown>;
    return boot === bootId() && Array.isArray(sessions) ? sessions.filter(isReference) : [];
  } catch {
    return [];
  }
}

/** Writes down the leaders of the sessions that a later supervisor has to end; a full disk loses them. */
export function recordSessions(path: string, sessions: readonly ProcessRef[]): void {
  try {
    writeFileAtomically(path, JSON.stringify({ boot: bootId(), sessions }));
  } catch {
    // The hangup that comes with the end of the supervisor is all there is then.
  }
}
