import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import type { ProjectEnvironmentClassSchema } from "../gen/gitpod/v1/project_pb.js";
import { RunnerKind } from "../gen/gitpod/v1/runner_configuration_pb.js";
import type { BerthClient } from "../src/client.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer, traces } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addClass, connectRunner, share } from "./harness/tenants.ts";

type Entry = MessageInitShape<typeof ProjectEnvironmentClassSchema>;

let plane: TestPlane;
let member: TestUser;
let runnerId: string;
let classIds: [string, string];
const disposables = new AsyncDisposableStack();

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  const { runner, classId } = await connectRunner(plane);
  disposables.use(runner);
  runnerId = runner.id;
  classIds = [classId, await addClass(plane, runner.id)];
});

afterAll(async () => {
  await disposables.disposeAsync();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
});

const entry = (order: number, classId: string): Entry => ({
  order,
  environmentClass: { case: "environmentClassId", value: classId },
});
const local = (order: number, value = true): Entry => ({ order, environmentClass: { case: "localRunner", value } });

const set = (client: BerthClient, projectId: string, ...projectEnvironmentClasses: Entry[]) =>
  client.projects.updateProjectEnvironmentClasses({ projectId, projectEnvironmentClasses });

/** What a project offers, as `order class`. */
async function offered(client: BerthClient, projectId: string): Promise<string[]> {
  const { projectEnvironmentClasses } = await client.projects.listProjectEnvironmentClasses({ projectId });
  const { project } = await client.projects.getProject({ projectId });
  expect(project?.environmentClasses).toEqual(projectEnvironmentClasses);
  expect(project?.environmentClass).toEqual(projectEnvironmentClasses[0]);
  return projectEnvironmentClasses.map(({ order, environmentClass }) => `${order} ${environmentClass.value}`);
}

test("PLT-31 the list is replaced as a whole, by order; classes of local runners may be in it", async () => {
  const [first, second] = classIds;
  const { runner } = await plane.admin.runners.getRunner({ runnerId });
  expect(runner?.kind).toBe(RunnerKind.LOCAL);
  const { id, metadata } = await createProject(member.client);
  expect(await offered(member.client, id)).toEqual([]);
  plane.advance(1000);
  await set(member.client, id, entry(7, second), local(3), entry(0, first.toUpperCase()));
  expect(await offered(member.client, id)).toEqual([`0 ${first}`, "3 true", `7 ${second}`]);
  const { project } = await member.client.projects.getProject({ projectId: id });
  expect(project?.metadata?.updatedAt).not.toEqual(metadata?.updatedAt);
  const { UPDATE } = ResourceOperation;
  const told = await traces(plane, id);
  expect(told.events.slice(1)).toEqual([
    [ResourceType.PROJECT, UPDATE],
    [ResourceType.PROJECT_ENVIRONMENT_CLASS, UPDATE],
  ]);
  expect(told.actions).toEqual(["Project created", "changed environment classes"]);

  await set(member.client, id, local(3), entry(0, first), entry(7, second));
  expect(await traces(plane, id)).toEqual(told);
  await set(member.client, id, entry(1, second));
  expect(await offered(member.client, id)).toEqual([`1 ${second}`]);
});

test.each<[string, (first: string, second: string) => Entry[], string[] | undefined]>([
  ["an order twice", (first, second) => [entry(1, first), entry(1, second)], ["[1].order"]],
  ["a class twice", (first) => [entry(1, first), entry(2, first.toUpperCase())], ["[1].environment_class_id"]],
  ["two local runners", () => [local(1), local(2)], ["[1].local_runner"]],
  ["local_runner = false", () => [local(1, false)], ["[0].environment_class"]],
  ["neither", () => [{ order: 1 }], ["[0].environment_class"]],
  ["an order below 0", () => [local(-1)], ["[0].order"]],
  ["no entry", () => [], undefined],
  ["31 entries", () => Array.from({ length: 31 }, (_, order) => entry(order, uuidv7())), undefined],
])("PLT-31 %s is INVALID_ARGUMENT, and the old list stays", async (_, entries, fields) => {
  const { id } = await createProject(member.client);
  await offer(member.client, id, classIds[0]);
  const error = await refusal(set(member.client, id, ...entries(...classIds)));
  expect(Code[error.code]).toBe("InvalidArgument");
  if (fields) expect(violatedFields(error)).toEqual(fields.map((field) => `project_environment_classes${field}`));
  expect(await offered(member.client, id)).toEqual([`0 ${classIds[0]}`]);
});

