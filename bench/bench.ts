import type { Generator, Load, LoadResult } from "./load.ts";
import { medianOf, ratioOf } from "./measure.ts";
import type { Goal, Row } from "./report.ts";
import type { Stage } from "./stage.ts";

/** What a case works with. */
export interface Bench {
  /** How often everything is measured. */
  rounds: number;
  quick: boolean;
  /** Length of one measurement of a rate. */
  ms: number;
  generator: Generator;
  /** The control plane that cases share, started when the first one asks. */
  stage(): Promise<Stage>;
  /** Runs `step` when the case is over. */
  after(step: () => Promise<unknown>): void;
}

export type Case = (bench: Bench) => Promise<Row[]>;

interface CpuMeter {
  call(name: "cpuMicros"): Promise<number>;
}

/** A rate, and what it cost. */
export interface Rate extends LoadResult {
  /** CPU time of the server per call, in microseconds. */
  cpuUs: number;
}

/** Puts load on a server that runs in `child`. */
export async function loaded(generator: Generator, child: CpuMeter, load: Load): Promise<Rate> {
  const before = await child.call("cpuMicros");
  const result = await generator.run(load);
  const used = (await child.call("cpuMicros")) - before;
  return { ...result, cpuUs: used / result.served };
}

/** The row that compares rates, with the CPU time per call beside them: it suffers least from what else is running. */
export function rateRow(operation: string, figures: readonly Rate[], floors: readonly Rate[], goal?: Goal): Row {
  const perSecond = (rate: Rate) => rate.perSecond;
  const cpu = (rates: readonly Rate[]) => medianOf(rates, ({ cpuUs }) => cpuUs).toFixed(0);
  return {
    ...{ operation, unit: "/s", goal },
    floor: medianOf(floors, perSecond),
    figure: medianOf(figures, perSecond),
    ratio: ratioOf(figures, floors, perSecond),
    note: `server CPU ${cpu(figures)} us a call, floor ${cpu(floors)}`,
  };
}

/** The row that compares times of a single call. */
export function timeRow(operation: string, figures: readonly Rate[], floors: readonly Rate[], goal?: Goal): Row {
  const time = (rate: Rate) => rate.p50Ms;
  return {
    ...{ operation, unit: "ms", goal },
    floor: medianOf(floors, time),
    figure: medianOf(figures, time),
    ratio: ratioOf(figures, floors, time),
  };
}
