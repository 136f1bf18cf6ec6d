import { execFile } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../../src/client.ts";
import { type GitServer, startGitServer } from "../../test/harness/git-server.ts";
import { startInstallation } from "../../test/harness/installation.ts";
import { eventually } from "../../test/harness/wait.ts";
import type { Bench } from "../bench.ts";
import { interleaved, medianOf, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";

const run = promisify(execFile);

const DEADLINE_MS = 300_000;
const FILES = 40;
const MANY = 50;
const QUICK_MANY = 20;

async function isIn(client: BerthClient, environmentId: string, phase: EnvironmentPhase): Promise<boolean> {
  const { environment } = await client.environments.getEnvironment({ environmentId });
  const failures = environment?.status?.failureMessage ?? [];
  if (failures.length) throw new Error(failures.join("; "));
  return environment?.status?.phase === phase;
}

/** Reads once, then again at every event, as clients do. */
async function reach(client: BerthClient, environmentId: string, phase: EnvironmentPhase): Promise<void> {
  // A stream that is merely left stays open, and a caller may have 50.
  const left = new AbortController();
  const signal = AbortSignal.any([left.signal, AbortSignal.timeout(DEADLINE_MS)]);
  const scope = { case: "environmentId" as const, value: environmentId };
  try {
    for await (const _event of client.events.watchEvents({ scope }, { signal }))
      if (await isIn(client, environmentId, phase)) return;
  } finally {
    left.abort();
  }
}

async function create(client: BerthClient, classId: string, remoteUri: string): Promise<string> {
  const initializer = { specs: [{ spec: { case: "git" as const, value: { remoteUri } } }] };
  const { environment } = await client.environments.createEnvironment({
    spec: { machine: { class: classId }, content: { initializer } },
  });
  return environment?.id ?? "";
}

async function remove(client: BerthClient, environmentId: string): Promise<void> {
  await client.environments.deleteEnvironment({ environmentId });
  await reach(client, environmentId, EnvironmentPhase.DELETED);
}

async function createToRunning(client: BerthClient, classId: string, remoteUri: string): Promise<number> {
  const from = performance.now();
  const id = await create(client, classId, remoteUri);
  await reach(client, id, EnvironmentPhase.RUNNING);
  const ms = performance.now() - from;
  await remove(client, id);
  return ms;
}

/** Many at once; from the first request until the last of them runs. */
async function manyToRunning(client: BerthClient, classId: string, remoteUri: string, count: number): Promise<number> {
  const from = performance.now();
  const each = Array.from({ length: count }, async () => {
    // A server whose machine is busy with the others may ask to try again.
    const id = await eventually(() => create(client, classId, remoteUri), "a creation", DEADLINE_MS);
    await reach(client, id, EnvironmentPhase.RUNNING);
    return id;
  });
  const ids = await Promise.all(each);
  const ms = performance.now() - from;
  await Promise.all(ids.map((id) => remove(client, id)));
  return ms;
}

async function cloneAndStart(git: GitServer, name: string, count = 1): Promise<number> {
  const folder = await mkdtemp(join(tmpdir(), "berth-clone-"));
  try {
    const from = performance.now();
    const each = Array.from({ length: count }, async (_each, index) => {
      await run("git", ["clone", "--quiet", git.url(name), join(folder, `checkout-${index}`)]);
      await run(process.execPath, ["-e", "0"]);
    });
    await Promise.all(each);
    return performance.now() - from;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** From CreateEnvironment to RUNNING, with a small repository on this machine and the shipped runner. */
export async function environment(bench: Bench): Promise<Row[]> {
  const git = await startGitServer();
  bench.after(() => git.close());
  const files = Array.from({ length: FILES }, (_each, index) => [
    `src/file-${index}.txt`,
    `line ${index}\n`.repeat(50),
  ]);
  await git.createRepository("project", { files: Object.fromEntries(files) });
  const berth = await startInstallation({
    BERTH_SCM_ALLOW_HOSTS: git.host,
    BERTH_GIT_SCHEMES: "http",
    BERTH_LOG_LEVEL: "error",
    BERTH_RUNNER_MAX_ENVIRONMENTS: String(MANY),
  });
  bench.after(async () => berth[Symbol.asyncDispose]());
  const client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  const classId = await eventually(async () => {
    const filter = { canCreateEnvironments: true };
    return (await client.environments.listEnvironmentClasses({ filter })).environmentClasses[0]?.id;
  }, "a usable class");
  const rounds = await interleaved<"floor" | "running", number>(bench.rounds, {
    floor: () => cloneAndStart(git, "project"),
    running: () => createToRunning(client, classId, git.url("project")),
  });
  const { organizationId } = await client.identity.getAuthenticatedIdentity({});
  const unlimited = { maximumRunningEnvironmentsPerUser: 0n, maximumEnvironmentsPerUser: 0n };
  await client.organizations.updateOrganizationPolicies({ organizationId, ...unlimited });
  const count = bench.quick ? QUICK_MANY : MANY;
  const many = await interleaved<"floor" | "running", number>(2, {
    floor: () => cloneAndStart(git, "project", count),
    running: () => manyToRunning(client, classId, git.url("project"), count),
  });
  return [
    {
      operation: "create to RUNNING, small repository",
      ...{ unit: "ms", floor: medianOf(rounds.floor, Number), figure: medianOf(rounds.running, Number) },
      ratio: ratioOf(rounds.running, rounds.floor, Number),
      note: "floor: git clone, then one process of Node",
    },
    {
      operation: `create to RUNNING, ${count} at once until the last`,
      ...{ unit: "ms", floor: medianOf(many.floor, Number), figure: medianOf(many.running, Number) },
      ratio: ratioOf(many.running, many.floor, Number),
      note: "floor: as many clones, each followed by a process of Node, at once",
    },
  ];
}
