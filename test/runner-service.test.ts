import { createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { PolicyEnforcedFailedPreconditionDetailsSchema } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerKind, RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import {
  LogLevel,
  RunnerPhase,
  RunnerReleaseChannel,
  RunnerService,
  RunnerVariant,
} from "../gen/gitpod/v1/runner_pb.js";
import type { BerthClient } from "../src/client.ts";
import { FakeRunner } from "./harness/fake-runner.ts";
import { startGitServer } from "./harness/git-server.ts";
import { newGroup } from "./harness/groups.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";

let plane: TestPlane;
let admin: BerthClient;
let member: TestUser;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  admin = plane.admin;
  member = await plane.addUser();
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const WORKING = [
  { key: "cpu", value: "2" },
  { key: "memory", value: "4096" },
];

/** A runner that an admin has made and that nobody has signed up for. */
async function newRunner(provider = RunnerProvider.LINUX_HOST) {
  const { runner, exchangeToken } = await admin.runners.createRunner({ name: "test runner", provider });
  return { id: runner!.runnerId, exchangeToken };
}

/** A runner with a process that has registered. */
async function connectedRunner() {
  const { id, exchangeToken } = await newRunner();
  const { accessToken } = await admin.identity.exchangeToken({ exchangeToken });
  const process = new FakeRunner(plane.url, accessToken);
  await process.register();
  return { id, process };
}

const newClass = async (runnerId: string, configuration = WORKING, displayName = "Standard") =>
  (
    await admin.runnerConfiguration.createEnvironmentClass({
      ...{ runnerId, displayName, configuration },
      description: "For tests",
    })
  ).id;

async function newEnvironment(client: BerthClient, classId: string) {
  const spec = { machine: { class: classId } };
  return (await client.environments.createEnvironment({ spec })).environment!;
}

/** Actions of the audit log about one subject, oldest first. */
async function audited(subjectId: string): Promise<string[]> {
  const rows = await plane.plane.app.db.point<{ action: string }[]>`
    select action from audit_log where subject_id = ${subjectId} order by id`;
  return rows.map((row) => row.action);
}

describe("CreateRunner", () => {
  test("RUN-1: exactly one of kind and provider is needed", async () => {
    expect(await codeOf(admin.runners.createRunner({ name: "none" }))).toBe("InvalidArgument");
    const both = { name: "both", kind: RunnerKind.LOCAL, provider: RunnerProvider.LINUX_HOST };
    expect(violatedFields(await refusal(admin.runners.createRunner(both)))).toEqual(["provider"]);
  });

  test("RUN-2: the provider decides on the kind; a new runner is CREATED and wants to be ACTIVE", async () => {
    const kinds = [
      [RunnerProvider.AWS_EC2, RunnerKind.REMOTE],
      [RunnerProvider.GCP, RunnerKind.REMOTE],
      [RunnerProvider.DEV_AGENT, RunnerKind.REMOTE],
      [RunnerProvider.LINUX_HOST, RunnerKind.LOCAL],
      [RunnerProvider.DESKTOP_MAC, RunnerKind.LOCAL],
    ] as const;
    for (const [provider, kind] of kinds) {
      const response = await admin.runners.createRunner({ name: "by provider", provider });
      expect(response.runner).toMatchObject({
        provider,
        kind,
        creator: { principal: Principal.USER },
        status: { phase: RunnerPhase.CREATED, version: "" },
        spec: {
          desiredPhase: RunnerPhase.ACTIVE,
          variant: RunnerVariant.STANDARD,
          configuration: { releaseChannel: RunnerReleaseChannel.STABLE, logLevel: LogLevel.INFO },
        },
      });
      expect(response.runner?.status?.updatedAt).toBeUndefined();
      expect(response.runner?.spec?.configuration?.updateWindow).toBeUndefined();
      expect(response.exchangeToken).toMatch(/^berth_rxt_\w{49}$/);
      expect(response.accessToken).toBe("");
    }
  });

  test("a kind alone stands for the runner that ships, or for none", async () => {
    const local = await admin.runners.createRunner({ name: "local", kind: RunnerKind.LOCAL });
    expect(local.runner).toMatchObject({ kind: RunnerKind.LOCAL, provider: RunnerProvider.LINUX_HOST });
    const remote = await admin.runners.createRunner({ name: "remote", kind: RunnerKind.REMOTE });
    expect(remote.runner).toMatchObject({ kind: RunnerKind.REMOTE, provider: RunnerProvider.UNSPECIFIED });
  });

  test("RUN-3: a runner manager belongs to managed runners and to no others", async () => {
    const runnerManagerId = "018f2f30-7b2e-7cc0-8000-000000000001";
    const create = (provider: RunnerProvider, id?: string) =>
      admin.runners.createRunner({ name: "managed", provider, ...(id && { runnerManagerId: id }) });
    expect(violatedFields(await refusal(create(RunnerProvider.MANAGED)))).toEqual(["runner_manager_id"]);
    expect(violatedFields(await refusal(create(RunnerProvider.AWS_EC2, runnerManagerId)))).toEqual([
      "runner_manager_id",
    ]);
    const { runner } = await create(RunnerProvider.MANAGED, runnerManagerId);
    expect(runner).toMatchObject({ runnerManagerId, kind: RunnerKind.REMOTE });
  });

  test("RUN-4: the local configuration runner is there once and can be neither created nor deleted", async () => {
    const create = admin.runners.createRunner({ name: "mine", kind: RunnerKind.LOCAL_CONFIGURATION });
    expect(violatedFields(await refusal(create))).toEqual(["kind"]);
    const listed = await admin.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL_CONFIGURATION] } });
    expect(listed.runners).toMatchObject([{ name: "Local runners", status: { phase: RunnerPhase.ACTIVE } }]);
    const [{ runnerId } = { runnerId: "" }] = listed.runners;
    for (const force of [false, true])
      expect(await codeOf(admin.runners.deleteRunner({ runnerId, force }))).toBe("FailedPrecondition");
    expect(await codeOf(admin.runners.createRunnerToken({ runnerId }))).toBe("FailedPrecondition");
    expect((await member.client.runners.getRunner({ runnerId })).runner?.runnerId).toBe(runnerId);
  });

  test("RUN-5: update windows of at least two hours, returned as they were sent", async () => {
    const create = (updateWindow: { startHour?: number; endHour?: number }) =>
      admin.runners.createRunner({
        name: "windows",
        provider: RunnerProvider.AWS_EC2,
        spec: { configuration: { updateWindow } },
      });
    for (const window of [{ startHour: 22, endHour: 4 }, { startHour: 23 }, { startHour: 0, endHour: 2 }]) {
      const { runner } = await create(window);
      const stored = (await admin.runners.getRunner({ runnerId: runner!.runnerId })).runner?.spec?.configuration;
      expect(stored?.updateWindow?.startHour).toBe(window.startHour);
      expect(stored?.updateWindow?.endHour).toBe(window.endHour);
    }
    const wrong = [
      { startHour: 5, endHour: 6 },
      { startHour: 5, endHour: 5 },
      { startHour: 24, endHour: 2 },
      { endHour: 4 },
      { startHour: 24 },
      { startHour: 23, endHour: 0 },
    ];
    for (const window of wrong) {
      const error = await refusal(create(window));
      expect(violatedFields(error)[0], JSON.stringify(window)).toMatch(/^spec\.configuration\.update_window/);
    }
    expect((await create({})).runner?.spec?.configuration?.updateWindow).toBeUndefined();
  });

  test("unknown numbers in the spec, a wrong goal and metrics without a URL are each named", async () => {
    const call = admin.runners.createRunner({
      name: "wrong",
      provider: RunnerProvider.AWS_EC2,
      spec: {
        desiredPhase: RunnerPhase.DELETED,
        variant: 99 as RunnerVariant,
        configuration: {
          releaseChannel: 99 as RunnerReleaseChannel,
          logLevel: 99 as LogLevel,
          metrics: { enabled: true, url: "ftp://metrics.example.org" },
        },
      },
    });
    expect(violatedFields(await refusal(call))).toEqual([
      "spec.desired_phase",
      "spec.variant",
      "spec.configuration.release_channel",
      "spec.configuration.log_level",
      "spec.configuration.metrics.url",
    ]);
  });

  test("a metrics password is stored sealed and never comes back; a value that cannot be stored is refused", async () => {
    const metrics = { enabled: true, url: "https://metrics.example.org", username: "u", password: "correct horse" };
    const { runner } = await admin.runners.createRunner({
      name: "with metrics",
      provider: RunnerProvider.AWS_EC2,
      spec: { configuration: { metrics, encryptedHoneycombApiKey: new Uint8Array([1]) } },
    });
    const read = (await admin.runners.getRunner({ runnerId: runner!.runnerId })).runner!;
    for (const each of [runner!, read]) {
      expect(each.spec?.configuration?.metrics).toMatchObject({ username: "u", password: "" });
      expect(each.spec?.configuration?.encryptedHoneycombApiKey).toHaveLength(0);
    }
    const [row] = await plane.plane.app.db.point<{ sealed: Uint8Array; spec: Uint8Array }[]>`
      select sealed_metrics_password as sealed, spec from runners where id = ${read.runnerId}`;
    expect(Buffer.from(row!.sealed).includes("correct horse")).toBe(false);
    expect(Buffer.from(row!.spec).includes("correct horse")).toBe(false);
    const nul = admin.runners.createRunner({ name: "nul\0nul", provider: RunnerProvider.AWS_EC2 });
    expect(await codeOf(nul)).toBe("InvalidArgument");
  });

  test("RUN-8: members without a role create none, and do not see those of others", async () => {
    const create = member.client.runners.createRunner({ name: "mine", provider: RunnerProvider.AWS_EC2 });
    expect(await codeOf(create)).toBe("PermissionDenied");
    const { id } = await newRunner();
    expect(await codeOf(member.client.runners.getRunner({ runnerId: id }))).toBe("NotFound");
    expect(await codeOf(member.client.runners.deleteRunner({ runnerId: id }))).toBe("NotFound");
    expect(await codeOf(member.client.runners.createRunnerToken({ runnerId: id }))).toBe("NotFound");
    const { runners } = await member.client.runners.listRunners({ pagination: { pageSize: 100 } });
    expect(runners.map((runner) => runner.kind)).toEqual([RunnerKind.LOCAL_CONFIGURATION]);
  });

  test("a group with RUNNERS_ADMIN creates runners and administers all of them", async () => {
    const runnersAdmin = await plane.addUser();
    await newGroup(plane, { users: [runnersAdmin], organizationRoles: [ResourceRole.ORG_RUNNERS_ADMIN] });
    const { id } = await newRunner();
    expect((await runnersAdmin.client.runners.getRunner({ runnerId: id })).runner?.runnerId).toBe(id);
    await runnersAdmin.client.runners.deleteRunner({ runnerId: id });
    const own = await runnersAdmin.client.runners.createRunner({ name: "own", provider: RunnerProvider.GCP });
    expect(own.runner?.creator?.id).toBe(runnersAdmin.id);
  });

  test("with local runners switched off LOCAL kinds are refused by policy, others are not", async () => {
    await using other = await startTestPlane();
    const { db } = other.plane.app;
    await db.write`update runners set desired_phase = ${RunnerPhase.INACTIVE} where kind = ${RunnerKind.LOCAL_CONFIGURATION}`;
    const create = (provider: RunnerProvider) => other.admin.runners.createRunner({ name: "local", provider });
    const error = await refusal(create(RunnerProvider.LINUX_HOST));
    expect(error.code).toBe((await refusal(create(RunnerProvider.DESKTOP_MAC))).code);
    expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "allow_local_runners" }]);
    expect(error.findDetails(PolicyEnforcedFailedPreconditionDetailsSchema)).toMatchObject([
      { policyName: "allow_local_runners" },
    ]);
    expect((await create(RunnerProvider.AWS_EC2)).exchangeToken).not.toBe("");
  });

  test("creation writes one audit entry and one about the token, without its text", async () => {
    const { id, exchangeToken } = await newRunner();
    expect(await audited(id)).toEqual(["Runner created", "Runner exchange token issued"]);
    expect(plane.logged()).not.toContain(exchangeToken);
  });
});

