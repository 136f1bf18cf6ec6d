import { create, type DescMethod, type DescMethodUnary, type Message, toJsonString } from "@bufbuild/protobuf";
import { Code, ConnectError, type Transport } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { allCallers, type Caller, type Column } from "./access-matrix/callers.ts";
import { type Call, type Row, rowsOf, type Section } from "./access-matrix/section.ts";
import { sections } from "./access-matrix/sections.ts";
import { makeWorld, refreshed, type Stage, type World } from "./access-matrix/world.ts";
import { type Around, type FieldPath, idFields, idsAt, textOf, withId } from "./harness/id-fields.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { addOrganization } from "./harness/tenants.ts";

// Every field of every request in which an id can stand, given ids of another organization, of every kind. The answer is
// that to an id which nothing has, and over there nothing changes.

const TIMEOUT_MS = 30_000;

let plane: TestPlane;
let stage: Stage;
let world: World;
let otherStage: Stage;
let otherWorld: World;
let callers: Map<Column, Caller>;
let transport: Transport;

/** The same installation as somebody of another organization sees it. */
async function otherOrganization(test: TestPlane): Promise<TestPlane> {
  const organizationId = await addOrganization(test);
  const { token } = await test.addUser({ organizationId, role: OrganizationRole.ADMIN });
  const addUser: TestPlane["addUser"] = (options = {}) => test.addUser({ organizationId, ...options });
  return { ...test, organizationId, adminToken: token, admin: test.client(token), addUser };
}

beforeAll(async () => {
  plane = await startTestPlane({}, { runnerCallMs: 25, eventHeartbeatMs: 200 });
  transport = createConnectTransport({ baseUrl: plane.url, httpVersion: "1.1" });
  const own = await makeWorld(plane);
  ({ stage, world } = own);
  const other = await makeWorld(await otherOrganization(plane));
  [otherStage, otherWorld] = [other.stage, other.world];
  const all = await allCallers(stage, world, own.environmentToken);
  callers = new Map([...all].reverse().map((caller) => [caller.column, caller]));
}, 180_000);

// Their leases are shorter than this file takes.
beforeEach(() =>
  Promise.all([stage, otherStage].flatMap(({ runner, otherRunner }) => [runner.heartbeat(), otherRunner.heartbeat()])),
);

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toContain('"code":"unknown"');
  await plane[Symbol.asyncDispose]();
});

/** Whoever may make a call, the less powerful first; undefined if nobody does. */
function allowed({ expected }: Row): Caller | undefined {
  const column = (["cr", "ad", "sa", "rt"] as const).find((each) => expected[each] === "ok");
  return column && callers.get(column);
}

