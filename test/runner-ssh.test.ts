import { execFile } from "node:child_process";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createConnection, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { create } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type Environment,
  EnvironmentPhase,
  EnvironmentSpec_SSHPublicKeySchema,
} from "../gen/gitpod/v1/environment_pb.js";
import {
  authorizedKeys,
  containedSessionScript,
  serverConfig,
  sessionScript,
  shellVariables,
} from "../src/runner/ssh/config.ts";
import { findSshServer } from "../src/runner/ssh/server.ts";
import { hasSession } from "../src/runner/ssh/sessions.ts";
import { isAlive } from "../src/runner/supervisor/processes.ts";
import { clientArgs, clientKey, logIn, sshMissing } from "./harness/ssh-client.ts";
import { eventually } from "./harness/wait.ts";
import { FakeControlPlane, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED } = EnvironmentPhase;
const run = promisify(execFile);

vi.setConfig({ testTimeout: 120_000 });

const found = await findSshServer(process.env.PATH ?? "");
const missing = await sshMissing();
const KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1yT2iJ0L9vS0QmYw0z0Z6bq3XkQ0m1o3v7b1yZ3x2c";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-ssh-"));
  await chmod(folder, 0o755);
});
afterAll(async () => {
  vi.unstubAllEnvs();
  await rm(folder, { recursive: true, force: true });
});

const sshOf = ({ status }: Environment) => ({
  url: status?.environmentUrls?.ssh?.url ?? "",
  keys: Object.fromEntries((status?.sshPublicKeys ?? []).map(({ id, phase }) => [id, phase])),
});
const setKeys = (plane: FakeControlPlane, id: string, keys: Record<string, string>) =>
  plane.edit(id, (spec) => {
    spec.sshPublicKeys = Object.entries(keys).map(([each, value]) =>
      create(EnvironmentSpec_SSHPublicKeySchema, { id: each, value }),
    );
  });
const untilKeys = (plane: FakeControlPlane, id: string, keys: Record<string, ContentPhase>) =>
  plane.until(
    id,
    (environment) =>
      JSON.stringify(sshOf(environment).keys) === JSON.stringify(keys) && environment.status?.phase === RUNNING,
    "the keys",
  );

/** The server of an environment, as the runner has written it down. */
async function serverOf(runner: TestRunner, id: string) {
  const record = JSON.parse(await readFile(runner.folder(id, "state.json"), "utf8"));
  return record.ssh as { port: number; process?: { pid: number; startTime: number } };
}

/** A control plane, and a runner that finds the programs of a folder first. */
async function withPrograms(programs: string | undefined) {
  vi.stubEnv("PATH", programs === undefined ? process.env.PATH : `${programs}:${process.env.PATH}`);
  const plane = await FakeControlPlane.start();
  const runner = await TestRunner.create(plane);
  return {
    plane,
    runner,
    async [Symbol.asyncDispose]() {
      await runner[Symbol.asyncDispose]();
      await plane[Symbol.asyncDispose]();
      vi.unstubAllEnvs();
    },
  };
}

