import { existsSync, mkdirSync, readSync, rmSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { flushCompileCache } from "node:module";
import { join } from "node:path";
import { ActivityTracker } from "./activity.ts";
import { AutomationEngine } from "./automation/engine.ts";
import { AutomationLink } from "./automation/link.ts";
import { TIMES } from "./automation/parts.ts";
import {
  CONTAINED,
  ENTRANCE,
  readSupervisorConfig,
  type SupervisorConfig,
  SupervisorConfigError,
  WAIT,
} from "./config.ts";
import { connectHandler } from "./connect-handler.ts";
import { serveContainedRun } from "./contained-run.ts";
import { Execs } from "./exec.ts";
import { ExecJournal } from "./exec-journal.ts";
import { BoundedLog } from "./log.ts";
import { Logins } from "./logins.ts";
import { createOpsRoutes } from "./ops.ts";
import { controlHandler, isControl } from "./private-http.ts";
import { dropPrivileges } from "./privileges.ts";
import { ProcessEnvironment } from "./process-environment.ts";
import { readProcess, terminateSession } from "./processes.ts";
import { isProgram } from "./programs.ts";
import { liveSupervisor, writeSupervisorRecord } from "./record.ts";
import { listenExclusively, SocketInUseError } from "./socket.ts";
import { CLOSE_GRACE_MS } from "./terminal.ts";
import { Terminals } from "./terminals.ts";
import { Watches } from "./watches.ts";

// Serves the operations of one environment and owns the processes it starts, independent of the runner that started
// it: a runner may die and find it again. Everything is loaded before the privileges are dropped, since neither this
// program nor node need to be readable for the environment's user afterwards.

// Services have two minutes to end.
const SHUTDOWN_LIMIT_MS = 140_000;
const ANSWER_MS = 2000;
// Longer than the runner waits for its caller.
const STALL_MS = 120_000;
const PRUNE_MS = 60 * 60 * 1000;
const STDIN = 0;
const NEWLINE = 10;
const MAX_PATH_BYTES = 4096;

/**
 * Path of the configuration. One that waits for it, and does nothing else, reads it as a line; it ends with its starter
 * if that one never says it.
 */
function configPath(argument: string | undefined): string | undefined {
  if (argument !== WAIT) return argument;
  const input = Buffer.alloc(MAX_PATH_BYTES);
  let size = 0;
  while (!input.subarray(0, size).includes(NEWLINE)) {
    const count = size < input.length ? readSync(STDIN, input, size, input.length - size, null) : 0;
    if (count === 0) process.exit(0);
    size += count;
  }
  return input.toString("utf8", 0, input.indexOf(NEWLINE));
}

/** As root, the file that names the user to become must not be in that user's hands. */
function trustedConfig(path: string | undefined): SupervisorConfig {
  if (path === undefined) throw new SupervisorConfigError("usage: main.ts <configuration file>");
  const config = readSupervisorConfig(path);
  if (process.getuid?.() !== 0) return config;
  const { uid, mode } = statSync(path);
  if (uid !== 0 || (mode & 0o022) !== 0) throw new SupervisorConfigError("configuration must belong to root alone");
  return config;
}

/** In a container there may be no other shell than the one that every system has. */
const usableShell = ({ shell }: SupervisorConfig): string => (isProgram(shell) ? shell : "/bin/sh");

/** How commands get into the dev container; undefined where it is the host, empty while there is no container. */
function entranceOf(root: string): string | undefined {
  if (!existsSync(join(root, CONTAINED))) return undefined;
  const path = join(root, ENTRANCE);
  return existsSync(path) ? path : "";
}

/** Where it keeps its state, and where it writes logs. */
function foldersOf({ root, part = "" }: SupervisorConfig): { run: string; logs: string } {
  const [run, logs] = [join(root, "run", part), join(root, "logs", part)];
  for (const folder of [run, logs]) mkdirSync(folder, { recursive: true, mode: 0o700 });
  return { run, logs };
}

async function serve(config: SupervisorConfig, { run, logs }: ReturnType<typeof foldersOf>, log: BoundedLog) {
  const { root, socketPath, version, part } = config;
  const activity = new ActivityTracker();
  const environment = new ProcessEnvironment(config);
  const journal = new ExecJournal(join(run, "exec"));
  const execs = new Execs(journal, () => environment.read());
  const terminals = new Terminals({
    shell: config.shell,
    environment: (more) => environment.read(more),
    recordPath: join(run, "terminals.json"),
  });
  const logins = new Logins({
    ...{ run: join(root, "run"), socketPath, shell: config.shell, recordPath: join(run, "logins.json") },
    environment: (more) => environment.read(more),
  });
  let { workspaceFolder } = config;
  const watches = new Watches(
    () => workspaceFolder,
    () => environment.read(),
  );
  const automations = new AutomationLink();
  const engine = new AutomationEngine(
    {
      state: join(run, "automations"),
      logs: join(logs, "automations"),
      variables: (more) => environment.read(more),
      folder: () => workspaceFolder,
      entrance: () => entranceOf(root),
      secrets: (ids) => automations.secrets(ids),
      logUrl: (path) => `${automations.facts.logBase}/${path}/logs`,
      containers: automations.containers,
      times: TIMES,
      unforeseen: (error) => log.write("error", "an automation is in trouble", { error: String(error) }),
    },
    (news) => automations.tell(news),
  );
  automations.use(engine);
  const startTime = readProcess(process.pid)?.startTime ?? 0;

  const routes = createOpsRoutes({
    workspaceFolder: () => workspaceFolder,
    environment: () => environment.read(),
    execs,
    terminals,
    watches,
    activity,
    unforeseen: (error) => log.write("error", "call failed", { error: String(error) }),
  });
  const control = controlHandler({
    health: () => ({
      pid: process.pid,
      startTime,
      version,
      environmentId: config.environmentId,
      workspaceFolder,
      runningExecs: execs.runningCount,
      inDevContainer: engine.inDevContainer,
      activity: engine.isAtWork ? { source: "Automations", at: new Date() } : activity.last(),
    }),
    setWorkspaceFolder: (path) => {
      if (path === workspaceFolder) return;
      workspaceFolder = path;
      watches.moved();
    },
    run: (request, response) => {
      serveContainedRun(request, response, (more) => environment.read(more)).catch(() => response.destroy());
    },
    login: (request, response) => {
      logins.serve(request, response).catch(() => response.destroy());
    },
    automations: (request, response) => {
      automations.serve(request, response).catch(() => response.destroy());
    },
  });
  const rpc = connectHandler(routes, { grpc: false, grpcWeb: false, acceptCompression: [], stallMs: STALL_MS });
  // The conversation about automations is one long request.
  const server = createServer({ requestTimeout: 0 }, (request, response) => {
    // A link in another environment may have led the runner here.
    if (request.headers.host !== config.environmentId) response.writeHead(421).end();
    else if (isControl(request)) control(request, response);
    else
      rpc(request, response).catch((error: unknown) => {
        log.write("error", "call broke off", { error: String(error) });
        response.destroy();
      });
  });
  server.maxConnections = 1000;
  // Only the one that serves may touch the journal.
  await listenExclusively(server, socketPath);
  server.on("error", (error) => log.write("error", "connection refused", { error: error.message }));
  const orphans = journal.open();
  for (const orphan of orphans) void terminateSession(orphan);
  for (const orphan of [...terminals.open(), ...logins.open()]) void terminateSession(orphan, CLOSE_GRACE_MS, "first");
  // One in a container is known by its container.
  if (part === undefined) writeSupervisorRecord(root, { pid: process.pid, startTime, version });
  setInterval(() => journal.prune(), PRUNE_MS).unref();
  engine.keepLogs(() => automations.facts.logDays);
  log.write("info", "serving", { pid: process.pid, version, orphans: orphans.length });

  const stop = async () => {
    setTimeout(() => process.exit(0), SHUTDOWN_LIMIT_MS).unref();
    watches.stopAll();
    await Promise.all([engine.close(), execs.stopAll(), terminals.stopAll(), logins.stopAll()]);
    const closed = new Promise((resolve) => server.close(resolve));
    automations.close();
    setTimeout(() => server.closeAllConnections(), ANSWER_MS).unref();
    await closed;
    const isKnown = part === undefined && liveSupervisor(root)?.pid === process.pid;
    if (isKnown) rmSync(join(run, "supervisor.json"), { force: true });
    log.write("info", "stopped");
    process.exit(0);
  };
  process.once("SIGTERM", () => void stop());
  process.on("SIGTERM", () => undefined);
}

function exitCodeOf(error: unknown): number {
  if (error instanceof SupervisorConfigError) return 2;
  return error instanceof SocketInUseError ? 3 : 1;
}

let log: BoundedLog | undefined;
function fail(error: unknown): never {
  log?.write("error", "failed", { error: error instanceof Error ? error.stack : String(error) });
  process.stderr.write(`supervisor: ${error instanceof Error ? error.message : error}\n`);
  process.exit(exitCodeOf(error));
}

process.on("uncaughtException", fail);
process.on("unhandledRejection", fail);
process.on("SIGHUP", () => undefined);
// The starter may be gone before it reads.
process.stdout.on("error", () => undefined);
process.stderr.on("error", () => undefined);
try {
  const given = trustedConfig(configPath(process.argv[2]));
  const config = { ...given, shell: usableShell(given) };
  process.umask(0o022);
  process.chdir("/");
  // Only who has started it may write there.
  flushCompileCache();
  dropPrivileges(config);
  const folders = foldersOf(config);
  log = new BoundedLog(join(folders.logs, "supervisor.log"));
  await serve(config, folders, log);
  // Tells the one who started it; nothing else is ever written there.
  process.stdout.write("ready\n");
} catch (error) {
  fail(error);
}
