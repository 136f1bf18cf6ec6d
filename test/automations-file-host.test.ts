import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  type Service,
  ServicePhase,
  type TaskExecution,
  TaskExecutionPhase,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_ContentPhase as Phase,
  EnvironmentStatus_AutomationsFile_Presence as Presence,
} from "../gen/gitpod/v1/environment_pb.js";
import type { BerthClient } from "../src/client.ts";
import { createEnvironmentLogs } from "./harness/automation-logs.ts";
import { executionsOf } from "./harness/automations.ts";
import { createEnvironment, getEnvironment, operations, reaches } from "./harness/environments.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane, type TestPlane } from "./harness/plane.ts";
import { eventually } from "./harness/wait.ts";

// Automations files as people write them, from repositories on a git server to what runs.

const TIMEOUT_MS = 90_000;
const DEADLINE_MS = 60_000;
const STEP_MS = 50;
const { RUNNING, STOPPED, FAILED } = ServicePhase;

let plane: TestPlane;
let host: TestHost;
let git: GitServer;
let client: BerthClient;

beforeAll(async () => {
  plane = await startTestPlane({ BERTH_GIT_SCHEMES: "http" });
  await liftQuotas(plane);
  git = await startGitServer();
  host = await startHost(plane, { gitHosts: [git.host] });
  client = (await plane.addUser()).client;
}, TIMEOUT_MS);

afterAll(async () => {
  await host[Symbol.asyncDispose]();
  await git.close();
  await plane[Symbol.asyncDispose]();
}, TIMEOUT_MS);

/** A running environment with a checkout of these files, its automations file applied or refused. */
async function from(files: Record<string, string>): Promise<Environment> {
  const { url } = await git.createRepository(`r${crypto.randomUUID()}`, { files });
  const id = await createEnvironment(client, host.classId, url);
  await reaches(client, id, EnvironmentPhase.RUNNING);
  return await settled(id);
}

function settled(id: string): Promise<Environment> {
  const look = async () => {
    const environment = await getEnvironment(client, id);
    const phase = environment.status?.automationsFile?.phase ?? Phase.UNSPECIFIED;
    return phase === Phase.READY || phase === Phase.FAILED ? environment : undefined;
  };
  return eventually(look, "its automations file is applied or refused", DEADLINE_MS, STEP_MS);
}

const servicesOf = async (id: string): Promise<Map<string, Service>> => {
  const filter = { environmentIds: [id] };
  const { services } = await client.environmentAutomation.listServices({ filter, pagination: { pageSize: 100 } });
  return new Map(services.map((service) => [service.metadata?.reference ?? "", service]));
};

const serviceIs = (id: string, reference: string, phase: ServicePhase): Promise<Service> =>
  eventually(
    async () => {
      const service = (await servicesOf(id)).get(reference);
      if (service?.status?.phase === phase) return service;
      throw new Error(`it is ${ServicePhase[service?.status?.phase ?? 0]}: ${service?.status?.failureMessage}`);
    },
    `${reference} is ${ServicePhase[phase]}`,
    DEADLINE_MS,
    STEP_MS,
  );

const lastStep = ({ spec }: TaskExecution) => spec?.plan.at(-1)?.steps.at(-1);

/** The executions of an environment once that many have ended. */
const ended = (id: string, count: number): Promise<TaskExecution[]> =>
  eventually(
    async () => {
      const all = await executionsOf(client, id);
      const over = all.filter(({ status }) => (status?.phase ?? 0) >= TaskExecutionPhase.SUCCEEDED);
      if (over.length === count && all.length === count) return all;
      throw new Error(`${over.length} of ${all.length} have ended`);
    },
    `${count} executions have ended`,
    DEADLINE_MS,
    STEP_MS,
  );

