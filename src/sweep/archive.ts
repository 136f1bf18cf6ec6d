import { durationMs } from "@bufbuild/protobuf/wkt";
import type { OrganizationPolicies } from "../../gen/gitpod/v1/organization_pb.js";
import { type App, transact } from "../app.ts";
import {
  archiveDeadline,
  DEFAULT_ARCHIVE_AFTER_MS,
  deleteDeadline,
  requestArchive,
  requestDelete,
  type Transition,
} from "../domain/lifecycle.ts";
import { SYSTEM } from "../domain/principal.ts";
import type { Sql } from "../store/db.ts";
import { advanceEnvironment } from "../store/environment-steps.ts";
import {
  archivableEnvironmentIds,
  deletableEnvironmentIds,
  lockEnvironment,
  type StoredEnvironment,
} from "../store/environments.ts";
import { allPolicies, readPolicies } from "../store/organizations.ts";
import { alone, BATCH, type Sweep } from "./sweep.ts";

const EVERY_MS = 30_000;

// Policies are read when they are applied, so a change of them holds for what is stopped or archived already.

const archiveAfterMs = ({ archiveEnvironmentsAfter: after }: OrganizationPolicies) =>
  (after && durationMs(after)) || DEFAULT_ARCHIVE_AFTER_MS;
const deleteAfterMs = ({ deleteArchivedEnvironmentsAfter: after }: OrganizationPolicies) =>
  after ? durationMs(after) : 0;

interface Rule {
  name: string;
  action: string;
  /** The delay that a policy asks for, in milliseconds; 0 means never. */
  delayMs: (policies: OrganizationPolicies) => number;
  dueIds: (sql: Sql, cutoffs: readonly { organizationId: string; before: Date }[], limit: number) => Promise<string[]>;
  deadline: (stored: StoredEnvironment, delayMs: number) => Date | null;
  move: (stored: StoredEnvironment, now: Date) => Transition;
}

async function applyRule(app: App, rule: Rule, environmentId: string): Promise<void> {
  await transact(app, async (tx, touched) => {
    const stored = await lockEnvironment(tx, environmentId);
    if (!stored) return;
    const { policies } = await readPolicies(tx, stored.organizationId);
    const now = app.now();
    const delayMs = rule.delayMs(policies);
    const deadline = delayMs > 0 ? rule.deadline(stored, delayMs) : null;
    if (!deadline || deadline > now) return;
    const move = rule.move(stored, now);
    const by = { actor: SYSTEM, newId: app.newId, action: rule.action, at: now };
    if (move.kind === "changed" && (await advanceEnvironment(tx, stored, move.next, by)))
      touched(stored.metadata.runnerId);
  });
}

function sweepOf(rule: Rule): Sweep {
  return {
    name: rule.name,
    everyMs: EVERY_MS,
    async run(app) {
      const now = app.now().getTime();
      const cutoffs = (await allPolicies(app.db.list)).flatMap(({ organizationId, policies }) => {
        const delayMs = rule.delayMs(policies);
        return delayMs > 0 ? [{ organizationId, before: new Date(now - delayMs) }] : [];
      });
      const ids = await rule.dueIds(app.db.list, cutoffs, BATCH);
      let done = 0;
      for (const environmentId of ids) {
        const went = await alone(app, { sweep: rule.name, environmentId }, () => applyRule(app, rule, environmentId));
        if (went) done += 1;
      }
      return ids.length === BATCH && done > 0;
    },
  };
}

/** Environments that have been stopped for as long as the organization keeps such ones at hand. */
export const dueArchives = sweepOf({
  name: "due archives",
  action: "Environment archived: stopped for a long time",
  delayMs: archiveAfterMs,
  dueIds: archivableEnvironmentIds,
  deadline: archiveDeadline,
  move: requestArchive,
});

/** Environments that have been archived for as long as the organization keeps such ones. */
export const dueDeletions = sweepOf({
  name: "due deletions",
  action: "Environment deletion requested: archived for a long time",
  delayMs: deleteAfterMs,
  dueIds: deletableEnvironmentIds,
  deadline: deleteDeadline,
  move: (stored, now) => requestDelete(stored, false, now),
});
