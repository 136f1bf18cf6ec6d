import { createServer, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { monotonicMs } from "./clock.ts";
import { open } from "./plain-http.ts";
import { serve } from "./serve.ts";

export interface RawStreamsApi {
  started(): { url: string };
  /** Writes a frame to every socket, so many frames a second; when each was begun (monotonic ms). */
  emit(frames: readonly Uint8Array[], perSecond: number): Promise<number[]>;
}

const HEAD = "HTTP/1.1 200 OK\r\ncontent-type: application/connect+proto\r\ntransfer-encoding: chunked\r\n\r\n";

// What fan-out comes down to when there is nothing to decide: bytes that are ready are written to every socket.
serve<object, RawStreamsApi>(async () => {
  const sockets = new Set<Socket>();
  const server = createServer({ noDelay: true }, (socket) => {
    socket.once("data", () => socket.write(HEAD));
    socket.on("error", () => undefined);
    socket.once("close", () => sockets.delete(socket));
    sockets.add(socket);
  });
  const url = await open(server);
  const emit: RawStreamsApi["emit"] = async (frames, perSecond) => {
    const from = performance.now();
    const times: number[] = [];
    for (const [index, frame] of frames.entries()) {
      await delay(Math.max(0, from + (index * 1000) / perSecond - performance.now()));
      times.push(monotonicMs());
      for (const socket of sockets) socket.write(frame);
    }
    return times;
  };
  return { api: { started: () => ({ url }), emit } };
});
