import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { lstat, mkdir, readdir, readFile, rename, stat, writeFile } from "node:fs/promises";
import { createServer, request, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Environment, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { type BerthClient, createBerthClient, createOpsClient } from "../src/client.ts";
import { connectSupervisor } from "../src/runner/supervisor/client.ts";
import { openDb } from "../src/store/db.ts";
import { processesOf } from "./harness/environments.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { type Installation, startInstallation } from "./harness/installation.ts";
import { codeOf } from "./harness/refusal.ts";
import { eventually } from "./harness/wait.ts";

// Somebody hostile inside one environment, with a credential of his own, or in charge of a repository.

const isRoot = process.getuid?.() === 0;
const SECRET = "victims-secret";
const TOKEN = /berth_[a-z]{3,4}_[0-9A-Za-z]{43,}/g;

let git: GitServer;
let blocked: Server;
let reached = 0;
let berth: Installation;
let admin: BerthClient;
let machine: { class: string };
let attacker: Inside;
let victim: Inside;
const seen = new Set<string>();

interface Inside {
  id: string;
  root: string;
  uid: number;
  supervisor: number;
  opsUrl: string;
  logsUrl: string;
  accessToken: string;
  logsToken: string;
  ownToken: string;
  /** Output and exit code of a command inside. */
  run(command: string): Promise<{ exitCode: number; stdout: string; stderr: string }>;
}

const portOf = (server: Server) => (server.address() as AddressInfo).port;

async function until(id: string, what: string, isSo: (environment: Environment) => unknown): Promise<Environment> {
  return await eventually(async () => {
    const { environment } = await admin.environments.getEnvironment({ environmentId: id });
    return environment && isSo(environment) ? environment : undefined;
  }, what);
}

const runs = (id: string) =>
  until(id, `environment ${id} runs`, ({ status }) => {
    if (status?.failureMessage.length) throw new Error(status.failureMessage.join("; "));
    return status?.phase === EnvironmentPhase.RUNNING;
  });

async function create(repository: string): Promise<string> {
  const { environment } = await admin.environments.createEnvironment({
    spec: {
      machine,
      content: { initializer: { specs: [{ spec: { case: "git", value: { remoteUri: git.url(repository) } } }] } },
    },
  });
  return environment?.id ?? "";
}

async function enter(id: string): Promise<Inside> {
  const { status } = await runs(id);
  const { accessToken } = await admin.environments.createEnvironmentAccessToken({ environmentId: id });
  const { accessToken: logsToken } = await admin.environments.createEnvironmentLogsToken({ environmentId: id });
  const opsUrl = status?.environmentUrls?.ops ?? "";
  const ops = createOpsClient({ opsUrl, token: accessToken });
  const root = join(berth.dataDir, "runner/environments", id);
  const { stdout } = await ops.exec({ command: 'printf %s "$GITPOD_API_KEY"' });
  const { pid } = JSON.parse(await readFile(join(root, "run/supervisor.json"), "utf8")) as { pid: number };
  for (const token of [accessToken, logsToken, stdout]) seen.add(token);
  return {
    ...{ id, root, opsUrl, accessToken, logsToken, ownToken: stdout, supervisor: pid },
    uid: (await stat(join(root, "home"))).uid,
    logsUrl: status?.environmentUrls?.logs ?? "",
    run: (command) => ops.exec({ command }),
  };
}

beforeAll(async () => {
  blocked = createServer((_request, response) => {
    reached++;
    response.writeHead(404).end();
  });
  await new Promise<void>((resolve) => blocked.listen(0, "127.0.0.1", resolve));
  git = await startGitServer();
  await git.createRepository("innocent");
  await git.createRepository("hostile", {
    files: {
      "README.md": "hello\n",
      ".gitattributes": "* filter=evil\n",
      "post-checkout": { content: "#!/bin/sh\nid > /tmp/hostile-hook\n", executable: true },
    },
  });
  berth = await startInstallation({ BERTH_SCM_ALLOW_HOSTS: git.host, BERTH_GIT_SCHEMES: "http" });
  seen.add(berth.adminToken);
  admin = createBerthClient({ baseUrl: berth.url, token: berth.adminToken });
  machine = await eventually(async () => {
    const filter = { canCreateEnvironments: true };
    const [usable] = (await admin.environments.listEnvironmentClasses({ filter })).environmentClasses;
    return usable && { class: usable.id };
  }, "a usable class");
  const ids = [await create("hostile"), await create("innocent")] as const;
  attacker = await enter(ids[0]);
  victim = await enter(ids[1]);
  await victim.run(`umask 022; for f in "$HOME" "$HOME/../secrets" "$HOME/../workspace" /tmp/berth-hostile-$(id -u); do
    mkdir -p "$f"; printf ${SECRET} > "$f/proof"; done`);
}, 60_000);

afterAll(async () => {
  for (const each of [attacker, victim]) {
    if (each)
      await admin.environments.deleteEnvironment({ environmentId: each.id, force: true }).catch(() => undefined);
  }
  await eventually(
    async () => (await readFile("/etc/passwd", "utf8")).split("\n").every((line) => !line.includes(berth.dataDir)),
    "the users of the environments go",
  );
  await berth?.[Symbol.asyncDispose]();
  await git?.close();
  blocked?.close();
});

describe.runIf(isRoot)("from inside an environment", () => {
  test("files of others and of the product cannot be read", async () => {
    const paths = [
      ...["workspace", "home", "secrets"].map((folder) => join(victim.root, folder, "proof")),
      ...["run/token", "run/supervisor.json", "variables.json", "state.json", "environment.log", "supervisor.json"].map(
        (name) => join(victim.root, name),
      ),
      ...[
        "master.key",
        "runner/credentials.json",
        "runner/environments",
        "runner/trash",
        "runner/compiled",
        "postgres/data/PG_VERSION",
      ].map((name) => join(berth.dataDir, name)),
      ...["state.json", "environment.log", "supervisor.json"].map((name) => join(attacker.root, name)),
      ...[berth.pid(), victim.supervisor].flatMap((pid) => [
        `/proc/${pid}/environ`,
        `/proc/${pid}/mem`,
        `/proc/${pid}/root`,
      ]),
    ];
    for (const path of paths) await lstat(path);
    const { stdout } = await attacker.run(
      `for f in ${paths.join(" ")}; do if [ -d "$f" ]; then ls "$f/" | grep -v "^${attacker.id}$"; else head -c 9 "$f"; fi >/dev/null 2>&1 && echo "$f"; done; true`,
    );
    expect(stdout).toBe("");
  });

  test("processes of others and of the product cannot be signalled", async () => {
    const { stdout } = await attacker.run(
      `for p in ${berth.pid()} ${victim.supervisor}; do kill -0 $p 2>/dev/null && echo $p; done; true`,
    );
    expect(stdout).toBe("");
  });

  test("a supervisor serves only its own environment, however the runner was led to it", async () => {
    const socket = join(victim.root, "run/supervisor.sock");
    const led = connectSupervisor(socket, attacker.id, { uid: victim.uid });
    expect((await led.exec({ command: "id -u" }).catch(String)).toString()).not.toContain(String(victim.uid));
    await expect(led.health()).rejects.toThrow();

    const run = join(attacker.root, "run");
    await attacker.run(`cd ${run} && mv supervisor.sock aside && ln -s ${socket} supervisor.sock`);
    expect(await codeOf(attacker.run("id -u"))).toBe("Unavailable");
    await rename(join(run, "aside"), join(run, "supervisor.sock"));
    expect((await attacker.run("id -u")).stdout.trim()).toBe(String(attacker.uid));
  });

  test("a fork storm takes nothing from others, and a stop ends it", async () => {
    // Far below the limit of an environment: the machine of the tests has to bear it.
    const storm = "ulimit -u 80; f() { f | f & }; f";
    await attacker.run(`setsid -f bash -c '${storm}' > /dev/null 2>&1`);
    await eventually(async () => (await processesOf(attacker.id)).length > 30, "the storm rages");
    for (const each of [victim, attacker]) expect((await each.run("id -u")).stdout.trim()).toBe(String(each.uid));
    await admin.environments.stopEnvironment({ environmentId: attacker.id });
    await until(attacker.id, "it stops", ({ status }) => status?.phase === EnvironmentPhase.STOPPED);
    expect(await processesOf(attacker.id)).toEqual([]);
    await admin.environments.startEnvironment({ environmentId: attacker.id });
    attacker = await enter(attacker.id);
  });

  test("the environment's token opens its own environment and nothing else", async () => {
    const { environments, runners, runnerConfiguration, identity } = createBerthClient({
      baseUrl: berth.url,
      token: attacker.ownToken,
    });
    const environmentId = victim.id;
    expect((await environments.getEnvironment({ environmentId: attacker.id })).environment?.id).toBe(attacker.id);
    expect((await environments.listEnvironments({})).environments.map(({ id }) => id)).toEqual([attacker.id]);
    const runnerId = (await admin.runners.listRunners({})).runners[0]?.runnerId ?? "";
    const calls = {
      get: environments.getEnvironment({ environmentId }),
      stop: environments.stopEnvironment({ environmentId }),
      active: environments.markEnvironmentActive({ environmentId, activitySignal: { source: "somebody" } }),
      logsToken: environments.createEnvironmentLogsToken({ environmentId }),
      accessToken: environments.createEnvironmentAccessToken({ environmentId }),
      ownAccessToken: environments.createEnvironmentAccessToken({ environmentId: attacker.id }),
      start: environments.startEnvironment({ environmentId: attacker.id }),
      delete: environments.deleteEnvironment({ environmentId: attacker.id }),
      create: environments.createEnvironment({ spec: {} }),
      runner: runners.createRunnerToken({ runnerId }),
      runnerLogs: runners.createRunnerLogsToken({ runnerId }),
      deleteRunner: runners.deleteRunner({ runnerId }),
      hostToken: runnerConfiguration.listHostAuthenticationTokens({}),
      exchange: identity.exchangeToken({ exchangeToken: attacker.ownToken }),
    };
    const codes = await Promise.all(
      Object.entries(calls).map(async ([name, call]) => [name, await codeOf(call).catch(() => "allowed")]),
    );
    expect(Object.fromEntries(codes)).toEqual({
      ...{ get: "NotFound", stop: "NotFound", active: "NotFound", logsToken: "NotFound" },
      ...{ accessToken: "PermissionDenied", ownAccessToken: "PermissionDenied", start: "PermissionDenied" },
      ...{ delete: "PermissionDenied", create: "PermissionDenied", runner: "PermissionDenied" },
      ...{ runnerLogs: "PermissionDenied", deleteRunner: "PermissionDenied", hostToken: "PermissionDenied" },
      exchange: "Unauthenticated",
    });
  });

  test("links, FIFOs and forged records lead the runner nowhere, through stop, start and delete", async () => {
    const canary = join(berth.dataDir, "canary");
    await mkdir(canary, { mode: 0o700 });
    await writeFile(join(canary, "file"), SECRET, { mode: 0o600 });
    const before = await stat(join(canary, "file"));
    const { stdout: serverStart } = await attacker.run(`cut -d' ' -f22 /proc/${berth.pid()}/stat`);
    const forged = JSON.stringify({ pid: berth.pid(), startTime: Number(serverStart), version: "x" });
    const { stderr } = await attacker.run(`cd ${attacker.root} || exit 1
      ln -sfn ${canary}/file home/.gitconfig
      rm -f run/token; ln -s ${canary}/file run/token
      rm -f logs/supervisor.log; ln -s ${canary}/file logs/supervisor.log
      printf '%s' '${forged}' > run/supervisor.json
      ln -s ${canary} workspace/.partial-x; ln -s ${canary} workspace/.berth-ready-x
      mkdir -p workspace/hostile/.devcontainer; mkfifo workspace/hostile/.devcontainer/devcontainer.json
      ln -s /etc/shadow workspace/hostile/.devcontainer.json
      git -C workspace/hostile config core.fsmonitor 'id > /tmp/berth-hostile-monitor'
      git -C workspace/hostile config filter.evil.clean 'id -u > ${attacker.root}/home/cleaned; cat'
      git -C workspace/hostile config core.pager 'id > /tmp/berth-hostile-pager'
      touch workspace/hostile/README.md "workspace/hostile/$(printf 'a\\nb\\033[31m\\377')" workspace/hostile/--upload-pack=x`);
    expect(stderr).toBe("");
    await admin.environments.stopEnvironment({ environmentId: attacker.id });
    await until(attacker.id, "it stops", ({ status }) => status?.phase === EnvironmentPhase.STOPPED);
    expect(await berth.processesOf(attacker.id)).toEqual([]);
    expect((await fetch(`${berth.url}/healthz`)).status).toBe(200);

    await admin.environments.startEnvironment({ environmentId: attacker.id });
    attacker = await enter(attacker.id);
    await until(attacker.id, "changes are seen", ({ status }) => status?.content?.git?.totalChangedFiles);
    const cleaned = await readFile(join(attacker.root, "home/cleaned"), "utf8").catch(() => "");
    expect(["", String(attacker.uid)]).toContain(cleaned.trim());
    const { stdout: left } = await attacker.run(
      `umask 022; cp /usr/bin/id /tmp/berth-hostile-$(id -u) && chmod u+s /tmp/berth-hostile-$(id -u) && ls /tmp/berth-hostile-$(id -u)`,
    );
    // In a sandbox, a folder of the environment stands in for /tmp.
    const places = [left.trim(), join(attacker.root, left.trim())];
    expect(places.filter((place) => existsSync(place))).toHaveLength(1);
    await admin.environments.deleteEnvironment({ environmentId: attacker.id });
    await until(attacker.id, "it is deleted", ({ status }) => status?.phase === EnvironmentPhase.DELETED);

    const after = await stat(join(canary, "file"));
    expect([after.uid, after.mode, after.mtimeMs]).toEqual([before.uid, before.mode, before.mtimeMs]);
    expect(await readdir(canary)).toEqual(["file"]);
    // What a set-user-id program may do must not wait for the next environment with the same id.
    expect(places.filter((place) => existsSync(place))).toEqual([]);
    await eventually(async () => !(await readdir(join(berth.dataDir, "runner/trash"))).length, "nothing is left");
  });
});

describe("from outside", () => {
  const rpc = async (base: string, path: string, token: string, body = "{}", headers: Record<string, string> = {}) => {
    const response = await fetch(`${base}/${path}`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${token}`, ...headers },
      body,
    });
    return { status: response.status, text: await response.text() };
  };

  test("a token opens nothing but what its kind is for", async () => {
    const list = "gitpod.v1.EnvironmentService/ListEnvironments";
    const register = "berth.runner.v1.RunnerControlService/Register";
    const exec = "supervisor.v1.EnvironmentOpsService/Exec";
    const command = JSON.stringify({ command: "true" });
    const { accessToken, logsToken, ownToken, opsUrl, logsUrl } = victim;
    const runner = (
      JSON.parse(await readFile(join(berth.dataDir, "runner/credentials.json"), "utf8")) as { accessToken: string }
    ).accessToken;
    seen.add(runner);
    const logs = async (token: string) =>
      (await fetch(`${logsUrl}?follow=false`, { headers: { authorization: `Bearer ${token}` } })).status;
    for (const token of [accessToken, logsToken, "", "x", `${berth.adminToken}x`, "berth_pat_", "\u00ff"]) {
      expect((await rpc(berth.url, list, token)).status).toBe(401);
    }
    for (const token of [berth.adminToken, ownToken]) expect((await rpc(berth.url, register, token)).status).toBe(403);
    for (const token of [berth.adminToken, runner, logsToken, ""]) {
      expect((await rpc(opsUrl, exec, token, command)).status).toBe(401);
    }
    for (const token of [berth.adminToken, runner, ownToken, ""]) expect(await logs(token)).toBe(401);
    expect((await rpc(opsUrl, exec, accessToken, command)).status).toBe(200);
    expect(await logs(accessToken)).toBe(200);
    expect((await fetch(`${opsUrl}/${exec}?access_token=${accessToken}`, { method: "POST" })).status).toBe(401);
    expect((await rpc(berth.runnerUrl, list, berth.adminToken)).status).toBe(404);
    expect((await rpc(opsUrl.replace(victim.id, randomUUID()), exec, accessToken, command)).status).toBe(403);
  });

  test("paths of the runner's port lead to no other place", async () => {
    const { hostname, port } = new URL(berth.runnerUrl);
    const ask = (path: string, method: string) =>
      new Promise<[number, string]>((resolve, reject) => {
        const headers = { authorization: `Bearer ${victim.accessToken}`, origin: "https://evil.example" };
        const call = request({ hostname, port, path, method, headers }, async (response) => {
          expect(response.headers["access-control-allow-credentials"]).toBeUndefined();
          resolve([response.statusCode ?? 0, await text(response)]);
        });
        call.once("error", reject);
        call.end();
      });
    const base = `/environments/${victim.id}`;
    for (const path of [
      `${base}/logs/../../../state.json`,
      `${base}/..%2f..%2fcredentials.json`,
      `${base}/logs%2f..`,
      `${base}/logs/`,
      `/environments/../${victim.id}/logs`,
      `/environments/${victim.id.toUpperCase()}/logs`,
      `//evil/environments/${victim.id}/logs`,
      `${base}/ops/../logs`,
      `${base}/healthz`,
      `${base}/ops/healthz`,
      `${base}/ops/workspace-folder`,
      "/environments/..%00/logs",
    ]) {
      for (const method of ["GET", "PUT"]) {
        const [status, body] = await ask(path, method);
        expect([path, method, status >= 400 && status !== 500, body.includes("section-create")]).toEqual([
          path,
          method,
          true,
          false,
        ]);
      }
    }
    for (const method of ["POST", "PUT", "DELETE", "PATCH", "TRACE"]) {
      expect((await ask(`${base}/logs?follow=false`, method))[0]).toBe(405);
    }
  });

  test("addresses that name programs, files, credentials or this machine are refused", async () => {
    const before = reached;
    const port = portOf(blocked);
    const hostile = [
      ...[
        "ext::sh -c id",
        "file:///etc/passwd",
        "/etc/passwd",
        "--upload-pack=id",
        "-oProxyCommand=id",
        "ssh://-oProxyCommand=id/x",
      ],
      ...["git@-oProxyCommand=id:x/y", "https://user:secret@example.com/a/b", "https://example.com/a\nb"],
      ...[
        "javascript:alert(1)",
        "fd::17",
        `http://${git.host}@127.0.0.1:${port}/a/b`,
        `http://127.0.0.1:${port}#@${git.host}/a/b`,
      ],
      ...[
        "127.0.0.1",
        "localhost",
        "localhost.",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
      ].map((host) => `http://${host}:${port}/a/b.git`),
      ...["127.0.0.1", "0", "[::]", "169.254.169.254", "[fd00:ec2::254]", "[64:ff9b::7f00:1]"].map(
        (host) => `https://${host}:${port}/a/b.git`,
      ),
    ];
    for (const url of hostile) {
      const code = await codeOf(admin.runners.parseContextURL({ contextUrl: url }));
      expect([url, code]).toEqual([url, expect.stringMatching(/^(InvalidArgument|FailedPrecondition|NotFound)$/)]);
    }
    // The runner asks its own guard again.
    const [spelled = "", metadata = ""] = [`https://2130706433:${port}/a/b.git`, "https://169.254.169.254/a/b.git"];
    const specs = [
      { case: "git" as const, value: { remoteUri: spelled } },
      { case: "git" as const, value: { remoteUri: metadata } },
      { case: "contextUrl" as const, value: { url: spelled } },
    ];
    for (const spec of specs) {
      const content = { initializer: { specs: [{ spec }] } };
      const { environment } = await admin.environments.createEnvironment({ spec: { machine, content } });
      const environmentId = environment?.id ?? "";
      const failed = await until(environmentId, "the clone fails", ({ status }) => status?.failureMessage.length);
      expect(failed.status?.failureMessage.join()).toContain("not allowed");
      await admin.environments.deleteEnvironment({ environmentId, force: true });
    }
    expect(reached).toBe(before);
  });
});

