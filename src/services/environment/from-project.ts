import { create } from "@bufbuild/protobuf";
import {
  CreateEnvironmentFromProjectBadRequestEnvironmentClassDetailsSchema,
  type CreateEnvironmentFromProjectRequest,
  type Environment,
  EnvironmentSpecSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import type { App } from "../../app.ts";
import { goalProblems } from "../../domain/environment.ts";
import { actionable, notFound, Refusal, refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { refuseDeleting, specFromProject } from "../../domain/project.ts";
import { readBasis } from "../../store/creation.ts";
import type { Sql, Tx } from "../../store/db.ts";
import { readPolicies } from "../../store/organizations.ts";
import { offersClass, usableClassIds } from "../../store/project-classes.ts";
import { getProjectToUse, type StoredProject } from "../../store/projects.ts";
import { hostsOf, make } from "./create.ts";
import { checkRepositories } from "./limits.ts";

const MAX_NAMED_CLASSES = 100;

/** INVALID_ARGUMENT that names what the caller could ask for instead. */
async function notOffered(
  sql: Sql | Tx,
  caller: Caller,
  project: StoredProject,
  localRunners: boolean,
): Promise<Refusal> {
  const environmentClassIds = await usableClassIds(sql, caller, {
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
  sql: Sql | Tx,
  caller: Caller,
  project: StoredProject,
  asked: string,
  localRunners: boolean,
): Promise<string> {
  if (asked) {
    const isOffered = !project.classes.length || (await offersClass(sql, caller, project.id, asked));
    if (!isOffered) throw await notOffered(sql, caller, project, localRunners);
    return asked;
  }
  const [best] = await usableClassIds(sql, caller, { projectIds: [project.id], localRunners, limit: 1 });
  if (best) return best;
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
  return make(app, caller, async (sql, at) => {
    const [{ policies, localRunners }, project] = await Promise.all([
      readPolicies(sql, caller.organizationId),
      getProjectToUse(sql, caller, projectId),
    ]);
    refuseDeleting(project);
    checkRepositories(caller, policies, request.spec?.content?.initializer, project.message.initializer);
    refuseProblems(goalProblems(request.spec, project.classes.length === 0));
    const classId = await chooseClass(sql, caller, project, request.spec?.machine?.class ?? "", localRunners);
    const spec = specFromProject(project.message, request.spec ?? create(EnvironmentSpecSchema));
    const basis = await readBasis(sql, caller, [classId, hostsOf(spec.content?.initializer), project.id], at);
    if (!basis.found) throw notFound("environment class", classId);
    return { ...{ spec, name, annotations, sessionId, projectId: project.id, basis }, ...basis.found };
  });
}
