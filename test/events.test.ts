import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { transact } from "../src/app.ts";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { type Change, record } from "../src/store/record.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";
import { eventually } from "./harness/wait.ts";

const { CREATE, UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;
const { ENVIRONMENT, RUNNER, ENVIRONMENT_CLASS, ORGANIZATION, TASK, SERVICE } = ResourceType;

let plane: TestPlane;
let admin: BerthClient;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

async function newRunner(on: TestPlane = plane): Promise<{ runner: FakeRunner; classId: string }> {
  const provider = RunnerProvider.LINUX_HOST;
  const { exchangeToken } = await on.admin.runners.createRunner({ name: "test runner", provider });
  const { accessToken } = await on.admin.identity.exchangeToken({ exchangeToken });
  const process = new FakeRunner(on.url, accessToken);
  await process.register();
  const { id } = await on.admin.runnerConfiguration.createEnvironmentClass({
    runnerId: process.id,
    displayName: "Standard",
    description: "For tests",
    configuration: [
      { key: "cpu", value: "2" },
      { key: "memory", value: "4096" },
    ],
  });
  return { runner: process, classId: id };
}

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  admin = plane.admin;
  member = await plane.addUser();
  ({ runner, classId } = await newRunner());
  await shareRunner(plane, runner.id);
});

// Its lease is shorter than this file may take on a busy machine.
beforeEach(() => runner.heartbeat());

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

async function newEnvironment(client = admin): Promise<Environment> {
  const spec = { machine: { class: classId } };
  return (await client.environments.createEnvironment({ spec })).environment!;
}

const change = (resourceType: ResourceType, resourceId: string, more: Partial<Change> = {}): Change => ({
  ...{ organizationId: plane.organizationId, resourceType, resourceId, operation: UPDATE, at: new Date() },
  ...more,
});

/** Writes events as a mutation would, in one transaction. */
const tell = (changes: Change[], on: TestPlane = plane) =>
  transact(on.plane.app, async (tx) => {
    for (const each of changes) await record(tx, each);
  });

/** An event that every member sees: once it has arrived, so would have whatever was told before. */
async function sentinel(on: TestPlane = plane): Promise<string> {
  await tell([change(ORGANIZATION, on.organizationId, { organizationId: on.organizationId })], on);
  return eventText(ORGANIZATION, UPDATE, on.organizationId);
}

async function auditCount(subjectId: string): Promise<number> {
  const [row] = await plane.plane.app.db.point<{ count: number }[]>`
    select count(*)::int from audit_log where subject_id = ${subjectId}`;
  return row!.count;
}

const environmentScope = (id: string) => ({ scope: { case: "environmentId" as const, value: id } });
const named = (resourceType: ResourceType, ...resourceIds: string[]) => ({
  resourceTypeFilters: [{ resourceType, resourceIds }],
});

