import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { type App, transact } from "../app.ts";
import { transition } from "../domain/lifecycle.ts";
import { SYSTEM } from "../domain/principal.ts";
import { currentSecrets } from "../environment-secrets.ts";
import { advanceEnvironment } from "../store/environment-steps.ts";
import { lockEnvironment } from "../store/environments.ts";
import { Topic } from "../store/hub.ts";
import {
  claimSecretChange,
  concernedEnvironmentIds,
  keepSecretChange,
  type SecretChange,
  settleSecretChange,
} from "../store/secret-delivery.ts";
import { alone, BATCH, type Sweep } from "./sweep.ts";

/** How long a change that somebody has taken up and not finished waits for the next one. */
const LEASE_MS = 30_000;

/** Gives an environment that is to run the secrets of this moment; nothing happens if it has them. */
async function refreshSecrets(app: App, environmentId: string): Promise<void> {
  await transact(app, async (tx, touched) => {
    const stored = await lockEnvironment(tx, environmentId);
    if (stored?.spec.desiredPhase !== EnvironmentPhase.RUNNING) return;
    const secrets = await currentSecrets(app, tx, stored, false);
    const move = transition(stored, { spec: { ...stored.spec, secrets } }, app.now());
    if (move.kind !== "changed") return;
    const by = { actor: SYSTEM, newId: app.newId, action: "Secrets of the environment changed", at: app.now() };
    if (await advanceEnvironment(tx, stored, move.next, by)) touched(stored.metadata.runnerId);
  });
}

/** Tells every environment that a change concerns, each in a transaction of its own; true if all of them know. */
async function tell(app: App, change: SecretChange): Promise<boolean> {
  const lease = () => new Date(app.now().getTime() + LEASE_MS);
  let isTold = true;
  for (let after = ""; ; ) {
    const ids = await concernedEnvironmentIds(app.db.list, change, after, BATCH);
    for (const environmentId of ids) {
      const what = { sweep: secretChanges.name, environmentId };
      if (!(await alone(app, what, () => refreshSecrets(app, environmentId)))) isTold = false;
    }
    after = ids.at(-1) ?? "";
    if (ids.length < BATCH) return isTold;
    await keepSecretChange(app.db.write, change, lease());
  }
}

/**
 * Secrets that have changed on their way into the environments that are to run; the others get them at their start. A
 * change stays in its table until every environment has what it should: whoever looks next goes on after a crash.
 */
export const secretChanges: Sweep = {
  name: "secret changes",
  everyMs: 5_000,
  topic: Topic.SECRETS,
  async run(app) {
    const now = app.now();
    const change = await claimSecretChange(app.db.write, now, new Date(now.getTime() + LEASE_MS));
    if (!change) return false;
    if (await tell(app, change)) await settleSecretChange(app.db.write, change);
    return true;
  },
};
