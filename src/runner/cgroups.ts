import { access, constants, mkdir, readFile, rmdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Limits } from "./classes.ts";
import { errnoOf } from "./files.ts";
import { MAX_PROCESSES } from "./supervisor/process-limit.ts";
import { readProcess } from "./supervisor/processes.ts";

// Control groups, version 2 only. The runner works below the group it was started in, where its service manager has
// delegated that; a group with processes of its own cannot pass controllers on, so the runner first moves to a child.

const PERIOD_US = 100_000;
const REMOVE_ATTEMPTS = 50;
const RUNNER_GROUP = "berth-runner";

const isWritable = (path: string) =>
  access(path, constants.W_OK).then(
    () => true,
    () => false,
  );

/** Groups that environments run in. */
export class ControlGroups {
  readonly #base: string;
  readonly #limitsProcesses: boolean;

  private constructor(base: string, limitsProcesses: boolean) {
    this.#base = base;
    this.#limitsProcesses = limitsProcesses;
  }

  /** Undefined where groups of version 2 are missing or not delegated: limits cannot be enforced then. */
  static async open(root = "/sys/fs/cgroup", self = "/proc/self/cgroup"): Promise<ControlGroups | undefined> {
    try {
      const path = /^0::(.*)$/m.exec(await readFile(self, "utf8"))?.[1];
      const controllers = (await readFile(join(root, "cgroup.controllers"), "utf8")).trim().split(/\s+/);
      if (path === undefined || !controllers.includes("cpu") || !controllers.includes("memory")) return undefined;
      // A runner that restarts inside its own child goes on with the parent.
      const base = join(root, path.endsWith(`/${RUNNER_GROUP}`) ? path.slice(0, -RUNNER_GROUP.length - 1) : path);
      if (!(await isWritable(join(base, "cgroup.subtree_control")))) return undefined;
      const limitsProcesses = controllers.includes("pids");
      await enableControllers(base, limitsProcesses ? "+cpu +memory +pids" : "+cpu +memory");
      return new ControlGroups(base, limitsProcesses);
    } catch {
      return undefined;
    }
  }

  #path = (environmentId: string) => join(this.#base, `berth-${environmentId}`);

  /** Makes the group of an environment with the limits of its class. */
  async prepare(environmentId: string, limits: Limits): Promise<void> {
    const path = this.#path(environmentId);
    await mkdir(path).catch((error: unknown) => {
      if (errnoOf(error) !== "EEXIST") throw error;
    });
    const quota = limits.cpuCores ? `${Math.round(limits.cpuCores * PERIOD_US)}` : "max";
    const memory = limits.memoryMib ? `${limits.memoryMib * 1024 * 1024}` : "max";
    await writeFile(join(path, "cpu.max"), `${quota} ${PERIOD_US}`);
    await writeFile(join(path, "memory.max"), memory);
    // Environments of a runner that is not root share its user, and with it the limit that a user has.
    if (this.#limitsProcesses) await writeFile(join(path, "pids.max"), String(MAX_PROCESSES));
  }

  /** Moves a process in; what it starts later follows. */
  async add(environmentId: string, pid: number): Promise<void> {
    await writeFile(join(this.#path(environmentId), "cgroup.procs"), String(pid));
  }

  /** Kills whatever is in the group and removes it; one that does not exist is fine. */
  async remove(environmentId: string): Promise<void> {
    const path = this.#path(environmentId);
    await writeFile(join(path, "cgroup.kill"), "1").catch(() => undefined);
    for (let attempt = 0; attempt < REMOVE_ATTEMPTS; attempt++) {
      try {
        await rmdir(path);
        return;
      } catch (error) {
        if (errnoOf(error) === "ENOENT") return;
        if (errnoOf(error) !== "EBUSY") throw error;
      }
      await delay(100);
    }
    throw new Error(`control group of environment ${environmentId} is still in use`);
  }
}

/** Processes in a group, if all of them are this process or below it: others are not the runner's to move. */
async function ownMembers(base: string): Promise<number[] | undefined> {
  const pids = (await readFile(join(base, "cgroup.procs"), "utf8")).split("\n").filter(Boolean).map(Number);
  const isOwn = (pid: number): boolean => {
    if (pid === process.pid) return true;
    const parent = readProcess(pid)?.parent ?? 0;
    return parent > 1 && isOwn(parent);
  };
  return pids.every(isOwn) ? pids : undefined;
}

async function enableControllers(base: string, controllers: string): Promise<void> {
  const control = join(base, "cgroup.subtree_control");
  try {
    await writeFile(control, controllers);
  } catch (error) {
    const members = errnoOf(error) === "EBUSY" ? await ownMembers(base) : undefined;
    if (!members) throw error;
    const own = join(base, RUNNER_GROUP);
    await mkdir(own, { recursive: true });
    for (const pid of members) await writeFile(join(own, "cgroup.procs"), String(pid));
    await writeFile(control, controllers);
  }
}