describe("opening a stream", () => {
  test("PLT-40, ENV-40: a change between the read and the stream opens it, for a named id and for the scope of an environment", async () => {
    const environment = await newEnvironment();
    expect(environment.status?.phase).toBe(EnvironmentPhase.CREATING);
    await runner.reportRunning(environment);
    const first = eventText(ENVIRONMENT, UPDATE_STATUS, environment.id);
    for (const request of [
      named(ENVIRONMENT, environment.id.toUpperCase(), environment.id),
      environmentScope(environment.id),
    ]) {
      const stream = await watchEvents(admin, request);
      await stream.next(first);
      expect(stream.events).toEqual([first]);
      stream.stop();
    }
  });

  test("what is gone opens a stream as deleted for those who could see it; what was never visible does not open it", async () => {
    const gone = await newRunner();
    await shareRunner(plane, gone.runner.id);
    const stranger = await plane.addUser();
    await plane.plane.app.db.write`delete from group_members where member_id = ${stranger.id}`;
    await admin.runners.deleteRunner({ runnerId: gone.runner.id, force: true });
    const request = {
      resourceTypeFilters: [
        { resourceType: RUNNER, resourceIds: [gone.runner.id, uuidv7()] },
        { resourceType: ENVIRONMENT_CLASS, resourceIds: [gone.classId] },
        { resourceType: ORGANIZATION, resourceIds: [plane.organizationId] },
      ],
    };
    const present = eventText(ORGANIZATION, UPDATE_STATUS, plane.organizationId);
    const expected = [eventText(RUNNER, DELETE, gone.runner.id), eventText(ENVIRONMENT_CLASS, DELETE, gone.classId)];
    for (const [client, opening] of [
      [member.client, expected],
      [admin, expected],
      [stranger.client, []],
    ] as const) {
      const stream = await watchEvents(client, request);
      const last = await sentinel();
      await stream.next(last);
      expect(stream.events).toEqual([...opening, present, last]);
      stream.stop();
    }
  });

  test("a stream without names starts silent, and is open before anything happens", async () => {
    const stream = await watchEvents(member.client);
    expect(stream.events).toEqual([]);
    const last = await sentinel();
    await stream.next(last);
    expect(stream.events).toEqual([last]);
    stream.stop();
  });

  test("who may open which stream", async () => {
    const environment = await newEnvironment();
    const { token } = await runner.control.createEnvironmentToken({
      environmentId: environment.id,
      machineSession: environment.spec!.machine!.session,
    });
    const inside = plane.client(token);
    const codeOfStream = async (client: BerthClient, request = {}) => {
      const stream = await watchEvents(client, request);
      const error = await stream.ended;
      return error && Code[error.code];
    };
    const both = { ...environmentScope(environment.id), ...named(ENVIRONMENT) };
    expect(await codeOfStream(admin, both)).toBe("InvalidArgument");
    for (const id of [uuidv7(), "nonsense", "-".repeat(36), ""])
      expect(await codeOfStream(admin, environmentScope(id)), id).toBe("NotFound");
    expect(await codeOfStream(member.client, environmentScope(environment.id))).toBe("NotFound");
    expect(await codeOfStream(inside)).toBe("PermissionDenied");
    expect(await codeOfStream(inside, environmentScope((await newEnvironment()).id))).toBe("NotFound");
    expect(await codeOfStream(plane.client(runner.token))).toBe("PermissionDenied");
    expect(await codeOfStream(admin, named(ResourceType.UNSPECIFIED))).toBe("InvalidArgument");
    const own = await watchEvents(inside, environmentScope(environment.id));
    await own.next(eventText(ENVIRONMENT, UPDATE_STATUS, environment.id));
    own.stop();
    const reader = await plane.addUser({ readOnlyToken: true });
    const reading = await watchEvents(reader.client);
    await reading.next(await sentinel());
    reading.stop();
  });
});

