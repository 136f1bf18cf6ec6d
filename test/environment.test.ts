import { create, type Message, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { CountResponseRelation } from "../gen/gitpod/v1/count_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as Ack,
  AdmissionLevel,
  ListEnvironmentsRequest_ArchivalStatus as ArchivalStatus,
  EnvironmentStatus_ContentPhase as ContentPhase,
  type CreateEnvironmentRequestSchema,
  type Environment,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentSpec_SecretSchema,
  EnvironmentSpecSchema,
  KernelControlsAction,
  EnvironmentSpec_DevContainer_LifecycleStage as LifecycleStage,
  type ListEnvironmentsRequestSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
  ListEnvironmentsRequest_SortField as SortField,
} from "../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole, PolicyEnforcedFailedPreconditionDetailsSchema } from "../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../gen/gitpod/v1/pagination_pb.js";
import { RunnerKind } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import type { ControlPlane } from "../src/control-plane.ts";
import { DEFAULT_DEVCONTAINER_IMAGE } from "../src/domain/environment.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import {
  addClass,
  addOrganization,
  addServiceAccount,
  changePolicies,
  connectRunner,
  share,
  unshareRunner,
} from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { CREATING, STARTING, RUNNING, STOPPING, STOPPED, DELETING, DELETED } = EnvironmentPhase;
const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;
const KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGk0AaxoFzKtu7dxuTHtJiBSMNFGnVbMJyOYLpFWBp2G";

type Spec = Exclude<MessageInitShape<typeof EnvironmentSpecSchema>, Message>;
type Request = Exclude<MessageInitShape<typeof CreateEnvironmentRequestSchema>, Message>;

const { FailedPrecondition, ResourceExhausted } = Code;
const git = (remoteUri: string, more: object = {}) => ({
  spec: { case: "git" as const, value: { remoteUri, ...more } },
});
const contextUrl = (url: string) => ({ spec: { case: "contextUrl" as const, value: { url } } });
const from = (...specs: (ReturnType<typeof git> | ReturnType<typeof contextUrl>)[]): Spec => ({
  content: { initializer: { specs } },
});

const port = (number: number, admission = AdmissionLevel.UNSPECIFIED) => ({ port: number, name: "web", admission });

/** A control plane with a member, a runner that is shared with all members, and a class on it. */
interface Setup {
  plane: TestPlane;
  member: TestUser;
  runner: FakeRunner;
  classId: string;
}

async function setUp(): Promise<Setup> {
  const plane = await startTestPlane();
  await liftQuotas(plane);
  const { runner, classId } = await connectRunner(plane, { maxEnvironments: 10_000 });
  return { plane, member: await plane.addUser({ name: "Member" }), runner, classId };
}

async function tearDown({ plane, runner }: Setup): Promise<void> {
  await runner[Symbol.asyncDispose]();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
  expect(logged).not.toContain("failed and will be tried again");
}

