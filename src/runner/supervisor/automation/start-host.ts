import { type ChildProcess, spawn } from "node:child_process";
import { childStdio } from "../descriptors.ts";
import { readProcess } from "../processes.ts";
import { killMarked } from "./marked.ts";
import { CommandProblem, type Surroundings } from "./parts.ts";
import { type Command, Run } from "./run.ts";
import {
  type Attempt,
  type AutomationCommand,
  lastWords,
  type RunPlace,
  resolvedVariables,
  type TakeOutput,
  type Target,
} from "./start.ts";

/**
 * A command line as a person would have typed it at the prompt of a login shell. What its profile does to PATH, which many
 * replace, comes after what the environment says.
 */
const shellFor = (text: string): readonly [string, ...string[]] => [
  "/bin/sh",
  "-c",
  'exec "$(command -v bash || echo sh)" "$@"',
  "sh",
  "-l",
  "-c",
  `PATH=$BERTH_PATH:$PATH; unset BERTH_PATH; ${text}`,
];

/**
 * The host itself, in the checkout, with the variables of the environment; or the dev container, which a command gets into
 * by a program on the host that is to all others the command itself.
 */
export class HostTarget implements Target {
  readonly #around: Surroundings;
  /** That program; empty while there is no container. */
  readonly #entrance: string | undefined;

  constructor(around: Surroundings, entrance: string | undefined) {
    this.#around = around;
    this.#entrance = entrance;
  }

  async start({ folder, mark }: RunPlace, command: AutomationCommand, take: TakeOutput): Promise<Run> {
    return await Run.start(folder, mark, await this.#prepared(command), take);
  }

  async startBeside(_main: RunPlace, place: RunPlace, command: AutomationCommand, take: TakeOutput): Promise<Run> {
    return await this.start(place, command, take);
  }

  async attempt(
    _main: RunPlace,
    mark: string,
    command: AutomationCommand,
    { until, signal }: { until: number; signal: AbortSignal },
  ): Promise<Attempt> {
    const { argv, cwd, env } = await this.#prepared(command);
    const [file, ...args] = argv;
    const child = spawn(file, args, {
      ...{ cwd, env: { ...env, BERTH_RUN: mark }, detached: true },
      stdio: childStdio(["ignore", "pipe", "pipe"]),
    });
    const said = lastWords();
    child.stdout?.on("data", said.take);
    child.stderr?.on("data", said.take);
    return { code: await exitOf(child, mark, until, signal), text: said.text() };
  }

  async #prepared({ text, env, own }: AutomationCommand): Promise<Command> {
    const more = { ...(await resolvedVariables(this.#around, env)), ...own };
    const [argv, cwd] = [shellFor(text), this.#around.folder()];
    if (this.#entrance !== undefined) return { argv: [this.#entrance, ...argv], cwd, env: this.#entering(more) };
    const variables = this.#around.variables(more);
    return { argv, cwd, env: { ...variables, BERTH_PATH: variables.PATH ?? "" } };
  }

  /** Variables of that program, which takes those for the command by a prefix and obeys none of them. */
  #entering(more: Readonly<Record<string, string>>): Record<string, string> {
    if (this.#entrance === "") throw new CommandProblem("the dev container does not run");
    const { PATH = "", BERTH_ENVIRONMENT_ID = "" } = this.#around.variables({});
    const passed = Object.entries(more).map(([name, value]) => [`BERTH_WITH_${name}`, value]);
    return { PATH, BERTH_ENVIRONMENT_ID, ...Object.fromEntries(passed) };
  }
}

/** Exit code of a child that must not outlive a moment or a signal; 128 and more if it had to be killed. */
async function exitOf(child: ChildProcess, mark: string, until: number, signal: AbortSignal): Promise<number> {
  const exit = new Promise<number>((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code) => resolve(code ?? 128));
  });
  const end = () => {
    killMarked(mark);
    if (child.pid && readProcess(child.pid)) child.kill("SIGKILL");
  };
  const timer = Number.isFinite(until) ? setTimeout(end, Math.max(0, until - Date.now())) : undefined;
  signal.addEventListener("abort", end, { once: true });
  if (signal.aborted) end();
  try {
    return await exit;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", end);
    child.stdout?.destroy();
    child.stderr?.destroy();
  }
}
