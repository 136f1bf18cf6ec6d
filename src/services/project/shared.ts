import { create } from "@bufbuild/protobuf";
import type { EnvironmentInitializer } from "../../../gen/gitpod/v1/environment_pb.js";
import { type ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { type Project, ProjectSchema } from "../../../gen/gitpod/v1/project_pb.js";
import { type App, actorOf } from "../../app.ts";
import { denied, type FieldProblem } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { MAX_SPECS, refuseDeleting } from "../../domain/project.ts";
import { initializerProblems, repositoryAddresses, repositoryKey, repositoryName } from "../../scm/initializer.ts";
import type { RepositoryIndex, StoredProject } from "../../store/projects.ts";
import type { Change } from "../../store/record.ts";

/** A project as its readers see it. */
export const shown = (message: Project): Project => create(ProjectSchema, { ...message, technicalDescription: "" });

/** What only the initializer has: its rules are those of environments, but a project needs a repository. */
export function sourceProblems(app: App, initializer: EnvironmentInitializer | undefined): FieldProblem[] {
  const field = "initializer";
  if (!initializer?.specs.length)
    return [{ field: `${field}.specs`, message: `must have between 1 and ${MAX_SPECS} entries` }];
  return initializerProblems(initializer, { schemes: app.config.scm.schemes, field, maxSpecs: MAX_SPECS });
}

/** What the repositories of an initializer are found by. */
export function repositoryIndex(initializer: EnvironmentInitializer | undefined): RepositoryIndex {
  const specs = initializer?.specs ?? [];
  const keys = repositoryAddresses(initializer).flatMap((address) => repositoryKey(address) ?? []);
  return {
    remoteUris: specs.flatMap(({ spec }) => (spec.case === "git" ? [spec.value.remoteUri] : [])),
    repositories: [...new Set(keys)],
    names: specs.map(repositoryName),
  };
}

/** PERMISSION_DENIED unless `allowed`, then FAILED_PRECONDITION for a project that is being deleted. */
export function allow(project: StoredProject, allowed: boolean, action: string): void {
  if (!allowed) throw denied(`you may see this project, but not ${action} it`);
  refuseDeleting(project);
}

/** A change of a project for watchers and for the audit log. */
export function projectChange(
  app: App,
  caller: Caller,
  { id, metadata }: Project,
  operation: ResourceOperation,
  action: string,
): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.PROJECT,
    resourceId: id,
    operation,
    creatorId: metadata?.creator?.id,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}
