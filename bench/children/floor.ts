import { createServer } from "node:http";
import { createServer as createHttp2Server } from "node:http2";
import { bareDriver } from "./connect.ts";
import { collect, open } from "./plain-http.ts";
import { serve } from "./serve.ts";

export interface FloorSettings {
  /** Size of every answer, unless it comes from the database. */
  bytes: number;
  /** Reads rows of environments for every answer, on one connection that pipelines. */
  read?: { databaseUrl: string; environmentId: string };
}

export interface FloorApi {
  started(): { h1: string; h2c: string };
}

type Answer = (request: Uint8Array) => Promise<Uint8Array> | Uint8Array;

interface Messages {
  metadata: Uint8Array;
  spec: Uint8Array;
  status: Uint8Array;
}

function reader({ databaseUrl, environmentId }: NonNullable<FloorSettings["read"]>): Answer {
  const sql = bareDriver(databaseUrl, { max: 1 });
  const joined = (rows: Messages[]) =>
    Buffer.concat(rows.flatMap(({ metadata, spec, status }) => [metadata, spec, status]));
  // A request with a number wants that many rows from the newest on; every other one wants the environment.
  return async (request) => {
    const count = request.length === 1 ? request[0] : undefined;
    if (count === undefined) {
      return joined(await sql<Messages[]>`select metadata, spec, status from environments where id = ${environmentId}`);
    }
    return joined(
      await sql<Messages[]>`
      select metadata, spec, status from environments
      where organization_id = (select organization_id from environments where id = ${environmentId}) and deleted_at is null
      order by id desc limit ${count}`,
    );
  };
}

// The least that a server written for Node can do: read the request, answer with bytes.
serve<FloorSettings, FloorApi>(async ({ bytes, read }) => {
  const fixed = Buffer.alloc(bytes, 120);
  const answer: Answer = read ? reader(read) : () => fixed;
  const http1 = createServer((request, response) => {
    collect(request, async (body) => {
      const found = await answer(body);
      if (response.destroyed) return;
      response.writeHead(200, { "content-type": "application/proto", "content-length": String(found.length) });
      response.end(found);
    });
  });
  const http2 = createHttp2Server();
  http2.on("stream", (stream) => {
    collect(stream, async (body) => {
      const found = await answer(body);
      if (stream.destroyed) return;
      stream.respond({ ":status": 200, "content-type": "application/proto" });
      stream.end(found);
    });
  });
  const urls = { h1: await open(http1), h2c: await open(http2) };
  return { api: { started: () => urls } };
});
