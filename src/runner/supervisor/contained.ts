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

export interface TerminalSize {
  cols: number;
  rows: number;
}

/**
 * What somebody who has logged in wants. Input and output are named pipes in a folder that both sides see; with a
 * terminal, what follows on the connection are its sizes.
 */
export interface LoginWish {
  /** Name of the folder, below `LOGINS`. */
  name: string;
  /** For the shell; without one it is a shell to type into. */
  command?: string;
  /** Without one, standard error is a pipe of its own. */
  terminal?: TerminalSize;
  /** Variables beside those of every process. */
  variables: Readonly<Record<string, string>>;
  /** The folder has the socket of an SSH agent. */
  hasAgent: boolean;
}

/** Folder below `run/`. */
export const LOGINS = "logins";
export const PIPES = ["in", "out", "err"] as const;
export const AGENT = "agent";