async function read(client: BerthClient, environmentId: string): Promise<Environment> {
  const { environment } = await client.environments.getEnvironment({ environmentId });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

async function make(client: BerthClient, classId: string, spec: Spec = {}, more: Request = {}): Promise<Environment> {
  const { environment } = await client.environments.createEnvironment({
    ...more,
    spec: { ...spec, machine: { ...spec.machine, class: classId } },
  });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

/** What one environment has left in the outbox and in the audit log, oldest first. */
async function traces({ plane }: Pick<Setup, "plane">, id: string) {
  const { point } = plane.plane.app.db;
  const events = await point<{ operation: ResourceOperation }[]>`
    select operation from events where resource_id = ${id} order by seq`;
  const audit = await point<{ action: string; kind: number; actor_id: string | null; actor_principal: number }[]>`
    select action, kind, actor_id, actor_principal from audit_log where subject_id = ${id} order by id`;
  return {
    events: events.map((each) => ResourceOperation[each.operation]),
    audit,
    actions: audit.map((each) => each.action),
  };
}

/** Versions and phase, to see whether anything changed. */
const versions = ({ spec, status }: Environment) => [spec?.specVersion, status?.statusVersion, status?.phase];

/** The name of the policy that a refusal carries, in both of its details where the code calls for them. */
function policyOf(error: ConnectError): string {
  const [actionable] = error.findDetails(ActionableErrorDetailsSchema);
  const [enforced] = error.findDetails(PolicyEnforcedFailedPreconditionDetailsSchema);
  expect(actionable?.userMessage).not.toBe("");
  if (error.code === FailedPrecondition) {
    expect(enforced?.policyName).toBe(actionable?.errorCode);
    expect(enforced?.message).not.toBe("");
  } else {
    expect(enforced).toBeUndefined();
  }
  // Clients take these words for a missing feature.
  expect(error.rawMessage).not.toMatch(/capabil|unsupported/i);
  return `${Code[error.code]} ${actionable?.errorCode}`;
}

/** Looks for what is due on one replica, as its own job does every few seconds. */
async function sweep(on: ControlPlane): Promise<void> {
  for (const each of sweeps) while (await each.run(on.app));
}

describe("CreateEnvironment", () => {
  let setup: Setup;
  let member: BerthClient;
  let classId: string;

  beforeAll(async () => {
    setup = await setUp();
    member = setup.member.client;
    classId = setup.classId;
  });
  afterAll(() => tearDown(setup));

  const attempt = (spec: Spec = {}, more: Request = {}, client = member) => make(client, classId, spec, more);
  const refused = async (spec: Spec = {}, more: Request = {}, client = member) => refusal(attempt(spec, more, client));

  /** Runs with other policies, and puts the former ones back. */
  async function underPolicies(changes: Parameters<typeof changePolicies>[1], work: () => Promise<void>) {
    const { plane, organizationId } = setup.plane;
    const [before] = await plane.app.db.point<{ policies: Uint8Array }[]>`
      select policies from organizations where id = ${organizationId}`;
    await changePolicies(setup.plane, changes);
    try {
      await work();
    } finally {
      await plane.app.db
        .write`update organizations set policies = ${before?.policies ?? null} where id = ${organizationId}`;
      // A local runner that was switched off is back with its next sign of life.
      await setup.runner.heartbeat();
    }
  }

  test("ENV-2 without a goal it is to run; another goal than that is INVALID_ARGUMENT", async () => {
    const created = await attempt();
    expect(created.status?.phase).toBe(CREATING);
    expect((await read(member, created.id)).spec?.desiredPhase).toBe(RUNNING);
    expect((await attempt({ desiredPhase: RUNNING })).spec?.desiredPhase).toBe(RUNNING);
    for (const desiredPhase of [STOPPED, DELETED, CREATING, 99 as EnvironmentPhase]) {
      const error = await refused({ desiredPhase });
      expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["spec.desired_phase"]]);
    }
  });

  test("ENV-3 the class must be named, visible, enabled and fit its runner", async () => {
    for (const request of [{}, { spec: {} }, { spec: { machine: {} } }, { spec: { machine: { class: "large" } } }]) {
      const error = await refusal(member.environments.createEnvironment(request));
      expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["spec.machine.class"]]);
    }
    const { plane, runner } = setup;
    const hidden = await connectRunner(plane, { shared: false });
    const foreign = await plane.addUser({ organizationId: await addOrganization(plane) });
    expect(await codeOf(make(foreign.client, classId))).toBe("NotFound");
    expect(await codeOf(make(member, hidden.classId))).toBe("NotFound");
    expect(await codeOf(make(member, uuidv7()))).toBe("NotFound");
    await make(plane.admin, hidden.classId);

    const disabled = await addClass(plane, runner.id);
    await plane.admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: disabled, enabled: false });
    expect(await codeOf(make(member, disabled))).toBe("FailedPrecondition");
    await plane.plane.app.db.write`update environment_classes set fits = false where id = ${disabled}`;
    await plane.admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: disabled, enabled: true });
    const unfit = await refusal(make(member, disabled));
    expect(unfit.code).toBe(FailedPrecondition);
    expect(unfit.rawMessage).toContain("no longer fits");
  });

  test("what a scratch environment is made of", async () => {
    const before = Date.now();
    const created = await attempt({}, { name: "  " });
    expect(created.id).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-/);
    const { metadata, spec, status } = await read(member, created.id);
    expect(created).toMatchObject({ metadata, spec, status });
    expect(metadata).toMatchObject({
      organizationId: setup.plane.organizationId,
      name: expect.stringMatching(/^environment-[0-9a-f]{6}$/),
      creator: { id: setup.member.id, principal: Principal.USER },
      runnerId: setup.runner.id,
      role: EnvironmentRole.DEFAULT,
      originalContextUrl: "",
      projectId: "",
      annotations: {},
    });
    expect(metadata?.lockdownAt).toBeUndefined();
    expect(metadata?.lastStartedAt).toEqual(metadata?.createdAt);
    expect(Number(metadata?.createdAt?.seconds)).toBeGreaterThanOrEqual(Math.floor(before / 1000));
    expect(spec).toMatchObject({
      specVersion: 1n,
      desiredPhase: RUNNING,
      machine: { class: classId },
      admission: AdmissionLevel.CREATOR_ONLY,
      timeout: { disconnected: { seconds: 1800n } },
      content: { gitUsername: "Member", gitEmail: `${setup.member.id}@example.org` },
      devcontainer: { defaultDevcontainerImage: DEFAULT_DEVCONTAINER_IMAGE, lifecycleStage: LifecycleStage.FULL },
      secrets: [],
      ports: [],
    });
    const sessions = [spec?.machine, spec?.content, spec?.devcontainer, spec?.automationsFile].map(
      (part) => part?.session,
    );
    expect(new Set([...sessions, metadata?.sessionId, undefined, ""]).size).toBe(7);
    expect(status).toMatchObject({ statusVersion: 1n, phase: CREATING, failureMessage: [], warningMessage: [] });
    expect(await traces(setup, created.id)).toMatchObject({
      events: ["CREATE"],
      audit: [{ action: "Environment created", actor_id: setup.member.id, kind: AuditLogEntryKind.RESOURCE_CHANGE }],
    });
  });

  test("what a client gives is kept, and what it may not give is replaced", async () => {
    const remote = "https://User@Git.example.org/team/Project.git";
    const given = await attempt(
      {
        ...from(git(remote, { cloneTarget: "dev" })),
        specVersion: 77n,
        machine: { session: "mine" },
        secrets: [{ id: "x", name: "STOLEN" }],
        ports: [
          { port: 3000, name: "web", admission: AdmissionLevel.OWNER_ONLY, authNonce: 9n },
          port(3001, AdmissionLevel.EVERYONE),
        ],
        timeout: { disconnected: { seconds: 0n } },
        admission: AdmissionLevel.OWNER_ONLY,
        sshPublicKeys: [{ id: "k1", value: `${KEY} me@host ` }],
        automationsFile: { automationsFilePath: ".gitpod/a.yaml", session: "a1" },
        devcontainer: {
          session: "d1",
          defaultDevcontainerImage: "alpine:3",
          dotfiles: { repository: "https://git.example.org/me/dots" },
        },
      },
      { name: " My place ", annotations: { team: "a" } },
    );
    const { metadata, spec } = await read(member, given.id);
    expect(metadata).toMatchObject({ name: "My place", annotations: { team: "a" }, originalContextUrl: remote });
    expect(spec).toMatchObject({
      specVersion: 1n,
      secrets: [],
      timeout: { disconnected: { seconds: 0n } },
      admission: AdmissionLevel.CREATOR_ONLY,
      ports: [
        { port: 3000, name: "web", admission: AdmissionLevel.CREATOR_ONLY, authNonce: 1n },
        { port: 3001, admission: AdmissionLevel.EVERYONE, authNonce: 1n },
      ],
      sshPublicKeys: [{ id: "k1", value: `${KEY} me@host` }],
      automationsFile: { automationsFilePath: ".gitpod/a.yaml", session: "a1" },
      devcontainer: {
        session: "d1",
        defaultDevcontainerImage: "alpine:3",
        dotfiles: { repository: "https://git.example.org/me/dots" },
      },
    });
    expect(spec?.machine?.session).not.toBe("mine");
    // A spec that was read can be posted again.
    const { $typeName: _, ...posted } = spec!;
    const again = await attempt(posted);
    expect(again.spec).toMatchObject({ specVersion: 1n, ports: spec?.ports, content: spec?.content });
    expect(again.metadata?.name).toMatch(/^Project-[0-9a-f]{6}$/);
    expect(again.metadata?.sessionId).not.toBe(metadata?.sessionId);

    const linked = await attempt(from(contextUrl("https://user@GIT.example.org/team/thing/tree/main/#readme")));
    expect(linked.metadata?.originalContextUrl).toBe("https://git.example.org/team/thing/tree/main");
  });

  test("a service account creates too, and has no mail address", async () => {
    const robot = await addServiceAccount(setup.plane, "Robot");
    const { metadata, spec } = await attempt({}, {}, robot.client);
    expect(metadata?.creator).toMatchObject({ id: robot.id, principal: Principal.SERVICE_ACCOUNT });
    expect(spec?.content).toMatchObject({ gitUsername: "Robot", gitEmail: "" });
  });

  test("sessions group environments of one creator", async () => {
    const first = await attempt();
    const sessionId = first.metadata?.sessionId ?? "";
    expect((await attempt({}, { sessionId: sessionId.toUpperCase() })).metadata?.sessionId).toBe(sessionId);
    const other = await setup.plane.addUser();
    for (const id of [sessionId, uuidv7()])
      expect(await codeOf(attempt({}, { sessionId: id }, other.client))).toBe("NotFound");
    expect(await codeOf(attempt({}, { sessionId: "mine" }))).toBe("InvalidArgument");
  });

  const key = (id: string, value: string) => ({ id, value });
  test.each<[string, Spec, Request, string[]]>([
    ["no repository", from(git("")), {}, ["spec.content.initializer.specs[0].git.remote_uri"]],
    ["a command as a remote", from(git("ext::sh -c id")), {}, ["spec.content.initializer.specs[0].git.remote_uri"]],
    ["an option as a remote", from(git("--upload-pack=id")), {}, ["spec.content.initializer.specs[0].git.remote_uri"]],
    [
      "a password in a remote",
      from(git("https://u:p@git.example.org/a/b")),
      {},
      ["spec.content.initializer.specs[0].git.remote_uri"],
    ],
    ["a scheme that is off", from(git("file:///etc")), {}, ["spec.content.initializer.specs[0].git.remote_uri"]],
    [
      "a checkout outside",
      from(git("https://git.example.org/a/b", { checkoutLocation: "../x" })),
      {},
      ["spec.content.initializer.specs[0].git.checkout_location"],
    ],
    ["an empty source", { content: { initializer: { specs: [{}] } } }, {}, ["spec.content.initializer.specs[0]"]],
    [
      "17 sources",
      from(...Array.from({ length: 17 }, (_, index) => git(`https://git.example.org/a/b${index}`))),
      {},
      ["spec.content.initializer.specs"],
    ],
    ["a key that is none", { sshPublicKeys: [key("a", "ssh-ed25519 AAAA")] }, {}, ["spec.ssh_public_keys[0].value"]],
    ["a key with options", { sshPublicKeys: [key("a", `command="id" ${KEY}`)] }, {}, ["spec.ssh_public_keys[0].value"]],
    ["one key id twice", { sshPublicKeys: [key("a", KEY), key("a", KEY)] }, {}, ["spec.ssh_public_keys[1].id"]],
    ["one port twice", { ports: [port(3000), port(3000)] }, {}, ["spec.ports[1].port"]],
    ["a port of the system", { ports: [port(80)] }, {}, ["spec.ports[0].port"]],
    ["a short timeout", { timeout: { disconnected: { seconds: 60n } } }, {}, ["spec.timeout.disconnected"]],
    ["a negative timeout", { timeout: { disconnected: { seconds: -1800n } } }, {}, ["spec.timeout.disconnected"]],
    [
      "33 annotations",
      {},
      { annotations: Object.fromEntries(Array.from({ length: 33 }, (_, index) => [`k${index}`, ""])) },
      ["annotations"],
    ],
    ["a long annotation", {}, { annotations: { key: "x".repeat(1025) } }, ["annotations"]],
    ["a long name", {}, { name: "x".repeat(81) }, ["name"]],
    ["an action of a workflow", { workflowActionId: uuidv7() }, {}, ["spec.workflow_action_id"]],
    ["a security policy", { securityPolicyId: uuidv7() }, {}, ["spec.security_policy_id"]],
  ])("INVALID_ARGUMENT with the field: %s", async (_what, spec, more, fields) => {
    const error = await refused(spec, more);
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", fields]);
  });

  test("no message that the wire can carry is an internal error", async () => {
    const binary = createBerthClient({ baseUrl: setup.plane.url, token: setup.member.token, useBinaryFormat: true });
    const far = 2n ** 62n;
    const { id } = await attempt();
    const calls = [
      () => attempt({ timeout: { disconnected: { seconds: far } } }, {}, binary),
      () => attempt({ timeout: { disconnected: { seconds: 1800n, nanos: -1 } } }, {}, binary),
      () => attempt({}, { name: "a\u0000b" }),
      () =>
        attempt({
          kernelControlsConfig: { veto: { exec: { action: 99 as KernelControlsAction } } },
          desiredPhase: -1 as EnvironmentPhase,
        }),
      () => binary.environments.listEnvironments({ filter: { createdBefore: { seconds: far } } }),
      () => binary.environments.listEnvironments({ filter: { lockdownBefore: { seconds: -far } } }),
      () => binary.environments.listEnvironments({ filter: { createdBefore: { seconds: 1n, nanos: -1 } } }),
      () => binary.environments.listEnvironments({ filter: { search: "a\u0000b" } }),
      () =>
        binary.environments.markEnvironmentActive({
          environmentId: id,
          activitySignal: { source: "SSH", timestamp: { seconds: -far } },
        }),
    ];
    for (const call of calls) expect(await codeOf(call())).toBe("InvalidArgument");
    // Numbers that no enum has match nothing, or mean nothing.
    const phases = [100_000, -1] as number[];
    expect((await binary.environments.listEnvironments({ filter: { statusPhases: phases } })).environments).toEqual([]);
    expect(
      (await binary.environments.listEnvironments({ filter: { statusPhases: phases.slice(1) } })).environments,
    ).toEqual([]);
  });

  test("the first failing check decides", async () => {
    const disabled = await addClass(setup.plane, setup.runner.id);
    await setup.plane.admin.runnerConfiguration.updateEnvironmentClass({
      environmentClassId: disabled,
      enabled: false,
    });
    const bad = from(git("ext::sh"));
    const code = async (classIdOf: string, spec: Spec, more: Request = {}) =>
      codeOf(make(member, classIdOf, { ...bad, ...spec }, more));
    await underPolicies({ membersRequireProjects: true }, async () => {
      expect(await code(uuidv7(), { desiredPhase: STOPPED })).toBe("PermissionDenied");
    });
    expect(await code(uuidv7(), { desiredPhase: STOPPED })).toBe("InvalidArgument");
    expect(await code(uuidv7(), {})).toBe("NotFound");
    expect(await code(disabled, {})).toBe("FailedPrecondition");
    expect(await code(classId, {}, { sessionId: uuidv7() })).toBe("InvalidArgument");
  });

  describe("policies", () => {
    const DENIED = "PermissionDenied";
    const FAILED = "FailedPrecondition";
    const tooLong = { timeout: { disconnected: durationFromMs(2 * HOUR_MS) } };

    test("ENV-4 members_require_projects binds everybody but org admins", async () => {
      const robot = await addServiceAccount(setup.plane);
      await underPolicies({ membersRequireProjects: true }, async () => {
        for (const client of [member, robot.client]) {
          expect(policyOf(await refused(from(git("https://git.example.org/a/b")), {}, client))).toBe(
            `${DENIED} members_require_projects`,
          );
        }
        await attempt({}, {}, setup.plane.admin);
      });
    });

    test("disable_from_scratch", async () => {
      await underPolicies({ disableFromScratch: true }, async () => {
        expect(policyOf(await refused())).toBe(`${DENIED} disable_from_scratch`);
        expect(policyOf(await refused({ content: { initializer: { specs: [] } } }))).toBe(
          `${DENIED} disable_from_scratch`,
        );
        await attempt(from(git("https://git.example.org/a/b")));
        await attempt({}, {}, setup.plane.admin);
      });
    });

    test("ENV-9 maximum_environment_timeout: longer or endless is refused, the default fits", async () => {
      await underPolicies({ maximumEnvironmentTimeout: durationFromMs(HOUR_MS) }, async () => {
        for (const spec of [tooLong, { timeout: { disconnected: durationFromMs(0) } }]) {
          // Nobody is exempt.
          for (const client of [member, setup.plane.admin]) {
            expect(policyOf(await refused(spec, {}, client))).toBe(`${FAILED} maximum_environment_timeout`);
          }
        }
        expect((await attempt()).spec?.timeout?.disconnected?.seconds).toBe(1800n);
        await attempt({ timeout: { disconnected: durationFromMs(HOUR_MS) } });
      });
      await attempt(tooLong);
    });

    test("port_sharing_disabled and max_port_admission_level", async () => {
      const open = (admission: AdmissionLevel): Spec => ({ ports: [port(3000), port(3001, admission)] });
      await underPolicies({ portSharingDisabled: true }, async () => {
        expect(policyOf(await refused(open(AdmissionLevel.CREATOR_ONLY)))).toBe(`${FAILED} port_sharing_disabled`);
        await attempt();
      });
      await underPolicies({ maxPortAdmissionLevel: AdmissionLevel.ORGANIZATION }, async () => {
        expect(policyOf(await refused(open(AdmissionLevel.EVERYONE)))).toBe(`${FAILED} max_port_admission_level`);
        await attempt(open(AdmissionLevel.ORGANIZATION));
      });
      await underPolicies({ maxPortAdmissionLevel: AdmissionLevel.CREATOR_ONLY }, async () => {
        expect(policyOf(await refused(open(AdmissionLevel.ORGANIZATION)))).toBe(`${FAILED} max_port_admission_level`);
        await attempt(open(AdmissionLevel.CREATOR_ONLY));
      });
    });

    test("ENV-43 veto policies: added where the request is silent, refused where it is weaker", async () => {
      const veto = (action: KernelControlsAction, ...denylist: string[]): Spec => ({
        kernelControlsConfig: { veto: { exec: { enabled: true, denylist, action } } },
      });
      const { BLOCK, AUDIT } = KernelControlsAction;
      const vetoExecPolicy = {
        $typeName: "gitpod.v1.VetoExecPolicy" as const,
        enabled: true,
        executables: ["/bin/nc"],
        action: BLOCK,
        safelist: [],
      };
      await underPolicies({ vetoExecPolicy }, async () => {
        expect((await attempt()).spec?.kernelControlsConfig?.veto?.exec).toMatchObject({
          enabled: true,
          denylist: ["/bin/nc"],
          action: BLOCK,
        });
        for (const weaker of [veto(AUDIT, "/bin/nc"), veto(BLOCK, "/bin/sh"), { kernelControlsConfig: {} }]) {
          expect(policyOf(await refused(weaker))).toBe(`${FAILED} veto_exec_policy`);
        }
        const stronger = await attempt(veto(BLOCK, "/bin/nc", "/bin/sh"));
        expect(stronger.spec?.kernelControlsConfig?.veto?.exec?.denylist).toEqual(["/bin/nc", "/bin/sh"]);
      });
    });

    test("default_environment_image is taken where the request names none", async () => {
      await underPolicies({ defaultEnvironmentImage: "registry.example.org/base:1" }, async () => {
        expect((await attempt()).spec?.devcontainer?.defaultDevcontainerImage).toBe("registry.example.org/base:1");
        const own = await attempt({ devcontainer: { defaultDevcontainerImage: "alpine" } });
        expect(own.spec?.devcontainer?.defaultDevcontainerImage).toBe("alpine");
      });
    });

    test("ENV-42 allow_local_runners and the local configuration runner switch creating off", async () => {
      await underPolicies({ allowLocalRunners: false }, async () => {
        expect(policyOf(await refused({}, {}, setup.plane.admin))).toBe(`${FAILED} allow_local_runners`);
      });
      const { write } = setup.plane.plane.app.db;
      const [active] =
        await write`select desired_phase from runners where kind = ${RunnerKind.LOCAL_CONFIGURATION} limit 1`;
      await write`update runners set desired_phase = 0 where kind = ${RunnerKind.LOCAL_CONFIGURATION}`;
      expect(policyOf(await refused())).toBe(`${FAILED} allow_local_runners`);
      await write`update runners set desired_phase = ${active?.desired_phase} where kind = ${RunnerKind.LOCAL_CONFIGURATION}`;
      await attempt();
    });
  });

  describe("quotas", () => {
    test("ENV-8 of 10 creates at once by one user exactly 2 succeed; a service account is not limited", async () => {
      const user = await setup.plane.addUser();
      const robot = await addServiceAccount(setup.plane);
      await underPolicies({ maximumRunningEnvironmentsPerUser: 2n }, async () => {
        const all = await Promise.allSettled(Array.from({ length: 10 }, () => attempt({}, {}, user.client)));
        expect(all.filter((each) => each.status === "fulfilled")).toHaveLength(2);
        const errors = all.flatMap((each) => (each.status === "rejected" ? [ConnectError.from(each.reason)] : []));
        expect(errors.map(policyOf)).toEqual(Array(8).fill("ResourceExhausted maximum_running_environments_per_user"));
        // A quota does not go away by itself, so that clients must not try again.
        expect(errors[0]?.metadata.get("x-should-retry")).toBe("false");
        expect((await user.client.environments.listEnvironments({})).environments).toHaveLength(2);
        await Promise.all(Array.from({ length: 4 }, () => attempt({}, {}, robot.client)));
      });
    });

    test("the running quota counts what wants to run; the total one also what is stopped, but nothing archived or deleted", async () => {
      const { client } = await setup.plane.addUser();
      const { environments } = client;
      const limits = { maximumRunningEnvironmentsPerUser: 1n, maximumEnvironmentsPerUser: 2n };
      await underPolicies(limits, async () => {
        const first = await attempt({}, {}, client);
        expect(policyOf(await refused({}, {}, client))).toBe("ResourceExhausted maximum_running_environments_per_user");
        await environments.stopEnvironment({ environmentId: first.id });
        const second = await attempt({}, {}, client);
        expect(policyOf(await refusal(environments.startEnvironment({ environmentId: first.id })))).toBe(
          "ResourceExhausted maximum_running_environments_per_user",
        );
        await environments.stopEnvironment({ environmentId: second.id });
        expect(policyOf(await refused({}, {}, client))).toBe("ResourceExhausted maximum_environments_per_user");
        await environments.archiveEnvironment({ environmentId: first.id });
        const third = await attempt({}, {}, client);
        expect(policyOf(await refusal(environments.unarchiveEnvironment({ environmentId: first.id })))).toBe(
          "ResourceExhausted maximum_environments_per_user",
        );
        await environments.deleteEnvironment({ environmentId: third.id, force: true });
        await environments.unarchiveEnvironment({ environmentId: first.id });
        await environments.startEnvironment({ environmentId: first.id });
      });
    });

    test("starts at once on one quota: only as many as fit", async () => {
      const { client } = await setup.plane.addUser();
      const stopped = await Promise.all(Array.from({ length: 6 }, () => attempt({}, {}, client)));
      for (const { id } of stopped) await client.environments.stopEnvironment({ environmentId: id });
      await underPolicies({ maximumRunningEnvironmentsPerUser: 3n }, async () => {
        const starts = await Promise.allSettled(
          stopped.map(({ id }) => client.environments.startEnvironment({ environmentId: id })),
        );
        expect(starts.filter((each) => each.status === "fulfilled")).toHaveLength(3);
      });
    });

    test("ENV-44 a runner at its capacity takes neither a new environment nor a start, whoever asks", async () => {
      const { runner, classId } = await connectRunner(setup.plane, { maxEnvironments: 2 });
      const users = await Promise.all(Array.from({ length: 5 }, () => setup.plane.addUser()));
      const all = await Promise.allSettled(users.map(({ client }) => make(client, classId)));
      const made = all.flatMap((each) => (each.status === "fulfilled" ? [each.value] : []));
      expect(made).toHaveLength(2);
      const errors = all.flatMap((each) => (each.status === "rejected" ? [ConnectError.from(each.reason)] : []));
      expect(errors.map(({ code }) => Code[code])).toEqual(Array(3).fill(Code[ResourceExhausted]));
      const stored = () => setup.plane.plane.app.db.point`select from environments where runner_id = ${runner.id}`;
      expect(await stored()).toHaveLength(2);

      const [first] = made;
      const owner = users.find(({ id }) => id === first?.metadata?.creator?.id);
      const environmentId = first?.id ?? "";
      await owner?.client.environments.stopEnvironment({ environmentId });
      await make(setup.plane.admin, classId);
      const before = await read(setup.plane.admin, environmentId);
      expect(await codeOf(owner!.client.environments.startEnvironment({ environmentId }))).toBe(
        Code[ResourceExhausted],
      );
      expect(versions(await read(setup.plane.admin, environmentId))).toEqual(versions(before));
      expect(await stored()).toHaveLength(3);
    });
  });

  test("ENV-24 on a runner that is not connected nothing is created", async () => {
    const { runner, classId } = await connectRunner(setup.plane);
    await runner.control.deregister({ linkId: runner.linkId, reason: 1 });
    const error = await refusal(make(member, classId));
    expect([error.code, error.rawMessage]).toEqual([FailedPrecondition, "runner is not connected"]);
  });

  test("a runner that is deleted meanwhile gets no new environments", async () => {
    const { admin, plane } = setup.plane;
    for (let round = 0; round < 4; round += 1) {
      const { runner, classId } = await connectRunner(setup.plane);
      const creations = Array.from({ length: 4 }, () => make(member, classId));
      const [deletion, ...made] = await Promise.allSettled([
        admin.runners.deleteRunner({ runnerId: runner.id, force: true }),
        ...creations,
      ]);
      // It may have been told to try again, because environments were still being made.
      if (deletion?.status === "rejected") {
        expect(Code[deletion.reason.code]).toBe("Aborted");
        await admin.runners.deleteRunner({ runnerId: runner.id, force: true });
      }
      const codes = made.flatMap((each) => (each.status === "rejected" ? [Code[each.reason.code]] : []));
      for (const code of codes) expect(["NotFound", "FailedPrecondition"]).toContain(code);
      expect(
        await plane.app.db.point`select from environments where runner_id = ${runner.id} and deleted_at is null`,
      ).toHaveLength(0);
    }
  });
});

