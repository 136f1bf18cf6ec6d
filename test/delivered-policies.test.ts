import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { DeliveredPolicies } from "../gen/berth/runner/v1/runner_control_pb.js";
import { AdmissionLevel, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { getEnvironment, reaches } from "./harness/environments.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { freePort } from "./harness/free-port.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { admitPort, runningEnvironment, servePort } from "./harness/ports.ts";
import { changePolicies, connectRunner } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

// Policies that runners have to know: they come by the private protocol and count at once, or from the next start on.

const TIMEOUT_MS = 90_000;
const { RUNNING, STOPPED } = EnvironmentPhase;

let plane: TestPlane;
let host: TestHost;
let member: TestUser;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  host = await startHost(plane);
  member = await plane.addUser();
}, TIMEOUT_MS);

afterAll(async () => {
  await host[Symbol.asyncDispose]();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
}, TIMEOUT_MS);

/** Security agents of the organization: one, or none. */
const agents = (enabled: boolean) =>
  plane.admin.organizations.updateOrganizationPolicies({
    organizationId: plane.organizationId,
    securityAgentPolicy: { customAgents: [{ enabled, name: "watcher", startCommand: "watch everything" }] },
  });

const newEnvironment = async (classId = host.classId): Promise<string> => {
  const { environment } = await member.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  return environment?.id ?? "";
};

describe("the runner of this program", () => {
  test(
    "ENV-33 serves no port any more once sharing is switched off, closes what is open, and serves again",
    async () => {
      const [id, port] = [await runningEnvironment(member, host.classId), await freePort()];
      await servePort(member, id, port, "shared");
      const url = await admitPort(member, id, port, AdmissionLevel.EVERYONE);
      expect((await fetch(url)).status).toBe(200);
      const { accessToken } = await member.client.environments.createEnvironmentAccessToken({ environmentId: id });
      const headers = { authorization: `Bearer ${accessToken}` };
      const socket = new WebSocket(url.replace(/^http/, "ws"));
      const closed = new Promise((resolve) => socket.addEventListener("close", resolve, { once: true }));
      await new Promise((resolve) => socket.addEventListener("open", resolve, { once: true }));

      await changePolicies(plane, { portSharingDisabled: true });
      const answer = await eventually(async () => {
        const response = await fetch(url, { headers });
        return response.status === 403 && response.text();
      }, "the port is closed");
      expect(answer).toContain("sharing ports is switched off");
      await closed;
      expect((await getEnvironment(member.client, id)).spec?.ports).toHaveLength(1);

      await changePolicies(plane, { portSharingDisabled: false });
      await eventually(async () => (await fetch(url)).status === 200, "the port is open again");
    },
    TIMEOUT_MS,
  );

  test(
    "does not start an environment that a security agent should watch, and leaves those alone that run",
    async () => {
      const running = await runningEnvironment(member, host.classId);
      await agents(true);
      const refused = await newEnvironment();
      const { status } = await eventually(async () => {
        const environment = await getEnvironment(member.client, refused);
        return environment.status?.phase === STOPPED ? environment : undefined;
      }, "the environment has stopped");
      expect(status?.failureMessage).toEqual(["this runner cannot run the security agent watcher"]);
      expect((await getEnvironment(member.client, running)).status?.phase).toBe(RUNNING);
      await agents(false);
      await member.client.environments.startEnvironment({ environmentId: refused });
      await reaches(member.client, refused, RUNNING);
    },
    TIMEOUT_MS,
  );

  test(
    "starts it with a warning where its operator lets it",
    async () => {
      await using lenient = await startHost(plane, { allowUnenforced: true });
      await agents(true);
      try {
        const { status } = await reaches(member.client, await newEnvironment(lenient.classId), RUNNING);
        expect(status?.warningMessage.join()).toContain("security agents do not run here: watcher");
      } finally {
        await agents(false);
      }
    },
    TIMEOUT_MS,
  );
});

test("every runner of the organization hears of a change before what follows from it, and of nothing that is not its business", async () => {
  const first = await connectRunner(plane);
  const second = await connectRunner(plane);
  const runners: FakeRunner[] = [first.runner, second.runner];
  for (const runner of runners) void runner.watch();
  const seen = (runner: FakeRunner) =>
    runner.seen.flatMap((event): (DeliveredPolicies | string | undefined)[] => {
      if (event.case !== "upsert") return [];
      const { object } = event.value;
      if (object.case === "organizationPolicies") return [object.value];
      return object.case === "environment" ? [object.value.environment?.id] : [];
    });
  await eventually(() => runners.every((runner) => seen(runner).length === 1), "the snapshots have policies");
  const organizationId = plane.organizationId;
  const change = (changes: object) =>
    plane.admin.organizations.updateOrganizationPolicies({ organizationId, ...changes });
  await change({ defaultEditorId: "vscode" });
  await change({ agentPolicy: { mcpDisabled: true, commandDenyList: ["rm"] }, webBrowserDisabled: true });
  const id = await newEnvironment(first.classId);
  await eventually(() => seen(first.runner).includes(id), "the environment is told");
  await eventually(() => seen(second.runner).length === 2, "the other runner is told as well");
  for (const runner of runners) {
    expect(seen(runner)[1]).toMatchObject({
      ...{ portSharingDisabled: false, webBrowserDisabled: true },
      agentPolicy: { mcpDisabled: true, commandDenyList: ["rm"] },
    });
  }
  expect(seen(first.runner)).toHaveLength(3);
  for (const runner of runners) await runner[Symbol.asyncDispose]();
});