describe("what the server and its sessions are told", () => {
  const settings = {
    ...{ address: "127.0.0.1", port: 22_001, userName: "berth-1", hostKey: "/a b/k", sftpServer: "/usr/lib/sftp" },
    ...{ authorizedKeys: "/a b/100%/keys", sessionScript: "/a b/it's" },
    isContained: false,
  };

  test("only keys log in, as the one user", () => {
    const lines = serverConfig(settings).split("\n");
    for (const line of [
      "Port 22001",
      "ListenAddress 127.0.0.1",
      'HostKey "/a b/k"',
      'AuthorizedKeysFile "/a b/100%%/keys"',
      "AllowUsers berth-1",
      "AuthenticationMethods publickey",
      "PasswordAuthentication no",
      "KbdInteractiveAuthentication no",
      "Subsystem sftp /usr/lib/sftp",
      "ForceCommand /bin/sh '/a b/it'\\''s'",
    ]) {
      expect(lines).toContain(line);
    }
    expect(serverConfig({ ...settings, sftpServer: undefined })).not.toContain("Subsystem");
  });

  test("a session has the variables of the environment, whatever is in them", async () => {
    const variables = join(folder, "variables.sh");
    const tricky = 'it\'s $HOME `id`\nsecond "line" \\ end';
    const text = shellVariables({
      HOME: folder,
      SHELL: "/bin/sh",
      TRICKY: tricky,
      UID: "0",
      "not-a-name": "x",
      EMPTY: "",
    });
    await writeFile(variables, text);
    const script = join(folder, "session");
    await writeFile(script, sessionScript(variables));
    const command =
      // biome-ignore lint/suspicious/noTemplateCurlyInString: the shell's.
      'printf \'%s|\' "$TRICKY" "$PWD" "${EMPTY-unset}" "${SSH_ORIGINAL_COMMAND-unset}" "$BERTH_SSH_SESSION"';
    const { stdout } = await run("sh", [script], { env: { SSH_ORIGINAL_COMMAND: command, SHELL: "/bin/false" } });
    expect(stdout).toBe(`${tricky}|${folder}||unset|1|`);
    // Without a command it is the shell, here one that says so.
    const shell = join(folder, "shell");
    await writeFile(shell, '#!/bin/sh\necho "shell $*"\n', { mode: 0o755 });
    await writeFile(variables, shellVariables({ HOME: folder, SHELL: shell }));
    expect((await run("sh", [script], { env: {} })).stdout).toBe("shell \n");
  });

  test("a session of a container enters it, but for file transfers, and never ends up on the host", async () => {
    const login = join(folder, "it's login");
    const given = { environmentId: "id", variables: join(folder, "none"), login, sftpServer: "/usr/lib/sftp" };
    const script = join(folder, "contained");
    await writeFile(script, containedSessionScript(given));
    const env = { NODE_OPTIONS: "--inspect", SHELL: "/bin/echo", HOME: folder };
    const session = (command?: string) =>
      run("sh", [script], { env: { ...env, ...(command !== undefined && { SSH_ORIGINAL_COMMAND: command }) } });
    for (const command of [undefined, "ls", "/usr/lib/sftp -h"]) {
      await expect(session(command)).rejects.toMatchObject({
        code: 255,
        stdout: "",
        stderr: "the dev container is not up yet\n",
      });
    }
    expect((await session("/usr/lib/sftp")).stdout).toBe("-c /usr/lib/sftp\n");
    const shows =
      // biome-ignore lint/suspicious/noTemplateCurlyInString: the shell's.
      'printf "%s|" "${SSH_ORIGINAL_COMMAND-none}" "${NODE_OPTIONS-none}" $BERTH_SSH_SESSION $BERTH_ENVIRONMENT_ID';
    await writeFile(login, `#!/bin/sh\n${shows}\nexit 7\n`, { mode: 0o755 });
    await expect(session("a 'b' $c\nd")).rejects.toMatchObject({ code: 7, stdout: "a 'b' $c\nd|none|1|id|" });
    await expect(session()).rejects.toMatchObject({ code: 7, stdout: "none|none|1|id|" });
    // The home is that of the container, whose startup files are not for the host's shell.
    expect(serverConfig({ ...settings, isContained: true }).split("\n")).toContain("SetEnv SHLVL=1");
    expect(serverConfig(settings)).not.toContain("SHLVL");
  });

  test("a key is one line, and nothing else is written", () => {
    const keys = [`${KEY} a`, "", `${KEY} b\ncommand="id" ${KEY}`, ` ${KEY} c `].map((value, index) =>
      create(EnvironmentSpec_SSHPublicKeySchema, { id: String(index), value }),
    );
    expect(authorizedKeys(keys)).toBe(`${KEY} a\n${KEY} c\n`);
  });
});

describe("without an SSH server", () => {
  test.skipIf(found !== undefined)(
    "keys are unavailable with a warning, while it runs too, and there is no address",
    async () => {
      await using it = await withPrograms(undefined);
      const { plane, runner } = it;
      await runner.start();
      const id = plane.create({ sshPublicKeys: [{ id: "k1", value: KEY }] });
      const started = await plane.untilPhase(id, RUNNING);
      const warning = "SSH keys cannot be used: there is no SSH server on this runner";
      expect(sshOf(started)).toEqual({ url: "", keys: { k1: ContentPhase.UNAVAILABLE } });
      expect(started.status?.warningMessage.join("; ")).toContain(warning);
      setKeys(plane, id, {});
      const removed = await untilKeys(plane, id, {});
      expect(removed.status?.warningMessage.join("; ")).not.toContain(warning);
      setKeys(plane, id, { k2: KEY });
      const added = await untilKeys(plane, id, { k2: ContentPhase.UNAVAILABLE });
      expect(added.status?.warningMessage.join("; ")).toContain(warning);
    },
  );
});

/** Stands in for `sshd`: reads the same configuration, and greets. */
const STAND_IN = `const { readFileSync } = require("node:fs");
const config = readFileSync(process.argv[process.argv.indexOf("-f") + 1], "utf8");
const of = (name) => new RegExp("^" + name + " (.*)$", "m").exec(config)[1];
const server = require("node:net").createServer((socket) => {
  socket.on("error", () => undefined);
  socket.write("SSH-2.0-stand-in\\r\\n");
});
server.on("error", () => process.exit(255));
server.listen({ host: of("ListenAddress"), port: Number(of("Port")), exclusive: true });
`;

