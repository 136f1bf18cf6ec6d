import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { startChild } from "./child.ts";
import type { GeneratorApi } from "./children/generator.ts";
import { percentile } from "./measure.ts";

const run = promisify(execFile);

export const WARM_UP_MS = 100;
const SLACK_MS = 20_000;
const MAX_OUTPUT_BYTES = 4 * 1024 * 1024;

/** The same POST over and over. */
export interface Load {
  url: string;
  protocol: "h1" | "h2c";
  headers: Record<string, string>;
  body: Uint8Array;
  connections: number;
  /** Requests in flight on one connection; more than 1 only over HTTP/2. */
  streams: number;
  /** Length of the measurement; 100 ms before it are not counted. */
  ms: number;
  /** Measure single requests, too. */
  latencies?: boolean;
}

export interface LoadResult {
  perSecond: number;
  /** Requests that the server has answered, those of the warm-up as far as they can be known. */
  served: number;
  /** Median of a single request; NaN unless asked for. */
  p50Ms: number;
}

/** Makes load, from outside of this process. */
export interface Generator {
  /** For the head of the table. */
  readonly name: string;
  run(load: Load): Promise<LoadResult>;
  stop(): Promise<void>;
}

/** Requests of a measurement together with those of the warm-up before it. */
const withWarmUp = (perSecond: number, ms: number) => perSecond * ((ms + WARM_UP_MS) / 1000);

/** Whether a program can be started. */
export async function isInstalled(program: string, ...args: string[]): Promise<boolean> {
  return run(program, args).then(
    () => true,
    (error: NodeJS.ErrnoException) => error.code !== "ENOENT",
  );
}

const headerArgs = (load: Load) => Object.entries(load.headers).flatMap(([name, value]) => ["-H", `${name}: ${value}`]);

function failed(program: string, output: string): Error {
  return new Error(`${program} did not get its answers:\n${output.slice(0, 2000)}`);
}

/** The load generator of nghttp2, for both versions of HTTP. */
function h2load(folder: string): Generator {
  let runs = 0;
  return {
    name: "h2load",
    async run(load) {
      runs += 1;
      const [body, log] = [join(folder, `body-${runs}`), join(folder, `log-${runs}`)];
      await writeFile(body, load.body);
      const length = ["-D", `${load.ms}ms`, `--warm-up-time=${WARM_UP_MS}ms`];
      const args = [
        ...(load.protocol === "h1" ? ["--h1"] : []),
        ...["-t", "1", "-c", String(load.connections), "-m", String(load.streams), "-d", body, ...length],
        ...(load.latencies ? [`--log-file=${log}`] : []),
        ...headerArgs(load),
        load.url,
      ];
      const { stdout } = await run("h2load", args, { timeout: load.ms + SLACK_MS, maxBuffer: MAX_OUTPUT_BYTES });
      const rate = /finished in .*?, ([\d.]+) req\/s/.exec(stdout);
      const counts = /requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed/.exec(stdout);
      if (!rate || !counts || counts[1] !== counts[2]) throw failed("h2load", stdout);
      let p50Ms = Number.NaN;
      if (load.latencies) {
        const lines = (await readFile(log, "utf8")).trim().split("\n");
        p50Ms =
          percentile(
            lines.map((line) => Number(line.split("\t")[2])),
            50,
          ) / 1000;
      }
      const perSecond = Number(rate[1]);
      return { perSecond, served: withWarmUp(perSecond, load.ms), p50Ms };
    },
    stop: async () => undefined,
  };
}

const WRK_SCRIPT = `
local file = io.open(os.getenv("BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
function done(summary, latency)
  local errors = summary.errors
  print("RESULT", summary.requests, summary.duration, latency:percentile(50),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout)
end
`;

/** wrk, which knows HTTP/1.1 only and measures whole seconds; what it cannot do is left to `other`. */
function wrk(folder: string, other: Generator): Generator {
  let runs = 0;
  return {
    name: `wrk (HTTP/1.1), ${other.name} (HTTP/2)`,
    async run(load) {
      if (load.protocol !== "h1") return other.run(load);
      runs += 1;
      const [body, script] = [join(folder, `body-${runs}`), join(folder, "post.lua")];
      await Promise.all([writeFile(body, load.body), writeFile(script, WRK_SCRIPT)]);
      const seconds = Math.max(1, Math.round(load.ms / 1000));
      const args = [
        "-t",
        "1",
        "-c",
        String(load.connections),
        "-d",
        `${seconds}s`,
        "-s",
        script,
        ...headerArgs(load),
        load.url,
      ];
      const env = { ...process.env, BODY: body };
      const { stdout } = await run("wrk", args, { env, timeout: load.ms + SLACK_MS, maxBuffer: MAX_OUTPUT_BYTES });
      const [requests = 0, us = 1, p50Us = 0, errors = 1] = (/RESULT\s+(.*)/.exec(stdout)?.[1] ?? "")
        .split(/\s+/)
        .map(Number);
      if (errors > 0) throw failed("wrk", stdout);
      return { perSecond: requests / (us / 1e6), served: requests, p50Ms: p50Us / 1000 };
    },
    stop: () => other.stop(),
  };
}

/** A process of Node, where there is nothing better: it costs about as much as what it measures. */
async function node(): Promise<Generator> {
  const child = await startChild<GeneratorApi>("generator.ts", {});
  return {
    name: "a process of Node, which is slower than the servers it measures: rates are too low, ratios too good",
    run: (load) => child.call("run", load),
    stop: () => child.stop(),
  };
}

/** The best generator that this machine has. */
export async function findGenerator(): Promise<Generator> {
  const folder = await mkdtemp(join(tmpdir(), "berth-load-"));
  const clean = () => rm(folder, { recursive: true, force: true });
  if (await isInstalled("h2load", "--version")) return { ...h2load(folder), stop: clean };
  const fallback = await node();
  const found = (await isInstalled("wrk", "--version")) ? wrk(folder, fallback) : fallback;
  const stop = async () => {
    await found.stop();
    await clean();
  };
  return { ...found, stop };
}
