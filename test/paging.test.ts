import { isDeepStrictEqual } from "node:util";
import { create, type DescField, type DescMethod, type DescMethodUnary, type Message } from "@bufbuild/protobuf";
import { Code, ConnectError, type Transport } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { ProjectRole } from "../gen/gitpod/v1/project_pb.js";
import { RunnerRole } from "../gen/gitpod/v1/runner_pb.js";
import type { BerthClient } from "../src/client.ts";
import { services } from "../src/routes.ts";
import { allCallers, type Caller, type Column } from "./access-matrix/callers.ts";
import { type Fresh, makeWorld, newEnvironment, refreshed, type Stage, type World } from "./access-matrix/world.ts";
import { newService, newTask, startTask } from "./harness/automations.ts";
import { newGroup } from "./harness/groups.ts";
import { idFields, withId } from "./harness/id-fields.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { offer } from "./harness/projects.ts";
import { eventually } from "./harness/wait.ts";

// Every list, walked in pages of random sizes while entries come and go: none comes twice, and none of those that were
// there all the time is missing.

const TIMEOUT_MS = 30_000;
const ENTRIES = 14;
const WALKS = 3;
const LARGEST_PAGE = 5;
const SEED = 20_260_115;

let plane: TestPlane;
let stage: Stage;
let world: World;
let callers: Map<Column, Caller>;
let transport: Transport;
let admin: BerthClient;
let creator: BerthClient;

/** An entry of a list, with whatever fields it has. */
type Entry = Message &
  Record<
    "id" | "runnerId" | "groupId" | "provider" | "order" | "name" | "projectId" | "userId" | "organizationId",
    string
  >;

/** How entries of a list come and go. */
interface List {
  /** Who lists, by default an admin. */
  as?: Column;
  request?: () => object;
  /** Makes one more; without it the list is what it is. */
  make?: () => Promise<unknown>;
  remove?: (key: string) => Promise<unknown>;
  /** What tells entries apart, by default `id`. */
  key?: (entry: Entry) => string;
  /** It is not built yet. */
  isPending?: true;
}

const DAY_S = 86_400n;
const yesterday = BigInt(Math.trunc(Date.now() / 1000)) - DAY_S;
const one = (field: Fresh) => () => refreshed(stage, world, [field]);
const onRunner = () => ({ runnerId: world.runnerId, scmHost: "git.example.org" });
const onOrganization = () => ({ organizationId: world.organizationId });
const inEnvironment = () => ({ filter: { environmentIds: [world.environmentId] } });
const classes: List = { make: one("classId") };
let made = 0;

async function sharedGroup(): Promise<string> {
  const groupId = await newGroup(stage.plane);
  await admin.runners.createRunnerPolicy({ runnerId: world.runnerId, groupId, role: RunnerRole.USER });
  return groupId;
}

async function projectOfEnvironment(): Promise<void> {
  const { projectId } = await refreshed(stage, world, ["projectId"]);
  await newEnvironment(world.classId, { by: creator, on: stage.runner, projectId });
}

