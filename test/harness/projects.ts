import type { MessageInitShape } from "@bufbuild/protobuf";
import type { CreateProjectRequestSchema, Project } from "../../gen/gitpod/v1/project_pb.js";
import type { BerthClient } from "../../src/client.ts";
import { sweeps } from "../../src/sweep/sweeps.ts";
import type { TestPlane } from "./plane.ts";

export const git = (remoteUri: string, more: object = {}) => ({
  spec: { case: "git" as const, value: { remoteUri, ...more } },
});
export const contextUrl = (url: string) => ({ spec: { case: "contextUrl" as const, value: { url } } });

export const REPOSITORY = "https://git.example.org/team/app.git";

/** A project of one repository, unless told otherwise. */
export async function createProject(
  client: BerthClient,
  values: Omit<Extract<MessageInitShape<typeof CreateProjectRequestSchema>, { name?: string }>, "$typeName"> = {},
): Promise<Project> {
  const initializer = { specs: [git(REPOSITORY)] };
  const { project } = await client.projects.createProject({ name: "App", initializer, ...values });
  if (!project) throw new Error("an answer without a project");
  return project;
}

/** Sets what a project offers, in this order; `local` stands for local runners. */
export async function offer(client: BerthClient, projectId: string, ...classes: string[]): Promise<void> {
  await client.projects.updateProjectEnvironmentClasses({
    projectId,
    projectEnvironmentClasses: classes.map((each, order) => ({
      order,
      environmentClass:
        each === "local" ? { case: "localRunner", value: true } : { case: "environmentClassId", value: each },
    })),
  });
}

/** Does at once what the named jobs of a control plane do by themselves every few seconds or minutes. */
export async function sweep({ plane: { app } }: TestPlane, ...names: string[]): Promise<void> {
  for (const name of names) {
    const job = sweeps.find((each) => each.name === name);
    if (!job) throw new Error(`there is no sweep ${name}`);
    while (await job.run(app));
  }
}

/** Events of a resource and the actions of its audit entries, the oldest first. */
export async function traces({ plane: { app } }: TestPlane, id: string) {
  const events = await app.db.point<{ resource_type: number; operation: number }[]>`
    select resource_type, operation from events where resource_id = ${id} order by seq`;
  const audit = await app.db.point<
    { action: string }[]
  >`select action from audit_log where subject_id = ${id} order by id`;
  return {
    events: events.map((each) => [each.resource_type, each.operation]),
    actions: audit.map((each) => each.action),
  };
}
