import { setTimeout as delay } from "node:timers/promises";

const DEADLINE_MS = 30_000;
const STEP_MS = 25;

/** Waits until `probe` gives something, asking again every few milliseconds; fails after a deadline with what was seen last. */
export async function eventually<T>(
  probe: () => Promise<T | undefined | false> | T | undefined | false,
  what: string,
  deadlineMs = DEADLINE_MS,
  stepMs = STEP_MS,
): Promise<T> {
  const end = Date.now() + deadlineMs;
  let seen: unknown;
  while (Date.now() < end) {
    try {
      const value = await probe();
      if (value) return value;
      seen = value;
    } catch (error) {
      seen = error;
    }
    await delay(stepMs);
  }
  throw new Error(
    `${what} did not happen within ${deadlineMs} ms; last seen: ${seen instanceof Error ? seen.stack : JSON.stringify(seen)}`,
  );
}
