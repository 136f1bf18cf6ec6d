import { RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { BerthClient } from "../../src/client.ts";
import { usableClass } from "./environments.ts";
import { freePort } from "./free-port.ts";
import { type Program, startProgram } from "./program.ts";

/** A runner that is a process of its own. */
export interface StandAloneRunner {
  runnerId: string;
  /** A class of its environments. */
  classId: string;
  /** What it has printed since it was started last. */
  output(): string;
  kill(): Promise<void>;
  /** Ends it in order; resolves with its exit code. */
  stop(): Promise<number | null>;
  /** Starts it, after it was killed; resolves once it is connected. */
  start(): Promise<void>;
}

/** Starts a runner beside the embedded one, with `dataDir` and these variables. */
export async function startStandAloneRunner(
  client: BerthClient,
  apiUrl: string,
  dataDir: string,
  env: Record<string, string> = {},
): Promise<StandAloneRunner> {
  const made = await client.runners.createRunner({ name: "Alone", provider: RunnerProvider.LINUX_HOST });
  const runnerId = made.runner?.runnerId ?? "";
  await client.runnerConfiguration.createEnvironmentClass({
    runnerId,
    displayName: "Small",
    description: "Of this test",
    configuration: [
      { key: "cpu", value: "1" },
      { key: "memory", value: "1024" },
    ],
  });
  const settings = {
    BERTH_RUNNER_API_URL: apiUrl,
    BERTH_RUNNER_EXCHANGE_TOKEN: made.exchangeToken,
    BERTH_RUNNER_DATA_DIR: dataDir,
    BERTH_RUNNER_PORT: String(await freePort()),
    ...env,
  };
  let program: Program | undefined;
  const start = async () => {
    program = startProgram(["runner"], settings);
    await program.says("registered with the control plane");
  };
  await start();
  const classId = await usableClass(client, runnerId);
  return {
    ...{ runnerId, classId, start },
    output: () => program?.output() ?? "",
    kill: async () => await program?.[Symbol.asyncDispose](),
    async stop() {
      program?.send("SIGTERM");
      return (await program?.ended()) ?? null;
    },
  };
}
