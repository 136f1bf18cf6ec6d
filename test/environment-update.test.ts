import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import {
  AdmissionLevel,
  type Environment,
  EnvironmentPhase,
  KernelControlsAction,
  EnvironmentStatus_Machine_Phase as MachinePhase,
  type UpdateEnvironmentRequest_SpecSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { OrganizationRole, VetoExecPolicySchema } from "../gen/gitpod/v1/organization_pb.js";
import type { BerthClient } from "../src/client.ts";
import { getEnvironment } from "./harness/environments.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, changePolicies, connectRunner, share } from "./harness/tenants.ts";

const { EVERYONE, ORGANIZATION, CREATOR_ONLY, UNSPECIFIED } = AdmissionLevel;
const DAY_MS = 24 * 60 * 60_000;
const KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGk0AaxoFzKtu7dxuTHtJiBSMNFGnVbMJyOYLpFWBp2G";
const CLOSED = { portSharingDisabled: true };
const CAPPED = { maxPortAdmissionLevel: ORGANIZATION };

type SpecChange = MessageInitShape<typeof UpdateEnvironmentRequest_SpecSchema>;

let plane: TestPlane;
let creator: TestUser;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  creator = await plane.addUser();
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 1000 }));
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await plane[Symbol.asyncDispose]();
});

const read = (id: string) => getEnvironment(creator.client, id);
const port = (number: number, admission: AdmissionLevel) => ({ port: number, name: "web", admission });

async function running(): Promise<string> {
  const { environment } = await creator.client.environments.createEnvironment({
    spec: { machine: { class: classId } },
  });
  await runner.reportRunning(environment!);
  return environment!.id;
}

const change = (environmentId: string, spec: SpecChange, client: BerthClient = creator.client) =>
  client.environments.updateEnvironment({ environmentId, spec });
const rename = (environmentId: string, name: string, client: BerthClient) =>
  client.environments.updateEnvironment({ environmentId, metadata: { name } });
const lockDown = (environmentId: string, at: Date, client: BerthClient) =>
  client.environments.updateEnvironment({ environmentId, metadata: { lockdownAt: timestampFromDate(at) } });

const policyOf = async (refused: Promise<unknown>) => {
  const error = await refusal(refused);
  return error.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode;
};

/** Events and audit texts about an environment so far. */
async function traces(id: string): Promise<{ events: number; actions: string[] }> {
  const { point } = plane.plane.app.db;
  const events = await point`select from events where resource_id = ${id}`;
  const audit = await point<{ action: string }[]>`select action from audit_log where subject_id = ${id} order by id`;
  return { events: events.length, actions: audit.map((row) => row.action) };
}

/** What a test's policies are, for as long as it runs. */
async function under(changes: Parameters<typeof changePolicies>[1], run: () => Promise<void>): Promise<void> {
  await changePolicies(plane, changes);
  try {
    await run();
  } finally {
    await changePolicies(plane, { portSharingDisabled: false, maxPortAdmissionLevel: UNSPECIFIED });
    await changePolicies(plane, { maximumEnvironmentTimeout: durationFromMs(0), vetoExecPolicy: undefined });
  }
}

/** What runners have been told: the token that somebody presented is checked like this. */
const introspect = (token: string) => runner.control.introspectToken({ token });

