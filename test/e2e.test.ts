import { access, readdir } from "node:fs/promises";
import { join } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import Gitpod from "@gitpod/sdk";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { type BerthClient, createBerthClient, createOpsClient } from "../src/client.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { eventually } from "./harness/wait.ts";

// The whole product in one story: a real git server, the server and its embedded runner as a process of their own.

let git: GitServer;
let berth: Installation;

beforeAll(async () => {
  git = await startGitServer();
  await git.createRepository("project", { files: { "README.md": "hello\n", "src/main.txt": "one\n" } });
  berth = await startInstallation({ BERTH_SCM_ALLOW_HOSTS: git.host, BERTH_GIT_SCHEMES: "http" });
});

afterAll(async () => {
  await berth?.[Symbol.asyncDispose]();
  await git?.close();
});

async function usableClass(client: BerthClient): Promise<string> {
  return eventually(async () => {
    const { environmentClasses } = await client.environments.listEnvironmentClasses({
      filter: { canCreateEnvironments: true },
    });
    return environmentClasses[0]?.id;
  }, "a usable class");
}

const initializer = () => ({ specs: [{ spec: { case: "git" as const, value: { remoteUri: git.url("project") } } }] });

/** Reads once, then follows the events of the environment until it has the phase, as the official clients do. */
async function reaches(client: BerthClient, id: string, phase: EnvironmentPhase) {
  const signal = AbortSignal.timeout(60_000);
  const read = async () => (await client.environments.getEnvironment({ environmentId: id })).environment;
  const first = await read();
  if (first?.status?.phase === phase) return first;
  const stream = client.events.watchEvents({ scope: { case: "environmentId", value: id } }, { signal });
  for await (const event of stream) {
    if (event.resourceType !== ResourceType.ENVIRONMENT) continue;
    const environment = await read();
    if (environment?.status?.failureMessage.length) throw new Error(environment.status.failureMessage.join("; "));
    if (environment?.status?.phase === phase) return environment;
  }
  throw new Error(`the stream ended before ${EnvironmentPhase[phase]}`);
}

async function enter(client: BerthClient, id: string, opsUrl: string) {
  const { accessToken } = await client.environments.createEnvironmentAccessToken({ environmentId: id });
  return createOpsClient({ opsUrl, token: accessToken });
}

describe.each(["connect", "grpc"] as const)("a git URL becomes a running environment, over %s", (transport) => {
  test("ENV-1 ENV-10 ENV-11 ENV-22 create, work, stop, start, delete", { timeout: 120_000 }, async () => {
    const client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken, transport });
    const before = git.fetches("project");
    const created = await client.environments.createEnvironment({
      name: "story",
      spec: { machine: { class: await usableClass(client) }, content: { initializer: initializer() } },
    });
    const id = created.environment?.id ?? "";
    expect(created.environment?.status?.phase).toBe(EnvironmentPhase.CREATING);
    expect(created.environment?.spec?.specVersion).toBe(1n);

    const running = await reaches(client, id, EnvironmentPhase.RUNNING);
    const opsUrl = running.status?.environmentUrls?.ops ?? "";
    expect(opsUrl).not.toBe("");
    const clones = git.fetches("project") - before;

    const ops = await enter(client, id, opsUrl);
    const done = await ops.exec({ command: "cat README.md && whoami && git rev-parse --abbrev-ref HEAD" });
    expect(done.exitCode).toBe(0);
    expect(done.stdout.split("\n")[0]).toBe("hello");
    const read = await ops.readFile({ path: "README.md" });
    expect(
      JSON.stringify(read, (_key, value) =>
        value instanceof Uint8Array ? Buffer.from(value).toString() : typeof value === "bigint" ? `${value}` : value,
      ),
    ).toContain("hello");
    await ops.writeFile({ path: "notes.txt", content: Buffer.from("kept") });

    await client.environments.stopEnvironment({ environmentId: id });
    const stopped = await reaches(client, id, EnvironmentPhase.STOPPED);
    expect(stopped.status?.environmentUrls?.ops ?? "").toBe("");
    expect(await berth.processesOf(id)).toEqual([]);

    await client.environments.startEnvironment({ environmentId: id });
    const starting = (await client.environments.getEnvironment({ environmentId: id })).environment;
    expect(starting?.status?.phase).not.toBe(EnvironmentPhase.STOPPED);
    expect(starting?.spec?.machine?.session).not.toBe(running.spec?.machine?.session);
    expect(starting?.spec?.content?.session).toBe(running.spec?.content?.session);
    const again = await reaches(client, id, EnvironmentPhase.RUNNING);
    expect(git.fetches("project") - before).toBe(clones);
    const opsAgain = await enter(client, id, again.status?.environmentUrls?.ops ?? "");
    expect((await opsAgain.exec({ command: "cat notes.txt" })).stdout).toBe("kept");

    await client.environments.deleteEnvironment({ environmentId: id });
    const deleted = await reaches(client, id, EnvironmentPhase.DELETED);
    expect(deleted.status?.phase).toBe(EnvironmentPhase.DELETED);
    await eventually(
      () =>
        access(join(berth.dataDir, "runner/environments", id)).then(
          () => false,
          () => true,
        ),
      "the folder of the deleted environment goes",
    );
    const refused = await opsAgain.exec({ command: "true" }).catch((error: unknown) => ConnectError.from(error).code);
    expect([Code.Unauthenticated, Code.Unavailable]).toContain(refused);
  });
});

