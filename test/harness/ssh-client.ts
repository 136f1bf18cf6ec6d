import { type ChildProcess, execFile, spawn } from "node:child_process";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { findSshServer } from "../../src/runner/ssh/server.ts";

// OpenSSH's client against the SSH server of an environment.

const run = promisify(execFile);
const OPTIONS = ["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"];

/** Why nobody can log in here; undefined if people can. */
export async function sshMissing(): Promise<string | undefined> {
  if (!(await findSshServer(process.env.PATH ?? ""))) return "sshd is not installed";
  return await run("ssh", ["-V"]).then(
    () => undefined,
    () => "ssh is not installed",
  );
}

/** A key to log in with: its path, and the line that an environment is given. */
export async function clientKey(folder: string, name: string): Promise<{ path: string; text: string }> {
  const path = join(folder, name);
  await run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path]);
  return { path, text: (await readFile(`${path}.pub`, "utf8")).trim() };
}

/** How a client is told where to log in, and with what. */
export function clientArgs(url: string, key: string) {
  const { username, hostname, port } = new URL(url);
  const known = ["-o", `UserKnownHostsFile=${key}.known_hosts`];
  return {
    args: [...OPTIONS, ...known, "-i", key, "-o", "IdentitiesOnly=yes"],
    port,
    target: `${username}@${hostname}`,
  };
}

export interface LoginResult {
  code: number | null;
  stdout: string;
  stderr: string;
}

export interface LoginOptions {
  /** Undefined leaves it open. */
  input?: string | undefined;
  more?: readonly string[];
  env?: Record<string, string>;
  onStart?: (child: ChildProcess) => void;
}

/** Logs in, with a command or to a shell that reads the input. */
export async function logIn(
  url: string,
  key: string,
  command: string | undefined,
  { more = [], env = {}, onStart, ...options }: LoginOptions = {},
): Promise<LoginResult> {
  const { args, port, target } = clientArgs(url, key);
  const words = [...args, ...more, "-p", port, target, ...(command === undefined ? [] : [command])];
  const child = spawn("ssh", words, { env: { ...process.env, ...env } });
  onStart?.(child);
  const result: LoginResult = { code: null, stdout: "", stderr: "" };
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    result.stdout += text;
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    result.stderr += text;
  });
  child.stdin.on("error", () => undefined);
  if (!("input" in options)) child.stdin.end();
  else if (options.input !== undefined) child.stdin.end(options.input);
  result.code = await new Promise((resolve) => child.once("close", resolve));
  return result;
}

/** Why sessions have no terminal here: a server that is not root cannot give them the group that they have to have. */
export async function terminalsMissing(): Promise<string | undefined> {
  const mounts = (await readFile("/proc/self/mounts", "utf8")).split("\n");
  const terminals = mounts.filter((line) => line.split(" ")[1] === "/dev/pts").at(-1);
  return terminals?.includes("gid=") ? undefined : "/dev/pts is mounted without a group";
}