describe("GetRunner and ListRunners", () => {
  test("RUN-9: whoever holds USER sees the runner without what is for operators, until the share ends", async () => {
    const { id, process } = await connectedRunner();
    await using _ = process;
    await process.heartbeat({ systemDetails: "kernel", supportBundleUrl: "http://runner/bundle" });
    await shareRunner(plane, id);
    const { runner } = await member.client.runners.getRunner({ runnerId: id });
    expect(runner).toMatchObject({ status: { systemDetails: "", supportBundleUrl: "", version: "test" } });
    expect(runner?.spec?.configuration?.metrics).toBeUndefined();
    const seen = (await admin.runners.getRunner({ runnerId: id })).runner;
    expect(seen?.status).toMatchObject({ systemDetails: "kernel", supportBundleUrl: "http://runner/bundle" });
    expect(await codeOf(member.client.runners.deleteRunner({ runnerId: id }))).toBe("PermissionDenied");
    expect(await codeOf(member.client.runners.createRunnerToken({ runnerId: id }))).toBe("PermissionDenied");
    const share = { runnerId: id, displayName: "Mine", description: "For tests", configuration: WORKING };
    expect(await codeOf(member.client.runnerConfiguration.createEnvironmentClass(share))).toBe("PermissionDenied");
    await plane.plane.app.db.write`delete from role_assignments where resource_id = ${id}`;
    expect(await codeOf(member.client.runners.getRunner({ runnerId: id }))).toBe("NotFound");
  });

  test("ADMIN through a group administers", async () => {
    const { id } = await newRunner();
    await shareRunner(plane, id, ResourceRole.RUNNER_ADMIN);
    expect((await member.client.runners.createRunnerToken({ runnerId: id })).exchangeToken).toMatch(/^berth_rxt_/);
    await member.client.runners.deleteRunner({ runnerId: id });
    expect(await codeOf(admin.runners.getRunner({ runnerId: id }))).toBe("NotFound");
  });

  test("pages go from new to old without gaps, and a token fits its own request only", async () => {
    const made = [];
    for (let index = 0; index < 5; index++) made.unshift((await newRunner(RunnerProvider.GCP)).id);
    const filter = { providers: [RunnerProvider.GCP] };
    const seen: string[] = [];
    let token = "";
    do {
      const page = await admin.runners.listRunners({ filter, pagination: { pageSize: 2, token } });
      expect(page.runners.length).toBeLessThanOrEqual(2);
      seen.push(...page.runners.map((runner) => runner.runnerId));
      token = page.pagination?.nextToken ?? "";
    } while (token);
    expect(seen.slice(0, 5)).toEqual(made);
    expect(new Set(seen).size).toBe(seen.length);

    const { pagination } = await admin.runners.listRunners({ filter, pagination: { pageSize: 1 } });
    const foreign = [{ filter: {} }, { filter: { providers: [RunnerProvider.AWS_EC2] } }];
    for (const request of foreign) {
      const call = admin.runners.listRunners({ ...request, pagination: { token: pagination!.nextToken } });
      expect(await codeOf(call)).toBe("InvalidArgument");
    }
    expect(await codeOf(admin.runners.listRunners({ pagination: { token: "x" } }))).toBe("InvalidArgument");
    expect(await codeOf(admin.runners.listRunners({ pagination: { pageSize: 101 } }))).toBe("InvalidArgument");
  });

  test("filters: their values are alternatives, the filters conditions; unknown ids match nothing", async () => {
    const { id } = await newRunner(RunnerProvider.AWS_EC2);
    const me = (await admin.identity.getAuthenticatedIdentity({})).subject!.id;
    const ids = async (filter: object) =>
      (await admin.runners.listRunners({ filter, pagination: { pageSize: 100 } })).runners.map((each) => each.runnerId);
    expect(await ids({ creatorIds: [me], kinds: [RunnerKind.REMOTE, RunnerKind.LOCAL] })).toContain(id);
    expect(await ids({ kinds: [RunnerKind.LOCAL] })).not.toContain(id);
    expect(await ids({ creatorIds: [member.id] })).toEqual([]);
    const zero = await ids({ providers: [RunnerProvider.UNSPECIFIED] });
    expect(zero.length).toBeGreaterThan(0);
    expect(zero).not.toContain(id);
  });
});