const LISTS: Record<string, List> = {
  "EnvironmentService.listEnvironments": {
    as: "cr",
    make: () => creator.environments.createEnvironment({ spec: { machine: { class: world.classId } } }),
    remove: (environmentId) => creator.environments.deleteEnvironment({ environmentId, force: true }),
  },
  "EnvironmentService.listEnvironmentClasses": classes,
  "RunnerConfigurationService.listEnvironmentClasses": classes,
  "EnvironmentAutomationService.listServices": {
    as: "cr",
    request: inEnvironment,
    make: () => newService(creator, world.environmentId, `service-${++made}`),
    remove: (id) => creator.environmentAutomation.deleteService({ id, force: true }),
  },
  "EnvironmentAutomationService.listTasks": {
    as: "cr",
    request: inEnvironment,
    make: () => newTask(creator, world.environmentId, `task-${++made}`),
    remove: (id) => creator.environmentAutomation.deleteTask({ id }),
  },
  "EnvironmentAutomationService.listTaskExecutions": {
    as: "cr",
    request: inEnvironment,
    make: async () => startTask(creator, await newTask(creator, world.environmentId, `task-${++made}`)),
  },
  "EventService.listAuditLogs": { make: one("preferenceId") },
  "RunnerService.listRunners": {
    make: one("runnerId"),
    remove: (runnerId) => admin.runners.deleteRunner({ runnerId, force: true }),
    key: ({ runnerId }) => runnerId,
  },
  "RunnerService.searchRepositories": { request: onRunner, isPending: true },
  "RunnerService.listSCMOrganizations": { request: onRunner, isPending: true },
  "RunnerService.listRunnerPolicies": {
    request: () => ({ runnerId: world.runnerId }),
    make: sharedGroup,
    remove: (groupId) => admin.runners.deleteRunnerPolicy({ runnerId: world.runnerId, groupId }),
    key: ({ groupId }) => groupId,
  },
  "RunnerConfigurationService.listHostAuthenticationTokens": {
    as: "cr",
    make: one("hostTokenId"),
    remove: (id) => creator.runnerConfiguration.deleteHostAuthenticationToken({ id }),
  },
  "RunnerConfigurationService.listSCMIntegrations": {
    make: one("integrationId"),
    remove: (id) => admin.runnerConfiguration.deleteSCMIntegration({ id }),
  },
  "AccountService.listSSOLogins": { request: () => ({ email: "somebody@example.org" }) },
  "AccountService.listLoginProviders": { key: ({ provider }) => provider },
  "AccountService.listJoinableOrganizations": { as: "cr", key: ({ organizationId }) => organizationId },
  "UserService.listPersonalAccessTokens": {
    as: "cr",
    make: one("tokenId"),
    remove: (personalAccessTokenId) => creator.users.deletePersonalAccessToken({ personalAccessTokenId }),
  },
  "UserService.listPreferences": {
    as: "cr",
    make: one("preferenceId"),
    remove: (userPreferenceId) => creator.users.deletePreference({ userPreferenceId }),
  },
  "GroupService.listGroups": {
    make: one("groupId"),
    remove: (groupId) => admin.groups.deleteGroup({ groupId }),
  },
  "GroupService.listMemberships": {
    request: () => ({ groupId: world.groupId }),
    make: one("membershipId"),
    remove: (membershipId) => admin.groups.deleteMembership({ membershipId }),
  },
  // With those that follow from roles on the organization, which come last.
  "GroupService.listRoleAssignments": {
    request: () => ({ filter: { resourceId: world.runnerId } }),
    make: one("assignmentId"),
    remove: (assignmentId) => admin.groups.deleteRoleAssignment({ assignmentId }),
  },
  "ServiceAccountService.listServiceAccounts": {
    make: one("serviceAccountId"),
    remove: (serviceAccountId) => admin.serviceAccounts.deleteServiceAccount({ serviceAccountId }),
  },
  "ServiceAccountService.listServiceAccountTokens": {
    as: "sa",
    make: one("serviceAccountTokenId"),
    remove: (serviceAccountTokenId) => admin.serviceAccounts.deleteServiceAccountToken({ serviceAccountTokenId }),
  },
  "ProjectService.listProjects": {
    as: "cr",
    make: one("projectId"),
    remove: (projectId) => creator.projects.deleteProject({ projectId }),
  },
  "ProjectService.listProjectPolicies": {
    request: () => ({ projectId: world.projectId }),
    make: async () => {
      const groupId = await sharedGroup();
      const policy = { projectId: world.projectId, groupId, role: ProjectRole.USER };
      await admin.projects.createProjectPolicy(policy);
    },
    remove: (groupId) => admin.projects.deleteProjectPolicy({ projectId: world.projectId, groupId }),
    key: ({ groupId }) => groupId,
  },
  // A list that is set as a whole.
  "ProjectService.listProjectEnvironmentClasses": {
    request: () => ({ projectId: world.projectId }),
    key: ({ order }) => String(order),
  },
  "SecretService.listSecrets": {
    as: "cr",
    make: one("userSecretId"),
    remove: (secretId) => creator.secrets.deleteSecret({ secretId }),
  },
  "EditorService.listEditors": {},
  "GatewayService.listGateways": { key: ({ name }) => name },
  "UsageService.getTopProjects": {
    as: "cr",
    request: () => ({ dateRange: { startTime: { seconds: yesterday }, endTime: { seconds: yesterday + 2n * DAY_S } } }),
    make: projectOfEnvironment,
    key: ({ projectId }) => projectId,
  },
  "OrganizationService.listMembers": {
    request: () => ({ organizationId: world.organizationId }),
    make: one("userId"),
    remove: (userId) => admin.users.deleteUser({ userId }),
    key: ({ userId }) => userId,
  },
  "OrganizationService.listSSOConfigurations": { request: onOrganization, isPending: true },
  "OrganizationService.listSCIMConfigurations": { isPending: true },
  "OrganizationService.listDomainVerifications": { request: onOrganization, isPending: true },
};

