import { afterAll, beforeAll, expect, test } from "vitest";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import type { ParseContextURLResponse } from "../gen/gitpod/v1/runner_pb.js";
import type { BerthClient } from "../src/client.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, git, offer } from "./harness/projects.ts";
import { addClass, connectRunner, share } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

// What a context URL has to do with projects. The runner answers as one would that has looked at the repository.

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane));
  runner.watch();
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await plane[Symbol.asyncDispose]();
});

const answered = new Set<string>();

/** Parses an address that stands for this repository, a fork of another one if that is given. */
async function parse(client: BerthClient, cloneUrl: string, upstreamRemoteUrl = ""): Promise<ParseContextURLResponse> {
  const asked = client.runners.parseContextURL({ contextUrl: cloneUrl, runnerId: runner.id });
  const callId = await eventually(
    () =>
      runner.seen
        .flatMap((event) => (event.case === "call" ? [event.value.callId] : []))
        .find((id) => !answered.has(id)),
    "the question",
  );
  answered.add(callId);
  const response = { git: { cloneUrl, upstreamRemoteUrl, branch: "main" } };
  await runner.control.completeCall({ callId, outcome: { case: "parseContext", value: { response } } });
  return asked;
}

async function projectOf(...remoteUris: string[]): Promise<string> {
  const { id } = await createProject(plane.admin, { initializer: { specs: remoteUris.map((each) => git(each)) } });
  await share(plane, member.id, { type: ResourceType.PROJECT, id, role: ResourceRole.PROJECT_USER });
  return id;
}

test("RUN-40 projects of the repository are named, however they spell it, and their first usable class leads", async () => {
  const newest = await addClass(plane, runner.id);
  const disabled = await addClass(plane, runner.id);
  await plane.admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: disabled, enabled: false });
  const first = await projectOf("https://GitHub.com/Team/App");
  const second = await projectOf("git@github.com:team/app.git", "https://github.com/team/tools");
  const base = await projectOf("https://github.com/base/app.git");
  await projectOf("https://github.com/team/other");
  await createProject(plane.admin, { initializer: { specs: [git("https://github.com/team/app")] } });
  await offer(plane.admin, first, disabled, classId);

  const parsed = await parse(member.client, "https://github.com/team/app.git");
  expect(parsed.projectIds).toEqual([first, second]);
  expect(parsed.recommendedEnvironmentClasses).toEqual([classId, newest]);
  const fork = await parse(member.client, "https://github.com/team/app.git", "https://github.com/base/app.git");
  expect(fork.projectIds).toEqual([first, second, base]);
  const unknown = await parse(member.client, "https://github.com/team/unknown.git");
  expect([unknown.projectIds, unknown.recommendedEnvironmentClasses]).toEqual([[], [newest, classId]]);
  expect((await parse(plane.admin, "https://github.com/team/app.git")).projectIds).toHaveLength(3);
});

test("on a plain git server the case of a path counts", async () => {
  const id = await projectOf("https://git.example.org/Team/App");
  expect((await parse(member.client, "https://git.example.org/Team/App.git")).projectIds).toEqual([id]);
  expect((await parse(member.client, "https://git.example.org/team/app.git")).projectIds).toEqual([]);
});

test("a project that is being deleted is not named", async () => {
  const id = await projectOf("https://git.example.org/gone/app");
  await plane.admin.projects.deleteProject({ projectId: id });
  expect((await parse(member.client, "https://git.example.org/gone/app")).projectIds).toEqual([]);
});
