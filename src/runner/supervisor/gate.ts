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

/** Lets at most `max` streams be read at once; one more is RESOURCE_EXHAUSTED. */
export function streamGate(max: number): <T>(messages: AsyncIterable<T>) => AsyncGenerator<T> {
  let open = 0;
  return async function* (messages) {
    if (open >= max) throw new ConnectError("too many streams are open", Code.ResourceExhausted);
    open++;
    try {
      yield* messages;
    } finally {
      open--;
    }
  };
}
