import type { ChildProcess } from "node:child_process";
import type { IncomingMessage, ServerResponse } from "node:http";
import { isAbsolute } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { linesOf } from "./automation/link.ts";
import { type ContainedRun, EXIT_CODE, PASSED_ON } from "./contained.ts";
import {
  exitCodeOf,
  type ProcessRef,
  processEnd,
  readProcess,
  sessionMembers,
  spawnSession,
  terminateSession,
} from "./processes.ts";

// The far end of a command that runs in a dev container while a supervisor on the host looks after it: that one has a
// process of its own for it (enter.ts), which tells what to run and passes signals on, and gets output and exit code.

const MAX_LINE_BYTES = 4 * 1024 * 1024;
const DRAIN_MS = 1000;
const NOT_STARTED = 127;
// Both streams are one, so that their order is kept.
const MERGED = ["-c", 'exec "$@" 2>&1', "sh"];

const isTexts = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((each) => typeof each === "string" && !each.includes("\0"));

function parsed(line: string): ContainedRun {
  const { argv, cwd, variables } = JSON.parse(line) as Record<string, unknown>;
  const isFolder = typeof cwd === "string" && isAbsolute(cwd) && !cwd.includes("\0");
  if (!isTexts(argv) || argv.length === 0 || !isFolder) throw new Error("is no command");
  const entries = Object.entries(Object(variables)).filter(([name, text]) => isTexts([name, text]));
  return { argv, cwd, variables: Object.fromEntries(entries) as Record<string, string> };
}

/** Runs the command that a request tells of, and answers with its output; it ends with the connection. */
export async function serveContainedRun(
  request: IncomingMessage,
  response: ServerResponse,
  environment: (more: Readonly<Record<string, string>>) => Record<string, string>,
): Promise<void> {
  const lines = linesOf(request, MAX_LINE_BYTES);
  const first = await lines.next();
  const { argv, cwd, variables } = parsed(first.value ?? "");
  const env = environment(variables);
  response.writeHead(200, { "content-type": "application/octet-stream", trailer: EXIT_CODE });
  response.flushHeaders();
  const child = spawnSession("/bin/sh", [...MERGED, ...argv], { cwd, env: { ...env, BERTH_PATH: env.PATH ?? "" } });
  child.stderr?.resume();
  const leader = readProcess(child.pid ?? 0);
  void passOn(lines, leader);
  response.once("close", () => {
    if (leader && child.exitCode === null && child.signalCode === null) void terminateSession(leader, 0);
  });
  const code = await outputOf(child, response);
  response.addTrailers({ [EXIT_CODE]: String(code) });
  response.end();
}

async function outputOf(child: ChildProcess, response: ServerResponse): Promise<number> {
  const { stdout } = child;
  const drained = new Promise((resolve) => stdout?.once("close", resolve));
  stdout?.pipe(response, { end: false });
  try {
    const end = await processEnd(child);
    // Children in the background may hold it open for ever.
    await Promise.race([drained, delay(DRAIN_MS)]);
    return exitCodeOf(end);
  } catch (error) {
    response.write(`${error instanceof Error ? error.message : error}\n`);
    return NOT_STARTED;
  } finally {
    stdout?.unpipe(response);
    stdout?.resume();
  }
}

function signalSession(leader: ProcessRef, signal: NodeJS.Signals): void {
  for (const { pid } of sessionMembers(leader)) {
    try {
      process.kill(pid, signal);
    } catch {
      // It was there a moment ago. Whoever reads the signals must go on, or the connection ends.
    }
  }
}

async function passOn(lines: AsyncIterable<string>, leader: ProcessRef | undefined): Promise<void> {
  try {
    for await (const line of lines) {
      const signal = PASSED_ON.find((each) => each === line);
      if (signal && leader) signalSession(leader, signal);
    }
  } catch {
    // The connection has gone.
  }
}
