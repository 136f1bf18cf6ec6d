import { randomUUID } from "node:crypto";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  type AttachTerminalResponseSchema,
  type TerminalInfo,
  TerminalInfoSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { failedPrecondition } from "./errors.ts";
import { exitCodeOf, type ProcessRef, readProcess, terminateSession } from "./processes.ts";
import { Pty, type PtyCommand } from "./pty.ts";
import { TerminalOutput } from "./terminal-output.ts";

/** Time between the hangup and the kill of a terminal that is closed. */
export const CLOSE_GRACE_MS = 5_000;

/** A shell on its terminal, what it has shown, and who reads that. */
export class Terminal {
  readonly id = randomUUID();
  readonly #createdAt = new Date();
  readonly #annotations: Record<string, string>;
  readonly #pty: Pty;
  readonly #output: TerminalOutput;
  /** The shell as a process; undefined if it was over too soon to be seen. */
  readonly leader: ProcessRef | undefined;
  readonly #size: PtyCommand;
  #exitCode: number | undefined;
  #closing: Promise<void> | undefined;
  /** Resolves when the shell has ended and all its output is there. */
  readonly ended: Promise<void>;

  private constructor(pty: Pty, output: TerminalOutput, command: PtyCommand, annotations: Record<string, string>) {
    this.#pty = pty;
    this.#output = output;
    this.#size = { ...command };
    this.#annotations = annotations;
    const started = readProcess(pty.pid);
    this.leader = started && { pid: started.pid, startTime: started.startTime };
    this.ended = pty.ended.then((end) => {
      this.#exitCode = exitCodeOf(end);
      output.complete();
    });
  }

  /** Rejects as `Pty.start`. */
  static async start(command: PtyCommand, annotations: Record<string, string>): Promise<Terminal> {
    const output: TerminalOutput = new TerminalOutput((isFlowing) => (isFlowing ? pty.resume() : pty.pause()));
    const pty = await Pty.start(command, (chunk) => output.write(chunk));
    return new Terminal(pty, output, command, annotations);
  }

  get isLive(): boolean {
    return this.#exitCode === undefined;
  }

  get info(): TerminalInfo {
    const { file, cwd, cols, rows } = this.#size;
    return create(TerminalInfoSchema, {
      ...{ terminalId: this.id, shell: file, workingDirectory: cwd, cols, rows },
      createdAt: timestampFromDate(this.#createdAt),
      annotations: this.#annotations,
    });
  }

  /** Output until the shell has ended, from the oldest on unless that is to be skipped. */
  async *read(skipHistory: boolean, signal: AbortSignal): AsyncGenerator<Uint8Array> {
    using reader = this.#output.reader();
    if (!skipHistory && reader.replay.length > 0) yield reader.replay;
    yield* reader.rest(signal);
  }

  /** As `read`, for display: what there is and the size, then what comes, at last how the shell ended. */
  async *attach(signal: AbortSignal): AsyncGenerator<MessageInitShape<typeof AttachTerminalResponseSchema>> {
    using reader = this.#output.reader();
    const { cols, rows } = this.#size;
    yield { content: { case: "replay", value: { data: reader.replay, cols, rows } } };
    for await (const data of reader.rest(signal)) yield { content: { case: "data", value: { data } } };
    const exitCode = this.#exitCode;
    if (exitCode !== undefined) yield { content: { case: "exited", value: { exitCode } } };
  }

  write(data: Uint8Array): void {
    this.#requireLive();
    if (!this.#pty.write(data)) throw new ConnectError("the shell does not read its input", Code.ResourceExhausted);
  }

  resize(cols: number, rows: number): void {
    this.#requireLive();
    this.#pty.resize(cols, rows);
    Object.assign(this.#size, { cols, rows });
  }

  /** Hangs up, and kills what is left of the session 5 s later; resolves when the shell has ended. */
  async close(): Promise<void> {
    this.#requireLive();
    this.#closing ??= this.#terminate(CLOSE_GRACE_MS, "first");
    await this.#closing;
  }

  /** As `close`, with as much time for programs as a command has. */
  async stop(): Promise<void> {
    if (this.isLive) await this.#terminate(undefined, "last");
  }

  async #terminate(graceMs: number | undefined, hangUp: "first" | "last"): Promise<void> {
    const isGone = !this.leader || (await terminateSession(this.leader, graceMs, hangUp));
    if (!isGone) throw new ConnectError("the kernel does not end the terminal's processes", Code.DeadlineExceeded);
    await this.ended;
  }

  #requireLive(): void {
    if (!this.isLive) throw failedPrecondition("the terminal's shell has ended");
  }
}
