import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import {
  type Project,
  ProjectMetadataSchema,
  type UpdateProjectEnvironmentClassesRequest,
  type UpdateProjectRequest,
} from "../../../gen/gitpod/v1/project_pb.js";
import { type App, transact } from "../../app.ts";
import { refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { type ClassEntry, changedProject, changeText, classEntries, projectProblems } from "../../domain/project.ts";
import { holdClasses } from "../../store/environment-classes.ts";
import { replaceClassEntries } from "../../store/project-classes.ts";
import {
  lockProject,
  markProjectDeleting,
  type StoredProject,
  updateProject as storeProject,
} from "../../store/projects.ts";
import { checkPrebuilds } from "./create.ts";
import { allow, projectChange, repositoryIndex, shown, sourceProblems } from "./shared.ts";

function touched(app: App, project: Project): Project {
  const metadata = project.metadata ?? create(ProjectMetadataSchema);
  return { ...project, metadata: { ...metadata, updatedAt: timestampFromDate(app.now()) } };
}

/** Changes what the request gives; nothing is written, told or logged if that is what the project has. */
export async function updateProject(app: App, caller: Caller, request: UpdateProjectRequest): Promise<Project> {
  return transact(app, async (tx) => {
    const project = await lockProject(tx, caller, request.projectId);
    allow(project, project.edits, "change");
    const { next, changed } = changedProject(project.message, request);
    if (!changed.length) return shown(project.message);
    const source = request.initializer ? sourceProblems(app, request.initializer) : [];
    refuseProblems([...source, ...projectProblems(request)]);
    if (changed.includes("prebuildConfiguration")) await checkPrebuilds(tx, caller, request.prebuildConfiguration);
    const message = touched(app, next);
    const change = projectChange(app, caller, message, ResourceOperation.UPDATE, changeText(changed));
    await storeProject(tx, message, repositoryIndex(message.initializer), change);
    return shown(message);
  });
}

/** Begins the deletion of a project; a job ends it. */
export async function deleteProject(app: App, caller: Caller, id: string): Promise<void> {
  await transact(app, async (tx) => {
    const project = await lockProject(tx, caller, id);
    if (project.administers && project.isDeleting) return;
    allow(project, project.administers, "delete");
    const change = projectChange(app, caller, project.message, ResourceOperation.UPDATE, "Project deletion requested");
    await markProjectDeleting(tx, project, change);
  });
}

const sameEntries = ({ classes }: StoredProject, entries: readonly ClassEntry[]) =>
  classes.length === entries.length &&
  classes.every(({ order, classId }, index) => order === entries[index]?.order && classId === entries[index]?.classId);

/** Replaces the classes that a project offers. */
export async function updateClasses(
  app: App,
  caller: Caller,
  request: UpdateProjectEnvironmentClassesRequest,
): Promise<void> {
  const { entries, problems } = classEntries(request.projectEnvironmentClasses);
  await transact(app, async (tx) => {
    const project = await lockProject(tx, caller, request.projectId);
    allow(project, project.edits, "change");
    refuseProblems(problems);
    if (sameEntries(project, entries)) return;
    await holdClasses(
      tx,
      caller,
      entries.flatMap(({ classId }) => classId ?? []),
    );
    await replaceClassEntries(tx, project.id, entries);
    const message = touched(app, project.message);
    const change = projectChange(app, caller, message, ResourceOperation.UPDATE, "changed environment classes");
    const ofClasses = { ...change, resourceType: ResourceType.PROJECT_ENVIRONMENT_CLASS, audit: undefined };
    await storeProject(tx, message, repositoryIndex(message.initializer), change, ofClasses);
  });
}
