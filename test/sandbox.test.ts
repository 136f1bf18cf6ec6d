import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { chmod, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ServicePhase, TaskExecutionPhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import { EnvironmentStatus_ContentPhase as ContentPhase, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { RefusedStart } from "../src/domain/errors.ts";
import { findSandbox } from "../src/runner/sandbox/find.ts";
import { mountArguments, mountPoints, mountsOf, type View } from "../src/runner/sandbox/mounts.ts";
import { findSshServer } from "../src/runner/ssh/server.ts";
import { newService, newTask, readExecution, readService, startTask } from "./harness/automations.ts";
import {
  getEnvironment,
  type Operations,
  operations,
  reaches,
  supervisorOf,
  sweepUp,
  usableClass,
  waitingSupervisors,
} from "./harness/environments.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { startHost } from "./harness/host.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { startTestPlane } from "./harness/plane.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED } = EnvironmentPhase;
const TIMEOUT_MS = 120_000;
const DEADLINE_MS = 60_000;
const run = promisify(execFile);
const isRoot = process.getuid?.() === 0;
const works = (file: string, args: readonly string[]) =>
  run(file, args).then(
    () => true,
    () => false,
  );
const hasSandbox = await works("bwrap", ["--dev-bind", "/", "/", "true"]);
const canLogIn = (await findSshServer(process.env.PATH ?? "")) !== undefined && (await works("ssh", ["-V"]));
/** Of a command line that nobody else has. */
const MARK = String(987_650_000 + Math.floor(Math.random() * 10_000));
const shared = "files in /tmp and command lines are shared between environments";

describe("the view of an environment", () => {
  const empty: View = { hidden: [], blocked: [], kept: [], own: [], shown: [] };
  const argumentsFor = (view: Partial<View>) => mountArguments(mountsOf({ ...empty, ...view })).slice(3);

  test("what lies in something is mounted after it, whatever the order it is named in", () => {
    const view = {
      shown: [{ path: "/srv/data/environments/a", writable: true }],
      hidden: ["/srv/data/environments", "/srv/data"],
      own: [{ path: "/tmp", source: "/srv/data/environments/a/tmp" }],
    };
    expect(argumentsFor(view)).toEqual([
      ...["--bind", "/srv/data/environments/a/tmp", "/tmp"],
      ...["--tmpfs", "/srv/data"],
      ...["--perms", "0755", "--dir", "/srv/data/environments"],
      ...["--bind", "/srv/data/environments/a", "/srv/data/environments/a"],
    ]);
  });

  test("a program in a hidden folder is shown, and what is hidden in it stays so", () => {
    const view = {
      own: [{ path: "/tmp", source: "/tmp/berth/data/a/tmp" }],
      hidden: ["/tmp/berth/data"],
      shown: [
        { path: "/tmp/berth", writable: false },
        { path: "/usr/bin", writable: false },
        { path: "/tmp/berth/data/a", writable: true },
      ],
    };
    expect(argumentsFor(view)).toEqual([
      ...["--bind", "/tmp/berth/data/a/tmp", "/tmp"],
      ...["--ro-bind", "/tmp/berth", "/tmp/berth"],
      ...["--tmpfs", "/tmp/berth/data"],
      ...["--bind", "/tmp/berth/data/a", "/tmp/berth/data/a"],
    ]);
    expect(mountPoints(mountsOf({ ...empty, ...view }))).toEqual([
      { folder: "/tmp/berth/data/a/tmp", path: "berth", target: "/tmp/berth" },
    ]);
  });

  test("an environment may write to its folder in a home that is only to be read, and to nothing else there", () => {
    const view = { kept: ["/home/u"], hidden: ["/home/u/data"], shown: [{ path: "/home/u/data/a", writable: true }] };
    expect(argumentsFor(view)).toEqual([
      ...["--ro-bind", "/home/u", "/home/u"],
      ...["--tmpfs", "/home/u/data"],
      ...["--bind", "/home/u/data/a", "/home/u/data/a"],
    ]);
  });

  test("a path is one argument whatever is in it; one that could mean another place is refused", () => {
    const path = '/srv/--tmpfs / $(touch x) "\n;--';
    expect(argumentsFor({ hidden: [path], blocked: ["/run/a b.sock"] })).toEqual([
      ...["--ro-bind", "/dev/null", "/run/a b.sock"],
      ...["--tmpfs", path],
    ]);
    for (const hostile of ["--bind", "srv", "/srv/../etc", "/srv/", "/srv//x", "/srv/./x", "/srv/\0x", ""]) {
      expect(() => argumentsFor({ hidden: [hostile] })).toThrow("is not a plain absolute path");
      expect(() => argumentsFor({ own: [{ path: "/tmp", source: hostile }] })).toThrow("plain absolute path");
    }
  });
});

describe("a host without bubblewrap", () => {
  const config = { sandbox: "auto" as const, dataDir: "/nonexistent/data", hiddenFolders: [] };

  test("says why there is none", async () => {
    expect(await findSandbox({ ...config, sandbox: "off" }, [])).toEqual({
      ...{ sandbox: undefined, problem: "BERTH_RUNNER_SANDBOX is off" },
    });
    expect((await findSandbox(config, [], () => undefined)).problem).toBe("bubblewrap is not installed");
    const required = findSandbox({ ...config, sandbox: "require" }, [], () => undefined);
    await expect(required).rejects.toThrow("BERTH_RUNNER_SANDBOX is require, but bubblewrap is not installed");
    await expect(required).rejects.toThrow(RefusedStart);
  });

  test("one that does not work there is tried, and its reason passed on", async () => {
    const folder = await mkdtemp(join(tmpdir(), "berth-bwrap-"));
    try {
      const program = join(folder, "bwrap");
      await writeFile(program, "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n");
      await chmod(program, 0o755);
      const dataDir = join(folder, "data");
      await run("mkdir", ["-p", join(dataDir, "trash"), join(dataDir, "compiled")]);
      const found = await findSandbox({ ...config, dataDir }, [], (name) =>
        name === "bwrap" ? program : `/bin/${name}`,
      );
      expect(found.problem).toBe("bubblewrap does not work on this host: No permissions to create new namespace");
      expect(await readdir(join(dataDir, "trash"))).toEqual([]);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  test(
    "every environment of a runner that is told not to use it says so",
    async () => {
      await using plane = await startTestPlane();
      await using host = await startHost(plane, { sandbox: "off" });
      const { client } = await plane.addUser();
      const { environment } = await client.environments.createEnvironment({
        spec: { machine: { class: host.classId } },
      });
      const { id, status } = await reaches(client, environment?.id ?? "", RUNNING);
      expect(status?.warningMessage.join("; ")).toContain(
        isRoot
          ? `${shared}: BERTH_RUNNER_SANDBOX is off`
          : "no isolation between environments: the runner does not run as root, and BERTH_RUNNER_SANDBOX is off",
      );
      const ops = await operations(client, id);
      expect((await ops.exec({ command: "readlink /proc/self/ns/mnt" })).stdout).toBe(
        (await run("readlink", ["/proc/self/ns/mnt"])).stdout,
      );
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(!hasSandbox || !isRoot)("with bubblewrap (skipped where it does not work, or without root)", () => {
  let berth: Installation;
  let client: BerthClient;
  let keys: string;
  let id: string;
  let other: string;
  let before: string;

  const mountsOfHost = () => readFile("/proc/self/mountinfo", "utf8");
  const runnerDataDir = () => join(berth.dataDir, "runner");
  const inside = (environmentId: string): Promise<Operations> =>
    eventually(() => operations(client, environmentId), "operations", DEADLINE_MS);
  /** What a command prints in an environment; a supervisor that is being replaced is waited for. */
  const sh = (environmentId: string, command: string) =>
    eventually(
      async () => {
        const { stdout, stderr } = await (await inside(environmentId)).exec({ command });
        return { text: (stdout + stderr).trim() };
      },
      command,
      DEADLINE_MS,
    ).then(({ text }) => text);

  async function newEnvironment(value: string): Promise<string> {
    const { environment } = await client.environments.createEnvironment({
      spec: { machine: { class: await usableClass(client) }, sshPublicKeys: value ? [{ id: "k", value }] : [] },
    });
    return (await reaches(client, environment?.id ?? "", RUNNING)).id;
  }

  beforeAll(async () => {
    before = await mountsOfHost();
    // Not in a folder that environments have their own of, so that hiding it is what hides it.
    berth = await startInstallation({}, "/var/lib");
    client = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
    keys = await mkdtemp(join(tmpdir(), "berth-keys-"));
    if (canLogIn) await run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", join(keys, "key")]);
    const key = canLogIn ? (await readFile(join(keys, "key.pub"), "utf8")).trim() : "";
    [id, other] = await Promise.all([newEnvironment(key), newEnvironment("")]);
  }, TIMEOUT_MS);

  afterAll(async () => {
    await berth?.terminate();
    await sweepUp(join(berth?.dataDir ?? "/nonexistent", "runner"));
    await berth?.[Symbol.asyncDispose]();
    await rm(keys, { recursive: true, force: true });
  }, TIMEOUT_MS);

  test("environments see neither temporary files, nor folders, nor command lines of each other", async () => {
    const folders = ["/tmp", "/var/tmp", "/dev/shm"];
    const name = `berth-mark-${id}`;
    const files = folders.map((folder) => `${folder}/${name}`).join(" ");
    expect(await sh(id, `for f in ${files}; do echo mine >$f || echo no; done; cat ${files}`)).toBe("mine\nmine\nmine");
    const { pid } = JSON.parse(await sh(id, `sleep ${MARK} >/dev/null 2>&1 & echo "{\\"pid\\": $!}"`)) as {
      pid: number;
    };
    expect(await readFile(`/proc/${pid}/cmdline`, "latin1")).toContain(MARK);
    const list = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '";
    expect(await sh(id, list)).toContain(`sleep ${MARK}`);
    const seen = await sh(other, list);
    expect(seen.length).toBeGreaterThan(0);
    expect(seen.includes(MARK)).toBe(false);
    expect(await sh(other, `kill -9 ${pid} || echo refused`)).toContain("refused");
    expect(await sh(other, `cat ${files} 2>/dev/null; ls -A ${folders.join(" ")} | grep berth-mark`)).toBe("");
    for (const folder of folders) expect(existsSync(join(folder, name))).toBe(false);
    expect(await sh(other, `ls -A ${runnerDataDir()}/environments`)).toBe(other);
    expect(await sh(other, `ls ${runnerDataDir()}/environments/${id} || true`)).toContain("No such file");
  });

  test("nothing of the product's data is to be seen from inside", async () => {
    const has = (path: string) => existsSync(join(berth.dataDir, path));
    const secret = ["master.key", "postgres", "postgres/data", "runner/credentials.json", "runner/trash"];
    expect(secret.filter((path) => !has(path))).toEqual([]);
    const paths = secret.map((path) => join(berth.dataDir, path)).join(" ");
    expect(await sh(id, `for p in ${paths}; do test ! -e $p || echo $p; done; ls -A ${berth.dataDir}`)).toBe("runner");
    expect(await sh(id, `ls -A ${berth.dataDir}/runner`)).toBe("compiled\ncontainer-runtime\nenvironments");
    expect(await sh(id, `ls ${berth.dataDir}/runner/compiled || true`)).toContain("Permission denied");
    // Not even by taking the view apart.
    const apart = `unshare -Urm sh -c 'umount ${berth.dataDir}; umount -l ${berth.dataDir}; ls -A ${berth.dataDir}'`;
    expect((await sh(id, `${apart} 2>/dev/null || echo runner`)).split("\n")).toEqual(["runner"]);
    expect(await sh(id, "grep NoNewPrivs /proc/self/status")).toMatch(/1$/);
  });

  test("a machine that is kept apart has no warning about it", async () => {
    const { status } = await getEnvironment(client, id);
    expect(status?.warningMessage.join("; ")).not.toMatch(/shared between|isolation/);
  });

  test(
    "commands, terminals, tasks and SSH sessions have the same temporary files, also after the supervisor was killed",
    async () => {
      const ops = await inside(id);
      await sh(id, "echo exec >>/tmp/all");
      const { terminalId } = await ops.createTerminal({ env: { PS1: "" } });
      await ops.writeTerminal({ terminalId, data: Buffer.from("echo terminal >>/tmp/all; echo t >/dev/shm/t\n") });
      await eventually(async () => (await sh(id, "cat /tmp/all")) === "exec\nterminal", "the terminal", DEADLINE_MS);
      const service = await newService(client, id, "watcher", {
        commands: { start: "until test -e /tmp/go; do sleep 0.1; done; echo service >>/tmp/all; exec sleep 1000" },
      });
      await client.environmentAutomation.startService({ id: service.id });
      const serviceRuns = async () => (await readService(client, service.id)).status?.phase === ServicePhase.RUNNING;
      await eventually(serviceRuns, "the service", DEADLINE_MS);
      const { pid } = await supervisorOf(runnerDataDir(), id);
      process.kill(pid, "SIGKILL");
      await eventually(async () => (await supervisorOf(runnerDataDir(), id)).pid !== pid, "another one", DEADLINE_MS);
      expect(await sh(id, "cat /dev/shm/t; touch /tmp/go")).toBe("t");
      await eventually(async () => (await sh(id, "cat /tmp/all")).endsWith("service"), "the service", DEADLINE_MS);
      expect(await serviceRuns()).toBe(true);
      const task = await newTask(client, id, "writer", [], { command: "echo task >>/tmp/all" });
      const { id: executionId } = await startTask(client, task);
      const hasEnded = async () =>
        (await readExecution(client, executionId)).status?.phase === TaskExecutionPhase.SUCCEEDED;
      await eventually(hasEnded, "the task", DEADLINE_MS);
      expect(await sh(id, "cat /tmp/all")).toBe("exec\nterminal\nservice\ntask");
    },
    TIMEOUT_MS,
  );

  test.skipIf(!canLogIn)(
    "an SSH session sees what the environment sees (skipped where sshd or ssh is not installed)",
    async () => {
      const look = async () => {
        const { status } = await getEnvironment(client, id);
        return status?.sshPublicKeys[0]?.phase === ContentPhase.READY && status.environmentUrls?.ssh?.url;
      };
      const { username, hostname, port } = new URL(await eventually(look, "the key", DEADLINE_MS));
      const options = [
        "StrictHostKeyChecking=no",
        `UserKnownHostsFile=${keys}/known`,
        "LogLevel=ERROR",
        "BatchMode=yes",
      ];
      const login = async (command: string) => {
        const args = [...options.flatMap((each) => ["-o", each]), "-F", "/dev/null", "-i", join(keys, "key")];
        return (await run("ssh", [...args, "-p", port, `${username}@${hostname}`, command])).stdout.trim();
      };
      await sh(id, "echo seen >/tmp/for-ssh; echo seen >/dev/shm/for-ssh");
      expect(await login("cat /tmp/for-ssh /dev/shm/for-ssh; echo back >/tmp/from-ssh")).toBe("seen\nseen");
      expect(await sh(id, "cat /tmp/from-ssh")).toBe("back");
      expect(await login(`ls -A ${runnerDataDir()}/environments; test -e /proc/1 || echo hidden`)).toBe(
        `${id}\nhidden`,
      );
    },
    TIMEOUT_MS,
  );

  test(
    "a runner that was killed finds environments as they were; a stop leaves nothing of the temporary files",
    async () => {
      await sh(other, "echo kept >/tmp/kept; echo kept >/dev/shm/kept");
      const { pid } = await supervisorOf(runnerDataDir(), other);
      await berth.kill();
      await berth.start();
      expect(await sh(other, "cat /tmp/kept /dev/shm/kept")).toBe("kept\nkept");
      expect((await supervisorOf(runnerDataDir(), other)).pid).toBe(pid);
      await eventually(
        async () => !(await getEnvironment(client, other)).status?.warningMessage.join().includes("shared between"),
        "no warning",
      );
      expect(existsSync(`/dev/shm/berth-${other}`)).toBe(true);
      await client.environments.stopEnvironment({ environmentId: other });
      await reaches(client, other, STOPPED);
      expect(existsSync(`/dev/shm/berth-${other}`)).toBe(false);
      await client.environments.startEnvironment({ environmentId: other });
      await reaches(client, other, RUNNING);
      expect(await sh(other, "ls /tmp/kept /dev/shm/kept 2>/dev/null; ls -A /tmp | grep -c . || true")).toBe("0");
    },
    TIMEOUT_MS,
  );

  test(
    "a supervisor that was started before its environment was known sees the same, and nothing of before",
    async () => {
      const waiting = () => waitingSupervisors(runnerDataDir());
      const [pid] = await eventually(async () => (await waiting()).length > 0 && (await waiting()), "one waits");
      const late = await newEnvironment("");
      expect((await supervisorOf(runnerDataDir(), late)).pid).toBe(pid);
      const viewOf = async (environmentId: string) => {
        const { pid: supervisor } = await supervisorOf(runnerDataDir(), environmentId);
        const lines = (await readFile(`/proc/${supervisor}/mountinfo`, "utf8")).trim().split("\n");
        // Engines of other tests mount what they run; it is out of sight in either.
        const own = lines.filter((line) => !line.includes("/berth-engine-"));
        return own.map((line) => line.split(" ").slice(3, 5).join(" ").replaceAll(environmentId, "ID")).sort();
      };
      expect(await viewOf(late)).toEqual(await viewOf(id));
      const folders = `${berth.dataDir} ${runnerDataDir()} ${runnerDataDir()}/environments`;
      expect(await sh(late, `for each in ${folders} /tmp /var/tmp /dev/shm; do ls -A $each; done`)).toBe(
        `runner\ncompiled\ncontainer-runtime\nenvironments\n${late}`,
      );
      expect(await sh(late, "test -e /proc/1 || echo hidden; ls /run/berth/host || true")).toMatch(
        /^hidden\n.*Permission denied$/,
      );
      await client.environments.deleteEnvironment({ environmentId: late, force: true });
    },
    TIMEOUT_MS,
  );

  test("the host has no mount more than before", async () => {
    const count = (text: string) => text.split("\n").filter((line) => line.includes(berth.dataDir)).length;
    expect([count(await mountsOfHost()), count(before)]).toEqual([0, 0]);
  });
});

describe.skipIf(!hasSandbox || !isRoot)("a runner that is not root (skipped where bubblewrap does not work)", () => {
  const NOBODY = 65_534;
  let git: GitServer;
  beforeAll(async () => {
    git = await startGitServer();
  });
  afterAll(async () => {
    await git.close();
  });

  test(
    "keeps files of environments and its own from each other, and processes from being traced",
    async () => {
      const repository = await git.createRepository("mine");
      await using plane = await FakeControlPlane.start();
      await using runner = await TestRunner.create(plane, git.host);
      await runner.spawn({}, NOBODY);
      const [id, other] = [plane.create(contentOf(fromGit(repository.url))), plane.create()];
      const { status } = await plane.untilPhase(id, RUNNING);
      await plane.untilPhase(other, RUNNING);
      expect(status?.machine?.warningMessage).toContain("little isolation between environments");
      expect(
        await runner.exec(id, "id -u; stat -c %u ~ README.md; git status --short; git log --oneline | wc -l"),
      ).toBe(`${NOBODY}\n${NOBODY}\n${NOBODY}\n1`);
      const pid = await runner.exec(id, "echo mine >/tmp/mine; sleep 600 >/dev/null 2>&1 & echo $!");
      const traces = `cat /proc/${pid}/environ >/dev/null 2>&1 && echo yes || echo no`;
      expect(await runner.exec(other, `ls -A /tmp; ${traces}; ls ${runner.dataDir}/environments`)).toBe(
        `${await runner.exec(other, "ls -A /tmp")}\nno\n${other}`,
      );
      expect(await runner.exec(other, "test ! -e /tmp/mine && echo none")).toBe("none");
      const credentials = join(runner.dataDir, "credentials.json");
      expect(existsSync(credentials)).toBe(true);
      expect(
        await runner.exec(other, `test ! -e ${credentials} && touch ${runner.dataDir}/compiled/x || echo kept`),
      ).toBe("kept");

      const { supervisor } = await runner.record(id);
      process.kill(supervisor?.pid ?? 0, "SIGKILL");
      await eventually(async () => (await runner.record(id)).supervisor?.pid !== supervisor?.pid, "another supervisor");
      const look = `cat /tmp/mine; kill -0 ${pid} && echo alive; ${traces}`;
      expect(await eventually(() => runner.exec(id, look), "operations")).toBe("mine\nalive\nyes");
    },
    TIMEOUT_MS,
  );
});
