import { auditExportCommand } from "./admin/audit-export.ts";
import { bootstrapCommand } from "./admin/bootstrap.ts";
import type { AdminCommand } from "./admin/operator.ts";
import { restoreCommand } from "./admin/restore.ts";
import { rotateKeyCommand } from "./admin/rotate-key.ts";
import { runnerTokenCommand } from "./admin/runner-token.ts";
import { tokenCreateCommand } from "./admin/token.ts";
import { ExitCode } from "./exit.ts";
import { say } from "./output.ts";
import { UsageError } from "./usage.ts";

const COMMANDS: readonly AdminCommand[] = [
  bootstrapCommand,
  tokenCreateCommand,
  restoreCommand,
  runnerTokenCommand,
  rotateKeyCommand,
  auditExportCommand,
];

const ALIASES = new Map([["rekey", [rotateKeyCommand.name]]]);

export const ADMIN_USAGE = `berth admin: what the operator does on the database of the installation, running or not

${COMMANDS.map(({ name, options, about }) => `  berth admin ${name} ${options}`.trimEnd().concat(`\n      ${about}`)).join("\n")}

The installation is the one that the environment variables of the server name. Results go to standard output, everything
else to standard error.
`;

/** A command of the operator; the words of its name come first. */
export async function runAdmin(args: readonly string[], env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const [first = "help"] = args;
  if (["help", "--help", "-h"].includes(first)) {
    say(ADMIN_USAGE);
    return ExitCode.CLEAN;
  }
  const words = ALIASES.get(first)?.concat(args.slice(1)) ?? args;
  const startsWith = ({ name }: AdminCommand) => name.split(" ").every((word, index) => words[index] === word);
  const command = COMMANDS.find(startsWith);
  if (!command) throw new UsageError(`unknown command: admin ${args.join(" ")}\n\n${ADMIN_USAGE}`);
  await command.run(words.slice(command.name.split(" ").length), env);
  return ExitCode.CLEAN;
}
