import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { transact } from "../src/app.ts";
import type { BerthClient } from "../src/client.ts";
import type { ControlPlane } from "../src/control-plane.ts";
import { type Change, record } from "../src/store/record.ts";
import { type EventStream, eventText, watchEvents } from "./harness/event-stream.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { connectRunner, share } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { UPDATE, UPDATE_STATUS, DELETE } = ResourceOperation;
const { ENVIRONMENT, RUNNER, TASK, ORGANIZATION } = ResourceType;

const USERS = 100;
const STREAMS_EACH = 10;
const ARRIVES_MS = 120_000;

/** Somebody who watches, and the environment that nobody else may see. */
interface Watcher extends TestUser {
  environmentId: string;
}

/** A stream and everything that it must be told. */
interface Watched {
  stream: EventStream;
  expected: ReadonlySet<string>;
}

let plane: TestPlane;
/** Where changes are made; the streams are all open at the other one. */
let replica: ControlPlane;
let watchers: Watcher[];
let sharedRunner: string;
let hiddenRunner: string;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  replica = await plane.replica();
  const shared = await connectRunner(plane, { maxEnvironments: 2 * USERS });
  sharedRunner = shared.runner.id;
  classId = shared.classId;
  hiddenRunner = (await connectRunner(plane, { shared: false })).runner.id;
  const users = await Promise.all(Array.from({ length: USERS }, () => plane.addUser()));
  watchers = await Promise.all(
    users.map(async (user) => Object.assign(user, { environmentId: await newEnvironment(user.client) })),
  );
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

async function newEnvironment(client: BerthClient): Promise<string> {
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  return environment!.id;
}

const change = (resourceType: ResourceType, resourceId: string, more: Partial<Change> = {}): Change => ({
  ...{ organizationId: plane.organizationId, resourceType, resourceId, operation: UPDATE, at: new Date() },
  ...more,
});

/** Makes changes at the other replica, each in a transaction of its own, in order. */
async function tell(changes: readonly Change[]): Promise<void> {
  for (const each of changes) await transact(replica.app, (tx) => record(tx, each));
}

const nameOf = ({ resourceType, resourceId }: Pick<Change, "resourceType" | "resourceId">) =>
  `${ResourceType[resourceType]} ${resourceId}`;

const OPERATIONS = [UPDATE_STATUS, UPDATE, DELETE].map((operation) => ResourceOperation[operation]);

/** What a stream was told, by resource: the operations in their order, as digits. */
function toldOf({ events }: EventStream): Map<string, string> {
  const told = new Map<string, string>();
  for (const text of events) {
    const [type, operation = "", id] = text.split(" ");
    const name = `${type} ${id}`;
    if (id) told.set(name, (told.get(name) ?? "") + OPERATIONS.indexOf(operation));
  }
  return told;
}

test(
  "1,000 streams of one process are told of changes at another: none is lost, none is foreign, each resource's in order",
  async () => {
    const friends = watchers.slice(0, USERS / 10);
    const sharedEnvironment = await newEnvironment(plane.admin);
    const role = { type: ENVIRONMENT, id: sharedEnvironment, role: ResourceRole.ENVIRONMENT_VIEWER };
    for (const each of friends) await share(plane, each.id, role);
    const tasks = new Map(watchers.map(({ environmentId }) => [environmentId, uuidv7()]));
    const last = change(ORGANIZATION, plane.organizationId);

    const all = (await Promise.all(
      watchers.flatMap((watcher) => {
        const own = nameOf(change(ENVIRONMENT, watcher.environmentId));
        const seen = [own, nameOf(change(RUNNER, sharedRunner)), nameOf(last)];
        if (friends.includes(watcher)) seen.push(nameOf(change(ENVIRONMENT, sharedEnvironment)));
        const types = [ENVIRONMENT, ORGANIZATION].map((resourceType) => ({ resourceType }));
        const scope = { case: "environmentId" as const, value: watcher.environmentId };
        const task = nameOf(change(TASK, tasks.get(watcher.environmentId)!));
        const open = async (request: Parameters<typeof watchEvents>[1], expected: readonly string[]) => ({
          stream: await watchEvents(watcher.client, request),
          expected: new Set(expected),
        });
        return [
          open({ scope }, [own, task]),
          open(
            { resourceTypeFilters: types },
            seen.filter((name) => !name.startsWith("RUNNER")),
          ),
          ...Array.from({ length: STREAMS_EACH - 2 }, () => open({}, seen)),
        ];
      }),
    )) satisfies Watched[];
    expect(all).toHaveLength(USERS * STREAMS_EACH);

    const environments = [
      ...watchers.map((each) => [each.environmentId, each.id] as const),
      [sharedEnvironment, ""] as const,
    ];
    const perEnvironment = environments.map(([environmentId, creatorId]) =>
      [UPDATE_STATUS, UPDATE, DELETE].map((operation) =>
        change(ENVIRONMENT, environmentId, { operation, environmentId, creatorId: creatorId || undefined }),
      ),
    );
    await Promise.all([
      ...perEnvironment.map(tell),
      ...[...tasks].map(([environmentId, id]) => tell([change(TASK, id, { environmentId })])),
      tell([sharedRunner, hiddenRunner].map((id) => change(RUNNER, id, { operation: UPDATE_STATUS }))),
    ]);
    await tell([last]);

    const done = ({ stream, expected }: Watched) => {
      const told = toldOf(stream);
      const isOver = (name: string) => !name.startsWith("ENVIRONMENT") || told.get(name)?.endsWith("2");
      return [...expected].every((name) => told.has(name) && isOver(name));
    };
    for (const each of all) {
      const what = `the last of ${[...each.expected].join(", ")}; told: ${each.stream.events.join(", ")}`;
      await eventually(() => done(each), what, ARRIVES_MS);
    }
    for (const { stream, expected } of all) {
      const told = toldOf(stream);
      expect(new Set(told.keys())).toEqual(expected);
      for (const operations of told.values()) expect(operations).toBe([...operations].sort().join(""));
      stream.stop();
    }
    for (const { stream } of all) expect(await stream.ended).toBeDefined();
  },
  2 * ARRIVES_MS,
);

test("what a user is let see while its streams are open, they are told of; what is taken away, they are not", async () => {
  const [watcher] = watchers as [Watcher];
  const environmentId = await newEnvironment(plane.admin);
  const stream = await watchEvents(watcher.client);
  const both = () => [
    change(ENVIRONMENT, environmentId, { environmentId }),
    change(ORGANIZATION, plane.organizationId),
  ];
  const seen = async (): Promise<boolean> => {
    const count = (type: ResourceType) => stream.events.filter((text) => text.startsWith(ResourceType[type])).length;
    const [before, shown] = [count(ORGANIZATION), count(ENVIRONMENT)];
    await tell(both());
    await eventually(() => count(ORGANIZATION) > before, "the change that everybody sees");
    return count(ENVIRONMENT) > shown;
  };
  expect(await seen()).toBe(false);
  const role = { type: ENVIRONMENT, id: environmentId, role: ResourceRole.ENVIRONMENT_VIEWER };
  const unshare = await share(plane, watcher.id, role);
  expect(await seen()).toBe(true);
  await unshare();
  expect(await seen()).toBe(false);
  expect(stream.events.at(-1)).toBe(eventText(ORGANIZATION, UPDATE, plane.organizationId));
  stream.stop();
});
