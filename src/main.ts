#!/usr/bin/env node
import { ExitCode, exitCodeOf, Failure } from "./cli/exit.ts";
import { UsageError } from "./cli/usage.ts";
import { keepYoungObjectsSmall } from "./cli/young-objects.ts";
import { ConfigError } from "./config.ts";

const USAGE = `berth: a control plane for development environments

  berth            start the control plane, with a database and a runner unless configured otherwise
  berth runner     start a runner alone, against the control plane at BERTH_RUNNER_API_URL
  berth admin      commands of the operator, on the database: \`berth admin help\` lists them

  berth login [URL] [--no-browser]
                   sign in to a server with a browser, by default the one of last time, else http://127.0.0.1:8080
  berth token [URL]
                   print the token that was got
  berth logout [URL]
                   end it

  berth automations
                   list, run, start and stop tasks and services, read their logs, apply a file:
                   \`berth automations help\` lists the commands

Servers and runners are configured by environment variables; the README lists them.
`;

async function main(args: readonly string[]): Promise<ExitCode> {
  const [command = "server", ...rest] = args;
  // Each command loads what it needs: a server is much more than most of them.
  if (command === "admin") return (await import("./cli/admin.ts")).runAdmin(rest, process.env);
  if (command === "automations") return (await import("./cli/automations.ts")).runAutomations(rest, process.env);
  if (command === "login") return (await import("./cli/login.ts")).runLogin(rest, process.env);
  if (command === "logout") return (await import("./cli/login.ts")).runLogout(rest, process.env);
  if (command === "token") return (await import("./cli/login.ts")).runToken(rest, process.env);
  if (rest.length > 0 || !["server", "runner", "help", "--help", "-h"].includes(command)) {
    throw new UsageError(`unknown arguments: ${args.join(" ")}\n\n${USAGE}`);
  }
  if (command === "server") keepYoungObjectsSmall();
  if (command === "server") return (await import("./cli/server.ts")).runServer(process.env);
  if (command === "runner") return (await import("./cli/runner.ts")).runRunner(process.env);
  process.stdout.write(USAGE);
  return ExitCode.CLEAN;
}

main(process.argv.slice(2)).then(
  (code) => process.exit(code),
  (error: unknown) => {
    const isExpected = error instanceof ConfigError || error instanceof Failure;
    const known = isExpected || exitCodeOf(error) === ExitCode.REFUSED;
    process.stderr.write(
      `berth: ${known && error instanceof Error ? error.message : error instanceof Error ? error.stack : String(error)}\n`,
    );
    process.exit(exitCodeOf(error));
  },
);
