import { pino } from "pino";
import { readRunnerConfig } from "../config.ts";
import { startRunner } from "../runner/main.ts";
import { ExitCode } from "./exit.ts";
import { firstSignal } from "./signals.ts";

/** A runner alone, against a control plane elsewhere, until a signal or the control plane ends it. */
export async function runRunner(env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const config = readRunnerConfig(env);
  const log = pino({ level: config.logLevel }, pino.destination({ fd: 2, sync: true }));
  const stopAsked = firstSignal();
  const { apiUrl, exchangeToken } = config;
  const runner = await startRunner({ config, apiUrl, publicApiUrl: apiUrl, exchangeToken, log });
  process.stdout.write(`berth runner is ready at ${config.publicUrl}\n`);
  const ended = await Promise.race([runner.finished, stopAsked]);
  if (ended === "refused" || ended === "replaced") {
    log.error(
      ended === "refused"
        ? "the control plane refuses this runner's credential"
        : "another process has registered for this runner",
    );
    return ExitCode.REFUSED;
  }
  await runner.stop();
  return ExitCode.CLEAN;
}