describe("the life of an environment", () => {
  let setup: Setup;
  let member: BerthClient;
  let runner: FakeRunner;

  beforeAll(async () => {
    setup = await setUp();
    member = setup.member.client;
    runner = setup.runner;
    runner.watch();
  });
  afterAll(() => tearDown(setup));

  const get = (id: string) => read(member, id);
  const phaseOf = async (id: string) => (await get(id)).status?.phase;
  const db = () => setup.plane.plane.app.db;

  /** An environment of the member that the runner has brought up. */
  async function running(spec: Spec = {}, on = setup): Promise<Environment> {
    const created = await make(member, on.classId, spec);
    await on.runner.reportRunning(created);
    return get(created.id);
  }

  async function stopped(): Promise<Environment> {
    const environment = await running();
    await member.environments.stopEnvironment({ environmentId: environment.id });
    await runner.reportMachine(environment, MachinePhase.STOPPED);
    return get(environment.id);
  }

  /** Reports that the machine is gone, as the first report after a stop or in the course of a deletion. */
  const machineIs = async (id: string, phase: MachinePhase) => runner.reportMachine(await get(id), phase);

  test("ENV-10 Stop is STOPPING, then STOPPED; again it changes nothing", async () => {
    const { id, status } = await running();
    expect(status?.phase).toBe(RUNNING);
    expect(status?.environmentUrls?.ops).not.toBe("");
    const environmentId = id;
    await member.environments.stopEnvironment({ environmentId });
    const stopping = await get(id);
    expect(stopping).toMatchObject({ spec: { desiredPhase: STOPPED, specVersion: 2n }, status: { phase: STOPPING } });
    expect(stopping.status?.environmentUrls?.ops).toBe("");
    await runner.desired(id, ({ spec }) => spec?.desiredPhase === STOPPED);
    await member.environments.stopEnvironment({ environmentId });
    expect(versions(await get(id))).toEqual(versions(stopping));

    await machineIs(id, MachinePhase.STOPPED);
    const done = await get(id);
    expect(done).toMatchObject({ spec: { desiredPhase: STOPPED }, status: { phase: STOPPED } });
    const before = await traces(setup, id);
    await member.environments.stopEnvironment({ environmentId });
    expect(versions(await get(id))).toEqual(versions(done));
    expect(await traces(setup, id)).toEqual(before);
    expect(before.actions).toEqual([
      "Environment created",
      "Environment is running",
      "Environment stop requested",
      "Environment is stopped",
    ]);
  });

  test("what the runner never took up stops and goes at once", async () => {
    const [first, second] = [await make(member, setup.classId), await make(member, setup.classId)];
    await member.environments.stopEnvironment({ environmentId: first.id });
    expect(await phaseOf(first.id)).toBe(STOPPED);
    await member.environments.startEnvironment({ environmentId: first.id });
    expect(await phaseOf(first.id)).toBe(CREATING);
    await member.environments.deleteEnvironment({ environmentId: second.id });
    expect(await phaseOf(second.id)).toBe(DELETED);
  });

  test("ENV-11 Start is never followed by STOPPED; it has a new machine session and keeps its content", async () => {
    const before = await stopped();
    const environmentId = before.id;
    await member.environments.startEnvironment({ environmentId });
    const after = await get(environmentId);
    expect(after.status).toMatchObject({ phase: STARTING, failureMessage: [] });
    expect(after.spec).toMatchObject({ desiredPhase: RUNNING, content: { session: before.spec?.content?.session } });
    expect(after.spec?.machine?.session).not.toBe(before.spec?.machine?.session);
    expect(after.metadata?.createdAt).toEqual(before.metadata?.createdAt);
    expect(after.metadata?.lastStartedAt).not.toEqual(before.metadata?.lastStartedAt);
    const desired = await runner.desired(
      environmentId,
      ({ spec }) => spec?.desiredPhase === RUNNING && spec.specVersion > 1n,
    );
    expect(desired.spec).toEqual(after.spec);
    await runner.reportRunning(after);
    expect(await phaseOf(environmentId)).toBe(RUNNING);
  });

  test("ENV-12 Start while stopping is FAILED_PRECONDITION, while running a no-op", async () => {
    const environment = await running();
    const environmentId = environment.id;
    await member.environments.startEnvironment({ environmentId });
    expect(await get(environmentId)).toEqual(environment);
    await member.environments.stopEnvironment({ environmentId });
    expect(await codeOf(member.environments.startEnvironment({ environmentId }))).toBe("FailedPrecondition");
  });

  test("ENV-13 content that fails ends the start with one message, which the next start clears", async () => {
    const created = await make(member, setup.classId, from(git("https://git.example.org/no/such")));
    const { id } = created;
    const { runnerAck, machine } = runningStatus(created);
    const content = {
      session: created.spec?.content?.session ?? "",
      phase: ContentPhase.FAILED,
      failureMessage: "repository not found",
    };
    await runner.report(id, { runnerAck, machine, content });
    const failed = await get(id);
    expect(failed).toMatchObject({
      spec: { desiredPhase: STOPPED, specVersion: 2n },
      status: { phase: STOPPING, failureMessage: ["repository not found"] },
    });
    await runner.report(id, { runnerAck, machine: { ...machine, phase: MachinePhase.STOPPED }, content });
    expect((await get(id)).status).toMatchObject({ phase: STOPPED, failureMessage: ["repository not found"] });
    await member.environments.startEnvironment({ environmentId: id });
    // It has never run.
    expect((await get(id)).status).toMatchObject({ phase: STARTING, failureMessage: [] });
  });

  test("a refused specification and a failed machine end a start too", async () => {
    for (const failure of [
      { runnerAck: { statusCode: Ack.FAILED_PRECONDITION, message: "no room", specVersion: 1n } },
      { runnerAck: { statusCode: Ack.OK, specVersion: 1n }, failureMessage: "no room" },
    ]) {
      const created = await make(member, setup.classId);
      const session = created.spec?.machine?.session ?? "";
      const machine = { session, phase: MachinePhase.CREATING, failureMessage: failure.failureMessage ?? "" };
      await runner.report(created.id, { runnerAck: failure.runnerAck, machine });
      expect(await get(created.id)).toMatchObject({
        spec: { desiredPhase: STOPPED },
        status: { phase: STOPPING, failureMessage: ["no room"] },
      });
    }
  });

  test("ENV-18 Archive stops first; archived it does not start; unarchived it does, and is not archived again", async () => {
    const { id } = await running();
    const environmentId = id;
    await member.environments.archiveEnvironment({ environmentId });
    const pending = await get(id);
    expect([pending.metadata?.archivedAt, pending.status?.phase]).toEqual([undefined, STOPPING]);
    await member.environments.archiveEnvironment({ environmentId });
    expect(versions(await get(id))).toEqual(versions(pending));
    await machineIs(id, MachinePhase.STOPPED);
    const archived = await get(id);
    expect(archived.metadata?.archivedAt).toBeDefined();
    expect(await codeOf(member.environments.startEnvironment({ environmentId }))).toBe("FailedPrecondition");
    await member.environments.archiveEnvironment({ environmentId });
    expect(await get(id)).toEqual(archived);

    await member.environments.unarchiveEnvironment({ environmentId });
    const unarchived = await get(id);
    expect([unarchived.metadata?.archivedAt, unarchived.status?.phase]).toEqual([undefined, STOPPED]);
    const before = await traces(setup, id);
    await member.environments.unarchiveEnvironment({ environmentId });
    expect(await traces(setup, id)).toEqual(before);
    await sweep(setup.plane.plane);
    await member.environments.startEnvironment({ environmentId });
    await runner.reportRunning(await get(id));
    await member.environments.stopEnvironment({ environmentId });
    await machineIs(id, MachinePhase.STOPPED);
    expect((await get(id)).metadata?.archivedAt).toBeUndefined();
  });

  test("Archive of a stopped one takes effect at once; Unarchive withdraws one that is pending", async () => {
    const { id } = await stopped();
    await member.environments.archiveEnvironment({ environmentId: id });
    expect((await get(id)).metadata?.archivedAt).toBeDefined();
    const other = await running();
    await member.environments.archiveEnvironment({ environmentId: other.id });
    await member.environments.unarchiveEnvironment({ environmentId: other.id });
    await machineIs(other.id, MachinePhase.STOPPED);
    const withdrawn = await get(other.id);
    expect([withdrawn.metadata?.archivedAt, withdrawn.status?.phase]).toEqual([undefined, STOPPED]);
  });

  test("ENV-22 Delete is STOPPING, DELETING, DELETED in order; tokens end, watchers hear of it, the tombstone is bare", async () => {
    const spec = { sshPublicKeys: [{ id: "k", value: KEY }] };
    const environment = await make(member, setup.classId, spec, { annotations: { team: "a" } });
    await runner.report(environment.id, {
      ...runningStatus(environment),
      sshPublicKeys: [{ id: "k", phase: ContentPhase.READY }],
    });
    const environmentId = environment.id;
    const own = await runner.control.createEnvironmentToken({
      environmentId,
      machineSession: environment.spec?.machine?.session,
    });
    const access = await member.environments.createEnvironmentAccessToken({ environmentId });
    const isActive = async (token: string) => (await runner.control.introspectToken({ token })).active;
    expect([await isActive(own.token), await isActive(access.accessToken)]).toEqual([true, true]);

    await member.environments.deleteEnvironment({ environmentId });
    expect(await phaseOf(environmentId)).toBe(STOPPING);
    await member.environments.deleteEnvironment({ environmentId });
    await machineIs(environmentId, MachinePhase.STOPPED);
    expect(await phaseOf(environmentId)).toBe(DELETING);
    expect(await codeOf(member.environments.createEnvironmentAccessToken({ environmentId }))).toBe(
      "FailedPrecondition",
    );
    await member.environments.createEnvironmentLogsToken({ environmentId });
    for (const call of [
      member.environments.startEnvironment,
      member.environments.archiveEnvironment,
      member.environments.markEnvironmentActive,
    ]) {
      expect(await codeOf(call({ environmentId }))).toBe("FailedPrecondition");
    }
    await member.environments.stopEnvironment({ environmentId });
    await machineIs(environmentId, MachinePhase.DELETED);

    const tombstone = await get(environmentId);
    expect(tombstone).toMatchObject({
      metadata: { annotations: {} },
      spec: { desiredPhase: DELETED, sshPublicKeys: [], secrets: [] },
      status: { phase: DELETED },
    });
    expect(tombstone.status?.environmentUrls).toBeUndefined();
    const { events, actions } = await traces(setup, environmentId);
    expect(events.filter((each) => each === "DELETE")).toHaveLength(1);
    expect(events.at(-1)).toBe("DELETE");
    expect(actions.slice(-4)).toEqual([
      ...["Environment deletion requested", "Environment is deleting", "Logs token issued", "Environment is deleted"],
    ]);
    expect([await isActive(own.token), await isActive(access.accessToken)]).toEqual([false, false]);
    expect(await codeOf(setup.plane.client(own.token).environments.getEnvironment({ environmentId }))).toBe(
      "Unauthenticated",
    );
    for (const token of [
      member.environments.createEnvironmentLogsToken,
      member.environments.createEnvironmentAccessToken,
    ]) {
      expect(await codeOf(token({ environmentId }))).toBe("FailedPrecondition");
    }
    for (const noop of [member.environments.deleteEnvironment, member.environments.stopEnvironment])
      await noop({ environmentId });
    expect(await get(environmentId)).toEqual(tombstone);
    // The runner has nothing more to say about it.
    expect((await runner.report(environmentId, {})).outcome).toBe(4);
  });

  test("ENV-23 with the runner away Delete waits, by force it does not, and the runner learns of it when it returns", async () => {
    const away = await connectRunner(setup.plane);
    const environment = await running({}, { ...setup, ...away });
    const environmentId = environment.id;
    await away.runner.control.deregister({ linkId: away.runner.linkId, reason: 1 });
    await member.environments.deleteEnvironment({ environmentId });
    expect(await phaseOf(environmentId)).toBe(STOPPING);
    await member.environments.deleteEnvironment({ environmentId, force: true });
    expect(await phaseOf(environmentId)).toBe(DELETED);

    await away.runner.register({ localEnvironmentIds: [environmentId] });
    away.runner.watch();
    await eventually(
      () => away.runner.seen.some((event) => event.case === "remove" && event.value.id === environmentId),
      "the runner is told to erase it",
    );
    await away.runner[Symbol.asyncDispose]();
  });

  test("ENV-24 on an unreachable runner nothing starts; what runs keeps its phase and says so until the runner is back", async () => {
    const lost = await connectRunner(setup.plane);
    const on = { ...setup, ...lost };
    const alive = await running({}, on);
    const idle = await running({}, on);
    await member.environments.stopEnvironment({ environmentId: idle.id });
    await lost.runner.reportMachine(idle, MachinePhase.STOPPED);

    await db().write`update runners set lease_expires_at = now() - interval '1 second' where id = ${lost.runner.id}`;
    await sweep(setup.plane.plane);
    const refused = await refusal(member.environments.startEnvironment({ environmentId: idle.id }));
    expect([refused.code, refused.rawMessage]).toEqual([FailedPrecondition, "runner is not connected"]);
    expect((await get(alive.id)).status).toMatchObject({
      phase: RUNNING,
      warningMessage: [expect.stringContaining("runner unreachable since")],
    });
    expect((await get(alive.id)).status?.environmentUrls).toEqual(alive.status?.environmentUrls);
    await lost.runner.heartbeat();
    await sweep(setup.plane.plane);
    expect((await get(alive.id)).status).toMatchObject({ phase: RUNNING, warningMessage: [] });
    await member.environments.startEnvironment({ environmentId: idle.id });

    // What is asked for meanwhile happens on its return.
    await lost.runner.control.deregister({ linkId: lost.runner.linkId, reason: 1 });
    await member.environments.stopEnvironment({ environmentId: alive.id });
    expect(await phaseOf(alive.id)).toBe(STOPPING);
  });

  test("ENV-17 ENV-45 signals of activity write one event at most, and nothing into the audit log", async () => {
    const { id } = await running();
    const before = await traces(setup, id);
    const activitySignal = { source: "SSH" };
    await Promise.all(
      Array.from({ length: 100 }, () =>
        member.environments.markEnvironmentActive({ environmentId: id, activitySignal }),
      ),
    );
    const after = await traces(setup, id);
    expect(after.events.slice(before.events.length)).toEqual(["UPDATE_STATUS"]);
    expect((await get(id)).status?.activitySignal).toMatchObject({ source: "SSH" });
    await member.environments.markEnvironmentActive({ environmentId: id });
    expect((await get(id)).status?.activitySignal?.source).toBe("API");
    const future = timestampFromDate(new Date(Date.now() + DAY_MS));
    await member.environments.markEnvironmentActive({
      environmentId: id,
      activitySignal: { source: "Tomorrow", timestamp: future },
    });
    expect(Number((await get(id)).status?.activitySignal?.timestamp?.seconds) * 1000).toBeLessThanOrEqual(Date.now());
    expect((await traces(setup, id)).audit).toEqual(before.audit);
    const wrong = await refusal(
      member.environments.markEnvironmentActive({ environmentId: id, activitySignal: { source: "x" } }),
    );
    expect(violatedFields(wrong)).toEqual(["activity_signal.source"]);
    const idle = await stopped();
    expect(await codeOf(member.environments.markEnvironmentActive({ environmentId: idle.id }))).toBe(
      "FailedPrecondition",
    );
  });

  test("ENV-45 a report writes an event, and an audit entry only with a new phase; an equal one writes nothing", async () => {
    const created = await make(member, setup.classId);
    const { id } = created;
    const status = runningStatus(created);
    await runner.report(id, status);
    const first = await traces(setup, id);
    expect(first).toMatchObject({
      events: ["CREATE", "UPDATE_STATUS"],
      actions: ["Environment created", "Environment is running"],
    });
    expect(first.audit[1]).toMatchObject({ actor_id: runner.id, actor_principal: Principal.RUNNER });

    const described = { ...status, content: { ...status.content, git: { branch: "main" } } };
    await runner.report(id, described);
    const second = await traces(setup, id);
    expect(second).toMatchObject({ events: [...first.events, "UPDATE_STATUS"], actions: first.actions });
    const { status: before } = await get(id);
    await runner.report(id, described);
    expect(await traces(setup, id)).toEqual(second);
    expect((await get(id)).status?.statusVersion).toBe(before?.statusVersion);
  });

  test("ENV-40 a client that has read too early hears of the change as soon as it opens a stream", async () => {
    const created = await make(member, setup.classId);
    expect((await get(created.id)).status?.phase).toBe(CREATING);
    await runner.reportRunning(created);
    const resourceTypeFilters = [{ resourceType: ResourceType.ENVIRONMENT, resourceIds: [created.id] }];
    const stream = member.events.watchEvents({ resourceTypeFilters }, { signal: AbortSignal.timeout(10_000) });
    for await (const event of stream) {
      expect(event).toMatchObject({ resourceId: created.id, operation: ResourceOperation.UPDATE_STATUS });
      break;
    }
    expect((await get(created.id)).status?.phase).toBe(RUNNING);
  });

  test("ENV-46 without RUNNER_USER a running environment goes on, but does not start again", async () => {
    const other = await connectRunner(setup.plane);
    const environment = await running({}, { ...setup, ...other });
    const environmentId = environment.id;
    await unshareRunner(setup.plane, other.runner.id);
    expect(await get(environmentId)).toEqual(environment);
    expect(await codeOf(make(member, other.classId))).toBe("NotFound");
    await member.environments.stopEnvironment({ environmentId });
    await other.runner.reportMachine(environment, MachinePhase.STOPPED);
    expect(await codeOf(member.environments.startEnvironment({ environmentId }))).toBe("PermissionDenied");
    await member.environments.deleteEnvironment({ environmentId });
  });

  test("when its runner was deleted by force, an environment is a tombstone that does not start", async () => {
    const gone = await connectRunner(setup.plane);
    const { id } = await running({}, { ...setup, ...gone });
    await setup.plane.admin.runners.deleteRunner({ runnerId: gone.runner.id, force: true });
    expect(await phaseOf(id)).toBe(DELETED);
    expect(await codeOf(member.environments.startEnvironment({ environmentId: id }))).toBe("FailedPrecondition");
  });

  test("every token that is issued is a new one, and is put down as access to a credential", async () => {
    const { id } = await running();
    const environmentId = id;
    const tokens = [
      await member.environments.createEnvironmentAccessToken({ environmentId }),
      await member.environments.createEnvironmentAccessToken({ environmentId }),
      await member.environments.createEnvironmentLogsToken({ environmentId }),
    ].map(({ accessToken }) => accessToken);
    expect(new Set(tokens).size).toBe(3);
    const { audit } = await traces(setup, id);
    expect(audit.slice(-3)).toMatchObject([
      { action: "Access token issued", kind: AuditLogEntryKind.CREDENTIAL_ACCESS, actor_id: setup.member.id },
      { action: "Access token issued" },
      { action: "Logs token issued" },
    ]);
  });

  test("requests at once for one environment: each sees the result of those before", async () => {
    const { id } = await stopped();
    const before = await traces(setup, id);
    await Promise.all(Array.from({ length: 8 }, () => member.environments.startEnvironment({ environmentId: id })));
    const { events } = await traces(setup, id);
    expect(events.length).toBe(before.events.length + 1);
  });

  test("columns say what the messages say", async () => {
    const rows = await db().point`select * from environments`;
    expect(rows.length).toBeGreaterThan(10);
    for (const row of rows) {
      const { metadata, spec, status } = await read(setup.plane.admin, row.id);
      const seconds = (date: Date | null) => date && BigInt(Math.floor(date.getTime() / 1000));
      expect({
        ...{ organizationId: row.organization_id, runnerId: row.runner_id, sessionId: row.session_id, role: row.role },
        creator: [row.creator_id, row.creator_principal],
        goal: [row.desired_phase, row.phase, row.admission, row.class_id],
        times: [seconds(row.created_at), seconds(row.archived_at), seconds(row.lockdown_at)],
        deleted: row.deleted_at !== null,
      }).toEqual({
        ...{
          organizationId: metadata?.organizationId,
          runnerId: metadata?.runnerId,
          sessionId: metadata?.sessionId,
          role: metadata?.role,
        },
        creator: [metadata?.creator?.id, metadata?.creator?.principal],
        goal: [spec?.desiredPhase, status?.phase, spec?.admission, spec?.machine?.class],
        times: [
          metadata?.createdAt?.seconds,
          metadata?.archivedAt?.seconds ?? null,
          metadata?.lockdownAt?.seconds ?? null,
        ],
        deleted: status?.phase === DELETED,
      });
    }
  });
});

