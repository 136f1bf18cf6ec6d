import { isAbsolute } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import type { CreateTerminalRequest, TerminalInfo } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { invalidArgument } from "./errors.ts";
import { checkDirectory, isExecutable } from "./files.ts";
import type { ProcessRef } from "./processes.ts";
import type { PtyCommand } from "./pty.ts";
import { recordedSessions, recordSessions } from "./session-record.ts";
import { Terminal } from "./terminal.ts";

const MAX_LIVE = 50;
/** How long, and how many, terminals are kept whose shell has ended. */
const ENDED_KEPT_MS = 30_000;
const MAX_ENDED = 50;
const MAX_SIDE = 1000;
const DEFAULT_COLS = 80;
const DEFAULT_ROWS = 24;
const MAX_VARIABLE_BYTES = 64 * 1024;
const MAX_ANNOTATIONS = 32;
const MAX_KEY_CHARACTERS = 128;
const MAX_VALUE_CHARACTERS = 1024;
const DISPLAY = { TERM: "xterm-256color", COLORTERM: "truecolor" };

/** What a terminal needs of its environment. */
export interface TerminalSettings {
  /** Absolute path of the shell that is used unless another one is asked for. */
  shell: string;
  /** Variables of its processes, read anew, with more on top. */
  environment(more: Readonly<Record<string, string>>): Record<string, string>;
  /** File that names the shells for the supervisor after this one. */
  recordPath: string;
}

function checkSize(cols: number, rows: number): void {
  if (![cols, rows].every((side) => side >= 1 && side <= MAX_SIDE)) {
    throw invalidArgument(`cols and rows must be from 1 to ${MAX_SIDE}`);
  }
}

function checkVariables(env: Readonly<Record<string, string>>): void {
  const entries = Object.entries(env);
  if (entries.some(([name, value]) => !/^[^=\0]+$/.test(name) || value.includes("\0"))) {
    throw invalidArgument("env holds a name or value that no variable can have");
  }
  const bytes = entries.reduce((sum, [name, value]) => sum + Buffer.byteLength(name) + Buffer.byteLength(value), 0);
  if (bytes > MAX_VARIABLE_BYTES) throw invalidArgument(`env is larger than ${MAX_VARIABLE_BYTES} bytes`);
}

function checkAnnotations(annotations: Readonly<Record<string, string>>): void {
  const entries = Object.entries(annotations);
  const tooLong = entries.some(
    ([key, value]) => key.length > MAX_KEY_CHARACTERS || value.length > MAX_VALUE_CHARACTERS,
  );
  if (tooLong || entries.length > MAX_ANNOTATIONS) {
    const each = `keys up to ${MAX_KEY_CHARACTERS} and values up to ${MAX_VALUE_CHARACTERS} characters`;
    throw invalidArgument(`annotations: at most ${MAX_ANNOTATIONS}, ${each}`);
  }
}

async function checkShell(path: string): Promise<void> {
  if (isAbsolute(path) && !path.includes("\0") && (await isExecutable(path))) return;
  throw invalidArgument("shell is not the absolute path of an executable");
}

/** The terminals of an environment. They end with the supervisor; one that was killed leaves the rest to the next. */
export class Terminals {
  readonly #settings: TerminalSettings;
  /** Live ones and those that ended lately, oldest first. */
  readonly #terminals = new Map<string, Terminal>();
  #starting = 0;
  #isStopping = false;

  constructor(settings: TerminalSettings) {
    this.#settings = settings;
  }

  /** Shells that an earlier supervisor left, to be hung up. */
  open(): ProcessRef[] {
    return recordedSessions(this.#settings.recordPath);
  }

  /** `directory` is absolute. The answer is the id. */
  async create(request: CreateTerminalRequest, directory: string): Promise<string> {
    const { initialCols, initialRows, env, annotations } = request;
    const [cols, rows] = [initialCols || DEFAULT_COLS, initialRows || DEFAULT_ROWS];
    const file = request.shell || this.#settings.shell;
    checkSize(cols, rows);
    checkVariables(env);
    checkAnnotations(annotations);
    await checkShell(file);
    await checkDirectory(directory);
    if (this.#isStopping) throw new ConnectError("the environment is stopping", Code.Unavailable);
    const variables = this.#settings.environment({ ...DISPLAY, ...env });
    return await this.#start({ file, cwd: directory, env: variables, cols, rows }, annotations);
  }

  async #start(command: PtyCommand, annotations: Record<string, string>): Promise<string> {
    if (this.#live.length + this.#starting >= MAX_LIVE) {
      throw new ConnectError(`${MAX_LIVE} terminals are open already`, Code.ResourceExhausted);
    }
    this.#starting++;
    try {
      const terminal = await Terminal.start(command, annotations);
      this.#terminals.set(terminal.id, terminal);
      this.#record();
      void terminal.ended.then(() => this.#retire(terminal));
      return terminal.id;
    } finally {
      this.#starting--;
    }
  }

  /** NOT_FOUND if there is none, or it ended too long ago. */
  get(id: string): Terminal {
    const terminal = this.#terminals.get(id);
    if (!terminal) throw new ConnectError("there is no such terminal", Code.NotFound);
    return terminal;
  }

  resize(id: string, cols: number, rows: number): void {
    const terminal = this.get(id);
    checkSize(cols, rows);
    terminal.resize(cols, rows);
  }

  list(): TerminalInfo[] {
    return [...this.#terminals.values()].map(({ info }) => info);
  }

  /** Refuses new ones and ends the others; resolves when their shells have ended. */
  async stopAll(): Promise<void> {
    this.#isStopping = true;
    await Promise.allSettled(this.#live.map((terminal) => terminal.stop()));
  }

  get #live(): Terminal[] {
    return [...this.#terminals.values()].filter(({ isLive }) => isLive);
  }

  #retire(terminal: Terminal): void {
    this.#record();
    setTimeout(() => this.#terminals.delete(terminal.id), ENDED_KEPT_MS).unref();
    const ended = [...this.#terminals.values()].filter(({ isLive }) => !isLive);
    for (const { id } of ended.slice(0, -MAX_ENDED)) this.#terminals.delete(id);
  }

  #record(): void {
    const leaders = this.#live.flatMap(({ leader }) => leader ?? []);
    recordSessions(this.#settings.recordPath, leaders);
  }
}