test("a class must be visible; whoever sees a project sees the classes that it offers", async () => {
  const hidden = await connectRunner(plane, { shared: false });
  disposables.use(hidden.runner);
  const { id } = await createProject(plane.admin);
  const unshare = await share(plane, member.id, {
    ...{ type: ResourceType.PROJECT, id, role: ResourceRole.PROJECT_EDITOR },
  });
  const { runnerConfiguration } = member.client;
  const read = () => runnerConfiguration.getEnvironmentClass({ environmentClassId: hidden.classId });
  const listed = async () => {
    const { environmentClasses } = await runnerConfiguration.listEnvironmentClasses({});
    return environmentClasses.some((each) => each.id === hidden.classId);
  };
  expect(await codeOf(set(member.client, id, entry(0, hidden.classId)))).toBe("NotFound");
  expect(await codeOf(set(member.client, id, entry(0, uuidv7())))).toBe("NotFound");
  expect([await codeOf(read()), await listed()]).toEqual(["NotFound", false]);

  await offer(plane.admin, id, hidden.classId);
  expect((await read()).environmentClass?.id).toBe(hidden.classId);
  expect(await listed()).toBe(true);
  const { environmentClasses } = await runnerConfiguration.listEnvironmentClasses({
    filter: { canCreateEnvironments: true },
  });
  expect(environmentClasses.map((each) => each.id)).not.toContain(hidden.classId);
  const change = runnerConfiguration.updateEnvironmentClass({ environmentClassId: hidden.classId, enabled: false });
  expect(await codeOf(change)).toBe("PermissionDenied");
  expect(await codeOf(member.client.runners.getRunner({ runnerId: hidden.runner.id }))).toBe("NotFound");
  await set(member.client, id, entry(4, hidden.classId));
  expect(await offered(member.client, id)).toEqual([`4 ${hidden.classId}`]);

  await unshare();
  expect(await codeOf(read())).toBe("NotFound");
});

test("pages go by order", async () => {
  const { id: projectId } = await createProject(member.client);
  await set(member.client, projectId, local(5), entry(2, classIds[0]), entry(2_000_000_000, classIds[1]));
  const orders: number[] = [];
  let token = "";
  do {
    const page = await member.client.projects.listProjectEnvironmentClasses({
      ...{ projectId, pagination: { pageSize: 1, token } },
    });
    orders.push(...page.projectEnvironmentClasses.map(({ order }) => order));
    token = page.pagination?.nextToken ?? "";
  } while (token);
  expect(orders).toEqual([2, 5, 2_000_000_000]);
});

test("the classes of a deleted runner are offered no more, and watchers of the project are told", async () => {
  const doomed = await connectRunner(plane);
  disposables.use(doomed.runner);
  const { id } = await createProject(member.client);
  await set(member.client, id, entry(0, doomed.classId), entry(1, classIds[0]));
  const before = (await traces(plane, id)).events.length;
  await plane.admin.runners.deleteRunner({ runnerId: doomed.runner.id, force: true });
  expect(await offered(member.client, id)).toEqual([`1 ${classIds[0]}`]);
  expect((await traces(plane, id)).events.slice(before).toSorted()).toEqual(
    [
      [ResourceType.PROJECT, ResourceOperation.UPDATE],
      [ResourceType.PROJECT_ENVIRONMENT_CLASS, ResourceOperation.UPDATE],
    ].toSorted(),
  );
});
