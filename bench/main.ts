import { parseArgs } from "node:util";
import { create } from "./cases/create.ts";
import { driver } from "./cases/driver.ts";
import { list } from "./cases/list.ts";
import { read } from "./cases/read.ts";
import { unary } from "./cases/unary.ts";
import type { Bench, Case } from "./bench.ts";
import { findGenerator } from "./load.ts";
import { type Row, shortfalls, table } from "./report.ts";
import { openStage, type Stage } from "./stage.ts";

const CASES: Record<string, Case> = { unary, read, driver, list, create };

const say = (text: string): void => void process.stderr.write(`${text}\n`);

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: { only: { type: "string", multiple: true }, quick: { type: "boolean", default: false } },
  });
  const names = values.only ?? Object.keys(CASES);
  const unknown = names.find((name) => !CASES[name]);
  if (unknown) throw new Error(`there is no case ${unknown}; there are ${Object.keys(CASES).join(", ")}`);
  const generator = await findGenerator();
  let stage: Promise<Stage> | undefined;
  const rows: Row[] = [];
  try {
    for (const name of names) {
      say(name);
      const after: (() => Promise<unknown>)[] = [];
      const bench: Bench = {
        ...{ rounds: values.quick ? 2 : 5, quick: values.quick, ms: values.quick ? 300 : 700, generator },
        stage: () => (stage ??= openStage()),
        after: (step) => void after.push(step),
      };
      try {
        rows.push(...(await CASES[name]!(bench)));
      } finally {
        for (const step of after.reverse()) await step();
      }
    }
  } finally {
    await (await stage)?.close();
    await generator.stop();
  }
  console.log(table(rows));
  console.log(shortfalls(rows));
}

await main();
