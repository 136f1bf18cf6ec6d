/** Whether the server can take calls, and why not. */
export interface Ready {
  ok: boolean;
  reason?: string;
}

export interface Readiness {
  /** Never rejects. An answer is kept for a second, since anybody may ask and each one costs a query. */
  check(): Promise<Ready>;
}

const KEEP_MS = 1000;
const DEADLINE_MS = 5000;

/** Readiness as `ready` tells it, until `draining` aborts. */
export function readinessOf(ready: () => Promise<Ready>, draining: AbortSignal): Readiness {
  let asked: Promise<Ready> | undefined;
  let askedAt = Number.NEGATIVE_INFINITY;
  const ask = async (): Promise<Ready> => {
    const deadline = Promise.withResolvers<Ready>();
    const timer = setTimeout(() => deadline.resolve({ ok: false, reason: "the check took too long" }), DEADLINE_MS);
    const answer = (async () => ready())().catch(() => ({ ok: false, reason: "the check failed" }));
    return Promise.race([answer, deadline.promise]).finally(() => clearTimeout(timer));
  };
  return {
    async check() {
      if (draining.aborted) return { ok: false, reason: "draining" };
      if (!asked || performance.now() - askedAt > KEEP_MS) {
        askedAt = performance.now();
        asked = ask();
      }
      return asked;
    },
  };
}
