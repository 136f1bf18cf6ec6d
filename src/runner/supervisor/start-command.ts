import type { ChildProcess } from "node:child_process";
import { Readable } from "node:stream";
import { invocation, type RunAs } from "./namespaces.ts";
import { exitCodeOf, readProcess, spawnSession } from "./processes.ts";
import type { CommandOutput, StartedCommand } from "./started-command.ts";

/** Where and with what a command is started, and what it reads; nothing if left out. */
export interface CommandPlace extends RunAs {
  cwd: string;
  env: Readonly<Record<string, string>>;
  input?: string | Readable | undefined;
}

const PIPE_GRACE_MS = 1000;

function ending(child: ChildProcess): Promise<number> {
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code, signal) => {
      const ended = () => resolve(exitCodeOf({ code, signal }));
      // Something the command left behind may hold its output open for ever.
      const late = setTimeout(ended, PIPE_GRACE_MS);
      child.once("close", () => {
        clearTimeout(late);
        ended();
      });
    });
  });
}

/** Writes to the input of a program, which need not read it. */
function feed({ stdin }: ChildProcess, input: string | Readable): void {
  if (!stdin) return;
  stdin.on("error", () => undefined);
  const source = typeof input === "string" ? Readable.from([input]) : input;
  source.on("error", () => stdin.destroy());
  source.pipe(stdin);
}

/** Starts a command in a session of its own, or in the shell of its user if that is free. */
export function startCommand(
  file: string,
  args: readonly string[],
  { cwd, env, shell, input, ...user }: CommandPlace,
  output: CommandOutput,
): StartedCommand {
  const inShell = input === undefined ? shell?.start({ file, args, cwd, env }, output) : undefined;
  if (inShell) return inShell;
  const { file: program, args: words, ...place } = invocation(file, args, { cwd, ...user });
  const child = spawnSession(program, words, { ...place, env, input: input === undefined ? "ignore" : "pipe" });
  const ended = ending(child);
  if (input !== undefined) feed(child, input);
  for (const name of ["stdout", "stderr"] as const) {
    child[name]?.on("data", (chunk: Buffer) => output(chunk, name)).on("error", () => undefined);
  }
  return {
    leader: child.pid === undefined ? undefined : readProcess(child.pid),
    ended,
    release() {
      child.stdout?.destroy();
      child.stderr?.destroy();
    },
  };
}
