import { execFileSync } from "node:child_process";
import { randomInt, randomUUID } from "node:crypto";
import { chown, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import { expect } from "vitest";
import { connectSupervisor, type SupervisorClient } from "../src/runner/supervisor/client.ts";
import type { SupervisorConfig } from "../src/runner/supervisor/config.ts";
import { launchSupervisor } from "../src/runner/supervisor/launch.ts";
import { isAlive, killEnvironmentProcesses, type ProcessRef } from "../src/runner/supervisor/processes.ts";
import type { SupervisorRecord } from "../src/runner/supervisor/record.ts";

export const isRoot = process.getuid?.() === 0;

/** A directory laid out as a runner does it, for a user of its own (no entry in /etc/passwd) when the tests run as root. */
export interface TestEnvironment extends AsyncDisposable {
  config: SupervisorConfig;
  configPath: string;
  workspace: string;
  client: SupervisorClient;
  /** Starts a supervisor; there may have been one before. */
  launch(): Promise<SupervisorRecord>;
  /** Replaces the variables given to processes. */
  setEnv(env: Record<string, string>): Promise<void>;
  /** Writes a file below the environment's directory, owned by its user; returns its path. */
  put(path: string, content: string | Uint8Array): Promise<string>;
  /** Runs a script in the checkout as the environment's user, fit for commits; returns its output. */
  script(text: string): string;
  /** Content of a file in the workspace once it is there. */
  appears(name: string): Promise<string>;
}

export async function testEnvironment(change: Partial<SupervisorConfig> = {}): Promise<TestEnvironment> {
  const outer = await mkdtemp(join(tmpdir(), "berth-sup-"));
  const id = isRoot ? 200_000 + randomInt(1_000_000_000) : undefined;
  const own = (path: string) => chown(path, id ?? -1, id ?? -1);
  const root = join(outer, "env");
  if (isRoot) await chown(outer, id ?? 0, 0);
  for (const path of [
    root,
    ...["workspace", "workspace/repo", "home", "secrets", "logs", "run"].map((n) => join(root, n)),
  ]) {
    await mkdir(path);
    await own(path);
  }
  const config: SupervisorConfig = {
    environmentId: randomUUID(),
    root,
    socketPath: join(root, "run", "supervisor.sock"),
    workspaceFolder: join(root, "workspace", "repo"),
    uid: id,
    gid: id,
    userName: "berth-test",
    shell: "/bin/sh",
    envFile: join(root, "secrets", "env.json"),
    version: "1.2.3-test",
    ...change,
  };
  const controlDirectory = await mkdtemp(join(tmpdir(), "berth-sup-config-"));
  const put = async (path: string, content: string | Uint8Array) => {
    const file = join(root, path);
    await writeFile(file, content, { mode: 0o600 });
    await own(file);
    return file;
  };
  await put("secrets/env.json", JSON.stringify({ FROM_FILE: "yes" }));
  const configPath = join(controlDirectory, "config.json");
  const client = connectSupervisor(config.socketPath, config.environmentId, { uid: id });
  return {
    config,
    configPath,
    workspace: config.workspaceFolder,
    client,
    launch: async () => (await launchSupervisor(configPath, config)).record,
    setEnv: async (env) => void (await put("secrets/env.json", JSON.stringify(env))),
    put,
    script(text) {
      const env = {
        PATH: process.env.PATH,
        HOME: join(root, "home"),
        GIT_AUTHOR_NAME: "A",
        GIT_AUTHOR_EMAIL: "a@example.com",
        GIT_COMMITTER_NAME: "A",
        GIT_COMMITTER_EMAIL: "a@example.com",
      };
      const user = { uid: id, gid: id };
      return execFileSync("sh", ["-euc", text], { cwd: config.workspaceFolder, env, ...user, encoding: "utf8" }).trim();
    },
    appears: (name) => waitFor(() => readFile(join(config.workspaceFolder, name), "utf8").catch(() => undefined)),
    async [Symbol.asyncDispose]() {
      const left = await killEnvironmentProcesses({ environmentId: config.environmentId, uid: id, deadlineMs: 10_000 });
      await rm(outer, { recursive: true, force: true });
      await rm(controlDirectory, { recursive: true, force: true });
      expect(left).toEqual([]);
    },
  };
}

/** Asks again until there is an answer; fails after 30 s. */
export async function waitFor<T>(ask: () => Promise<T | undefined | false> | T | undefined | false): Promise<T> {
  const deadline = Date.now() + 30_000;
  for (;;) {
    const answer = await ask();
    if (answer !== undefined && answer !== false) return answer;
    if (Date.now() > deadline) throw new Error("nothing happened within 30 s");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export const gone = (reference: ProcessRef) => waitFor(() => !isAlive(reference));

/** Expects a call to fail with a code; returns the error. */
export async function failure(call: Promise<unknown>, code: Code): Promise<ConnectError> {
  const error = await call.then(
    (answer) =>
      new Error(
        `succeeded with ${JSON.stringify(answer, (_, value) => (typeof value === "bigint" ? `${value}` : value))}`,
      ),
    (reason: unknown) => reason,
  );
  if (!(error instanceof ConnectError)) throw error;
  expect(`${Code[error.code]}: ${error.rawMessage}`).toMatch(new RegExp(`^${Code[code]}: .`));
  return error;
}
