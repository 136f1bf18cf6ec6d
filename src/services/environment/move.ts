import { EnvironmentPhase } from "../../../gen/gitpod/v1/environment_pb.js";
import { type App, actorOf } from "../../app.ts";
import { denied, precondition } from "../../domain/errors.ts";
import type { Transition } from "../../domain/lifecycle.ts";
import type { Caller } from "../../domain/principal.ts";
import type { Tx } from "../../store/db.ts";
import { advanceEnvironment } from "../../store/environment-steps.ts";
import type { StoredEnvironment } from "../../store/environments.ts";

/** PERMISSION_DENIED for a caller who sees the environment without the right to do this with it. */
export function allow(allowed: boolean, action: string): void {
  if (!allowed) throw denied(`you may see this environment, but not ${action} it`);
}

/**
 * Applies a transition that a caller asked for to an environment that the transaction holds locked. True if its runner
 * has to look at it.
 */
export async function apply(
  app: App,
  tx: Tx,
  caller: Caller,
  stored: StoredEnvironment,
  transition: Transition,
  action?: string,
): Promise<boolean> {
  if (transition.kind === "refused") throw precondition(transition.reason);
  if (transition.kind === "noop") return false;
  const { next } = transition;
  const by = { actor: actorOf(caller), newId: app.newId, action, at: app.now() };
  await advanceEnvironment(tx, stored, next, by);
  return next.changed.spec || next.status.phase === EnvironmentPhase.DELETED;
}