describe("DeleteRunner", () => {
  test("RUN-20: environments protect their runner; force ends them, the runner and its credentials at once", async () => {
    const { id, process } = await connectedRunner();
    await using _ = process;
    const classId = await newClass(id);
    const environments = [];
    for (let index = 0; index < 3; index++) environments.push(await newEnvironment(admin, classId));
    const refused = await refusal(admin.runners.deleteRunner({ runnerId: id }));
    expect(refused.rawMessage).toContain("3 environments");
    await admin.runners.deleteRunner({ runnerId: id, force: true });

    for (const environment of environments) {
      const read = await admin.environments.getEnvironment({ environmentId: environment.id });
      expect(read.environment?.status?.phase).toBe(EnvironmentPhase.DELETED);
      expect(await audited(environment.id)).toEqual(["Environment created", "Environment deleted with its runner"]);
    }
    expect(await codeOf(admin.runners.getRunner({ runnerId: id }))).toBe("NotFound");
    expect(await codeOf(process.heartbeat())).toBe("Unauthenticated");
    expect(await codeOf(admin.runnerConfiguration.getEnvironmentClass({ environmentClassId: classId }))).toBe(
      "NotFound",
    );
    expect(await codeOf(admin.runners.deleteRunner({ runnerId: id, force: true }))).toBe("NotFound");
    expect(await audited(id)).toContain("Runner deleted");
  });

  test("a connected runner is asked to go first; during that nothing new is allowed, and force ends it", async () => {
    const { id, process } = await connectedRunner();
    await using _ = process;
    process.watch();
    const { exchangeToken } = await admin.runners.createRunnerToken({ runnerId: id });
    await admin.runners.deleteRunner({ runnerId: id });
    await admin.runners.deleteRunner({ runnerId: id });
    expect((await admin.runners.getRunner({ runnerId: id })).runner).toMatchObject({
      spec: { desiredPhase: RunnerPhase.DELETED },
      status: { phase: RunnerPhase.DELETING },
    });
    const wanted = { runnerId: id, displayName: "New", description: "For tests", configuration: WORKING };
    expect(await codeOf(admin.runnerConfiguration.createEnvironmentClass(wanted))).toBe("FailedPrecondition");
    expect(await codeOf(admin.runners.createRunnerToken({ runnerId: id }))).toBe("FailedPrecondition");
    await admin.runners.deleteRunner({ runnerId: id, force: true });
    expect(await codeOf(admin.runners.getRunner({ runnerId: id }))).toBe("NotFound");
    expect(await codeOf(admin.identity.exchangeToken({ exchangeToken }))).toBe("Unauthenticated");
    expect((await audited(id)).filter((action) => action === "Runner deletion requested")).toHaveLength(1);
  });

  test("a forced deletion and changes of the environments at the same time get out of each other's way", async () => {
    const { id, process } = await connectedRunner();
    await using _ = process;
    const classId = await newClass(id);
    const environments = await Promise.all(Array.from({ length: 6 }, () => newEnvironment(admin, classId)));
    const changes = environments.flatMap((environment) => [
      process.reportRunning(environment),
      admin.environments.stopEnvironment({ environmentId: environment.id }),
    ]);
    const outcomes = await Promise.allSettled([
      admin.runners.deleteRunner({ runnerId: id, force: true }),
      ...changes.toReversed(),
    ]);
    const failures = outcomes.flatMap((each) => (each.status === "rejected" ? [String(each.reason)] : []));
    for (const failure of failures) expect(failure).toMatch(/\[(unauthenticated|not_found|failed_precondition)\]/);
    expect(outcomes[0]?.status).toBe("fulfilled");
    for (const { id: environmentId } of environments) {
      const { environment } = await admin.environments.getEnvironment({ environmentId });
      expect(environment?.status?.phase).toBe(EnvironmentPhase.DELETED);
    }
  });
});

