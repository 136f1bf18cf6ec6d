import { create, createRegistry, equals } from "@bufbuild/protobuf";
import {
  type EnvironmentSpec,
  EnvironmentSpec_AutomationsFileSchema,
  EnvironmentSpec_ContentSchema,
  EnvironmentSpec_DevContainerSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import {
  type Project,
  type ProjectEnvironmentClass,
  ProjectEnvironmentClassSchema,
  ProjectMetadataSchema,
  type ProjectPrebuildConfiguration,
  ProjectSchema,
  type RecommendedEditors,
  type UpdateProjectRequest,
} from "../../gen/gitpod/v1/project_pb.js";
import { editorByIdOrAlias } from "./editors.ts";
import { actionable, type FieldProblem } from "./errors.ts";

/** Most projects of an organization. */
export const MAX_PROJECTS = 5_000;
/** Most specs in the initializer of a project. */
export const MAX_SPECS = 10;
const MAX_PREBUILD_CLASSES = 100;
const MAX_PATH_LENGTH = 1024;
const MAX_EDITORS = 50;
const MAX_EDITOR_VERSIONS = 50;

const HOUR_MS = 60 * 60_000;
const DAY_MS = 24 * HOUR_MS;

/** An environment counts half as much after each of these. */
export const POPULARITY_HALF_LIFE_MS = 7 * DAY_MS;
/** How long an environment counts at all. */
export const POPULARITY_WINDOW_MS = 30 * DAY_MS;
/** How often popularity is counted again. */
export const POPULARITY_EVERY_MS = HOUR_MS;

const CONTROL_CHARACTERS = /\p{Cc}/u;

/** What clients set of a project; what is absent is not checked. */
interface ProjectValues {
  name?: string;
  devcontainerFilePath?: string;
  automationsFilePath?: string;
  prebuildConfiguration?: ProjectPrebuildConfiguration;
  recommendedEditors?: RecommendedEditors;
}

function nameProblems(name: string | undefined): FieldProblem[] {
  if (name === undefined || (name.trim() && !CONTROL_CHARACTERS.test(name))) return [];
  return [{ field: "name", message: "must hold printable characters" }];
}

function pathProblems(field: string, path = ""): FieldProblem[] {
  if (path.length > MAX_PATH_LENGTH) return [{ field, message: `must have at most ${MAX_PATH_LENGTH} characters` }];
  const leaves = path.startsWith("/") || path.split("/").includes("..") || /[\\\p{Cc}]/u.test(path);
  return leaves
    ? [{ field, message: "must be a relative path inside the repository, without .. and backslashes" }]
    : [];
}

function prebuildProblems(configuration: ProjectPrebuildConfiguration | undefined): FieldProblem[] {
  if ((configuration?.environmentClassIds.length ?? 0) <= MAX_PREBUILD_CLASSES) return [];
  const field = "prebuild_configuration.environment_class_ids";
  return [{ field, message: `must have at most ${MAX_PREBUILD_CLASSES} entries` }];
}

function editorProblem(name: string, versions: readonly string[]): string | undefined {
  const editor = editorByIdOrAlias(name);
  if (!editor) return `there is no editor ${name}`;
  if (versions.length > MAX_EDITOR_VERSIONS) return `${name} must have at most ${MAX_EDITOR_VERSIONS} versions`;
  const unknown = versions.find((version) => !editor.versions.some((each) => each.version === version));
  return unknown === undefined ? undefined : `there is no version ${unknown} of ${name}`;
}

function editorProblems(recommended: RecommendedEditors | undefined): FieldProblem[] {
  const field = "recommended_editors.editors";
  const entries = Object.entries(recommended?.editors ?? {});
  if (entries.length > MAX_EDITORS) return [{ field, message: `must have at most ${MAX_EDITORS} entries` }];
  return entries.flatMap(([name, { versions }]) => {
    const message = editorProblem(name, versions);
    return message ? [{ field, message }] : [];
  });
}

/** Problems of a request that need no lookup, except those of the initializer. */
export function projectProblems(values: ProjectValues): FieldProblem[] {
  return [
    ...nameProblems(values.name),
    ...pathProblems("devcontainer_file_path", values.devcontainerFilePath),
    ...pathProblems("automations_file_path", values.automationsFilePath),
    ...prebuildProblems(values.prebuildConfiguration),
    ...editorProblems(values.recommendedEditors),
  ];
}

const CHANGEABLE = [
  "initializer",
  "devcontainerFilePath",
  "automationsFilePath",
  "technicalDescription",
  "prebuildConfiguration",
  "recommendedEditors",
] as const satisfies (keyof UpdateProjectRequest & keyof Project)[];

/** Something of a project that an update changed, as in the schema. */
export type ChangedField = "name" | (typeof CHANGEABLE)[number];

// Initializers are kept as they were sent, with fields that this version does not know.
const EXACTLY = { unknown: true, registry: createRegistry() };

const differs = (name: (typeof CHANGEABLE)[number], left: Project, right: Project) =>
  !equals(
    ProjectSchema,
    create(ProjectSchema, { [name]: left[name] }),
    create(ProjectSchema, { [name]: right[name] }),
    EXACTLY,
  );

/** A project with what a request gives, and which fields that changes. */
export function changedProject(
  project: Project,
  request: UpdateProjectRequest,
): { next: Project; changed: ChangedField[] } {
  const next = { ...project };
  for (const name of CHANGEABLE) if (request[name] !== undefined) Object.assign(next, { [name]: request[name] });
  const metadata = project.metadata ?? create(ProjectMetadataSchema);
  next.metadata = { ...metadata, name: request.name ?? metadata.name };
  const changed = CHANGEABLE.filter((name) => differs(name, project, next));
  return { next, changed: next.metadata.name === metadata.name ? changed : ["name", ...changed] };
}

/** What an update changed, for people: `changed name, initializer`. */
export function changeText(changed: readonly ChangedField[]): string {
  const names = changed.map((name) => (name === "name" ? name : ProjectSchema.field[name].name.replaceAll("_", " ")));
  return `changed ${names.join(", ")}`;
}

// Environment classes that a project offers.

/** An entry of the list: a class, or any class of a local runner. */
export interface ClassEntry {
  order: number;
  /** Absent for local runners. */
  classId?: string;
}

/** An entry as clients read it. */
export const classMessage = ({ order, classId }: ClassEntry): ProjectEnvironmentClass =>
  create(ProjectEnvironmentClassSchema, {
    order,
    environmentClass: classId ? { case: "environmentClassId", value: classId } : { case: "localRunner", value: true },
  });

function entryProblem({ environmentClass, order }: ProjectEnvironmentClass): FieldProblem | undefined {
  if (order < 0) return { field: "order", message: "must not be negative" };
  if (environmentClass.case === undefined || environmentClass.value === false)
    return { field: "environment_class", message: "must be a class or local_runner = true" };
  return undefined;
}

/** The list in its order, or what is wrong with it. */
export function classEntries(list: readonly ProjectEnvironmentClass[]): {
  entries: ClassEntry[];
  problems: FieldProblem[];
} {
  const at = (index: number, { field, message }: FieldProblem) => ({
    field: `project_environment_classes[${index}].${field}`,
    message,
  });
  const entries = list.map(({ environmentClass, order }) => ({
    order,
    classId: environmentClass.case === "environmentClassId" ? environmentClass.value.toLowerCase() : undefined,
  }));
  const problems = list.flatMap((entry, index) => {
    const before = entries.slice(0, index);
    const own = entryProblem(entry);
    if (own) return [at(index, own)];
    const { order, classId } = entries[index] as ClassEntry;
    if (before.some((each) => each.order === order)) return [at(index, { field: "order", message: "must be unique" })];
    if (before.every((each) => each.classId !== classId)) return [];
    const field = classId ? "environment_class_id" : "local_runner";
    return [at(index, { field, message: "is in the list already" })];
  });
  return { entries: entries.toSorted((left, right) => left.order - right.order), problems };
}

// Environments made from a project.

/** FAILED_PRECONDITION for a project whose deletion has begun: nobody changes it or makes anything from it any more. */
export function refuseDeleting({ id, isDeleting }: { id: string; isDeleting: boolean }): void {
  if (!isDeleting) return;
  throw actionable("failed_precondition", "PROJECT_STATE_DELETING", "the project is being deleted", { project_id: id });
}

/**
 * What is asked for with the project's values where nothing is: an initializer without specs counts as none, or a
 * project would be a way around policies about repositories.
 */
export function specFromProject(project: Project, spec: EnvironmentSpec): EnvironmentSpec {
  const content = spec.content ?? create(EnvironmentSpec_ContentSchema);
  const devcontainer = spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);
  const automationsFile = spec.automationsFile ?? create(EnvironmentSpec_AutomationsFileSchema);
  return {
    ...spec,
    content: {
      ...content,
      initializer: content.initializer?.specs.length ? content.initializer : project.initializer,
    },
    devcontainer: {
      ...devcontainer,
      devcontainerFilePath: devcontainer.devcontainerFilePath || project.devcontainerFilePath,
    },
    automationsFile: {
      ...automationsFile,
      automationsFilePath: automationsFile.automationsFilePath || project.automationsFilePath,
    },
  };
}
