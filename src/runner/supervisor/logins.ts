import { closeSync, constants, fstatSync, openSync, statSync } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { Socket } from "node:net";
import { dirname, join } from "node:path";
import { linesOf } from "./automation/link.ts";
import { AGENT, EXIT_CODE, LOGINS, type LoginWish, PIPES, type TerminalSize } from "./contained.ts";
import { exitCodeOf, type ProcessRef, processEnd, readProcess, spawnSession, terminateSession } from "./processes.ts";
import { Pty } from "./pty.ts";
import { recordedSessions, recordSessions } from "./session-record.ts";

// People who log in to an environment whose dev container runs in a container get here: a process of theirs on the host
// (login.ts) asks for a shell or a command and carries its input and output. Whoever is gone leaves what a dropped line
// leaves: pipes that are closed, a terminal that is hung up.

const MAX_LIVE = 100;
const MAX_LINE_BYTES = 1024 * 1024;
const MAX_SIDE = 1000;
const NAME = /^[0-9a-z-]{1,64}$/;
const { O_NOFOLLOW, O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY } = constants;

/** What logins need of their environment. */
export interface LoginSettings {
  /** Folder with the pipes; a second, short path of it for the sockets in it. */
  run: string;
  socketPath: string;
  /** Absolute path of the shell. */
  shell: string;
  /** Variables of its processes, read anew, with more on top. */
  environment(more: Readonly<Record<string, string>>): Record<string, string>;
  /** File that names the shells for the supervisor after this one. */
  recordPath: string;
}

interface Login {
  leader: ProcessRef | undefined;
  /** Exit code; by then all output of a terminal has been handed on. */
  ended: Promise<number>;
  resize(size: TerminalSize): void;
  hangUp(): void;
}

interface Command {
  argv: readonly [string, ...string[]];
  cwd: string;
  env: Record<string, string>;
}

const isText = (value: unknown): value is string => typeof value === "string" && !value.includes("\0");

function sizeOf(value: unknown): TerminalSize {
  const side = (name: string, preset: number) => {
    const given: unknown = Object(value)[name];
    return Number.isInteger(given) && Number(given) > 0 ? Math.min(Number(given), MAX_SIDE) : preset;
  };
  return { cols: side("cols", 80), rows: side("rows", 24) };
}

function parsed(line: string): LoginWish {
  const { name, command, terminal, variables, hasAgent } = JSON.parse(line) as Record<string, unknown>;
  if (!isText(name) || !NAME.test(name)) throw new Error("is no login");
  const entries = Object.entries(Object(variables)).filter(([each, text]) => isText(each) && isText(text));
  return {
    ...{ name, variables: Object.fromEntries(entries) as Record<string, string>, hasAgent: hasAgent === true },
    ...(isText(command) && { command }),
    ...(terminal !== undefined && { terminal: sizeOf(terminal) }),
  };
}

/** An end of a named pipe. It waits for nobody at the other one, who may have gone. */
function openEnd(path: string, flags: number): number {
  const held = openSync(path, O_RDWR | O_NONBLOCK | O_NOFOLLOW);
  try {
    if (!fstatSync(held).isFIFO()) throw new Error("is no pipe");
    return openSync(`/proc/self/fd/${held}`, flags);
  } finally {
    closeSync(held);
  }
}

const leaderOf = (pid: number | undefined): ProcessRef | undefined => {
  const found = pid === undefined ? undefined : readProcess(pid);
  return found && { pid: found.pid, startTime: found.startTime };
};

/** The pipes are the command's own, so that it can open them by their names in `/dev`. */
async function startOnPipes(folder: string, { argv: [file, ...args], cwd, env }: Command): Promise<Login> {
  const opened: number[] = [];
  try {
    for (const name of PIPES) opened.push(openEnd(join(folder, name), name === "in" ? O_RDONLY : O_WRONLY));
    const child = spawnSession(file, args, { cwd, env, streams: opened as [number, number, number] });
    const ended = processEnd(child).then(exitCodeOf);
    if (child.pid === undefined) await ended;
    return { leader: leaderOf(child.pid), ended, resize: () => undefined, hangUp: () => undefined };
  } finally {
    for (const descriptor of opened) closeSync(descriptor);
  }
}