describe("environment classes", () => {
  let runnerId: string;
  let process: FakeRunner;

  beforeAll(async () => {
    ({ id: runnerId, process } = await connectedRunner());
  });

  afterAll(() => process[Symbol.asyncDispose]());

  test("RUN-22: each fault of a configuration is one violation; a valid one comes back as it was sent", async () => {
    const faults: [{ key: string; value: string }[], string[]][] = [
      [[{ key: "cpu", value: "0" }, ...WORKING.slice(1)], ["configuration[0].value"]],
      [[...WORKING, { key: "gpu", value: "1" }], ["configuration[2].key"]],
      [[...WORKING, { key: "cpu", value: "2" }], ["configuration[2].key"]],
    ];
    for (const [configuration, fields] of faults)
      expect(violatedFields(await refusal(newClass(runnerId, configuration)))).toEqual(fields);
    const missing = await refusal(newClass(runnerId, WORKING.slice(0, 1)));
    expect(violatedFields(missing)).toHaveLength(1);
    expect(missing.rawMessage).toContain("memory");

    const sent = [...WORKING.toReversed(), { key: "disk", value: "30" }];
    const id = await newClass(runnerId, sent);
    const { environmentClass } = await admin.runnerConfiguration.getEnvironmentClass({ environmentClassId: id });
    expect(environmentClass).toMatchObject({
      id,
      runnerId,
      displayName: "Standard",
      enabled: true,
      configuration: sent,
    });
  });

  test("before its runner has published a schema, a class of a known product is checked and others take any keys once", async () => {
    const linux = await newRunner();
    expect(violatedFields(await refusal(newClass(linux.id, [{ key: "cpu", value: "2" }])))).toHaveLength(1);
    await newClass(linux.id);
    const aws = await newRunner(RunnerProvider.AWS_EC2);
    const instance = { key: "instanceType", value: "m6i.large" };
    await newClass(aws.id, [instance]);
    expect(violatedFields(await refusal(newClass(aws.id, [instance, instance])))).toEqual(["configuration[1].key"]);
  });

  test("RUN-23: a disabled class drops out of enabled=true and stays readable", async () => {
    const id = await newClass(runnerId);
    await admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: id, enabled: false });
    const listed = async (filter: object) =>
      (
        await admin.runnerConfiguration.listEnvironmentClasses({ filter, pagination: { pageSize: 100 } })
      ).environmentClasses.map((each) => each.id);
    expect(await listed({ enabled: true })).not.toContain(id);
    expect(await listed({ enabled: false })).toContain(id);
    expect(await listed({})).toContain(id);
    const read = await admin.runnerConfiguration.getEnvironmentClass({ environmentClassId: id });
    expect(read.environmentClass?.enabled).toBe(false);
    expect(await codeOf(newEnvironment(admin, id))).toBe("FailedPrecondition");
  });

  test("an update changes what it names; one that changes nothing is not told to anybody", async () => {
    const id = await newClass(runnerId);
    const update = { environmentClassId: id, displayName: "Larger" };
    await admin.runnerConfiguration.updateEnvironmentClass(update);
    await admin.runnerConfiguration.updateEnvironmentClass(update);
    const { environmentClass } = await admin.runnerConfiguration.getEnvironmentClass({ environmentClassId: id });
    expect(environmentClass).toMatchObject({ displayName: "Larger", description: "For tests", configuration: WORKING });
    expect(await audited(id)).toEqual(["Environment class created", "Environment class changed"]);
    const short = admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: id, displayName: "a" });
    expect(await codeOf(short)).toBe("InvalidArgument");
    const { client } = member;
    const foreign = client.runnerConfiguration.updateEnvironmentClass({ environmentClassId: id, enabled: false });
    expect(await codeOf(foreign)).toBe("NotFound");
  });

  test("both services list the same, and what can be used depends on class, runner and caller", async () => {
    const usable = await newClass(runnerId);
    const disabled = await newClass(runnerId);
    await admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: disabled, enabled: false });
    const offline = await newClass((await newRunner()).id);
    const list = async (client: BerthClient, filter: object) => {
      const request = { filter, pagination: { pageSize: 100 } };
      const here = await client.runnerConfiguration.listEnvironmentClasses(request);
      const there = await client.environments.listEnvironmentClasses(request);
      expect(there).toEqual(here);
      return here.environmentClasses.map((each) => each.id);
    };
    const yes = await list(admin, { canCreateEnvironments: true });
    const no = await list(admin, { canCreateEnvironments: false });
    const all = await list(admin, {});
    expect(yes).toContain(usable);
    expect(no).toEqual(expect.arrayContaining([disabled, offline]));
    expect([...yes, ...no].sort()).toEqual(all.toSorted());
    expect(all).toEqual(all.toSorted().toReversed());
    expect(await list(admin, { runnerIds: [runnerId], canCreateEnvironments: true })).toContain(usable);
    expect(await list(admin, { runnerKinds: [RunnerKind.REMOTE], canCreateEnvironments: true })).toEqual([]);
    expect(await list(admin, { runnerKinds: [99999 as RunnerKind] })).toEqual([]);
    expect(await list(admin, { runnerProviders: [-1 as RunnerProvider] })).toEqual([]);
    expect(await list(member.client, {})).toEqual([]);
  });

  test("a schema that a class no longer satisfies takes it out of use, and back", async () => {
    const own = await connectedRunner();
    await using runner = own.process;
    const id = await newClass(own.id, [
      { key: "cpu", value: "8" },
      { key: "memory", value: "4096" },
    ]);
    const filter = { runnerIds: [own.id], canCreateEnvironments: true };
    const usable = async () => (await admin.environments.listEnvironmentClasses({ filter })).environmentClasses.length;
    expect(await usable()).toBe(1);
    await runner.register({ host: { cpuCores: 4, memoryMib: 16_384, diskGib: 100, hasContainerEngine: false } });
    expect(await usable()).toBe(0);
    expect(await codeOf(newEnvironment(admin, id))).toBe("FailedPrecondition");
    await runner.register();
    expect(await usable()).toBe(1);
  });

  test("the schema is the published one, the product's, or has only source control", async () => {
    const schemaOf = async (id: string, client = admin) =>
      (await client.runnerConfiguration.getRunnerConfigurationSchema({ runnerId: id })).schema!;
    const published = await schemaOf(runnerId);
    expect(published.environmentClasses.find((field) => field.id === "cpu")?.type.value).toMatchObject({ max: 8 });
    const builtIn = await schemaOf((await newRunner()).id);
    expect(builtIn.environmentClasses.map((field) => field.id)).toEqual(["cpu", "memory", "disk", "isolation", "host"]);
    const [local] = (await admin.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL_CONFIGURATION] } })).runners;
    for (const id of [(await newRunner(RunnerProvider.AWS_EC2)).id, local!.runnerId]) {
      const schema = await schemaOf(id, id === local!.runnerId ? member.client : admin);
      expect(schema).toMatchObject({ version: "0", environmentClasses: [] });
      expect(schema.scm.map((entry) => entry.scmId)).toContain("github");
    }
    const hidden = member.client.runnerConfiguration.getRunnerConfigurationSchema({ runnerId });
    expect(await codeOf(hidden)).toBe("NotFound");
  });
});

