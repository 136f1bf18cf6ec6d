import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerPhase, RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, runnerChange, transact } from "../app.ts";
import { nextDeadline, runnerReturned, runnerUnreachable, runTimers, tombstoneEnd } from "../domain/lifecycle.ts";
import { SYSTEM } from "../domain/principal.ts";
import { POPULARITY_WINDOW_MS } from "../domain/project.ts";
import { DELETE_DEADLINE_MS } from "../domain/runner.ts";
import { rotateSigningKeys } from "../signing.ts";
import { purgeExecutions } from "../store/automation/executions.ts";
import type { Tx } from "../store/db.ts";
import { advanceEnvironment } from "../store/environment-steps.ts";
import {
  claimDueEnvironment,
  dueEnvironmentIds,
  environmentIdsOfRunner,
  lockEnvironment,
  postpone,
  purgeEnvironment,
  type StoredEnvironment,
} from "../store/environments.ts";
import { purgeExpiredHostTokens } from "../store/host-tokens.ts";
import { purgeLogins } from "../store/logins.ts";
import { record } from "../store/record.ts";
import {
  purgeAudit,
  purgeCalls,
  purgeEvents,
  purgeProjectUses,
  purgeRevisions,
  trimRevisions,
} from "../store/retention.ts";
import {
  claimLostRunners,
  claimSilentDeletions,
  closeLapse,
  type Lapse,
  lostSince,
  markDeleted,
  openLapses,
  type StoredRunner,
  setRunnerStatus,
} from "../store/runners.ts";
import { purgeExpiredTokens } from "../store/tokens.ts";
import { dueArchives, dueDeletions } from "./archive.ts";
import { halts } from "./halts.ts";
import { projectDeletions, projectPopularity } from "./projects.ts";
import { secretChanges } from "./secrets.ts";
import { alone, BATCH, type Sweep } from "./sweep.ts";

const RETENTION_BATCH = 5_000;
const KEPT_REVISIONS = 10_000;
const KEPT_EXECUTION_DAYS = 30;
const DAY_MS = 24 * 60 * 60_000;
const RETRY_MS = 60_000;

async function advanceDue(app: App, tx: Tx, stored: StoredEnvironment): Promise<boolean> {
  const now = app.now();
  const end = tombstoneEnd(stored);
  if (end && end <= now) {
    await purgeEnvironment(tx, stored.id);
    return false;
  }
  const move = end ? undefined : runTimers(stored, now);
  const by = { actor: SYSTEM, newId: app.newId, at: now };
  if (move?.kind === "changed" && (await advanceEnvironment(tx, stored, move.next, by))) return true;
  const next = end ?? nextDeadline(stored);
  // A deadline that has passed without a move would come up at every look.
  await postpone(tx, stored.id, next && next <= now ? new Date(now.getTime() + RETRY_MS) : next);
  return false;
}

/** Start deadlines, idle timeouts, warnings that fall due, and the end of tombstones. */
const dueEnvironments: Sweep = {
  name: "due environments",
  everyMs: 5_000,
  async run(app) {
    const ids = await dueEnvironmentIds(app.db.list, app.now(), BATCH);
    // A transaction each: locks on several runners at once would get in the way of other sweeps and deletions.
    for (const environmentId of ids) {
      const done = await alone(app, { sweep: dueEnvironments.name, environmentId }, () =>
        transact(app, async (tx, touched) => {
          const stored = await claimDueEnvironment(tx, environmentId, app.now());
          if (stored && (await advanceDue(app, tx, stored))) touched(stored.metadata.runnerId);
        }),
      );
      if (!done) await transact(app, (tx) => postpone(tx, environmentId, new Date(app.now().getTime() + RETRY_MS)));
    }
    return ids.length === BATCH;
  },
};

async function sayLost(app: App, tx: Tx, runner: StoredRunner): Promise<void> {
  if (runner.phase !== RunnerPhase.ACTIVE && runner.phase !== RunnerPhase.DEGRADED) return;
  const since = runner.lastContactAt ?? app.now();
  const message = `no contact since ${since.toISOString()}`;
  const status = create(RunnerStatusSchema, { ...runner.status });
  status.phase = RunnerPhase.INACTIVE;
  status.message = message;
  status.updatedAt = timestampFromDate(since);
  await setRunnerStatus(tx, { runnerId: runner.id, status, leaseMs: "keep", contact: false });
  await record(tx, runnerChange(app, runner, ResourceOperation.UPDATE_STATUS, SYSTEM, "Runner is inactive"));
}

/** Lets an environment say whether its runner can be reached at this moment; true if it can. */
async function showReachability(app: App, environmentId: string, runnerId: string): Promise<boolean> {
  return transact(app, async (tx) => {
    const stored = await lockEnvironment(tx, environmentId);
    const lost = await lostSince(tx, runnerId);
    if (!stored || stored.status.phase === EnvironmentPhase.DELETED) return !lost;
    const shown = lost ? runnerUnreachable(stored, lost, app.now()) : runnerReturned(stored, app.now());
    const by = { actor: SYSTEM, newId: app.newId, at: app.now() };
    if (shown.kind === "changed") await advanceEnvironment(tx, stored, shown.next, by);
    return !lost;
  });
}

