import { constants } from "node:fs";
import { open } from "node:fs/promises";
import { setTimeout as delay } from "node:timers/promises";
import { errnoOf } from "../files.ts";

const POLL_MS = 250;
const CHUNK_BYTES = 64 * 1024;

/**
 * Next bytes of a file in a folder of the environment's user, who may have put anything there: only a regular file of
 * that user is read, never through a link. Empty if there is none.
 */
async function readFrom(path: string, uid: number, position: number): Promise<Buffer> {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const file = await open(path, flags).catch((error: unknown) => {
    if (["ENOENT", "ELOOP", "ENXIO", "EACCES", "ENOTDIR"].includes(errnoOf(error) ?? "")) return undefined;
    throw error;
  });
  if (!file) return Buffer.alloc(0);
  try {
    const found = await file.stat();
    if (!found.isFile() || found.uid !== uid) return Buffer.alloc(0);
    const { bytesRead, buffer } = await file.read(Buffer.alloc(CHUNK_BYTES), 0, CHUNK_BYTES, position);
    return buffer.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

/** Hands out what a command writes to a file until it has ended, then what is left; rejects if the file fails. */
export async function followOutput(
  path: string,
  uid: number,
  ended: AbortSignal,
  push: (chunk: Buffer) => void,
): Promise<void> {
  for (let position = 0; ; ) {
    // Asked before the read: what was written until the end has to be seen too.
    const isLast = ended.aborted;
    const chunk = await readFrom(path, uid, position);
    position += chunk.length;
    if (chunk.length > 0) push(chunk);
    else if (isLast) return;
    else await delay(POLL_MS, undefined, { signal: ended }).catch(() => undefined);
  }
}
