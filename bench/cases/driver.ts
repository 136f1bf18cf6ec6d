import type { Bench } from "../bench.ts";
import { startChild } from "../child.ts";
import type { PointReadsApi } from "../children/point-reads.ts";
import { interleavedWarm, medianOf, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";
import { sqlGenerator } from "../sql-load.ts";

const CLIENTS = 64;
const FLOOR_CLIENTS = 8;
const READS = 10_000;
const AGED = 200_000;
const QUICK_AGED = 40_000;

/** Rows read by key through the product's connections, and whether that gets slower with their age. */
export async function driver(bench: Bench): Promise<Row[]> {
  const { databaseUrl, environment } = await bench.stage();
  const reads = await startChild<PointReadsApi>("point-reads.ts", { databaseUrl, environmentId: environment.id });
  bench.after(() => reads.stop());
  const sql = await sqlGenerator(databaseUrl);
  bench.after(() => sql.stop());
  const statement = `select metadata, spec, status from environments where id = '${environment.id}'`;
  const transactions = READS / FLOOR_CLIENTS;
  const read = (before = 0) => reads.call("read", { before, count: READS, clients: CLIENTS });
  const rounds = await interleavedWarm<"floor" | "read", { perSecond: number; cpuUs?: number }>(bench.rounds, {
    floor: async () => ({ perSecond: await sql.run({ statement, clients: FLOOR_CLIENTS, transactions }) }),
    read: () => read(),
  });
  const fresh = medianOf(rounds.read, ({ cpuUs = Number.NaN }) => cpuUs);
  // One long stretch during which there is always somebody waiting: queues of the driver never empty.
  const count = bench.quick ? QUICK_AGED : AGED;
  const aged = await read(count);
  const rate = (each: { perSecond: number }) => each.perSecond;
  return [
    {
      operation: `point read of one environment, ${CLIENTS} at once`,
      ...{ unit: "/s", floor: medianOf(rounds.floor, rate), figure: medianOf(rounds.read, rate) },
      ratio: ratioOf(rounds.read, rounds.floor, rate),
      goal: { bound: ">=", value: 0.6 },
      note: `floor: ${sql.name}, ${FLOOR_CLIENTS} clients; CPU ${fresh.toFixed(0)} us a read`,
    },
    {
      operation: `CPU of a point read after ${count / 1000}k without a pause, against fresh`,
      ...{ unit: "us", floor: fresh, figure: aged.cpuUs, ratio: aged.cpuUs / fresh },
      goal: { bound: "<=", value: 1.1 },
    },
  ];
}
