import type { ChildProcess } from "node:child_process";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chmod, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { create } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentPhase,
  EnvironmentSpec_SSHPublicKeySchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { Pty } from "../src/runner/supervisor/pty.ts";
import { engineMissing, startContainerEngine, type TestEngine } from "./harness/container-engine.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { clientArgs, clientKey, type LoginOptions, logIn, sshMissing, terminalsMissing } from "./harness/ssh-client.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

// People who log in by SSH to an environment whose dev container runs in a container.

const { RUNNING, STOPPED } = EnvironmentPhase;
const run = promisify(execFile);
const missing = engineMissing() ?? (await sshMissing());
const noTerminals = await terminalsMissing();

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });

describe.skipIf(missing)(`SSH in containers${missing ? ` (${missing})` : ""}`, () => {
  let folder: string;
  let git: GitServer;
  let engine: TestEngine;
  let plane: FakeControlPlane;
  let runner: TestRunner;
  let key: Awaited<ReturnType<typeof clientKey>>;
  let count = 0;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "berth-ssh-"));
    await chmod(folder, 0o755);
    key = await clientKey(folder, "key");
    git = await startGitServer();
    engine = await startContainerEngine();
    plane = await FakeControlPlane.start();
    plane.classConfiguration = { cpu: "1", memory: "512", isolation: "container" };
    runner = await TestRunner.create(plane, git.host);
    await runner.start({ containerEngine: "docker", dockerHost: engine.dockerHost });
  });
  afterAll(async () => {
    await runner?.[Symbol.asyncDispose]();
    await engine?.[Symbol.asyncDispose]();
    await plane?.[Symbol.asyncDispose]();
    await git?.close();
    await rm(folder, { recursive: true, force: true });
  });

  async function created(container: object, spec: object = {}): Promise<string> {
    const files = { ".devcontainer/devcontainer.json": JSON.stringify(container) };
    const { url } = await git.createRepository(`s${++count}`, { files });
    const sshPublicKeys = [create(EnvironmentSpec_SSHPublicKeySchema, { id: "k", value: key.text })];
    return plane.create({ ...contentOf(fromGit(url)), sshPublicKeys, ...spec });
  }

  const urlOf = ({ status }: Environment) => status?.environmentUrls?.ssh?.url ?? "";
  const takesKey = ({ status }: Environment) => status?.sshPublicKeys[0]?.phase === ContentPhase.READY;

  /** An environment whose dev container runs, and what logs in to it. */
  async function running(container: object, spec?: object) {
    const id = await created(container, spec);
    const environment = await plane.until(
      id,
      (each) => each.status?.phase === RUNNING && takesKey(each),
      "the environment with its key",
    );
    expect(environment.status?.devcontainer).toMatchObject({ phase: DevContainerPhase.RUNNING, failureMessage: "" });
    const url = urlOf(environment);
    const ssh = (command?: string, options?: LoginOptions) => logIn(url, key.path, command, options);
    return { id, url, ssh };
  }

  /** A login with a terminal of this size, and what it has shown. */
  async function terminal(url: string, size: { cols: number; rows: number }, ...command: string[]) {
    const { args, port, target } = clientArgs(url, key.path);
    const env = { PATH: process.env.PATH ?? "", TERM: "vt100" };
    let text = "";
    const words = [...args, "-t", "-p", port, target, ...command];
    const pty = await Pty.start({ file: "ssh", args: words, cwd: "/", env, ...size }, (chunk) => {
      text += chunk.toString();
    });
    const shows = (what: string) => eventually(() => text.includes(what), `${what} on the terminal`);
    return { pty, shows, text: () => text, type: (line: string) => pty.write(Buffer.from(line)) };
  }

  const contained = () => ({ image: engine.image, remoteUser: "dev", containerEnv: { KIND: "contained" } });

  test.concurrent("ENV-30: a command runs in the dev container, with its variables, streams and exit code", async () => {
    const mount = { case: "environmentVariable" as const, value: "SECRET_WORD" };
    const { id, ssh } = await running(contained(), { secrets: [plane.secret("WORD", mount, "it's secret")] });
    const home = runner.folder(id, "home");
    const command = `id -un; pwd; ls /usr 2>/dev/null || echo inside
echo "$KIND $SECRET_WORD $BERTH_ENVIRONMENT_ID" 'it'"'"'s $HOME' \\$; echo error >/dev/stderr; exit 7`;
    expect(await ssh(command)).toEqual({
      ...{ code: 7, stderr: "error\n" },
      stdout: `dev\n${home}\ninside\ncontained it's secret ${id} it's $HOME $\n`,
    });
    expect(await ssh("kill -TERM $$")).toMatchObject({ code: 143, stdout: "" });
    expect(await ssh("no-such-program")).toMatchObject({ code: 127 });
    plane.renewSecret(id, "WORD", "another");
    await eventually(async () => (await ssh("echo $SECRET_WORD")).stdout === "another\n", "the new value");
  });

  test.concurrent("what editors do: a shell reads a script from its input, and bytes pass whole both ways", async () => {
    const { ssh } = await running(contained());
    const script = "echo from $KIND\nexit 3\n";
    for (const command of [undefined, "sh", "sh /dev/stdin"]) {
      expect(await ssh(command, { input: script })).toEqual({
        code: 3,
        stdout: "from contained\n",
        stderr: "",
      });
    }
    const bytes = randomBytes(3 * 1024 * 1024).toString("hex");
    const { stdout, code } = await ssh("cat; echo end >&2", { input: bytes });
    expect([stdout === bytes, code]).toEqual([true, 0]);
    // Nobody reads it.
    expect(await ssh("exec <&-; echo done", { input: bytes })).toMatchObject({ code: 0, stdout: "done\n" });
    // What is left in the background outlives the session, unless it holds on to its streams.
    await ssh("setsid sleep 600 >/dev/null 2>&1 </dev/null & echo $! >~/left");
    expect(await ssh("kill -0 $(cat ~/left) && kill $(cat ~/left)")).toMatchObject({ code: 0 });
  });

  test.concurrent("files are transferred beside the container, whose checkout and home they share", async () => {
    const { id, url, ssh } = await running(contained());
    const { args, port, target } = clientArgs(url, key.path);
    const [sent, batch] = [join(folder, `sent-${id}`), join(folder, `batch-${id}`)];
    await writeFile(sent, "sent\n");
    await writeFile(batch, `put ${sent} received\n`);
    await run("sftp", [...args, "-P", port, "-b", batch, target]);
    expect(await ssh("cat received; echo made >made")).toMatchObject({ code: 0, stdout: "sent\n" });
    const home = runner.folder(id, "home");
    await run("scp", [...args, "-P", port, `${target}:${home}/made`, `${sent}-back`]);
    expect(await readFile(`${sent}-back`, "utf8")).toBe("made\n");
  });

  test.concurrent("an agent that is forwarded is reached from inside", async () => {
    const { id, ssh } = await running(contained());
    const socket = join(folder, `agent-${id}`);
    const { stdout } = await run("ssh-agent", ["-a", socket, "-s"]);
    const pid = Number(/SSH_AGENT_PID=(\d+)/.exec(stdout)?.[1]);
    try {
      // Asks for the identities; the answer has the type that answers to this have.
      const ask = `const socket = require("net").connect(process.env.SSH_AUTH_SOCK, () => socket.write(Buffer.from([0, 0, 0, 1, 11])));
        socket.on("data", (data) => { console.log("answer", data[4]); process.exit(); }).on("error", console.log)`;
      const node = `f=$(echo ${runner.dataDir}/container-runtime/*); $f/lib/ld-* --library-path $f/lib $f/node -e '${ask}'`;
      const options = { more: ["-A"], env: { SSH_AUTH_SOCK: socket } };
      expect(await ssh(node, options)).toMatchObject({ stdout: "answer 12\n", code: 0 });
      expect(await ssh("echo $SSH_AUTH_SOCK")).toMatchObject({ stdout: "\n", code: 0 });
    } finally {
      process.kill(pid);
    }
    expect(await readdir(runner.folder(id, "run", "logins"))).toEqual([]);
  });

  test
    .skipIf(noTerminals)
    .concurrent(
      `a terminal is one of the container, with the size of the client's${noTerminals ? ` (${noTerminals})` : ""}`,
      async () => {
        const { id, url } = await running(contained());
        const shell = await terminal(url, { cols: 101, rows: 33 });
        shell.type("tty; stty size; echo $KIND-$TERM-$((6 * 7))\n");
        await shell.shows("contained-vt100-42\r\n");
        expect(shell.text()).toMatch(/\/dev\/pts\/\d+\r\n33 101\r\n/);
        shell.pty.resize(120, 40);
        shell.type("while [ \"$(stty size)\" != '40 120' ]; do :; done; echo resi''zed\n");
        await shell.shows("resized\r\n");
        shell.type("echo beg''un; sleep 600; echo sle''pt\n");
        await shell.shows("begun\r\n");
        shell.type("\x03");
        await shell.shows("^C");
        shell.type("echo interr''upted; exit 5\n");
        await shell.shows("interrupted\r\n");
        expect(shell.text()).not.toContain("slept\r\n");
        expect(await shell.pty.ended).toMatchObject({ code: 5 });

        const command = await terminal(url, { cols: 80, rows: 24 }, "echo $KIND; exit 6");
        expect(await command.pty.ended).toMatchObject({ code: 6 });
        expect(command.text()).toContain("contained\r\n");

        // Whoever is gone leaves what a line that drops leaves: a hangup.
        const dropped = await terminal(
          url,
          { cols: 80, rows: 24 },
          "trap 'echo hup >~/hup; exit' HUP; echo re''ady; while :; do sleep 0.1; done",
        );
        await dropped.shows("ready\r\n");
        process.kill(dropped.pty.pid, "SIGKILL");
        await eventually(async () => (await runner.exec(id, "cat ~/hup")) === "hup", "the hangup");
        await eventually(
          async () => (await readdir(runner.folder(id, "run", "logins"))).length === 0,
          "nothing is left",
        );
      },
    );

  test.concurrent("a container that is not up lets nobody in, nor onto the host; one that has failed says that it is the host", async () => {
    const waiting = new Set<() => void>();
    // The engine gives up soon on a registry that does not greet, and not on one that takes its time for an image.
    const registry = createServer(({ url }, response) => {
      if (url === "/v2/") response.writeHead(200).end();
      else waiting.add(() => response.writeHead(404).end());
    });
    await new Promise<void>((resolve) => registry.listen(0, "127.0.0.1", resolve));
    try {
      const id = await created({ image: `127.0.0.1:${(registry.address() as AddressInfo).port}/held:1` });
      await plane.until(id, takesKey, "the key");
      await eventually(() => waiting.size > 0, "the pull");
      // Known from an earlier start, if it is not the first.
      const { ssh, user } = await runner.record(id);
      const url = `ssh://${user?.name}@127.0.0.1:${ssh?.port}`;
      const refused = { code: 255, stdout: "", stderr: "the dev container is not up yet\n" };
      for (const command of ["echo host", undefined]) expect(await logIn(url, key.path, command)).toEqual(refused);
      registry.removeAllListeners("request").on("request", (_, response) => response.writeHead(404).end());
      for (const answer of waiting) answer();
      const failed = await plane.untilPhase(id, RUNNING);
      expect(failed.status?.devcontainer?.phase).toBe(DevContainerPhase.FAILED);
      const notice = "the dev container has failed: this is the host\n";
      await eventually(async () => {
        const { code, stdout, stderr } = await logIn(url, key.path, "test -e /etc/hostname && echo host");
        return code === 0 && stdout === "host\n" && stderr === notice;
      }, "the host");
    } finally {
      registry.close();
      registry.closeAllConnections();
    }
  });

  test.concurrent("sessions end with their container, and later ones are in the one that follows", async () => {
    const { id, ssh } = await running(contained());
    const open = async (mark: string) => {
      const session = { ended: ssh(`echo ${mark} >~/mark; echo ${mark} >/tmp/own; exec sleep 600`) };
      await eventually(async () => (await runner.exec(id, "cat ~/mark")) === mark, "the session");
      return session;
    };
    const isUp = () =>
      eventually(async () => (await runner.exec(id, "echo up")) === "up", "the container", 60_000, 200);
    const first = await open("first");
    await engine.docker("kill", `berth-${id}`);
    expect(await first.ended).toEqual({ code: 255, stdout: "", stderr: "the dev container has ended\n" });
    // Whoever comes while it is started again waits for it.
    const during = await ssh("cat /tmp/own");
    expect(during).toMatchObject({ code: 0, stdout: "first\n" });
    await isUp();
    const second = await open("second");
    plane.edit(id, (spec) => {
      if (spec.devcontainer) spec.devcontainer.session = "rebuilt";
    });
    expect((await second.ended).code).not.toBe(0);
    const isRebuilt = ({ status }: Environment) =>
      status?.devcontainer?.session === "rebuilt" && status.phase === RUNNING;
    await plane.until(id, isRebuilt, "the rebuild");
    expect(await ssh("cat /tmp/own || echo new")).toMatchObject({ code: 0, stdout: "new\n" });
  });

  test.concurrent("whatever is killed, what was started ends and nothing is left", async () => {
    const { id, ssh } = await running(contained());
    const logins = () => readdir(runner.folder(id, "run", "logins"));
    const home = (name: string) => readFile(runner.folder(id, "home", name), "utf8");
    const without = ssh("echo up >~/begun; cat; echo over >~/over", { input: undefined });
    await eventually(async () => (await home("begun")) === "up\n", "the session");
    const [folder = ""] = await logins();
    process.kill(Number.parseInt(folder, 10), "SIGKILL");
    expect((await without).code).not.toBe(0);
    await eventually(async () => (await home("over")) === "over\n", "the end of its input");
    expect(await logins()).toEqual([folder]);
    expect(await ssh("echo in")).toMatchObject({ code: 0, stdout: "in\n" });
    expect(await logins()).toEqual([]);

    const lost = ssh("exec 2>/dev/null; trap 'echo hup >~/hup; exit' HUP; echo up >~/up; while :; do sleep 0.1; done");
    await eventually(async () => (await home("up")) === "up\n", "the session");
    // The parent of a command is the supervisor.
    await runner.exec(id, "kill -KILL $PPID").catch(() => undefined);
    expect(await lost).toMatchObject({ code: 255, stderr: "the dev container has ended\n" });
    await eventually(async () => (await home("hup")) === "hup\n", "the hangup");
    expect(await ssh("echo in again")).toMatchObject({ code: 0, stdout: "in again\n" });
  });

  test("an open session is activity, and ends with the environment", async () => {
    const { id, ssh } = await running(contained());
    let child: ChildProcess | undefined;
    const session = ssh("sleep 600", {
      onStart: (started) => {
        child = started;
      },
    });
    await eventually(() => plane.activity.includes(id), "the signal");
    expect(plane.activitySources.at(plane.activity.lastIndexOf(id))).toBe("SSH");
    expect(child?.exitCode).toBeNull();
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    expect((await session).code).not.toBe(0);
  });
});
