import { type ChildProcess, spawn } from "node:child_process";
import type { Socket } from "node:net";
import { fileURLToPath } from "node:url";
import { connectSupervisor, type SupervisorClient } from "./client.ts";
import { type SupervisorConfig, WAIT, writeSupervisorConfig } from "./config.ts";
import { withProcessLimit } from "./process-limit.ts";
import { readProcess } from "./processes.ts";
import type { SupervisorRecord } from "./record.ts";

/** Exit code of a supervisor that finds another one at work. */
export const ANOTHER_SERVES = 3;

/** The supervisor ended instead of serving; `code` 2 = configuration, 3 = another one serves already. */
export class SupervisorStartError extends Error {
  readonly code: number | null;

  constructor(message: string, code: number | null) {
    super(message);
    this.code = code;
  }
}

const START_DEADLINE_MS = 20_000;
const PROGRAM = fileURLToPath(new URL(import.meta.url.endsWith(".ts") ? "./main.ts" : "./main.js", import.meta.url));

function startProcess(argument: string, environmentId: string | undefined, compiledFolder?: string): ChildProcess {
  const { file, args } = withProcessLimit([process.execPath, PROGRAM, argument]);
  return spawn(file, args, {
    cwd: "/",
    detached: true,
    stdio: [argument === WAIT ? "pipe" : "ignore", "pipe", "pipe"],
    env: {
      ...{ UV_THREADPOOL_SIZE: "16" },
      ...(environmentId && { BERTH_ENVIRONMENT_ID: environmentId }),
      ...(compiledFolder && { NODE_COMPILE_CACHE: compiledFolder }),
    },
  });
}

/**
 * Starts a supervisor that loads its program, then waits to be told its environment by `launchSupervisor`. It ends when
 * its input does, and so with this process. It does not carry the mark of its environment later, only its user: there
 * must be one.
 */
export function startWaiting(compiledFolder: string): ChildProcess {
  const child = startProcess(WAIT, undefined, compiledFolder);
  child.once("error", () => undefined);
  child.stdin?.on("error", () => undefined);
  child.unref();
  for (const stream of [child.stdin, child.stdout, child.stderr]) (stream as Socket | null)?.unref();
  return child;
}

/** Resolves once a supervisor serves; SupervisorStartError if it ends or is silent for 20 s. */
async function serving(child: ChildProcess): Promise<void> {
  let errors = "";
  child.stderr?.setEncoding("utf8").on("data", (chunk: string) => {
    errors = (errors + chunk).slice(0, 4096);
  });
  for (const stream of [child.stdout, child.stderr]) (stream as Socket | null)?.ref();
  try {
    await new Promise<void>((resolve, reject) => {
      const late = () => {
        child.kill("SIGKILL");
        reject(new SupervisorStartError("the supervisor did not start in time", null));
      };
      const timer = setTimeout(late, START_DEADLINE_MS);
      const settle = (error?: Error) => {
        clearTimeout(timer);
        if (error) reject(error);
        else resolve();
      };
      child.once("error", settle);
      child.once("close", (code) => settle(new SupervisorStartError(errors.trim() || "the supervisor ended", code)));
      child.stdout?.once("data", () => settle());
    });
  } finally {
    for (const stream of [child.stdin, child.stdout, child.stderr]) stream?.destroy();
    child.unref();
  }
}

/** Has a waiting supervisor serve; false if it has died, so that another one must be started. */
async function told(waiting: ChildProcess, configPath: string): Promise<boolean> {
  if (waiting.exitCode !== null || waiting.signalCode !== null) return false;
  waiting.stdin?.write(`${configPath}\n`);
  try {
    await serving(waiting);
    return true;
  } catch (error) {
    if (error instanceof SupervisorStartError && error.code !== null) throw error;
    return false;
  }
}

/**
 * Writes the configuration (as root, to a directory the environment's user cannot write) and starts a supervisor that
 * outlives this process. Resolves once it serves; SupervisorStartError if it ends or is silent for 20 s. With a folder
 * for compiled code, which must be the starter's own, later ones start in half the time; one that waits already serves
 * at once.
 */
export async function launchSupervisor(
  configPath: string,
  config: SupervisorConfig,
  compiledFolder?: string,
  waiting?: ChildProcess,
): Promise<{ record: SupervisorRecord; client: SupervisorClient }> {
  writeSupervisorConfig(configPath, config);
  let child = waiting;
  if (!child || !(await told(child, configPath))) {
    child = startProcess(configPath, config.environmentId, compiledFolder);
    await serving(child);
  }
  const started = child.pid === undefined ? undefined : readProcess(child.pid);
  if (!started) throw new SupervisorStartError("the supervisor ended at once", null);
  return {
    record: { pid: started.pid, startTime: started.startTime, version: config.version },
    client: connectSupervisor(config.socketPath, config.environmentId, { uid: config.uid }),
  };
}