describe("who may change what", () => {
  test("owners change the spec, admins rename and set the lifetime, others neither", async () => {
    const id = await running();
    await change(id, { timeout: { disconnected: durationFromMs(3_600_000) } });
    expect((await read(id)).spec?.timeout?.disconnected?.seconds).toBe(3600n);
    await rename(id, "  mine ", creator.client);
    await rename(id, "tidied up", plane.admin);
    expect((await read(id)).metadata?.name).toBe("tidied up");
    expect(await codeOf(change(id, { timeout: { disconnected: durationFromMs(0) } }, plane.admin))).toBe(
      "PermissionDenied",
    );
    expect(await codeOf(rename(id, "x", member.client))).toBe("NotFound");
  });

  test("a part that is refused refuses all of it", async () => {
    const id = await running();
    const both = { metadata: { name: "new" }, spec: { timeout: { disconnected: durationFromMs(0) } } };
    expect(await codeOf(plane.admin.environments.updateEnvironment({ environmentId: id, ...both }))).toBe(
      "PermissionDenied",
    );
    expect((await read(id)).metadata?.name).not.toBe("new");
  });

  test("ENV-49 another ENVIRONMENT_ADMIN starts, changes and deletes it, but is no creator to its ports", async () => {
    const id = await running();
    const second = await plane.addUser();
    const role = ResourceRole.ENVIRONMENT_ADMIN;
    await share(plane, second.id, { type: ResourceType.ENVIRONMENT, id, role });
    await change(id, { ports: [port(3000, CREATOR_ONLY)] }, second.client);
    const { environments } = second.client;
    expect(await codeOf(environments.createPortAccessToken({ environmentId: id, port: 3000 }))).toBe(
      "PermissionDenied",
    );
    expect((await environments.allowPortAccess({ environmentId: id, port: 3000 })).allowed).toBe(false);
    await environments.stopEnvironment({ environmentId: id });
    await runner.report(id, { ...runningStatus(await read(id)), machine: { phase: MachinePhase.STOPPED } });
    await plane.addUser();
    await environments.startEnvironment({ environmentId: id });
    await environments.deleteEnvironment({ environmentId: id });
    expect((await read(id)).spec?.desiredPhase).toBe(EnvironmentPhase.DELETED);
  });

  test("the environment itself opens ports and applies files again, but keeps its hands off keys and name", async () => {
    const id = await running();
    const session = (await read(id)).spec?.machine?.session ?? "";
    const { token } = await runner.control.createEnvironmentToken({ environmentId: id, machineSession: session });
    const self = plane.client(token);
    await change(id, { ports: [port(3000, ORGANIZATION)], automationsFile: { session: "again" } }, self);
    const { spec } = await read(id);
    expect([spec?.ports.length, spec?.automationsFile?.session]).toEqual([1, "again"]);
    expect(await codeOf(change(id, { sshPublicKeys: [{ id: "k", value: KEY }] }, self))).toBe("PermissionDenied");
    expect(await codeOf(change(id, { kernelControlsConfig: {} }, self))).toBe("PermissionDenied");
    expect(await codeOf(rename(id, "x", self))).toBe("PermissionDenied");
  });
});

