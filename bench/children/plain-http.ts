import type { AddressInfo, Server } from "node:net";

/** Reads a request to its end. */
export function collect(stream: NodeJS.ReadableStream, done: (body: Uint8Array) => void): void {
  const chunks: Buffer[] = [];
  stream.on("data", (chunk: Buffer) => chunks.push(chunk));
  stream.on("end", () => done(chunks.length === 1 && chunks[0] ? chunks[0] : Buffer.concat(chunks)));
}

/** Opens a free port on loopback; resolves with its URL. */
export async function open(server: Server): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<void>();
  server.listen(0, "127.0.0.1", resolve);
  await promise;
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
}