describe("what arrives", () => {
  test("PLT-42: the scope of an environment shows it and its parts, to everybody who may read it, and nothing else", async () => {
    const [environment, other] = [await newEnvironment(member.client), await newEnvironment(member.client)];
    const streams = await Promise.all(
      [member.client, admin].map((each) => watchEvents(each, environmentScope(environment.id))),
    );
    const organization = await watchEvents(member.client);
    const [task, service, foreignTask] = [uuidv7(), uuidv7(), uuidv7()];
    await tell([change(TASK, foreignTask, { environmentId: other.id })]);
    await member.client.environments.stopEnvironment({ environmentId: other.id });
    await tell([
      change(TASK, task, { environmentId: environment.id }),
      change(SERVICE, service, { environmentId: environment.id }),
    ]);
    await member.client.environments.stopEnvironment({ environmentId: environment.id });
    for (const stream of streams) {
      await stream.next(eventText(ENVIRONMENT, UPDATE, environment.id));
      expect(stream.events).toEqual([
        eventText(ENVIRONMENT, UPDATE_STATUS, environment.id),
        eventText(TASK, UPDATE, task),
        eventText(SERVICE, UPDATE, service),
        eventText(ENVIRONMENT, UPDATE, environment.id),
      ]);
      stream.stop();
    }
    await organization.next(eventText(ENVIRONMENT, UPDATE, environment.id));
    expect(organization.events).toEqual([
      eventText(ENVIRONMENT, UPDATE, other.id),
      eventText(ENVIRONMENT, UPDATE, environment.id),
    ]);
    organization.stop();
  });

  test("PLT-43: changes and the end of a runner are told to those who may see it, and to nobody else", async () => {
    const [shared, hidden] = [await newRunner(), await newRunner()];
    await shareRunner(plane, shared.runner.id);
    const stream = await watchEvents(member.client);
    const all = await watchEvents(admin);
    for (const each of [hidden, shared]) {
      await each.runner.heartbeat({ message: "busy" });
      await admin.runners.deleteRunner({ runnerId: each.runner.id, force: true });
    }
    const last = await sentinel();
    await stream.next(last);
    await all.next(last);
    const about = (each: typeof shared) => [
      eventText(RUNNER, UPDATE_STATUS, each.runner.id),
      eventText(RUNNER, DELETE, each.runner.id),
      eventText(ENVIRONMENT_CLASS, DELETE, each.classId),
    ];
    // A deletion absorbs changes that wait with it.
    const without = (events: readonly string[]) => events.filter((text) => !/UPDATE_STATUS|ROLE_ASSIGNMENT/.test(text));
    expect(without(stream.events)).toEqual([...without(about(shared)), last]);
    expect(stream.events.filter((text) => text.includes(hidden.runner.id))).toEqual([]);
    expect(without(all.events)).toEqual([...without(about(hidden)), ...without(about(shared)), last]);
    stream.stop();
    all.stop();
  });

  test("events of personal things go to their owner, not to admins", async () => {
    const [mine, adminStream] = [await watchEvents(member.client), await watchEvents(admin)];
    const [token, project] = [uuidv7(), uuidv7()];
    await tell([
      change(ResourceType.PERSONAL_ACCESS_TOKEN, token, { creatorId: member.id, operation: CREATE }),
      change(ResourceType.SSO_CONFIG, project),
    ]);
    const last = await sentinel();
    await mine.next(last);
    await adminStream.next(last);
    expect(mine.events).toEqual([eventText(ResourceType.PERSONAL_ACCESS_TOKEN, CREATE, token), last]);
    expect(adminStream.events).toEqual([eventText(ResourceType.SSO_CONFIG, UPDATE, project), last]);
    mine.stop();
    adminStream.stop();
  });

  test("filters: by type, id and creator, of which any one suffices; a deletion passes without its creator", async () => {
    const [own, other] = [await newEnvironment(member.client), await newEnvironment()];
    const stream = await watchEvents(admin, {
      resourceTypeFilters: [
        { resourceType: ENVIRONMENT, creatorIds: [member.id.toUpperCase()] },
        { resourceType: RUNNER, resourceIds: [runner.id] },
      ],
    });
    await runner.reportRunning(other);
    await runner.reportRunning(own);
    await runner.heartbeat({ message: uuidv7() });
    await admin.environments.deleteEnvironment({ environmentId: other.id, force: true });
    await stream.next(eventText(ENVIRONMENT, DELETE, other.id));
    expect(stream.events).toEqual([
      eventText(RUNNER, UPDATE_STATUS, runner.id),
      eventText(ENVIRONMENT, UPDATE_STATUS, own.id),
      eventText(RUNNER, UPDATE_STATUS, runner.id),
      eventText(ENVIRONMENT, DELETE, other.id),
    ]);
    stream.stop();
  });

  test("changes of one resource that wait together arrive as the weightiest of them", async () => {
    const [first, second] = [await newEnvironment(), await newEnvironment()];
    const stream = await watchEvents(admin);
    await tell([
      change(ENVIRONMENT, first.id, { operation: UPDATE }),
      change(ENVIRONMENT, second.id, { operation: UPDATE_STATUS }),
      change(ENVIRONMENT, first.id, { operation: UPDATE_STATUS }),
      change(ENVIRONMENT, second.id, { operation: DELETE }),
      change(ENVIRONMENT, second.id, { operation: UPDATE }),
    ]);
    const last = await sentinel();
    await stream.next(last);
    expect(stream.events).toEqual([
      eventText(ENVIRONMENT, UPDATE, first.id),
      eventText(ENVIRONMENT, DELETE, second.id),
      last,
    ]);
    stream.stop();
  });

  test("ENV-45, PLT-49: reports write events, and audit entries only when a phase changes; signals of activity write none", async () => {
    const environment = await newEnvironment();
    const stream = await watchEvents(admin, named(ENVIRONMENT, environment.id));
    const count = () => stream.events.length;
    const created = await auditCount(environment.id);
    await runner.reportMachine(environment, MachinePhase.CREATING);
    await eventually(() => count() === 2, "the event of a report");
    expect(await auditCount(environment.id)).toBe(created);
    await runner.reportRunning(environment);
    await eventually(() => count() === 3, "the event of a new phase");
    expect(await auditCount(environment.id)).toBe(created + 1);
    // Less than an hour in all, or the start deadlines of other environments would come into play.
    for (let index = 0; index < 10; index++) {
      plane.advance(5.1 * 60_000);
      await admin.environments.markEnvironmentActive({ environmentId: environment.id });
    }
    await eventually(() => count() > 3, "the event of a signal");
    expect(new Set(stream.events)).toEqual(new Set([eventText(ENVIRONMENT, UPDATE_STATUS, environment.id)]));
    expect(await auditCount(environment.id)).toBe(created + 1);
    stream.stop();

    const runners = await watchEvents(admin, named(RUNNER, runner.id));
    const before = await auditCount(runner.id);
    await runner.heartbeat({ message: uuidv7() });
    await eventually(() => runners.events.length === 2, "the event of a heartbeat");
    expect(await auditCount(runner.id)).toBe(before);
    await runner.heartbeat({ phase: RunnerPhase.DEGRADED });
    await eventually(() => runners.events.length === 3, "the event of a new phase");
    expect(await auditCount(runner.id)).toBe(before + 1);
    await runner.heartbeat();
    runners.stop();
  });

  test("PLT-44: what is rolled back was never told; a change that changes nothing is not told", async () => {
    const stream = await watchEvents(admin);
    const id = uuidv7();
    const attempt = transact(plane.plane.app, async (tx) => {
      const audit = { id: uuidv7(), actor: { id: null, principal: 0, tokenId: null }, action: "never" };
      await record(tx, change(RUNNER, id, { audit }));
      throw new Error("changed my mind");
    });
    await expect(attempt).rejects.toThrow("changed my mind");
    const update = { environmentClassId: classId, displayName: "Standard", description: "For tests", enabled: true };
    const before = await auditCount(classId);
    await admin.runnerConfiguration.updateEnvironmentClass(update);
    const last = await sentinel();
    await stream.next(last);
    expect(stream.events).toEqual([last]);
    expect([await auditCount(id), await auditCount(classId)]).toEqual([0, before]);
    stream.stop();
  });
});