describe("who may do what", () => {
  let setup: Setup;
  let owner: BerthClient;
  let guest: TestUser;

  beforeAll(async () => {
    setup = await setUp();
    owner = setup.member.client;
    guest = await setup.plane.addUser({ name: "Guest" });
  });
  afterAll(() => tearDown(setup));

  async function running(spec: Spec = {}): Promise<string> {
    const environment = await make(owner, setup.classId, spec);
    await setup.runner.reportRunning(environment);
    return environment.id;
  }

  const ids = async (client: BerthClient) =>
    (await client.environments.listEnvironments({ pagination: { pageSize: 100 } })).environments.map(({ id }) => id);

  /** Codes of every RPC on one environment, in an order in which those that work leave it fit for the next. */
  async function rights({ environments }: BerthClient, environmentId: string): Promise<Record<string, string>> {
    const calls = {
      get: () => environments.getEnvironment({ environmentId }),
      enter: () => environments.createEnvironmentAccessToken({ environmentId }),
      logs: () => environments.createEnvironmentLogsToken({ environmentId }),
      use: () => environments.markEnvironmentActive({ environmentId }),
      start: () => environments.startEnvironment({ environmentId }),
      stop: () => environments.stopEnvironment({ environmentId }),
      archive: () => environments.archiveEnvironment({ environmentId }),
      unarchive: () => environments.unarchiveEnvironment({ environmentId }),
      delete: () => environments.deleteEnvironment({ environmentId, force: true }),
    };
    const found: Record<string, string> = {};
    for (const [name, call] of Object.entries(calls)) {
      found[name] = await call().then(
        () => "ok",
        (error) => Code[ConnectError.from(error).code] ?? "",
      );
    }
    return found;
  }

  const all = (code: string) => ({
    ...{
      get: code,
      enter: code,
      logs: code,
      use: code,
      start: code,
      stop: code,
      archive: code,
      unarchive: code,
      delete: code,
    },
  });
  const [OK, DENIED, ABSENT] = ["ok", "PermissionDenied", "NotFound"];
  const shareWithGuest = (id: string, role: ResourceRole) =>
    share(setup.plane, guest.id, { type: ResourceType.ENVIRONMENT, id, role });

  test("the creator may do everything", async () => {
    expect(await rights(owner, await running())).toEqual(all(OK));
  });

  test("ENV-27 for another member it does not exist, until it is open to the organization", async () => {
    const closed = await running();
    expect(await ids(guest.client)).not.toContain(closed);
    expect(await rights(guest.client, closed)).toEqual(all(ABSENT));
    for (const admission of [AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE]) {
      const open = await running({ admission });
      expect(await ids(guest.client)).toContain(open);
      expect(await rights(guest.client, open)).toEqual({ ...all(DENIED), get: OK, enter: OK, logs: OK, use: OK });
      const foreign = await setup.plane.addUser({ organizationId: await addOrganization(setup.plane) });
      expect(await rights(foreign.client, open)).toEqual(all(ABSENT));
      expect(await ids(foreign.client)).toEqual([]);
    }
  });

  test("ENV-28 an org admin tidies up, and neither starts nor enters", async () => {
    const { client } = await setup.plane.addUser({ role: OrganizationRole.ADMIN });
    const id = await running();
    expect(await ids(client)).toContain(id);
    expect(await rights(client, id)).toEqual({ ...all(OK), enter: DENIED, logs: DENIED, use: DENIED, start: DENIED });
  });

  test("ENV-49 shares: an admin of the environment is an owner, a user enters, a viewer reads, and all of it can be taken away", async () => {
    const [administered, used, viewed] = [await running(), await running(), await running()] as const;
    await shareWithGuest(administered, ResourceRole.ENVIRONMENT_ADMIN);
    const undo = [
      await shareWithGuest(used, ResourceRole.ENVIRONMENT_USER),
      await shareWithGuest(viewed, ResourceRole.ENVIRONMENT_VIEWER),
    ];
    expect((await ids(guest.client)).filter((id) => [administered, used, viewed].includes(id))).toHaveLength(3);
    expect(await rights(guest.client, used)).toEqual({ ...all(DENIED), get: OK, enter: OK, logs: OK, use: OK });
    expect(await rights(guest.client, viewed)).toEqual({ ...all(DENIED), get: OK });
    expect(await rights(guest.client, administered)).toEqual(all(OK));
    for (const each of undo) await each();
    for (const id of [used, viewed]) expect(await rights(guest.client, id)).toEqual(all(ABSENT));
  });

  test("ORG_ENVIRONMENTS_READER reads all, and no more", async () => {
    const id = await running();
    const undo = await share(setup.plane, guest.id, {
      ...{
        type: ResourceType.ORGANIZATION,
        id: setup.plane.organizationId,
        role: ResourceRole.ORG_ENVIRONMENTS_READER,
      },
    });
    expect(await rights(guest.client, id)).toEqual({ ...all(DENIED), get: OK });
    await undo();
    expect(await rights(guest.client, id)).toEqual(all(ABSENT));
  });

  test("an environment sees itself, a runner what lies on it", async () => {
    const environment = await make(owner, setup.classId);
    const other = await connectRunner(setup.plane);
    const elsewhere = await make(owner, other.classId);
    const { token } = await setup.runner.control.createEnvironmentToken({
      ...{ environmentId: environment.id, machineSession: environment.spec?.machine?.session },
    });
    const self = setup.plane.client(token);
    expect(await ids(self)).toEqual([environment.id]);
    expect((await read(self, environment.id)).id).toBe(environment.id);
    expect(await codeOf(read(self, elsewhere.id))).toBe(ABSENT);
    expect(await ids(setup.plane.client(other.runner.token))).toEqual([elsewhere.id]);
    expect(await ids(setup.plane.client(setup.runner.token))).not.toContain(elsewhere.id);
  });

  test("names and mounts of secrets are for owners, the environment itself and its runner", async () => {
    const environment = await make(owner, setup.classId, { admission: AdmissionLevel.ORGANIZATION });
    const { id } = environment;
    const secret = create(EnvironmentSpec_SecretSchema, { id: uuidv7(), name: "API_KEY", session: "1" });
    const spec = { ...environment.spec!, secrets: [secret] };
    await setup.plane.plane.app.db
      .write`update environments set spec = ${toBinary(EnvironmentSpecSchema, spec)} where id = ${id}`;
    const { token } = await setup.runner.control.createEnvironmentToken({
      environmentId: id,
      machineSession: spec.machine?.session,
    });
    const named = async (client: BerthClient) => {
      const one = await read(client, id);
      const { environments } = await client.environments.listEnvironments({ filter: { search: id } });
      expect(environments).toEqual([one]);
      return one.spec?.secrets.map((secret) => secret.name);
    };
    for (const sees of [owner, setup.plane.client(token), setup.plane.client(setup.runner.token)]) {
      expect(await named(sees)).toEqual(["API_KEY"]);
    }
    for (const blind of [guest.client, setup.plane.admin]) expect(await named(blind)).toEqual([]);
  });
});

