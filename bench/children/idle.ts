import { createServer } from "node:http";
import { join } from "node:path";
import { create, toBinary } from "@bufbuild/protobuf";
import { EnvironmentSchema } from "../../gen/gitpod/v1/environment_pb.js";
import { bareDriver } from "./connect.ts";
import { open } from "./plain-http.ts";
import { serve } from "./serve.ts";

export interface IdleSettings {
  /** Of an installation with an embedded database. */
  dataDir: string;
}

// What any server of this kind has in memory: messages, a connected driver and an open port.
serve<IdleSettings, object>(async ({ dataDir }) => {
  const host = encodeURIComponent(join(dataDir, "postgres", "data"));
  const sql = bareDriver(`postgres://berth@localhost/berth?host=${host}`, { max: 1 });
  await sql`select 1`;
  await open(
    createServer((_request, response) => response.end(toBinary(EnvironmentSchema, create(EnvironmentSchema)))),
  );
  return { api: {}, stop: () => sql.end({ timeout: 1 }) };
});
