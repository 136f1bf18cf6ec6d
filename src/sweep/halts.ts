import { type App, transact } from "../app.ts";
import { SYSTEM } from "../domain/principal.ts";
import { lockEnvironment } from "../store/environments.ts";
import { closeHalt, dueHalts, type Halt, haltedIds, haltHolds, postponeHalt, stopHalted } from "../store/halts.ts";
import { alone, BATCH, type Sweep } from "./sweep.ts";

// Longer than a call that was let in before an order can still take to create or start an environment.
const SETTLED_MS = 10 * 60_000;
const EVERY_MS = 2_000;

/** Stops one environment, if its creator may still not run any, or its runner still be used by nobody. */
async function stop(app: App, halt: Halt, environmentId: string): Promise<void> {
  await transact(app, async (tx, touched) => {
    if (!(await haltHolds(tx, halt))) return;
    const environment = await lockEnvironment(tx, environmentId);
    const by = { actor: SYSTEM, newId: app.newId, at: app.now() };
    if (environment && (await stopHalted(tx, halt, environment, by))) touched(environment.metadata.runnerId);
  });
}

/** Looks at an order again after as long as it has been there; ends one that no longer holds, or has nothing to stop. */
async function settle(app: App, halt: Halt, isQuiet: boolean): Promise<void> {
  const now = app.now().getTime();
  const ageMs = now - halt.createdAt.getTime();
  await transact(app, async (tx) => {
    if (!(await haltHolds(tx, halt)) || (isQuiet && ageMs >= SETTLED_MS)) await closeHalt(tx, halt);
    else await postponeHalt(tx, halt, new Date(now + (isQuiet ? Math.max(EVERY_MS, ageMs) : EVERY_MS)));
  });
}

/** Environments of those who may run none any more. */
export const halts: Sweep = {
  name: "halts",
  everyMs: EVERY_MS,
  async run(app) {
    const due = await dueHalts(app.db.list, app.now(), BATCH);
    let done = 0;
    for (const halt of due) {
      const { subjectId } = halt;
      const ids = await haltedIds(app.db.list, halt, BATCH);
      for (const environmentId of ids)
        await alone(app, { sweep: halts.name, subjectId, environmentId }, () => stop(app, halt, environmentId));
      const settling = () => settle(app, halt, ids.length === 0);
      if (await alone(app, { sweep: halts.name, subjectId }, settling)) done += 1;
    }
    return due.length === BATCH && done > 0;
  },
};
