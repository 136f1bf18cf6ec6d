import { type Bench, loaded, type Rate, rateRow } from "../bench.ts";
import { startChild } from "../child.ts";
import type { PortApi, PortSettings } from "../children/one-port.ts";
import type { Load } from "../load.ts";
import { interleavedWarm } from "../measure.ts";
import type { Goal, Row } from "../report.ts";

const CLIENTS = 16;
const REQUEST_BYTES = 40;
const ANSWER_BYTES = 1800;
const GOAL: Goal = { bound: ">=", value: 0.95 };

/** What it costs to tell HTTP/1.1 from HTTP/2 on one port, with the same handler behind it. */
export async function port(bench: Bench): Promise<Row[]> {
  const start = async (ports: PortSettings["ports"]) => {
    const child = await startChild<PortApi>("one-port.ts", { ports, bytes: ANSWER_BYTES });
    bench.after(() => child.stop());
    const urls = await child.call("started");
    return (protocol: Load["protocol"]) => () =>
      loaded(bench.generator, child, {
        ...{ url: urls[protocol], protocol, headers: {}, body: Buffer.alloc(REQUEST_BYTES, 120), ms: bench.ms },
        ...(protocol === "h1" ? { connections: CLIENTS, streams: 1 } : { connections: 1, streams: CLIENTS }),
      });
  };
  const [one, separate] = [await start("one"), await start("separate")];
  const rounds = await interleavedWarm<string, Rate>(bench.rounds, {
    separateH1: separate("h1"),
    oneH1: one("h1"),
    separateH2: separate("h2c"),
    oneH2: one("h2c"),
  });
  const of = (name: string) => rounds[name] ?? [];
  return [
    rateRow("one port against two: HTTP/1.1, 16 at once", of("oneH1"), of("separateH1"), GOAL),
    rateRow("one port against two: h2c, 16 at once", of("oneH2"), of("separateH2"), GOAL),
  ];
}