test("the official SDK drives the story unmodified, with auto-paging of page size 1", {
  timeout: 120_000,
}, async () => {
  const sdk = new Gitpod({ baseURL: `${berth.url}/api`, bearerToken: berth.adminToken });
  const classes = await sdk.environments.classes.list({ filter: { canCreateEnvironments: true } });
  const spec = {
    machine: { class: classes.environmentClasses[0]?.id },
    content: { initializer: { specs: [{ git: { remoteUri: git.url("project") } }] } },
  };
  const ids: string[] = [];
  for (let index = 0; index < 3; index += 1) {
    const { environment } = await sdk.environments.create({ spec });
    ids.push(environment.id);
  }
  const listed: string[] = [];
  for await (const environment of sdk.environments.list({ pageSize: 1 })) listed.push(environment.id);
  expect(listed.filter((id) => ids.includes(id))).toEqual([...ids].reverse());

  for (const id of ids) {
    await eventually(
      async () => {
        const { environment } = await sdk.environments.retrieve({ environmentId: id });
        expect(environment.status?.failureMessage ?? []).toEqual([]);
        return environment.status?.phase === "ENVIRONMENT_PHASE_RUNNING";
      },
      `environment ${id} runs`,
      60_000,
    );
  }
  const [first = ""] = ids;
  const { accessToken } = await sdk.environments.createLogsToken({ environmentId: first });
  const { environment } = await sdk.environments.retrieve({ environmentId: first });
  const logs = await fetch(`${environment.status?.environmentUrls?.logs}?follow=false`, {
    headers: { authorization: `Bearer ${accessToken}` },
  });
  expect(logs.status).toBe(200);
  expect(await logs.text()).toContain("[section-create]");

  const controller = new AbortController();
  const events = await sdk.events.watch({ environmentId: first }, { signal: controller.signal });
  await sdk.environments.stop({ environmentId: first });
  for await (const event of events) {
    if (event.resourceType === "RESOURCE_TYPE_ENVIRONMENT") break;
  }
  controller.abort();
  for (const id of ids) await sdk.environments.delete({ environmentId: id });
  await eventually(
    async () =>
      (await readdir(join(berth.dataDir, "runner/environments"))).filter((id) => ids.includes(id)).length === 0,
    "the folders go",
    60_000,
  );
});

test("the official SDK drives projects unmodified", { timeout: 120_000 }, async () => {
  const sdk = new Gitpod({ baseURL: `${berth.url}/api`, bearerToken: berth.adminToken });
  const classes = await sdk.environments.classes.list({ filter: { canCreateEnvironments: true } });
  const environmentClass = { environmentClassId: classes.environmentClasses[0]?.id };
  const specs = [{ git: { remoteUri: git.url("project"), targetMode: "CLONE_TARGET_MODE_REMOTE_HEAD" as const } }];
  const ids: string[] = [];
  for (const name of ["One", "Two", "Three"]) {
    const { project } = await sdk.projects.create({ name, environmentClass, initializer: { specs } });
    expect(project?.initializer?.specs).toEqual(specs);
    ids.push(project?.id ?? "");
  }
  const listed: string[] = [];
  for await (const project of sdk.projects.list({ pageSize: 1 })) listed.push(project.id ?? "");
  expect(listed.filter((id) => ids.includes(id))).toEqual([...ids].reverse());

  const [projectId = ""] = ids;
  const updated = await sdk.projects.update({ projectId, name: "First", automationsFilePath: "auto.yaml" });
  expect(updated.project).toMatchObject({ automationsFilePath: "auto.yaml", metadata: { name: "First" } });
  expect((await sdk.projects.retrieve({ projectId })).project?.metadata?.name).toBe("First");
  for (const id of ids) await sdk.projects.delete({ projectId: id });
  await eventually(async () => {
    const gone = await Promise.allSettled(ids.map((id) => sdk.projects.retrieve({ projectId: id })));
    return gone.every((each) => each.status === "rejected" && (each.reason as { status?: number }).status === 404);
  }, "the projects go");
});

test("ENV-6 an environment from a project on main is on the branch that its creator asked for", {
  timeout: 120_000,
}, async () => {
  await git.createRepository("branches", { defaultBranch: "main", branches: { dev: { "dev.txt": "only here" } } });
  const client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  const on = (cloneTarget: string) => ({
    ...{ specs: [{ spec: { case: "git" as const, value: { remoteUri: git.url("branches"), cloneTarget } } }] },
  });
  const { project } = await client.projects.createProject({ name: "Branches", initializer: on("main") });
  const projectId = project?.id ?? "";
  const projectEnvironmentClasses = [{ environmentClass: { case: "localRunner" as const, value: true } }];
  await client.projects.updateProjectEnvironmentClasses({ projectId, projectEnvironmentClasses });
  const { environment } = await client.environments.createEnvironmentFromProject({
    ...{ projectId, spec: { content: { initializer: on("dev") } } },
  });
  const running = await reaches(client, environment?.id ?? "", EnvironmentPhase.RUNNING);
  expect(running.metadata?.projectId).toBe(projectId);
  const ops = await enter(client, running.id, running.status?.environmentUrls?.ops ?? "");
  const { stdout } = await ops.exec({ command: "git rev-parse --abbrev-ref HEAD && cat dev.txt" });
  expect(stdout).toBe("dev\nonly here");
  // Asked for from this environment, a project holds what it was made from.
  const copy = await client.projects.createProjectFromEnvironment({ name: "Copy", environmentId: running.id });
  expect(copy.project?.initializer).toMatchObject(on("dev"));
  await client.environments.deleteEnvironment({ environmentId: running.id });
  await reaches(client, running.id, EnvironmentPhase.DELETED);
});
