import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerPhase, RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, transact } from "../app.ts";
import { runnerUnreachable, runTimers, tombstoneEnd } from "../domain/lifecycle.ts";
import { SYSTEM } from "../domain/principal.ts";
import { DELETE_DEADLINE_MS } from "../domain/runner.ts";
import type { Tx } from "../store/db.ts";
import {
  advanceEnvironment,
  claimDueEnvironments,
  environmentIdsOfRunner,
  lockEnvironment,
  postpone,
  purgeEnvironment,
  type StoredEnvironment,
} from "../store/environments.ts";
import { record } from "../store/record.ts";
import { purgeAudit, purgeCalls, purgeEvents, purgeRevisions } from "../store/retention.ts";
import {
  claimLostRunners,
  claimSilentDeletions,
  endLease,
  markDeleted,
  type StoredRunner,
  setRunnerStatus,
} from "../store/runners.ts";
import { purgeExpiredTokens } from "../store/tokens.ts";

const BATCH = 50;
const RETENTION_BATCH = 5_000;
const DAY_MS = 24 * 60 * 60_000;

/** A piece of clock-driven work. It takes due rows under a lock, so that any number of replicas may run it at once. */
export interface Sweep {
  name: string;
  everyMs: number;
  /** Does at most one batch; true if there may be more. */
  run(app: App): Promise<boolean>;
}

async function advanceDue(app: App, tx: Tx, stored: StoredEnvironment): Promise<boolean> {
  const now = app.now();
  const end = tombstoneEnd(stored);
  if (end) {
    if (end <= now) await purgeEnvironment(tx, stored.id);
    else await postpone(tx, stored.id, end);
    return false;
  }
  const move = runTimers(stored, now);
  const by = { actor: SYSTEM, auditId: app.newId(), at: now };
  const moved = move.kind === "changed" && (await advanceEnvironment(tx, stored, move.next, by));
  // Due by a deadline that has moved: look again when something can be due.
  if (!moved) await postpone(tx, stored.id, null);
  return moved;
}

/** Start deadlines, idle timeouts, warnings that fall due, and the end of tombstones. */
const dueEnvironments: Sweep = {
  name: "due environments",
  everyMs: 5_000,
  run: (app) =>
    transact(app, async (tx, touched) => {
      const due = await claimDueEnvironments(tx, app.now(), BATCH);
      for (const stored of due) if (await advanceDue(app, tx, stored)) touched(stored.metadata.runnerId);
      return due.length === BATCH;
    }),
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
  await record(tx, {
    organizationId: runner.organizationId,
    resourceType: ResourceType.RUNNER,
    resourceId: runner.id,
    operation: ResourceOperation.UPDATE_STATUS,
    creatorId: runner.creatorId,
    runnerId: runner.id,
    at: app.now(),
    audit: { id: app.newId(), actor: SYSTEM, action: "Runner is inactive" },
  });
}

async function warnEnvironments(app: App, runner: StoredRunner): Promise<void> {
  const since = runner.lastContactAt ?? app.now();
  for (const id of await environmentIdsOfRunner(app.db.list, runner.id)) {
    await transact(app, async (tx) => {
      const stored = await lockEnvironment(tx, id);
      if (!stored || stored.status.phase === EnvironmentPhase.DELETED) return;
      const warned = runnerUnreachable(stored, since, app.now());
      if (warned.kind !== "changed") return;
      await advanceEnvironment(tx, stored, warned.next, { actor: SYSTEM, auditId: app.newId(), at: app.now() });
    });
  }
}

/**
 * Leases that are over. The expired lease stays on the row until the environments carry their warning too, so that
 * the sweep after a crash goes on where this one ended.
 */
const lostRunners: Sweep = {
  name: "lost runners",
  everyMs: 5_000,
  async run(app) {
    const lost = await transact(app, async (tx) => {
      const claimed = await claimLostRunners(tx, BATCH);
      for (const runner of claimed) await sayLost(app, tx, runner);
      return claimed;
    });
    for (const runner of lost) {
      await warnEnvironments(app, runner);
      await endLease(app.db.write, runner.id, runner.epoch);
    }
    return lost.length === BATCH;
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
        await record(tx, {
          organizationId: runner.organizationId,
          resourceType: ResourceType.RUNNER,
          resourceId: runner.id,
          operation: ResourceOperation.DELETE,
          creatorId: runner.creatorId,
          runnerId: runner.id,
          at: app.now(),
          audit: { id: app.newId(), actor: SYSTEM, action: "Runner deleted without its confirmation" },
        });
        await markDeleted(tx, runner.id, app.now());
        touched(runner.id);
      }
      return silent.length === BATCH;
    }),
};

/** What is kept for a time only: tokens, outbox, revisions, calls, audit entries. */
const retention: Sweep = {
  name: "retention",
  everyMs: 60_000,
  async run(app) {
    const now = app.now();
    const dayAgo = new Date(now.getTime() - DAY_MS);
    const days = app.config.auditRetentionDays;
    const { write } = app.db;
    const counts = [
      await purgeExpiredTokens(write, now, RETENTION_BATCH),
      await purgeEvents(write, dayAgo, RETENTION_BATCH),
      await purgeRevisions(write, dayAgo, RETENTION_BATCH),
      await purgeCalls(write, dayAgo, RETENTION_BATCH),
      days > 0
        ? await write.begin((tx) => purgeAudit(tx, new Date(now.getTime() - days * DAY_MS), RETENTION_BATCH))
        : 0,
    ];
    return counts.some((count) => count === RETENTION_BATCH);
  },
};

export const sweeps: readonly Sweep[] = [dueEnvironments, lostRunners, silentDeletions, retention];

/** Runs every sweep at its interval until `signal` aborts; resolves when the last one has ended. */
export async function runSweeps(app: App, signal: AbortSignal): Promise<void> {
  await Promise.all(sweeps.map((sweep) => repeat(app, sweep, signal)));
}

async function repeat(app: App, sweep: Sweep, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    let more = false;
    try {
      more = await sweep.run(app);
    } catch (error) {
      if (!signal.aborted) app.log.error({ err: error, sweep: sweep.name }, "a sweep failed and will be tried again");
    }
    if (!more) await pause(sweep.everyMs, signal);
  }
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}
