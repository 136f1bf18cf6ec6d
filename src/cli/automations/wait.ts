import { setTimeout as delay } from "node:timers/promises";
import { Code, ConnectError } from "@connectrpc/connect";
import { ExitCode } from "../exit.ts";
import type { Terminal } from "../output.ts";

const LOOK_MS = 500;
const OUTAGE_MS = 60_000;

/** Reads something until it is as wanted or `signal` ends waiting; a control plane that starts again in between is waited for. */
export async function waitUntil<T>(
  read: () => Promise<T>,
  accept: (value: T) => boolean,
  signal: AbortSignal,
): Promise<T> {
  for (let answeredAt = performance.now(); ; ) {
    try {
      const value = await read();
      if (accept(value)) return value;
      answeredAt = performance.now();
    } catch (error) {
      const isOutage = error instanceof ConnectError && error.code === Code.Unavailable;
      if (!isOutage || performance.now() - answeredAt > OUTAGE_MS) throw error;
    }
    await delay(LOOK_MS, undefined, { signal });
  }
}

/** Does something that may take long until Ctrl-C, which is answered with `farewell`. */
export async function untilInterrupted(
  terminal: Terminal,
  work: (signal: AbortSignal) => Promise<ExitCode>,
  farewell?: string,
): Promise<ExitCode> {
  const controller = new AbortController();
  const left = terminal.interrupted().then(() => {
    controller.abort();
    if (farewell) terminal.tell(farewell);
    return ExitCode.INTERRUPTED;
  });
  const working = work(controller.signal).catch((error: unknown) => {
    if (controller.signal.aborted) return ExitCode.INTERRUPTED;
    throw error;
  });
  return await Promise.race([left, working]);
}
