import { type ChildProcess, spawn } from "node:child_process";

/** A program that gives a command a view of its own and stays as its parent; the command follows its arguments. */
export interface Enclosure {
  file: string;
  /** With descriptor 3 for what it tells about the command, and 4 for a line from inside when all is in place. */
  args: readonly string[];
  /** Descriptors that it needs, from 5 on. */
  descriptors: readonly number[];
}

const ENV = "/usr/bin/env";
const TOLD = 3;
const IN_PLACE = 4;
const MAX_TOLD = 4096;

/** What a command runs in a session of its own as, and where its pid is found. */
export interface Enclosed {
  /** The command itself, or the program around it, which ends with its exit code. */
  child: ChildProcess;
  /** Pid of the command; undefined if it did not come to that. */
  pid: Promise<number | undefined>;
  /** The same, once others may join the view that it runs in. */
  entered: Promise<number | undefined>;
}

/**
 * Starts a command inside an enclosure, or as it is without one. Its variables are its own: what is around it must not
 * be taken for a process of the environment.
 */
export function spawnEnclosed(
  enclosure: Enclosure | undefined,
  file: string,
  args: readonly string[],
  { stdin = "ignore", env }: { stdin?: "ignore" | "pipe"; env: Readonly<Record<string, string>> },
): Enclosed {
  const common = { cwd: "/", detached: true };
  if (!enclosure) {
    const child = spawn(file, args, { ...common, env, stdio: [stdin, "pipe", "pipe"] });
    const pid = Promise.resolve(child.pid);
    return { child, pid, entered: pid };
  }
  const variables = Object.entries(env).map(([name, value]) => `${name}=${value}`);
  const command = [ENV, "-i", ...variables, file, ...args];
  const child = spawn(enclosure.file, [...enclosure.args, ...command], {
    ...{ ...common, env: {} },
    stdio: [stdin, "pipe", "pipe", "pipe", "pipe", ...enclosure.descriptors],
  });
  const pid = toldPid(child);
  const inPlace = new Promise((resolve) => {
    child.stdio[IN_PLACE]?.once("data", resolve).on("error", resolve);
    child.once("error", resolve).once("close", resolve);
  });
  return { child, pid, entered: inPlace.then(() => pid) };
}

function toldPid(child: ChildProcess): Promise<number | undefined> {
  const stream = child.stdio[TOLD];
  return new Promise((resolve) => {
    let text = "";
    stream?.on("data", (chunk: Buffer) => {
      text = (text + chunk.toString("latin1")).slice(0, MAX_TOLD);
      const pid = /"child-pid":\s*(\d+)\b/.exec(text)?.[1];
      if (pid) resolve(Number(pid));
    });
    stream?.on("error", () => resolve(undefined));
    child.once("error", () => resolve(undefined));
    child.once("close", () => resolve(undefined));
  });
}
