import { type ChildProcess, spawn } from "node:child_process";
import { chmod, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { environmentProcesses } from "../../src/runner/supervisor/processes.ts";
import { freePort } from "./free-port.ts";
import { eventually } from "./wait.ts";

const MAIN = fileURLToPath(new URL("../../src/main.ts", import.meta.url));
const READY_MS = 60_000;
const TOKEN = /^export BERTH_TOKEN=(berth_pat_\w{49})$/m;

/** The product as an operator runs it: a process with an embedded database and, unless switched off, a runner. */
export interface Installation extends AsyncDisposable {
  url: string;
  runnerUrl: string;
  dataDir: string;
  adminToken: string;
  /** Everything the process has printed, over all its starts. */
  output(): string;
  /** Ids of the processes that belong to an environment. */
  processesOf(environmentId: string): Promise<number[]>;
  /** Kills the process without warning. */
  kill(): Promise<void>;
  /** Asks it to end and resolves with its exit code. */
  terminate(): Promise<number | null>;
  /** Starts it again on the same data. */
  start(): Promise<void>;
  /** Process id of the running process. */
  pid(): number;
}

/** Starts `berth` in a fresh data directory; `env` are BERTH_* variables on top of free ports. */
export async function startInstallation(env: Record<string, string> = {}, around = tmpdir()): Promise<Installation> {
  const dataDir = await mkdtemp(join(around, "berth-"));
  await chmod(dataDir, 0o711);
  const [port, runnerPort] = [await freePort(), await freePort()];
  const settings = {
    PATH: process.env.PATH ?? "",
    HOME: process.env.HOME ?? "/",
    BERTH_DATA_DIR: dataDir,
    BERTH_PORT: String(port),
    BERTH_RUNNER_PORT: String(runnerPort),
    BERTH_RATE_LIMIT: "0",
    BERTH_RUNNER_CONTAINER_ENGINE: "none",
    ...env,
  };
  let child: ChildProcess | undefined;
  let output = "";

  const start = async () => {
    const started = spawn(process.execPath, [MAIN], { env: settings, stdio: ["ignore", "pipe", "pipe"] });
    child = started;
    const from = output.length;
    const collect = (chunk: Buffer) => {
      output += chunk.toString();
    };
    started.stdout.on("data", collect);
    started.stderr.on("data", collect);
    const ready = () => output.slice(from).includes("berth is ready");
    await eventually(
      () => {
        if (started.exitCode !== null) throw new Error(`berth ended with ${started.exitCode}:\n${output.slice(from)}`);
        return ready();
      },
      "berth is ready",
      READY_MS,
    );
  };
  const ended = (signal: NodeJS.Signals) =>
    new Promise<number | null>((resolve) => {
      if (!child || child.exitCode !== null || child.signalCode !== null) return resolve(child?.exitCode ?? null);
      child.once("exit", (code) => resolve(code));
      child.kill(signal);
    });

  await start();
  return {
    url: `http://127.0.0.1:${port}`,
    runnerUrl: `http://127.0.0.1:${runnerPort}`,
    dataDir,
    adminToken: TOKEN.exec(output)?.[1] ?? env.BERTH_BOOTSTRAP_ADMIN_TOKEN ?? "",
    output: () => output,
    processesOf: async (environmentId) => (await environmentProcesses({ environmentId })).map((each) => each.pid),
    kill: async () => void (await ended("SIGKILL")),
    terminate: () => ended("SIGTERM"),
    start,
    pid: () => child?.pid ?? 0,
    async [Symbol.asyncDispose]() {
      await ended("SIGTERM");
      await rm(dataDir, { recursive: true, force: true });
    },
  };
}
