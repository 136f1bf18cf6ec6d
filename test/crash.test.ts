import { randomUUID } from "node:crypto";
import { access, chmod, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { EnvironmentPhase, EnvironmentStatus_Machine_Phase as MachinePhase } from "../gen/gitpod/v1/environment_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { environmentPaths } from "../src/runner/paths.ts";
import { bootId, isAlive, type ProcessRef } from "../src/runner/supervisor/processes.ts";
import { liveSupervisor } from "../src/runner/supervisor/record.ts";
import {
  createEnvironment,
  getEnvironment,
  isGone,
  killProcessesOf,
  type Operations,
  operations,
  processesOf,
  reaches,
  sweepUp,
  usableClass,
} from "./harness/environments.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";

import { codeOf } from "./harness/refusal.ts";
import { type StandAloneRunner, startStandAloneRunner } from "./harness/stand-alone-runner.ts";
import { eventually } from "./harness/wait.ts";

// Everything that may die is killed without warning, each time with environments at every point of their life.

const LONG_COMMAND = { command: "exec sleep 1000", operationId: "long" };
// Outlives SIGTERM, so that a stop is still going on when something else is killed.
const STUBBORN = {
  command: "trap '' TERM; touch armed; while [ ! -e let-go ]; do sleep 0.1; done",
  operationId: "stubborn",
};
const encoder = new TextEncoder();
// Takes long enough to erase that the erasing can be seen.
const MANY_FILES = { command: "mkdir many && cd many && seq 3000 | xargs touch" };

let git: GitServer;
let berth: Installation;
let client: BerthClient;
let folder: string;
let runner: StandAloneRunner;
let classes: { embedded: string; alone: string };

const dataDirOf = (victim: Victim) =>
  victim.runner === "alone" ? join(folder, "runner") : join(berth.dataDir, "runner");

/** Supervisors of environments, as far as they have any. */
const supervisorsOf = (ids: readonly string[]) =>
  ids.flatMap((id) => liveSupervisor(environmentPaths(join(folder, "runner"), id).root) ?? []);

/** What is on the disk of the runner was written before the present boot. */
async function pretendReboot(): Promise<void> {
  const dataDir = join(folder, "runner");
  const names = await readdir(dataDir, { recursive: true });
  for (const name of names.filter((each) => /(^runner\.lock|state\.json|run\/exec\/\w+\.json)$/.test(each))) {
    const text = await readFile(join(dataDir, name), "utf8");
    await writeFile(join(dataDir, name), text.replaceAll(bootId(), randomUUID()));
  }
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-crash-"));
  // Users of environments must be able to pass.
  await chmod(folder, 0o711);
  git = await startGitServer();
  await git.createRepository("project", { files: { "README.md": "hello\n", "src/main.txt": "one\n" } });
  berth = await startInstallation({
    BERTH_SCM_ALLOW_HOSTS: git.host,
    BERTH_GIT_SCHEMES: "http",
    BERTH_RUNNER_MAX_ENVIRONMENTS: "20",
  });
  client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  const embedded = await usableClass(client);
  runner = await startStandAloneRunner(client, berth.url, join(folder, "runner"), {
    BERTH_SCM_ALLOW_HOSTS: git.host,
    BERTH_GIT_SCHEMES: "http",
  });
  classes = { embedded, alone: runner.classId };
});

