import { fromBinary } from "@bufbuild/protobuf";
import { pino } from "pino";
import { EnvironmentSchema, EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { callerOf } from "../../src/rpc/authenticate.ts";
import { refusals } from "../../src/rpc/errors.ts";
import { observe } from "../../src/rpc/observe.ts";
import { validation, warmValidation } from "../../src/rpc/validate.ts";
import { startServer } from "../../src/server.ts";
import { serve } from "./serve.ts";

export interface ServerSettings {
  /** What every call is answered with, as protobuf. */
  environment: Uint8Array;
}

export interface ServerApi {
  started(): { url: string };
}

// The server of the product with all that surrounds a call, except that nobody is asked for a credential and the answer
// is at hand.
serve<ServerSettings, ServerApi>(async (settings) => {
  const environment = fromBinary(EnvironmentSchema, settings.environment);
  const log = pino({ level: "info" }, pino.destination({ fd: 2, sync: true }));
  const server = await startServer({
    host: "127.0.0.1",
    port: 0,
    routes: (router) => router.rpc(EnvironmentService.method.getEnvironment, () => ({ environment })),
    interceptors: [observe({ log, callerOf }), refusals(), validation()],
    ready: async () => ({ ok: true }),
    log,
  });
  warmValidation([EnvironmentService]);
  return { api: { started: () => ({ url: server.url }) }, stop: () => server.close() };
});
