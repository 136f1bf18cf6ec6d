import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";
import { eventually } from "./wait.ts";

const MAIN = fileURLToPath(new URL("../../src/main.ts", import.meta.url));
const END_MS = 45_000;

/** A `berth` process as an operator starts it. */
export interface Program extends AsyncDisposable {
  readonly pid: number;
  /** Everything it has printed so far, on both streams in the order in which it came. */
  output(): string;
  /** Resolves once it has printed a text; rejects if it ends before. */
  says(text: string): Promise<void>;
  send(signal: NodeJS.Signals): void;
  /** Its exit code, null after a fatal signal; rejects if it goes on for 45 s. */
  ended(): Promise<number | null>;
}

/** Starts `berth` with these arguments, and of all variables only these and PATH. Disposing of it kills it. */
export function startProgram(args: readonly string[], env: Record<string, string>): Program {
  const child = spawn(process.execPath, [MAIN, ...args], {
    env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "/", ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding("utf8").on("data", (chunk: string) => {
      output += chunk;
    });
  }
  const closed = new Promise<number | null>((resolve) => child.once("close", (code) => resolve(code)));
  const ended = async () => {
    const late = AbortSignal.timeout(END_MS);
    const { promise, reject } = Promise.withResolvers<never>();
    late.addEventListener("abort", () => reject(new Error(`berth did not end:\n${output}`)), { once: true });
    return Promise.race([closed, promise]);
  };
  return {
    pid: child.pid ?? 0,
    output: () => output,
    says: async (text) => {
      await eventually(() => {
        if (output.includes(text)) return true;
        return child.exitCode !== null || child.signalCode !== null ? "ended" : false;
      }, `berth says "${text}"`);
      if (!output.includes(text)) throw new Error(`berth ended without saying "${text}":\n${output}`);
    },
    send: (signal) => void child.kill(signal),
    ended,
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await closed;
    },
  };
}
