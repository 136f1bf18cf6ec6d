import { archivableEnvironmentIds, deletableEnvironmentIds, dueEnvironmentIds } from "../../src/store/environments.ts";
import type { Bench } from "../bench.ts";
import { interleaved, medianOf, percentile, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";
import type { Person } from "../stage.ts";

const STORED = 100_000;
const QUICK_STORED = 20_000;
const LOOKS = 50;
const BATCH = 50;
const HOUR_MS = 60 * 60_000;

/** What the clock-driven work costs when nothing is due, however many environments there are. */
export async function sweeps(bench: Bench): Promise<Row[]> {
  const { db, organizationId, environment, copies, people } = await bench.stage();
  const [owner] = (await people(1)) as [Person];
  const count = bench.quick ? QUICK_STORED : STORED;
  const ids = await copies(count, owner.id);
  // Half of them wait for a timeout, a quarter each for their archival and their deletion; none of it is due.
  await db.write`
    update environments set due_at = case when n % 4 < 2 then now() + interval '1 hour' end,
      archivable_since = case when n % 4 = 2 then now() end, archived_at = case when n % 4 = 3 then now() end
    from unnest(${ids}::uuid[]) with ordinality as made (made_id, n) where id = made_id`;
  await db.write`vacuum analyze environments`;
  bench.after(() => db.write`delete from environments where id = any(${ids})`);
  const before = new Date(Date.now() - HOUR_MS);
  const cutoffs = [{ organizationId, before }];
  const timed = async (look: () => Promise<unknown>) => {
    const times: number[] = [];
    for (let each = 0; each < LOOKS; each += 1) {
      const from = performance.now();
      await look();
      times.push(performance.now() - from);
    }
    return { ms: percentile(times, 50) };
  };
  const read = () => db.list`select id from environments where id = ${environment.id}`;
  const rounds = await interleaved<"floor" | "look", { ms: number }>(bench.rounds, {
    floor: () =>
      timed(async () => {
        for (let each = 0; each < 3; each += 1) await read();
      }),
    look: () =>
      timed(async () => {
        await dueEnvironmentIds(db.list, before, BATCH);
        await archivableEnvironmentIds(db.list, cutoffs, BATCH);
        await deletableEnvironmentIds(db.list, cutoffs, BATCH);
      }),
  });
  const time = ({ ms }: { ms: number }) => ms;
  return [
    {
      operation: `a look for what is due among ${count} environments, nothing is`,
      ...{ unit: "ms", floor: medianOf(rounds.floor, time), figure: medianOf(rounds.look, time) },
      ratio: ratioOf(rounds.look, rounds.floor, time),
      goal: { bound: "<=", value: 3 },
      note: "floor: three rows read by their key",
    },
  ];
}
