import type { ServiceImpl } from "@connectrpc/connect";
import { ProjectService } from "../../gen/gitpod/v1/project_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** ProjectService, as far as it is built. */
export function projectService(_app: App): ServiceImpl<typeof ProjectService> {
  return withPending(
    ProjectService,
    [
      "createProject",
      "createProjects",
      "updateProjects",
      "deleteProjects",
      "createProjectFromEnvironment",
      "getProject",
      "updateProject",
      "listProjects",
      "deleteProject",
      "listProjectPolicies",
      "createProjectPolicy",
      "deleteProjectPolicy",
      "updateProjectPolicy",
      "listProjectEnvironmentClasses",
      "updateProjectEnvironmentClasses",
    ],
    {},
  );
}
