import { closeSync, fstatSync, openSync, readlinkSync, statSync } from "node:fs";
import { isAlive, type ProcessRef } from "./processes.ts";
import { findProgram } from "./programs.ts";
import type { Shell } from "./started-command.ts";

// The view of the host that a supervisor runs in. Whatever else runs for its environment joins it, so that there is one.

/** User a command runs as, and the namespaces it joins; the present ones where left out. */
export interface RunAs {
  uid?: number;
  gid?: number;
  inside?: Namespaces | undefined;
  /** One of that user's, in those namespaces, that runs the command if it is free. */
  shell?: Shell | undefined;
}

/** How a command is started. */
export interface Invocation {
  file: string;
  args: readonly string[];
  cwd?: string;
  uid?: number;
  gid?: number;
  /** Descriptors that it needs, from the fourth on. */
  descriptors: readonly number[];
}

const OUR_FIRST = 3;
// Entering leads to the root folder. The descriptors are of no use to the command, and the program takes this one's place.
const SCRIPT = 'exec 3<&- 4<&-; cd -- "$0" || exit 127; exec "$@"';

let found: string | undefined;
const enterer = (): string => {
  found ??= findProgram("nsenter");
  return found ?? "nsenter";
};

const linkOf = (pid: number | "self", name: string): string | undefined => {
  try {
    return readlinkSync(`/proc/${pid}/ns/${name}`);
  } catch {
    return undefined;
  }
};

/** Whether a process sees other files than this one does; false if that cannot be found out. */
export function hasOwnView(pid: number): boolean {
  const view = linkOf(pid, "mnt");
  return view !== undefined && view !== linkOf("self", "mnt");
}

/**
 * Whether root may join the view of a process. Inside a user namespace of its own, a user can arrange files so that what
 * root starts there is the user's program.
 */
const isOurs = (pid: number) => process.getuid?.() !== 0 || linkOf(pid, "user") === linkOf("self", "user");

/** Mount namespace of a process, and its user namespace where that is another one than this process's; kept open. */
export class Namespaces {
  readonly #mount: number;
  readonly #user: number | undefined;

  private constructor(mount: number, user: number | undefined) {
    this.#mount = mount;
    this.#user = user;
  }

  /** Those of a process, if it has a view of its own. Undefined as well if it has gone, or root must not join it. */
  static of(reference: ProcessRef): Namespaces | undefined {
    const { pid } = reference;
    if (!hasOwnView(pid)) return undefined;
    const opened: number[] = [];
    try {
      const mount = openSync(`/proc/${pid}/ns/mnt`, "r");
      opened.push(mount);
      let user: number | undefined;
      if (linkOf(pid, "user") !== linkOf("self", "user")) {
        user = openSync(`/proc/${pid}/ns/user`, "r");
        opened.push(user);
      }
      // Looked at after it was opened: nobody gets back into the first user namespace.
      const isSame = isAlive(reference) && fstatSync(mount).ino === statSync(`/proc/${pid}/ns/mnt`).ino;
      if (isSame && isOurs(pid)) return new Namespaces(mount, user);
    } catch {
      // Gone meanwhile.
    }
    for (const descriptor of opened) closeSync(descriptor);
    return undefined;
  }

  /** The user namespace, for another view in it; undefined if it is this process's own. */
  get user(): number | undefined {
    return this.#user;
  }

  /** A command in these namespaces; it keeps the pid that is started. */
  enter(file: string, args: readonly string[], { cwd = "/", uid, gid }: { cwd?: string } & RunAs): Invocation {
    const where = [`--mount=/proc/self/fd/${OUR_FIRST}`];
    // Joined first, it gives the right to join the other.
    if (this.#user !== undefined) where.unshift(`--user=/proc/self/fd/${OUR_FIRST + 1}`, "--preserve-credentials");
    if (uid !== undefined) where.push(`--setuid=${uid}`, `--setgid=${gid ?? uid}`);
    const command = ["/bin/sh", "-c", SCRIPT, cwd, file, ...args];
    const descriptors = this.#user === undefined ? [this.#mount] : [this.#mount, this.#user];
    return { file: enterer(), args: [...where, "--", ...command], descriptors };
  }

  close(): void {
    closeSync(this.#mount);
    if (this.#user !== undefined) closeSync(this.#user);
  }
}

/** A command as the user, and in the namespaces, that it is for. */
export function invocation(
  file: string,
  args: readonly string[],
  { inside, shell: _, ...options }: { cwd?: string } & RunAs,
): Invocation {
  return inside ? inside.enter(file, args, options) : { file, args, ...options, descriptors: [] };
}
