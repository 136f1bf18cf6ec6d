import { Code, ConnectError } from "@connectrpc/connect";

/** Runs at most `parallel` pieces of work at once and lets `waiting` more queue; beyond that RESOURCE_EXHAUSTED. */
export function gate(parallel: number, waiting: number): <T>(work: () => Promise<T>) => Promise<T> {
  const queue: (() => void)[] = [];
  let running = 0;
  return async (work) => {
    if (running >= parallel) {
      if (queue.length >= waiting) throw new ConnectError("too many requests of this kind", Code.ResourceExhausted);
      await new Promise<void>((resolve) => queue.push(resolve));
    } else running++;
    try {
      return await work();
    } finally {
      // The place passes on to the next in line without becoming free in between.
      const next = queue.shift();
      if (next) next();
      else running--;
    }
  };
}
