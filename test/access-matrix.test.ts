import type { DescMethod } from "@bufbuild/protobuf";
import { createConnectRouter, type Transport } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { routes } from "../src/routes.ts";
import { policy } from "../src/rpc/policy.ts";
import { outcome } from "./access-matrix/call.ts";
import { allCallers, assign, type Caller, COLUMNS, type Column } from "./access-matrix/callers.ts";
import { type Call, type Row, rowsOf, type Section } from "./access-matrix/section.ts";
import { sections } from "./access-matrix/sections.ts";
import { makeWorld, refreshed, type Stage, type World } from "./access-matrix/world.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";

// Every RPC of every registered service, called by every kind of credential and everybody with any role. What each is
// answered stands in the tables of access-matrix/, one for each service.

const CALLS_AT_ONCE = 8;

let plane: TestPlane;
let stage: Stage;
let world: World;
let callers: Caller[];
let transport: Transport;

beforeAll(async () => {
  // A stream without news says soon that it is alive.
  plane = await startTestPlane({}, { runnerCallMs: 25, eventHeartbeatMs: 200 });
  transport = createConnectTransport({ baseUrl: plane.url, httpVersion: "1.1" });
  const made = await makeWorld(plane);
  ({ stage, world } = made);
  callers = await allCallers(stage, world, made.environmentToken);
}, 180_000);

// Their leases are shorter than this file takes.
beforeEach(() => Promise.all([stage.runner.heartbeat(), stage.otherRunner.heartbeat()]));

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toContain('"code":"unknown"');
  await plane[Symbol.asyncDispose]();
});

/** Every RPC that the control plane serves, from the router that it serves with. */
function registered(): DescMethod[] {
  const router = createConnectRouter();
  routes(plane.plane.app)(router);
  return router.handlers.map(({ method }) => method);
}

const nameOf = ({ parent, localName }: DescMethod) => `${parent.typeName}/${localName}`;

/** The objects of one call, and how its caller presents itself. */
async function scene(caller: Caller, { fresh = [] }: Call): Promise<{ world: World; headers: Record<string, string> }> {
  // Who is nobody gets no further than the door, unless it is open to all.
  const isRefused = caller.column === "no" && !fresh.includes("exchangeToken");
  const own = await refreshed(stage, world, isRefused ? [] : fresh);
  const { role, headers } = caller;
  if (role && own[role.field] !== world[role.field]) await assign(plane, role, own);
  if (caller.column !== "en" || own.environmentId === world.environmentId) return { world: own, headers };
  const { environmentId } = own;
  const { environment } = await plane.admin.environments.getEnvironment({ environmentId });
  const machineSession = environment?.spec?.machine?.session ?? "";
  const { token } = await stage.runner.control.createEnvironmentToken({ environmentId, machineSession });
  return { world: own, headers: { authorization: `Bearer ${token}` } };
}

async function answerTo(caller: Caller, method: DescMethod, call: Call): Promise<string> {
  const { world: own, headers } = await scene(caller, call);
  return outcome(transport, method, headers, call.request?.(own) ?? {}, call.finds?.(own));
}

/** What all are answered: by column, and of those who are not answered like the first of their column, by name. */
async function answers(method: DescMethod, call: Call): Promise<Record<string, string>> {
  const waiting = [...callers];
  const found = new Map<Caller, string>();
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) found.set(next, await answerTo(next, method, call));
  };
  await Promise.all(Array.from({ length: CALLS_AT_ONCE }, work));
  const byColumn = Map.groupBy(callers, ({ column }) => column);
  return Object.fromEntries(
    [...byColumn].flatMap(([column, [first, ...others]]) => {
      const answer = found.get(first!)!;
      const unlike = others.filter((each) => found.get(each) !== answer);
      return [[column, answer], ...unlike.map((each) => [`${column} (${each.name})`, found.get(each)!])];
    }),
  );
}

describe("the tables", () => {
  test("have a line for every registered RPC, and no other", () => {
    const lines = sections.flatMap((each: Section) => rowsOf(each).map(({ rpc }) => `${each.service.typeName}/${rpc}`));
    expect([...new Set(lines)].sort()).toEqual(registered().map(nameOf).sort());
  });

  test("know every call that is described, and list none twice", () => {
    for (const each of sections as Section[]) {
      const names = rowsOf(each).map(({ name }) => name);
      expect(new Set(names).size, each.service.name).toBe(names.length);
      expect(
        Object.keys(each.calls).filter((name) => !names.includes(name)),
        each.service.name,
      ).toEqual([]);
    }
  });

  test("have a column for everybody who calls", () => {
    expect(new Set(callers.map(({ column }) => column))).toEqual(new Set(Object.keys(COLUMNS)));
  });

  test("the policy has a line for every registered RPC, and no other", () => {
    const lines = Object.entries(policy).flatMap(([service, methods]) =>
      Object.keys(methods).map((name) => `${service}/${name}`),
    );
    expect(lines.sort()).toEqual(registered().map(nameOf).sort());
  });
});

describe.each((sections as Section[]).map((each) => [each.service.name, each] as const))("%s", (_service, each) => {
  test.each(rowsOf(each).map((row) => [row.name, row] as const))("%s", async (name, row: Row) => {
    const method = each.service.method[row.rpc];
    if (!method) throw new Error("is no RPC of this service");
    const expected: Record<Column, string> = row.expected;
    expect(await answers(method, each.calls[name] ?? {})).toEqual(expected);
  });
});
