import { readdir, readFile, readlink } from "node:fs/promises";
import { type EnvironmentSelector, environmentProcesses } from "../supervisor/processes.ts";

// Environments share the host's network: a port leads to a service only if that environment's own processes listen.

/** A socket that takes connections. */
interface ListeningSocket {
  /** Loopback address under which it is reached. */
  address: "127.0.0.1" | "::1";
  uid: number;
  inode: string;
}

const LISTENING = "0A";
// As the kernel writes them: groups of four bytes in the byte order of the machine.
const REACHED_BY: readonly [file: string, address: ListeningSocket["address"], local: readonly string[]][] = [
  ["/proc/net/tcp", "127.0.0.1", ["0100007F", "00000000"]],
  ["/proc/net/tcp6", "::1", ["00000000000000000000000001000000", "00000000000000000000000000000000"]],
];

/** Sockets that take connections to a port on loopback. */
async function listeners(port: number): Promise<ListeningSocket[]> {
  const suffix = `:${port.toString(16).toUpperCase().padStart(4, "0")}`;
  const found: ListeningSocket[] = [];
  for (const [file, address, locals] of REACHED_BY) {
    const text = await readFile(file, "latin1").catch(() => "");
    for (const line of text.split("\n")) {
      const [, local = "", , state, , , , uid, , inode = ""] = line.trim().split(/\s+/);
      const isHere = local.endsWith(suffix) && locals.includes(local.slice(0, -suffix.length));
      if (isHere && state === LISTENING) found.push({ address, uid: Number(uid), inode });
    }
  }
  return found;
}

async function holdsSocket(pid: number, inode: string): Promise<boolean> {
  const folder = `/proc/${pid}/fd`;
  for (const name of await readdir(folder).catch(() => [])) {
    if ((await readlink(`${folder}/${name}`).catch(() => "")) === `socket:[${inode}]`) return true;
  }
  return false;
}

/** How long a socket that was seen in the hands of an environment is taken to be there, in milliseconds. */
const KNOWN_MS = 10_000;
const MAX_KNOWN = 1_000;

/**
 * Tells the loopback address at which processes of an environment listen on a port; undefined if none of them does,
 * whoever else may. With a user of its own its sockets are told by that, else by the processes that hold them.
 */
export function portOwnership(): (
  selector: EnvironmentSelector,
  port: number,
) => Promise<ListeningSocket["address"] | undefined> {
  const known = new Map<string, number>();
  async function isHeld(selector: EnvironmentSelector, inode: string): Promise<boolean> {
    const key = `${selector.environmentId} ${inode}`;
    if ((known.get(key) ?? 0) > Date.now()) return true;
    known.delete(key);
    for (const { pid } of await environmentProcesses(selector)) {
      if (!(await holdsSocket(pid, inode))) continue;
      if (known.size >= MAX_KNOWN) known.clear();
      known.set(key, Date.now() + KNOWN_MS);
      return true;
    }
    return false;
  }
  return async (selector, port) => {
    for (const { address, uid, inode } of await listeners(port)) {
      const isOwn = selector.uid === undefined ? await isHeld(selector, inode) : uid === selector.uid;
      if (isOwn) return address;
    }
    return undefined;
  };
}
