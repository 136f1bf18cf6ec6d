import { toBinary } from "@bufbuild/protobuf";
import { EnvironmentSchema, EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { type Bench, loaded, type Rate, rateRow } from "../bench.ts";
import { callOf, type Format, plainLoad } from "../calls.ts";
import { startChild } from "../child.ts";
import type { FloorApi } from "../children/floor.ts";
import type { ServerApi } from "../children/without-database.ts";
import { interleavedWarm } from "../measure.ts";
import type { Row } from "../report.ts";

const CLIENTS = 16;

/** What the way from bytes to a handler and back costs: everything that surrounds a call except the database. */
export async function unary(bench: Bench): Promise<Row[]> {
  const { environment, environmentBytes } = await bench.stage();
  const server = await startChild<ServerApi>("without-database.ts", {
    environment: toBinary(EnvironmentSchema, environment),
  });
  bench.after(() => server.stop());
  const floor = await startChild<FloorApi>("floor.ts", { bytes: environmentBytes });
  bench.after(() => floor.stop());
  const { url } = await server.call("started");
  const floorUrls = await floor.call("started");
  const request = { environmentId: environment.id };
  const load = (format: Format) =>
    callOf(url, EnvironmentService.method.getEnvironment, request, { format, clients: CLIENTS, ms: bench.ms });
  const product = (format: Format) => () => loaded(bench.generator, server, load(format));
  const bare = (format: Format) => () => loaded(bench.generator, floor, plainLoad(floorUrls, load(format)));
  const rounds = await interleavedWarm<"h1" | "h2c" | Format, Rate>(bench.rounds, {
    h1: bare("connect"),
    connect: product("connect"),
    json: product("json"),
    h2c: bare("grpc"),
    "connect-h2c": product("connect-h2c"),
    grpc: product("grpc"),
  });
  const name = "unary without database, 16 at once";
  return [
    rateRow(`${name}: Connect binary, HTTP/1.1`, rounds.connect, rounds.h1, { bound: ">=", value: 0.25 }),
    rateRow(`${name}: Connect JSON, HTTP/1.1`, rounds.json, rounds.h1, { bound: ">=", value: 0.2 }),
    rateRow(`${name}: Connect binary, h2c`, rounds["connect-h2c"], rounds.h2c, { bound: ">=", value: 0.3 }),
    rateRow(`${name}: gRPC, h2c`, rounds.grpc, rounds.h2c, { bound: ">=", value: 0.08 }),
  ];
}
