import { ConnectError } from "@connectrpc/connect";
import { applyCommand } from "./automations/apply.ts";
import { type AutomationsCommand, openPlace, PLACE_OPTIONS, refusalOf } from "./automations/command.ts";
import { listCommand } from "./automations/list.ts";
import { logsCommand } from "./automations/logs.ts";
import { runCommand } from "./automations/run.ts";
import { startCommand, stopCommand } from "./automations/start-stop.ts";
import { ExitCode } from "./exit.ts";
import { TERMINAL, type Terminal } from "./output.ts";
import { readArguments, UsageError } from "./usage.ts";

const COMMANDS: readonly AutomationsCommand[] = [
  listCommand,
  runCommand,
  startCommand,
  stopCommand,
  logsCommand,
  applyCommand,
];

const AUTOMATIONS_USAGE = `berth automations: services and tasks of an environment

${COMMANDS.map(({ name, usage, about }) => `  berth automations ${name} ${usage}`.trimEnd().concat(`\n      ${about}`)).join("\n")}

  --environment ID   the environment that is meant; needed outside of one
  --server URL       the control plane, by default that of the environment, else the one of berth login

Services and tasks are named by their reference or id. Inside an environment its own token is used, elsewhere that of
BERTH_TOKEN or of berth login. Results go to standard output, everything else to standard error. Exit codes: 0 done,
1 failed or refused, 2 wrong arguments, 130 interrupted.
`;

/** A command on the services and tasks of one environment. */
export async function runAutomations(
  args: readonly string[],
  env: NodeJS.ProcessEnv,
  terminal: Terminal = TERMINAL,
): Promise<ExitCode> {
  const [name = "help", ...rest] = args;
  if (["help", "--help", "-h"].includes(name)) {
    terminal.say(AUTOMATIONS_USAGE);
    return ExitCode.CLEAN;
  }
  const command = COMMANDS.find((each) => each.name === name);
  if (!command) throw new UsageError(`unknown command: automations ${args.join(" ")}\n\n${AUTOMATIONS_USAGE}`);
  const usage = `berth automations ${name} ${command.usage} [--environment ID] [--server URL]`;
  const { values, operands } = readArguments(usage, rest, { ...command.options, ...PLACE_OPTIONS }, command.operands);
  const place = await openPlace(usage, env, values);
  return command.run(place, { values, operands, terminal }).catch((error: unknown) => {
    throw error instanceof ConnectError ? refusalOf(place, error) : error;
  });
}
