import { readdirSync, readFileSync } from "node:fs";
import { type ProcessEntry, readProcess } from "../processes.ts";

/** Live processes whose variables carry the mark of a run; they keep it when they leave session and group. */
export function markedProcesses(mark: string): ProcessEntry[] {
  const wanted = `BERTH_RUN=${mark}`;
  const found: ProcessEntry[] = [];
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name) || Number(name) === process.pid) continue;
    if (!carries(name, wanted)) continue;
    const entry = readProcess(Number(name));
    if (entry) found.push(entry);
  }
  return found;
}

function carries(pid: string, variable: string): boolean {
  try {
    return readFileSync(`/proc/${pid}/environ`, "latin1").split("\0").includes(variable);
  } catch {
    return false;
  }
}

/** Kills every process that carries the mark. */
export function killMarked(mark: string): void {
  for (const { pid } of markedProcesses(mark)) {
    try {
      process.kill(pid, "SIGKILL");
    } catch {
      // Gone meanwhile.
    }
  }
}