afterAll(async () => {
  await runner?.kill();
  await berth?.terminate();
  await git?.close();
  for (const dataDir of [join(folder, "runner"), join(berth?.dataDir ?? folder, "runner")]) await sweepUp(dataDir);
  await berth?.[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
});

interface Victim {
  name: string;
  /** Which runner the environments are on. */
  runner: "embedded" | "alone";
  kill(environmentIds: readonly string[]): Promise<void>;
  restart(): Promise<void>;
  /** It keeps what was acknowledged. */
  remembers: boolean;
  /** It does the work on the host. */
  works: boolean;
  /** Processes of environments die with it. */
  takesProcesses: boolean;
}

async function postmaster(): Promise<number> {
  const text = await readFile(join(berth.dataDir, "postgres/data/postmaster.pid"), "utf8");
  return Number(text.split("\n")[0]);
}

const isUp = async () => (await fetch(`${berth.url}/readyz`)).status === 200;

const victims: Victim[] = [
  {
    name: "the server with its runner",
    runner: "embedded",
    kill: () => berth.kill(),
    restart: () => berth.start(),
    remembers: true,
    works: true,
    takesProcesses: false,
  },
  {
    name: "the server, while its runner goes on,",
    runner: "alone",
    kill: () => berth.kill(),
    restart: () => berth.start(),
    remembers: true,
    works: false,
    takesProcesses: false,
  },
  {
    name: "a runner that is alone",
    runner: "alone",
    async kill() {
      await runner.kill();
    },
    restart: () => runner.start(),
    remembers: false,
    works: true,
    takesProcesses: false,
  },
  {
    name: "every supervisor",
    runner: "alone",
    async kill(ids) {
      for (const { pid } of supervisorsOf(ids)) process.kill(pid, "SIGKILL");
    },
    restart: async () => undefined,
    remembers: false,
    works: true,
    takesProcesses: true,
  },
  {
    name: "the host, which starts again,",
    runner: "alone",
    async kill(ids) {
      await runner.kill();
      for (const id of ids) await killProcessesOf(id);
      await pretendReboot();
    },
    restart: () => runner.start(),
    remembers: false,
    works: true,
    takesProcesses: true,
  },
  {
    name: "the database",
    runner: "embedded",
    async kill() {
      const pid = await postmaster();
      process.kill(pid, "SIGKILL");
      await eventually(async () => !(await isUp()) || (await postmaster()) !== pid, "the database is gone");
    },
    // It comes back by itself.
    restart: async () => void (await eventually(isUp, "the server is ready")),
    remembers: true,
    works: false,
    takesProcesses: false,
  },
];

type Going = "steady" | "creating" | "starting" | "stopping" | "archiving" | "deleting" | "erasing";
/** An environment by what is going on with it at the moment of the crash, or by what is only acknowledged. */
type Name = Going | "created" | "stopped" | "deleted";

// Environments that the runner is bringing to an end.
const ENDING = ["stopping", "archiving", "deleting"] as const;

/** Starts a command that goes on; whoever waits for it is cut off when the runner dies. */
function goOn(ops: Operations, request: { command: string; operationId: string }): void {
  ops.exec(request).catch(() => undefined);
}

describe.each(victims)("$name is killed", { timeout: 120_000 }, (victim) => {
  const running: Name[] = ["steady", "starting", ...ENDING];
  if (victim.works) running.push("erasing");
  if (victim.remembers) running.push("stopped", "deleted");
  const ids = {} as Record<Name, string>;
  let before: { processes: ProcessRef[]; session: string };
  const paths = (name: Name) => environmentPaths(dataDirOf(victim), ids[name]);
  const create = async (name: Name) => {
    ids[name] = await createEnvironment(client, classes[victim.runner], git.url("project"));
  };
  const phasesOf = async (wanted: Partial<Record<Name, EnvironmentPhase>>) => {
    for (const [name, phase] of Object.entries(wanted)) await reaches(client, ids[name as Name], phase);
  };
  const inProject = (name: Name, file: string) => join(paths(name).workspace, "project", file);
  const id = (name: Name) => ({ environmentId: ids[name] });
  /** Supervisor and command; there may be an SSH server too, and git may be looking at the files for a moment. */
  const steadyProcesses = async (): Promise<ProcessRef[]> => {
    const supervisor = liveSupervisor(paths("steady").root)?.pid;
    const found: ProcessRef[] = [];
    for (const each of await processesOf(ids.steady)) {
      const command = await readFile(`/proc/${each.pid}/cmdline`, "latin1").catch(() => "");
      if (each.pid === supervisor || command.startsWith("sleep")) found.push(each);
    }
    return found;
  };
  const served = (name: Name) =>
    eventually(async () => {
      const found = await operations(client, ids[name]);
      return (await found.exec({ command: "true" })).exitCode === 0 && found;
    }, "its operations are served");

  // One crash at all moments at once: each environment is at another one.
  beforeAll(async () => {
    await Promise.all(running.map(create));
    for (const name of running) await reaches(client, ids[name], EnvironmentPhase.RUNNING);

    const steady = await operations(client, ids.steady);
    goOn(steady, LONG_COMMAND);
    for (const ops of [steady, await operations(client, ids.starting)]) {
      await ops.writeFile({ path: "work.txt", content: encoder.encode("precious") });
    }
    for (const name of ENDING) goOn(await operations(client, ids[name]), STUBBORN);
    await client.environments.stopEnvironment(id("starting"));
    if (victim.works) expect((await (await operations(client, ids.erasing)).exec(MANY_FILES)).exitCode).toBe(0);
    for (const name of ENDING) {
      await eventually(async () => {
        await access(inProject(name, "armed"));
        return true;
      }, "the command runs");
    }
    const processes = await eventually(async () => {
      const found = await steadyProcesses();
      return found.length === 2 && found;
    }, "supervisor and command run");
    before = { processes, session: (await getEnvironment(client, ids.steady)).status?.machine?.session ?? "" };

    await phasesOf({ starting: EnvironmentPhase.STOPPED });
    git.holdRequests();
    await create("creating");
    await git.held();
    await client.environments.stopEnvironment(id("stopping"));
    await client.environments.archiveEnvironment(id("archiving"));
    await client.environments.deleteEnvironment(id("deleting"));
    for (const name of ENDING) {
      await eventually(async () => {
        const { status } = await getEnvironment(client, ids[name]);
        return status?.phase === EnvironmentPhase.STOPPING && status.machine?.phase === MachinePhase.STOPPING;
      }, "the runner is stopping it");
    }
    if (victim.works) {
      await client.environments.deleteEnvironment(id("erasing"));
      await eventually(async () => {
        const phase = (await getEnvironment(client, ids.erasing)).status?.phase ?? 0;
        return phase >= EnvironmentPhase.DELETING;
      }, "the runner is erasing it");
    }
    if (victim.remembers) {
      await create("created");
      await client.environments.stopEnvironment(id("stopped"));
      await client.environments.deleteEnvironment(id("deleted"));
    }
    await client.environments.startEnvironment(id("starting"));
    await victim.kill(Object.values(ids));
    // One clone goes on while nobody looks after it, the others wait.
    if (victim.remembers && victim.works) git.release();
    if (!victim.takesProcesses) expect(before.processes.filter((each) => !isAlive(each))).toEqual([]);
    await victim.restart();
    git.release();
  }, 120_000);

  test("ENV-14 mid create: it runs with a whole checkout and nothing half beside it", async () => {
    await phasesOf({ creating: EnvironmentPhase.RUNNING });
    const { workspace } = paths("creating");
    expect(await readdir(workspace)).toEqual(["project"]);
    const ops = await operations(client, ids.creating);
    const { stdout, exitCode } = await ops.exec({
      command: "git status --porcelain --branch && git fsck --full && cat README.md src/main.txt",
    });
    expect([exitCode, stdout]).toEqual([0, "## main...origin/main\nhello\none\n"]);
  });

  if (victim.remembers)
    test("an acknowledged create, stop and deletion are carried out", async () => {
      await phasesOf({
        created: EnvironmentPhase.RUNNING,
        stopped: EnvironmentPhase.STOPPED,
        deleted: EnvironmentPhase.DELETED,
      });
      expect(await readdir(paths("created").workspace)).toEqual(["project"]);
      expect(await processesOf(ids.stopped)).toEqual([]);
      expect(await readFile(inProject("stopped", "README.md"), "utf8")).toBe("hello\n");
      await isGone(dataDirOf(victim), ids.deleted);
    });

  test("ENV-11 mid start: it runs, with what was in it, and nothing was cloned again", async () => {
    await phasesOf({ starting: EnvironmentPhase.RUNNING });
    expect(await readdir(paths("starting").workspace)).toEqual(["project"]);
    expect(await readFile(inProject("starting", "README.md"), "utf8")).toBe("hello\n");
    const ops = await served("starting");
    expect((await ops.exec({ command: "git status --porcelain; cat work.txt" })).stdout).toBe("?? work.txt\nprecious");
  });

  if (victim.takesProcesses)
    test("a running environment runs again, with its files and without its commands", async () => {
      await phasesOf({ steady: EnvironmentPhase.RUNNING });
      const ops = await served("steady");
      expect((await getEnvironment(client, ids.steady)).status?.machine?.session).toBe(before.session);
      expect(await codeOf(ops.exec(LONG_COMMAND))).toBe("Aborted");
      await eventually(() => before.processes.every((each) => !isAlive(each)), "what was lost has ended");
      expect((await ops.exec({ command: "cat work.txt" })).stdout).toBe("precious");
    });

  if (!victim.takesProcesses)
    test("a running environment goes on: same machine, same processes, same command", async () => {
      await phasesOf({ steady: EnvironmentPhase.RUNNING });
      const ops = await served("steady");
      await expect.poll(steadyProcesses, { timeout: 10_000 }).toEqual(before.processes);
      expect(liveSupervisor(paths("steady").root)?.pid).toBe(before.processes[0]?.pid);
      expect((await getEnvironment(client, ids.steady)).status?.machine?.session).toBe(before.session);
      const joined = ops.exec(LONG_COMMAND);
      await eventually(async () => {
        await ops.cancelExec({ operationId: LONG_COMMAND.operationId });
        return (await steadyProcesses()).length === 1;
      }, "the command has ended");
      // A command that was started anew, or lost, would say something else.
      expect((await joined).exitCode).toBe(130);
    });

  test("mid stop, mid archive and mid delete: it ends, no process is left, and only what is deleted has no files", async () => {
    for (const name of ENDING) {
      await writeFile(inProject(name, "let-go"), "").catch((error: NodeJS.ErrnoException) => {
        if (error.code !== "ENOENT") throw error;
      });
    }
    const { STOPPED, DELETED } = EnvironmentPhase;
    await phasesOf({ stopping: STOPPED, archiving: STOPPED, deleting: DELETED });
    expect((await getEnvironment(client, ids.archiving)).metadata?.archivedAt).toBeDefined();
    for (const name of ["stopping", "archiving"] as const) {
      expect(await processesOf(ids[name])).toEqual([]);
      expect(await readFile(inProject(name, "README.md"), "utf8")).toBe("hello\n");
    }
    await isGone(dataDirOf(victim), ids.deleting);
  });

  if (victim.works)
    test("mid erase: nothing of it is left", async () => {
      await phasesOf({ erasing: EnvironmentPhase.DELETED });
      await isGone(dataDirOf(victim), ids.erasing);
    });

  afterAll(async () => {
    git.release();
    const left = Object.values(ids);
    for (const environmentId of left) await client.environments.deleteEnvironment({ environmentId });
    for (const environmentId of left) await isGone(dataDirOf(victim), environmentId);
  }, 120_000);
});

test("ENV-23 ENV-24 a runner goes offline with its environments running, and comes back", {
  timeout: 120_000,
}, async () => {
  const dataDir = join(folder, "runner");
  const create = () => createEnvironment(client, classes.alone, git.url("project"));
  const made = (await Promise.all([1, 2, 3, 4].map(create))) as [string, string, string, string];
  const [steady, stopped, deleted, forced] = made;
  for (const id of made) await reaches(client, id, EnvironmentPhase.RUNNING);
  await client.environments.stopEnvironment({ environmentId: stopped });
  await reaches(client, stopped, EnvironmentPhase.STOPPED);
  const before = await processesOf(steady);

  expect(await runner.stop()).toBe(0);
  const { runnerId } = runner;
  expect((await client.runners.getRunner({ runnerId })).runner?.status?.phase).toBe(RunnerPhase.INACTIVE);
  for (const id of [steady, deleted, forced]) expect(await processesOf(id)).not.toEqual([]);
  const refused = { code: Code.FailedPrecondition };
  await expect(client.environments.startEnvironment({ environmentId: stopped })).rejects.toMatchObject(refused);
  await expect(create()).rejects.toMatchObject(refused);

  const phaseOf = async (id: string) => (await getEnvironment(client, id)).status?.phase;
  await client.environments.deleteEnvironment({ environmentId: deleted });
  await client.environments.deleteEnvironment({ environmentId: forced });
  expect(await phaseOf(forced)).toBe(EnvironmentPhase.STOPPING);
  await client.environments.deleteEnvironment({ environmentId: forced, force: true });
  expect(await phaseOf(forced)).toBe(EnvironmentPhase.DELETED);
  const unreachable = await eventually(async () => {
    const { status } = await getEnvironment(client, steady);
    return status?.warningMessage.some((each) => each.includes("unreachable")) && status;
  }, "the warning appears");
  expect(unreachable.phase).toBe(EnvironmentPhase.RUNNING);
  expect(unreachable.environmentUrls?.ops).not.toBe("");
  expect(await phaseOf(deleted)).toBe(EnvironmentPhase.STOPPING);

  await runner.start();
  await reaches(client, deleted, EnvironmentPhase.DELETED);
  for (const id of [deleted, forced]) await isGone(dataDir, id);
  const reachable = await eventually(async () => {
    const { status } = await getEnvironment(client, steady);
    return status?.warningMessage.every((each) => !each.includes("unreachable")) && status;
  }, "the warning disappears");
  expect(reachable.phase).toBe(EnvironmentPhase.RUNNING);
  expect(await processesOf(steady)).toEqual(before);
  await client.environments.startEnvironment({ environmentId: stopped });
  await reaches(client, stopped, EnvironmentPhase.RUNNING);
  for (const id of [steady, stopped]) await client.environments.deleteEnvironment({ environmentId: id });
  for (const id of [steady, stopped]) await isGone(dataDir, id);
});
