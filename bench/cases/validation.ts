import { toBinary } from "@bufbuild/protobuf";
import { EnvironmentSchema, EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { type Bench, loaded } from "../bench.ts";
import { callOf } from "../calls.ts";
import { startChild } from "../child.ts";
import type { ValidationApi, ValidationTimes } from "../children/validation.ts";
import type { ServerApi } from "../children/without-database.ts";
import { interleaved, medianOf } from "../measure.ts";
import type { Row } from "../report.ts";

const CLIENTS = 16;

/** What checking a request against the schema costs. */
export async function validation(bench: Bench): Promise<Row[]> {
  const { environment } = await bench.stage();
  const server = await startChild<ServerApi>("without-database.ts", {
    environment: toBinary(EnvironmentSchema, environment),
  });
  bench.after(() => server.stop());
  const { url } = await server.call("started");
  const message = { environmentId: environment.id };
  const options = { format: "connect", clients: CLIENTS, ms: bench.ms } as const;
  const load = callOf(url, EnvironmentService.method.getEnvironment, message, options);
  const rounds = await interleaved<"times" | "call", ValidationTimes & { cpuUs: number }>(bench.rounds, {
    times: async () => {
      const child = await startChild<ValidationApi>("validation.ts", {});
      try {
        return { ...(await child.call("measure")), cpuUs: 0 };
      } finally {
        await child.stop();
      }
    },
    call: async () => ({
      getUs: 0,
      createUs: 0,
      handUs: 0,
      firstUs: 0,
      ...(await loaded(bench.generator, server, load)),
    }),
  });
  const of = (value: (times: ValidationTimes) => number) => medianOf(rounds.times, value);
  const share = (100 * of((times) => times.getUs)) / medianOf(rounds.call, ({ cpuUs }) => cpuUs);
  return [
    {
      operation: "validation of GetEnvironmentRequest",
      ...{ unit: "us", floor: of((times) => times.handUs), figure: of((times) => times.getUs) },
      note: "floor: a check by hand",
    },
    {
      operation: "validation, the same: absolute",
      unit: "us",
      figure: of((times) => times.getUs),
      goal: { bound: "<=", value: 10 },
    },
    {
      operation: "validation, share of the server CPU of a call",
      unit: "%",
      figure: share,
      goal: { bound: "<=", value: 20 },
    },
    { operation: "validation of CreateEnvironmentRequest", unit: "us", figure: of((times) => times.createUs) },
    {
      operation: "validation, first of a type after the start",
      ...{ unit: "ms", figure: of((times) => times.firstUs) / 1000, goal: { bound: "<=", value: 5 } },
      note: "82 ms where nothing is warmed up",
    },
  ];
}
