import { execFileSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { closeSync, constants, existsSync, mkdirSync, openSync, readdirSync, rmSync, writeSync } from "node:fs";
import { type ClientRequest, request as httpRequest, type IncomingMessage } from "node:http";
import { createConnection, createServer, Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { isatty } from "node:tty";
import { AGENT, EXIT_CODE, LOGINS, type LoginWish, PIPES, type TerminalSize } from "./contained.ts";

// What somebody who logs in by SSH runs on the host: `login.ts <socket> <environment> <folder of run/>`. It asks the
// supervisor in the dev container for the command of SSH_ORIGINAL_COMMAND or a shell, and carries input and output.

/** What SSH clients say about themselves. */
const PASSED_ON = /^(TERM|COLORTERM|LANG|LC_\w+|SSH_CLIENT|SSH_CONNECTION)$/;
const ENDS: Partial<Record<NodeJS.Signals, number>> = { SIGHUP: 129, SIGINT: 130, SIGQUIT: 131, SIGTERM: 143 };
const NAME = /^(\d+)-[0-9a-f]{16}$/;
const WAIT_MS = 30_000;
const POLL_MS = 200;
const FAILED = 255;
const MAX_AGENT_CONNECTIONS = 20;
const ABSENT: ReadonlySet<unknown> = new Set(["ENOENT", "ECONNREFUSED"]);
const { O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY } = constants;
const isTerminal = isatty(0) && isatty(1);

function say(text: string): void {
  try {
    writeSync(2, `${text}${isTerminal ? "\r\n" : "\n"}`);
  } catch {
    // Nobody listens.
  }
}

/** A folder for this login, which becomes the present one: the paths of sockets have to be short. */
function makeFolder(run: string): string {
  const all = join(run, LOGINS);
  mkdirSync(all, { recursive: true, mode: 0o700 });
  // Left by those that were killed.
  for (const each of readdirSync(all)) {
    const [, pid] = NAME.exec(each) ?? [];
    if (pid && !existsSync(`/proc/${pid}`)) rmSync(join(all, each), { recursive: true, force: true });
  }
  const name = `${process.pid}-${randomBytes(8).toString("hex")}`;
  mkdirSync(join(all, name), { mode: 0o700 });
  process.chdir(join(all, name));
  process.once("exit", () => rmSync(join(all, name), { recursive: true, force: true }));
  return name;
}

/** Lets the container reach the agent of whoever has logged in. */
async function forwardAgent(agent: string): Promise<void> {
  const server = createServer((socket) => {
    const other = createConnection(agent);
    for (const each of [socket, other]) each.on("error", () => undefined);
    socket.once("close", () => other.destroy());
    other.once("close", () => socket.destroy());
    socket.pipe(other).pipe(socket);
  });
  server.maxConnections = MAX_AGENT_CONNECTIONS;
  server.unref();
  await new Promise<void>((resolve, reject) => server.once("error", reject).listen(AGENT, resolve));
}

function sizeNow(): TerminalSize {
  const { columns, rows } = process.stdout;
  return { cols: columns || 80, rows: rows || 24 };
}

/** Resolves with the answer once what was asked for runs. */
function ask(socketPath: string, environmentId: string, wish: LoginWish): Promise<[ClientRequest, IncomingMessage]> {
  return new Promise((resolve, reject) => {
    const call = httpRequest({ socketPath, host: environmentId, method: "POST", path: "/login", agent: false });
    call.once("error", reject);
    call.once("response", (response) => resolve([call, response]));
    call.write(`${JSON.stringify(wish)}\n`);
  });
}

/** A container that is just being started again is waited for. */
async function asked(socketPath: string, environmentId: string, wish: LoginWish) {
  const start = Date.now();
  for (let isFirst = true; ; isFirst = false) {
    try {
      return await ask(socketPath, environmentId, wish);
    } catch (error) {
      if (!ABSENT.has((error as NodeJS.ErrnoException).code)) throw new Error("the dev container has ended");
      if (Date.now() - start > WAIT_MS) throw new Error("the dev container does not answer; it may be in the making");
      if (isFirst) say("waiting for the dev container");
      await delay(POLL_MS);
    }
  }
}

async function textOf(response: IncomingMessage): Promise<string> {
  let text = "";
  for await (const chunk of response.setEncoding("utf8")) text = (text + chunk).slice(0, 1000);
  return text;
}

/** Input goes on until either side has had enough of it. */
function carryInput(): void {
  const pipe = new Socket({ fd: openSync("in", O_WRONLY | O_NONBLOCK), readable: false });
  pipe.on("error", () => process.stdin.destroy());
  pipe.once("finish", () => pipe.destroy());
  process.stdin.on("error", () => pipe.end()).pipe(pipe);
}

/** Resolves when all output has been handed on. */
async function carryOutput(name: string, to: number): Promise<void> {
  const pipe = new Socket({ fd: openSync(name, O_RDONLY | O_NONBLOCK), writable: false });
  const output = isTerminal ? process.stdout : new Socket({ fd: to, readable: false });
  // As a program that writes to a closed pipe.
  output.on("error", () => process.exit(FAILED));
  pipe.on("error", () => output.end());
  await new Promise((resolve) => {
    if (isTerminal) pipe.on("data", (chunk) => void output.write(chunk)).once("close", resolve);
    else pipe.pipe(output).once("finish", resolve);
  });
}

function exitCode(response: IncomingMessage): Promise<number> {
  return new Promise((resolve, reject) => {
    const lost = () => reject(new Error("the dev container has ended"));
    response.once("error", lost).once("close", lost);
    response.once("end", () => resolve(Number(response.trailers[EXIT_CODE] ?? FAILED)));
    response.resume();
  });
}

async function logIn(socketPath: string, environmentId: string, run: string): Promise<number> {
  const { SSH_ORIGINAL_COMMAND: command, SSH_AUTH_SOCK: agent } = process.env;
  const name = makeFolder(run);
  const pipes = isTerminal ? PIPES.slice(0, 2) : PIPES;
  execFileSync("mkfifo", ["-m", "600", ...pipes]);
  // Held until the other side has them, so that nobody finds the end of input or output before its begin.
  const held = pipes.map((pipe) => openSync(pipe, O_RDWR | O_NONBLOCK));
  const hasAgent =
    agent !== undefined &&
    (await forwardAgent(agent).then(
      () => true,
      () => false,
    ));
  const variables = Object.entries(process.env).filter(
    (entry): entry is [string, string] => PASSED_ON.test(entry[0]) && entry[1] !== undefined,
  );
  const [call, response] = await asked(socketPath, environmentId, {
    ...{ name, variables: Object.fromEntries(variables), hasAgent },
    ...(command !== undefined && { command }),
    ...(isTerminal && { terminal: sizeNow() }),
  });
  if (response.statusCode === 404) throw new Error("the dev container takes logins once it has been started again");
  if (response.statusCode !== 200) throw new Error(await textOf(response));
  // What Node calls raw still changes line ends.
  if (isTerminal) execFileSync("stty", ["raw", "-echo"], { stdio: "inherit" });
  if (isTerminal) process.stdout.on("resize", () => void call.write(`${JSON.stringify(sizeNow())}\n`));
  call.on("error", () => undefined);
  const code = exitCode(response);
  carryInput();
  const outputs = pipes.slice(1).map((pipe, index) => carryOutput(pipe, index + 1));
  for (const descriptor of held) closeSync(descriptor);
  const [result] = await Promise.all([code, ...outputs]);
  return result;
}

for (const [signal, code] of Object.entries(ENDS)) process.once(signal, () => process.exit(code));
try {
  const [socketPath = "", environmentId = "", run = ""] = process.argv.slice(2);
  process.exit(await logIn(socketPath, environmentId, run));
} catch (error) {
  say(error instanceof Error ? error.message : String(error));
  process.exit(FAILED);
}
