import type { ProcessRef } from "./processes.ts";

/** A command that has been started. */
export interface StartedCommand {
  /** Leader of the session that it runs in; undefined if it has gone or could not be started. */
  leader: ProcessRef | undefined;
  /** Its exit code, or 128 plus the signal that has ended it; rejects if it could not be started. */
  ended: Promise<number>;
  /** Nothing more is to be heard of it. */
  release(): void;
}

/** Takes what a command says as it comes. */
export type CommandOutput = (chunk: Buffer, stream: "stdout" | "stderr") => void;

/** A command with all that it gets besides what the shell has that runs it. */
export interface ShellCommand {
  file: string;
  args: readonly string[];
  cwd: string;
  env: Readonly<Record<string, string>>;
}

/** Runs one command at a time. */
export interface Shell {
  /** Starts a command; undefined if another one is at work, or it has to be started in another way. */
  start(command: ShellCommand, output: CommandOutput): StartedCommand | undefined;
}
