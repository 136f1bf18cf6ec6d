import { spawn } from "node:child_process";
import { once } from "node:events";
import { type TaskExecution, TaskExecutionPhase } from "../../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../../src/client.ts";
import { reaches, usableClass } from "../../test/harness/environments.ts";
import { startInstallation } from "../../test/harness/installation.ts";
import type { Bench } from "../bench.ts";
import { interleavedWarm, medianOf, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";

const COMMAND = "echo ready; sleep 0.2";
const DEADLINE_MS = 30_000;

interface Times {
  /** Milliseconds from the request to the first byte of output. */
  output: number;
  /** Milliseconds from the request to the end. */
  end: number;
}

async function bare(): Promise<Times> {
  const from = performance.now();
  const child = spawn("bash", ["-l", "-c", COMMAND], {
    // The profile of whoever measures is not what is measured.
    env: { PATH: process.env.PATH, HOME: "/nonexistent" },
    stdio: ["ignore", "pipe", "ignore"],
  });
  await once(child.stdout, "data");
  const output = performance.now() - from;
  await once(child, "exit");
  return { output, end: performance.now() - from };
}

interface Watched {
  client: BerthClient;
  environmentId: string;
  taskId: string;
  logsToken: string;
}

async function firstOutput(url: string, token: string): Promise<void> {
  const response = await fetch(url, { headers: { authorization: `Bearer ${token}` } });
  const reader = response.body?.getReader();
  await reader?.read();
  await reader?.cancel();
}

/** Starts a task and watches it as clients do: an event, then the object, then its log. */
async function asTask({ client, environmentId, taskId, logsToken }: Watched): Promise<Times> {
  const scope = { case: "environmentId" as const, value: environmentId };
  const leave = AbortSignal.timeout(DEADLINE_MS);
  const events = client.events.watchEvents({ scope }, { signal: leave })[Symbol.asyncIterator]();
  const first = events.next();
  const from = performance.now();
  const { taskExecution } = await client.environmentAutomation.startTask({ id: taskId });
  const id = taskExecution?.id ?? "";
  let output: Promise<number> | undefined;
  for (let next = await first; !next.done; next = await events.next()) {
    const { taskExecution: found } = await client.environmentAutomation.getTaskExecution({ id });
    const { logUrl = "", phase } = (found as TaskExecution).status ?? {};
    if (logUrl) output ??= firstOutput(logUrl, logsToken).then(() => performance.now() - from);
    if ((phase ?? 0) < TaskExecutionPhase.SUCCEEDED) continue;
    const end = performance.now() - from;
    await events.return?.();
    return { output: (await output) ?? Number.NaN, end };
  }
  throw new Error("the task has not ended in time");
}

/** From StartTask to what it prints and to its end, against the same command started by hand. */
export async function automation(bench: Bench): Promise<Row[]> {
  const berth = await startInstallation({ BERTH_LOG_LEVEL: "error" });
  bench.after(async () => berth[Symbol.asyncDispose]());
  const client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  const classId = await usableClass(client);
  const { environment } = await client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const environmentId = environment?.id ?? "";
  // Its processes would outlive the installation.
  bench.after(async () => {
    await client.environments.deleteEnvironment({ environmentId });
    await reaches(client, environmentId, EnvironmentPhase.DELETED);
  });
  await reaches(client, environmentId, EnvironmentPhase.RUNNING);
  const { task } = await client.environmentAutomation.createTask({
    ...{ environmentId, metadata: { reference: "bench", name: "bench" }, spec: { command: COMMAND } },
  });
  const { accessToken: logsToken } = await client.environments.createEnvironmentLogsToken({ environmentId });
  const watched = { client, environmentId, taskId: task?.id ?? "", logsToken };
  const rounds = await interleavedWarm<"floor" | "task", Times>(bench.rounds, {
    floor: bare,
    task: () => asTask(watched),
  });
  const row = (operation: string, value: (times: Times) => number): Row => ({
    ...{ operation, unit: "ms", floor: medianOf(rounds.floor, value), figure: medianOf(rounds.task, value) },
    ratio: ratioOf(rounds.task, rounds.floor, value),
    note: "floor: the same command, started by hand",
  });
  return [
    row("StartTask to first output", ({ output }) => output),
    row("StartTask to SUCCEEDED, 0.2 s of work", ({ end }) => end),
  ];
}
