import { randomBytes } from "node:crypto";
import { mkdir, open, readFile, rename, rm } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { ConfigError } from "../config.ts";
import { UsageError } from "./usage.ts";

/** A token that `berth login` got, and whose it is. */
export interface Credential {
  token: string;
  tokenId: string;
  expiresAt: string;
  email: string;
  organizationName: string;
}

/** What a user's configuration file holds. */
interface Stored {
  /** Server that commands mean which name none. */
  current?: string;
  servers: Record<string, Credential>;
}

const DEFAULT_URL = "http://127.0.0.1:8080";

/** The file: only its owner can read it. */
export const credentialsPath = (env: NodeJS.ProcessEnv) =>
  join(env.XDG_CONFIG_HOME || join(env.HOME || homedir(), ".config"), "berth", "config.json");

async function read(env: NodeJS.ProcessEnv): Promise<Stored> {
  const path = credentialsPath(env);
  const text = await readFile(path, "utf8").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw error;
  });
  if (text === undefined) return { servers: {} };
  try {
    const stored = JSON.parse(text) as Partial<Stored>;
    return { current: stored.current, servers: { ...stored.servers } };
  } catch {
    throw new ConfigError(`${path} is damaged: mend or remove it`);
  }
}

async function write(env: NodeJS.ProcessEnv, stored: Stored): Promise<void> {
  const path = credentialsPath(env);
  await mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const staged = `${path}.${randomBytes(8).toString("hex")}`;
  const file = await open(staged, "wx", 0o600);
  try {
    await file.writeFile(`${JSON.stringify(stored, null, 2)}\n`);
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(staged, path).catch(async (error: unknown) => {
    await rm(staged, { force: true });
    throw error;
  });
}

/** The server that a command means: the one that it names, else the last one that was signed in to, else this machine. */
export async function serverOf(env: NodeJS.ProcessEnv, named: string | undefined): Promise<string> {
  const url = named ?? (await read(env)).current ?? DEFAULT_URL;
  const parsed = URL.parse(url);
  if (!parsed || !/^https?:$/.test(parsed.protocol) || parsed.search || parsed.hash || parsed.username) {
    throw new UsageError(`${url} is no http or https URL of a server`);
  }
  return parsed.href.replace(/\/+$/, "");
}

export const findCredential = async (env: NodeJS.ProcessEnv, server: string): Promise<Credential | undefined> =>
  (await read(env)).servers[server];

export async function keepCredential(env: NodeJS.ProcessEnv, server: string, credential: Credential): Promise<void> {
  const { servers } = await read(env);
  await write(env, { current: server, servers: { ...servers, [server]: credential } });
}

export async function forgetCredential(env: NodeJS.ProcessEnv, server: string): Promise<void> {
  const { current, servers } = await read(env);
  const { [server]: _gone, ...others } = servers;
  await write(env, { current: current === server ? undefined : current, servers: others });
}