const WEB = `
services:
  db:
    name: Database
    triggeredBy: [postEnvironmentStart]
    commands:
      start: |
        echo listening > ~/db
        exec sleep 1000
      ready: test -e ~/db
      stop: rm ~/db
  web:
    name: Web server
    triggeredBy: [manual]
    commands: { start: "exec sleep 1000" }
tasks:
  deps:
    name: Install
    command: echo deps >> ~/ran
    triggeredBy: [postDevcontainerStart]
  test:
    name: Tests
    command: cat ~/db && echo test >> ~/ran
    dependsOn: [deps, db]
    triggeredBy: [postEnvironmentStart, postDevcontainerStart]
`;

describe.concurrent("automations files", () => {
  test(
    "AUT-25 AUT-27 what a file has started runs once per occurrence, and shared work once per firing",
    async () => {
      const { id } = await from({ ".ona/automations.yaml": WEB });
      await serviceIs(id, "db", RUNNING);
      await ended(id, 3);
      const ops = await operations(client, id);
      const ran = (await ops.exec({ command: "sort ~/ran | uniq -c | awk '{print $1 $2}'" })).stdout;
      expect(ran).toBe("2deps\n2test\n");
      expect((await servicesOf(id)).get("web")?.status?.phase).toBe(STOPPED);
      await client.environments.stopEnvironment({ environmentId: id });
      await reaches(client, id, EnvironmentPhase.STOPPED);
      expect((await servicesOf(id)).get("db")?.status?.phase).toBe(STOPPED);
      await client.environments.startEnvironment({ environmentId: id });
      await reaches(client, id, EnvironmentPhase.RUNNING);
      const all = await ended(id, 4);
      expect(all.map(({ metadata }) => metadata?.startedBy).sort()).toEqual([
        "postDevcontainerStart",
        "postDevcontainerStart",
        "postEnvironmentStart",
        "postEnvironmentStart",
      ]);
      for (const { status } of all) expect(status?.phase, status?.failureMessage).toBe(TaskExecutionPhase.SUCCEEDED);
      const tests = all.filter(({ spec }) => spec?.plan.length === 2);
      expect(tests).toHaveLength(3);
      const logs = await createEnvironmentLogs(client, id);
      for (const each of tests) {
        expect(await logs.read(each.status?.logUrl, `?step=${lastStep(each)?.id}`)).toBe("listening\n");
      }
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-42 ENV-36 the first file in order counts; without it the next one at the next start",
    async () => {
      const task = (reference: string) =>
        `{"tasks":{"${reference}":{"name":"x","command":"true","triggeredBy":["manual"]}}}`;
      const { id, status } = await from({
        ".ona/automations.yml": task("first"),
        ".ona/automations.json": task("second"),
        ".gitpod/automations.yaml": task("third"),
      });
      expect(status?.automationsFile).toMatchObject({
        phase: Phase.READY,
        automationsFilePresence: Presence.DISCOVERED,
        automationsFilePath: ".ona/automations.yml",
        warningMessage: "",
      });
      const tasks = async () => {
        const { tasks } = await client.environmentAutomation.listTasks({ filter: { environmentIds: [id] } });
        return tasks.map(({ metadata }) => metadata?.reference).sort();
      };
      expect(await tasks()).toEqual(["first"]);
      await (await operations(client, id)).exec({ command: "rm .ona/automations.yml" });
      await client.environments.stopEnvironment({ environmentId: id });
      await reaches(client, id, EnvironmentPhase.STOPPED);
      await client.environments.startEnvironment({ environmentId: id });
      await reaches(client, id, EnvironmentPhase.RUNNING);
      await eventually(async () => (await tasks()).join() === "first,second", "the second file is applied");
      expect((await settled(id)).status?.automationsFile?.automationsFilePath).toBe(".ona/automations.json");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-29 ENV-36 a file with an unknown field is refused with its line, and the environment runs",
    async () => {
      const file = `services:\n  web:\n    name: Web\n    command: npm start\n`;
      const { id, status } = await from({ ".gitpod/automations.yaml": file });
      expect(status?.phase).toBe(EnvironmentPhase.RUNNING);
      expect(status?.automationsFile).toMatchObject({
        phase: Phase.FAILED,
        failureMessage:
          ".gitpod/automations.yaml: line 4: services.web.command is not a field of services: use commands.start",
      });
      expect((await servicesOf(id)).size).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-33 a file of which nothing starts by itself is applied with a warning",
    async () => {
      const file = "tasks:\n  t: { name: T, command: 'true' }\n";
      const { status } = await from({ ".ona/automations.yaml": file });
      expect(status?.automationsFile?.phase).toBe(Phase.READY);
      expect(status?.automationsFile?.warningMessage).toContain("trigger");
    },
    TIMEOUT_MS,
  );

  test(
    "AUT-32 a changed start command restarts what runs, a changed description does not",
    async () => {
      const file = (start: string, description: string) =>
        `services:\n  s:\n    name: S\n    description: ${description}\n    triggeredBy: [postEnvironmentStart]\n    commands: { start: "${start}" }\n`;
      const { id } = await from({ ".ona/automations.yaml": file("exec sleep 1000", "one") });
      const first = await serviceIs(id, "s", RUNNING);
      const ops = await operations(client, id);
      const change = async (text: string, session: string) => {
        await ops.exec({ command: `printf '%s' '${text}' > .ona/automations.yaml` });
        await client.environments.updateEnvironment({ environmentId: id, spec: { automationsFile: { session } } });
        await eventually(
          async () => (await getEnvironment(client, id)).status?.automationsFile?.session === session,
          "the new session",
        );
        await settled(id);
      };
      await change(file("exec sleep 1000", "two"), crypto.randomUUID());
      const described = (await servicesOf(id)).get("s");
      expect(described?.metadata?.description).toBe("two");
      expect(described?.spec?.session).toBe(first.spec?.session);
      await change(file("exec sleep 1001", "two"), crypto.randomUUID());
      const restarted = await eventually(async () => {
        const service = await serviceIs(id, "s", RUNNING);
        return service.status?.session !== first.status?.session ? service : undefined;
      }, "a new session of the service");
      expect(restarted.status?.session).toBe(restarted.spec?.session);
    },
    TIMEOUT_MS,
  );

  test(
    "links out of the checkout are no automations file",
    async () => {
      const { id, status } = await from({ "README.md": "x" });
      expect(status?.automationsFile?.automationsFilePresence).toBe(Presence.ABSENT);
      const ops = await operations(client, id);
      await ops.exec({ command: "mkdir .ona; echo 'tasks: {}' > ~/outside; ln -s ~/outside .ona/automations.yaml" });
      const session = crypto.randomUUID();
      await client.environments.updateEnvironment({ environmentId: id, spec: { automationsFile: { session } } });
      await eventually(
        async () => (await getEnvironment(client, id)).status?.automationsFile?.session === session,
        "news",
      );
      expect((await settled(id)).status?.automationsFile).toMatchObject({
        phase: Phase.READY,
        automationsFilePresence: Presence.ABSENT,
      });
    },
    TIMEOUT_MS,
  );

  test(
    "real habits: a service that forks, one that ignores signals, one that is never ready",
    async () => {
      const file = `
services:
  forks:
    name: Goes into the background
    triggeredBy: [postEnvironmentStart]
    commands: { start: "sleep 1000 & disown; exit 0", ready: "false" }
  never:
    name: Never ready
    triggeredBy: [postEnvironmentStart]
    readinessTimeout: 2s
    commands: { start: "exec sleep 1000", ready: "echo not yet; exit 1" }
`;
      const { id } = await from({ ".ona/automations.yaml": file });
      const never = await serviceIs(id, "never", FAILED);
      expect(never.status?.failureMessage).toContain("2 seconds");
      const forks = await eventually(async () => {
        const service = (await servicesOf(id)).get("forks");
        return [STOPPED, FAILED].includes(service?.status?.phase ?? 0) && service?.status?.session
          ? service
          : undefined;
      }, "the forking service has ended");
      expect(forks.status?.phase).toBe(STOPPED);
    },
    TIMEOUT_MS,
  );
});