describe("ListEnvironments", () => {
  let setup: Setup;
  let member: BerthClient;

  beforeAll(async () => {
    setup = await setUp();
    member = setup.member.client;
  });
  afterAll(() => tearDown(setup));

  type ListRequest = Exclude<MessageInitShape<typeof ListEnvironmentsRequestSchema>, Message>;
  type Filter = Exclude<ListRequest["filter"], Message | undefined>;

  const db = () => setup.plane.plane.app.db;
  const list = async (request: ListRequest, client = member) => client.environments.listEnvironments(request);
  const refused = (request: ListRequest, client = member) => codeOf(list(request, client));

  /** Ids of all pages, each of them full but the last. */
  async function listAll(request: ListRequest, pageSize = 100): Promise<string[]> {
    const ids: string[] = [];
    const seen = new Set<string>();
    for (let token = ""; ; ) {
      const { environments, pagination } = await list({ ...request, pagination: { pageSize, token } });
      ids.push(...environments.map(({ id }) => id));
      token = pagination?.nextToken ?? "";
      if (!token) return ids;
      expect(environments).toHaveLength(pageSize);
      // Clients take a token that comes again for an endless list.
      expect(seen).not.toContain(token);
      seen.add(token);
    }
  }

  /** Environments of one session, so that a test sees its own only; oldest first. */
  async function session(count: number, more: (index: number) => [Spec, Request?] = () => [{}]) {
    const attempt = (index: number, sessionId?: string) => {
      const [spec, request] = more(index);
      return make(member, setup.classId, spec, { ...request, sessionId });
    };
    const environments = [await attempt(0)];
    for (let index = 1; index < count; index += 1) {
      environments.push(await attempt(index, environments[0]?.metadata?.sessionId));
    }
    const sessionId = environments[0]?.metadata?.sessionId ?? "";
    return { environments, ids: environments.map(({ id }) => id), filter: { sessionIds: [sessionId] } };
  }

  const newestFirst = (ids: string[]) => [...ids].sort().reverse();

  test("ENV-25 three pages of ten by URL, newest first, nothing twice", async () => {
    const { ids, filter } = await session(30);
    for (const prefix of ["", "/api"]) {
      const found: string[] = [];
      let token: string | undefined;
      for (let page = 1; token !== ""; page += 1) {
        const query = new URLSearchParams({ pageSize: "10", ...(token && { token }) });
        const response = await fetch(
          `${setup.plane.url}${prefix}/gitpod.v1.EnvironmentService/ListEnvironments?${query}`,
          {
            method: "POST",
            headers: { authorization: `Bearer ${setup.member.token}`, "content-type": "application/json" },
            // What the body says about pages counts less.
            body: JSON.stringify({ filter, pagination: { pageSize: 3, token: "" } }),
          },
        );
        expect(response.status).toBe(200);
        const answer = (await response.json()) as {
          environments: { id: string }[];
          pagination: { nextToken?: string };
        };
        expect(answer.environments).toHaveLength(10);
        found.push(...answer.environments.map(({ id }) => id));
        token = answer.pagination.nextToken ?? "";
        expect(page).toBeLessThanOrEqual(3);
      }
      expect(found).toEqual(newestFirst(ids));
    }
    const answer = await fetch(`${setup.plane.url}/gitpod.v1.EnvironmentService/ListEnvironments?pageSize=101`, {
      method: "POST",
      headers: { authorization: `Bearer ${setup.member.token}`, "content-type": "application/json" },
      body: "{}",
    });
    expect(answer.status).toBe(400);
  });

  test("ENV-25 sizes and tokens: what is wrong, and what may change between pages", async () => {
    const { filter, ids } = await session(5);
    const request = { filter, sort: { field: SortField.ID, order: SortOrder.ASC } };
    const { pagination } = await list({ ...request, pagination: { pageSize: 2 } });
    const token = pagination?.nextToken ?? "";
    expect(token).not.toBe("");
    const next = (changed: ListRequest, client = member) =>
      refused({ ...request, ...changed, pagination: { pageSize: 2, token } }, client);
    expect(await next({ filter: { ...filter, search: "x" } })).toBe("InvalidArgument");
    expect(await next({ filter: {} })).toBe("InvalidArgument");
    expect(await next({ sort: { field: SortField.ID, order: SortOrder.DESC } })).toBe("InvalidArgument");
    expect(await next({ sort: { field: SortField.ARCHIVED_AT, order: SortOrder.ASC } })).toBe("InvalidArgument");
    expect(await next({}, setup.plane.admin)).toBe("InvalidArgument");
    for (const bad of [
      "x",
      `x${token}`,
      token.slice(1),
      `.${token}`,
      `${token}.`,
      token.split(".")[0] ?? "",
      "a.b",
      "\u0000",
    ]) {
      expect(await refused({ ...request, pagination: { pageSize: 2, token: bad } }), bad).toBe("InvalidArgument");
    }
    const classes = member.environments.listEnvironmentClasses({ pagination: { token } });
    expect(await codeOf(classes)).toBe("InvalidArgument");
    for (const pageSize of [101, -1]) expect(await refused({ pagination: { pageSize } })).toBe("InvalidArgument");
    const rest = await list({ ...request, pagination: { pageSize: 100, token } });
    expect(rest.environments.map(({ id }) => id)).toEqual(ids.slice(2));
    expect(rest.pagination?.nextToken).toBe("");
  });

  test("a page holds 25 unless told otherwise, and the last one may be full", async () => {
    const { filter } = await session(26);
    const first = await list({ filter });
    expect(first.environments).toHaveLength(25);
    const last = await list({ filter, pagination: { token: first.pagination?.nextToken ?? "" } });
    expect([last.environments.length, last.pagination?.nextToken]).toEqual([1, ""]);
    const exact = await list({ filter, pagination: { pageSize: 26 } });
    expect([exact.environments.length, exact.pagination?.nextToken]).toEqual([26, ""]);
  });

  describe("filters", () => {
    let mine: Awaited<ReturnType<typeof session>>;
    let other: { runner: FakeRunner; classId: string };
    let elsewhere: Environment;

    beforeAll(async () => {
      const sources = [
        {},
        from(git("https://git.example.org/team/Rocket.git", { cloneTarget: "feature/moon" })),
        from(
          contextUrl("https://code.example.org/Team/Lander/tree/main"),
          git("https://git.example.org/team/second.git"),
        ),
        { admission: AdmissionLevel.ORGANIZATION },
      ];
      mine = await session(4, (index) => [
        sources[index] ?? {},
        { name: ["Scratch 100%_\\done", "rocket-1", "lander", "shared"][index] },
      ]);
      other = await connectRunner(setup.plane);
      elsewhere = await make(setup.plane.admin, other.classId, { admission: AdmissionLevel.ORGANIZATION });
    });

    const found = async (filter: Filter, client = member) =>
      (await list({ filter, pagination: { pageSize: 100 } }, client)).environments.map(({ id }) => id);
    /** Positions, oldest first, of those of the session that a filter lets through. */
    const which = async (filter: Filter) => {
      const ids = await found({ ...mine.filter, ...filter });
      return mine.ids.flatMap((id, index) => (ids.includes(id) ? [index] : []));
    };

    test("by session, runner, creator, project: values OR, fields AND, unknown ones match nothing", async () => {
      const { runner, member: user } = setup;
      expect(
        await found({ sessionIds: [...mine.filter.sessionIds, elsewhere.metadata?.sessionId ?? ""] }),
      ).toHaveLength(5);
      expect(await found({ runnerIds: [other.runner.id] })).toEqual([elsewhere.id]);
      expect(await which({ runnerIds: [other.runner.id] })).toEqual([]);
      expect(await which({ runnerIds: [runner.id, other.runner.id], creatorIds: [user.id, uuidv7()] })).toEqual([
        0, 1, 2, 3,
      ]);
      expect(await which({ runnerIds: [runner.id.toUpperCase()] })).toEqual([0, 1, 2, 3]);
      expect(await found({ creatorIds: [elsewhere.metadata?.creator?.id ?? ""] })).toEqual([elsewhere.id]);
      for (const filter of [
        { sessionIds: [uuidv7()] },
        { runnerIds: [uuidv7()] },
        { creatorIds: [uuidv7()] },
        { projectIds: [uuidv7()] },
      ]) {
        expect(await found(filter)).toEqual([]);
      }
      const projectId = uuidv7();
      await db().write`update environments set project_id = ${projectId} where id = ${mine.ids[1] ?? ""}`;
      expect(await found({ projectIds: [projectId, uuidv7()] })).toEqual([mine.ids[1]]);
      const many = Array.from({ length: 26 }, () => uuidv7());
      expect(await refused({ filter: { runnerIds: many } })).toBe("InvalidArgument");
      expect(await refused({ filter: { runnerIds: ["mine"] } })).toBe("InvalidArgument");
    });

    test("by kind of the runner", async () => {
      const { LOCAL, REMOTE, UNSPECIFIED } = RunnerKind;
      expect(await which({ runnerKinds: [LOCAL] })).toEqual([0, 1, 2, 3]);
      expect(await which({ runnerKinds: [REMOTE, LOCAL] })).toEqual([0, 1, 2, 3]);
      // The zero matches only what stores it.
      for (const kind of [REMOTE, UNSPECIFIED]) expect(await which({ runnerKinds: [kind] })).toEqual([]);
    });

    test("by role: environments of people and workflows unless told otherwise", async () => {
      const { DEFAULT, PREBUILD, WORKFLOW } = EnvironmentRole;
      const become = (index: number, role: EnvironmentRole) =>
        db().write`update environments set role = ${role} where id = ${mine.ids[index] ?? ""}`;
      await become(1, PREBUILD);
      await become(2, WORKFLOW);
      expect(await which({})).toEqual([0, 2, 3]);
      expect(await which({ roles: [PREBUILD] })).toEqual([1]);
      expect(await which({ roles: [DEFAULT, PREBUILD] })).toEqual([0, 1, 3]);
      expect(await which({ roles: [EnvironmentRole.UNSPECIFIED] })).toEqual([]);
      await become(1, DEFAULT);
      await become(2, DEFAULT);
    });

    test("by search: a literal part of id, name, repository or branch, whatever the case", async () => {
      const hits: [string, number[]][] = [
        [mine.ids[0]?.slice(9).toUpperCase() ?? "", [0]],
        ["ROCKET", [1]],
        ["rocket.GIT", [1]],
        ["feature/MOON", [1]],
        ["code.example.org/team/lander", [2]],
        ["second", [2]],
        ["git.example.org/team", [1, 2]],
        ["100%_\\D", [0]],
        ["%", [0]],
        ["_", [0]],
        ["\\", [0]],
        ["100%%", []],
        ["1000", []],
        ["nowhere", []],
      ];
      for (const [search, expected] of hits) expect(await which({ search }), search).toEqual(expected);
      expect(await refused({ filter: { search: "x".repeat(257) } })).toBe("InvalidArgument");
      // What the runner found out counts too.
      const [first] = mine.environments;
      const status = runningStatus(first!);
      const gitStatus = { cloneUrl: "https://mirror.example.org/Scratch.git", branch: "Topic/42" };
      await setup.runner.report(first?.id ?? "", { ...status, content: { ...status.content, git: gitStatus } });
      expect(await which({ search: "mirror.example.ORG/scratch" })).toEqual([0]);
      expect(await which({ search: "topic/42" })).toEqual([0]);
    });

    test("by time of creation and of lockdown: strictly earlier", async () => {
      const at = (index: number) => mine.environments[index]?.metadata?.createdAt;
      expect(await which({ createdBefore: at(0) })).toEqual([]);
      expect(await which({ createdBefore: at(2) })).toEqual([0, 1]);
      const moment = new Date(Date.now() + DAY_MS);
      const later = timestampFromDate(new Date(moment.getTime() + 1));
      expect(await which({ lockdownBefore: later })).toEqual([]);
      await db().write`update environments set lockdown_at = ${moment} where id = ${mine.ids[3] ?? ""}`;
      expect(await which({ lockdownBefore: timestampFromDate(moment) })).toEqual([]);
      expect(await which({ lockdownBefore: later })).toEqual([3]);
    });

    test("by phase; deleted ones only when they are asked for", async () => {
      const [first, second] = mine.environments as [Environment, Environment];
      await setup.runner.reportRunning(first);
      await member.environments.stopEnvironment({ environmentId: second.id });
      expect(await which({ statusPhases: [RUNNING] })).toEqual([0]);
      expect(await which({ statusPhases: [STOPPED, CREATING] })).toEqual([1, 2, 3]);
      expect(await which({ statusPhases: [EnvironmentPhase.UNSPECIFIED] })).toEqual([]);
      await member.environments.archiveEnvironment({ environmentId: second.id });
      for (const { id } of [first, second])
        await member.environments.deleteEnvironment({ environmentId: id, force: true });
      expect(await which({})).toEqual([2, 3]);
      expect(await which({ archivalStatus: ArchivalStatus.ALL })).toEqual([2, 3]);
      // The default does not hide the archived one among them.
      expect(await which({ statusPhases: [DELETED] })).toEqual([0, 1]);
      expect(await which({ statusPhases: [DELETED, CREATING] })).toEqual([0, 1, 2, 3]);
      expect(await which({ statusPhases: [DELETED], archivalStatus: ArchivalStatus.ARCHIVED })).toEqual([1]);
    });
  });

  /** Says when an environment was archived, in the row as in the message. */
  async function archivedAt(id: string, at: Date): Promise<void> {
    const { metadata } = await read(member, id);
    const changed = { ...metadata!, archivedAt: timestampFromDate(at) };
    await db()
      .write`update environments set archived_at = ${at}, metadata = ${toBinary(EnvironmentMetadataSchema, changed)} where id = ${id}`;
  }

  test("ENV-26 archived ones are listed when asked for, by the time of archival", async () => {
    const { ids, filter } = await session(7);
    const [a, b, c, d, e, f, g] = ids as [string, string, string, string, string, string, string];
    const times: [string, number][] = [
      [b, 3],
      [d, 1],
      [e, 3],
      [f, 2],
      [g, 3],
    ];
    for (const [id, hour] of times)
      await archivedAt(id, new Date(Date.now() - 10 * HOUR_MS + hour * HOUR_MS - (Date.now() % HOUR_MS)));
    const archived = { ...filter, archivalStatus: ArchivalStatus.ARCHIVED };
    const all = { ...filter, archivalStatus: ArchivalStatus.ALL };
    expect(await listAll({ filter })).toEqual(newestFirst([a, c]));
    expect(await listAll({ filter: { ...filter, archivalStatus: ArchivalStatus.UNSPECIFIED } })).toEqual(
      newestFirst([a, c]),
    );
    expect(await listAll({ filter: { ...filter, archivalStatus: ArchivalStatus.ACTIVE } })).toEqual(
      newestFirst([a, c]),
    );
    expect(await listAll({ filter: all })).toEqual(newestFirst(ids));
    const latestFirst = { filter: archived, sort: { field: SortField.ARCHIVED_AT, order: SortOrder.DESC } };
    expect(await listAll(latestFirst)).toEqual([g, e, b, f, d]);

    // Whatever the size of the pages, and with those never archived at the end in both directions.
    const { ASC, DESC, UNSPECIFIED } = SortOrder;
    const orders: [SortField, SortOrder, string[]][] = [
      [SortField.ARCHIVED_AT, DESC, [g, e, b, f, d, c, a]],
      [SortField.ARCHIVED_AT, UNSPECIFIED, [g, e, b, f, d, c, a]],
      [SortField.ARCHIVED_AT, ASC, [d, f, b, e, g, a, c]],
      [SortField.ID, ASC, ids],
      [SortField.ID, UNSPECIFIED, newestFirst(ids)],
      [SortField.UNSPECIFIED, ASC, ids],
    ];
    for (const [field, order, expected] of orders) {
      for (const size of [1, 2, 3, 7])
        expect(await listAll({ filter: all, sort: { field, order } }, size)).toEqual(expected);
    }
    expect(await refused({ sort: { field: 3 as SortField } })).toBe("InvalidArgument");
    expect(await refused({ filter: { archivalStatus: 4 as ArchivalStatus } })).toBe("InvalidArgument");
  });

  test("counts on the first page only, of what the filter matches, up to a thousand", async () => {
    const { ids, filter } = await session(3);
    const count = { include: true };
    const counted = async (request: ListRequest, client = member) => (await list({ ...request, count }, client)).count;
    expect((await list({ filter })).count).toBeUndefined();
    expect((await list({ filter, count: { include: false } })).count).toBeUndefined();
    const first = await list({ filter, count, pagination: { pageSize: 2 } });
    expect(first.count).toMatchObject({ value: 3, relation: CountResponseRelation.EQ });
    const second = await list({ filter, count, pagination: { pageSize: 2, token: first.pagination?.nextToken ?? "" } });
    expect(second.count).toBeUndefined();
    const stranger = await setup.plane.addUser();
    expect(await counted({ filter }, stranger.client)).toMatchObject({ value: 0, relation: CountResponseRelation.EQ });

    const clone = (copies: number) => db().write`
      insert into environments (id, organization_id, creator_id, creator_principal, runner_id, class_id, session_id, role, phase,
        desired_phase, admission, created_at, search, metadata, spec, status, facts)
      select gen_random_uuid(), organization_id, creator_id, creator_principal, runner_id, class_id, session_id, role, phase,
        desired_phase, admission, created_at, search, metadata, spec, status, facts
      from environments, generate_series(1, ${copies}) where id = ${ids[0] ?? ""}`;
    await clone(997);
    expect(await counted({ filter })).toMatchObject({ value: 1000, relation: CountResponseRelation.EQ });
    await clone(1);
    expect(await counted({ filter })).toMatchObject({ value: 1000, relation: CountResponseRelation.GTE });
    await db().write`delete from environments where session_id = ${filter.sessionIds[0] ?? ""}`;
  });

  /** Numbers from 0 to 1 that are the same for the same seed. */
  function randomFrom(seed: number): () => number {
    let state = seed;
    return () => {
      state = (state * 1_664_525 + 1_013_904_223) % 2 ** 32;
      return state / 2 ** 32;
    };
  }

  test.each([1, 2, 3, 4, 5, 6])("pages stay whole while environments come and go: seed %i", async (seed) => {
    const random = randomFrom(seed);
    const upTo = (limit: number) => Math.floor(random() * limit);
    const { ids, filter } = await session(10);
    const [sessionId = ""] = filter.sessionIds;
    const alive = new Set(ids);
    const ascending = random() < 0.5;
    const sort = { field: SortField.ID, order: ascending ? SortOrder.ASC : SortOrder.DESC };
    const change = async () => {
      if (random() < 0.5) return void (await make(member, setup.classId, {}, { sessionId }));
      const victim = [...alive][upTo(alive.size)];
      if (!victim) return;
      alive.delete(victim);
      await member.environments.deleteEnvironment({ environmentId: victim, force: true });
    };
    const found: string[] = [];
    for (let token: string | undefined; token !== ""; ) {
      const pagination = { pageSize: 1 + upTo(3), token: token ?? "" };
      const [page] = await Promise.all([
        list({ filter, sort, pagination }),
        ...Array.from({ length: upTo(3) }, change),
      ]);
      found.push(...page.environments.map(({ id }) => id));
      token = page.pagination?.nextToken ?? "";
      expect(found.length).toBeLessThan(100);
    }
    const sorted = [...new Set(found)].sort();
    expect(found).toEqual(ascending ? sorted : sorted.reverse());
    // Whatever was there from the first page to the last has been seen.
    expect([...alive].filter((id) => !found.includes(id))).toEqual([]);
  });
});

