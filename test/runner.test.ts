import { execFileSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { readFile, rm, stat, writeFile } from "node:fs/promises";
import { userInfo } from "node:os";
import { createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { DeregisterRequest_Reason as Reason } from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_AutomationsFile_Presence as AutomationsPresence,
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentStatus_DevContainer_Presence as DevContainerPresence,
  type Environment,
  EnvironmentPhase,
  EnvironmentService,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { environmentProcesses, isAlive } from "../src/runner/supervisor/processes.ts";
import { userName } from "../src/runner/users.ts";
import { waitingSupervisors } from "./harness/environments.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED, STOPPING, DELETING } = EnvironmentPhase;

vi.setConfig({ testTimeout: 120_000 });
const isRoot = process.getuid?.() === 0;
const userExists = (name: string) => readFileSync("/etc/passwd", "utf8").includes(`${name}:`);

let git: GitServer;
beforeAll(async () => {
  git = await startGitServer();
});
afterAll(async () => {
  await git.close();
});

/** A control plane, a runner, and an environment with this content in it that runs. */
async function running(files?: Record<string, string>, spec = {}) {
  const name = `r${Math.random().toString(36).slice(2)}`;
  const repository = await git.createRepository(name, files && { files });
  const plane = await FakeControlPlane.start();
  const runner = await TestRunner.create(plane, git.host);
  const dispose = async () => {
    await runner[Symbol.asyncDispose]();
    await plane[Symbol.asyncDispose]();
  };
  const start = async () => {
    await runner.start();
    const id = plane.create({ ...contentOf(fromGit(repository.url)), ...spec });
    return { id, environment: await plane.untilPhase(id, RUNNING) };
  };
  const { id, environment } = await start().catch(async (error: unknown) => {
    await dispose();
    throw error;
  });
  return { plane, runner, id, environment, repository, name, [Symbol.asyncDispose]: dispose };
}

const processesOf = async (runner: TestRunner, id: string) => {
  const { user } = await runner.record(id);
  return await environmentProcesses({ environmentId: id, uid: user?.own ? user.uid : undefined });
};

describe.concurrent("life of an environment", () => {
  test("ENV-1: a repository is cloned and reported ready, with its operations in the same report", async () => {
    await using it = await running({ "README.md": "hello\n" });
    const { plane, runner, id, environment } = it;
    const { status } = environment;
    expect(status?.environmentUrls?.ops).toBe(`${runner.baseUrl}/environments/${id}/ops`);
    expect(status?.environmentUrls?.logs).toBe(`${runner.baseUrl}/environments/${id}/logs`);
    const firstReady = plane.reports.find(({ status: { content, devcontainer } }) => {
      return content?.phase === ContentPhase.READY && devcontainer?.phase === DevContainerPhase.RUNNING;
    });
    expect(firstReady?.status.environmentUrls?.ops).toBe(status?.environmentUrls?.ops);
    const folder = runner.folder(id, "workspace", it.name);
    expect(status?.content?.contentLocationInMachine).toBe(folder);
    expect(status?.content?.git).toMatchObject({
      branch: "main",
      latestCommit: it.repository.head,
      totalChangedFiles: 0,
    });
    expect(status?.machine?.versions?.supervisorVersion).toBe("0.1.0");
    expect(await runner.exec(id, "cat README.md")).toBe("hello");
  });

  test("ENV-10, ENV-11: a stop leaves no process and keeps the files; the next start clones nothing", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    await runner.exec(id, "echo kept > note; (setsid sleep 600 >/dev/null 2>&1 &); nohup sleep 601 >/dev/null 2>&1 &");
    expect((await processesOf(runner, id)).length).toBeGreaterThanOrEqual(3);
    const before = plane.environment(id);
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    expect(await processesOf(runner, id)).toEqual([]);
    expect(await readFile(runner.folder(id, "workspace", it.name, "note"), "utf8")).toBe("kept\n");
    const phases = plane.reports.map(({ status }) => status.machine?.phase);
    expect(phases.indexOf(MachinePhase.STOPPING)).toBeGreaterThan(phases.indexOf(MachinePhase.RUNNING));

    plane.startEnvironment(id);
    const again = await plane.untilPhase(id, RUNNING);
    expect(again.status?.machine?.session).not.toBe(before.status?.machine?.session);
    expect(again.status?.content?.session).toBe(before.status?.content?.session);
    expect(await runner.exec(id, "cat note")).toBe("kept");
    expect(git.fetches(it.name)).toBe(1);
  });

  test("ENV-22: a deletion goes through stopping and deleting, and removes folder and user", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const { user } = await runner.record(id);
    if (isRoot) expect(user?.name).toBe(userName(id));
    plane.deleteEnvironment(id);
    await eventually(() => plane.isGone(id), "the deletion");
    const phases = plane.reports.map(({ status }) => status.machine?.phase);
    const order = [MachinePhase.STOPPING, MachinePhase.STOPPED, MachinePhase.DELETING, MachinePhase.DELETED];
    expect(
      phases.slice(phases.indexOf(MachinePhase.STOPPING)).filter((phase, at, all) => all.indexOf(phase) === at),
    ).toEqual(order.filter((phase) => phases.includes(phase)));
    expect(phases.at(-1)).toBe(MachinePhase.DELETED);
    expect(existsSync(runner.folder(id))).toBe(false);
    if (isRoot) expect(userExists(user?.name ?? "")).toBe(false);
  });

  test("ENV-23: a forced deletion ends everything at once", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const { user } = await runner.record(id);
    plane.deleteEnvironment(id, true);
    await eventually(() => !existsSync(runner.folder(id)), "the folder to go");
    await eventually(() => !isRoot || !userExists(user?.name ?? ""), "the user to go");
    expect(await environmentProcesses({ environmentId: id, uid: user?.own ? user.uid : undefined })).toEqual([]);
  });

  test("an environment that is deleted while it is cloned goes at once", async () => {
    // Its requests are held, which must not concern the others.
    const git = await startGitServer();
    const repository = await git.createRepository("held-deletion");
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane, git.host);
    await runner.start();
    git.holdRequests();
    try {
      const id = plane.create(contentOf(fromGit(repository.url)));
      await git.held();
      plane.deleteEnvironment(id);
      await eventually(() => plane.isGone(id), "the deletion");
      expect(existsSync(runner.folder(id))).toBe(false);
    } finally {
      git.release();
      await git.close();
    }
  });

  test("ENV-48: processes find the token and the addresses of the API", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const token = await runner.exec(id, "echo $ONA_API_KEY");
    const base = await runner.exec(id, "echo $ONA_BASE_URL");
    expect(await runner.exec(id, "echo $GITPOD_API_KEY $GITPOD_BASE_URL")).toBe(`${token} ${base}`);
    expect(await runner.exec(id, "echo $BERTH_ENVIRONMENT_ID $GITPOD_ENVIRONMENT_ID")).toBe(`${id} ${id}`);
    expect(base).toBe(`${plane.url}/api`);
    expect(await runner.exec(id, "cat ../../run/token; stat -c %a ../../run/token")).toBe(`${token}600`);
    const transport = createConnectTransport({
      baseUrl: base,
      httpVersion: "1.1",
      interceptors: [
        (next) => (request) => {
          request.header.set("authorization", `Bearer ${token}`);
          return next(request);
        },
      ],
    });
    const { environment } = await createClient(EnvironmentService, transport).getEnvironment({ environmentId: id });
    expect(environment?.id).toBe(id);
    if (isRoot) expect(await runner.exec(id, "id -un")).toBe(userName(id));
  });

  test.runIf(isRoot)("environments cannot look into each other, nor into the runner", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const other = plane.create();
    await plane.untilPhase(other, RUNNING);
    const { exitCode } = await runner.ops(other).exec({ command: `ls ${runner.folder(id)}` });
    expect(exitCode).not.toBe(0);
    for (const path of [runner.folder(id, "state.json"), `${runner.dataDir}/credentials.json`, runner.dataDir]) {
      const { exitCode: refused } = await runner.ops(other).exec({ command: `ls ${path} && cat ${path}` });
      expect(refused).not.toBe(0);
    }
    expect((await stat(runner.folder(id))).uid).toBe(0);
  });

  test("ENV-15 in part: use through the operations is signalled with the environment's token", async () => {
    await using it = await running();
    const idle = it.plane.create();
    await it.plane.untilPhase(idle, RUNNING);
    await it.runner.exec(it.id, "true");
    await eventually(() => it.plane.activity.includes(it.id), "the signal");
    expect(it.plane.activity).toEqual([it.id]);
  });

  test("a terminal runs as the environment's user with its variables, counts as use, and ends with the environment", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const other = plane.create();
    await plane.untilPhase(other, RUNNING);
    const ops = runner.ops(other);
    const { terminalId } = await ops.createTerminal({ env: { PS1: "" } });
    let [text, last] = ["", ""];
    const attached = (async () => {
      for await (const { content } of ops.attachTerminal({ terminalId })) {
        last = content.case ?? "";
        if (content.case === "replay" || content.case === "data") text += Buffer.from(content.value.data).toString();
      }
    })();
    await ops.writeTerminal({
      terminalId,
      data: Buffer.from(
        'stty -echo; echo "$(id -un) $GITPOD_ENVIRONMENT_ID $(printenv GITPOD_API_KEY | wc -c)-$(pwd)"; sleep 300 &\n',
      ),
    });
    const user = isRoot ? userName(other) : userInfo().username;
    const shown = new RegExp(`${user} ${other} [1-9]\\d+-/.*/workspace`);
    await eventually(() => shown.test(text), "its output");
    await eventually(() => plane.activity.includes(other), "the signal");
    expect(plane.activity).not.toContain(id);
    plane.stopEnvironment(other);
    await attached;
    expect(last).toBe("exited");
    await plane.untilPhase(other, STOPPED);
    expect(await environmentProcesses({ environmentId: other })).toEqual([]);
  });

  test("a data folder may be deep", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane, git.host, "d".repeat(100));
    await runner.start();
    const id = plane.create();
    await plane.untilPhase(id, RUNNING);
    expect(await runner.exec(id, "pwd")).toBe(runner.folder(id, "workspace"));
    plane.deleteEnvironment(id);
    await eventually(() => plane.isGone(id), "the deletion");
  });

  test("ENV-43: kernel controls that cannot be enforced stop the start, unless the operator allows it", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.start();
    const kernelControlsConfig = { veto: { exec: { enabled: true, denylist: ["curl"] } } };
    const id = plane.create({ kernelControlsConfig });
    const refused = await plane.untilPhase(id, STOPPED);
    expect(refused.status?.failureMessage.join()).toContain("veto.exec");
    expect(existsSync(runner.folder(id))).toBe(false);

    await runner.running?.stop();
    await runner.start({ allowUnenforced: true });
    plane.startEnvironment(id);
    const allowed = await plane.untilPhase(id, RUNNING);
    expect(allowed.status?.machine?.warningMessage).toContain("veto.exec");
  });

  test("a class that this host cannot realise is refused", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.start();
    plane.classConfiguration = { cpu: "1", memory: "512", isolation: "container" };
    const id = plane.create();
    const refused = await plane.untilPhase(id, STOPPED);
    expect(refused.status?.failureMessage.join()).toContain("isolation container");
  });
});

