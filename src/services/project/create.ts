import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import {
  type CreateProjectFromEnvironmentRequest,
  type CreateProjectRequest,
  CreateProjectRequestSchema,
  type Project,
  ProjectPhase,
  type ProjectPrebuildConfiguration,
  ProjectSchema,
} from "../../../gen/gitpod/v1/project_pb.js";
import { type App, transact } from "../../app.ts";
import { actionable, denied, invalid, precondition, refuseProblems } from "../../domain/errors.ts";
import { policyRefusal } from "../../domain/policies.ts";
import type { Caller } from "../../domain/principal.ts";
import { classMessage, MAX_PROJECTS, POPULARITY_EVERY_MS, projectProblems } from "../../domain/project.ts";
import { resolvedInitializer } from "../../scm/resolved.ts";
import type { Tx } from "../../store/db.ts";
import { holdClasses } from "../../store/environment-classes.ts";
import { getEnvironment } from "../../store/environments.ts";
import { holdMember } from "../../store/group-members.ts";
import { readPolicies } from "../../store/organizations.ts";
import { offerClass } from "../../store/project-classes.ts";
import { countProjectsForQuota, insertProject } from "../../store/projects.ts";
import { projectChange, repositoryIndex, sourceProblems } from "./shared.ts";

/** PERMISSION_DENIED unless the caller may create projects at all. */
export async function allowCreation(app: App, caller: Caller): Promise<void> {
  if (caller.orgAdmin || caller.projectsAdmin) return;
  const { policies } = await readPolicies(app.db.point, caller.organizationId);
  if (policies.membersCreateProjects) return;
  throw policyRefusal("permission_denied", "members_create_projects", "projects are created by admins here");
}

/**
 * Checks a prebuild configuration that is about to be stored. Its classes need only exist: clients name them before the
 * project offers them.
 */
export async function checkPrebuilds(
  tx: Tx,
  caller: Caller,
  configuration: ProjectPrebuildConfiguration | undefined,
): Promise<void> {
  await holdClasses(tx, caller, configuration?.environmentClassIds ?? []);
  const executor = configuration?.executor;
  if (!executor) return;
  const isPerson = executor.principal === Principal.USER || executor.principal === Principal.SERVICE_ACCOUNT;
  if (!isPerson || !executor.id) {
    throw invalid({ field: "prebuild_configuration.executor", message: "must be a user or a service account" });
  }
  if (executor.principal === Principal.USER && executor.id.toLowerCase() !== caller.id) {
    throw denied("prebuilds run as a service account or as the user who sets them up");
  }
  await holdMember(tx, caller, executor);
}

async function checkQuota(tx: Tx, organizationId: string): Promise<void> {
  const count = await countProjectsForQuota(tx, organizationId);
  if (count < MAX_PROJECTS) return;
  throw actionable(
    "resource_exhausted",
    "PLATFORM_LIMIT_QUOTA",
    `the organization has ${count} of at most ${MAX_PROJECTS} projects`,
    { organization_id: organizationId },
  );
}

/** Stores a project whose values have been checked, with one class that it offers, if that still exists. */
async function store(app: App, caller: Caller, request: CreateProjectRequest, classId?: string): Promise<Project> {
  const at = app.now();
  const time = timestampFromDate(at);
  const message = create(ProjectSchema, {
    ...{ id: app.newId(), initializer: request.initializer, technicalDescription: request.technicalDescription },
    devcontainerFilePath: request.devcontainerFilePath,
    automationsFilePath: request.automationsFilePath,
    prebuildConfiguration: request.prebuildConfiguration,
    desiredPhase: ProjectPhase.ACTIVE,
    usedBy: {},
    metadata: {
      ...{ organizationId: caller.organizationId, name: request.name, createdAt: time, updatedAt: time },
      creator: { id: caller.id, principal: caller.principal },
    },
  });
  await transact(app, async (tx) => {
    await checkPrebuilds(tx, caller, request.prebuildConfiguration);
    await checkQuota(tx, caller.organizationId);
    const popularityDueAt = new Date(at.getTime() + POPULARITY_EVERY_MS);
    const change = projectChange(app, caller, message, ResourceOperation.CREATE, "Project created");
    await insertProject(tx, { message, index: repositoryIndex(request.initializer), at, popularityDueAt }, change);
    const offered = classId && (await offerClass(tx, message.id, classId));
    message.environmentClasses = offered ? [classMessage({ order: 0, classId })] : [];
    message.environmentClass = message.environmentClasses[0];
  });
  return message;
}

export async function createProject(app: App, caller: Caller, request: CreateProjectRequest): Promise<Project> {
  await allowCreation(app, caller);
  refuseProblems([...sourceProblems(app, request.initializer), ...projectProblems(request)]);
  return store(app, caller, request);
}

/** Makes a project of what an environment was made from: what it holds, its files for tools, and its class. */
export async function createProjectFromEnvironment(
  app: App,
  caller: Caller,
  request: CreateProjectFromEnvironmentRequest,
): Promise<Project> {
  await allowCreation(app, caller);
  const { spec, status, relation } = await getEnvironment(app.db.point, caller, request.environmentId);
  if (!relation.owner) throw denied("you may see this environment, but not make a project of it");
  const initializer = resolvedInitializer(spec.content?.initializer, status.content?.git);
  if (!initializer) throw precondition("the environment holds no repository");
  const values = create(CreateProjectRequestSchema, {
    ...{ name: request.name, initializer },
    devcontainerFilePath: spec.devcontainer?.devcontainerFilePath,
    automationsFilePath: spec.automationsFile?.automationsFilePath,
  });
  const { name: _, ...copied } = values;
  refuseProblems(projectProblems({ name: request.name }));
  const [problem] = [...sourceProblems(app, initializer), ...projectProblems(copied)];
  // Not what the caller sent, so there is no field of the request to complain about.
  if (problem)
    throw precondition(`no project can have the ${problem.field} of this environment: it ${problem.message}`);
  return store(app, caller, values, spec.machine?.class);
}
