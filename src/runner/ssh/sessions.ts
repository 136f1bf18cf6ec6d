import { readFile } from "node:fs/promises";
import type { ProcessRef } from "../supervisor/processes.ts";
import { SESSION_MARK } from "./config.ts";

const MAX_PROCESSES = 1000;
const MARK = `${SESSION_MARK}=1`;

async function childrenOf(pid: number): Promise<number[]> {
  const text = await readFile(`/proc/${pid}/task/${pid}/children`, "latin1").catch(() => "");
  return text.split(" ").filter(Boolean).map(Number);
}

const isSession = async (pid: number) =>
  (await readFile(`/proc/${pid}/environ`, "latin1").catch(() => "")).split("\0").includes(MARK);

/**
 * Somebody is logged in at an SSH server. What a session has left running in the background does not count, nor do
 * connections that have not proved who they are.
 */
export async function hasSession({ pid }: ProcessRef): Promise<boolean> {
  const waiting = await childrenOf(pid);
  for (let seen = 0; waiting.length > 0 && seen < MAX_PROCESSES; seen++) {
    const next = waiting.shift() ?? 0;
    if (await isSession(next)) return true;
    waiting.push(...(await childrenOf(next)));
  }
  return false;
}
