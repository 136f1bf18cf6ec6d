import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { type App, transact } from "../app.ts";
import { SYSTEM } from "../domain/principal.ts";
import { POPULARITY_EVERY_MS, POPULARITY_HALF_LIFE_MS, POPULARITY_WINDOW_MS } from "../domain/project.ts";
import { Scope } from "../domain/secret.ts";
import { countPopularity } from "../store/project-usage.ts";
import { claimDeletingProject, deletingProjects, eraseProject } from "../store/projects.ts";
import { deleteSecretsOf } from "../store/secrets.ts";
import { alone, BATCH, type Sweep } from "./sweep.ts";

async function finishDeletion(app: App, projectId: string): Promise<void> {
  await transact(app, async (tx) => {
    const project = await claimDeletingProject(tx, projectId);
    if (!project) return;
    const { organizationId, creatorId } = project;
    const by = { actor: SYSTEM, newId: app.newId, at: app.now() };
    // Whoever could read a secret is told that it is gone, by the roles on the project.
    await deleteSecretsOf(tx, { scope: Scope.PROJECT, id: projectId }, { organizationId, ...by });
    await eraseProject(tx, projectId, {
      ...{ organizationId, resourceType: ResourceType.PROJECT, resourceId: projectId, creatorId },
      ...{ operation: ResourceOperation.DELETE, at: by.at },
      audit: { id: app.newId(), actor: SYSTEM, action: "Project deleted" },
    });
  });
}

/** Projects whose deletion was asked for. */
export const projectDeletions: Sweep = {
  name: "project deletions",
  everyMs: 2_000,
  async run(app) {
    const ids = await deletingProjects(app.db.list, BATCH);
    let done = 0;
    for (const projectId of ids) {
      if (await alone(app, { sweep: projectDeletions.name, projectId }, () => finishDeletion(app, projectId)))
        done += 1;
    }
    return ids.length === BATCH && done > 0;
  },
};

const POPULARITY = {
  windowMs: POPULARITY_WINDOW_MS,
  halfLifeMs: POPULARITY_HALF_LIFE_MS,
  everyMs: POPULARITY_EVERY_MS,
};

/** How much projects are used, counted again every hour. */
export const projectPopularity: Sweep = {
  name: "project popularity",
  everyMs: 60_000,
  run: async (app) => (await countPopularity(app.db.write, { now: app.now(), ...POPULARITY }, BATCH)) === BATCH,
};
