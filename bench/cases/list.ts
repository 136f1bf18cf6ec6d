import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { createBerthClient } from "../../src/client.ts";
import { type Bench, loaded, type Rate, timeRow } from "../bench.ts";
import { callOf, plainLoad } from "../calls.ts";
import { startChild } from "../child.ts";
import type { FloorApi } from "../children/floor.ts";
import { interleavedWarm, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";
import type { Person, Stage } from "../stage.ts";

const PAGE = 100;
const COMMON = 20_000;
const QUICK_COMMON = 2000;
const RARE = 3;

const request = (token: string, creatorIds: string[] = []) => ({
  pagination: { token, pageSize: PAGE },
  filter: { creatorIds },
});

/** The token of the last full page. */
async function deepToken({ url }: Stage, { token }: Person, pages: number): Promise<string> {
  const client = createBerthClient({ baseUrl: url, token });
  let next = "";
  for (let page = 1; page < pages; page += 1) {
    next = (await client.environments.listEnvironments(request(next))).pagination?.nextToken ?? "";
  }
  return next;
}

/** Pages of 100 environments, as a member sees them: rows and what the caller is to each. */
export async function list(bench: Bench): Promise<Row[]> {
  const stage = await bench.stage();
  const [member, common, rare] = (await stage.people(3)) as [Person, Person, Person];
  const count = bench.quick ? QUICK_COMMON : COMMON;
  await stage.copies(RARE, rare.id);
  await stage.copies(count, common.id);
  const floor = await startChild<FloorApi>("floor.ts", {
    bytes: 0,
    read: { databaseUrl: stage.databaseUrl, environmentId: stage.environment.id },
  });
  bench.after(() => floor.stop());
  const urls = await floor.call("started");
  const pages = Math.floor(count / PAGE);
  const deep = await deepToken(stage, member, pages);
  const load = (body: ReturnType<typeof request>) => ({
    ...callOf(stage.url, EnvironmentService.method.listEnvironments, body, {
      ...{ format: "connect", token: member.token, clients: 1, ms: bench.ms },
    }),
    latencies: true,
  });
  const page = (body: ReturnType<typeof request>) => () => loaded(bench.generator, stage.plane, load(body));
  const bare = { ...plainLoad(urls, load(request(""))), body: Uint8Array.of(PAGE) };
  const rounds = await interleavedWarm<"bare" | "first" | "deep" | "rare", Rate>(bench.rounds, {
    bare: () => loaded(bench.generator, floor, bare),
    first: page(request("")),
    deep: page(request(deep)),
    rare: page(request("", [rare.id])),
  });
  await stage.checkCalls();
  const first = timeRow(`List 100 of ${count}, 1 client, p50`, rounds.first, rounds.bare, { bound: "<=", value: 3 });
  const far = timeRow(`List 100, page ${pages} against page 1`, rounds.deep, rounds.first, { bound: "<=", value: 1.2 });
  const few = timeRow(`List, ${RARE} of ${count} match`, rounds.rare, []);
  const cpu = ratioOf(rounds.first, rounds.bare, ({ cpuUs }) => cpuUs);
  return [
    { ...first, note: `server CPU ${cpu.toFixed(1)} times that of the floor` },
    far,
    { operation: few.operation, unit: "ms", figure: few.figure, goal: { bound: "<=", value: 2 } },
  ];
}