describe("what changes", () => {
  test("nothing given is INVALID_ARGUMENT; nothing new is no change", async () => {
    const id = await running();
    const { environments } = creator.client;
    const error = await refusal(environments.updateEnvironment({ environmentId: id }));
    expect(violatedFields(error)).toEqual(["spec"]);
    const before = { traces: await traces(id), environment: await read(id) };
    await change(id, {});
    await rename(id, before.environment.metadata?.name ?? "", creator.client);
    expect({ traces: await traces(id), environment: await read(id) }).toEqual(before);
  });

  test("a change bumps the spec once, and the audit log says of what", async () => {
    const id = await running();
    const before = await read(id);
    await change(id, { content: { gitUsername: "Ada" }, ports: [port(3000, EVERYONE)] });
    const after = await read(id);
    expect(after.spec?.specVersion).toBe((before.spec?.specVersion ?? 0n) + 1n);
    expect(after.spec?.content?.gitUsername).toBe("Ada");
    expect(after.spec?.content?.session).toBe(before.spec?.content?.session);
    expect((await traces(id)).actions.at(-1)).toBe("Environment changed: content, ports");
  });

  test("ENV-30 SSH keys are added and removed by id; an empty list leaves them", async () => {
    const id = await running();
    const keys = async () => (await read(id)).spec?.sshPublicKeys.map((key) => key.id);
    await change(id, {
      sshPublicKeys: [
        { id: "k1", value: KEY },
        { id: "k2", value: KEY },
      ],
    });
    expect((await read(id)).status?.phase).toBe(EnvironmentPhase.UPDATING);
    await change(id, { sshPublicKeys: [] });
    expect(await keys()).toEqual(["k1", "k2"]);
    await change(id, { sshPublicKeys: [{ id: "k1" }, { id: "never there" }] });
    expect(await keys()).toEqual(["k2"]);
    const options = `command="sh" ${KEY}`;
    const error = await refusal(change(id, { sshPublicKeys: [{ id: "k3", value: options }] }));
    expect(violatedFields(error)).toEqual(["spec.ssh_public_keys[0].value"]);
  });

  test("a bad initializer is refused and named, and the old one stays", async () => {
    const id = await running();
    const specs = [{ spec: { case: "git" as const, value: { remoteUri: "ext::sh -c id" } } }];
    const error = await refusal(change(id, { content: { initializer: { specs } } }));
    expect(violatedFields(error)).toEqual(["spec.content.initializer.specs[0].git.remote_uri"]);
    expect((await read(id)).spec?.content?.initializer?.specs ?? []).toEqual([]);
  });

  test("an archived one keeps its spec, but can be renamed", async () => {
    const id = await running();
    await creator.client.environments.archiveEnvironment({ environmentId: id });
    await runner.report(id, { ...runningStatus(await read(id)), machine: { phase: MachinePhase.STOPPED } });
    expect(await codeOf(change(id, { timeout: { disconnected: durationFromMs(0) } }))).toBe("FailedPrecondition");
    await rename(id, "old", creator.client);
    expect((await read(id)).metadata?.name).toBe("old");
    await creator.client.environments.deleteEnvironment({ environmentId: id });
    expect(await codeOf(rename(id, "gone", creator.client))).toBe("FailedPrecondition");
  });

  test("of concurrent changes of different parts none is lost", async () => {
    const id = await running();
    const before = (await read(id)).spec?.specVersion ?? 0n;
    const ports = Array.from({ length: 8 }, (_, index) => 4000 + index);
    await Promise.all(ports.map((number) => change(id, { ports: [port(number, ORGANIZATION)] })));
    const { spec } = await read(id);
    expect(spec?.ports.map((each) => each.port).sort()).toEqual(ports);
    expect(spec?.specVersion).toBe(before + 8n);
  });
});

describe("ENV-21 the end of the lifetime", () => {
  test("is for admins, not in the past, and cleared by the epoch", async () => {
    const id = await running();
    const now = plane.plane.app.now();
    const later = new Date(now.getTime() + DAY_MS);
    const shared = await plane.addUser();
    await share(plane, shared.id, { type: ResourceType.ENVIRONMENT, id, role: ResourceRole.ENVIRONMENT_VIEWER });
    for (const client of [creator.client, shared.client]) {
      expect(await codeOf(lockDown(id, later, client))).toBe("PermissionDenied");
    }
    const past = await refusal(lockDown(id, new Date(now.getTime() - DAY_MS), plane.admin));
    expect(violatedFields(past)).toEqual(["metadata.lockdown_at"]);
    await lockDown(id, later, plane.admin);
    expect((await read(id)).metadata?.lockdownAt).toEqual(timestampFromDate(later));
    await lockDown(id, new Date(0), plane.admin);
    expect((await read(id)).metadata?.lockdownAt).toBeUndefined();
  });
});

