import { setTimeout as delay } from "node:timers/promises";
import { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { startInstallation } from "../../test/harness/installation.ts";
import type { Bench } from "../bench.ts";
import { callOf } from "../calls.ts";
import { startChild } from "../child.ts";
import { residentMb } from "../processes.ts";
import type { Row } from "../report.ts";

const SETTLE_MS = 1500;
const LOAD_MS = 1500;
const CLIENTS = 64;

/** Memory of the control plane's process, without Postgres and runner. */
export async function memory(bench: Bench): Promise<Row[]> {
  const berth = await startInstallation({ BERTH_RUNNER: "off", BERTH_LOG_LEVEL: "error" });
  bench.after(async () => berth[Symbol.asyncDispose]());
  const bare = await startChild<object>("idle.ts", { dataDir: berth.dataDir });
  bench.after(() => bare.stop());
  await delay(SETTLE_MS);
  const [floor, figure] = [await residentMb(bare.pid), await residentMb(berth.pid())];
  const method = IdentityService.method.getAuthenticatedIdentity;
  const options = { format: "json", token: berth.adminToken, clients: CLIENTS, ms: LOAD_MS } as const;
  await bench.generator.run(callOf(berth.url, method, {}, options));
  return [
    {
      operation: "memory, idle",
      ...{ unit: "MB", floor, figure, ratio: figure / floor, goal: { bound: "<=", value: 1.7 } },
      note: "floor: Node, protobuf, driver, bare http",
    },
    {
      operation: "memory, after load",
      ...{ unit: "MB", figure: await residentMb(berth.pid()), goal: { bound: "<=", value: 170 } },
      note: `${CLIENTS} clients`,
    },
  ];
}
