import type { App } from "../app.ts";

/** Rows that a sweep takes at a time. */
export const BATCH = 50;

/** A piece of clock-driven work. It takes due rows under a lock, so that any number of replicas may run it at once. */
export interface Sweep {
  name: string;
  everyMs: number;
  /** Topic of the hub that says that there is work before the interval is over. */
  topic?: string;
  /** Does at most one batch; true if there may be more. */
  run(app: App): Promise<boolean>;
}

/** Does a piece of work by itself: its failure is logged and holds up nothing else. True if it went well. */
export async function alone(app: App, what: Record<string, string>, work: () => Promise<unknown>): Promise<boolean> {
  try {
    await work();
    return true;
  } catch (error) {
    app.log.error({ err: error, ...what }, "part of a sweep failed and will be tried again");
    return false;
  }
}
