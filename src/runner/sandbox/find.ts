import { createHash } from "node:crypto";
import { once } from "node:events";
import { join } from "node:path";
import type { RunnerHostConfig } from "../../config.ts";
import { RefusedStart } from "../../domain/errors.ts";
import { runCommand } from "../commands.ts";
import { makeFolder, removeTree } from "../files.ts";
import { compiledFolder, environmentsFolder, runtimeFolder, trashFolder } from "../paths.ts";
import { spawnEnclosed } from "../supervisor/enclosure.ts";
import { Namespaces } from "../supervisor/namespaces.ts";
import { readProcess } from "../supervisor/processes.ts";
import { findProgram } from "../supervisor/programs.ts";
import { makeScratch, removeScratch, Sandbox, type Scratch } from "./sandbox.ts";

/** How environments are kept apart on this host. */
export interface Isolation {
  /** Absent where environments see the host as it is. */
  sandbox: Sandbox | undefined;
  /** Why there is no sandbox; empty if there is. */
  problem: string;
}

type SandboxConfig = Pick<RunnerHostConfig, "sandbox" | "dataDir" | "hiddenFolders">;

const TRY_MS = 10_000;
const NOBODY = { uid: 65_534, gid: 65_534 };
const MAX_REASON = 200;
// Arguments: a folder that is to be seen, one that is not, and a process of root's if none is to be seen.
const LOOK = 'test -d "$0" && test ! -e "$1" && { test -z "$2" || test ! -e "$2"; }';

/** Tries out what can be used, as it is used for environments. Throws RefusedStart if it is required and fails. */
export async function findSandbox(
  config: SandboxConfig,
  programs: readonly string[],
  lookUp = findProgram,
): Promise<Isolation> {
  const isolation = await find(config, programs, lookUp);
  if (config.sandbox === "require" && !isolation.sandbox) {
    throw new RefusedStart(`BERTH_RUNNER_SANDBOX is require, but ${isolation.problem}`);
  }
  return isolation;
}

async function find(
  config: SandboxConfig,
  programs: readonly string[],
  lookUp: typeof findProgram,
): Promise<Isolation> {
  const none = (problem: string) => ({ sandbox: undefined, problem });
  if (config.sandbox === "off") return none("BERTH_RUNNER_SANDBOX is off");
  const bwrap = lookUp("bwrap");
  if (!bwrap) return none("bubblewrap is not installed");
  if (!lookUp("nsenter")) return none("nsenter is not installed");
  const options = {
    ...{ bwrap, programs, compiledFolder: compiledFolder(config.dataDir) },
    hidden: [config.dataDir, ...config.hiddenFolders],
    // What a command gets into a dev container with.
    readable: [runtimeFolder(config.dataDir)],
  };
  // An ordinary user shares its processes with environments anyway.
  const mount = process.getuid?.() === 0 ? lookUp("mount") : undefined;
  let problem = "";
  for (const candidate of mount ? [mount, undefined] : [undefined]) {
    const sandbox = new Sandbox({ ...options, mount: candidate, umount: lookUp("umount") });
    problem = await tryOut(sandbox, config.dataDir);
    if (!problem) return { sandbox, problem };
  }
  return none(`bubblewrap does not work on this host: ${problem}`);
}

/** Runs a command in a sandbox, and another one that joins it. Returns what went wrong, empty if nothing. */
async function tryOut(sandbox: Sandbox, dataDir: string): Promise<string> {
  // One runner at a time uses the data folder, so that the next one removes what one that was killed has left.
  const name = `sandbox-${createHash("sha256").update(dataDir).digest("hex").slice(0, 16)}`;
  const root = join(trashFolder(dataDir), name);
  const shmRoot = join("/dev/shm", `berth-${name}`);
  const scratch = { root, tmp: join(root, "tmp"), varTmp: join(root, "var-tmp"), shmRoot, shm: join(shmRoot, "shm") };
  try {
    makeFolder(root, 0o711);
    await makeScratch(scratch, process.getuid?.() === 0 ? NOBODY : undefined);
    return await tryIn(sandbox, scratch, dataDir);
  } catch (error) {
    return error instanceof Error ? error.message.slice(0, MAX_REASON) : String(error);
  } finally {
    await Promise.allSettled([removeScratch(scratch), removeTree(root)]);
  }
}

async function tryIn(sandbox: Sandbox, scratch: Scratch, dataDir: string): Promise<string> {
  const enclosure = await sandbox.enclosure(scratch, join(scratch.root, "socket"));
  const { child, pid } = spawnEnclosed(enclosure, "/bin/sh", ["-c", "echo; read -r line"], { stdin: "pipe", env: {} });
  const closed = once(child, "close").catch(() => undefined);
  const timer = setTimeout(() => child.kill("SIGKILL"), TRY_MS);
  let errors = "";
  child.stderr?.setEncoding("utf8").on("data", (chunk: string) => {
    errors = (errors + chunk).slice(0, MAX_REASON);
  });
  child.stdin?.on("error", () => undefined);
  try {
    const ready = new Promise<boolean>((resolve) => child.stdout?.once("data", () => resolve(true)));
    const isUp = await Promise.race([ready, closed.then(() => false)]);
    const started = isUp ? readProcess((await pid) ?? 0) : undefined;
    const inside = started && Namespaces.of(started);
    if (!inside) return errors.replace(/^bwrap: /, "").trim() || "it does not start";
    try {
      const args = ["-c", LOOK, scratch.root, environmentsFolder(dataDir), sandbox.hidesProcesses ? "/proc/1" : ""];
      const user = { ...(process.getuid?.() === 0 && NOBODY), inside };
      const { code, stderr } = await runCommand("/bin/sh", args, { user, timeoutMs: TRY_MS });
      return code === 0 ? "" : stderr.trim().slice(0, MAX_REASON) || "it does not hide what it should";
    } finally {
      inside.close();
    }
  } finally {
    child.stdin?.end();
    await closed;
    clearTimeout(timer);
  }
}