test("no token and no secret is in the log, in a command line or readable in the database", async () => {
  const found: string[] = [];
  const look = (where: string, what: string) => {
    for (const token of what.match(TOKEN) ?? [])
      if (token !== berth.adminToken || where !== "output") found.push(where);
    for (const token of seen) if (where !== "output" && what.includes(token)) found.push(where);
  };
  look("output", berth.output());
  for (const pid of (await readdir("/proc")).filter((name) => /^\d+$/.test(name))) {
    look(`cmdline ${pid}`, await readFile(`/proc/${pid}/cmdline`, "latin1").catch(() => ""));
  }
  look("environment.log", await readFile(join(victim.root, "environment.log"), "utf8"));
  const db = openDb(
    `postgres://berth@localhost/berth?host=${encodeURIComponent(join(berth.dataDir, "postgres/data"))}`,
  );
  try {
    const tables = await db.write<
      { name: string }[]
    >`select tablename as name from pg_tables where schemaname = 'public'`;
    expect(tables.length).toBeGreaterThan(5);
    for (const { name } of tables) {
      const rows = await db.write<{ row: string }[]>`select to_jsonb(t)::text as row from ${db.write(name)} t`;
      for (const { row } of rows) {
        look(`table ${name}`, row);
        const binary = [...row.matchAll(/\\\\x([0-9a-f]+)/g)].map(([, hex = ""]) =>
          Buffer.from(hex, "hex").toString("latin1"),
        );
        look(`table ${name}`, binary.join("\n"));
      }
    }
  } finally {
    await db.close();
  }
  expect(found).toEqual([]);
});