async function startOnTerminal(folder: string, size: TerminalSize, command: Command): Promise<Login> {
  const { argv, cwd, env } = command;
  const input = new Socket({ fd: openEnd(join(folder, "in"), O_RDONLY | O_NONBLOCK), writable: false });
  const output = new Socket({ fd: openEnd(join(folder, "out"), O_WRONLY | O_NONBLOCK), readable: false });
  let pty: Pty | undefined;
  const hangUp = () => {
    for (const stream of [input, output]) stream.destroy();
    void pty?.hangUp();
  };
  for (const stream of [input, output]) stream.on("error", hangUp);
  const [file, ...args] = argv;
  try {
    const started = await Pty.start({ file, args, cwd, env, ...size }, (chunk) => {
      if (!output.write(chunk)) pty?.pause();
    });
    pty = started;
    output.on("drain", () => started.resume());
    void typed(input, started).then(hangUp);
    const ended = started.ended.then(async (end) => {
      await flushed(output);
      input.destroy();
      return exitCodeOf(end);
    });
    return { leader: leaderOf(started.pid), ended, resize: ({ cols, rows }) => started.resize(cols, rows), hangUp };
  } catch (error) {
    hangUp();
    throw error;
  }
}

/** Resolves when nobody types any more. */
async function typed(input: Socket, pty: Pty): Promise<void> {
  try {
    for await (const chunk of input) {
      pty.write(chunk);
      await pty.written;
    }
  } catch {
    // It has been closed.
  }
}

async function flushed(output: Socket): Promise<void> {
  if (output.destroyed) return;
  await new Promise((resolve) => {
    output.once("close", resolve);
    output.end(() => output.destroy());
  });
}

const isFolder = (path: string) => statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false;

/** The logins of a container. They end with the supervisor; one that was killed leaves the rest to the next. */
export class Logins {
  readonly #settings: LoginSettings;
  readonly #live = new Set<Login>();
  #starting = 0;
  #isStopping = false;

  constructor(settings: LoginSettings) {
    this.#settings = settings;
  }

  /** Shells and commands that an earlier supervisor left, to be hung up. */
  open(): ProcessRef[] {
    return recordedSessions(this.#settings.recordPath);
  }

  /** Answers as soon as what a request asks for runs, and ends the answer with its exit code. */
  async serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    try {
      const lines = linesOf(request, MAX_LINE_BYTES);
      const login = await this.#start(parsed((await lines.next()).value ?? ""));
      response.once("close", () => login.hangUp());
      response.writeHead(200, { "content-type": "text/plain", trailer: EXIT_CODE });
      response.flushHeaders();
      void resizes(lines, login);
      response.addTrailers({ [EXIT_CODE]: String(await login.ended) });
      response.end();
    } catch (error) {
      if (response.headersSent) throw error;
      response.writeHead(500, { "content-type": "text/plain" }).end(error instanceof Error ? error.message : "");
    }
  }

  /** Refuses new ones and ends the others; resolves when they have ended. */
  async stopAll(): Promise<void> {
    this.#isStopping = true;
    const ends = [...this.#live].map(async ({ leader, ended }) => {
      if (leader) await terminateSession(leader, undefined, "last");
      await ended;
    });
    await Promise.allSettled(ends);
  }

  async #start({ name, command, terminal, variables, hasAgent }: LoginWish): Promise<Login> {
    if (this.#isStopping) throw new Error("the environment is stopping");
    if (this.#live.size + this.#starting >= MAX_LIVE) throw new Error(`${MAX_LIVE} people are logged in already`);
    const { shell, environment, run, socketPath } = this.#settings;
    const agent = join(dirname(socketPath), LOGINS, name, AGENT);
    const env = environment({ ...variables, ...(hasAgent && { SSH_AUTH_SOCK: agent }) });
    const argv: Command["argv"] = command === undefined ? [shell] : [shell, "-c", command];
    const cwd = env.HOME && isFolder(env.HOME) ? env.HOME : "/";
    const folder = join(run, LOGINS, name);
    this.#starting++;
    try {
      const start = { argv, cwd, env };
      const login = await (terminal ? startOnTerminal(folder, terminal, start) : startOnPipes(folder, start));
      this.#live.add(login);
      this.#record();
      const forget = () => {
        this.#live.delete(login);
        this.#record();
      };
      login.ended.then(forget, forget);
      return login;
    } finally {
      this.#starting--;
    }
  }

  #record(): void {
    const leaders = [...this.#live].flatMap(({ leader }) => leader ?? []);
    recordSessions(this.#settings.recordPath, leaders);
  }
}

/** Lines after the first are sizes of the terminal. */
async function resizes(lines: AsyncIterable<string>, login: Login): Promise<void> {
  try {
    for await (const line of lines) login.resize(sizeOf(JSON.parse(line)));
  } catch {
    // The connection has gone.
  }
}