describe("nothing is lost", () => {
  test("events told on one replica arrive on the other, also after its connection to the database was cut", async () => {
    const replica = await plane.replica();
    const there = createBerthClient({ baseUrl: replica.server.url, token: member.token });
    const stream = await watchEvents(there);
    const first = await newEnvironment(member.client);
    await stream.next(eventText(ENVIRONMENT, CREATE, first.id));
    await plane.plane.app.db.write`
      select pg_terminate_backend(pid) from pg_stat_activity
      where datname = current_database() and application_name = 'berth listen'`;
    const second = await newEnvironment(member.client);
    await stream.next(eventText(ENVIRONMENT, CREATE, second.id));
    await replica.stop();
    const error = await stream.ended;
    expect(error?.code).toBe(Code.Unavailable);
  });

  test("a transaction that commits late loses nothing, although later ones have been there before it", async () => {
    const { db } = plane.plane.app;
    const [slow, ...fast] = await Promise.all(Array.from({ length: 4 }, () => newEnvironment()));
    const stream = await watchEvents(admin);
    const written = Promise.withResolvers<void>();
    const release = Promise.withResolvers<void>();
    const transaction = db.begin(async (tx) => {
      await record(tx, change(ENVIRONMENT, slow!.id));
      written.resolve();
      await release.promise;
    });
    await written.promise;
    await tell(fast.map((each) => change(ENVIRONMENT, each.id)));
    release.resolve();
    // Nobody is woken for it: it is found by looking.
    await transaction;
    for (const each of [slow!, ...fast]) await stream.next(eventText(ENVIRONMENT, UPDATE, each.id));
    const order = await db.point<{ resource_id: string }[]>`
      select resource_id from events where operation = ${UPDATE} and resource_id = any(${[slow!, ...fast].map((each) => each.id)})
      order by seq`;
    expect(order[0]?.resource_id).toBe(slow!.id);
    const updates = stream.events.filter((text) => text.includes("ENVIRONMENT UPDATE "));
    expect(updates).toHaveLength(4);
    stream.stop();
  });

  test("200 streams at once: each gets everything that its user may see, and nothing else", async () => {
    const users = await Promise.all(Array.from({ length: 5 }, () => plane.addUser()));
    const owned = await Promise.all(
      users.map((user) => Promise.all(Array.from({ length: 4 }, () => newEnvironment(user.client)))),
    );
    const streams = await Promise.all(
      users.flatMap((user, owner) =>
        Array.from({ length: 40 }, async () => ({ owner, stream: await watchEvents(user.client) })),
      ),
    );
    await Promise.all(
      owned.flat().map(async (environment) => {
        await tell([change(ENVIRONMENT, environment.id, { operation: UPDATE_STATUS })]);
        await tell([change(ENVIRONMENT, environment.id, { operation: UPDATE })]);
      }),
    );
    const last = await sentinel();
    for (const { owner, stream } of streams) {
      const own = new Set(owned[owner]!.map((each) => each.id));
      for (const id of own) await stream.next(eventText(ENVIRONMENT, UPDATE, id));
      await stream.next(last);
      const foreign = stream.events.filter((text) => text.startsWith("ENVIRONMENT") && !own.has(text.split(" ")[2]!));
      expect(foreign).toEqual([]);
      stream.stop();
    }
  });

  test("streams come and go without a trace", async () => {
    for (let round = 0; round < 3; round++) {
      const streams = await Promise.all(Array.from({ length: 25 }, () => watchEvents(member.client)));
      for (const stream of streams) stream.stop();
      for (const stream of streams) expect((await stream.ended)?.code).toBe(Code.Canceled);
    }
    const stream = await watchEvents(member.client);
    const last = await sentinel();
    await stream.next(last);
    stream.stop();
  });
});

