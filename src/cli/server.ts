import { pino } from "pino";
import { readServerConfig, type ServerConfig } from "../config.ts";
import { type ControlPlane, startControlPlane } from "../control-plane.ts";
import { forgetExchangeToken } from "../first-start.ts";
import { type RunningRunner, startRunner } from "../runner/main.ts";
import { ExitCode } from "./exit.ts";
import { say, sayFirstToken } from "./output.ts";
import { firstSignal } from "./signals.ts";
import { letYoungObjectsGrow } from "./young-objects.ts";

const HOW_TO_GO_ON =
  "Serving without it; start again with BERTH_RUNNER_EXCHANGE_TOKEN, which `berth admin runner token --runner ...` prints";
const EXAMPLE_REPOSITORY = "https://github.com/octocat/Hello-World";

/** A call that can be pasted into a shell; in `body` a `$NAME` is filled in by the shell. */
function curl(url: string, rpc: string, body: object): string {
  const json = JSON.stringify(body).replace(/\$(\w+)/g, "'$$$1'");
  const headers = `-H "Authorization: Bearer $BERTH_TOKEN" -H 'Content-Type: application/json'`;
  return `curl -s ${url}/gitpod.v1.EnvironmentService/${rpc} ${headers} -d '${json}'`;
}

function sayReady(url: string): void {
  const classes = curl(url, "ListEnvironmentClasses", { filter: { canCreateEnvironments: true } });
  const initializer = { specs: [{ contextUrl: { url: EXAMPLE_REPOSITORY } }] };
  say(`berth is ready at ${url}`);
  say("A first environment; paste the export line with the token, then these: which class, create, see how it is");
  say(`CLASS=$(${classes} | sed 's/.*"environmentClasses":\\[{"id":"\\([^"]*\\).*/\\1/')`);
  say(curl(url, "CreateEnvironment", { spec: { machine: { class: "$CLASS" }, content: { initializer } } }));
  say(curl(url, "ListEnvironments", {}));
}

async function startEmbeddedRunner(config: ServerConfig, plane: ControlPlane): Promise<RunningRunner | undefined> {
  const log = plane.app.log.child({ part: "runner" });
  const runner = await startRunner({
    config: config.runner,
    apiUrl: plane.server.url,
    publicApiUrl: config.publicUrl,
    exchangeToken: plane.runnerExchangeToken ?? config.runnerExchangeToken,
    log,
  });
  await forgetExchangeToken(config);
  return runner;
}

/** The control plane, with its embedded database and runner unless configured otherwise, until a signal ends it. */
export async function runServer(env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const config = readServerConfig(env);
  const log = pino({ level: config.logLevel }, pino.destination({ fd: 2, sync: true }));
  const stopAsked = firstSignal();
  const plane = await startControlPlane(config, log);
  let runner: RunningRunner | undefined;
  try {
    // Before anything else can fail: no later start shows it.
    if (plane.firstToken) sayFirstToken(config, plane.firstToken);
    if (config.embeddedRunner) runner = await startEmbeddedRunner(config, plane);
    sayReady(config.publicUrl);
    void runner?.finished.then((reason) => {
      if (reason !== "stopped") log.error(`the embedded runner has ended: ${reason}. ${HOW_TO_GO_ON}`);
    });
    letYoungObjectsGrow();
    await stopAsked;
    log.info("draining");
  } finally {
    await runner?.stop();
    await plane.stop();
  }
  return ExitCode.CLEAN;
}
