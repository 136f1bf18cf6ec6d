import { create } from "@bufbuild/protobuf";
import { ListEnvironmentClassesRequest_FilterSchema } from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import type { ParseContextURLResponse } from "../../../gen/gitpod/v1/runner_pb.js";
import type { App } from "../../app.ts";
import type { Caller } from "../../domain/principal.ts";
import { repositoryKey } from "../../scm/initializer.ts";
import { listClasses } from "../../store/environment-classes.ts";
import { readPolicies } from "../../store/organizations.ts";
import { usableClassIds } from "../../store/project-classes.ts";
import { projectsOfRepository } from "../../store/projects.ts";
import type { StoredRunner } from "../../store/runners.ts";

const MAX_PROJECTS = 100;
const MAX_CLASSES = 25;

/** Projects that the caller can see of the repository that an address means, then those of the one it was forked from. */
export async function matchingProjects(app: App, caller: Caller, { git }: ParseContextURLResponse): Promise<string[]> {
  const found = [git?.cloneUrl, git?.upstreamRemoteUrl].map((address) => {
    const repository = address && repositoryKey(address);
    return repository ? projectsOfRepository(app.db.list, caller, repository, MAX_PROJECTS) : [];
  });
  return [...new Set((await Promise.all(found)).flat())].slice(0, MAX_PROJECTS);
}

/** Usable classes: those of the projects, then those of the runner that answered, then the others, newest first. */
export async function recommendedClasses(
  app: App,
  caller: Caller,
  projectIds: readonly string[],
  named: StoredRunner | undefined,
  answered: StoredRunner | undefined,
): Promise<string[]> {
  const { localRunners } = await readPolicies(app.db.point, caller.organizationId);
  const page = { limit: MAX_CLASSES, after: "", binding: "" };
  const filter = create(ListEnvironmentClassesRequest_FilterSchema, {
    runnerIds: named ? [named.id] : [],
    canCreateEnvironments: true,
  });
  const [offered, classes] = await Promise.all([
    usableClassIds(app.db.list, caller, { projectIds, localRunners, runnerId: named?.id, limit: MAX_CLASSES }),
    listClasses(app.db.list, caller, filter, localRunners, page),
  ]);
  const first = classes.filter((each) => each.runnerId === answered?.id);
  const all = [...offered, ...[...first, ...classes].map((each) => each.id)];
  return [...new Set(all)].slice(0, MAX_CLASSES);
}
