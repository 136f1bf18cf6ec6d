import { readFileSync } from "node:fs";
import { type ClientHttp2Session, connect as connectHttp2, constants } from "node:http2";
import { connect as connectTcp, type Socket } from "node:net";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { create, type DescMessage, fromBinary, fromJson, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { FileDescriptorProtoSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import Gitpod from "@gitpod/sdk";
import { pino } from "pino";
import { register } from "prom-client";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { ViolationsSchema } from "../gen/buf/validate/validate_pb.js";
import { EnvironmentService } from "../gen/gitpod/v1/environment_pb.js";
import { EventService, WatchEventsRequestSchema } from "../gen/gitpod/v1/event_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { RunnerKind } from "../gen/gitpod/v1/runner_configuration_pb.js";
import {
  CreateRunnerRequestSchema,
  GetRunnerRequestSchema,
  ListRunnersRequestSchema,
  RunnerService,
} from "../gen/gitpod/v1/runner_pb.js";
import { Health, HealthCheckResponse_ServingStatus as Serving } from "../gen/grpc/health/v1/health_pb.js";
import { ServerReflection } from "../gen/grpc/reflection/v1/reflection_pb.js";
import { ServerReflection as ServerReflectionAlpha } from "../gen/grpc/reflection/v1alpha/reflection_pb.js";
import { createBerthClient, createOpsClient } from "../src/client.ts";
import { createBerthClient as createWebClient } from "../src/client-web.ts";
import { observe } from "../src/rpc/observe.ts";
import { validation } from "../src/rpc/validate.ts";
import { type HttpHandler, type Server, type ServerOptions, startServer } from "../src/server.ts";
import { type Echo, EVENT_ID, echo, SECRET } from "./harness/echo.ts";

const GET_RUNNER = "/gitpod.v1.RunnerService/GetRunner";
const LIST_RUNNERS = "/gitpod.v1.RunnerService/ListRunners";
const CREATE_RUNNER = "/gitpod.v1.RunnerService/CreateRunner";
const WATCH = "/gitpod.v1.EventService/WatchEvents";
const TOKEN = "berth_pat_not-for-logs";
const LIMIT = 100_000;
const PATIENTLY = { timeout: 20_000 };

interface Wire {
  server: Server;
  echo: Echo;
  lines: Record<string, unknown>[];
  log(): string;
}

async function serve(options: Partial<ServerOptions> = {}): Promise<Wire> {
  const services = echo();
  const lines: string[] = [];
  const log = pino({ level: "debug" }, { write: (line: string) => void lines.push(line) });
  const callerOf = () => ({ principal: Principal.USER, id: "somebody" });
  const server = await startServer({
    ...{ host: "127.0.0.1", port: 0, routes: services.routes, log },
    interceptors: [observe({ log, callerOf })],
    ready: async () => ({ ok: true }),
    ...options,
    limits: { bodyBytes: LIMIT, answerBytes: 8_000_000, ...options.limits },
  });
  return {
    ...{ server, echo: services },
    log: () => lines.join(""),
    get lines() {
      return lines.map((line) => JSON.parse(line));
    },
  };
}

/** A server for one test. */
async function serveHere(options: Partial<ServerOptions> = {}): Promise<Wire> {
  const wire = await serve(options);
  onTestFinished(() => wire.server.close());
  return wire;
}

const binary = <D extends DescMessage>(desc: D, init?: MessageInitShape<D>) => toBinary(desc, create(desc, init));

function envelope(bytes: Uint8Array, flags = 0): Buffer {
  const head = Buffer.alloc(5);
  head.writeUInt8(flags);
  head.writeUInt32BE(bytes.length, 1);
  return Buffer.concat([head, bytes]);
}

function unwrap(body: Buffer): { flags: number; data: Buffer }[] {
  const found = [];
  for (let at = 0; at < body.length; ) {
    const end = at + 5 + body.readUInt32BE(at + 1);
    found.push({ flags: body.readUInt8(at), data: body.subarray(at + 5, end) });
    at = end;
  }
  return found;
}

/** The JSON of an answer, of whatever shape the test expects. */
// biome-ignore lint/suspicious/noExplicitAny: tests name the parts that they look at
const jsonOf = (answer: Response): Promise<any> => answer.json();

const post = (url: string, type: string, body: string | Uint8Array, headers: Record<string, string> = {}) =>
  fetch(url, { method: "POST", headers: { "content-type": type, ...headers }, body });
const postJson = (url: string, body: unknown, headers?: Record<string, string>) =>
  post(url, "application/json", typeof body === "string" ? body : JSON.stringify(body), headers);

/** One HTTP/2 request by hand. */
async function http2(
  session: ClientHttp2Session,
  path: string,
  type: string,
  body: Uint8Array,
  headers: Record<string, string> = {},
) {
  const stream = session.request({
    ":method": "POST",
    ":path": path,
    "content-type": type,
    te: "trailers",
    ...headers,
  });
  const response = Promise.withResolvers<Record<string, unknown>>();
  let trailers: Record<string, unknown> = {};
  const chunks: Buffer[] = [];
  stream.on("response", response.resolve);
  stream.on("trailers", (found) => {
    trailers = found;
  });
  stream.on("data", (chunk) => chunks.push(chunk));
  const ended = new Promise<void>((resolve, reject) => {
    stream.on("close", () => (stream.rstCode ? reject(new Error(`reset with ${stream.rstCode}`)) : resolve()));
    stream.on("error", reject);
  });
  stream.end(body);
  await ended;
  return { headers: await response.promise, body: Buffer.concat(chunks), trailers };
}

function http2Session(url: string): ClientHttp2Session {
  const session = connectHttp2(url);
  session.on("error", () => undefined);
  onTestFinished(() => session.destroy());
  return session;
}

/** Code of an answer, in whatever protocol it is. */
async function codeOf(server: Server, protocol: string, path: string, body: Uint8Array, headers = {}): Promise<string> {
  if (protocol === "grpc") {
    const session = http2Session(server.url);
    const answer = await http2(session, path, "application/grpc", envelope(body), headers);
    return Code[Number({ ...answer.headers, ...answer.trailers }["grpc-status"])] ?? "ok";
  }
  if (protocol === "grpc-web") {
    const answer = await post(`${server.url}${path}`, "application/grpc-web+proto", envelope(body), headers);
    const last = unwrap(Buffer.from(await answer.arrayBuffer())).at(-1);
    const status = answer.headers.get("grpc-status") ?? /grpc-status: (\d+)/.exec(String(last?.data))?.[1];
    return Code[Number(status)] ?? "ok";
  }
  if (protocol.startsWith("connect+")) {
    const answer = await post(`${server.url}${path}`, `application/${protocol}`, envelope(body), headers);
    const last = unwrap(Buffer.from(await answer.arrayBuffer())).at(-1);
    return JSON.parse(String(last?.data)).error?.code ?? "ok";
  }
  const answer = await post(`${server.url}${path}`, `application/${protocol}`, body, headers);
  const text = await answer.text();
  return answer.ok ? "ok" : `${JSON.parse(text).code}`;
}

const snake = (code: string) => code.replace(/(?<=[a-z])[A-Z]/g, "_$&").toLowerCase();

async function rejection(promise: Promise<unknown>): Promise<ConnectError> {
  const outcome = await promise.then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(outcome).toBeInstanceOf(ConnectError);
  return outcome as ConnectError;
}

async function collect<T>(messages: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const message of messages) found.push(message);
  return found;
}

// The short way and connect's own must not differ in what they answer.
describe.each([{ direct: true }, { direct: false }])("with direct calls: $direct", ({ direct }) => {
  let wire: Wire;
  let server: Server;
  beforeAll(async () => {
    wire = await serve({ direct });
    server = wire.server;
  });
  afterAll(() => server.close());

  describe.each([
    { transport: "connect", useBinaryFormat: true },
    { transport: "connect", useBinaryFormat: false },
    { transport: "grpc", useBinaryFormat: true },
    { transport: "grpc", useBinaryFormat: false },
    { transport: "grpc-web", useBinaryFormat: true },
    { transport: "grpc-web", useBinaryFormat: false },
  ] as const)("$transport, binary: $useBinaryFormat", (protocol) => {
    test.each(["", "/api"])("calls and streams under the prefix %j", async (prefix) => {
      const client = createBerthClient({ baseUrl: `${server.url}${prefix}`, token: TOKEN, ...protocol });
      const seen = { header: new Headers(), trailer: new Headers() };
      const answer = await client.runners.getRunner(
        { runnerId: "a" },
        {
          headers: { "x-name": "name" },
          onHeader: (header) => void Object.assign(seen, { header }),
          onTrailer: (trailer) => void Object.assign(seen, { trailer }),
        },
      );
      expect(answer.runner).toMatchObject({ runnerId: "a", name: "name" });
      expect(seen.header.get("x-echo")).toBe("header");
      expect(seen.trailer.get("x-echo-trailer")).toBe("trailer");
      expect(await client.runners.createRunner({ name: "n", kind: RunnerKind.LOCAL })).toMatchObject({
        runner: { name: "n", kind: RunnerKind.LOCAL },
      });
      const events = await collect(client.events.watchEvents({}));
      expect(events.map(({ resourceId }) => resourceId)).toEqual([EVENT_ID, ""]);
    });

    test("errors carry code, text, details and headers, in calls and in streams", async () => {
      const client = createBerthClient({ baseUrl: server.url, ...protocol });
      const cases = {
        refusal: [Code.PermissionDenied, "not you"],
        "not-found": [Code.NotFound, "no such runner"],
        rate: [Code.ResourceExhausted, "too fast"],
        crash: [Code.Internal, "internal error"],
      } as const;
      for (const [what, [code, message]] of Object.entries(cases)) {
        const failed = [
          rejection(client.runners.getRunner({ runnerId: what })),
          rejection(collect(client.events.watchEvents({ scope: { case: "environmentId", value: what } }))),
        ];
        for (const error of await Promise.all(failed)) {
          expect(error).toMatchObject({ code, rawMessage: message });
          expect(error.metadata.get("x-request-id"), what).toMatch(/^[\w-]{36}$/);
          expect(error.details.length).toBe(what === "rate" ? 1 : 0);
        }
      }
      const broken = collect(client.events.watchEvents({ scope: { case: "environmentId", value: "break" } }));
      expect(await rejection(broken)).toMatchObject({ code: Code.Internal, rawMessage: "internal error" });
    });

    test("a deadline reaches the handler", async () => {
      const client = createBerthClient({ baseUrl: server.url, ...protocol });
      const { runner } = await client.runners.getRunner({ runnerId: "timeout" }, { timeoutMs: 20_000 });
      expect(Number(runner?.name)).toBeGreaterThan(15_000);
      expect(Number(runner?.name)).toBeLessThanOrEqual(20_000);
      const late = client.runners.getRunner({ runnerId: "until-abort" }, { timeoutMs: 50 });
      expect((await rejection(late)).code).toBe(Code.DeadlineExceeded);
    });
  });

  test("Connect over HTTP/2, with compressed messages both ways", async () => {
    const sessionManager = new Http2SessionManager(server.url);
    onTestFinished(() => sessionManager.abort());
    for (const useBinaryFormat of [true, false]) {
      const transport = createConnectTransport({
        ...{ baseUrl: server.url, httpVersion: "2", useBinaryFormat, sessionManager, compressMinBytes: 1 },
        sendCompression: (await import("@connectrpc/connect-node")).compressionGzip,
      });
      const { runner } = await createClient(RunnerService, transport).getRunner({ runnerId: "large" });
      expect(runner?.name).toHaveLength(300_000);
      expect(await collect(createClient(EventService, transport).watchEvents({}))).toHaveLength(2);
    }
  });

  test("large answers are compressed for those who accept it, small ones never", async () => {
    const lengthOf = async (runnerId: string, encoding: string) => {
      const session = http2Session(server.url);
      const body = binary(GetRunnerRequestSchema, { runnerId });
      const plain = await http2(session, GET_RUNNER, "application/proto", body, { "accept-encoding": encoding });
      const grpc = await http2(session, GET_RUNNER, "application/grpc", envelope(body), {
        "grpc-accept-encoding": encoding,
      });
      expect(unwrap(grpc.body)[0]?.flags).toBe(plain.headers["content-encoding"] ? 1 : 0);
      return [plain.headers["content-encoding"], plain.body.length < 100_000];
    };
    expect(await lengthOf("large", "gzip")).toEqual(["gzip", true]);
    expect(await lengthOf("large", "x, br")).toEqual(["br", true]);
    expect(await lengthOf("large", "identity")).toEqual([undefined, false]);
    expect(await lengthOf("small", "gzip, br")).toEqual([undefined, true]);
  });

  describe("GET", () => {
    test.each(["", "/api"])("serves RPCs without side effects under the prefix %j", async (prefix) => {
      const message = encodeURIComponent(JSON.stringify({ pagination: { pageSize: 2 } }));
      const answer = await fetch(`${server.url}${prefix}${LIST_RUNNERS}?connect=v1&encoding=json&message=${message}`);
      expect(await jsonOf(answer)).toMatchObject({ runners: [{ runnerId: "0" }, { runnerId: "1" }] });
      const bytes = Buffer.from(binary(GetRunnerRequestSchema, { runnerId: "b" })).toString("base64url");
      const query = `connect=v1&encoding=proto&base64=1&message=${bytes}`;
      expect((await fetch(`${server.url}${prefix}${GET_RUNNER}?${query}`)).status).toBe(200);
    });

    test("through a client", async () => {
      const transport = createConnectTransport({ baseUrl: server.url, httpVersion: "1.1", useHttpGet: true });
      const answer = await createClient(RunnerService, transport).listRunners({ pagination: { pageSize: 1 } });
      expect(answer.runners).toHaveLength(1);
    });

    test("is refused for others with 405, other methods everywhere", async () => {
      const answer = await fetch(`${server.url}${CREATE_RUNNER}?connect=v1&encoding=json&message=%7B%7D`);
      expect([answer.status, await jsonOf(answer)]).toEqual([405, { message: expect.stringContaining("POST") }]);
      expect(answer.headers.get("allow")).toBe("POST");
      const other = await fetch(`${server.url}${GET_RUNNER}`, { method: "DELETE" });
      expect([other.status, other.headers.get("allow")]).toEqual([405, "POST, GET"]);
    });

    test("with a malformed message is INVALID_ARGUMENT", async () => {
      for (const query of ["encoding=json&message=%7B", "encoding=proto&base64=1&message=CgX_"]) {
        const answer = await fetch(`${server.url}${GET_RUNNER}?connect=v1&${query}`);
        expect([answer.status, (await jsonOf(answer)).code]).toEqual([400, "invalid_argument"]);
      }
    });
  });

  describe("paging by the URL of a POST", () => {
    const list = async (query: string, body: object = {}) =>
      jsonOf(await postJson(`${server.url}/api${LIST_RUNNERS}${query}`, body));
    const page = (ids: string[]) => ids.map((runnerId) => expect.objectContaining({ runnerId }));

    test("replaces what the message says", async () => {
      const body = { pagination: { pageSize: 1, token: "1" } };
      expect((await list("?pageSize=2&token=2", body)).runners).toEqual(page(["2", "3"]));
      expect((await list("?token=3", body)).runners).toEqual(page(["3"]));
      expect((await list("?pageSize=2", body)).runners).toEqual(page(["1", "2"]));
      expect((await list("?pageSize=2")).runners).toEqual(page(["0", "1"]));
      expect((await list("?token=&pageSize=&other=1", body)).runners).toEqual(page(["1"]));
      expect((await list("", body)).runners).toEqual(page(["1"]));
    });

    test("works for binary messages and in gRPC", async () => {
      const body = binary(ListRunnersRequestSchema, { pagination: { token: "4" } });
      const answer = await post(`${server.url}${LIST_RUNNERS}?token=2`, "application/proto", body);
      const grpc = await http2(http2Session(server.url), `${LIST_RUNNERS}?token=2`, "application/grpc", envelope(body));
      const { output } = RunnerService.method.listRunners;
      for (const bytes of [new Uint8Array(await answer.arrayBuffer()), unwrap(grpc.body)[0]!.data]) {
        expect(fromBinary(output, bytes).runners.map(({ runnerId }) => runnerId)).toEqual(["2", "3", "4"]);
      }
    });

    test("means nothing to messages without pages", async () => {
      const answer = await postJson(`${server.url}${GET_RUNNER}?token=x&pageSize=x`, { runnerId: "c" });
      expect(await jsonOf(answer)).toEqual({ runner: { runnerId: "c" } });
    });

    test.each(["abc", "1.5", "99999999999", "1e2", "0x10"])("pageSize %s is INVALID_ARGUMENT", async (size) => {
      const answer = await postJson(`${server.url}${LIST_RUNNERS}?pageSize=${size}`, {});
      const error = await jsonOf(answer);
      expect([answer.status, error.code]).toEqual([400, "invalid_argument"]);
      expect(error.message).toContain("pagination.page_size");
      const violations = fromBinary(ViolationsSchema, Buffer.from(error.details[0].value, "base64"));
      const names = violations.violations[0]?.field?.elements.map(({ fieldName }) => fieldName);
      expect(names).toEqual(["pagination", "page_size"]);
    });
  });

  describe("requests that cannot be read are INVALID_ARGUMENT", () => {
    const text = (content: string) => Buffer.from(content);
    // Field 1 of GetRunnerRequest is a string: here a number, a length that is too long, no UTF-8, and an unknown type.
    const wrongBinary = {
      "a number for a string": [0x08, 0x01],
      "a truncated field": [0x0a, 0x7f, 0x61],
      "invalid UTF-8": [0x0a, 0x02, 0xc3, 0x28],
      "an unknown wire type": [0x0f],
      "a truncated varint": [0x0a, 0xff, 0xff],
    };
    const wrongJson = {
      "text that is no JSON": text("{"),
      "an array": text("[]"),
      "a number for a string": text('{"runnerId":1}'),
      "invalid UTF-8": Buffer.concat([text('{"runnerId":"'), Buffer.from([0xc3, 0x28]), text('"}')]),
      "a field twice": text('{"runnerId":"a","runnerId":"b"}'),
    };
    const wrongLists = {
      "a huge number": text('{"pagination":{"pageSize":1e300}}'),
      "a number beyond its type": text('{"pagination":{"pageSize":2147483648}}'),
      "an unknown enum value": text('{"filter":{"kinds":["RUNNER_KIND_LOCAL","RUNNER_KIND_TELEPATHIC"]}}'),
      "an unknown enum value beside an unknown field": text('{"x":1,"filter":{"y":{},"kinds":["nope"]}}'),
    };

    for (const protocol of ["proto", "grpc", "grpc-web"]) {
      test.each(Object.entries(wrongBinary))(`${protocol}: %s`, async (_name, bytes) => {
        expect(snake(await codeOf(server, protocol, GET_RUNNER, Buffer.from(bytes)))).toBe("invalid_argument");
      });
    }
    test.each(Object.entries(wrongJson))("json: %s", async (_name, bytes) => {
      expect(await codeOf(server, "json", GET_RUNNER, bytes)).toBe("invalid_argument");
      const session = http2Session(server.url);
      const { headers, trailers } = await http2(session, GET_RUNNER, "application/grpc+json", envelope(bytes));
      expect({ ...headers, ...trailers }).toMatchObject({ "grpc-status": "3" });
    });
    test.each(Object.entries(wrongLists))("json: %s", async (_name, bytes) => {
      expect(await codeOf(server, "json", LIST_RUNNERS, bytes)).toBe("invalid_argument");
    });
    test.each([
      ["connect+proto", Buffer.from([0x12, 0x7f])],
      ["connect+json", text('{"environmentId":[]}')],
      ["connect+json", text('{"resourceTypeFilters":[{"resourceType":"nope"}]}')],
      ["grpc", Buffer.from([0x12, 0x7f])],
      ["grpc-web", Buffer.from([0x12, 0x7f])],
      ["jsonl", text('{"environmentId":[]}')],
      ["jsonl", text('{"resourceTypeFilters":[{"resourceType":"nope"}]}')],
      ["jsonl", text("{}\n{}")],
      ["jsonl", Buffer.from([0xff])],
    ])("streams in %s", async (protocol, bytes) => {
      expect(snake(await codeOf(server, protocol, WATCH, bytes))).toBe("invalid_argument");
    });

    test("names the field of an unknown enum value", async () => {
      const answer = await postJson(`${server.url}${LIST_RUNNERS}`, { filter: { kinds: ["RUNNER_KIND_LOCAL", "x"] } });
      expect((await jsonOf(answer)).message).toBe('filter.kinds[1]: "x" is no value of gitpod.v1.RunnerKind');
    });

    test("envelopes that are cut off, or too many", async () => {
      const whole = envelope(binary(GetRunnerRequestSchema, { runnerId: "a" }));
      const session = http2Session(server.url);
      const statusOf = async (body: Uint8Array) => {
        const { headers, trailers } = await http2(session, GET_RUNNER, "application/grpc", body);
        return { ...headers, ...trailers }["grpc-status"];
      };
      expect(await statusOf(whole)).toBe("0");
      expect(await statusOf(whole.subarray(0, 3))).toBe(String(Code.InvalidArgument));
      expect(await statusOf(whole.subarray(0, 6))).toBe(String(Code.InvalidArgument));
      expect(await statusOf(envelope(whole, 1))).toBe(String(Code.InvalidArgument));
      expect(await statusOf(Buffer.alloc(0))).toBe(String(Code.Unimplemented));
      expect(await statusOf(Buffer.concat([whole, whole]))).toBe(String(Code.Unimplemented));
    });

    test("deadlines and compressions that nobody knows", async () => {
      const send = (headers: Record<string, string>) => codeOf(server, "json", GET_RUNNER, text("{}"), headers);
      expect(await send({ "connect-timeout-ms": "soon" })).toBe("invalid_argument");
      expect(await send({ "connect-timeout-ms": "9999999999" })).toBe("invalid_argument");
      expect(await send({ "content-encoding": "snappy" })).toBe("unimplemented");
      expect(await send({ "content-encoding": "gzip" })).toBe("invalid_argument");
      const grpc = (headers: Record<string, string>) => codeOf(server, "grpc", GET_RUNNER, new Uint8Array(), headers);
      expect(await grpc({ "grpc-timeout": "1 fortnight" })).toBe("InvalidArgument");
      expect(await grpc({ "grpc-timeout": "99999999H" })).toBe("InvalidArgument");
    });

    test("while unknown fields are ignored, and no body is an empty message", async () => {
      const newer = { runnerId: "d", newField: { kind: "x" }, "": [1] };
      expect(await jsonOf(await postJson(`${server.url}${GET_RUNNER}`, newer))).toEqual({ runner: { runnerId: "d" } });
      const filter = { filter: { kinds: ["RUNNER_KIND_LOCAL", 2], newer: true } };
      expect((await postJson(`${server.url}${LIST_RUNNERS}`, filter)).status).toBe(200);
      expect(await codeOf(server, "json", LIST_RUNNERS, new Uint8Array())).toBe("ok");
      expect(await codeOf(server, "connect+json", WATCH, text('{"newField":1}'))).toBe("ok");
      const unknown = Buffer.concat([binary(GetRunnerRequestSchema, { runnerId: "d" }), Buffer.from([0xf8, 0x3f, 1])]);
      expect(await codeOf(server, "proto", GET_RUNNER, unknown)).toBe("ok");
    });
  });

  describe("bounds", () => {
    const big = (size: number) => binary(GetRunnerRequestSchema, { runnerId: "x".repeat(size) });

    test.each(["proto", "grpc", "grpc-web"])(
      "a message that is too large is RESOURCE_EXHAUSTED in %s",
      async (protocol) => {
        expect(snake(await codeOf(server, protocol, GET_RUNNER, big(LIMIT)))).toBe("resource_exhausted");
        expect(snake(await codeOf(server, protocol, GET_RUNNER, big(3_000_000)))).toBe("resource_exhausted");
        expect(snake(await codeOf(server, protocol, GET_RUNNER, big(LIMIT - 10)))).toBe("ok");
      },
    );

    test("as well if its size is not told before, in JSON, in streams, and if it is compressed", async () => {
      const chunks = new ReadableStream({
        start(controller) {
          for (let sent = 0; sent < 50; sent += 1) controller.enqueue(Buffer.alloc(10_000, " "));
          controller.close();
        },
      });
      const init = { method: "POST", body: chunks, duplex: "half" } as RequestInit;
      const json = { headers: { "content-type": "application/json" } };
      const answer = await fetch(`${server.url}${GET_RUNNER}`, { ...init, ...json });
      expect([answer.status, (await jsonOf(answer)).code]).toEqual([429, "resource_exhausted"]);
      expect(answer.headers.get("x-should-retry")).toBe("false");
      const bomb = gzipSync(Buffer.alloc(20_000_000));
      expect(await codeOf(server, "json", GET_RUNNER, bomb, { "content-encoding": "gzip" })).toBe("resource_exhausted");
      const stream = binary(WatchEventsRequestSchema, { scope: { case: "environmentId", value: "x".repeat(LIMIT) } });
      expect(await codeOf(server, "connect+proto", WATCH, stream)).toBe("resource_exhausted");
      const lines = JSON.stringify({ environmentId: "x".repeat(LIMIT) });
      expect(await codeOf(server, "jsonl", WATCH, Buffer.from(lines))).toBe("resource_exhausted");
    });

    test("an answer that is too large, or cannot be written, is an error in the log too", async () => {
      for (const [runnerId, code] of [
        ["too-large", "resource_exhausted"],
        ["invalid", "internal"],
      ] as const) {
        const id = `answer-${runnerId}-${direct}`;
        const answer = await postJson(`${server.url}${GET_RUNNER}`, { runnerId }, { "x-request-id": id });
        expect((await jsonOf(answer)).code).toBe(code);
        expect(wire.lines.filter(({ requestId }) => requestId === id)).toContainEqual(
          expect.objectContaining({ code }),
        );
      }
    });

    test("headers that are too large are refused", async () => {
      const answer = await postJson(`${server.url}${GET_RUNNER}`, {}, { "x-large": "x".repeat(40_000) });
      expect(answer.status).toBe(431);
    });

    test.each(["text/plain", "application/xml", "application/json; charset=latin1", "application/connect+json"])(
      "content type %s is refused with 415 by unary RPCs",
      async (type) => {
        expect((await post(`${server.url}${GET_RUNNER}`, type, "{}")).status).toBe(415);
      },
    );

    test("a content type may name UTF-8, and streams want a type of their own", async () => {
      expect((await post(`${server.url}${GET_RUNNER}`, "application/json; charset=utf-8", "{}")).status).toBe(200);
      expect((await post(`${server.url}${GET_RUNNER}`, "Application/JSON;charset=UTF-8", "{}")).status).toBe(200);
      expect((await post(`${server.url}${WATCH}`, "application/json", "{}")).status).toBe(415);
      expect((await post(`${server.url}${WATCH}`, "application/proto", "")).status).toBe(415);
    });

    test("a caller that does not read holds the handler back", async () => {
      const session = http2Session(server.url);
      const body = binary(WatchEventsRequestSchema, { scope: { case: "environmentId", value: "many" } });
      const stream = session.request({
        ":method": "POST",
        ":path": WATCH,
        "content-type": "application/connect+proto",
      });
      stream.on("error", () => undefined);
      stream.end(envelope(body));
      stream.pause();
      // Each message has 100 kB; what is not held back fills memory.
      await wire.echo.waiting(1);
      await expect(Promise.race([wire.echo.waiting(200), settled(session)])).resolves.toBe("settled");
      stream.close(constants.NGHTTP2_CANCEL);
    });

    /** Resolves once the other side has had a few turns to do more. */
    async function settled(session: ClientHttp2Session): Promise<string> {
      for (let turn = 0; turn < 20; turn += 1) await new Promise((resolve) => void session.ping(resolve));
      return "settled";
    }
  });

  describe("JSON lines", () => {
    const watch = (what: string, headers: Record<string, string> = {}, prefix = "/api") =>
      post(
        `${server.url}${prefix}${WATCH}`,
        headers["content-type"] ?? "application/jsonl",
        JSON.stringify({ environmentId: what }),
        { accept: "application/jsonl", ...headers },
      );

    test.each(["application/jsonl", "application/json"])(
      "answer a request in %s with a line per message",
      async (type) => {
        for (const prefix of ["", "/api"]) {
          const answer = await watch("two", { "content-type": type }, prefix);
          expect(answer.status).toBe(200);
          expect(answer.headers.get("content-type")).toBe("application/jsonl");
          const event = JSON.stringify({
            operation: "RESOURCE_OPERATION_UPDATE",
            resourceType: "RESOURCE_TYPE_RUNNER",
            resourceId: EVENT_ID,
          });
          expect(await answer.text()).toBe(`${event}\n{}\n`);
        }
      },
    );

    test("an error before the first line is that of a unary call", async () => {
      const answer = await watch("refusal");
      expect(answer.status).toBe(403);
      expect(answer.headers.get("content-type")).toBe("application/json");
      expect(await jsonOf(answer)).toEqual({ code: "permission_denied", message: "not you" });
    });

    test("a later one breaks the connection, in both versions of HTTP", async () => {
      const answer = await watch("break");
      expect(answer.status).toBe(200);
      await expect(answer.text()).rejects.toThrow();
      const body = Buffer.from(JSON.stringify({ environmentId: "break" }));
      await expect(http2(http2Session(server.url), WATCH, "application/jsonl", body)).rejects.toThrow(
        "NGHTTP2_INTERNAL_ERROR",
      );
    });
  });

  describe("headers of a stream come before its first message", () => {
    test.each(["silent", "late"])("in JSON lines, from a handler that is %s", async (what) => {
      const abort = new AbortController();
      const body = JSON.stringify({ environmentId: what });
      const headers = { "content-type": "application/jsonl", accept: "application/jsonl" };
      const answer = await fetch(`${server.url}${WATCH}`, { method: "POST", headers, body, signal: abort.signal });
      expect(answer.status).toBe(200);
      expect(answer.headers.get("x-request-id")).toBeTruthy();
      abort.abort();
    });

    test.each([
      ["silent", "application/connect+proto"],
      ["late", "application/connect+proto"],
      ["silent", "application/grpc"],
      ["late", "application/grpc"],
      ["silent", "application/grpc-web+proto"],
      ["late", "application/grpc-web+proto"],
    ])("from a handler that is %s, in %s", async (what, type) => {
      const session = http2Session(server.url);
      const stream = session.request({ ":method": "POST", ":path": WATCH, "content-type": type, te: "trailers" });
      stream.on("error", () => undefined);
      const response = new Promise<Record<string, unknown>>((resolve) => void stream.on("response", resolve));
      const body = binary(WatchEventsRequestSchema, { scope: { case: "environmentId", value: what } });
      stream.end(envelope(body));
      expect(await response).toMatchObject({ ":status": 200, "content-type": expect.stringContaining(type) });
      stream.close(constants.NGHTTP2_CANCEL);
    });

    test("and a handler learns that its caller has left", async () => {
      const id = `left-${direct}`;
      const abort = new AbortController();
      const headers = { "content-type": "application/jsonl", accept: "application/jsonl", "x-request-id": id };
      const body = JSON.stringify({ environmentId: "silent" });
      await fetch(`${server.url}${WATCH}`, { method: "POST", headers, body, signal: abort.signal });
      abort.abort();
      const left = () => wire.lines.find(({ requestId }) => requestId === id);
      await expect.poll(left, PATIENTLY).toMatchObject({ code: "canceled", rpc: WATCH.slice(1) });
    });
  });

  describe("what the log says", () => {
    test("one line per call, without headers and messages", async () => {
      const client = createBerthClient({ baseUrl: server.url, token: TOKEN });
      const headers = { "x-request-id": `log-${direct}`, "x-name": SECRET };
      await client.runners.getRunner({ runnerId: SECRET }, { headers });
      await rejection(client.runners.getRunner({ runnerId: "refusal" }, { headers }));
      await rejection(client.runners.getRunner({ runnerId: "crash" }, { headers }));
      await collect(client.events.watchEvents({}, { headers }));
      const lines = wire.lines.filter(({ requestId }) => requestId === `log-${direct}`);
      expect(lines.map(({ level, rpc, code }) => [level, rpc, code])).toEqual([
        [20, GET_RUNNER.slice(1), "ok"],
        [30, GET_RUNNER.slice(1), "permission_denied"],
        [50, GET_RUNNER.slice(1), "internal"],
        [20, WATCH.slice(1), "ok"],
      ]);
      for (const line of lines) {
        expect(line).toMatchObject({ principal: "USER", principalId: "somebody", durationMs: expect.any(Number) });
      }
      const [, , crash] = lines;
      expect(crash).toMatchObject({ error: { type: "TypeError", stack: expect.stringContaining("echo.ts") } });
      expect(JSON.stringify(lines.filter((line) => line !== crash))).not.toContain("hunter2");
      expect(wire.log()).not.toContain(TOKEN);
    });

    test("also of requests that could not be read", async () => {
      for (const [protocol, bytes] of [
        ["json", Buffer.from("{")],
        ["proto", Buffer.from([0x0a, 0x7f])],
        ["grpc", Buffer.from([0x0a, 0x7f])],
      ] as const) {
        const id = `unread-${protocol}-${direct}`;
        await codeOf(server, protocol, GET_RUNNER, bytes, { "x-request-id": id });
        expect(wire.lines.filter(({ requestId }) => requestId === id)).toEqual([
          expect.objectContaining({ level: 30, rpc: GET_RUNNER.slice(1), code: "invalid_argument" }),
        ]);
      }
    });

    test("request ids that are fit are kept, others replaced", async () => {
      const idFor = async (sent: string) => {
        const answer = await postJson(`${server.url}${GET_RUNNER}`, {}, { "x-request-id": sent });
        return answer.headers.get("x-request-id");
      };
      expect(await idFor("trace-1/2:3")).toBe("trace-1/2:3");
      expect(await idFor("a b")).toMatch(/^[\w-]{36}$/);
      expect(await idFor("x".repeat(129))).toMatch(/^[\w-]{36}$/);
    });

    test("and the metrics", async () => {
      await postJson(`${server.url}${GET_RUNNER}`, { runnerId: "exists" });
      const text = await register.metrics();
      expect(text).toMatch(
        /berth_rpc_seconds_count\{rpc="gitpod.v1.RunnerService\/GetRunner",code="already_exists"\} \d/,
      );
    });
  });

  test.each([
    ["unauthenticated", 401, { "www-authenticate": "Bearer", "x-should-retry": null }],
    ["rate", 429, { "retry-after": "2", "ratelimit-retryafter": "2", "x-should-retry": null }],
    ["quota", 429, { "retry-after": null, "x-should-retry": "false" }],
    ["exists", 409, { "x-should-retry": "false" }],
    ["aborted", 409, { "x-should-retry": null }],
    ["refusal", 403, { "www-authenticate": null, "x-should-retry": null }],
    ["crash", 500, { "x-should-retry": null }],
  ])("%s: status %i and headers for HTTP clients", async (runnerId, status, headers) => {
    const answer = await postJson(`${server.url}${GET_RUNNER}`, { runnerId });
    expect(answer.status).toBe(status);
    for (const [name, value] of Object.entries(headers)) expect(answer.headers.get(name), name).toBe(value);
  });

  describe("the official SDK", () => {
    const sdk = () => new Gitpod({ baseURL: `${server.url}/api`, bearerToken: TOKEN, maxRetries: 1 });

    test("pages, watches and reads errors unchanged", async () => {
      const found: string[] = [];
      for await (const runner of sdk().runners.list({ pageSize: 2 })) found.push(runner.runnerId ?? "");
      expect(found).toEqual(["0", "1", "2", "3", "4"]);
      const events = await collect(await sdk().events.watch({ environmentId: "two" }));
      expect(events).toEqual([expect.objectContaining({ resourceId: EVENT_ID }), {}]);
      expect(await collect(await sdk().events.watch({}))).toHaveLength(2);
      await expect(sdk().runners.retrieve({ runnerId: "not-found" })).rejects.toThrow(Gitpod.NotFoundError);
      await expect(sdk().runners.retrieve({ runnerId: "quota" })).rejects.toThrow(Gitpod.RateLimitError);
      await expect(sdk().events.watch({ environmentId: "refusal" })).rejects.toThrow(Gitpod.PermissionDeniedError);
    });
  });

  test("clients ask for their token at each call", async () => {
    const seen: (string | null)[] = [];
    const spy: Interceptor = (next) => (request) => {
      seen.push(request.header.get("authorization"));
      return next(request);
    };
    const guarded = await serveHere({ interceptors: [spy], direct });
    const tokens = ["t1", "t2", "t3", "t4"];
    const token = async () => tokens.shift() ?? "";
    for (const create of [createBerthClient, createWebClient]) {
      const client = create({ baseUrl: `${guarded.server.url}/`, token });
      await client.runners.listRunners({});
      expect(await collect(client.events.watchEvents({}))).toHaveLength(2);
    }
    expect(seen).toEqual(["Bearer t1", "Bearer t2", "Bearer t3", "Bearer t4"]);

    expect(Object.keys(createBerthClient({ baseUrl: "http://localhost" }))).toHaveLength(16);
    const ops = createOpsClient({ opsUrl: guarded.server.url, token: "t" });
    expect((await rejection(ops.exec({}))).code).toBe(Code.Unimplemented);
  });

  test("a gate refuses before the body is read", async () => {
    const refused = new ConnectError("no entry", Code.Unauthenticated);
    const gated = await serveHere({
      direct,
      gate: ({ header, method }) => {
        if (!header.get("authorization")) throw Object.assign(refused, { rawMessage: `no entry to ${method.name}` });
      },
    });
    for (const protocol of ["json", "proto", "grpc", "grpc-web"]) {
      const code = await codeOf(gated.server, protocol, GET_RUNNER, Buffer.from("{"));
      expect(snake(code)).toBe("unauthenticated");
    }
    expect(await codeOf(gated.server, "jsonl", WATCH, Buffer.from("{"))).toBe("unauthenticated");
    const answer = await postJson(`${gated.server.url}${GET_RUNNER}`, "{");
    expect(answer.headers.get("www-authenticate")).toBe("Bearer");
    expect(gated.lines.at(-1)).toMatchObject({ code: "unauthenticated", rpc: GET_RUNNER.slice(1) });
    expect(await codeOf(gated.server, "json", GET_RUNNER, Buffer.from("{}"), { authorization: "x" })).toBe("ok");
  });

  describe("draining", () => {
    const clients = (url: string) =>
      (["connect", "grpc", "grpc-web"] as const).map((transport) => createBerthClient({ baseUrl: url, transport }));

    test("ends streams with UNAVAILABLE, even deaf ones, and lets calls finish", async () => {
      const draining = await serveHere({ direct });
      const { url } = draining.server;
      const streams = clients(url).flatMap((client) =>
        ["silent", "deaf"].map((value) =>
          rejection(collect(client.events.watchEvents({ scope: { case: "environmentId", value } }))),
        ),
      );
      const lines = fetch(`${url}${WATCH}`, {
        method: "POST",
        headers: { "content-type": "application/jsonl", accept: "application/jsonl" },
        body: JSON.stringify({ environmentId: "silent" }),
      }).then((answer) => answer.text());
      const broken = expect(lines).rejects.toThrow();
      const calls = clients(url).map((client) => client.runners.getRunner({ runnerId: "wait" }));
      await draining.echo.waiting(10);
      const session = http2Session(url);
      const goneAway = new Promise((resolve) => void session.on("goaway", resolve));
      await http2(session, GET_RUNNER, "application/json", Buffer.from("{}"));

      const drained = draining.server.drain(20_000);
      for (const error of await Promise.all(streams)) expect(error.code).toBe(Code.Unavailable);
      await broken;
      await goneAway;
      const readiness = await fetch(`${url}/readyz`);
      expect([readiness.status, await jsonOf(readiness)]).toEqual([503, { status: "not ready", reason: "draining" }]);
      expect((await fetch(`${url}/healthz`)).status).toBe(200);
      const refused = await postJson(`${url}${GET_RUNNER}`, {});
      expect([refused.status, (await jsonOf(refused)).code]).toEqual([503, "unavailable"]);
      expect(await codeOf(draining.server, "grpc", GET_RUNNER, new Uint8Array())).toBe("Unavailable");

      draining.echo.release();
      for (const { runner } of await Promise.all(calls)) expect(runner?.runnerId).toBe("wait");
      await drained;
      await expect(fetch(`${url}/healthz`)).rejects.toThrow();
    });

    test("gives up on calls that take longer than the time of grace", async () => {
      const draining = await serveHere({ direct });
      const [client] = clients(draining.server.url);
      const call = rejection(client!.runners.getRunner({ runnerId: "until-abort" }));
      const deaf = client!.runners.getRunner({ runnerId: "wait" }).catch((error: ConnectError) => error);
      await draining.echo.waiting(2);
      await draining.server.drain(1);
      expect((await call).code).toBe(Code.Unavailable);
      expect(await deaf).toBeInstanceOf(ConnectError);
    });

    test("closes connections that are idle", async () => {
      const draining = await serveHere({ direct });
      const socket = connectTcp(draining.server.port, "127.0.0.1");
      socket.write("GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n");
      await new Promise((resolve) => void socket.once("data", resolve));
      const closed = new Promise((resolve) => void socket.once("close", resolve));
      await draining.server.drain(20_000);
      await closed;
    });
  });
});

describe("paths that nobody registered", () => {
  const never: Interceptor = () => () => {
    throw new Error("a credential was looked at");
  };
  let server: Server;
  beforeAll(async () => {
    ({ server } = await serve({ interceptors: [never] }));
  });
  afterAll(() => server.close());

  test.each([
    "/gitpod.v1.LLMService/Chat",
    "/gitpod.v1.RunnerService/Teleport",
    "/api/gitpod.v1.EnvironmentService/GetEnvironment",
  ])("%s is UNIMPLEMENTED in every protocol", async (path) => {
    const answer = await postJson(`${server.url}${path}`, "{");
    expect(answer.status).toBe(501);
    const name = path.replace(/^(\/api)?\//, "");
    expect(await jsonOf(answer)).toEqual({ code: "unimplemented", message: `${name} is not implemented` });
    expect((await fetch(`${server.url}${path}`)).status).toBe(501);
    for (const protocol of ["proto", "connect+json", "connect+proto", "grpc", "grpc-web", "jsonl"]) {
      expect(snake(await codeOf(server, protocol, path, new Uint8Array())), protocol).toBe("unimplemented");
    }
    const grpc = await http2(http2Session(server.url), path, "application/grpc", envelope(new Uint8Array()));
    expect(grpc.headers).toMatchObject({ ":status": 200, "content-type": "application/grpc", "grpc-status": "12" });
  });

  test("clients of each protocol understand it", async () => {
    for (const transport of ["connect", "grpc", "grpc-web"] as const) {
      const client = createBerthClient({ baseUrl: server.url, transport });
      expect((await rejection(client.environments.listEnvironments({}))).code).toBe(Code.Unimplemented);
    }
  });

  test.each(["/", "/nothing", "/api", "/api/", "/gitpod.v1.RunnerService", "/a/b/c", "/favicon.ico", "/no-dot/Method"])(
    "%s is not found",
    async (path) => {
      const answer = await postJson(`${server.url}${path}`, {});
      expect([answer.status, (await jsonOf(answer)).code]).toEqual([404, "not_found"]);
    },
  );
});

describe("what operators ask", () => {
  test("healthz, readyz and metrics", async () => {
    let reason: string | undefined = "the database is away";
    const { server } = await serveHere({ ready: async () => ({ ok: reason === undefined, reason }) });
    expect((await fetch(`${server.url}/healthz`)).status).toBe(200);
    const unready = await fetch(`${server.url}/readyz`);
    expect([unready.status, await jsonOf(unready)]).toEqual([503, { status: "not ready", reason }]);
    reason = undefined;
    await expect.poll(async () => (await fetch(`${server.url}/readyz`)).status, PATIENTLY).toBe(200);
    const metrics = await fetch(`${server.url}/metrics`);
    expect(metrics.headers.get("content-type")).toContain("text/plain");
    expect(await metrics.text()).toContain("process_cpu_seconds_total");
    expect((await fetch(`${server.url}/metrics`, { method: "POST" })).status).toBe(405);
    expect((await fetch(`${server.url}/healthz`, { method: "HEAD" })).status).toBe(200);
  });

  test("a check that fails is no readiness", async () => {
    const { server } = await serveHere({ ready: () => Promise.reject(new Error(SECRET)) });
    const answer = await fetch(`${server.url}/readyz`);
    expect([answer.status, await jsonOf(answer)]).toEqual([503, { status: "not ready", reason: "the check failed" }]);
  });

  test("metrics may want a token", async () => {
    const { server } = await serveHere({ metricsToken: "let-me-in" });
    const status = async (authorization?: string) =>
      (await fetch(`${server.url}/metrics`, { headers: authorization ? { authorization } : {} })).status;
    expect(await status()).toBe(401);
    expect(await status("Bearer let-me-out")).toBe(401);
    expect(await status("let-me-in")).toBe(401);
    expect(await status("bearer let-me-in")).toBe(200);
  });

  test("other paths go to their handlers, whose errors are none of the caller's business", async () => {
    const wire = await serveHere({
      http: new Map<string, HttpHandler>([
        ["/auth/cli", (_request, response) => void response.end("login")],
        ["/scim/v2/", (request, response) => void response.end(request.url)],
        ["/crash", () => Promise.reject(new Error(SECRET))],
      ]),
    });
    const { server } = wire;
    expect(await (await fetch(`${server.url}/auth/cli?x=1`)).text()).toBe("login");
    expect(await (await fetch(`${server.url}/scim/v2/Users/1`)).text()).toBe("/scim/v2/Users/1");
    const crash = await fetch(`${server.url}/crash`);
    expect([crash.status, await jsonOf(crash)]).toEqual([500, { code: "internal", message: "internal error" }]);
    expect(wire.lines.at(-1)).toMatchObject({ level: 50, path: "/crash", error: { message: SECRET } });
  });
});

describe("gRPC health", () => {
  test("tells the state of the server and of each service, in calls and in a stream", async () => {
    let ok = true;
    const wire = await serveHere({ ready: async () => ({ ok }) });
    const health = createClient(Health, createGrpcTransport({ baseUrl: wire.server.url }));
    for (const service of ["", RunnerService.typeName, Health.typeName]) {
      expect((await health.check({ service })).status).toBe(Serving.SERVING);
    }
    expect((await rejection(health.check({ service: "nobody" }))).code).toBe(Code.NotFound);
    expect((await health.list({})).statuses[RunnerService.typeName]?.status).toBe(Serving.SERVING);
    const unknown = health.watch({ service: "nobody" })[Symbol.asyncIterator]();
    expect((await unknown.next()).value).toMatchObject({ status: Serving.SERVICE_UNKNOWN });
    const watched = health.watch({})[Symbol.asyncIterator]();
    expect((await watched.next()).value).toMatchObject({ status: Serving.SERVING });
    ok = false;
    expect((await watched.next()).value).toMatchObject({ status: Serving.NOT_SERVING });
    const ended = [rejection(watched.next()), rejection(unknown.next())];
    await wire.server.drain(1000);
    for (const { code } of await Promise.all(ended)) expect(code).toBe(Code.Unavailable);
  });
});

describe.each([
  { version: "v1", service: ServerReflection },
  { version: "v1alpha", service: ServerReflectionAlpha as unknown as typeof ServerReflection },
])("gRPC reflection $version", ({ service }) => {
  let server: Server;
  beforeAll(async () => {
    ({ server } = await serve());
  });
  afterAll(() => server.close());

  async function ask(...questions: MessageInitShape<(typeof service)["method"]["serverReflectionInfo"]["input"]>[]) {
    const client = createClient(service, createGrpcTransport({ baseUrl: server.url }));
    const requests = (async function* () {
      yield* questions;
    })();
    return (await collect(client.serverReflectionInfo(requests))).map(({ messageResponse }) => messageResponse);
  }
  const files = (answer: Awaited<ReturnType<typeof ask>>[number] | undefined) =>
    answer?.case === "fileDescriptorResponse"
      ? answer.value.fileDescriptorProto.map((bytes) => fromBinary(FileDescriptorProtoSchema, bytes).name)
      : answer;

  test("lists services", async () => {
    const [answer] = await ask({ messageRequest: { case: "listServices", value: "" } });
    const names = answer?.case === "listServicesResponse" ? answer.value.service.map(({ name }) => name) : [];
    expect(names).toEqual(expect.arrayContaining([RunnerService.typeName, EventService.typeName, Health.typeName]));
    expect(names).not.toContain(EnvironmentService.typeName);
  });

  test.each([
    "gitpod.v1.RunnerService",
    "gitpod.v1.RunnerService.GetRunner",
    "gitpod.v1.ListRunnersRequest.Filter",
    "gitpod.v1.Runner.runner_id",
    "gitpod.v1.RunnerStatus",
  ])("gives the file of %s with its imports", async (value) => {
    const [answer] = await ask({ messageRequest: { case: "fileContainingSymbol", value } });
    expect(files(answer)).toEqual(
      expect.arrayContaining(["gitpod/v1/runner.proto", "gitpod/v1/pagination.proto", "buf/validate/validate.proto"]),
    );
  });

  test("sends no file twice, unless it is asked for", async () => {
    const value = "gitpod/v1/runner.proto";
    const answers = await ask(
      { messageRequest: { case: "fileByFilename", value } },
      { messageRequest: { case: "fileByFilename", value } },
      { messageRequest: { case: "fileContainingSymbol", value: "gitpod.v1.EventService" } },
    );
    expect(files(answers[1])).toEqual([value]);
    expect(files(answers[2])).toContain("gitpod/v1/event.proto");
    expect(files(answers[2])).not.toContain("buf/validate/validate.proto");
  });

  test("knows extensions, and says what it does not know", async () => {
    const [field, numbers, ...unknown] = await ask(
      {
        messageRequest: {
          case: "fileContainingExtension",
          value: { containingType: "google.protobuf.FieldOptions", extensionNumber: 1159 },
        },
      },
      { messageRequest: { case: "allExtensionNumbersOfType", value: "google.protobuf.FieldOptions" } },
      { messageRequest: { case: "fileContainingSymbol", value: "nobody.Knows" } },
      { messageRequest: { case: "fileByFilename", value: "nothing.proto" } },
      {},
    );
    expect(files(field)).toContain("buf/validate/validate.proto");
    expect(numbers).toMatchObject({ value: { extensionNumber: expect.arrayContaining([1159]) } });
    expect(unknown.map((each) => each?.case === "errorResponse" && each.value.errorCode)).toEqual([5, 5, 3]);
  });
});

describe("browsers", () => {
  const preflight = (server: Server, origin: string, path = GET_RUNNER) =>
    fetch(`${server.url}${path}`, {
      method: "OPTIONS",
      headers: {
        origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
      },
    });

  test("may call from everywhere by default", async () => {
    const { server } = await serveHere();
    const answer = await preflight(server, "https://app.example");
    expect(answer.status).toBe(204);
    expect(answer.headers.get("access-control-allow-origin")).toBe("*");
    expect(answer.headers.get("access-control-allow-methods")).toBe("POST, GET");
    expect(answer.headers.get("access-control-allow-headers")).toBe("authorization,content-type,x-stainless-os");
    expect(answer.headers.get("access-control-allow-credentials")).toBeNull();
    const call = await postJson(`${server.url}${GET_RUNNER}`, {}, { origin: "https://app.example" });
    expect(call.headers.get("access-control-allow-origin")).toBe("*");
    expect(call.headers.get("access-control-expose-headers")).toContain("Grpc-Status-Details-Bin");
    expect(call.headers.get("access-control-expose-headers")).toContain("X-Request-Id");
  });

  test("or only from origins that are listed", async () => {
    const { server } = await serveHere({ corsOrigins: ["https://app.example"] });
    const allowed = await preflight(server, "https://app.example");
    expect(allowed.headers.get("access-control-allow-origin")).toBe("https://app.example");
    expect(allowed.headers.get("vary")).toBe("Origin");
    const other = await preflight(server, "https://evil.example");
    expect(other.headers.get("access-control-allow-origin")).toBeNull();
  });

  test("get a client without anything of Node", () => {
    const imports = (file: string): string[] => {
      const text = readFileSync(join(import.meta.dirname, "../src", file), "utf8");
      return [...text.matchAll(/from "([^"]+)"/g)].flatMap(([, name = ""]) =>
        name.startsWith("./") ? imports(name) : [name],
      );
    };
    const outside = imports("client-web.ts").filter((name) => !name.startsWith("../gen/"));
    expect(new Set(outside)).toEqual(new Set(["@connectrpc/connect", "@connectrpc/connect-web", "@bufbuild/protobuf"]));
  });
});

describe("connections", () => {
  /** Writes bytes and collects what comes back until the other side closes. */
  function raw(port: number, bytes: string | Buffer, then: (socket: Socket) => void = () => undefined) {
    const socket = connectTcp({ port, host: "127.0.0.1" });
    let text = "";
    socket.on("data", (chunk) => {
      text += chunk.toString("latin1");
    });
    socket.on("error", () => undefined);
    socket.once("connect", () => {
      socket.write(bytes);
      then(socket);
    });
    return new Promise<string>((resolve) => void socket.once("close", () => resolve(text)));
  }

  test("that say nothing, too little or nonsense are closed; others are served all the time", async () => {
    const limits = { headersMs: 500, requestMs: 1000 };
    const { server } = await serveHere({ limits });
    const head = "POST /gitpod.v1.RunnerService/GetRunner HTTP/1.1\r\nhost: x\r\n";
    const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const closed = Promise.all([
      raw(server.port, ""),
      raw(server.port, "PRI * HT"),
      raw(server.port, "\0\x01\x02 nonsense\r\n\r\n"),
      raw(server.port, `${preface}nonsense that is no frame at all`),
      raw(server.port, "GET / HT"),
      raw(server.port, `${head}content-type: application/json\r\ncontent-length: 50\r\n\r\n{`),
      raw(server.port, "", (socket) => socket.end()),
      raw(server.port, "GE", (socket) => socket.resetAndDestroy()),
      raw(server.port, preface, (socket) => socket.end()),
      raw(
        server.port,
        `${head.replace("host: x", "host: %%")}content-type: text/plain\r\ncontent-length: 0\r\nconnection: close\r\n\r\n`,
      ),
    ]);
    const session = http2Session(server.url);
    const slow = session.request({ ":method": "POST", ":path": GET_RUNNER, "content-type": "application/json" });
    const slowStatus = new Promise((resolve) => void slow.on("response", (found) => resolve(found[":status"])));
    slow.on("error", () => undefined);
    slow.write("{");
    for (const protocol of ["json", "grpc"])
      expect(await codeOf(server, protocol, GET_RUNNER, new Uint8Array())).toBe("ok");
    const answers = await closed;
    expect(answers[2]).toContain("400 Bad Request");
    expect(answers[4]).toContain("408 Request Timeout");
    expect(answers[5]).toContain("408 Request Timeout");
    expect(answers[9]).toContain("400 Bad Request");
    expect(await slowStatus).toBe(504);
    expect(await codeOf(server, "grpc", GET_RUNNER, new Uint8Array())).toBe("ok");
  });

  test("may send the preface of HTTP/2 byte by byte, and requests one after another without waiting", async () => {
    const { server } = await serveHere();
    const session = connectHttp2(server.url, {
      createConnection: () => {
        const socket = connectTcp({ port: server.port, host: "127.0.0.1", noDelay: true });
        const write = socket.write.bind(socket);
        let first = true;
        socket.write = ((chunk: Buffer, ...rest: never[]) => {
          if (!first) return write(chunk, ...rest);
          first = false;
          for (const byte of chunk) write(Buffer.from([byte]));
          return true;
        }) as typeof socket.write;
        return socket;
      },
    });
    onTestFinished(() => session.destroy());
    const answer = await http2(session, GET_RUNNER, "application/json", Buffer.from("{}"));
    expect(answer.headers[":status"]).toBe(200);
    const request = "GET /healthz HTTP/1.1\r\nhost: x\r\n";
    const text = await raw(server.port, `${request}\r\n${request}\r\n${request}connection: close\r\n\r\n`);
    expect(text.match(/HTTP\/1.1 200/g)).toHaveLength(3);
  });

  test("are limited in number, and so are calls", async () => {
    const { server, echo: services } = await serveHere({ limits: { calls: 2, streams: 1 } });
    const client = createBerthClient({ baseUrl: server.url });
    const calls = [1, 2].map(() => client.runners.getRunner({ runnerId: "wait" }));
    const abort = new AbortController();
    const scope = { case: "environmentId" as const, value: "silent" };
    const stream = rejection(collect(client.events.watchEvents({ scope }, { signal: abort.signal })));
    await services.waiting(3);
    expect((await rejection(client.runners.listRunners({}))).code).toBe(Code.Unavailable);
    expect((await rejection(collect(client.events.watchEvents({})))).code).toBe(Code.Unavailable);
    services.release();
    await Promise.all(calls);
    const isServed = () => client.runners.listRunners({}).then(Boolean, () => false);
    await expect.poll(isServed, PATIENTLY).toBe(true);
    abort.abort();
    await stream;

    const few = await serveHere({ limits: { connections: 1 } });
    const first = connectTcp(few.server.port, "127.0.0.1");
    onTestFinished(() => void first.destroy());
    first.write("GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n");
    await new Promise((resolve) => void first.once("data", resolve));
    expect(await raw(few.server.port, "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")).toBe("");
  });

  test("tell the address of the caller, behind trusted proxies only", async () => {
    const peer = async (server: Server, forwarded: string) => {
      const headers = { "x-forwarded-for": forwarded };
      return (await jsonOf(await postJson(`${server.url}${GET_RUNNER}`, { runnerId: "peer" }, headers))).runner.name;
    };
    const { server } = await serveHere();
    expect(await peer(server, "203.0.113.9")).toBe("127.0.0.1");
    const grpc = createBerthClient({ baseUrl: server.url, transport: "grpc" });
    expect((await grpc.runners.getRunner({ runnerId: "peer" })).runner?.name).toBe("127.0.0.1");
    const proxied = await serveHere({ trustedProxies: ["127.0.0.0/8", "10.0.0.7", "2001:db8::/32"] });
    expect(await peer(proxied.server, "198.51.100.1, 203.0.113.9, 10.0.0.7")).toBe("203.0.113.9");
    expect(await peer(proxied.server, "spoofed, 2001:db8::1")).toBe("2001:db8::1");
    expect(await peer(proxied.server, "fe80::1%eth0, ::ffff:10.0.0.7")).toBe("fe80::1");
    expect(await peer(proxied.server, "")).toBe("127.0.0.1");
    await expect(serve({ trustedProxies: ["proxy.local"] })).rejects.toThrow("proxy.local");
  });

  test("a port that is taken is an error", async () => {
    const { server } = await serveHere();
    await expect(serve({ port: server.port })).rejects.toThrow("EADDRINUSE");
  });

  test("small answers over HTTP/2 do not wait for an acknowledgement", async () => {
    const { server } = await serveHere();
    const session = http2Session(server.url);
    const body = binary(GetRunnerRequestSchema, { runnerId: "a" });
    const median = async (call: () => Promise<unknown>) => {
      const times: number[] = [];
      for (let round = 0; round < 60; round += 1) {
        const start = performance.now();
        await call();
        times.push(performance.now() - start);
      }
      return times.sort((a, b) => a - b)[30]!;
    };
    const http1 = await median(async () =>
      (await post(`${server.url}${GET_RUNNER}`, "application/proto", body)).text(),
    );
    const grpc = await median(() => http2(session, GET_RUNNER, "application/grpc", envelope(body)));
    // With the delay it is 40 ms against less than one.
    expect(grpc).toBeLessThan(5 * http1);
  });
});

test("request messages are checked after the URL was read", async () => {
  const log = pino({ level: "silent" });
  const interceptors = [observe({ log, callerOf: () => undefined }), validation()];
  const { server } = await serveHere({ interceptors });
  const answer = await postJson(`${server.url}${LIST_RUNNERS}?pageSize=101`, { pagination: { pageSize: 1 } });
  expect([answer.status, (await jsonOf(answer)).message]).toEqual([
    400,
    expect.stringContaining("pagination.page_size"),
  ]);
  expect((await postJson(`${server.url}${LIST_RUNNERS}?pageSize=100`, { pagination: { pageSize: 500 } })).status).toBe(
    200,
  );
  const created = fromJson(CreateRunnerRequestSchema, { name: "x" });
  expect((await rejection(createBerthClient({ baseUrl: server.url }).runners.createRunner(created))).code).toBe(
    Code.InvalidArgument,
  );
});
