import { ConfigError } from "../config.ts";
import { RefusedStart } from "../domain/errors.ts";

/**
 * How the program ends: refused means that its state forbids it to run, so that a restart does not help; interrupted that
 * somebody did not want to wait any longer, as shells count SIGINT.
 */
export const ExitCode = { CLEAN: 0, FAILURE: 1, USAGE: 2, REFUSED: 3, INTERRUPTED: 130 } as const;
export type ExitCode = (typeof ExitCode)[keyof typeof ExitCode];

/** A command could not do what it was asked for; its text says why, for people. */
export class Failure extends Error {}

export function exitCodeOf(error: unknown): ExitCode {
  if (error instanceof ConfigError) return ExitCode.USAGE;
  return error instanceof RefusedStart ? ExitCode.REFUSED : ExitCode.FAILURE;
}