describe("with a server that stands in for sshd", () => {
  let programs: string;
  beforeAll(async () => {
    programs = await mkdtemp(join(folder, "bin-"));
    await chmod(programs, 0o755);
    await writeFile(join(programs, "sshd.cjs"), STAND_IN);
    await writeFile(join(programs, "sshd"), '#!/bin/sh\nexec node "$0.cjs" "$@"\n', { mode: 0o755 });
    const keygen = `#!/bin/sh\nfor last; do :; done\necho key-$$ >"$last"; echo public >"$last.pub"\n`;
    await writeFile(join(programs, "ssh-keygen"), keygen, { mode: 0o755 });
  });

  test("it is started, its keys are kept, adopted after a restart of the runner, and ended with the environment", async () => {
    await using it = await withPrograms(programs);
    const { plane, runner } = it;
    const first = await runner.start();
    const id = plane.create({ sshPublicKeys: [{ id: "k1", value: `${KEY} one` }] });
    const started = await plane.untilPhase(id, RUNNING);
    const ssh = await serverOf(runner, id);
    const user = (await runner.record(id)).user?.name;
    await untilKeys(plane, id, { k1: ContentPhase.READY });
    expect(sshOf(started).url).toBe(`ssh://${user}@127.0.0.1:${ssh.port}`);
    const keysFile = runner.folder(id, "ssh", "authorized_keys");
    expect(await readFile(keysFile, "utf8")).toBe(`${KEY} one\n`);
    const hostKey = await readFile(runner.folder(id, "ssh", "host_key"), "utf8");

    setKeys(plane, id, { k1: `${KEY} one`, k2: `${KEY} two` });
    await untilKeys(plane, id, { k1: ContentPhase.READY, k2: ContentPhase.READY });
    expect(await readFile(keysFile, "utf8")).toBe(`${KEY} one\n${KEY} two\n`);
    setKeys(plane, id, { k2: `${KEY} two` });
    await untilKeys(plane, id, { k2: ContentPhase.READY });
    expect(await readFile(keysFile, "utf8")).toBe(`${KEY} two\n`);

    await first.stop();
    const links = plane.registrations.length;
    await runner.start();
    await eventually(() => plane.registrations.length > links, "the second runner");
    setKeys(plane, id, { k3: `${KEY} three` });
    await untilKeys(plane, id, { k3: ContentPhase.READY });
    expect(await serverOf(runner, id)).toEqual(ssh);
    expect(ssh.process && isAlive(ssh.process)).toBe(true);

    plane.stopEnvironment(id);
    const stopped = await plane.untilPhase(id, STOPPED);
    expect(sshOf(stopped).url).toBe("");
    expect(ssh.process && isAlive(ssh.process)).toBe(false);
    expect(await readFile(runner.folder(id, "secrets", "session.sh"), "utf8").catch(() => "gone")).toBe("gone");
    plane.startEnvironment(id);
    await plane.untilPhase(id, RUNNING);
    expect((await serverOf(runner, id)).port).toBe(ssh.port);
    expect(await readFile(runner.folder(id, "ssh", "host_key"), "utf8")).toBe(hostKey);
  });

  test("a server that dies is started again", async () => {
    await using it = await withPrograms(programs);
    const { plane, runner } = it;
    await runner.start();
    const id = plane.create({ sshPublicKeys: [{ id: "k1", value: KEY }] });
    await plane.untilPhase(id, RUNNING);
    const { process: before } = await serverOf(runner, id);
    if (!before) throw new Error("no server");
    process.kill(before.pid, "SIGKILL");
    const after = await eventually(async () => {
      const { process: now } = await serverOf(runner, id);
      return now && now.pid !== before.pid && isAlive(now);
    }, "another server");
    expect(after).toBe(true);
    await untilKeys(plane, id, { k1: ContentPhase.READY });
  });

  test("ports that others have are passed over; without one the keys have failed, and it runs nevertheless", async () => {
    const other = createServer();
    await new Promise<void>((resolve) => other.listen(0, "127.0.0.1", resolve));
    const taken = (other.address() as { port: number }).port;
    try {
      await using it = await withPrograms(programs);
      const { plane, runner } = it;
      await runner.start({ sshPorts: { from: taken, to: taken } });
      const id = plane.create({ sshPublicKeys: [{ id: "k1", value: KEY }] });
      const started = await plane.untilPhase(id, RUNNING);
      expect(sshOf(started).url).toBe("");
      const failed = await untilKeys(plane, id, { k1: ContentPhase.FAILED });
      expect(failed.status?.warningMessage.join()).toContain("SSH keys cannot be used: no port for SSH is free");
    } finally {
      other.close();
    }
  });

  test("variables of sessions follow the secrets, and lie nowhere but among them", async () => {
    await using it = await withPrograms(programs);
    const { plane, runner } = it;
    await runner.start();
    const mount = { case: "environmentVariable" as const, value: "PASSWORD" };
    const id = plane.create({ secrets: [plane.secret("PASSWORD", mount, "it's first")] });
    await plane.untilPhase(id, RUNNING);
    const path = runner.folder(id, "secrets", "session.sh");
    const read = async () => {
      const command = `. ${path}; printf %s "$PASSWORD-$BERTH_ENVIRONMENT_ID"`;
      return (await run("sh", ["-c", command], { env: {} })).stdout;
    };
    expect(await read()).toBe(`it's first-${id}`);
    plane.renewSecret(id, "PASSWORD", "second");
    await eventually(async () => (await read()) === `second-${id}`, "the new value");
  });
});