describe.concurrent("files of the repository", () => {
  test("ENV-35: without an engine the dev container runs on the host, and says what is left out", async () => {
    const file = `{ "image": "x", /* c */ "postCreateCommand": "touch ~/done", "containerEnv": { "COLOR": "blue", "X": "\${localEnv:Y}", }, }`;
    await using it = await running({ ".devcontainer/devcontainer.json": file });
    const { status } = it.environment;
    expect(status?.devcontainer).toMatchObject({
      phase: DevContainerPhase.RUNNING,
      devcontainerFilePresence: DevContainerPresence.DISCOVERED,
      devcontainerFilePath: ".devcontainer/devcontainer.json",
      remoteWorkspaceFolder: it.runner.folder(it.id, "workspace", it.name),
      devcontainerconfigInSync: true,
    });
    expect(status?.devcontainer?.warningMessage).toContain("image and features");
    expect(await it.runner.exec(it.id, "echo $COLOR-$X; ls ~")).toBe("blue-\ndone");
    await it.runner.exec(it.id, "echo '{}' > .devcontainer/devcontainer.json");
    const isSeen = ({ status }: Environment) =>
      status?.devcontainer?.devcontainerconfigInSync === false && status.content?.git?.totalChangedFiles === 1;
    await it.plane.until(it.id, isSeen, "the changed file");
  });

  test("a named file that is missing fails its part and nothing else", async () => {
    const spec = {
      devcontainer: { devcontainerFilePath: "no/such.json" },
      automationsFile: { automationsFilePath: "none.yaml" },
    };
    await using it = await running(undefined, spec);
    const { status } = it.environment;
    expect(status?.devcontainer).toMatchObject({
      phase: DevContainerPhase.FAILED,
      devcontainerFilePresence: DevContainerPresence.SPECIFIED,
      failureMessage: "dev container file no/such.json not found",
    });
    const isSettled = ({ status }: Environment) => status?.automationsFile?.phase === ContentPhase.FAILED;
    const { status: later } = await it.plane.until(it.id, isSettled, "the missing file");
    expect(later?.automationsFile?.failureMessage).toBe("automations file none.yaml not found");
  });

  test("without files: a generated dev container, no automations", async () => {
    await using it = await running();
    const { status } = it.environment;
    expect(status?.devcontainer?.devcontainerFilePresence).toBe(DevContainerPresence.GENERATED);
    const isSettled = ({ status }: Environment) => status?.automationsFile?.phase === ContentPhase.READY;
    const { status: later } = await it.plane.until(it.id, isSettled, "no automations file");
    expect(later?.automationsFile?.automationsFilePresence).toBe(AutomationsPresence.ABSENT);
  });

  test("a changed dev container session reads the file anew", async () => {
    await using it = await running({ ".devcontainer.json": `{"remoteEnv":{"A":"1"}}` });
    await it.runner.exec(it.id, `echo '{"remoteEnv":{"A":"2"}}' > .devcontainer.json`);
    it.plane.edit(it.id, (spec) => {
      if (spec.devcontainer) spec.devcontainer.session = "again";
    });
    await it.plane.until(it.id, (each) => each.status?.devcontainer?.session === "again", "the new session");
    expect(await it.runner.exec(it.id, "echo $A")).toBe("2");
  });
});

