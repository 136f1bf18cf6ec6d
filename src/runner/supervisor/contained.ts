// What a supervisor in a container and a process that has a command run there say to each other.

/** What to run. */
export interface ContainedRun {
  argv: readonly string[];
  /** Absolute path. */
  cwd: string;
  /** Variables beside those of every process. */
  variables: Readonly<Record<string, string>>;
}

/** Trailer of the answer with the exit code. */
export const EXIT_CODE = "berth-exit-code";
/** Signals that are passed on. */
export const PASSED_ON: readonly NodeJS.Signals[] = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR2", "SIGCONT"];
