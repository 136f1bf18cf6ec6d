import { ProjectRole, ProjectService } from "../../gen/gitpod/v1/project_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const one = ({ projectId }: World) => ({ projectId });
const git = { spec: { case: "git" as const, value: { remoteUri: "https://git.example.org/a/b" } } };
const newProject = { name: "App", initializer: { specs: [git] } };
/** For a group that may use runners, or it could be given no role. */
const policy = ({ projectId, powerfulGroupId }: World) => ({
  ...{ projectId, groupId: powerfulGroupId, role: ProjectRole.USER },
});
const shared = ({ projectId, sharingGroupId }: World) => ({
  ...{ projectId, groupId: sharingGroupId, role: ProjectRole.USER },
});

const TABLE = `
                                  no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createProject                   U  D  ✓  ✓  D  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createProjects                  U  D  ✓  ✓  D  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateProjects                  U  D  0  0  D  ✓  ✓  0  0  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  .  .  .  .  .  .
  deleteProjects                  U  D  0  0  D  ✓  ✓  0  0  D  D  D  D  .  ✓  .  .  .  .  .  ✓  .  .  .  .  .  .  .
  createProjectFromEnvironment    U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  getProject                      U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  .  ✓  .  .  .  .  .  ✓  ✓  ✓  .  .  .  .  .
  updateProject                   U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
  listProjects                    U  D  0  0  ✓  ✓  ✓  0  0  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  ✓  .  .  .  .  .
  deleteProject                   U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  listProjectPolicies             U  D  N  N  ✓  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  ✓  .  .  .  .  .
  createProjectPolicy             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  deleteProjectPolicy             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  updateProjectPolicy             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  D  D  .  .  .  .  .
  listProjectEnvironmentClasses   U  D  N  N  ✓  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  ✓  .  .  .  .  .
  updateProjectEnvironmentClasses U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
`;

export const project = section(ProjectService, TABLE, {
  createProject: { request: () => newProject },
  createProjects: { request: () => ({ projects: [newProject] }), finds: () => '"createdProjects":' },
  // The copy offers the class of the environment, so its maker sees that from then on.
  createProjectFromEnvironment: {
    request: ({ environmentId }) => ({ environmentId, name: "Copy" }),
    fresh: ["classId", "projectId", "environmentId"],
  },
  getProject: { request: one },
  listProjects: { finds: ({ projectId }) => projectId },
  updateProject: { request: (world) => ({ ...one(world), name: "App" }) },
  // What becomes of each is in the answer.
  updateProjects: { request: (world) => ({ projects: [one(world)] }), finds: () => '"updatedProjects":' },
  deleteProject: { request: one, fresh: ["projectId"] },
  deleteProjects: {
    request: ({ projectId }) => ({ projectIds: [projectId] }),
    fresh: ["projectId"],
    finds: () => '"deletedProjectIds":',
  },
  listProjectPolicies: { request: one, finds: ({ sharingGroupId }) => sharingGroupId },
  createProjectPolicy: { request: policy, fresh: ["powerfulGroupId"] },
  updateProjectPolicy: { request: shared, fresh: ["sharingGroupId"] },
  deleteProjectPolicy: { request: shared, fresh: ["sharingGroupId"] },
  listProjectEnvironmentClasses: { request: one },
  updateProjectEnvironmentClasses: {
    request: (world) => ({
      ...one(world),
      projectEnvironmentClasses: [{ environmentClass: { case: "localRunner", value: true } }],
    }),
    fresh: ["projectId"],
  },
});
