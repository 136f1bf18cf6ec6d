import type { App } from "../../app.ts";
import { databaseRefusal, Refusal } from "../../domain/errors.ts";

/** What became of the items of one call. */
export interface Outcome<I, O> {
  done: O[];
  failed: { index: number; item: I; error: string }[];
}

function failureText(app: App, error: unknown): string {
  const refusal = error instanceof Refusal ? error : databaseRefusal(error);
  if (refusal) return `${refusal.kind}: ${refusal.message}`;
  app.log.error({ err: error, code: "internal" }, "an item of a call failed");
  return "internal: the server failed";
}

/** Does the work for each item in turn, each in a transaction of its own: the failure of one holds up nothing else. */
export async function forEach<I, O>(
  app: App,
  items: readonly I[],
  work: (item: I) => Promise<O>,
): Promise<Outcome<I, O>> {
  const outcome: Outcome<I, O> = { done: [], failed: [] };
  for (const [index, item] of items.entries()) {
    try {
      outcome.done.push(await work(item));
    } catch (error) {
      outcome.failed.push({ index, item, error: failureText(app, error) });
    }
  }
  return outcome;
}
