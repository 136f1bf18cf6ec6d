import { create } from "@bufbuild/protobuf";
import {
  CreateEnvironmentFromProjectBadRequestEnvironmentClassDetailsSchema,
  type CreateEnvironmentFromProjectRequest,
  type Environment,
  EnvironmentSpecSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import type { App } from "../../app.ts";
import { goalProblems } from "../../domain/environment.ts";
import { actionable, Refusal, refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { refuseDeleting, specFromProject } from "../../domain/project.ts";
import { getClass, type StoredClass } from "../../store/environment-classes.ts";
import { offersClass, usableClassIds } from "../../store/project-classes.ts";
import { getProjectToUse, type StoredProject } from "../../store/projects.ts";
import { make, type Rules, readRules } from "./create.ts";
import { checkRepositories } from "./limits.ts";

const MAX_NAMED_CLASSES = 100;

/** INVALID_ARGUMENT that names what the caller could ask for instead. */
async function notOffered(app: App, caller: Caller, project: StoredProject, { localRunners }: Rules): Promise<Refusal> {
  const environmentClassIds = await usableClassIds(app.db.point, caller, {
    ...{ projectIds: [project.id], localRunners, limit: MAX_NAMED_CLASSES },
  });
  const problem = { field: "spec.machine.class", message: "is not a class of the project" };
  const desc = CreateEnvironmentFromProjectBadRequestEnvironmentClassDetailsSchema;
  return new Refusal("invalid_argument", `${problem.field}: ${problem.message}`, {
    problems: [problem],
    details: [{ desc, value: { environmentClassIds } }],
  });
}

/** The class that was asked for, or else the best one of the project that the caller can use. */
async function chooseClass(
  app: App,
  caller: Caller,
  project: StoredProject,
  asked: string,
  rules: Rules,
): Promise<StoredClass> {
  const { point } = app.db;
  if (asked) {
    const isOffered = !project.classes.length || (await offersClass(point, caller, project.id, asked));
    if (!isOffered) throw await notOffered(app, caller, project, rules);
    return getClass(point, caller, asked);
  }
  const { localRunners } = rules;
  const [best] = await usableClassIds(point, caller, { projectIds: [project.id], localRunners, limit: 1 });
  if (best) return getClass(point, caller, best);
  throw actionable(
    "failed_precondition",
    "PROJECT_CLASS_NONE_USABLE",
    "you can use none of the environment classes of the project at this moment",
    { project_id: project.id },
  );
}

/** CreateEnvironmentFromProject: as CreateEnvironment, with the values of a project where the request has none. */
export async function createEnvironmentFromProject(
  app: App,
  caller: Caller,
  request: CreateEnvironmentFromProjectRequest,
): Promise<Environment> {
  const { projectId, name, annotations, sessionId } = request;
  const { point } = app.db;
  const [rules, project] = await Promise.all([readRules(point, caller), getProjectToUse(point, caller, projectId)]);
  refuseDeleting(project);
  checkRepositories(caller, rules.policies, request.spec?.content?.initializer, project.message.initializer);
  refuseProblems(goalProblems(request.spec, project.classes.length === 0));
  const asked = request.spec?.machine?.class ?? "";
  const environmentClass = await chooseClass(app, caller, project, asked, rules);
  const spec = specFromProject(project.message, request.spec ?? create(EnvironmentSpecSchema));
  const wanted = { spec, name, annotations, sessionId, environmentClass, projectId: project.id };
  return make(app, caller, wanted, rules, async (tx) =>
    refuseDeleting(await getProjectToUse(tx, caller, projectId, true)),
  );
}
