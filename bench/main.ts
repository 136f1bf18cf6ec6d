import { cpus } from "node:os";
import { parseArgs } from "node:util";
import type { Bench, Case } from "./bench.ts";
import { automation } from "./cases/automation.ts";
import { create } from "./cases/create.ts";
import { driver } from "./cases/driver.ts";
import { environment } from "./cases/environment.ts";
import { events } from "./cases/events.ts";
import { list } from "./cases/list.ts";
import { memory } from "./cases/memory.ts";
import { port } from "./cases/port.ts";
import { read } from "./cases/read.ts";
import { startUp } from "./cases/start.ts";
import { sweeps } from "./cases/sweeps.ts";
import { unary } from "./cases/unary.ts";
import { validation } from "./cases/validation.ts";
import { findGenerator, type Generator } from "./load.ts";
import { type Row, shortfalls, table } from "./report.ts";
import { openStage, type Stage } from "./stage.ts";

const CASES: Record<string, Case> = {
  ...{
    unary,
    read,
    list,
    create,
    driver,
    events,
    start: startUp,
    environment,
    automation,
    validation,
    port,
    memory,
    sweeps,
  },
};

const USAGE = `npm run bench -- [--quick] [--only NAME]...

  --quick      2 rounds instead of 5, and less of everything: for a look, not for a comparison
  --only NAME  one case, may be given more than once: ${Object.keys(CASES).join(", ")}
`;

const say = (text: string): void => void process.stderr.write(`${text}\n`);

/** Starts the stage when the first case wants it. */
class SharedStage {
  #stage: Promise<Stage> | undefined;

  open(): Promise<Stage> {
    this.#stage ??= openStage();
    return this.#stage;
  }

  async close(): Promise<void> {
    await (await this.#stage?.catch(() => undefined))?.close();
  }
}

/** Runs a case; one that breaks says so and leaves the others alone. */
async function runCase(name: string, bench: Omit<Bench, "after">): Promise<Row[]> {
  const after: (() => Promise<unknown>)[] = [];
  const from = performance.now();
  try {
    return await CASES[name]!({ ...bench, after: (step) => void after.push(step) });
  } catch (error) {
    say(`${name} could not be measured: ${error instanceof Error ? error.stack : String(error)}`);
    return [{ operation: `${name}: could not be measured` }];
  } finally {
    for (const step of after.reverse()) await step();
    say(`${name}: ${((performance.now() - from) / 1000).toFixed(1)} s`);
  }
}

function head(rounds: number, generator: Generator): string {
  const machine = `${cpus().length} cores (${cpus()[0]?.model.trim()}), Node ${process.versions.node}`;
  return `${machine}; ${rounds} rounds, medians; load from ${generator.name}\n`;
}

async function run(names: readonly string[], quick: boolean): Promise<void> {
  const generator = await findGenerator();
  const stage = new SharedStage();
  const interrupted = new AbortController();
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => interrupted.abort());
  const rounds = quick ? 2 : 5;
  const rows: Row[] = [];
  try {
    for (const name of names) {
      if (interrupted.signal.aborted) break;
      const bench = { rounds, quick, ms: quick ? 120 : 400, generator, stage: () => stage.open() };
      rows.push(...(await runCase(name, bench)));
    }
  } finally {
    await stage.close();
    await generator.stop();
  }
  process.stdout.write(`${head(rounds, generator)}\n${table(rows)}\n\n${shortfalls(rows)}\n`);
}

function options(): { names: string[]; quick: boolean } | undefined {
  try {
    const { values } = parseArgs({
      options: { only: { type: "string", multiple: true }, quick: { type: "boolean", default: false } },
    });
    const names = values.only ?? Object.keys(CASES);
    return names.every((name) => CASES[name]) ? { names, quick: values.quick } : undefined;
  } catch {
    return undefined;
  }
}

const chosen = options();
if (chosen) await run(chosen.names, chosen.quick);
else {
  say(USAGE);
  process.exitCode = 2;
}
