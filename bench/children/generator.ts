import { Agent, request } from "node:http";
import { type ClientHttp2Session, connect } from "node:http2";
import { setTimeout as delay } from "node:timers/promises";
import { type Load, type LoadResult, WARM_UP_MS } from "../load.ts";
import { percentile } from "../measure.ts";
import { serve } from "./serve.ts";

export interface GeneratorApi {
  run(load: Load): Promise<LoadResult>;
}

type Call = () => Promise<void>;

function overHttp1(load: Load, agent: Agent): Call {
  const headers = { ...load.headers, "content-length": String(load.body.length) };
  return () =>
    new Promise((resolve, reject) => {
      const call = request(load.url, { method: "POST", agent, headers }, (response) => {
        if (response.statusCode !== 200) reject(new Error(`the answer has status ${response.statusCode}`));
        response.resume();
        response.once("end", resolve);
        response.once("error", reject);
      });
      call.once("error", reject);
      call.end(load.body);
    });
}

function overHttp2(load: Load, session: ClientHttp2Session): Call {
  const headers = { ...load.headers, ":method": "POST", ":path": new URL(load.url).pathname };
  return () =>
    new Promise((resolve, reject) => {
      const stream = session.request(headers);
      stream.once("response", ({ ":status": status }) => {
        if (status !== 200) reject(new Error(`the answer has status ${status}`));
      });
      stream.once("end", resolve);
      stream.once("error", reject);
      stream.resume();
      stream.end(load.body);
    });
}

async function run(load: Load): Promise<LoadResult> {
  const agent = new Agent({ keepAlive: true, maxSockets: load.connections });
  const sessions =
    load.protocol === "h2c" ? Array.from({ length: load.connections }, () => connect(new URL(load.url).origin)) : [];
  const calls = sessions.length ? sessions.map((each) => overHttp2(load, each)) : [overHttp1(load, agent)];
  const timesMs: number[] = [];
  let running = true;
  const worker = async (call: Call) => {
    while (running) {
      const from = performance.now();
      await call();
      timesMs.push(performance.now() - from);
    }
  };
  const count = load.connections * load.streams;
  const workers = Promise.all(Array.from({ length: count }, (_each, index) => worker(calls[index % calls.length]!)));
  try {
    await Promise.race([delay(WARM_UP_MS), workers]);
    const [from, before] = [performance.now(), timesMs.length];
    await Promise.race([delay(load.ms), workers]);
    const measured = timesMs.slice(before);
    const perSecond = measured.length / ((performance.now() - from) / 1000);
    running = false;
    await workers;
    return { perSecond, served: timesMs.length, p50Ms: percentile(measured, 50) };
  } finally {
    running = false;
    agent.destroy();
    for (const session of sessions) session.close();
  }
}

serve<object, GeneratorApi>(async () => ({ api: { run } }));
