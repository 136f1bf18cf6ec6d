import { readFileSync } from "node:fs";
import { type IncomingMessage, request } from "node:http";
import { Code, createClient, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { pino } from "pino";
import { afterAll, beforeAll, expect, test } from "vitest";
import { EnvironmentOpsService, WatchEventType } from "../gen/supervisor/v1/environmentopts_pb.js";
import type { Listener } from "../src/http/listener.ts";
import type { Access } from "../src/runner/access.ts";
import type { Environments } from "../src/runner/environments.ts";
import { startRunnerServer } from "../src/runner/server.ts";
import { failure, type TestEnvironment, testEnvironment, waitFor } from "./supervisor-harness.ts";

const MIB = 1024 * 1024;
const SHELL = { shell: "/bin/sh", env: { PS1: "" } };
let environment: TestEnvironment;
let server: Listener;
let supervisor: number;
let baseUrl: string;
/** Tokens that are good for nothing any more. */
const withdrawn = new Set<string>();

beforeAll(async () => {
  environment = await testEnvironment();
  supervisor = (await environment.launch()).pid;
  const { client, config } = environment;
  const environments = { get: () => ({ operations: client, touched() {} }) } as unknown as Environments;
  const access = {
    judge: async (token: string) => (withdrawn.has(token) ? "none" : { grant: {} }),
    isWithdrawn: async (token: string) => withdrawn.has(token),
  } as unknown as Access;
  server = await startRunnerServer({
    ...{
      host: "127.0.0.1",
      port: 0,
      dataDir: "",
      environments,
      access,
      connected: () => true,
      log: pino({ level: "silent" }),
    },
    ...{ publicUrl: () => "http://127.0.0.1", portDomain: undefined, signInUrl: "http://127.0.0.1", recheckMs: 20 },
    isSharingOff: () => false,
  });
  baseUrl = `http://127.0.0.1:${server.port}/environments/${config.environmentId}/ops`;
});
afterAll(async () => {
  await server.close(0);
  await environment[Symbol.asyncDispose]();
});

const as =
  (token: string): Interceptor =>
  (next) =>
  (call) => {
    call.header.set("authorization", `Bearer ${token}`);
    return next(call);
  };

const caller = (token = "good") =>
  createClient(
    EnvironmentOpsService,
    createConnectTransport({ baseUrl, httpVersion: "1.1", interceptors: [as(token)] }),
  );

/** A terminal that runs a command and shows nothing else. */
async function running(command: string): Promise<string> {
  const { terminalId } = await caller().createTerminal(SHELL);
  await caller().writeTerminal({ terminalId, data: Buffer.from(`stty -echo -opost; ${command}\n`) });
  return terminalId;
}

/** A caller of ReadTerminal that reads only as much as it is told to. */
async function rawReader(terminalId: string): Promise<IncomingMessage> {
  const body = Buffer.from(JSON.stringify({ terminalId }));
  const envelope = Buffer.concat([Buffer.from([0, 0, 0, 0, body.length]), body]);
  const headers = { authorization: "Bearer good", "content-type": "application/connect+json" };
  const url = `${baseUrl}/supervisor.v1.EnvironmentOpsService/ReadTerminal`;
  return await new Promise((resolve, reject) => {
    const sending = request(url, { method: "POST", headers }, (response) => resolve(response.pause()));
    sending.once("error", reject);
    sending.end(envelope);
  });
}

test("streams come through every protocol, with their headers at once", async () => {
  const interceptors = [as("good")];
  for (const transport of [
    createConnectTransport({ baseUrl, httpVersion: "1.1", interceptors, useBinaryFormat: false }),
    createConnectTransport({ baseUrl, httpVersion: "2", interceptors }),
    createGrpcTransport({ baseUrl, interceptors }),
    createGrpcWebTransport({ baseUrl, httpVersion: "1.1", interceptors }),
  ]) {
    const ops = createClient(EnvironmentOpsService, transport);
    const { terminalId } = await ops.createTerminal(SHELL);
    const opened = Promise.withResolvers<void>();
    const onHeader = () => opened.resolve();
    const silent = ops.readTerminal({ terminalId, skipHistory: true }, { onHeader })[Symbol.asyncIterator]();
    const first = silent.next();
    await opened.promise;
    const shown: (string | undefined)[] = [];
    const attached = (async () => {
      for await (const { content } of ops.attachTerminal({ terminalId })) {
        shown.push(content.case === "exited" ? `exited ${content.value.exitCode}` : content.case);
      }
    })();
    await waitFor(() => shown.length > 0);
    await ops.writeTerminal({ terminalId, data: Buffer.from("exit 4\n") });
    await attached;
    expect([shown[0], shown.at(-1)]).toEqual(["replay", "exited 4"]);
    expect((await first).value?.data.length).toBeGreaterThan(0);
    await failure(ops.attachTerminal({ terminalId: "nowhere" })[Symbol.asyncIterator]().next(), Code.NotFound);
  }
});

test("changes of files come through as well; an operation that is not there is UNIMPLEMENTED", async () => {
  const opened = Promise.withResolvers<void>();
  const leaving = new AbortController();
  const options = { signal: leaving.signal, onHeader: () => opened.resolve() };
  const watching = caller()
    .watch({ eventTypes: [WatchEventType.FILE_CHANGE] }, options)
    [Symbol.asyncIterator]();
  const first = watching.next();
  await opened.promise;
  await caller().writeFile({ path: "through", content: Buffer.from("x") });
  const { done, value } = await first;
  const events = !done && value.event.case === "fileChanges" ? value.event.value.events : [];
  expect(events.map(({ path }) => path)).toEqual(["through"]);
  leaving.abort();
  const response = await fetch(`${baseUrl}/supervisor.v1.EnvironmentOpsService/StartBrowser`, {
    method: "POST",
    headers: { authorization: "Bearer good", "content-type": "application/json" },
    body: "{}",
  });
  expect(await response.json()).toEqual({
    code: "unimplemented",
    message: "supervisor.v1.EnvironmentOpsService/StartBrowser is not implemented",
  });
});

test("a caller that leaves ends its stream in the environment as well", async () => {
  const terminalId = await running("true");
  // A terminal has room for 50 readers.
  for (let round = 0; round < 60; round++) {
    const leaving = new AbortController();
    const stream = caller().attachTerminal({ terminalId }, { signal: leaving.signal })[Symbol.asyncIterator]();
    expect((await stream.next()).value?.content.case).toBe("replay");
    leaving.abort();
    await failure(stream.next(), Code.Canceled);
  }
  const stream = caller().attachTerminal({ terminalId })[Symbol.asyncIterator]();
  expect((await stream.next()).value?.content.case).toBe("replay");
  await caller().closeTerminal({ terminalId });
});

test("the stream of a token that has been withdrawn ends, whether it is silent or has much to say", async () => {
  const silent = await running("true");
  const talking = await running("yes");
  const read = async (terminalId: string, token: string) => {
    for await (const { content } of caller(token).attachTerminal({ terminalId })) if (content.case === "exited") return;
  };
  const kept = read(silent, "kept");
  const ended = [read(silent, "dead"), read(talking, "dead")].map((stream) => failure(stream, Code.Unauthenticated));
  const before = caller("dead").attachTerminal({ terminalId: talking })[Symbol.asyncIterator]();
  await before.next();
  withdrawn.add("dead");
  await Promise.all(ended);
  await caller().closeTerminal({ terminalId: silent });
  await caller().closeTerminal({ terminalId: talking });
  await kept;
});

test("a caller that does not read costs bounded memory, delays others for a moment, and is told", {
  timeout: 60_000,
}, async () => {
  const bytes = 60 * MIB;
  const terminalId = await running(`read go; head -c ${bytes} /dev/zero | tr '\\0' x; read go; exit`);
  const stuck = await rawReader(terminalId);
  const leaving = new AbortController();
  let received = 0;
  const reading = (async () => {
    for await (const { data } of caller().readTerminal({ terminalId, skipHistory: true }, { signal: leaving.signal })) {
      received += data.length;
    }
  })();
  const rss = () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${supervisor}/status`, "utf8"))?.[1]) / 1024;
  const before = [rss(), process.memoryUsage.rss() / MIB];
  await caller().writeTerminal({ terminalId, data: Buffer.from("go\n") });
  await waitFor(() => received >= bytes);
  const grown = [rss(), process.memoryUsage.rss() / MIB].map((now, index) => now - before[index]!);
  expect(Math.max(...grown)).toBeLessThan(150);
  let text = "";
  for await (const chunk of stuck) text = (text + chunk).slice(-1000);
  expect(text).toMatch(/resource_exhausted.*attach again/);
  await caller().writeTerminal({ terminalId, data: Buffer.from("go\n") });
  await reading;
});

test("when the runner stops, its streams end with UNAVAILABLE", async () => {
  const terminalId = await running("yes");
  const silent = caller().watch({})[Symbol.asyncIterator]();
  const talking = caller().readTerminal({ terminalId })[Symbol.asyncIterator]();
  await talking.next();
  const ended = [
    failure(silent.next(), Code.Unavailable),
    failure(
      (async () => {
        while (!(await talking.next()).done);
      })(),
      Code.Unavailable,
    ),
  ];
  // The supervisor takes a moment to answer the one that has nothing to say yet.
  await caller().listTerminals({});
  await server.close(5000);
  await Promise.all(ended);
});