describe("crashes", () => {
  test("adoption: environments outlive the runner, and the next one finds them", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const token = await runner.exec(id, "sleep 600 >/dev/null 2>&1 & echo $! > pid; echo $ONA_API_KEY");
    const { supervisor } = await runner.record(id);
    await runner.running?.stop();
    expect(plane.deregistered).toEqual([Reason.STOPPING]);
    await runner.start();
    expect(await eventually(() => runner.exec(id, "kill -0 $(cat pid) && echo $ONA_API_KEY"), "operations")).toBe(
      token,
    );
    expect((await runner.record(id)).supervisor).toEqual(supervisor);
    await eventually(
      () => plane.environment(id).status?.environmentUrls?.ops.startsWith(runner.baseUrl),
      "the new address",
    );
    expect(plane.environment(id).status?.phase).toBe(RUNNING);
    expect(plane.registrations.at(-1)?.localEnvironmentIds).toEqual([id]);
  });

  test("a supervisor that dies is replaced without a change of phase; one that keeps dying fails the machine", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const from = plane.reports.length;
    for (let death = 0; death < 3; death++) {
      const { supervisor } = await runner.record(id);
      process.kill(supervisor?.pid ?? 0, "SIGKILL");
      const replaced = async () => (await runner.record(id)).supervisor?.pid !== supervisor?.pid;
      await eventually(replaced, "another supervisor");
      await eventually(() => runner.exec(id, "true").then(() => true), "operations");
    }
    expect(plane.reports.slice(from).every(({ status }) => status.machine?.phase === MachinePhase.RUNNING)).toBe(true);
    process.kill((await runner.record(id)).supervisor?.pid ?? 0, "SIGKILL");
    const failed = await plane.untilPhase(id, STOPPED);
    expect(failed.status?.failureMessage.join()).toContain("lost");
  });

  test("ENV-14: a runner killed while it clones leaves nothing half, and the next one gets there", async () => {
    const repository = await git.createRepository("killed");
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane, git.host);
    git.holdRequests();
    const first = await runner.spawn();
    const id = plane.create(contentOf(fromGit(repository.url)));
    await git.held();
    await first.kill();
    git.release();
    expect(existsSync(runner.folder(id, "workspace", "killed"))).toBe(false);
    await runner.start();
    await plane.untilPhase(id, RUNNING);
    expect(await runner.exec(id, "git status --porcelain; git rev-parse HEAD; ls -A ..")).toBe(
      `${repository.head}\nkilled`,
    );
  });

  test.runIf(isRoot).each(["off", "auto"] as const)(
    "a supervisor waits for the next environment, and for no longer than there is a runner (sandbox: %s)",
    async (sandbox) => {
      const repository = await git.createRepository(`waited-for-${sandbox}`);
      await using plane = await FakeControlPlane.start();
      await using runner = await TestRunner.create(plane, git.host);
      const waiting = () => waitingSupervisors(runner.dataDir);
      const isUsed = async (end: () => Promise<unknown>) => {
        const [pid] = await eventually(async () => (await waiting()).length === 1 && (await waiting()), "one waits");
        const id = plane.create(contentOf(fromGit(repository.url)));
        await plane.untilPhase(id, RUNNING);
        expect((await runner.record(id)).supervisor?.pid).toBe(pid);
        expect(await runner.exec(id, "git status --porcelain --branch")).toBe("## main...origin/main");
        await eventually(async () => (await waiting()).length === 1, "the next one waits");
        await end();
        await eventually(async () => (await waiting()).length === 0, "none waits any more");
        expect((await processesOf(runner, id)).map((each) => each.pid)).toContain(pid);
      };
      const process = await runner.spawn({ sandbox });
      await isUsed(() => process.kill());
      await runner.start({ sandbox });
      await isUsed(async () => await runner.running?.stop());
    },
  );

  test("a runner killed at any moment of a life comes back to it", async () => {
    const repository = await git.createRepository("killed-often");
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane, git.host);
    const id = plane.create(contentOf(fromGit(repository.url)));
    let process = await runner.spawn();
    const dieAt = async (condition: () => boolean, what: string) => {
      await eventually(condition, what);
      await process.kill();
      process = await runner.spawn();
    };
    const machine = () => plane.environment(id).status?.machine?.phase;
    await dieAt(() => machine() === MachinePhase.STARTING, "starting");
    await dieAt(() => machine() === MachinePhase.RUNNING, "machine");
    await plane.untilPhase(id, RUNNING);
    plane.stopEnvironment(id);
    await dieAt(() => machine() === MachinePhase.STOPPING || machine() === MachinePhase.STOPPED, "stopping");
    await plane.untilPhase(id, STOPPED);
    plane.deleteEnvironment(id);
    await dieAt(() => plane.isGone(id) || machine() === MachinePhase.DELETING, "deleting");
    await eventually(() => plane.isGone(id), "the deletion");
    expect(existsSync(runner.folder(id))).toBe(false);
    expect([STOPPING, DELETING]).not.toContain(plane.isGone(id) ? STOPPED : plane.environment(id).status?.phase);
  });

  test("a damaged record does not cost the files", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    await runner.exec(id, "echo precious > work.txt");
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    await runner.running?.stop();
    await writeFile(runner.folder(id, "state.json"), "{");
    await runner.start();
    plane.startEnvironment(id);
    const again = await plane.untilPhase(id, RUNNING);
    expect(again.status?.content?.warningMessage).toContain(".berth-backup-unknown");
    expect(await runner.exec(id, `cat ../.berth-backup-unknown/${it.name}/work.txt`)).toBe("precious");
  });

  test("after a restart of the host the machine starts anew", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    await runner.running?.stop();
    const record = JSON.parse(await readFile(runner.folder(id, "state.json"), "utf8"));
    for (const { pid } of await processesOf(runner, id)) process.kill(pid, "SIGKILL");
    record.supervisor.bootId = "another";
    await writeFile(runner.folder(id, "state.json"), JSON.stringify(record));
    await runner.start();
    const isAnew = async () => {
      const { supervisor } = await runner.record(id);
      return supervisor !== undefined && supervisor.pid !== record.supervisor.pid;
    };
    await eventually(isAnew, "another supervisor");
    await plane.until(id, ({ status }) => Boolean(status?.environmentUrls?.ops), "its operations");
    expect(plane.environment(id).status?.environmentUrls?.ops).not.toBe("");
    expect(await runner.exec(id, "git status --porcelain")).toBe("");
    expect(git.fetches(it.name)).toBe(1);
  });

  test("a start that the disk does not allow ends in a failure that people see", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.start();
    const id = uuidv7();
    await writeFile(runner.folder(id), "not a folder");
    plane.create({}, id);
    const failed = await eventually(
      () => {
        const { status } = plane.environment(id);
        return status?.failureMessage.length ? status : undefined;
      },
      "the failure",
      80_000,
    );
    expect(failed.failureMessage.join()).toContain("is not a folder");
  });

  test("only one runner uses a data folder", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.spawn();
    await expect(runner.start()).rejects.toThrow(/another runner/);
  });
});

