import type { Socket } from "node:net";
import { fileURLToPath } from "node:url";
import { connectSupervisor, type SupervisorClient } from "./client.ts";
import { type SupervisorConfig, WAIT, writeSupervisorConfig } from "./config.ts";
import { type Enclosed, type Enclosure, spawnEnclosed } from "./enclosure.ts";
import { withProcessLimit } from "./process-limit.ts";
import { type ProcessRef, readProcess } from "./processes.ts";
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
/** What a supervisor runs. */
export const PROGRAM = fileURLToPath(
  new URL(import.meta.url.endsWith(".ts") ? "./main.ts" : "./main.js", import.meta.url),
);

function startProcess(
  argument: string,
  environmentId: string | undefined,
  compiledFolder?: string,
  enclosure?: Enclosure,
): Enclosed {
  const { file, args } = withProcessLimit([process.execPath, PROGRAM, argument]);
  return spawnEnclosed(enclosure, file, args, {
    stdin: argument === WAIT ? "pipe" : "ignore",
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
export function startWaiting(compiledFolder: string, enclosure?: Enclosure): Enclosed {
  const waiting = startProcess(WAIT, undefined, compiledFolder, enclosure);
  const { child } = waiting;
  child.once("error", () => undefined);
  child.stdin?.on("error", () => undefined);
  child.unref();
  for (const stream of child.stdio) (stream as Socket | null)?.unref();
  return waiting;
}

/** Resolves with its process once a supervisor serves; SupervisorStartError if it ends or is silent for 20 s. */
async function serving({ child, pid, entered }: Enclosed): Promise<ProcessRef | undefined> {
  let errors = "";
  let inner: number | undefined;
  child.stderr?.setEncoding("utf8").on("data", (chunk: string) => {
    errors = (errors + chunk).slice(0, 4096);
  });
  void pid.then((found) => {
    inner = found;
  });
  for (const stream of child.stdio) (stream as Socket | null)?.ref();
  try {
    await new Promise<void>((resolve, reject) => {
      const late = () => {
        // The one around it would leave it running.
        if (inner !== undefined && inner !== child.pid) kill(inner);
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
    // Long since, but it may not have been heard.
    await entered;
    return readProcess((await pid) ?? 0);
  } finally {
    for (const stream of child.stdio) stream?.destroy();
    child.unref();
  }
}

/** Ends one that waits, whatever is around it. */
export async function endWaiting({ child, pid }: Enclosed): Promise<void> {
  child.kill("SIGKILL");
  child.stdin?.destroy();
  const inner = await pid;
  if (inner !== undefined && inner !== child.pid) kill(inner);
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // Gone meanwhile.
  }
}

/** Has a waiting supervisor serve; undefined if it has died, so that another one must be started. */
async function told(waiting: Enclosed, configPath: string): Promise<ProcessRef | undefined> {
  const { child } = waiting;
  if (child.exitCode !== null || child.signalCode !== null) return undefined;
  child.stdin?.write(`${configPath}\n`);
  try {
    return await serving(waiting);
  } catch (error) {
    if (error instanceof SupervisorStartError && error.code !== null) throw error;
    return undefined;
  }
}

/** How a supervisor is started. */
export interface LaunchOptions {
  /** One that has loaded its program; it is what serves, if it still lives. */
  waiting?: Enclosed | undefined;
  /** What it runs in, if one is started. */
  enclosure?: Enclosure;
  /** Hears of its process as soon as others may join it in the enclosure. */
  onEntered?: (process: ProcessRef) => void;
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
  { waiting, enclosure, onEntered }: LaunchOptions = {},
): Promise<{ record: SupervisorRecord; client: SupervisorClient }> {
  writeSupervisorConfig(configPath, config);
  let started = waiting && (await told(waiting, configPath));
  if (!started) {
    const enclosed = startProcess(configPath, config.environmentId, compiledFolder, enclosure);
    void enclosed.entered.then((pid) => {
      const present = readProcess(pid ?? 0);
      if (present) onEntered?.(present);
    });
    started = await serving(enclosed);
  }
  if (!started) throw new SupervisorStartError("the supervisor ended at once", null);
  return {
    record: { pid: started.pid, startTime: started.startTime, version: config.version },
    client: connectSupervisor(config.socketPath, config.environmentId, { uid: config.uid }),
  };
}
