import { text } from "node:stream/consumers";
import { pino } from "pino";
import { type RunnerOptions, startRunner } from "../src/runner/main.ts";

// A runner as a process of its own: options as JSON on standard input, the port on standard output.
const options = JSON.parse(await text(process.stdin)) as Omit<RunnerOptions, "log">;
const runner = await startRunner({ ...options, log: pino({ level: "warn" }, pino.destination({ fd: 2, sync: true })) });
process.stdout.write(`${runner.port}\n`);
process.once("SIGTERM", () => void runner.stop());
process.exitCode = (await runner.finished) === "stopped" ? 0 : 3;