describe("bounds", () => {
  let small: TestPlane;

  beforeAll(async () => {
    small = await startTestPlane({}, { eventHeartbeatMs: 150, credentialCheckMs: 100, pendingEvents: 20 });
  });

  afterAll(() => small[Symbol.asyncDispose]());

  test("after silence a stream shows a sign of life, which is a message with nothing in it", async () => {
    const stream = await watchEvents(small.admin);
    await eventually(() => stream.events.length >= 2, "two heartbeats");
    expect(new Set(stream.events)).toEqual(new Set(["heartbeat"]));
    stream.stop();
  });

  test("PLT-10: a stream ends with UNAUTHENTICATED soon after its token is gone", async () => {
    const user = await small.addUser();
    const stream = await watchEvents(user.client);
    await small.plane.app.db.write`delete from tokens where subject_id = ${user.id}`;
    expect((await stream.ended)?.code).toBe(Code.Unauthenticated);
    expect(await codeOf(user.client.identity.getAuthenticatedIdentity({}))).toBe("Unauthenticated");
  });

  test("a role that is gained or lost counts on open streams", async () => {
    const user = await small.addUser({ role: OrganizationRole.ADMIN });
    const types = [ResourceType.SSO_CONFIG, ORGANIZATION];
    const stream = await watchEvents(user.client, {
      resourceTypeFilters: types.map((resourceType) => ({ resourceType })),
    });
    const { db } = small.plane.app;
    const { organizationId } = small;
    /** Whether a change that only admins see arrives before one that everybody sees. */
    const seen = async () => {
      const id = uuidv7();
      const open = () => stream.events.filter((text) => text.startsWith("ORGANIZATION")).length;
      const before = open();
      const both = [
        change(ResourceType.SSO_CONFIG, id, { organizationId }),
        change(ORGANIZATION, organizationId, { organizationId }),
      ];
      await tell(both, small);
      await eventually(() => open() > before, "the change that everybody sees");
      return stream.events.includes(eventText(ResourceType.SSO_CONFIG, UPDATE, id));
    };
    expect(await seen()).toBe(true);
    await db.write`update users set role = ${OrganizationRole.MEMBER} where id = ${user.id}`;
    await eventually(async () => !(await seen()), "the end of the role");
    await db.write`update users set role = ${OrganizationRole.ADMIN} where id = ${user.id}`;
    await eventually(seen, "the return of the role");
    stream.stop();
  });

  test("a stream for which too much is waiting ends with UNAVAILABLE", async () => {
    const stream = await watchEvents(small.admin);
    await small.plane.app.db.write`
      insert into events (organization_id, resource_type, resource_id, operation, created_at)
      select ${small.organizationId}, ${ResourceType.PROJECT}, gen_random_uuid(), ${UPDATE}, now() from generate_series(1, 21)`;
    expect((await stream.ended)?.code).toBe(Code.Unavailable);
  });

  test("one principal may hold 50 streams, and a new one when one of them ends", async () => {
    const user = await small.addUser();
    const streams = await Promise.all(Array.from({ length: 50 }, () => watchEvents(user.client)));
    const next = await watchEvents(user.client);
    expect((await next.ended)?.code).toBe(Code.ResourceExhausted);
    const other = await watchEvents(small.admin);
    streams.pop()?.stop();
    const again = await eventually(async () => {
      const stream = await watchEvents(user.client);
      return !((await Promise.race([stream.ended, stream.next("heartbeat")])) instanceof Error) && stream;
    }, "room for another stream");
    for (const stream of [...streams, other, again]) stream.stop();
  });

  test("JSON lines: headers at once, one object a line, errors as JSON before the first line and as a break after it", async () => {
    const user = await small.addUser();
    const open = (body: object, token = user.token) =>
      fetch(`${small.url}/api/gitpod.v1.EventService/WatchEvents`, {
        method: "POST",
        headers: {
          authorization: `Bearer ${token}`,
          "content-type": "application/json",
          accept: "application/jsonl",
        },
        body: JSON.stringify(body),
      });
    const refused = await open({ environmentId: uuidv7() });
    expect(refused.status).toBe(404);
    expect(await refused.json()).toMatchObject({ code: "not_found" });

    const response = await open({});
    expect(response.status).toBe(200);
    expect(response.headers.get("content-type")).toMatch(/^application\/jsonl/);
    const lines: string[] = [];
    const read = (async () => {
      let rest = "";
      for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
        const parts = (rest + chunk).split("\n");
        rest = parts.pop() ?? "";
        lines.push(...parts);
      }
    })();
    const broken = read.then(
      () => false,
      () => true,
    );
    await sentinel(small);
    await eventually(() => lines.some((line) => line !== "{}"), "an event");
    await eventually(() => lines.includes("{}"), "a heartbeat");
    expect(JSON.parse(lines.find((line) => line !== "{}")!)).toEqual({
      operation: "RESOURCE_OPERATION_UPDATE",
      resourceType: "RESOURCE_TYPE_ORGANIZATION",
      resourceId: small.organizationId,
    });
    await small.plane.app.db.write`delete from tokens where subject_id = ${user.id}`;
    expect(await broken).toBe(true);
  });
});