describe.runIf(isRoot)("users", () => {
  const account = (name: string) =>
    readFileSync("/etc/passwd", "utf8")
      .split("\n")
      .find((line) => line.startsWith(`${name}:`));

  test("a name that somebody else has is avoided", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.start();
    const id = uuidv7();
    execFileSync("useradd", ["--no-create-home", "--user-group", userName(id)]);
    try {
      plane.create({}, id);
      await plane.untilPhase(id, RUNNING);
      expect(await runner.exec(id, "id -un")).toBe(userName(id, 1));
      plane.deleteEnvironment(id);
      await eventually(() => plane.isGone(id), "the deletion");
      expect(account(userName(id, 1))).toBeUndefined();
      expect(account(userName(id))).toBeDefined();
    } finally {
      execFileSync("userdel", [userName(id)]);
    }
  });

  test("the account of an environment that is gone altogether is removed", async () => {
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane);
    await runner.start();
    const id = plane.create();
    await plane.untilPhase(id, RUNNING);
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    await runner.running?.stop();
    await rm(runner.folder(id), { recursive: true });
    await runner.start();
    expect(account(userName(id))).toBeUndefined();
  });

  test("an account that was lost is made anew; if its id was given away, the files move on to another", async () => {
    await using it = await running();
    const { plane, runner, id } = it;
    const restart = async () => {
      plane.startEnvironment(id);
      await plane.untilPhase(id, RUNNING);
      return Number(await runner.exec(id, "id -u; cat README.md >/dev/null; touch new; rm new"));
    };
    const stop = async () => {
      plane.stopEnvironment(id);
      await plane.untilPhase(id, STOPPED);
      execFileSync("userdel", [userName(id)]);
    };
    const { user } = await runner.record(id);
    await stop();
    expect(await restart()).toBe(user?.uid);
    await stop();
    const stranger = `stranger-${user?.uid}`;
    execFileSync("useradd", ["--no-create-home", "--user-group", "--uid", String(user?.uid), stranger]);
    try {
      expect(await restart()).not.toBe(user?.uid);
      plane.stopEnvironment(id);
      await plane.untilPhase(id, STOPPED);
    } finally {
      execFileSync("userdel", [stranger]);
    }
  });
});

test.runIf(isRoot)(
  "the runner also works as an ordinary user, and says what is missing",
  { timeout: 30_000 },
  async () => {
    const repository = await git.createRepository("ordinary");
    await using plane = await FakeControlPlane.start();
    await using runner = await TestRunner.create(plane, git.host);
    await runner.spawn({}, 65_534);
    const id = plane.create(contentOf(fromGit(repository.url)));
    const environment = await plane.untilPhase(id, RUNNING);
    expect(environment.status?.machine?.warningMessage).toMatch(/(no|little) isolation between environments/);
    expect(await runner.exec(id, "id -u; (setsid sleep 600 >/dev/null 2>&1 &)")).toBe("65534");
    const { ssh } = await runner.record(id);
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    expect(await environmentProcesses({ environmentId: id })).toEqual([]);
    if (ssh?.process) expect(isAlive(ssh.process)).toBe(false);
    plane.deleteEnvironment(id);
    await eventually(() => plane.isGone(id), "the deletion");
    expect(existsSync(runner.folder(id))).toBe(false);
  },
);