const UUID = /[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/g;

/** An answer without what is different each time. */
function steady(text: string, id: string): string {
  return text
    .replaceAll(id, "<the id>")
    .replace(UUID, "<id>")
    .replace(/berth_[a-z]{3,4}_\w+|"nextToken":"[^"]+"/g, "<token>")
    .replace(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "<time>")
    .replace(/"\d+"|-[0-9a-f]{6}\b/g, "<number>");
}

async function answer(method: DescMethod, caller: Caller, request: Message, id: string): Promise<string> {
  try {
    if (method.methodKind !== "unary") return await firstOf(method, caller, request, id);
    const unary = method as DescMethodUnary;
    const { message } = await transport.unary(unary, undefined, TIMEOUT_MS, caller.headers, request);
    return steady(toJsonString(method.output, message), id);
  } catch (error) {
    const { code, rawMessage } = ConnectError.from(error);
    return steady(`${Code[code]}: ${rawMessage}`, id);
  }
}

/** The first message of a stream. */
async function firstOf(method: DescMethod, caller: Caller, request: Message, id: string): Promise<string> {
  const stop = new AbortController();
  const messages = (async function* () {
    yield request;
  })();
  const stream = await transport.stream(method as never, stop.signal, TIMEOUT_MS, caller.headers, messages as never);
  try {
    for await (const message of stream.message) return steady(toJsonString(method.output, message), id);
    return "an empty stream";
  } finally {
    stop.abort();
  }
}

/** Everything that the other organization has, but for what moves by itself. */
async function possessions(): Promise<string> {
  const { organizationId } = otherWorld;
  const tables = await plane.plane.app.db.point<{ name: string }[]>`
    select table_name as name from information_schema.columns
    where table_schema = 'public' and column_name = 'organization_id' and table_name <> 'events' order by table_name`;
  const found: Record<string, string[]> = {};
  for (const { name } of tables) {
    const rows = await plane.plane.app.db.point.unsafe<{ row: string }[]>(`
      select (to_jsonb(t) - '{status,updated_at,lease_expires_at,last_contact_at,last_used_at}'::text[])::text as row
      from ${name} t where organization_id = '${organizationId}' order by 1`);
    found[name] = rows.map(({ row }) => row);
  }
  return JSON.stringify(found, undefined, 1);
}

interface Place {
  section: Section;
  row: Row;
  method: DescMethod;
  path: FieldPath;
}

/** Ids of something that no organization has: texts of the client, or of other servers. */
const OF_OTHERS = new Set([
  ...["allowed_editor_ids", "default_editor_id", "editor_id", "allowed_agent_ids", "scm_id", "oauth_client_id"],
  ...["client_id", "aws_account_id", "cloud_account_id", "ami_id", "cid_secret_id", "container_id", "instance_id"],
]);

const places: Place[] = (sections as Section[]).flatMap((section) =>
  rowsOf(section).flatMap((row) => {
    const method = section.service.method[row.rpc];
    const paths = method ? idFields(method.input).filter((path) => !OF_OTHERS.has(path.at(-1)!.name)) : [];
    return method ? paths.map((path) => ({ section, row, method, path })) : [];
  }),
);

const nameOf = ({ method, path }: Place) => `${method.parent.name}.${method.localName} ${textOf(path)}`;

/** What must stand beside an id, by the type of message. */
const AROUND: Around = {
  "berth.runner.v1.TaskExecutionReport": { seq: 1n },
  "gitpod.v1.Subject": { principal: Principal.USER },
  "gitpod.v1.EnvironmentVariableItem": { name: "NAME" },
  "gitpod.v1.ResourceTypeFilter": { resourceType: ResourceType.ENVIRONMENT },
  "gitpod.v1.WatchEventsRequest.ResourceTypeFilter": { resourceType: ResourceType.ENVIRONMENT },
  "gitpod.v1.ListGroupsRequest.Filter.ExcludeAssignedToResource": { resourceType: ResourceType.RUNNER },
};

/**
 * Places where an id of the own organization is answered like one that nothing has, because nothing is looked up there:
 * features that do not exist, names that clients give, answers that nobody waits for.
 */
const NOT_LOOKED_UP = [
  "AccountService.listLoginProviders filter.invite_id",
  "EnvironmentService.createEnvironment spec.security_policy_id",
  "EnvironmentService.createEnvironment spec.ssh_public_keys.id",
  "EnvironmentService.createEnvironment spec.workflow_action_id",
  "EnvironmentService.createEnvironmentFromProject spec.security_policy_id",
  "EnvironmentService.createEnvironmentFromProject spec.ssh_public_keys.id",
  "EnvironmentService.createEnvironmentFromProject spec.workflow_action_id",
  "EnvironmentService.updateEnvironment spec.ssh_public_keys.id",
  "EventService.watchEvents resource_type_filters.creator_ids",
  "OrganizationService.updateOrganizationPolicies security_agent_policy.custom_agents.id",
  "OrganizationService.updateOrganizationPolicies security_policy_id",
  "RunnerControlService.completeCall parse_context.response.issue.id",
  "RunnerControlService.completeCall parse_context.response.pr.id",
  "RunnerControlService.completeCall parse_context.response.project_ids",
  "RunnerControlService.completeCall parse_context.response.pull_request.id",
  "RunnerControlService.completeCall parse_context.response.recommended_environment_classes",
  "RunnerControlService.reportAutomations executions.status.steps.id",
  "RunnerService.createRunner runner_manager_id",
  "UsageService.getTopProjects team_id",
];

const probed = new Set<string>();
/** Those of them where ids of the own organization were told from others. */
const lookedUp = new Set<string>();

const isId = (value: string) => value.replace(UUID, "") === "";
const idsOf = ({ unknownId: _unknown, ...own }: World) => Object.entries(own).filter(([, value]) => isId(value));

/** One place of a request, and what is answered to an id in it. */
class Probe {
  readonly #place: Place;
  readonly #caller: Caller;
  readonly #call: Call;
  #world = world;

  constructor(place: Place, caller: Caller) {
    this.#place = place;
    this.#caller = caller;
    this.#call = place.section.calls[place.row.name] ?? {};
  }

  async renew(): Promise<void> {
    this.#world = await refreshed(stage, world, this.#call.fresh ?? []);
  }

  #request(): Message {
    return create(this.#place.method.input, (this.#call.request?.(this.#world) ?? {}) as Record<string, unknown>);
  }

  async answer(id: string): Promise<string> {
    const { method, path } = this.#place;
    const got = await answer(method, this.#caller, withId(method.input, this.#request(), path, id, AROUND), id);
    // What was used up is there again.
    if (got.startsWith("{")) await this.renew();
    return got;
  }

  /** The request has an id there already, and needs it. */
  get isNamed(): boolean {
    return idsAt(this.#request(), this.#place.path).length > 0;
  }

  /** Whether an id of the own organization makes a difference. */
  async looksUp(unknown: string): Promise<boolean> {
    if (this.isNamed) return true;
    for (const [, id] of idsOf(world)) if ((await this.answer(id)) !== unknown) return true;
    return false;
  }
}

test("there are many places, in filters, specs, references and lists", () => {
  expect(places.length).toBeGreaterThan(250);
});

describe("ids of another organization", () => {
  const rows = [...Map.groupBy(places, ({ section, row }) => `${section.service.name}.${row.name}`)];

  test.each(rows)("%s", async (_name, found) => {
    // Not built yet, or nothing that somebody could do.
    const caller = allowed(found[0]!.row);
    if (!caller) return;
    const before = await possessions();
    const differences: string[] = [];
    for (const place of found) {
      const probe = new Probe(place, caller);
      // Other calls of the same RPC say nothing new about what they do not name.
      if (probed.has(nameOf(place)) && !probe.isNamed) continue;
      await probe.renew();
      const unknown = await probe.answer(world.unknownId);
      for (const [field, id] of idsOf(otherWorld)) {
        const got = await probe.answer(id);
        if (got !== unknown) differences.push(`${textOf(place.path)} = ${field} there: ${got}, not ${unknown}`);
      }
      probed.add(nameOf(place));
      if (!lookedUp.has(nameOf(place)) && (await probe.looksUp(unknown))) lookedUp.add(nameOf(place));
    }
    expect(differences).toEqual([]);
    expect(await possessions()).toBe(before);
  });

  test("are not told from others only where nothing is looked up", () => {
    expect([...probed].filter((name) => !lookedUp.has(name)).sort()).toEqual([...NOT_LOOKED_UP].sort());
  });
});
