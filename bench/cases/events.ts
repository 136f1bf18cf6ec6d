import { setTimeout as delay } from "node:timers/promises";
import { create, toBinary } from "@bufbuild/protobuf";
import { encodeEnvelope } from "@connectrpc/connect/protocol";
import {
  EventService,
  ResourceOperation,
  ResourceType,
  WatchEventsRequestSchema,
  WatchEventsResponseSchema,
} from "../../gen/gitpod/v1/event_pb.js";
import type { Bench } from "../bench.ts";
import { startChild } from "../child.ts";
import type { RawStreamsApi } from "../children/raw-streams.ts";
import type { SinkApi } from "../children/sink.ts";
import { interleavedWarm, medianOf, percentile, ratioOf } from "../measure.ts";
import type { Row } from "../report.ts";
import type { Person, Stage } from "../stage.ts";

const STREAMS = 1000;
const QUICK_STREAMS = 200;
const STREAMS_EACH = 50;
const PER_SECOND = 20;
const EVENTS = 40;
const QUICK_EVENTS = 10;
const DEADLINE_MS = 10_000;
const CALL_PAUSE_MS = 10;

interface Delivery {
  p50Ms: number;
  p99Ms: number;
  /** CPU time of the server per delivered event, in microseconds. */
  cpuUs: number;
  /** Share of the events that did not arrive before the deadline. */
  missing: number;
  /** A single call of the control plane meanwhile. */
  unaryP99Ms: number;
}

/** A request to watch the organization, as bytes: Connect, binary, HTTP/1.1. */
function watchRequest(path: string, { token }: Person): string {
  const message = create(WatchEventsRequestSchema, { scope: { case: "organization", value: true } });
  const body = Buffer.from(encodeEnvelope(0, toBinary(WatchEventsRequestSchema, message)));
  const head = [
    `POST ${path} HTTP/1.1`,
    "host: 127.0.0.1",
    "content-type: application/connect+proto",
    "connect-protocol-version: 1",
    `authorization: Bearer ${token}`,
    `content-length: ${body.length}`,
  ];
  return `${head.join("\r\n")}\r\n\r\n${body.toString("latin1")}`;
}

/** An event as it is on the wire, in a chunk of its own. */
function frame(resourceId: string): Uint8Array {
  const operation = ResourceOperation.UPDATE_STATUS;
  const message = create(WatchEventsResponseSchema, { operation, resourceType: ResourceType.ENVIRONMENT, resourceId });
  const bytes = encodeEnvelope(0, toBinary(WatchEventsResponseSchema, message));
  return Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from("\r\n")]);
}

function delivery(
  sent: readonly number[],
  received: readonly Float64Array[],
  streams: number,
): Pick<Delivery, "p50Ms" | "p99Ms" | "missing"> & { count: number } {
  const waits = received.flatMap((times, index) => Array.from(times, (at) => at - (sent[index] ?? 0)));
  return {
    p50Ms: percentile(waits, 50),
    p99Ms: percentile(waits, 99),
    missing: 1 - waits.length / (sent.length * streams),
    count: waits.length,
  };
}

/** Calls the control plane, one call at a time, while `work` lasts; its result, and the 99th percentile of the calls. */
async function callingMeanwhile<T>({ admin }: Stage, work: Promise<T>): Promise<{ result: T; p99Ms: number }> {
  const times: number[] = [];
  let isOver = false;
  const over = work.finally(() => {
    isOver = true;
  });
  while (!isOver) {
    const from = performance.now();
    await admin.identity.getAuthenticatedIdentity({});
    times.push(performance.now() - from);
    await delay(CALL_PAUSE_MS);
  }
  return { result: await over, p99Ms: percentile(times, 99) };
}

async function watchers(stage: Stage, streams: number): Promise<string[]> {
  const people = await stage.people(Math.ceil(streams / STREAMS_EACH));
  const path = `/${EventService.typeName}/${EventService.method.watchEvents.name}`;
  return Array.from({ length: streams }, (_each, index) => watchRequest(path, people[index % people.length]!));
}

/**
 * From the commit of a change, made at another replica, to everybody who watches: members of an organization with many
 * streams. Single calls are timed meanwhile, and as their floor while another process writes as much.
 */
export async function events(bench: Bench): Promise<Row[]> {
  const stage = await bench.stage();
  const streams = bench.quick ? QUICK_STREAMS : STREAMS;
  const count = bench.quick ? QUICK_EVENTS : EVENTS;
  const ids = await stage.copies(count, stage.admin.id);
  const frames = ids.map(frame);
  const requests = await watchers(stage, streams);
  const raw = await startChild<RawStreamsApi>("raw-streams.ts", {});
  bench.after(() => raw.stop());
  const replica = await stage.replica();
  bench.after(() => replica.stop());
  const sink = await startChild<SinkApi>("sink.ts", {});
  bench.after(() => sink.stop());
  const portOf = (url: string) => Number(new URL(url).port);
  const rawGroup = await sink.call("open", { port: portOf((await raw.call("started")).url), requests });
  const group = await sink.call("open", { port: portOf(stage.url), requests });

  const measure = async (
    which: number,
    server: { call(name: "cpuMicros"): Promise<number> },
    emit: () => Promise<number[]>,
  ): Promise<Delivery> => {
    const before = await server.call("cpuMicros");
    const { result: sent, p99Ms: unaryP99Ms } = await callingMeanwhile(stage, emit());
    const received = await sink.call("collect", which, ids, DEADLINE_MS);
    const cpuMicros = (await server.call("cpuMicros")) - before;
    const { count, ...times } = delivery(sent, received, streams);
    return { ...times, unaryP99Ms, cpuUs: cpuMicros / count };
  };
  const rounds = await interleavedWarm<"raw" | "product", Delivery>(bench.rounds, {
    raw: () => measure(rawGroup, raw, () => raw.call("emit", frames, PER_SECOND)),
    product: () => measure(group, stage.plane, () => replica.call("emit", ids, PER_SECOND, stage.organizationId)),
  });
  const missing = medianOf(rounds.product, (each) => each.missing);
  const note = missing > 0 ? `${(missing * 100).toFixed(0)} % did not come within ${DEADLINE_MS / 1000} s` : undefined;
  const name = `events to ${streams} streams, ${PER_SECOND}/s`;
  const compared = (value: (each: Delivery) => number) => ({
    floor: medianOf(rounds.raw, value),
    figure: medianOf(rounds.product, value),
    ratio: ratioOf(rounds.product, rounds.raw, value),
  });
  const p99 = compared((each) => each.p99Ms);
  return [
    {
      operation: `${name}: server CPU per delivery`,
      unit: "us",
      ...compared((each) => each.cpuUs),
      goal: { bound: "<=", value: 3 },
      note,
    },
    { operation: `${name}: commit to client, p50`, unit: "ms", ...compared((each) => each.p50Ms) },
    {
      operation: `${name}: commit to client, p99`,
      ...{ unit: "ms", figure: p99.figure, goal: { bound: "<=", value: 30 } },
      note: `writes alone ${p99.floor.toFixed(1)} ms, ratio ${p99.ratio.toFixed(1)}`,
    },
    {
      operation: `${name}: a call of the same process, p99`,
      ...{ unit: "ms", goal: { bound: "<=", value: 2 } },
      ...compared((each) => each.unaryP99Ms),
    },
  ];
}
