import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import {
  type Service,
  ServicePhase,
  type ServiceSpec,
  ServiceSpecSchema,
  type ServiceStatus,
  ServiceStatusSchema,
} from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { LineLog, lineBatches } from "./line-log.ts";
import { newLogFolder } from "./log-folders.ts";
import { killMarked } from "./marked.ts";
import { CommandProblem, endRun, endText, keyOf, outputOf, Signal, type Surroundings } from "./parts.ts";
import type { Records } from "./records.ts";
import { Run, type RunEnd } from "./run.ts";
import { type AutomationCommand, forgetRun, type RunPlace, type Target } from "./start.ts";
import { isOfDevContainer, targetOf } from "./targets.ts";

const { STARTING, RUNNING, STOPPING, STOPPED, FAILED, DELETED } = ServicePhase;

const SESSIONS_KEPT = 5;
const UP: ReadonlySet<ServicePhase> = new Set([STARTING, RUNNING, STOPPING]);

/** What is remembered of a service: the session that was started last, and how it fares. */
export interface ServiceRecord {
  reference: string;
  session: string;
  phase: ServicePhase;
  failureMessage: string;
  logUrl: string;
  output: Record<string, string>;
  /** Definition that the session was started with, as base64 of the message. */
  spec: string;
  spawnedAt: number;
  runningAt: number;
  /** Trigger or person that the session was started by. */
  startedBy?: string;
  /** Result of a stop that was under way for another reason than a wish. */
  verdict?: string;
}

/** What is wanted of a service. */
export interface ServiceWish {
  service: Service;
  startedBy: string;
}

/**
 * One service: compares the session that is wanted with the one it started last, and takes the next step. Every step is
 * written down before it is taken; a service is found again by whoever comes after a supervisor that died.
 */
export class ServiceMachine {
  readonly id: string;
  readonly #around: Surroundings;
  readonly #records: Records<ServiceRecord>;
  readonly #tell: (status: ServiceStatus) => void;
  readonly #news = new Signal();
  readonly #ended: Promise<void>;
  #record: ServiceRecord | undefined;
  #wish: ServiceWish | undefined;
  #isReady: (wish: ServiceWish) => boolean;
  #isRemoved = false;
  #isClosing = false;
  #listeners = new Set<() => void>();

  constructor(
    id: string,
    around: Surroundings,
    records: Records<ServiceRecord>,
    options: { isReady: (wish: ServiceWish) => boolean; tell: (status: ServiceStatus) => void },
  ) {
    this.id = id;
    this.#around = around;
    this.#records = records;
    this.#record = records.read(id);
    this.#isReady = options.isReady;
    this.#tell = options.tell;
    this.#ended = this.#work().catch((error: unknown) => around.unforeseen(error));
  }

  /** The service as it should be. */
  want(wish: ServiceWish): void {
    this.#wish = wish;
    this.#news.set();
  }

  /** Something changed that may let it begin. */
  wake(): void {
    this.#news.set();
  }

  /** Kills what runs, without its stop command, and forgets it. */
  async remove(): Promise<void> {
    this.#isRemoved = true;
    this.#news.set();
    await this.#ended;
  }

  /** Stops what runs, as the environment does; what is wanted afterwards no longer counts. */
  async close(): Promise<void> {
    this.#isClosing = true;
    this.#news.set();
    await this.#ended;
  }

  /** The status, if the service ever ran. */
  get status(): ServiceStatus | undefined {
    return this.#record && statusOf(this.#record);
  }

  /** A start is wanted and has not been taken over yet. */
  get isPending(): boolean {
    const spec = this.#wish?.service.spec;
    return spec?.desiredPhase === RUNNING && spec.session !== this.#record?.session;
  }

  /** It is at work in the dev container. */
  get isInDevContainer(): boolean {
    const record = this.#record;
    return record !== undefined && UP.has(record.phase) && isOfDevContainer(specOf(record).runsOn, record.startedBy);
  }

