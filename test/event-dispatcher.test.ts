import type { Message } from "@bufbuild/protobuf";
import { Code, createClient } from "@connectrpc/connect";
import { compressionGzip, createConnectTransport } from "@connectrpc/connect-node";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { EventService, ResourceOperation, ResourceType, type WatchEventsResponse } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { transact } from "../src/app.ts";
import { ofOrganization } from "../src/domain/event.ts";
import type { Caller } from "../src/domain/principal.ts";
import type { Outlet } from "../src/rpc/call.ts";
import { Dispatcher, type Watching } from "../src/services/event/dispatcher.ts";
import { findCaller } from "../src/store/credentials.ts";
import { type Change, record } from "../src/store/record.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { share } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { CREATE, UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;
const { ORGANIZATION, SSO_CONFIG, GROUP, RUNNER } = ResourceType;
const PENDING = 20;

let plane: TestPlane;
let dispatcher: Dispatcher;
let caller: Caller;

beforeAll(async () => {
  // Credentials are not looked up while a test has taken the database away.
  plane = await startTestPlane({}, { pendingEvents: PENDING, credentialCheckMs: 600_000 });
  dispatcher = new Dispatcher(plane.plane.app);
  caller = await callerOf(plane.adminToken);
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

/** Events of one transaction. */
const tell = (...changes: (Pick<Change, "resourceType" | "resourceId"> & Partial<Change>)[]) =>
  transact(plane.plane.app, async (tx) => {
    for (const each of changes)
      await record(tx, { organizationId: plane.organizationId, operation: UPDATE, at: new Date(), ...each });
  });

/** A client that takes what it is sent only when it is told to. */
class SlowClient implements Outlet {
  readonly told: string[] = [];
  #full: PromiseWithResolvers<void> | undefined;

  get isFull(): boolean {
    return this.#full !== undefined;
  }

  drained(): Promise<void> {
    return this.#full?.promise ?? Promise.resolve();
  }

  send(messages: readonly Message[]): void {
    if (this.isFull) throw new Error("more was sent than the client takes");
    for (const { resourceType, operation, resourceId } of messages as WatchEventsResponse[])
      this.told.push(eventText(resourceType, operation, resourceId));
    this.#full = Promise.withResolvers();
  }

  take(): void {
    this.#full?.resolve();
    this.#full = undefined;
  }
}

async function callerOf(token: string): Promise<Caller> {
  const found = await findCaller(plane.plane.app.db.point, token, new Date());
  if (found.state !== "ok") throw new Error("the token opens nothing");
  return found.caller;
}

async function open(outlet: Outlet, who = caller): Promise<Watching> {
  const watching = await dispatcher.open(who, ofOrganization(plane.organizationId, []), outlet);
  watching.begin([]);
  return watching;
}

test("a client that does not keep up waits alone, and is then told the newest picture of each resource", async () => {
  const [slow, quick] = [new SlowClient(), await watchEvents(plane.admin)];
  const watching = await open(slow);
  const [first, second, third] = [uuidv7(), uuidv7(), uuidv7()];
  await tell({ resourceType: SSO_CONFIG, resourceId: first, operation: CREATE });
  await eventually(() => slow.isFull, "the client is full");
  const rest = [
    { resourceId: second, operation: UPDATE_STATUS },
    { resourceId: third, operation: CREATE },
    { resourceId: second, operation: UPDATE },
    { resourceId: third, operation: DELETE },
    { resourceId: second, operation: CREATE },
  ];
  for (const each of rest) {
    await tell({ resourceType: SSO_CONFIG, ...each });
    await quick.next(eventText(SSO_CONFIG, each.operation, each.resourceId));
  }
  expect(slow.told).toEqual([eventText(SSO_CONFIG, CREATE, first)]);
  slow.take();
  await eventually(() => slow.isFull, "the client is full again");
  expect(slow.told.slice(1)).toEqual([eventText(SSO_CONFIG, DELETE, third), eventText(SSO_CONFIG, CREATE, second)]);
  watching.end(undefined);
  quick.stop();
});

test("a client that never takes what it is sent is ended once too many resources wait for it, and no other", async () => {
  const [slow, quick] = [new SlowClient(), await watchEvents(plane.admin)];
  const watching = await open(slow);
  const ids = Array.from({ length: PENDING + 2 }, () => uuidv7());
  for (const resourceId of ids) {
    await tell({ resourceType: SSO_CONFIG, resourceId });
    await quick.next(eventText(SSO_CONFIG, UPDATE, resourceId));
  }
  await expect(watching.ended).rejects.toMatchObject({ kind: "unavailable" });
  expect(slow.told).toHaveLength(1);
  quick.stop();
});

test("what waits is judged when it is sent: a role that was lost meanwhile does not show it", async () => {
  const user = await plane.addUser();
  const { runner } = await plane.admin.runners.createRunner({ name: "Host", provider: RunnerProvider.LINUX_HOST });
  const [id, group] = [runner!.runnerId, uuidv7()];
  const unshare = await share(plane, user.id, { type: RUNNER, id, role: ResourceRole.RUNNER_USER });
  const slow = new SlowClient();
  const watching = await open(slow, await callerOf(user.token));
  await tell({ resourceType: RUNNER, resourceId: id, operation: UPDATE_STATUS });
  await eventually(() => slow.isFull, "the client is full");
  await tell({ resourceType: RUNNER, resourceId: id }, { resourceType: GROUP, resourceId: group });
  await unshare();
  slow.take();
  await eventually(() => slow.told.length > 1, "the next events");
  expect(slow.told).toEqual([eventText(RUNNER, UPDATE_STATUS, id), eventText(GROUP, UPDATE, group)]);
  watching.end(undefined);
});

test("while the database does not say who may see what, events wait and none is lost", async () => {
  const { db } = plane.plane.app;
  const user = await plane.addUser();
  const { runner } = await plane.admin.runners.createRunner({ name: "Host", provider: RunnerProvider.LINUX_HOST });
  const id = runner!.runnerId;
  const stream = await watchEvents(user.client);
  await db.write`alter table runners rename to away`;
  await tell(
    { resourceType: RUNNER, resourceId: id },
    { resourceType: ORGANIZATION, resourceId: plane.organizationId },
  );
  await eventually(() => plane.logged().includes("events wait because"), "the failure is logged");
  expect(stream.events).toEqual([]);
  await db.write`update away set creator_id = ${user.id} where id = ${id}`;
  await db.write`alter table away rename to runners`;
  await stream.next(eventText(ORGANIZATION, UPDATE, plane.organizationId));
  expect(stream.events).toContain(eventText(RUNNER, UPDATE, id));
  stream.stop();
});

test("a stream in a protocol that only its handler can write to is served alike", async () => {
  const user = await plane.addUser();
  // A compressed request takes the way through the protocols of connect.
  const transport = createConnectTransport({
    ...{ baseUrl: plane.url, httpVersion: "1.1", sendCompression: compressionGzip, compressMinBytes: 0 },
    interceptors: [
      (next) => (request) => {
        request.header.set("authorization", `Bearer ${user.token}`);
        return next(request);
      },
    ],
  });
  const client = { events: createClient(EventService, transport) } as unknown as typeof user.client;
  const filters = [GROUP, ORGANIZATION].map((resourceType) => ({ resourceType }));
  const stream = await watchEvents(client, { resourceTypeFilters: filters });
  const groups = Array.from({ length: PENDING / 2 }, () => uuidv7());
  await tell(...groups.map((resourceId) => ({ resourceType: GROUP, resourceId })));
  await tell({ resourceType: ORGANIZATION, resourceId: plane.organizationId });
  await stream.next(eventText(ORGANIZATION, UPDATE, plane.organizationId));
  expect(stream.events.slice(0, groups.length)).toEqual(groups.map((id) => eventText(GROUP, UPDATE, id)));
  await tell(...Array.from({ length: PENDING + 1 }, () => ({ resourceType: GROUP, resourceId: uuidv7() })));
  expect((await stream.ended)?.code).toBe(Code.Unavailable);
});

test("a stream that its client leaves is forgotten", async () => {
  const streams = await Promise.all(Array.from({ length: 5 }, () => watchEvents(plane.admin)));
  for (const stream of streams) stream.stop();
  for (const stream of streams) expect((await stream.ended)?.code).toBe(Code.Canceled);
  const before = plane.logged().length;
  await tell({ resourceType: ORGANIZATION, resourceId: plane.organizationId });
  const stream = await watchEvents(plane.admin);
  await tell({ resourceType: ORGANIZATION, resourceId: plane.organizationId });
  await stream.next(eventText(ORGANIZATION, UPDATE, plane.organizationId));
  expect(plane.logged().slice(before)).not.toContain('"level":50');
  stream.stop();
});