test("RUN-46: the runner of the first start serves every member; one made later is invisible until it is shared", async () => {
  await using first = await startTestPlane({ BERTH_RUNNER: "on" });
  const { accessToken } = await first.admin.identity.exchangeToken({ exchangeToken: first.exchangeToken! });
  await using process = new FakeRunner(first.url, accessToken);
  await process.register();
  const user = await first.addUser();
  const { runners } = await user.client.runners.listRunners({ filter: { kinds: [RunnerKind.LOCAL] } });
  expect(runners.map((runner) => runner.runnerId)).toEqual([process.id]);
  const filter = { canCreateEnvironments: true };
  const { environmentClasses } = await user.client.environments.listEnvironmentClasses({ filter });
  expect(environmentClasses).toMatchObject([{ displayName: "Standard", runnerId: process.id }]);
  expect((await newEnvironment(user.client, environmentClasses[0]!.id)).id).not.toBe("");

  const provider = RunnerProvider.LINUX_HOST;
  const { runner } = await first.admin.runners.createRunner({ name: "second", provider });
  expect(await codeOf(user.client.runners.getRunner({ runnerId: runner!.runnerId }))).toBe("NotFound");
  await shareRunner(first, runner!.runnerId);
  expect((await user.client.runners.getRunner({ runnerId: runner!.runnerId })).runner?.name).toBe("second");
});