describe("policies", () => {
  test("ENV-33 nothing opens while sharing is off, or wider than the cap; closing always works", async () => {
    const id = await running();
    await change(id, { ports: [port(3000, EVERYONE)] });
    await under(CLOSED, async () => {
      expect(await policyOf(change(id, { ports: [port(3001, CREATOR_ONLY)] }))).toBe("port_sharing_disabled");
      const token = creator.client.environments.createPortAccessToken({ environmentId: id, port: 3000 });
      expect(await policyOf(token)).toBe("port_sharing_disabled");
      const { allowed } = await creator.client.environments.allowPortAccess({ environmentId: id, port: 3000 });
      expect(allowed).toBe(false);
      await change(id, { ports: [port(3000, UNSPECIFIED)] });
      expect((await read(id)).spec?.ports).toEqual([]);
    });
    await under(CAPPED, async () => {
      expect(await policyOf(change(id, { ports: [port(3000, EVERYONE)] }))).toBe("max_port_admission_level");
      await change(id, { ports: [port(3000, ORGANIZATION)] });
    });
  });

  test("ENV-9 a longer timeout than allowed, or none, is refused", async () => {
    const id = await running();
    await under({ maximumEnvironmentTimeout: durationFromMs(3_600_000) }, async () => {
      for (const ms of [7_200_000, 0]) {
        const refused = change(id, { timeout: { disconnected: durationFromMs(ms) } });
        expect(await policyOf(refused)).toBe("maximum_environment_timeout");
      }
      await change(id, { timeout: { disconnected: durationFromMs(3_600_000) } });
    });
  });

  test("ENV-43 kernel controls weaker than the organization's are refused", async () => {
    const id = await running();
    const vetoExecPolicy = create(VetoExecPolicySchema, {
      enabled: true,
      executables: ["nc"],
      action: KernelControlsAction.BLOCK,
    });
    await under({ vetoExecPolicy }, async () => {
      expect(await policyOf(change(id, { kernelControlsConfig: {} }))).toBe("veto_exec_policy");
    });
  });
});

describe("ENV-31 ports", () => {
  const token = async (client: BerthClient, environmentId: string, number = 3000) =>
    (await client.environments.createPortAccessToken({ environmentId, port: number })).accessToken;
  const nonceOf = ({ spec }: Environment) => spec?.ports[0]?.authNonce ?? 0n;

  test("a port admits whom it says, also people who cannot read the environment", async () => {
    const id = await running();
    await change(id, { ports: [port(3000, ORGANIZATION)] });
    expect((await introspect(await token(member.client, id))).active).toBe(true);
    const foreign = await plane.addUser({ organizationId: await addOrganization(plane) });
    expect(await codeOf(token(foreign.client, id))).toBe("NotFound");
    await change(id, { ports: [port(3000, CREATOR_ONLY)] });
    expect(await codeOf(token(member.client, id))).toBe("NotFound");
    expect(await codeOf(member.client.environments.allowPortAccess({ environmentId: id, port: 3000 }))).toBe(
      "NotFound",
    );
    const admin = await plane.addUser({ role: OrganizationRole.ADMIN });
    expect(await codeOf(token(admin.client, id))).toBe("PermissionDenied");
    expect(await codeOf(token(creator.client, id, 3001))).toBe("FailedPrecondition");
    expect((await creator.client.environments.allowPortAccess({ environmentId: id, port: 3000 })).allowed).toBe(true);
    expect((await creator.client.environments.allowPortAccess({ environmentId: id, port: 3001 })).allowed).toBe(false);
  });

  test("a token dies with a new admission, with the port, and with its issuer's access", async () => {
    const id = await running();
    await change(id, { ports: [port(3000, ORGANIZATION)] });
    const first = await token(member.client, id);
    const own = await token(creator.client, id);
    const found = await introspect(first);
    expect([found.active, found.environmentId, found.port, found.subject?.id]).toEqual([true, id, 3000, member.id]);
    const before = nonceOf(await read(id));
    await change(id, { ports: [{ ...port(3000, ORGANIZATION), name: "other" }] });
    expect((await introspect(first)).active).toBe(true);
    await change(id, { ports: [port(3000, CREATOR_ONLY)] });
    expect(nonceOf(await read(id))).toBe(before + 1n);
    for (const old of [first, own]) expect((await introspect(old)).active).toBe(false);
    const fresh = await token(creator.client, id);
    expect((await introspect(fresh)).active).toBe(true);
    await change(id, { ports: [port(3000, UNSPECIFIED)] });
    await change(id, { ports: [port(3000, CREATOR_ONLY)] });
    expect((await introspect(fresh)).active).toBe(false);
  });

  test("minting one is access to a credential", async () => {
    const id = await running();
    await change(id, { ports: [port(3000, EVERYONE)] });
    await token(creator.client, id);
    expect((await traces(id)).actions.at(-1)).toBe("Access token for port 3000 issued");
  });
});