describe("what time does", () => {
  let setup: Setup;
  let member: BerthClient;
  let replica: ControlPlane;

  beforeAll(async () => {
    setup = await setUp();
    member = setup.member.client;
    replica = await setup.plane.replica();
  });
  afterAll(() => tearDown(setup));

  const get = (id: string) => read(member, id);

  async function running(spec: Spec = {}): Promise<Environment> {
    const created = await make(member, setup.classId, spec);
    await setup.runner.reportRunning(created);
    return get(created.id);
  }

  /** Moves the clock, then looks on both replicas at once for what is due. */
  async function pass(ms: number): Promise<void> {
    setup.plane.advance(ms);
    await Promise.all([sweep(setup.plane.plane), sweep(replica), sweep(setup.plane.plane), sweep(replica)]);
  }

  test("ENV-15 ENV-16 an idle environment is stopped once, with the reason; activity puts it off", async () => {
    const [idle, busy, endless] = [
      await running(),
      await running(),
      await running({ timeout: { disconnected: durationFromMs(0) } }),
    ];
    await pass(29 * MINUTE_MS);
    expect((await get(idle.id)).status?.phase).toBe(RUNNING);
    await member.environments.markEnvironmentActive({ environmentId: busy.id, activitySignal: { source: "SSH" } });
    await pass(90_000);
    const stopping = await get(idle.id);
    expect(stopping).toMatchObject({
      spec: { desiredPhase: STOPPED, specVersion: (idle.spec?.specVersion ?? 0n) + 1n },
      status: { phase: STOPPING, machine: { timeout: expect.stringContaining("30 minutes") }, failureMessage: [] },
    });
    for (const { id } of [busy, endless]) expect((await get(id)).status?.phase).toBe(RUNNING);
    const { actions, audit, events } = await traces(setup, idle.id);
    expect(actions).toEqual(["Environment created", "Environment is running", "Environment is stopping"]);
    expect(audit[2]).toMatchObject({ actor_id: null, actor_principal: Principal.UNSPECIFIED });
    expect(events).toEqual(["CREATE", "UPDATE_STATUS", "UPDATE"]);
    await pass(29 * MINUTE_MS);
    expect((await get(busy.id)).status?.phase).toBe(STOPPING);

    // The reason stays until the next start.
    await setup.runner.reportMachine(stopping, MachinePhase.STOPPED);
    expect((await get(idle.id)).status?.machine?.timeout).toContain("30 minutes");
    await member.environments.startEnvironment({ environmentId: idle.id });
    expect((await get(idle.id)).status?.machine?.timeout).toBe("");
  });

  test("a start that takes longer than an hour has failed, unless the runner was away", async () => {
    const created = await make(member, setup.classId);
    const { runnerAck, machine } = runningStatus(created);
    await setup.runner.report(created.id, { runnerAck, machine: { ...machine, phase: MachinePhase.STARTING } });
    await pass(59 * MINUTE_MS);
    expect((await get(created.id)).status?.phase).toBe(STARTING);
    await pass(2 * MINUTE_MS);
    expect(await get(created.id)).toMatchObject({
      spec: { desiredPhase: STOPPED },
      status: { phase: STOPPING, failureMessage: [expect.stringContaining("60 minutes")] },
    });
    // One that the runner never took up has nothing to stop.
    const untouched = await make(member, setup.classId);
    await pass(61 * MINUTE_MS);
    expect((await get(untouched.id)).status).toMatchObject({
      phase: STOPPED,
      failureMessage: [expect.stringContaining("60 minutes")],
    });
  });

  test("a tombstone is read for seven days, then the environment is unknown", async () => {
    const { id } = await running();
    await member.environments.deleteEnvironment({ environmentId: id, force: true });
    await pass(7 * DAY_MS - HOUR_MS);
    expect((await get(id)).status?.phase).toBe(DELETED);
    const { environments } = await member.environments.listEnvironments({
      filter: { search: id, statusPhases: [DELETED] },
    });
    expect(environments.map((each) => each.id)).toEqual([id]);
    await pass(2 * HOUR_MS);
    expect(await codeOf(get(id))).toBe("NotFound");
    for (const call of [member.environments.stopEnvironment, member.environments.deleteEnvironment]) {
      expect(await codeOf(call({ environmentId: id }))).toBe("NotFound");
    }
    expect((await traces(setup, id)).actions).toContain("Environment created");
  });

  test("ENV-20 past its lifetime an environment goes on with a warning; strict, it does not start again", async () => {
    await changePolicies(setup.plane, { maximumEnvironmentLifetime: durationFromMs(DAY_MS) });
    const environment = await running({ timeout: { disconnected: durationFromMs(0) } });
    const environmentId = environment.id;
    const { lockdownAt, createdAt } = environment.metadata!;
    expect((lockdownAt?.seconds ?? 0n) - (createdAt?.seconds ?? 0n)).toBe(86_400n);
    // Fixed at its creation.
    await changePolicies(setup.plane, {
      maximumEnvironmentLifetime: durationFromMs(30 * DAY_MS),
      maximumEnvironmentLifetimeStrict: true,
    });
    await pass(DAY_MS + MINUTE_MS);
    expect((await get(environmentId)).status).toMatchObject({
      phase: RUNNING,
      warningMessage: [expect.stringContaining("lifetime")],
    });
    await member.environments.stopEnvironment({ environmentId });
    await setup.runner.reportMachine(environment, MachinePhase.STOPPED);
    const refused = await refusal(member.environments.startEnvironment({ environmentId }));
    expect(policyOf(refused)).toBe("FailedPrecondition maximum_environment_lifetime_strict");
    const [detail] = refused.findDetails(PolicyEnforcedFailedPreconditionDetailsSchema);
    expect(detail?.details).toMatchObject({
      case: "maxLifetimeExceeded",
      value: { expiredAt: lockdownAt, policyValue: { seconds: 30n * 86_400n } },
    });
    await changePolicies(setup.plane, { maximumEnvironmentLifetimeStrict: false });
    await member.environments.startEnvironment({ environmentId });
    expect((await get(environmentId)).status?.warningMessage).toEqual([expect.stringContaining("lifetime")]);
  });

  test("an access token ends after an hour", async () => {
    const { id } = await running({ timeout: { disconnected: durationFromMs(0) } });
    const { accessToken } = await member.environments.createEnvironmentAccessToken({ environmentId: id });
    const isActive = async () => (await setup.runner.control.introspectToken({ token: accessToken })).active;
    setup.plane.advance(59 * MINUTE_MS);
    expect(await isActive()).toBe(true);
    setup.plane.advance(2 * MINUTE_MS);
    expect(await isActive()).toBe(false);
  });
});