test("RUN-47: a runner's token reads what is its own, renews itself, and does nothing else", async () => {
  const { id, process } = await connectedRunner();
  await using _ = process;
  const other = await connectedRunner();
  await using __ = other.process;
  const [classId, otherClassId] = [await newClass(id), await newClass(other.id)];
  const [environment, foreign] = [await newEnvironment(admin, classId), await newEnvironment(admin, otherClassId)];
  const runner = plane.client(process.token);

  expect((await runner.identity.getAuthenticatedIdentity({})).subject).toMatchObject({
    id,
    principal: Principal.RUNNER,
  });
  expect((await runner.runners.listRunners({})).runners.map((each) => each.runnerId)).toEqual([id]);
  expect((await runner.runners.getRunner({ runnerId: id })).runner?.runnerId).toBe(id);
  await runner.runnerConfiguration.getRunnerConfigurationSchema({ runnerId: id });
  const { environmentClasses } = await runner.environments.listEnvironmentClasses({});
  expect(environmentClasses.map((each) => each.id)).toEqual([classId]);
  const { environments } = await runner.environments.listEnvironments({});
  expect(environments.map((each) => each.id)).toEqual([environment.id]);
  const renewed = await runner.runners.createRunnerToken({ runnerId: id });
  expect(renewed.accessToken).toBe("");
  const { accessToken } = await admin.identity.exchangeToken({ exchangeToken: renewed.exchangeToken });
  expect((await plane.client(accessToken).identity.getAuthenticatedIdentity({})).subject?.id).toBe(id);
  await process.heartbeat();

  const refusals: [() => Promise<unknown>, string][] = [
    [() => runner.runners.getRunner({ runnerId: other.id }), "NotFound"],
    [() => runner.runners.createRunnerToken({ runnerId: other.id }), "NotFound"],
    [() => runner.environments.getEnvironment({ environmentId: foreign.id }), "NotFound"],
    [() => runner.runnerConfiguration.getEnvironmentClass({ environmentClassId: otherClassId }), "NotFound"],
    [() => runner.environments.markEnvironmentActive({ environmentId: environment.id }), "PermissionDenied"],
    [() => runner.environments.stopEnvironment({ environmentId: environment.id }), "PermissionDenied"],
    [() => runner.runners.createRunner({ name: "own", provider: RunnerProvider.AWS_EC2 }), "PermissionDenied"],
    [() => runner.runners.deleteRunner({ runnerId: id }), "PermissionDenied"],
    [() => runner.runners.parseContextURL({ contextUrl: "https://github.com/a/b" }), "PermissionDenied"],
  ];
  for (const [call, code] of refusals) expect(await codeOf(call())).toBe(code);
});

