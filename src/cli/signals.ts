import { ExitCode } from "./exit.ts";

/** Resolves at the first SIGTERM or SIGINT; a second one ends the process at once. */
export function firstSignal(): Promise<void> {
  return new Promise((resolve) => {
    let asked = false;
    const onSignal = () => {
      if (asked) process.exit(ExitCode.FAILURE);
      asked = true;
      resolve();
    };
    process.on("SIGTERM", onSignal);
    process.on("SIGINT", onSignal);
  });
}
