import { request as httpRequest } from "node:http";
import { setTimeout as delay } from "node:timers/promises";
import { type ContainedRun, EXIT_CODE, PASSED_ON } from "./contained.ts";
import { errnoOf } from "./errors.ts";

// Runs a command in a dev container: `enter.ts <socket> <environment> <command ...>`. Its folder is where it is started;
// variables for it come with a prefix, since this process itself must not obey them.

/** What the name of a variable for the command begins with. */
const PREFIX = "BERTH_WITH_";
/** Variables that are for both. */
const SHARED = ["BERTH_OUTPUT", "BERTH_RUN"];
const WAIT_MS = 30_000;
const POLL_MS = 200;
const FAILED = 125;
const ABSENT: ReadonlySet<string | undefined> = new Set(["ENOENT", "ECONNREFUSED"]);

function variables(): Record<string, string> {
  const given = Object.entries(process.env).flatMap(([name, value = ""]) => {
    if (SHARED.includes(name)) return [[name, value]];
    return name.startsWith(PREFIX) ? [[name.slice(PREFIX.length), value]] : [];
  });
  return Object.fromEntries(given);
}

function run(socketPath: string, environmentId: string, command: ContainedRun): Promise<number> {
  return new Promise((resolve, reject) => {
    const call = httpRequest({ socketPath, host: environmentId, method: "POST", path: "/run", agent: false });
    const passOn = (signal: NodeJS.Signals) => void call.write(`${signal}\n`);
    for (const signal of PASSED_ON) process.on(signal, passOn);
    call.once("error", reject);
    call.once("response", (response) => {
      response.pipe(process.stdout, { end: false });
      response.once("error", reject);
      response.once("end", () => resolve(Number(response.trailers[EXIT_CODE] ?? FAILED)));
    });
    call.write(`${JSON.stringify(command)}\n`);
  }).finally(() => {
    for (const signal of PASSED_ON) process.removeAllListeners(signal);
  }) as Promise<number>;
}

/** A container that is just being started again is waited for. */
async function entered(socketPath: string, environmentId: string, command: ContainedRun): Promise<number> {
  for (const until = Date.now() + WAIT_MS; ; await delay(POLL_MS)) {
    try {
      return await run(socketPath, environmentId, command);
    } catch (error) {
      if (!ABSENT.has(errnoOf(error))) throw new Error("the dev container has ended");
      if (Date.now() > until) throw new Error("the dev container does not answer");
    }
  }
}

const [socketPath = "", environmentId = "", ...argv] = process.argv.slice(2);
try {
  process.exitCode = await entered(socketPath, environmentId, { argv, cwd: process.cwd(), variables: variables() });
} catch (error) {
  process.stdout.write(`${error instanceof Error ? error.message : error}\n`);
  process.exitCode = FAILED;
}
process.stdout.once("drain", () => process.exit());
if (process.stdout.writableLength === 0) process.exit();
