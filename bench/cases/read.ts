import type { DescMessage, DescMethod, MessageInitShape } from "@bufbuild/protobuf";
import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { type Bench, loaded, type Rate, rateRow, timeRow } from "../bench.ts";
import { callOf, type Format, plainLoad } from "../calls.ts";
import { startChild } from "../child.ts";
import type { FloorApi } from "../children/floor.ts";
import { interleavedWarm } from "../measure.ts";
import type { Goal, Row } from "../report.ts";

const CLIENTS = 16;
const GOAL: Goal = { bound: ">=", value: 0.3 };

/** Unary reads as clients make them: credential, validation, rights, database. */
export async function read(bench: Bench): Promise<Row[]> {
  const stage = await bench.stage();
  const { environment, databaseUrl, url, plane, admin } = stage;
  const floor = await startChild<FloorApi>("floor.ts", {
    bytes: stage.environmentBytes,
    read: { databaseUrl, environmentId: environment.id },
  });
  bench.after(() => floor.stop());
  const floorUrls = await floor.call("started");
  const load = <I extends DescMessage>(
    method: DescMethod & { input: I },
    message: MessageInitShape<I>,
    format: Format,
    clients: number,
  ) => {
    const options = { format, token: admin.token, clients, ms: bench.ms };
    return { ...callOf(url, method, message, options), latencies: clients === 1 };
  };
  const get = (format: Format, clients = CLIENTS) =>
    load(EnvironmentService.method.getEnvironment, { environmentId: environment.id }, format, clients);
  const identity = (format: Format) => load(IdentityService.method.getAuthenticatedIdentity, {}, format, CLIENTS);
  const product = (what: ReturnType<typeof get>) => () => loaded(bench.generator, plane, what);
  const bare = (what: ReturnType<typeof get>) => () => loaded(bench.generator, floor, plainLoad(floorUrls, what));
  const rounds = await interleavedWarm<string, Rate>(bench.rounds, {
    h1: bare(get("connect")),
    getBinary: product(get("connect")),
    getJson: product(get("json")),
    identityBinary: product(identity("connect")),
    identityJson: product(identity("json")),
    h2c: bare(get("grpc")),
    getGrpc: product(get("grpc")),
    identityGrpc: product(identity("grpc")),
    oneBare: bare(get("connect", 1)),
    one: product(get("connect", 1)),
    oneGrpc: product(get("grpc", 1)),
  });
  await stage.checkCalls();
  const of = (name: string) => rounds[name] ?? [];
  const grpc = timeRow("", of("oneGrpc"), []);
  return [
    rateRow("GetEnvironment, 16 at once: Connect binary, HTTP/1.1", of("getBinary"), of("h1"), GOAL),
    rateRow("GetEnvironment, 16 at once: Connect JSON, HTTP/1.1", of("getJson"), of("h1")),
    rateRow("GetEnvironment, 16 at once: gRPC, h2c", of("getGrpc"), of("h2c")),
    rateRow("GetAuthenticatedIdentity, 16 at once: Connect binary, HTTP/1.1", of("identityBinary"), of("h1"), GOAL),
    rateRow("GetAuthenticatedIdentity, 16 at once: Connect JSON, HTTP/1.1", of("identityJson"), of("h1")),
    rateRow("GetAuthenticatedIdentity, 16 at once: gRPC, h2c", of("identityGrpc"), of("h2c")),
    timeRow("GetEnvironment, 1 client, p50: Connect binary, HTTP/1.1", of("one"), of("oneBare"), {
      bound: "<=",
      value: 2,
    }),
    {
      operation: "GetEnvironment, 1 client, p50: gRPC, h2c",
      ...{ unit: "ms", figure: grpc.figure, goal: { bound: "<=", value: 1 } },
      note: "44 ms without no-delay",
    },
  ];
}
