import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

const READY_MS = 60_000;

/** A program that has said it is ready. */
export interface Started {
  child: ChildProcess;
  pid: number;
  /** From its start until it said so. */
  ms: number;
  /** Sends a signal and waits for the end. */
  stop(signal: NodeJS.Signals): Promise<void>;
}

interface Program {
  command: string;
  args: readonly string[];
  env?: NodeJS.ProcessEnv;
  uid?: number;
  gid?: number;
  cwd?: string;
}

/** Starts a program and waits until a text appears in its output; without a text, until it ends. */
export async function start(program: Program, ready?: string): Promise<Started> {
  const { command, args, ...options } = program;
  const from = performance.now();
  const child = spawn(command, args, { ...options, stdio: ["ignore", "pipe", "pipe"] });
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  let output = "";
  const collect = (chunk: Buffer) => {
    output += chunk.toString();
    if (ready && output.includes(ready)) resolve(performance.now() - from);
  };
  child.stdout.on("data", collect);
  child.stderr.on("data", collect);
  child.once("error", reject);
  child.once("exit", (code) => {
    if (ready === undefined && code === 0) resolve(performance.now() - from);
    else reject(new Error(`${command} ended with ${code}:\n${output.slice(-2000)}`));
  });
  const late = setTimeout(() => {
    child.kill("SIGKILL");
    reject(new Error(`${command} was not ready within ${READY_MS} ms:\n${output.slice(-2000)}`));
  }, READY_MS);
  const ms = await promise.finally(() => clearTimeout(late));
  return {
    ...{ child, pid: child.pid ?? 0, ms },
    async stop(signal) {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const ended = once(child, "exit");
      child.kill(signal);
      const timer = setTimeout(() => child.kill("SIGKILL"), READY_MS);
      await ended;
      clearTimeout(timer);
    },
  };
}

/** How the embedded Postgres of a data folder was started, while it runs. */
export async function runningPostgres(dataDir: string): Promise<Program> {
  const pid = (await readFile(join(dataDir, "postgres", "data", "postmaster.pid"), "utf8")).split("\n")[0];
  const [command = "", ...args] = (await readFile(`/proc/${pid}/cmdline`, "utf8")).split("\0").slice(0, -1);
  const status = await readFile(`/proc/${pid}/status`, "utf8");
  const id = (name: string) => Number(new RegExp(`^${name}:\\t(\\d+)`, "m").exec(status)?.[1]);
  // Only root may say whose a process is.
  const owner = process.getuid?.() === 0 ? { uid: id("Uid"), gid: id("Gid") } : {};
  return { command, args, ...owner, cwd: "/", env: { PATH: process.env.PATH, LC_ALL: "C" } };
}

/** Memory of a process that is in RAM, in MB. */
export async function residentMb(pid: number): Promise<number> {
  const kib = /^VmRSS:\s+(\d+)/m.exec(await readFile(`/proc/${pid}/status`, "utf8"))?.[1];
  return (Number(kib) * 1024) / 1e6;
}