const GATEWAYS = Array.from({ length: ENTRIES }, (_each, index) => ({
  ...{ name: `gateway-${index}`, url: `https://gateway-${index}.example.org`, region: "" },
}));

beforeAll(async () => {
  plane = await startTestPlane({ BERTH_GATEWAYS: JSON.stringify(GATEWAYS) });
  transport = createConnectTransport({ baseUrl: plane.url, httpVersion: "1.1" });
  const own = await makeWorld(plane);
  ({ stage, world } = own);
  const all = await allCallers(stage, world, own.environmentToken);
  callers = new Map([...all].reverse().map((caller) => [caller.column, caller]));
  admin = plane.admin;
  creator = stage.creator.client;
  const offered = await Promise.all(Array.from({ length: ENTRIES }, () => refreshed(stage, world, ["classId"])));
  await offer(creator, world.projectId, world.classId, ...offered.map(({ classId }) => classId));
}, 180_000);

// Its lease is shorter than this file takes.
beforeEach(() => stage.runner.heartbeat());

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toContain('"code":"unknown"');
  await plane[Symbol.asyncDispose]();
});

/** Numbers that look random and are the same each time. */
function dice(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

const nameOf = ({ parent, localName }: DescMethod) => `${parent.name}.${localName}`;
const methods = services.flatMap((service) => service.methods.filter(({ input }) => input.field.pagination));

interface Page {
  keys: string[];
  nextToken: string;
}

/** The list of an answer. */
const entriesOf = ({ output }: DescMethod): DescField =>
  output.fields.find((field) => field.fieldKind === "list" && field.listKind === "message")!;

class Lister {
  readonly method: DescMethod;
  readonly #list: List;
  readonly #caller: Caller;

  constructor(method: DescMethod, list: List, caller = callers.get(list.as ?? "ad")!) {
    this.method = method;
    this.#list = list;
    this.#caller = caller;
  }

  request(pagination: { pageSize?: number; token?: string }): Message {
    return create(this.method.input, { ...this.#list.request?.(), pagination } as Record<string, unknown>);
  }

  async send(request: Message): Promise<Page> {
    const unary = this.method as DescMethodUnary;
    const { message } = await transport.unary(unary, undefined, TIMEOUT_MS, this.#caller.headers, request);
    const answer = message as Message & Record<string, unknown> & { pagination?: { nextToken: string } };
    const entries = answer[entriesOf(this.method).localName] as Entry[];
    const key = this.#list.key ?? (({ id }: Entry) => id);
    return { keys: entries.map(key), nextToken: answer.pagination?.nextToken ?? "" };
  }

  page(pageSize: number, token = ""): Promise<Page> {
    return this.send(this.request({ pageSize, token }));
  }

  async all(): Promise<string[]> {
    const keys: string[] = [];
    for (let token = ""; ; ) {
      const page = await this.page(100, token);
      keys.push(...page.keys);
      token = page.nextToken;
      if (!token) return keys;
    }
  }

  code(request: Message): Promise<string> {
    return this.send(request).then(
      () => "ok",
      (error: unknown) => Code[ConnectError.from(error).code] ?? "",
    );
  }
}

/** Walks a list while entries come and go; what was there all the time, and what was seen, in its order. */
async function walk(
  lister: Lister,
  { make, remove }: List,
  permanent: ReadonlySet<string>,
  roll: (below: number) => number,
) {
  const staying = new Set(await lister.all());
  const seen: string[] = [];
  const disturb = async () => {
    if (make && roll(2)) await make();
    const victim = [...staying].filter((key) => !permanent.has(key)).at(-1 - roll(staying.size));
    if (!remove || !roll(3) || victim === undefined) return;
    staying.delete(victim);
    await remove(victim);
  };
  for (let token = ""; ; ) {
    const size = 1 + roll(LARGEST_PAGE);
    const [page] = await Promise.all([lister.page(size, token), disturb()]);
    expect(page.keys.length).toBeLessThanOrEqual(size);
    // A token is there only if something follows it, at that moment.
    if (page.nextToken) expect(page.keys).toHaveLength(size);
    seen.push(...page.keys);
    token = page.nextToken;
    if (!token) return { staying, seen };
  }
}

test("every list is known", () => {
  expect(Object.keys(LISTS).sort()).toEqual(methods.map(nameOf).sort());
});

const isPending = (method: DescMethod) => LISTS[nameOf(method)]?.isPending === true;

test.each(methods.filter(isPending).map((method) => [nameOf(method), method] as const))(
  "%s is not built yet",
  async (name, method) => {
    const lister = new Lister(method, LISTS[name]!);
    expect(await lister.code(lister.request({}))).toBe("Unimplemented");
  },
);

describe.each(methods.filter((method) => !isPending(method)).map((method) => [nameOf(method), method] as const))(
  "%s",
  (name, method) => {
    const list = LISTS[name]!;
    /** What the rest of the test needs. */
    let permanent: ReadonlySet<string>;

    beforeAll(async () => {
      permanent = new Set(await new Lister(method, list).all());
      for (let index = 0; list.make && index < ENTRIES; index += 1) await list.make();
    }, 120_000);

    test("a walk misses nothing and repeats nothing, whatever comes and goes", async () => {
      const lister = new Lister(method, list);
      const roll = dice(SEED);
      for (let count = 0; count < WALKS; count += 1) {
        const { staying, seen } = await walk(lister, list, permanent, roll);
        expect(new Set(seen).size).toBe(seen.length);
        expect([...staying].filter((key) => !seen.includes(key))).toEqual([]);
      }
    });

    test("pages add up to the list, in its order; 0 is 25, and more than 100 is refused", async () => {
      const lister = new Lister(method, list);
      // What has been made a moment ago may come into the list by itself: a project does with its first second.
      const { whole, first } = await eventually(async () => {
        const [whole, first] = [await lister.all(), await lister.page(0)];
        return isDeepStrictEqual(first.keys, whole.slice(0, 25)) && { whole, first };
      }, "a list that is its pages");
      expect(first.nextToken !== "").toBe(whole.length > 25);
      for (const size of [101, -1, 2 ** 31 - 1])
        expect(await lister.code(lister.request({ pageSize: size }))).toBe("InvalidArgument");
    });

    test("a token belongs to its list, its caller and its filter", async () => {
      const lister = new Lister(method, list);
      const { nextToken: token } = await lister.page(1);
      if (!token) return;
      const request = lister.request({ pageSize: 1, token });
      expect(await lister.code(request)).toBe("ok");
      for (const other of [`${token}x`, `x${token}`, token.slice(1), "x", token.toUpperCase(), "\u0000"])
        expect(await lister.code(lister.request({ token: other })), other).toBe("InvalidArgument");
      const isPublic = (await new Lister(method, list, callers.get("no")).code(request)) === "ok";
      const stranger = new Lister(method, list, callers.get(list.as === "cr" ? "ad" : "cr"));
      if (!isPublic) expect(await stranger.code(request)).toMatch(/InvalidArgument|PermissionDenied/);
      const filter = idFields(method.input).findLast(([field]) => field?.name === "filter");
      if (filter)
        expect(await lister.code(withId(method.input, request, filter, world.userId, {}))).toBe("InvalidArgument");
    });
  },
);
