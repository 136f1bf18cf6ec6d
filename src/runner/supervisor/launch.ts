import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";
import { connectSupervisor, type SupervisorClient } from "./client.ts";
import { type SupervisorConfig, writeSupervisorConfig } from "./config.ts";
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

/**
 * Writes the configuration (as root, to a directory the environment's user cannot write) and starts a supervisor that
 * outlives this process. Resolves once it serves; SupervisorStartError if it ends or is silent for 20 s. With a folder
 * for compiled code, which must be the starter's own, later ones start in half the time.
 */
export async function launchSupervisor(
  configPath: string,
  config: SupervisorConfig,
  compiledFolder?: string,
): Promise<{ record: SupervisorRecord; client: SupervisorClient }> {
  writeSupervisorConfig(configPath, config);
  const { file, args } = withProcessLimit([process.execPath, PROGRAM, configPath]);
  const child = spawn(file, args, {
    cwd: "/",
    detached: true,
    stdio: ["ignore", "pipe", "pipe"],
    env: {
      ...{ BERTH_ENVIRONMENT_ID: config.environmentId, UV_THREADPOOL_SIZE: "16" },
      ...(compiledFolder && { NODE_COMPILE_CACHE: compiledFolder }),
    },
  });
  let errors = "";
  child.stderr.setEncoding("utf8").on("data", (chunk: string) => {
    errors = (errors + chunk).slice(0, 4096);
  });
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
      child.stdout.once("data", () => settle());
    });
  } finally {
    child.stdout.destroy();
    child.stderr.destroy();
    child.unref();
  }
  const started = child.pid === undefined ? undefined : readProcess(child.pid);
  if (!started) throw new SupervisorStartError("the supervisor ended at once", null);
  return {
    record: { pid: started.pid, startTime: started.startTime, version: config.version },
    client: connectSupervisor(config.socketPath, config.environmentId, { uid: config.uid }),
  };
}
