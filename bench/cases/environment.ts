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

const DEADLINE_MS = 60_000;
const FILES = 40;

/** Reads once, then again at every event, as clients do. */
async function reach(client: BerthClient, environmentId: string, phase: EnvironmentPhase): Promise<void> {
  const read = async () => {
    const { environment } = await client.environments.getEnvironment({ environmentId });
    const failures = environment?.status?.failureMessage ?? [];
    if (failures.length) throw new Error(failures.join("; "));
    return environment?.status?.phase === phase;
  };
  const signal = AbortSignal.timeout(DEADLINE_MS);
  const scope = { case: "environmentId" as const, value: environmentId };
  for await (const _event of client.events.watchEvents({ scope }, { signal })) if (await read()) return;
}

async function createToRunning(client: BerthClient, classId: string, remoteUri: string): Promise<number> {
  const initializer = { specs: [{ spec: { case: "git" as const, value: { remoteUri } } }] };
  const from = performance.now();
  const { environment } = await client.environments.createEnvironment({
    spec: { machine: { class: classId }, content: { initializer } },
  });
  const id = environment?.id ?? "";
  await reach(client, id, EnvironmentPhase.RUNNING);
  const ms = performance.now() - from;
  await client.environments.deleteEnvironment({ environmentId: id });
  await reach(client, id, EnvironmentPhase.DELETED);
  return ms;
}

async function cloneAndStart(git: GitServer, name: string): Promise<number> {
  const folder = await mkdtemp(join(tmpdir(), "berth-clone-"));
  try {
    const from = performance.now();
    await run("git", ["clone", "--quiet", git.url(name), join(folder, "checkout")]);
    await run(process.execPath, ["-e", "0"]);
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
  return [
    {
      operation: "create to RUNNING, small repository",
      ...{ unit: "ms", floor: medianOf(rounds.floor, Number), figure: medianOf(rounds.running, Number) },
      ratio: ratioOf(rounds.running, rounds.floor, Number),
      note: "floor: git clone, then one process of Node",
    },
  ];
}
