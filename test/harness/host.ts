import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { RunnerHostConfig } from "../../src/config.ts";
import { startRunner } from "../../src/runner/main.ts";
import { sweepUp } from "./environments.ts";
import { shareRunner, type TestPlane } from "./plane.ts";
import { addClass } from "./tenants.ts";

/** A runner on this machine, signed up with a test's control plane and shared with all members. */
export interface TestHost extends AsyncDisposable {
  runnerId: string;
  classId: string;
  /** Public base URL of the runner. */
  url: string;
  dataDir: string;
  /** Everything that the runner logged so far, one JSON line per entry. */
  logged(): string;
}

/** Starts a runner in this process; `gitHosts` are exempt from the guards against private addresses. */
export async function startHost(
  test: TestPlane,
  options: Partial<RunnerHostConfig> & { gitHosts?: string[] } = {},
): Promise<TestHost> {
  const { gitHosts = [], ...more } = options;
  const folder = await mkdtemp(join(tmpdir(), "berth-host-"));
  const dataDir = join(folder, "r");
  const { runner, exchangeToken } = await test.admin.runners.createRunner({
    ...{ name: "test host", provider: RunnerProvider.LINUX_HOST },
  });
  const runnerId = runner?.runnerId ?? "";
  const config: RunnerHostConfig = {
    ...{ name: "test", host: "127.0.0.1", port: 0, publicUrl: "http://127.0.0.1:0", dataDir, maxEnvironments: 100 },
    ...{
      logDays: 30,
      allowUnenforced: false,
      sandbox: "auto" as const,
      hiddenFolders: [],
      hostDevcontainer: "run",
      containerEngine: "none",
      sshPorts: { from: 22_000, to: 22_999 },
      logLevel: "debug",
    },
    scm: { fallback: true, allowHosts: gitHosts, schemes: ["http"] },
    ...more,
  };
  const lines: string[] = [];
  const log = pino({ level: "debug" }, { write: (line: string) => void lines.push(line) });
  const running = await startRunner({ config, apiUrl: test.url, publicApiUrl: test.url, exchangeToken, log });
  await running.registered;
  await shareRunner(test, runnerId);
  return {
    ...{ runnerId, dataDir, url: `http://127.0.0.1:${running.port}` },
    classId: await addClass(test, runnerId),
    logged: () => lines.join(""),
    async [Symbol.asyncDispose]() {
      await running.stop();
      await sweepUp(dataDir);
      await rm(folder, { recursive: true, force: true });
    },
  };
}
