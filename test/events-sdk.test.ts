import Gitpod from "@gitpod/sdk";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { transact } from "../src/app.ts";
import { record } from "../src/store/record.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { eventually } from "./harness/wait.ts";

// The official SDK, unmodified, on what happens: the stream of changes and the audit log.

const HEARTBEAT_MS = 50;
const { UPDATE } = ResourceOperation;

let plane: TestPlane;
let sdk: Gitpod;

beforeAll(async () => {
  plane = await startTestPlane({}, { eventHeartbeatMs: HEARTBEAT_MS });
  sdk = new Gitpod({ baseURL: `${plane.url}/api`, bearerToken: plane.adminToken });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const tell = (resourceType: ResourceType, resourceId: string) =>
  transact(plane.plane.app, (tx) =>
    record(tx, { organizationId: plane.organizationId, resourceType, resourceId, operation: UPDATE, at: new Date() }),
  );

const event = (id: string) => ({
  operation: "RESOURCE_OPERATION_UPDATE",
  resourceType: "RESOURCE_TYPE_GROUP",
  resourceId: id,
});

test("PLT-41 a stream lives through long silence, of which only empty messages tell, and brings the next change", async () => {
  const stream = await sdk.events.watch({ organization: true });
  const seen: object[] = [];
  const reading = (async () => {
    for await (const message of stream) seen.push(message);
  })();
  // Longer than three times the interval at which a sign of life comes, as 60 s are of 20 s.
  await eventually(() => seen.length > 3, "signs of life");
  expect(seen.every((message) => Object.keys(message).length === 0)).toBe(true);
  const [first, second] = [uuidv7(), uuidv7()];
  await tell(ResourceType.GROUP, first);
  await tell(ResourceType.GROUP, second);
  await eventually(() => seen.some((message) => "resourceId" in message && message.resourceId === second), "both");
  expect(seen.filter((message) => Object.keys(message).length)).toEqual([event(first), event(second)]);
  stream.controller.abort();
  await reading.catch(() => undefined);
});

test("PLT-41 what is sent is one object a line, without blank lines, for decoders that parse each line", async () => {
  for (const contentType of ["application/json", "application/jsonl"]) {
    const stop = new AbortController();
    const response = await fetch(`${plane.url}/api/gitpod.v1.EventService/WatchEvents`, {
      method: "POST",
      headers: {
        authorization: `Bearer ${plane.adminToken}`,
        "content-type": contentType,
        accept: "application/jsonl",
      },
      body: JSON.stringify({ organization: true }),
      signal: stop.signal,
    });
    expect([response.status, response.headers.get("content-type")]).toEqual([200, "application/jsonl"]);
    let text = "";
    const reading = (async () => {
      for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) text += chunk;
    })().catch(() => undefined);
    await eventually(() => text.split("\n").length > 3, "signs of life");
    const id = uuidv7();
    await tell(ResourceType.GROUP, id);
    await eventually(() => text.includes(`${id}"}\n`), "the change as a whole line");
    stop.abort();
    await reading;
    const lines = text.split("\n");
    expect(lines.pop()).toBe("");
    const messages = lines.map((line) => JSON.parse(line) as object);
    expect(messages.filter((message) => Object.keys(message).length)).toEqual([event(id)]);
  }
});

test("the audit log, page by page and filtered", async () => {
  await sdk.runners.create({ name: "Host", provider: "RUNNER_PROVIDER_LINUX_HOST" });
  await sdk.runners.create({ name: "Another host", provider: "RUNNER_PROVIDER_LINUX_HOST" });
  const filter = { subjectTypes: ["RESOURCE_TYPE_RUNNER" as const] };
  const entries = [];
  for await (const entry of sdk.events.list({ filter, pageSize: 1 })) entries.push(entry);
  expect(entries.length).toBeGreaterThanOrEqual(2);
  expect(new Set(entries.map(({ id }) => id)).size).toBe(entries.length);
  expect(new Set(entries.map(({ subjectType }) => subjectType))).toEqual(new Set(filter.subjectTypes));
  expect([...entries].sort((a, b) => String(b.createdAt).localeCompare(String(a.createdAt)))).toEqual(entries);
});