  /** Calls back at each change; returns how to leave. */
  follow(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async #work(): Promise<void> {
    if (this.#record && UP.has(this.#record.phase)) await this.#resume(this.#record);
    else if (this.#record) this.#emit();
    for (;;) {
      const news = this.#news.takeBack();
      if (this.#isRemoved) return this.#forget();
      if (this.#isClosing) return;
      const wish = this.#wish;
      const desired = wish?.service.spec?.desiredPhase;
      if (wish && desired === RUNNING && this.isPending && this.#isReady(wish)) await this.#run(wish);
      else if (wish && desired === DELETED) {
        this.#tell(create(ServiceStatusSchema, { ...(this.status ?? this.#blank(wish)), phase: DELETED }));
        return this.#forget();
      } else await news;
    }
  }

  #blank({ service }: ServiceWish): ServiceStatus {
    return create(ServiceStatusSchema, { session: service.spec?.session ?? "" });
  }

  #forget(): void {
    // What went on in the background after the start command had ended.
    if (this.#record) killMarked(this.#place(this.#record, "start").mark);
    if (this.#record) this.#forgetRuns(this.#record);
    this.#records.remove(this.id);
    this.#record = undefined;
    for (const listener of this.#listeners) listener();
  }

  #set(change: Partial<ServiceRecord>): ServiceRecord {
    const record = { ...(this.#record as ServiceRecord), ...change };
    this.#record = record;
    try {
      this.#records.write(this.id, record);
    } catch (error) {
      // On a full disk the service goes on; only a restart of the supervisor would find an older picture.
      this.#around.unforeseen(error);
    }
    this.#emit();
    return record;
  }

  #emit(): void {
    if (this.#record) this.#tell(statusOf(this.#record));
    for (const listener of this.#listeners) listener();
  }

  #key(record: ServiceRecord): string {
    return keyOf(this.id, record.session);
  }

  #place(record: ServiceRecord, part: "start" | "ready" | "stop"): RunPlace {
    const mark = `${this.#key(record)}-${part}`;
    return { folder: join(this.#around.state, "runs", mark), mark };
  }

  #forgetRuns(record: ServiceRecord): void {
    for (const part of ["start", "stop"] as const) {
      const { folder } = this.#place(record, part);
      void forgetRun(this.#around, folder).catch((error: unknown) => this.#around.unforeseen(error));
    }
  }

  #log(record: ServiceRecord): LineLog {
    return new LineLog(newLogFolder(join(this.#around.logs, "services", this.id), this.#key(record), SESSIONS_KEPT));
  }

  #target(record: ServiceRecord): Target {
    return targetOf(this.#around, specOf(record).runsOn, record.startedBy);
  }

  #command(record: ServiceRecord, text: string): AutomationCommand {
    const own = { BERTH_AUTOMATION: record.reference, BERTH_SESSION: record.session };
    return { text, env: specOf(record).env, own };
  }

  async #run({ service, startedBy }: ServiceWish): Promise<void> {
    const spec = service.spec as ServiceSpec;
    const record: ServiceRecord = {
      reference: service.metadata?.reference ?? "",
      session: spec.session,
      phase: STARTING,
      failureMessage: "",
      logUrl: this.#around.logUrl(`services/${this.id}/${keyOf(this.id, spec.session)}`),
      output: {},
      spec: Buffer.from(toBinary(ServiceSpecSchema, spec)).toString("base64"),
      spawnedAt: 0,
      runningAt: 0,
      startedBy,
    };
    this.#record = record;
    const log = this.#log(record);
    log.reopen();
    try {
      this.#records.write(this.id, record);
      this.#emit();
      const lines = lineBatches((batch) => log.write(batch));
      const run = await this.#startMain(record, lines.write).catch((error: unknown) => {
        lines.end();
        throw error;
      });
      if (!run) return this.#finish({ code: 0 });
      void run.ended.then(lines.end);
      const started = this.#set({ spawnedAt: Date.now() });
      if (!spec.commands?.ready) this.#set({ phase: RUNNING, runningAt: Date.now() });
      await this.#follow(this.#record ?? started, run, log);
    } catch (error) {
      this.#finish({ code: undefined }, problemOf("the start command cannot be started", error));
    } finally {
      log.end();
    }
  }

  /** Undefined if it is not wanted any more before it runs: an image may take its time to come. */
  async #startMain(record: ServiceRecord, take: (chunk: Buffer) => void): Promise<Run | undefined> {
    const command = this.#command(record, specOf(record).commands?.start ?? "");
    const [asked, begun] = [new AbortController(), Promise.withResolvers<void>()];
    const watch = async () => {
      for (let isOver = false; !isOver; ) {
        const news = this.#news.takeBack();
        if (this.#stopReason) return asked.abort();
        isOver = await Promise.race([news.then(() => false), begun.promise.then(() => true)]);
      }
    };
    const watching = watch();
    try {
      return await this.#target(record).start(this.#place(record, "start"), command, take, asked.signal);
    } catch (error) {
      if (asked.signal.aborted) return undefined;
      throw error;
    } finally {
      begun.resolve();
      await watching;
    }
  }

  /** Finds a session that another supervisor left. */
  async #resume(record: ServiceRecord): Promise<void> {
    const log = this.#log(record);
    const lines = lineBatches((batch) => log.write(batch));
    const { folder, mark } = this.#place(record, "start");
    const found = Run.adopt(folder, mark, lines.write);
    this.#emit();
    try {
      if (found instanceof Run) {
        void found.ended.then(lines.end);
        await this.#follow(record, found, log);
      } else if (record.phase === STOPPING) {
        await this.#killStop(record);
        this.#finish(found ?? { code: 0 }, record.verdict);
      } else {
        this.#finish(found ?? { code: undefined });
      }
    } finally {
      log.end();
    }
  }

  get #stopReason(): string | undefined {
    if (this.#isRemoved) return "removed";
    if (this.#isClosing) return "closing";
    const spec = this.#wish?.service.spec;
    // Nothing is known yet of what is wanted.
    if (!spec) return undefined;
    return spec.desiredPhase !== RUNNING || spec.session !== this.#record?.session ? "wanted" : undefined;
  }

  async #follow(record: ServiceRecord, run: Run, log: LineLog): Promise<void> {
    const output = outputOf(run, (problem) => log.write([problem]));
    const ended = run.ended.then((end) => ({ end }));
    const attempts = new AbortController();
    const ready = record.phase === STARTING ? this.#untilReady(record, log, attempts.signal) : undefined;
    const look = setInterval(() => {
      const values = output();
      if (values) this.#set({ output: values });
    }, this.#around.times.outputMs);
    try {
      for (let waitsForReady = ready !== undefined; ; ) {
        const news = this.#news.takeBack();
        const current = this.#record as ServiceRecord;
        if (current.phase === STOPPING || this.#stopReason) return await this.#stop(current, run, log);
        const what = await Promise.race([
          ended,
          news.then(() => ({ end: undefined, ready: undefined })),
          ...(waitsForReady && ready ? [ready.then((result) => ({ ready: result }))] : []),
        ]);
        if ("end" in what && what.end) {
          await this.#shown();
          const values = output();
          if (values) this.#set({ output: values });
          return this.#finish(what.end);
        }
        if (!("ready" in what) || what.ready === undefined) continue;
        waitsForReady = false;
        if (what.ready === "ready") this.#set({ phase: RUNNING, runningAt: Date.now() });
        else return await this.#stop(this.#set({ verdict: what.ready }), run, log);
      }
    } finally {
      attempts.abort();
      clearInterval(look);
    }
  }

  /** People get to see that a service ran, however short that was. */
  async #shown(): Promise<void> {
    const record = this.#record as ServiceRecord;
    if (specOf(record).commands?.ready || record.phase !== RUNNING) return;
    const left = record.runningAt + this.#around.times.shownRunningMs - Date.now();
    if (left > 0) await delay(left);
  }

  #finish(end: RunEnd, verdict?: string): void {
    const record = this.#record as ServiceRecord;
    const failureMessage = verdict ?? (end.code === 0 ? "" : endText("the start command", end));
    this.#set({ phase: failureMessage ? FAILED : STOPPED, failureMessage, verdict: undefined });
    this.#forgetRuns(record);
  }

  /** Resolves with "ready", or with why it never will be; never after the signal. */
  async #untilReady(record: ServiceRecord, log: LineLog, signal: AbortSignal): Promise<string> {
    const { commands, readinessTimeout } = specOf(record);
    const limitMs = readinessTimeout ? durationMs(readinessTimeout) : 0;
    const until = limitMs > 0 ? record.spawnedAt + limitMs : Number.POSITIVE_INFINITY;
    const { mark } = this.#place(record, "ready");
    killMarked(mark);
    for (let last = ""; ; ) {
      const attempt = await this.#attempt(record, commands?.ready ?? "", mark, until, signal);
      if (signal.aborted) return await new Promise<never>(() => undefined);
      if (attempt.code === 0) return "ready";
      // One that is cut off before it says anything explains nothing.
      last = attempt.text || last;
      const pause = Math.min(this.#around.times.readyPauseMs, until - Date.now());
      if (pause > 0) await delay(pause, undefined, { signal }).catch(() => undefined);
      if (signal.aborted) return await new Promise<never>(() => undefined);
      if (Date.now() < until) continue;
      log.write(last.split("\n").filter(Boolean));
      return `the service was not ready within ${limitMs / 1000} seconds`;
    }
  }

  async #attempt(record: ServiceRecord, text: string, mark: string, until: number, signal: AbortSignal) {
    try {
      const main = this.#place(record, "start");
      return await this.#target(record).attempt(main, mark, this.#command(record, text), { until, signal });
    } catch (error) {
      return { code: 1, text: problemOf("the ready command cannot be started", error) };
    }
  }

  async #stop(record: ServiceRecord, run: Run, log: LineLog): Promise<void> {
    const { serviceStopMs } = this.#around.times;
    if (this.#isRemoved) {
      await run.kill();
      return;
    }
    const stopCommand = specOf(record).commands?.stop;
    this.#set({ phase: STOPPING });
    const verdict = stopCommand
      ? await this.#stopByCommand(record, stopCommand, run, log)
      : (await endRun(run, serviceStopMs))
        ? undefined
        : `the service did not end within ${serviceStopMs / 1000} seconds and was killed`;
    this.#finish({ code: 0 }, record.verdict ?? verdict);
  }

  /** Runs the stop command, or finds it running; undefined if it went well. */
  async #stopByCommand(record: ServiceRecord, text: string, run: Run, log: LineLog): Promise<string | undefined> {
    const { serviceStopMs } = this.#around.times;
    const place = this.#place(record, "stop");
    const lines = lineBatches((batch) => log.write(batch));
    let verdict: string | undefined;
    try {
      const stop =
        Run.adopt(place.folder, place.mark, lines.write) ??
        (await this.#target(record).startBeside(
          this.#place(record, "start"),
          place,
          this.#command(record, text),
          lines.write,
        ));
      const late = new AbortController();
      const timeout = delay(serviceStopMs, undefined, { signal: late.signal }).catch(() => undefined);
      const end = stop instanceof Run ? await Promise.race([stop.ended, timeout]) : stop;
      late.abort();
      if (!end) {
        if (stop instanceof Run) await stop.kill();
        verdict = `the stop command did not end within ${serviceStopMs / 1000} seconds; everything was killed`;
      } else if (end.code !== 0) verdict = endText("the stop command", end);
    } catch (error) {
      verdict = problemOf("the stop command cannot be started", error);
    }
    lines.end();
    await run.kill();
    return verdict;
  }

  async #killStop(record: ServiceRecord): Promise<void> {
    const { folder, mark } = this.#place(record, "stop");
    const found = Run.adopt(folder, mark, () => undefined);
    if (found instanceof Run) await found.kill();
  }
}

const specOf = ({ spec }: ServiceRecord): ServiceSpec => fromBinary(ServiceSpecSchema, Buffer.from(spec, "base64"));

const statusOf = ({ phase, session, failureMessage, logUrl, output }: ServiceRecord): ServiceStatus =>
  create(ServiceStatusSchema, { phase, session, failureMessage, logUrl, output });

/** What kept a command from running, for people. */
export function problemOf(what: string, error: unknown): string {
  if (error instanceof CommandProblem) return error.message;
  const reason = error instanceof Error && "code" in error ? String(error.code) : "unexpected";
  return `${what} (${reason})`;
}
