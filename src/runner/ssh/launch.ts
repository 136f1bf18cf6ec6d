import { createConnection, createServer } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import type { RecordedProcess } from "../record.ts";
import { invocation, type RunAs } from "../supervisor/namespaces.ts";
import { bootId, isAlive, processEnd, readProcess, spawnSession, terminateSession } from "../supervisor/processes.ts";

const READY_MS = 10_000;
const POLL_MS = 50;
// It is there soon after it was started.
const FIRST_POLL_MS = 5;
const BANNER = "SSH-";
const ANY_ADDRESS: Readonly<Record<string, string>> = { "0.0.0.0": "127.0.0.1", "::": "::1" };

/** Nothing listens there at the moment. */
export function isFree(address: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = createServer();
    probe.once("error", () => resolve(false));
    probe.listen({ host: address, port, exclusive: true }, () => probe.close(() => resolve(true)));
  });
}

/** Whether something there greets as an SSH server does. */
function greets(host: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ host, port, timeout: 1000 });
    let text = "";
    const settle = (isServer: boolean) => {
      socket.destroy();
      resolve(isServer);
    };
    socket.on("data", (chunk) => {
      text += chunk.toString("latin1");
      if (text.length >= BANNER.length) settle(text.startsWith(BANNER));
    });
    for (const event of ["error", "close", "timeout"]) socket.once(event, () => settle(false));
  });
}

export interface Launch {
  program: string;
  configFile: string;
  logFile: string;
  env: Record<string, string>;
  user: RunAs | undefined;
  address: string;
  port: number;
  /** Remembers the server before anything else is done, so that a later runner process finds it. */
  onStart(process: RecordedProcess): Promise<void>;
}

/** Starts an SSH server that outlives this process; false if it ended, as it does when it cannot have the port. */
export async function launchSshd(launch: Launch, signal: AbortSignal): Promise<boolean> {
  const options = ["-D", "-f", launch.configFile, "-E", launch.logFile];
  const { file, args, ...place } = invocation(launch.program, options, { cwd: "/", ...launch.user });
  const child = spawnSession(file, args, { ...place, env: launch.env, output: "ignore" });
  const ended = processEnd(child).catch(() => undefined);
  child.unref();
  const found = child.pid === undefined ? undefined : readProcess(child.pid);
  if (!found) return false;
  const server: RecordedProcess = { pid: found.pid, startTime: found.startTime, bootId: bootId() };
  await launch.onStart(server);
  const host = ANY_ADDRESS[launch.address] ?? launch.address;
  const deadline = Date.now() + READY_MS;
  let pauseMs = FIRST_POLL_MS;
  while (isAlive(server) && Date.now() < deadline && !signal.aborted) {
    const isUp = await greets(host, launch.port);
    // Somebody else may greet there while the server is on its way to find the port taken.
    if (isUp) await Promise.race([ended, delay(POLL_MS)]);
    if (isUp && isAlive(server)) return true;
    await delay(pauseMs);
    pauseMs = Math.min(POLL_MS, pauseMs * 2);
  }
  await terminateSession(server, 0);
  signal.throwIfAborted();
  return false;
}
