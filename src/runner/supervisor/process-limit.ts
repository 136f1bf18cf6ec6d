import { readFileSync } from "node:fs";

/** Processes and threads that an environment may have at once: more than work needs, fewer than a host bears. */
export const MAX_PROCESSES = 8192;

// Shells disagree on the letter. The one that exists replaces itself by the program, so that the pid stays.
const SCRIPT = 'ulimit -u "$0" 2>/dev/null || ulimit -p "$0" 2>/dev/null; exec "$@"';

/** What is in force here already, which may be less. */
function presentLimit(): number {
  const soft = /^Max processes\s+(\d+)/m.exec(readFileSync("/proc/self/limits", "latin1"))?.[1];
  return soft === undefined ? Number.POSITIVE_INFINITY : Number(soft);
}

/** The limit for an environment that is started here. */
export const processLimit = (): number => Math.min(MAX_PROCESSES, presentLimit());

/** A command that becomes this one, with a limit on the processes of its user that everything it starts inherits. */
export function withProcessLimit(command: readonly string[]): { file: string; args: string[] } {
  return { file: "/bin/sh", args: ["-c", SCRIPT, String(processLimit()), ...command] };
}
