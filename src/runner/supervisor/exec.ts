import type { ChildProcess } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import type { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  type ExecRequest,
  type ExecResponse,
  ExecResponseSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { invalidArgument } from "./errors.ts";
import type { ExecJournal, ExecRecord } from "./exec-journal.ts";
import { checkDirectory } from "./files.ts";
import { BoundedOutput } from "./output.ts";
import {
  exitCodeOf,
  type ProcessEnd,
  type ProcessRef,
  processEnd,
  readProcess,
  spawnSession,
  terminateSession,
} from "./processes.ts";

const HARD_LIMIT_MS = 24 * 60 * 60 * 1000;
const DRAIN_MS = 1000;
const MAX_RUNNING = 100;
const MAX_BACKGROUND = 200;
const EXIT_TIMED_OUT = 124;
const EXIT_CANCELLED = 130;

interface Command {
  text: string;
  /** Absolute. */
  directory: string;
  timeoutMs: number;
}

type StopReason = "timeout" | "cancel" | "shutdown";

/** One command from its start to its result. */
interface Execution {
  fingerprint: string;
  result: Promise<ExecResponse>;
  stop(reason: StopReason): void;
}

const digest = (text: string) => createHash("sha256").update(text).digest("hex");

function collect(stream: Readable | null): BoundedOutput {
  const output = new BoundedOutput();
  stream?.on("data", (chunk: Buffer) => output.write(chunk));
  stream?.on("error", () => undefined);
  return output;
}

function exitCode(end: ProcessEnd | undefined, reason: StopReason | undefined): number {
  if (reason === "timeout") return EXIT_TIMED_OUT;
  if (reason === "cancel") return EXIT_CANCELLED;
  return exitCodeOf(end ?? { code: null, signal: "SIGKILL" });
}

function withTimeoutLine(stderr: string, timeoutMs: number): string {
  const separator = stderr === "" || stderr.endsWith("\n") ? "" : "\n";
  return `${stderr}${separator}command timed out after ${timeoutMs / 1000} s\n`;
}

const closed = (stream: Readable) => new Promise((resolve) => stream.once("close", resolve));

/** Runs commands for Exec. An operation id runs once; its result is kept by the journal. */
export class Execs {
  readonly #journal: ExecJournal;
  readonly #environment: () => Record<string, string>;
  readonly #running = new Map<string, Execution>();
  #background: Readable[] = [];
  #stopping = false;

  constructor(journal: ExecJournal, environment: () => Record<string, string>) {
    this.#journal = journal;
    this.#environment = environment;
  }

  get runningCount(): number {
    return this.#running.size;
  }

  /** Waits for the command to end; the caller may go away and ask again with the same operation id. */
  async exec(request: ExecRequest, directory: string): Promise<ExecResponse> {
    const { operationId, command: text, timeoutSeconds } = request;
    if (text === "" || text.includes("\0")) throw invalidArgument("command is empty or contains NUL");
    if (timeoutSeconds < 0) throw invalidArgument("timeout_seconds is negative");
    const timeoutMs = timeoutSeconds === 0 ? HARD_LIMIT_MS : Math.min(timeoutSeconds * 1000, HARD_LIMIT_MS);
    const remembered = operationId !== "";
    const key = remembered ? digest(operationId) : randomBytes(32).toString("hex");
    const fingerprint = digest(JSON.stringify([text, directory]));
    const known = this.#running.get(key) ?? this.#journal.find(key);
    if (known && known.fingerprint !== fingerprint) {
      throw new ConnectError("operation_id was used for another command or directory", Code.AlreadyExists);
    }
    if (known) return "result" in known ? await known.result : await this.#stored(known);
    if (this.#stopping) throw new ConnectError("the environment is stopping", Code.Unavailable);
    if (this.#running.size >= MAX_RUNNING) {
      throw new ConnectError(`${MAX_RUNNING} commands are running already`, Code.ResourceExhausted);
    }
    const execution = this.#start(key, fingerprint, { text, directory, timeoutMs }, remembered);
    this.#running.set(key, execution);
    return await execution.result;
  }

  cancel(operationId: string): void {
    this.#running.get(digest(operationId))?.stop("cancel");
  }

  /** Refuses new commands and ends the running ones; resolves when all have their result. */
  async stopAll(): Promise<void> {
    this.#stopping = true;
    const running = [...this.#running.values()];
    for (const execution of running) execution.stop("shutdown");
    await Promise.allSettled(running.map(({ result }) => result));
  }

  async #stored(record: ExecRecord): Promise<ExecResponse> {
    const result = record.state === "done" ? await this.#journal.result(record.key) : undefined;
    if (result) return result;
    throw new ConnectError("the supervisor lost this command or its result; it was not run again", Code.Aborted);
  }

  #start(key: string, fingerprint: string, command: Command, remembered: boolean): Execution {
    const stopping = new AbortController();
    const result = this.#run(key, fingerprint, command, remembered, stopping.signal).finally(() => {
      this.#running.delete(key);
    });
    return { fingerprint, result, stop: (reason) => stopping.abort(reason) };
  }

  async #run(
    key: string,
    fingerprint: string,
    command: Command,
    remembered: boolean,
    stopping: AbortSignal,
  ): Promise<ExecResponse> {
    await checkDirectory(command.directory);
    const record = this.#begin(key, fingerprint, remembered);
    let response: ExecResponse;
    try {
      response = await this.#runProcess(command, stopping, (leader) => record && this.#journal.started(record, leader));
    } catch (error) {
      this.#journal.forget(key);
      throw error;
    }
    if (record && remembered) await this.#journal.finish(record, response);
    else this.#journal.forget(key);
    return response;
  }

  // On a full disk a command without operation id still runs: it may be the one that makes room.
  #begin(key: string, fingerprint: string, remembered: boolean): ExecRecord | undefined {
    try {
      return this.#journal.begin(key, fingerprint);
    } catch (error) {
      if (remembered) throw error;
      return undefined;
    }
  }

  async #runProcess(
    { text, directory, timeoutMs }: Command,
    stopping: AbortSignal,
    started: (leader: ProcessRef) => void,
  ): Promise<ExecResponse> {
    const child = spawnSession("/bin/sh", ["-c", text], { cwd: directory, env: this.#environment() });
    const exit = processEnd(child);
    const leader = child.pid === undefined ? undefined : readProcess(child.pid);
    if (leader) started({ pid: leader.pid, startTime: leader.startTime });
    const [stdout, stderr] = [collect(child.stdout), collect(child.stderr)];

    let reason: StopReason | undefined;
    let termination: Promise<boolean> | undefined;
    // A process the kernel cannot end must not keep its caller waiting, so the end of the termination counts as well.
    const terminated = new Promise<undefined>((resolve) => {
      const interrupt = (why: StopReason) => {
        if (reason || !leader) return;
        reason = why;
        termination = terminateSession(leader);
        void termination.then(() => setTimeout(() => resolve(undefined), DRAIN_MS));
      };
      const timer = setTimeout(interrupt, timeoutMs, "timeout");
      exit.catch(() => undefined).finally(() => clearTimeout(timer));
      stopping.addEventListener("abort", () => interrupt(stopping.reason));
      if (stopping.aborted) interrupt(stopping.reason);
    });
    const end = await Promise.race([exit, terminated]);
    await termination;
    await this.#drain(child);
    const errors = stderr.text();
    return create(ExecResponseSchema, {
      exitCode: exitCode(end, reason),
      stdout: stdout.text(),
      stderr: reason === "timeout" ? withTimeoutLine(errors, timeoutMs) : errors,
    });
  }

  /** What is in the pipes belongs to the result; a background child that holds them open does not delay it. */
  async #drain(child: ChildProcess): Promise<void> {
    const streams = [child.stdout, child.stderr].filter((stream) => stream !== null);
    const open = streams.filter((stream) => !stream.closed);
    await Promise.race([Promise.all(open.map(closed)), delay(DRAIN_MS)]);
    const held = streams.filter((stream) => !stream.closed);
    if (held.length === 0) return;
    // Reading on keeps the background child from being ended by SIGPIPE.
    for (const stream of held) stream.removeAllListeners("data").resume();
    this.#background.push(...held);
    this.#background = this.#background.filter((stream) => !stream.closed);
    while (this.#background.length > MAX_BACKGROUND) this.#background.shift()?.destroy();
  }
}
