import { chmodSync, linkSync, lstatSync, renameSync, rmSync } from "node:fs";
import { connect, type Server } from "node:net";
import { errnoOf } from "./errors.ts";

/** Another supervisor serves this socket. */
export class SocketInUseError extends Error {}

const PROBE_MS = 2000;

/** False only if nobody listens; silence or a full queue means that somebody does. */
function isServed(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect({ path, timeout: PROBE_MS });
    const settle = (served: boolean) => {
      probe.destroy();
      resolve(served);
    };
    probe.once("connect", () => settle(true));
    probe.once("timeout", () => settle(true));
    probe.once("error", (error) => settle(!["ECONNREFUSED", "ENOENT"].includes(errnoOf(error) ?? "")));
  });
}

function bind(server: Server, path: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    // The mode is right from the start: binding happens inside this call.
    const umask = process.umask(0o177);
    server.listen({ path }, () => {
      server.off("error", reject);
      resolve();
    });
    process.umask(umask);
  });
}

/**
 * Listens on a Unix socket of mode 0600. A socket left by a dead supervisor is replaced; one that is served is not:
 * SocketInUseError. Binding is what decides between two that start at once.
 */
export async function listenExclusively(server: Server, path: string): Promise<void> {
  for (let attempt = 0; attempt < 3; attempt++) {
    try {
      await bind(server, path);
      chmodSync(path, 0o600);
      return;
    } catch (error) {
      if (errnoOf(error) !== "EADDRINUSE") throw error;
    }
    const found = lstatSync(path, { throwIfNoEntry: false });
    if (found && !found.isSocket()) throw new SocketInUseError(`${path} is not a socket`);
    if (await isServed(path)) break;
    if (found) removeStale(path, found.ino);
  }
  throw new SocketInUseError(`${path} is served by another process`);
}

/** Removes the socket that was probed; one that took its place meanwhile is put back. */
function removeStale(path: string, inode: number): void {
  const aside = `${path}.${process.pid}`;
  try {
    renameSync(path, aside);
  } catch {
    return;
  }
  if (lstatSync(aside).ino !== inode) linkSync(aside, path);
  rmSync(aside, { force: true });
}
