import { create } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, expect, test } from "vitest";
import {
  AutomationsFileSchema,
  ServicePhase,
  ServiceRole,
  UpsertAutomationsFileRequestSchema,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import type { Environment } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import {
  insideOf,
  newService,
  newTask,
  readService,
  readTask,
  runningEnvironment,
  type Stage,
  setStage,
  startTask,
  traces,
} from "./harness/automations.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";

const { RUNNING, STOPPED } = ServicePhase;

let stage: Stage;
let client: BerthClient;
let environment: Environment;

beforeAll(async () => {
  stage = await setStage();
  client = stage.member.client;
  environment = await runningEnvironment(stage);
});

afterAll(async () => {
  expect(stage.plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await stage[Symbol.asyncDispose]();
});

const api = () => client.environmentAutomation;
const upsert = ({ id }: Environment, automationsFile: object, by = client) =>
  by.environmentAutomation.upsertAutomationsFile({ environmentId: id, automationsFile });

const FILE = {
  services: { db: { name: "Database", role: "editor", triggeredBy: ["manual"], commands: { start: "db" } } },
  tasks: {
    deps: { name: "Install", command: "npm ci", triggeredBy: ["postEnvironmentStart"] },
    test: { name: "Tests", command: "npm test", dependsOn: ["deps", "db"] },
  },
};

/** How many events and audit entries the environment's services and tasks have left. */
async function noise({ id }: Environment): Promise<number[]> {
  const { point } = stage.plane.plane.app.db;
  const [row] = await point<{ events: number; audit: number }[]>`
    select (select count(*)::int from events where environment_id = ${id} and resource_type <> 1) as events,
      (select count(*)::int from audit_log) as audit`;
  return [row!.events, row!.audit];
}

test("AUT-30 the same file twice has the same answer, and the second time no other effect", async () => {
  const own = await runningEnvironment(stage);
  const inside = await insideOf(stage, own);
  const first = await upsert(own, FILE, inside);
  expect([first.updatedServiceIds.length, first.updatedTaskIds.length]).toEqual([1, 2]);
  const db = await readService(client, first.updatedServiceIds[0]!);
  expect(db).toMatchObject({
    metadata: { reference: "db", role: ServiceRole.EDITOR, creator: { id: own.id } },
    spec: { desiredPhase: STOPPED, specVersion: 1n },
  });
  const [deps, tests] = await Promise.all(first.updatedTaskIds.map((id) => readTask(client, id)));
  expect([deps?.metadata?.reference, tests?.metadata?.reference]).toEqual(["deps", "test"]);
  expect(tests?.dependsOn).toEqual([deps?.id, db.id]);
  const before = await noise(own);
  expect(await upsert(own, FILE, inside)).toEqual(first);
  expect(await noise(own)).toEqual(before);
  // Nothing starts because of a file alone.
  expect((await api().listTaskExecutions({ filter: { environmentIds: [own.id] } })).taskExecutions).toEqual([]);
});

test("AUT-31 what a file does not name stays as it is", async () => {
  const own = await runningEnvironment(stage);
  const [service, task] = [await newService(client, own.id, "kept"), await newTask(client, own.id, "kept")];
  const { updatedServiceIds, updatedTaskIds } = await upsert(own, {
    tasks: { new: { name: "New", command: "new", dependsOn: ["kept-too"] }, "kept-too": { name: "K", command: "k" } },
  });
  expect([updatedServiceIds.length, updatedTaskIds.length]).toEqual([0, 2]);
  expect(await readService(client, service.id)).toEqual(service);
  expect(await readTask(client, task.id)).toEqual(task);
  expect(await upsert(own, {})).toMatchObject({ updatedServiceIds: [], updatedTaskIds: [] });
});

test("AUT-32 a new start command restarts what runs in a new session, a new description does not", async () => {
  const { updatedServiceIds } = await upsert(environment, {
    services: { web: { name: "Web", commands: { start: "one" } } },
  });
  const [id] = updatedServiceIds as [string];
  await api().startService({ id });
  const started = await readService(client, id);
  await stage.runner.reportService(id, { session: started.spec?.session ?? "", phase: RUNNING });
  const web = (more: object) =>
    upsert(environment, { services: { web: { name: "Web", commands: { start: "one" }, ...more } } });
  await web({ description: "Shows it" });
  const described = await readService(client, id);
  expect(described.metadata?.description).toBe("Shows it");
  expect(described.spec).toEqual(started.spec);
  await web({ description: "Shows it", commands: { start: "two" } });
  const restarted = await readService(client, id);
  expect(restarted.spec).toMatchObject({ desiredPhase: RUNNING, commands: { start: "two" } });
  expect(restarted.spec?.session).not.toBe(started.spec?.session);
  const { service } = (await stage.runner.desiredService(id, (each) => each.service?.spec?.commands?.start === "two"))!;
  expect(service?.spec?.session).toBe(restarted.spec?.session);
  expect((await traces(stage, id)).actions).toEqual([
    ...["Service created", "Service start requested", "Service is running", "Service updated", "Service updated"],
  ]);
});

test("a task that a file changes keeps its executions, which keep their plan", async () => {
  const { updatedTaskIds } = await upsert(environment, { tasks: { build: { name: "Build", command: "old" } } });
  const execution = await startTask(client, { id: updatedTaskIds[0]! });
  await upsert(environment, { tasks: { build: { name: "Build", command: "new" } } });
  const { taskExecution } = await api().getTaskExecution({ id: execution.id });
  expect(taskExecution?.spec?.plan[0]?.steps[0]?.step).toMatchObject({ value: { spec: { command: "old" } } });
});

test("AUT-29 one mistake and nothing of the file is stored; the mistake is named by its path", async () => {
  const own = await runningEnvironment(stage);
  const good = { good: { name: "Good", command: "good" } };
  const fields = async (automationsFile: object) => {
    const error = await refusal(upsert(own, automationsFile));
    expect(Code[error.code]).toBe("InvalidArgument");
    return violatedFields(error);
  };
  expect(await fields({ tasks: { ...good, bad: { name: "Bad", command: "x".repeat(64 * 1024 + 1) } } })).toEqual([
    "automations_file.tasks[bad].command",
  ]);
  expect(await fields({ tasks: { ...good, bad: { name: "Bad", command: "x", dependsOn: ["good", "gone"] } } })).toEqual(
    ["automations_file.tasks[bad].depends_on[1]"],
  );
  expect(await fields({ tasks: { good: { name: "Good", command: "x", dependsOn: ["good"] } } })).toEqual([
    "automations_file.tasks[good].depends_on",
  ]);
  expect(await fields({ services: { "not good": { name: "x" } } })).toEqual(["automations_file.services[not good]"]);
  expect(await codeOf(upsert(own, { services: { a: { name: "A", triggeredBy: ["beforeSnapshot"] } } }))).toBe(
    "InvalidArgument",
  );
  expect(await codeOf(upsert(own, { services: { a: { name: "A", role: "security-agent" } } }))).toBe("InvalidArgument");
  const error = await refusal(api().upsertAutomationsFile({ environmentId: own.id }));
  expect(violatedFields(error)).toEqual(["automations_file"]);

  const post = async (automationsFile: object) => {
    const response = await fetch(`${stage.plane.url}/gitpod.v1.EnvironmentAutomationService/UpsertAutomationsFile`, {
      method: "POST",
      headers: { authorization: `Bearer ${stage.member.token}`, "content-type": "application/json" },
      body: JSON.stringify({ environmentId: own.id, aNewerField: 1, automationsFile }),
    });
    return [response.status, ((await response.json()) as { message?: string }).message] as const;
  };
  expect(await post({ services: { web: { name: "Web", dependsOn: ["db"] } }, tasks: good })).toEqual([
    ...[400, expect.stringContaining('automations_file.services["web"].dependsOn')],
  ]);
  expect((await api().listTasks({ filter: { environmentIds: [own.id] } })).tasks).toEqual([]);
  // Elsewhere fields of newer clients are left alone.
  expect((await post({ tasks: good }))[0]).toBe(200);

  const file = create(AutomationsFileSchema, FILE);
  const data = new BinaryWriter().uint32(1).finish();
  file.services.db!.$unknown = [{ no: 99, wireType: WireType.Varint, data }];
  const request = create(UpsertAutomationsFileRequestSchema, { environmentId: own.id, automationsFile: file });
  const binary = createBerthClient({ baseUrl: stage.plane.url, token: stage.member.token, useBinaryFormat: true });
  expect(violatedFields(await refusal(binary.environmentAutomation.upsertAutomationsFile(request)))).toEqual([
    "automations_file.services[db]",
  ]);
});
