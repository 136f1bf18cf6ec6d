import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { chmod, mkdtemp, rm } from "node:fs/promises";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import {
  createEnvironment,
  getEnvironment,
  isGone,
  operations,
  processesOf,
  reaches,
  sweepUp,
} from "./harness/environments.ts";
import { freePort } from "./harness/free-port.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { createDatabase, type Program, startProgram, type TestDatabase } from "./harness/program.ts";
import { type StandAloneRunner, startStandAloneRunner } from "./harness/stand-alone-runner.ts";
import { eventually } from "./harness/wait.ts";

// Two control planes on one database, as processes, and a runner that reaches whichever of them it is let to.

const SEEN_WITHIN_MS = 2_000;

/** A TCP proxy whose backend can be exchanged, as a load balancer does it. */
interface Proxy {
  port: number;
  /** Connections of before are cut; without a port new ones are refused. */
  pointTo(port: number | undefined): void;
  /** How many connections it has passed on to the present backend. */
  passed(): number;
  close(): Promise<void>;
}

async function startProxy(): Promise<Proxy> {
  const open = new Set<Socket>();
  let backend: number | undefined;
  let passed = 0;
  const server = createServer((incoming) => {
    incoming.on("error", () => undefined);
    if (backend === undefined) return incoming.destroy();
    passed += 1;
    const outgoing = connect(backend, "127.0.0.1");
    for (const [socket, other] of [
      [incoming, outgoing],
      [outgoing, incoming],
    ] as const) {
      open.add(socket);
      socket.on("error", () => undefined);
      socket.once("close", () => {
        open.delete(socket);
        other.destroy();
      });
      socket.pipe(other);
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const cut = () => {
    for (const socket of open) socket.destroy();
  };
  return {
    port: (server.address() as AddressInfo).port,
    pointTo(port) {
      backend = port;
      passed = 0;
      cut();
    },
    passed: () => passed,
    async close() {
      cut();
      server.close();
      await once(server, "close");
    },
  };
}

interface Replica {
  program: Program;
  port: number;
  url: string;
}

let folder: string;
let database: TestDatabase;
let git: GitServer;
let proxy: Proxy;
let replicas: readonly [Replica, Replica];
let runner: StandAloneRunner;
let token: string;

const runnerData = () => join(folder, "runner");
const client = ({ url }: Replica) => createBerthClient({ baseUrl: url, token });

async function startReplica(name: string, masterKey: string): Promise<Replica> {
  const port = await freePort();
  const program = startProgram([], {
    BERTH_DATA_DIR: join(folder, name),
    BERTH_PORT: String(port),
    BERTH_RUNNER: "off",
    BERTH_SCM_FALLBACK: "off",
    BERTH_GIT_SCHEMES: "http",
    BERTH_RATE_LIMIT: "0",
    BERTH_MASTER_KEY: masterKey,
    DATABASE_URL: database.url,
  });
  return { program, port, url: `http://127.0.0.1:${port}` };
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-replicas-"));
  // Users of environments must be able to pass.
  await chmod(folder, 0o711);
  git = await startGitServer();
  await git.createRepository("project");
  proxy = await startProxy();
  database = await createDatabase({ migrated: false });
  const masterKey = randomBytes(32).toString("base64");
  replicas = await Promise.all([startReplica("a", masterKey), startReplica("b", masterKey)]);
  await Promise.all(replicas.map(({ program }) => program.says("berth is ready")));
});

afterAll(async () => {
  await runner?.kill();
  for (const replica of replicas ?? []) await replica.program[Symbol.asyncDispose]();
  await proxy?.close();
  await git?.close();
  await database?.[Symbol.asyncDispose]();
  await sweepUp(runnerData());
  await rm(folder, { recursive: true, force: true });
});

test("PLT-1 two processes that start together on an empty database make one organization and print one token", async () => {
  const printed = replicas.flatMap(({ program }) => program.output().match(/berth_pat_\w{49}/g) ?? []);
  expect(new Set(printed).size).toBe(1);
  [token = ""] = printed;
  const [first, second] = await Promise.all(
    replicas.map((replica) => client(replica).identity.getAuthenticatedIdentity({})),
  );
  expect(second).toEqual(first);
  const [count] = await database.db.point`select
    (select count(*)::int from organizations) as organizations,
    (select count(*)::int from users) as users,
    (select array_agg(name order by name) from groups) as groups,
    (select count(*)::int from tokens) as tokens`;
  expect(count).toEqual({ organizations: 1, users: 1, groups: ["org-admins", "org-members"], tokens: 1 });
});

describe("one runner behind two replicas", () => {
  let a: BerthClient;
  let b: BerthClient;
  let classId: string;
  let runnerId: string;

  beforeAll(async () => {
    const [first, second] = replicas;
    [a, b] = [client(first), client(second)];
    proxy.pointTo(first.port);
    // Behind the proxy.
    runner = await startStandAloneRunner(a, `http://127.0.0.1:${proxy.port}`, runnerData(), {
      BERTH_SCM_ALLOW_HOSTS: git.host,
      BERTH_GIT_SCHEMES: "http",
    });
    ({ runnerId, classId } = runner);
  });

  test("a change made through one replica is seen by a stream of the other within two seconds, both ways", async () => {
    for (const [writer, reader] of [
      [a, b],
      [b, a],
    ] as const) {
      const ended = new AbortController();
      const opening = [{ resourceType: ResourceType.RUNNER, resourceIds: [runnerId] }];
      const filters = [...opening, { resourceType: ResourceType.ENVIRONMENT_CLASS }];
      const request = { scope: { case: "organization" as const, value: true }, resourceTypeFilters: filters };
      const stream = reader.events.watchEvents(request, { signal: ended.signal })[Symbol.asyncIterator]();
      // The named resource opens the stream: from now on nothing may be missed.
      expect((await stream.next()).value?.resourceId).toBe(runnerId);
      const changedAt = performance.now();
      await writer.runnerConfiguration.updateEnvironmentClass({
        environmentClassId: classId,
        description: `Changed at ${changedAt}`,
      });
      for (let seen = ""; seen !== classId; ) seen = (await stream.next()).value?.resourceId ?? "";
      expect(performance.now() - changedAt).toBeLessThan(SEEN_WITHIN_MS);
      const { environmentClass } = await reader.runnerConfiguration.getEnvironmentClass({
        environmentClassId: classId,
      });
      expect(environmentClass?.description).toBe(`Changed at ${changedAt}`);
      ended.abort();
    }
  });

  test("a runner connected to one replica realises and answers what the other is asked", async () => {
    const parsed = await b.runners.parseContextURL({ runnerId, contextUrl: git.url("project") });
    expect(parsed.git?.cloneUrl).toBe(git.url("project"));
    const id = await createEnvironment(b, classId, git.url("project"));
    // What the runner reports to one arrives in a stream of the other, which nobody has to ask twice.
    const seen = new AbortController();
    const signal = AbortSignal.any([seen.signal, AbortSignal.timeout(30_000)]);
    const scope = { case: "environmentId" as const, value: id };
    const told: EnvironmentPhase[] = [];
    for await (const { resourceId } of b.events.watchEvents({ scope }, { signal })) {
      if (resourceId === id) told.push((await getEnvironment(b, id)).status?.phase ?? EnvironmentPhase.UNSPECIFIED);
      if (told.at(-1) === EnvironmentPhase.RUNNING) break;
    }
    seen.abort();
    expect(told.at(-1)).toBe(EnvironmentPhase.RUNNING);
    const { exitCode, stdout } = await (await operations(b, id)).exec({ command: "cat README.md" });
    expect([exitCode, stdout]).toEqual([0, "# project\n"]);
    await b.environments.deleteEnvironment({ environmentId: id });
    await reaches(a, id, EnvironmentPhase.DELETED);
    await isGone(runnerData(), id);
    expect(proxy.passed()).toBeGreaterThan(0);
  });

  test("RUN-17 the replica of a runner is killed: it goes on at the other, loses nothing and stays ACTIVE", async () => {
    const [first, second] = replicas;
    const [steady, stopping, deleted] = (await Promise.all(
      [1, 2, 3].map(() => createEnvironment(a, classId, git.url("project"))),
    )) as [string, string, string];
    for (const id of [steady, stopping, deleted]) await reaches(a, id, EnvironmentPhase.RUNNING);
    const before = await getEnvironment(b, steady);
    const processesBefore = await processesOf(steady);

    const watching = new AbortController();
    const phases: RunnerPhase[] = [];
    const readPhase = async () => {
      const { runner: read } = await b.runners.getRunner({ runnerId });
      phases.push(read?.status?.phase ?? RunnerPhase.UNSPECIFIED);
      return read;
    };
    const filters = [{ resourceType: ResourceType.RUNNER, resourceIds: [runnerId] }];
    const request = { scope: { case: "organization" as const, value: true }, resourceTypeFilters: filters };
    const watched = (async () => {
      const stream = b.events.watchEvents(request, { signal: watching.signal });
      for await (const event of stream) if (event.resourceId === runnerId) await readPhase();
    })().catch((error: unknown) => {
      if (!watching.signal.aborted) throw error;
    });
    await eventually(() => phases.length > 0, "the stream is open");

    proxy.pointTo(undefined);
    await first.program[Symbol.asyncDispose]();
    const killedAt = Date.now();
    // While the runner can reach nobody.
    const created = await createEnvironment(b, classId, git.url("project"));
    await b.environments.stopEnvironment({ environmentId: stopping });
    await b.environments.deleteEnvironment({ environmentId: deleted });
    proxy.pointTo(second.port);

    await reaches(b, created, EnvironmentPhase.RUNNING);
    await reaches(b, stopping, EnvironmentPhase.STOPPED);
    await reaches(b, deleted, EnvironmentPhase.DELETED);
    await isGone(runnerData(), deleted);
    expect(await processesOf(stopping)).toEqual([]);
    const heard = await eventually(async () => {
      const { status } = (await readPhase()) ?? {};
      return status?.updatedAt && timestampMs(status.updatedAt) > killedAt && status;
    }, "a heartbeat reaches the other replica");
    expect(heard.phase).toBe(RunnerPhase.ACTIVE);

    const after = await getEnvironment(b, steady);
    expect(after.status?.phase).toBe(EnvironmentPhase.RUNNING);
    expect(after.status?.machine?.session).toBe(before.status?.machine?.session);
    expect(await processesOf(steady)).toEqual(processesBefore);
    expect(runner.output().split("registered with the control plane")).toHaveLength(2);
    watching.abort();
    await watched;
    expect(new Set(phases)).toEqual(new Set([RunnerPhase.ACTIVE]));

    for (const id of [steady, stopping, created]) await b.environments.deleteEnvironment({ environmentId: id });
    for (const id of [steady, stopping, created]) await isGone(runnerData(), id);
    expect(await runner.stop()).toBe(0);
    second.program.send("SIGTERM");
    expect(await second.program.ended()).toBe(0);
  });
});