describe("source control", () => {
  test("RUN-41: a host without an integration needs no sign-in and offers none", async () => {
    const { id } = await newRunner();
    const check = (host: string, client = admin) => client.runners.checkAuthenticationForHost({ runnerId: id, host });
    const answers = [
      ["github.com", "github", "GitHub"],
      ["GitLab.com", "gitlab", "GitLab"],
      ["dev.azure.com/acme", "azuredevops_entra", "Azure DevOps"],
      ["git.example.org:8443", "git", "Other git server"],
    ] as const;
    for (const [host, scmId, scmName] of answers) {
      const answer = await check(host);
      expect(answer).toMatchObject({ authenticated: true, scmId, scmName, authenticationUrl: "", patSupported: false });
      expect([answer.supportsOauth2, answer.supportsPat]).toEqual([undefined, undefined]);
    }
    for (const host of ["", "not a host", "https://user:password@github.com", "github.com/owner/repository"])
      expect(await codeOf(check(host)), host).toBe("InvalidArgument");
    expect(await codeOf(check("github.com", member.client))).toBe("NotFound");
    const [local] = (await member.client.runners.listRunners({})).runners;
    const noUser = member.client.runners.checkAuthenticationForHost({ runnerId: local!.runnerId, host: "github.com" });
    expect(await codeOf(noUser)).toBe("PermissionDenied");
  });

  test("RUN-48: without a connected runner the control plane reads the repository itself, unless that is switched off", async () => {
    const server = await startGitServer();
    const repository = await server.createRepository("team/app", { branches: { "feature/x": {} } });
    const allowed = { BERTH_SCM_ALLOW_HOSTS: server.host };
    try {
      await using on = await startTestPlane(allowed);
      const { runner } = await on.admin.runners.createRunner({ name: "away", provider: RunnerProvider.LINUX_HOST });
      for (const runnerId of ["", runner!.runnerId]) {
        const answer = await on.admin.runners.parseContextURL({ contextUrl: repository.url, runnerId });
        expect(answer).toMatchObject({
          originalContextUrl: repository.url,
          scmId: "git",
          git: { host: server.host, branch: "main", commit: "", tag: "" },
          projectIds: [],
          recommendedEnvironmentClasses: [],
        });
      }
      const parse = (contextUrl: string) => on.admin.runners.parseContextURL({ contextUrl });
      expect(await codeOf(parse(`${repository.url}-missing`))).toBe("NotFound");
      expect(await codeOf(parse("https://127.0.0.1/a/b"))).toBe("InvalidArgument");
      expect(await codeOf(parse("ftp://example.org/a/b"))).toBe("InvalidArgument");
      expect(await codeOf(parse("https://user:password@example.org/a/b"))).toBe("InvalidArgument");

      await using off = await startTestPlane({ ...allowed, BERTH_SCM_FALLBACK: "off" });
      const error = await refusal(off.admin.runners.parseContextURL({ contextUrl: repository.url }));
      expect(error.rawMessage).toBe("runner is not connected");
      expect(await codeOf(Promise.reject(error))).toBe("Unavailable");
    } finally {
      await server.close();
    }
  });
});

test("RUN-50: what is outside of the contract is UNIMPLEMENTED, with or without a credential", async () => {
  const post = (path: string) =>
    fetch(`${plane.url}/${path}`, { method: "POST", headers: { "content-type": "application/json" }, body: "{}" });
  for (const rpc of ["CreateLLMIntegration", "ListLLMIntegrations"]) {
    const response = await post(`gitpod.v1.RunnerConfigurationService/${rpc}`);
    expect(response.status).toBe(501);
    expect(await response.json()).toMatchObject({ code: "unimplemented" });
  }
  const transport = createConnectTransport({ baseUrl: plane.url, httpVersion: "1.1" });
  expect(await codeOf(createClient(RunnerService, transport).listRunners({}))).toBe("Unauthenticated");
});
