import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { monotonicMs } from "./clock.ts";
import { serve } from "./serve.ts";

export interface Streams {
  port: number;
  /** Whole HTTP/1.1 requests, one for each stream. */
  requests: readonly string[];
}

export interface SinkApi {
  /** Opens streams and resolves with their group once all have been answered. */
  open(streams: Streams): Promise<number>;
  /**
   * Waits until every stream of the group has had an event about each of these resources, and tells when it came
   * (monotonic ms), by resource; fewer times than streams if some did not come before the deadline.
   */
  collect(group: number, resourceIds: readonly string[], deadlineMs: number): Promise<Float64Array[]>;
}

// Field 3 with 36 bytes: the resource id of a WatchEventsResponse.
const MARK = Buffer.of(0x1a, 36);
const ID_LENGTH = 36;
const EVENT_TAIL = MARK.length + ID_LENGTH;
const OPENING = 50;
const POLL_MS = 5;

class Group {
  readonly sockets: Socket[] = [];
  readonly #times = new Map<string, number[]>();

  /** Notes the events in what a socket has received; returns what may be the beginning of one more. */
  note(data: Buffer): Buffer {
    const at = monotonicMs();
    let end = 0;
    for (;;) {
      const mark = data.indexOf(MARK, end);
      if (mark < 0 || mark + EVENT_TAIL > data.length) break;
      end = mark + EVENT_TAIL;
      const id = data.toString("latin1", mark + MARK.length, end);
      const times = this.#times.get(id) ?? [];
      times.push(at);
      this.#times.set(id, times);
    }
    return data.subarray(Math.max(end, data.length - EVENT_TAIL));
  }

  async take(resourceIds: readonly string[], deadlineMs: number): Promise<Float64Array[]> {
    const deadline = monotonicMs() + deadlineMs;
    const isComplete = () => resourceIds.every((id) => (this.#times.get(id)?.length ?? 0) >= this.sockets.length);
    while (!isComplete() && monotonicMs() < deadline) await delay(POLL_MS);
    const taken = resourceIds.map((id) => Float64Array.from(this.#times.get(id) ?? []));
    this.#times.clear();
    return taken;
  }
}

async function openStream(group: Group, port: number, request: string): Promise<void> {
  const socket = connect(port, "127.0.0.1");
  socket.setNoDelay(true);
  group.sockets.push(socket);
  socket.write(request);
  const [head] = (await once(socket, "data")) as [Buffer];
  if (!head.toString("latin1", 0, 15).startsWith("HTTP/1.1 200")) throw new Error(`a stream was refused: ${head}`);
  let rest: Buffer = Buffer.alloc(0);
  socket.on("data", (data: Buffer) => {
    rest = group.note(rest.length ? Buffer.concat([rest, data]) : data);
  });
}

// The other end of many streams. It looks for the bytes of events and does nothing else with what it receives.
serve<object, SinkApi>(async () => {
  const groups: Group[] = [];
  return {
    api: {
      async open({ port, requests }) {
        const group = new Group();
        const waiting = [...requests];
        const open = async () => {
          for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) await openStream(group, port, next);
        };
        await Promise.all(Array.from({ length: OPENING }, open));
        return groups.push(group) - 1;
      },
      collect: async (group, resourceIds, deadlineMs) => groups[group]?.take(resourceIds, deadlineMs) ?? [],
    },
    async stop() {
      for (const { sockets } of groups) for (const socket of sockets) socket.destroy();
    },
  };
});
