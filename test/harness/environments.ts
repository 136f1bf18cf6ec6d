import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { type Environment, EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createOpsClient } from "../../src/client.ts";
import { environmentPaths } from "../../src/runner/paths.ts";
import { readRecord } from "../../src/runner/record.ts";
import { removeScratch } from "../../src/runner/sandbox/sandbox.ts";
import {
  environmentProcesses,
  killEnvironmentProcesses,
  type ProcessRef,
} from "../../src/runner/supervisor/processes.ts";
import { removeUser } from "../../src/runner/users.ts";
import { eventually } from "./wait.ts";

// What tests of whole installations ask about environments: through the API, and of the host.

const DEADLINE_MS = 60_000;
// Looking costs time on both sides that the environments could use.
const STEP_MS = 100;

/** Creates an environment with a clone of a repository; resolves with its id once the control plane has acknowledged it. */
export async function createEnvironment(client: BerthClient, classId: string, remoteUri: string): Promise<string> {
  const { environment } = await client.environments.createEnvironment({
    spec: {
      machine: { class: classId },
      content: { initializer: { specs: [{ spec: { case: "git", value: { remoteUri } } }] } },
    },
  });
  return environment?.id ?? "";
}

/** A class that environments can be created with. */
export function usableClass(client: BerthClient, runnerId?: string): Promise<string> {
  return eventually(async () => {
    const { environmentClasses } = await client.environments.listEnvironmentClasses({
      filter: { canCreateEnvironments: true, runnerIds: runnerId ? [runnerId] : [] },
    });
    return environmentClasses[0]?.id;
  }, "a usable class");
}

export async function getEnvironment(client: BerthClient, environmentId: string): Promise<Environment> {
  const { environment } = await client.environments.getEnvironment({ environmentId }, { timeoutMs: 5_000 });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

/** Waits for a phase; an outage of the control plane meanwhile does not matter, a failure of the environment does. */
export async function reaches(
  client: BerthClient,
  environmentId: string,
  phase: EnvironmentPhase,
): Promise<Environment> {
  const find = async () => {
    const environment = await getEnvironment(client, environmentId);
    const { status } = environment;
    if (status?.phase === phase || status?.failureMessage.length) return environment;
    throw new Error(`it is ${EnvironmentPhase[status?.phase ?? 0]}`);
  };
  const found = await eventually(
    find,
    `environment ${environmentId} is ${EnvironmentPhase[phase]}`,
    DEADLINE_MS,
    STEP_MS,
  );
  if (found.status?.phase !== phase || found.status.failureMessage.length > 0) {
    throw new Error(`environment ${environmentId} has failed: ${found.status?.failureMessage.join("; ")}`);
  }
  return found;
}

/** The operations of a running environment, with a token of its own. */
export async function operations(client: BerthClient, environmentId: string) {
  const { status } = await getEnvironment(client, environmentId);
  const { accessToken } = await client.environments.createEnvironmentAccessToken({ environmentId });
  return createOpsClient({ opsUrl: status?.environmentUrls?.ops ?? "", token: accessToken });
}

export type Operations = Awaited<ReturnType<typeof operations>>;

/** Processes of an environment, the oldest first: those with its mark, and as root those of its user. */
export async function processesOf(environmentId: string): Promise<ProcessRef[]> {
  const marked = await environmentProcesses({ environmentId });
  const uid = await userIdOf(environmentId);
  const owned = uid === undefined ? [] : await environmentProcesses({ environmentId, uid });
  return [...new Map([...marked, ...owned].map((each) => [each.pid, each])).values()]
    .map(({ pid, startTime }) => ({ pid, startTime }))
    .sort((left, right) => left.startTime - right.startTime);
}

async function userIdOf(environmentId: string): Promise<number | undefined> {
  const lines = (await readFile("/etc/passwd", "utf8")).split("\n");
  const fields = lines.map((line) => line.split(":")).find((each) => each[4] === `berth environment ${environmentId}`);
  return fields && process.getuid?.() === 0 ? Number(fields[2]) : undefined;
}

/** The process that serves an environment. */
export async function supervisorOf(runnerDataDir: string, environmentId: string): Promise<{ pid: number }> {
  const root = join(runnerDataDir, "environments", environmentId);
  const { supervisor } = (await readRecord({ root, record: join(root, "state.json") })) ?? {};
  if (!supervisor) throw new Error("there is no supervisor");
  return supervisor;
}

/** Pids of supervisors of root's runner that have loaded their program and are to be told their environment. */
export async function waitingSupervisors(runnerDataDir: string): Promise<number[]> {
  const pids = (await readdir("/proc")).filter((name) => /^\d+$/.test(name));
  const read = (pid: string, file: string) => readFile(`/proc/${pid}/${file}`, "latin1").catch(() => "");
  const isOne = async (pid: string) =>
    (await read(pid, "cmdline")).endsWith("main.ts\0--wait\0") &&
    (await read(pid, "environ")).includes(runnerDataDir) &&
    (await read(pid, "status")).includes("\nUid:\t0\t");
  const found = await Promise.all(pids.map(async (pid) => ((await isOne(pid)) ? [Number(pid)] : [])));
  return found.flat();
}

/** Kills every process of an environment without warning: those with its mark, and those of its user. */
export async function killProcessesOf(environmentId: string): Promise<void> {
  const uid = await userIdOf(environmentId);
  // At once: a supervisor may show by its user alone whose it is, and would see the others die.
  if (uid !== undefined) await killEnvironmentProcesses({ environmentId, uid });
  await killEnvironmentProcesses({ environmentId });
}

/** Waits until nothing of an environment is left on the host: no folder, no user, no process. */
export async function isGone(runnerDataDir: string, environmentId: string): Promise<void> {
  const what = `nothing is left of ${environmentId}`;
  await eventually(
    async () => {
      for (const part of ["environments", "trash", "quarantine"]) {
        const names = await readdir(join(runnerDataDir, part)).catch(() => []);
        if (names.some((name) => name.startsWith(environmentId))) throw new Error(`it is in ${part}`);
      }
      if ((await userIdOf(environmentId)) !== undefined) throw new Error("it has a user");
      const processes = await processesOf(environmentId);
      if (processes.length > 0) throw new Error(`it has ${processes.length} processes`);
      return true;
    },
    what,
    DEADLINE_MS,
    STEP_MS,
  );
}

/** Ends and removes what the runner of a failed test has left behind; the runner itself must have ended. */
export async function sweepUp(runnerDataDir: string): Promise<void> {
  for (const part of ["environments", "trash", "quarantine"]) {
    for (const name of await readdir(join(runnerDataDir, part)).catch(() => [])) {
      const environmentId = name.split(".")[0] ?? "";
      const root = join(runnerDataDir, part, name);
      const { user } = (await readRecord({ root, record: join(root, "state.json") })) ?? {};
      await killEnvironmentProcesses({ environmentId });
      if (user?.own) await killEnvironmentProcesses({ environmentId, uid: user.uid });
      await removeUser(environmentId, user);
      await removeScratch(environmentPaths(runnerDataDir, environmentId));
    }
  }
}
