import type { ServiceImpl } from "@connectrpc/connect";
import type {
  ListProjectEnvironmentClassesRequest,
  ListProjectsRequest,
  ProjectService,
} from "../../gen/gitpod/v1/project_pb.js";
import type { App } from "../app.ts";
import { invalid } from "../domain/errors.ts";
import { COUNT_CAP, closePage, countAnswer, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { classMessage } from "../domain/project.ts";
import { principal } from "../rpc/authenticate.ts";
import { listClassEntries } from "../store/project-classes.ts";
import { countProjects, getProject, listProjects, projectPosition } from "../store/projects.ts";
import { forEach } from "./project/bulk.ts";
import { allowCreation, createProject, createProjectFromEnvironment } from "./project/create.ts";
import { projectPolicies } from "./project/policies.ts";
import { deleteProject, updateClasses, updateProject } from "./project/update.ts";

const SORT_FIELDS = ["", "id", "popularity"];

async function list(app: App, caller: Caller, request: ListProjectsRequest) {
  if (!SORT_FIELDS.includes(request.sort?.field ?? "")) {
    throw invalid({ field: "sort.field", message: "must be id or popularity" });
  }
  const page = openPage(request.pagination, ["projects", caller.id, request.filter, request.sort]);
  const wantsCount = request.count?.include === true && !page.after;
  const [rows, total] = await Promise.all([
    listProjects(app.db.list, caller, request, page),
    wantsCount ? countProjects(app.db.list, caller, request.filter, COUNT_CAP + 1) : undefined,
  ]);
  const { items, nextToken } = closePage(page, rows, (project) => projectPosition(request.sort, project));
  const count = total === undefined ? undefined : countAnswer(total);
  return { projects: items.map(({ message }) => message), pagination: { nextToken }, count };
}

async function listClasses(app: App, caller: Caller, request: ListProjectEnvironmentClassesRequest) {
  const { id } = await getProject(app.db.point, caller, request.projectId);
  const page = openPage(request.pagination, ["project classes", caller.id, id]);
  const rows = await listClassEntries(app.db.list, id, page);
  const { items, nextToken } = closePage(page, rows, ({ order }) => String(order));
  return { projectEnvironmentClasses: items.map(classMessage), pagination: { nextToken } };
}

/** ProjectService. */
export function projectService(app: App): ServiceImpl<typeof ProjectService> {
  return {
    async createProject(request, context) {
      return { project: await createProject(app, principal(context), request) };
    },
    async createProjects({ projects }, context) {
      const caller = principal(context);
      await allowCreation(app, caller);
      const { done, failed } = await forEach(app, projects, (each) => createProject(app, caller, each));
      const failedProjects = failed.map(({ item, ...failure }) => ({ ...failure, name: item.name }));
      return { createdProjects: done, failedProjects };
    },
    async updateProjects({ projects }, context) {
      const caller = principal(context);
      const { done, failed } = await forEach(app, projects, (each) => updateProject(app, caller, each));
      const failedProjects = failed.map(({ item, ...failure }) => ({ ...failure, projectId: item.projectId }));
      return { updatedProjects: done, failedProjects };
    },
    async deleteProjects({ projectIds }, context) {
      const caller = principal(context);
      const { done, failed } = await forEach(app, projectIds, async (id) => {
        await deleteProject(app, caller, id);
        return id;
      });
      const failedProjects = failed.map(({ item, ...failure }) => ({ ...failure, projectId: item }));
      return { deletedProjectIds: done, failedProjects };
    },
    async createProjectFromEnvironment(request, context) {
      return { project: await createProjectFromEnvironment(app, principal(context), request) };
    },
    async getProject(request, context) {
      return { project: (await getProject(app.db.point, principal(context), request.projectId)).message };
    },
    async updateProject(request, context) {
      return { project: await updateProject(app, principal(context), request) };
    },
    listProjects: (request, context) => list(app, principal(context), request),
    async deleteProject(request, context) {
      await deleteProject(app, principal(context), request.projectId);
      return {};
    },
    listProjectEnvironmentClasses: (request, context) => listClasses(app, principal(context), request),
    async updateProjectEnvironmentClasses(request, context) {
      await updateClasses(app, principal(context), request);
      return {};
    },
    ...projectPolicies(app),
  };
}