/** Tells all environments of a runner, and closes the lapse if nothing changed meanwhile. */
async function settleLapse(app: App, lapse: Lapse): Promise<void> {
  const isBack = (await lostSince(app.db.list, lapse.runnerId)) === undefined;
  let isSteady = true;
  for (const id of await environmentIdsOfRunner(app.db.list, lapse.runnerId)) {
    if ((await showReachability(app, id, lapse.runnerId)) !== isBack) isSteady = false;
  }
  if (isSteady) await closeLapse(app.db.write, lapse, isBack);
}

/**
 * Leases that are over, and runners that are back. A lapse stays open on the row of its runner until every environment
 * carries the warning, or none does any more: whoever looks next goes on where a crash ended this look.
 */
const lostRunners: Sweep = {
  name: "lost runners",
  everyMs: 5_000,
  async run(app) {
    const lost = await transact(app, async (tx) => {
      const claimed = await claimLostRunners(tx, BATCH);
      for (const runner of claimed) await sayLost(app, tx, runner);
      return claimed.length;
    });
    for (let after = "00000000-0000-0000-0000-000000000000"; ; ) {
      const lapses = await openLapses(app.db.list, after, BATCH);
      for (const lapse of lapses) {
        await alone(app, { sweep: lostRunners.name, runnerId: lapse.runnerId }, () => settleLapse(app, lapse));
      }
      if (lapses.length < BATCH) break;
      after = lapses.at(-1)?.runnerId ?? after;
    }
    return lost === BATCH;
  },
};

/** Runners that were told to go and never said goodbye. */
const silentDeletions: Sweep = {
  name: "silent deletions",
  everyMs: 30_000,
  run: (app) =>
    transact(app, async (tx, touched) => {
      const before = new Date(app.now().getTime() - DELETE_DEADLINE_MS);
      const silent = await claimSilentDeletions(tx, before, BATCH);
      for (const runner of silent) {
        await record(
          tx,
          runnerChange(app, runner, ResourceOperation.DELETE, SYSTEM, "Runner deleted without its confirmation"),
        );
        await markDeleted(tx, runner.id, app.now());
        touched(runner.id);
      }
      return silent.length === BATCH;
    }),
};

/** A new key pair for ID tokens every 90 days, and the end of old ones. */
const signingKeys: Sweep = { name: "signing keys", everyMs: 10 * 60_000, run: rotateSigningKeys };

/** A sweep of rows that are kept for a time, or up to a number, only. */
const retention = (name: string, purge: (app: App, limit: number) => Promise<number>): Sweep => ({
  name,
  everyMs: 60_000,
  run: async (app) => (await purge(app, RETENTION_BATCH)) === RETENTION_BATCH,
});

const daysAgo = (app: App, days: number) => new Date(app.now().getTime() - days * DAY_MS);

async function purgeOldAudit(app: App, limit: number): Promise<number> {
  const days = app.config.auditRetentionDays;
  return days > 0 ? app.db.begin((tx) => purgeAudit(tx, daysAgo(app, days), limit)) : 0;
}

export const sweeps: readonly Sweep[] = [
  dueEnvironments,
  lostRunners,
  silentDeletions,
  halts,
  dueArchives,
  dueDeletions,
  signingKeys,
  secretChanges,
  projectDeletions,
  projectPopularity,
  retention("expired tokens", (app, limit) => purgeExpiredTokens(app.db.write, app.now(), limit)),
  retention("ended host tokens", (app, limit) => purgeExpiredHostTokens(app.db.write, daysAgo(app, 30), limit)),
  retention("abandoned logins", (app, limit) => purgeLogins(app.db.write, app.now(), limit)),
  retention("old events", (app, limit) => purgeEvents(app.db.write, daysAgo(app, 1), limit)),
  retention("old revisions", (app, limit) => purgeRevisions(app.db.write, daysAgo(app, 1), limit)),
  retention("excess revisions", (app, limit) => trimRevisions(app.db.write, KEPT_REVISIONS, limit)),
  retention("abandoned calls", (app, limit) => purgeCalls(app.db.write, daysAgo(app, 1), limit)),
  retention("old project uses", (app, limit) =>
    purgeProjectUses(app.db.write, new Date(app.now().getTime() - POPULARITY_WINDOW_MS), limit),
  ),
  retention("old task executions", (app, limit) =>
    purgeExecutions(app.db.write, daysAgo(app, KEPT_EXECUTION_DAYS), app.now(), limit),
  ),
  retention("old audit entries", purgeOldAudit),
];

/** Runs every sweep at its interval until `signal` aborts; resolves when the last one has ended. */
export async function runSweeps(app: App, signal: AbortSignal): Promise<void> {
  await Promise.all(sweeps.map((sweep) => repeat(app, sweep, signal)));
}

async function repeat(app: App, sweep: Sweep, signal: AbortSignal): Promise<void> {
  const { latch, leave } = app.hub.latch(sweep.topic ?? sweep.name);
  while (!signal.aborted) {
    let more = false;
    try {
      more = await sweep.run(app);
    } catch (error) {
      if (!signal.aborted) app.log.error({ err: error, sweep: sweep.name }, "a sweep failed and will be tried again");
    }
    if (!more) await latch.wait(sweep.everyMs, signal);
  }
  leave();
}
