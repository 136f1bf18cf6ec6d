import { execFile } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../../src/client.ts";
import { type GitServer, startGitServer } from "../../test/harness/git-server.ts";
import { startInstallation } from "../../test/harness/installation.ts";
import { eventually } from "../../test/harness/wait.ts";
import type { Bench } from "../bench.ts";
import { interleaved, interleavedWarm, medianOf, percentile, type Rounds, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";

const run = promisify(execFile);

const DEADLINE_MS = 300_000;
const FILES = 40;
// Long enough for the runner to have made ready what the next environment needs.
const IDLE_MS = 3_000;
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

interface Started {
  /** From the request to RUNNING. */
  ms: number;
  /** Until the request was answered. */
  creationMs: number;
  id: string;
}

async function createToRunning(client: BerthClient, classId: string, remoteUri: string): Promise<Started> {
  const from = performance.now();
  const id = await create(client, classId, remoteUri);
  const creationMs = performance.now() - from;
  await reach(client, id, EnvironmentPhase.RUNNING);
  return { ms: performance.now() - from, creationMs, id };
}

/** One on a runner that has had nothing to start for a while, and another one right after it. */
async function twoToRunning(client: BerthClient, classId: string, remoteUri: string) {
  await delay(IDLE_MS);
  const first = await createToRunning(client, classId, remoteUri);
  const second = await createToRunning(client, classId, remoteUri);
  for (const { id } of [first, second]) await remove(client, id);
  return { first: first.ms, second: second.ms };
}

/** Many at once; from the first request until the last of them runs. */
async function manyToRunning(client: BerthClient, classId: string, remoteUri: string, count: number) {
  const from = performance.now();
  const each = Array.from({ length: count }, () => createToRunning(client, classId, remoteUri));
  // One that is refused spoils the measurement.
  const started = await Promise.all(each);
  const ms = performance.now() - from;
  await Promise.all(started.map(({ id }) => remove(client, id)));
  return { ms, creations: started.map(({ creationMs }) => creationMs) };
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
  const singles = await interleavedWarm<"floor" | "running", { first: number; second: number }>(bench.rounds, {
    floor: async () => {
      const ms = await cloneAndStart(git, "project");
      return { first: ms, second: ms };
    },
    running: () => twoToRunning(client, classId, git.url("project")),
  });
  const { organizationId } = await client.identity.getAuthenticatedIdentity({});
  const unlimited = { maximumRunningEnvironmentsPerUser: 0n, maximumEnvironmentsPerUser: 0n };
  await client.organizations.updateOrganizationPolicies({ organizationId, ...unlimited });
  const count = bench.quick ? QUICK_MANY : MANY;
  const many = await interleaved<"floor" | "running", { ms: number; creations: number[] }>(2, {
    floor: async () => ({ ms: await cloneAndStart(git, "project", count), creations: [] }),
    running: () => manyToRunning(client, classId, git.url("project"), count),
  });
  const creations = many.running.flatMap((each) => each.creations);
  const single = (which: "first" | "second") => (each: { first: number; second: number }) => each[which];
  return [
    {
      operation: "create to RUNNING, small repository, idle runner",
      ...inMs(singles, single("first")),
      goal: { bound: "<=", value: 1.5 },
      note: "floor: git clone, then one process of Node",
    },
    { operation: "- the best of the rounds", ...bestInMs(singles, single("first")), goal: { bound: "<=", value: 1.5 } },
    { operation: "- right after another one", ...inMs(singles, single("second")) },
    {
      operation: `create to RUNNING, ${count} at once until the last`,
      ...inMs(many, ({ ms }) => ms),
      note: "floor: as many clones, each followed by a process of Node, at once",
    },
    { operation: "- CreateEnvironment meanwhile, p50", unit: "ms", figure: percentile(creations, 50) },
    { operation: "- CreateEnvironment meanwhile, p99", unit: "ms", figure: percentile(creations, 99) },
  ];
}

function inMs<T>({ floor, running }: Rounds<"floor" | "running", T>, value: (each: T) => number) {
  const [figures, floors] = [running.map(value), floor.map(value)];
  const ratio = ratioOf(figures, floors, Number);
  return { unit: "ms" as const, floor: medianOf(floors, Number), figure: medianOf(figures, Number), ratio };
}

/** What other work of the machine disturbs least. */
function bestInMs<T>({ floor, running }: Rounds<"floor" | "running", T>, value: (each: T) => number) {
  const [figure, best] = [Math.min(...running.map(value)), Math.min(...floor.map(value))];
  return { unit: "ms" as const, floor: best, figure, ratio: figure / best };
}