describe.skipIf(missing)(`with OpenSSH${missing ? ` (${missing})` : ""}`, () => {
  const login = async (url: string, key: string, command: string) => {
    const { code, stdout, stderr } = await logIn(url, key, command);
    if (code !== 0) throw new Error(stderr);
    return stdout.trim();
  };

  test("ENV-30: a key that is READY logs in and transfers files, one that was removed does not", async () => {
    await using it = await withPrograms(undefined);
    const { plane, runner } = it;
    await runner.start();
    const [one, two] = [await clientKey(folder, "one"), await clientKey(folder, "two")];
    const mount = { case: "environmentVariable" as const, value: "PASSWORD" };
    const id = plane.create({ secrets: [plane.secret("PASSWORD", mount, "from a secret")] });
    const { url } = sshOf(await plane.untilPhase(id, RUNNING));
    expect(url).toMatch(/^ssh:\/\/[^@]+@127\.0\.0\.1:\d+$/);
    await expect(login(url, one.path, "true")).rejects.toThrow("Permission denied (publickey)");
    setKeys(plane, id, { k1: one.text });
    await untilKeys(plane, id, { k1: ContentPhase.READY });
    const command = 'echo "$PASSWORD $BERTH_ENVIRONMENT_ID $HOME $PWD"; exit 0';
    const home = runner.folder(id, "home");
    expect(await login(url, one.path, command)).toBe(`from a secret ${id} ${home} ${home}`);
    expect(await login(url, one.path, "id -un")).toBe((await runner.record(id)).user?.name);
    await expect(login(url, two.path, "true")).rejects.toThrow("Permission denied (publickey)");

    const { args, port, target } = clientArgs(url, one.path);
    const batch = join(folder, "batch");
    await writeFile(join(folder, "sent"), "sent\n");
    await writeFile(batch, `put ${join(folder, "sent")} received\n`);
    await run("sftp", [...args, "-P", port, "-b", batch, target]);
    expect(await readFile(join(home, "received"), "utf8")).toBe("sent\n");

    setKeys(plane, id, { k2: two.text });
    await untilKeys(plane, id, { k2: ContentPhase.READY });
    await expect(login(url, one.path, "true")).rejects.toThrow("Permission denied (publickey)");
    expect(await login(url, two.path, "echo in")).toBe("in");
  });

  test("an open session is activity and ends with the environment; a connection that proves nothing is none", async () => {
    await using it = await withPrograms(undefined);
    const { plane, runner } = it;
    await runner.start();
    const { path, text } = await clientKey(folder, "active");
    const id = plane.create({ sshPublicKeys: [{ id: "k", value: text }] });
    const { url } = sshOf(await plane.untilPhase(id, RUNNING));
    await untilKeys(plane, id, { k: ContentPhase.READY });
    const { process: server } = await serverOf(runner, id);
    const stranger = createConnection(Number(new URL(url).port), "127.0.0.1");
    await new Promise((resolve) => stranger.once("data", resolve));
    expect(server && (await hasSession(server))).toBe(false);
    const session = login(url, path, "touch ~/here; sleep 600").catch(() => "ended");
    await eventually(() => plane.activity.includes(id), "the signal");
    expect(plane.activitySources.at(-1)).toBe("SSH");
    expect(server && (await hasSession(server))).toBe(true);
    stranger.destroy();
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    expect(await session).toBe("ended");
  });
});
