import { randomBytes } from "node:crypto";
import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { mkdir, rm, rmdir, writeFile } from "node:fs/promises";
import { Socket } from "node:net";
import { basename, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { RunsOn_Docker } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { errnoOf } from "../errors.ts";
import { isAlive, type ProcessRef, readProcess } from "../processes.ts";
import { killMarked } from "./marked.ts";
import { CommandProblem, type Surroundings } from "./parts.ts";
import { makePipes, OUTPUT_FILE, Run, SHARED_FILES, sharedFolder } from "./run.ts";
import { GIVEN_PIPE, givenScript, OUTPUT_PIPE } from "./shim.ts";
import {
  type Attempt,
  type AutomationCommand,
  CONTAINER_FILE,
  lastWords,
  type RunPlace,
  resolvedVariables,
  type TakeOutput,
  type Target,
} from "./start.ts";

const GIVE_MS = 30_000;
const ENDED_EARLY = "the container has ended before its command began";
const POLL_MS = 20;
const VARIABLE = /^[A-Za-z_][A-Za-z0-9_]*$/;

/**
 * A container of an image, one for each command that is started and shared by those beside it. The runner starts it, with
 * a shell that waits; this process writes it down, then gives it the command and its variables, so that a command whose
 * container nobody knows of never begins.
 */
export class ContainerTarget implements Target {
  readonly #around: Surroundings;
  readonly #docker: RunsOn_Docker;

  constructor(around: Surroundings, docker: RunsOn_Docker) {
    this.#around = around;
    this.#docker = docker;
  }

  async start(place: RunPlace, command: AutomationCommand, take: TakeOutput, signal: AbortSignal): Promise<Run> {
    const { containers } = this.#around;
    const { folder } = place;
    const run = basename(folder);
    const variables = await this.#variables(command);
    await mkdir(folder, { recursive: true, mode: 0o700 });
    // From here on the runner keeps what it finds of it.
    await writeFile(join(folder, CONTAINER_FILE), "", { mode: 0o600 });
    try {
      const { pid, shared } = await containers.start(run, this.#docker.image, { onOutput: take, signal });
      return await this.#begin({ ...place, shared }, pid, { ...command, variables }, take);
    } catch (error) {
      containers.remove(run);
      throw error;
    }
  }

  async startBeside(main: RunPlace, place: RunPlace, command: AutomationCommand, take: TakeOutput): Promise<Run> {
    return await this.#beside(main, place, command, take);
  }

  async attempt(
    main: RunPlace,
    mark: string,
    command: AutomationCommand,
    { until, signal }: { until: number; signal: AbortSignal },
  ): Promise<Attempt> {
    const said = lastWords();
    const run = await this.#beside(main, { folder: join(main.folder, "attempt"), mark }, command, said.take);
    const end = new AbortController();
    const cut = AbortSignal.any([signal, end.signal]);
    const left = Number.isFinite(until) ? Math.max(0, until - Date.now()) : undefined;
    const late = left === undefined ? aborted(cut) : delay(left, undefined, { signal: cut }).catch(() => undefined);
    const first = await Promise.race([run.ended, late]);
    end.abort();
    if (!first) await run.kill();
    await removeShared(run.shared);
    return { code: first?.code ?? 128, text: said.text() };
  }

  async #beside(
    main: RunPlace,
    { folder, mark }: RunPlace,
    command: AutomationCommand,
    take: TakeOutput,
  ): Promise<Run> {
    const variables = await this.#variables(command);
    // Of an attempt before, or of one whose supervisor died. A supervisor in a user namespace sees no marks in containers.
    const before = Run.adopt(folder, mark, () => undefined);
    if (before instanceof Run) await before.kill();
    killMarked(mark);
    await mkdir(folder, { recursive: true, mode: 0o700 });
    // Always another one: what the container has put there is not touched.
    const part = randomBytes(6).toString("hex");
    const shared = join(sharedFolder(main.folder), part);
    await mkdir(shared, { mode: 0o700 });
    await makePipes(shared, [OUTPUT_PIPE, GIVEN_PIPE], this.#around.variables({}).PATH);
    const pid = await this.#around.containers.exec(basename(main.folder), part, mark);
    return await this.#begin({ folder, mark, shared }, pid, { ...command, variables }, take);
  }

  async #begin(
    place: RunPlace & { shared: string },
    pid: number,
    { text, variables }: { text: string; variables: Readonly<Record<string, string>> },
    take: TakeOutput,
  ): Promise<Run> {
    const found = readProcess(pid);
    if (!found) throw new CommandProblem(ENDED_EARLY);
    const leader = { pid, startTime: found.startTime };
    const run = Run.begin({ ...place, leader }, take);
    const own = { BERTH_OUTPUT: join(place.shared, OUTPUT_FILE), BERTH_RUN: place.mark };
    const given = givenScript({ ...variables, ...own }, text);
    await give(join(place.shared, GIVEN_PIPE), given, leader);
    return run;
  }

  /** The only ones that a container gets beside those of its image. */
  async #variables({ env, own }: AutomationCommand): Promise<Record<string, string>> {
    const present = this.#around.variables({});
    const copied = this.#docker.environment.flatMap((entry) => {
      const [name = ""] = entry.split("=", 1);
      const value = entry.includes("=") ? entry.slice(name.length + 1) : present[name];
      if (!VARIABLE.test(name))
        throw new CommandProblem(`runs_on.docker.environment: ${name} is no name of a variable`);
      return value === undefined ? [] : [[name, value]];
    });
    return { ...(await resolvedVariables(this.#around, env)), ...Object.fromEntries(copied), ...own };
  }
}

/** Removes what a short command was given, nothing else. */
async function removeShared(folder: string): Promise<void> {
  for (const name of SHARED_FILES) await rm(join(folder, name), { force: true });
  await rmdir(folder).catch(() => undefined);
}

const aborted = (signal: AbortSignal) =>
  new Promise<undefined>((resolve) => {
    if (signal.aborted) resolve(undefined);
    signal.addEventListener("abort", () => resolve(undefined), { once: true });
  });

/** Writes to a pipe that a process reads from; nothing of it is on disk. Rejects if it goes, or does not read in time. */
async function give(pipe: string, text: string, reader: ProcessRef): Promise<void> {
  const until = Date.now() + GIVE_MS;
  const descriptor = await opened(pipe, reader, until);
  const socket = new Socket({ fd: descriptor, readable: false, writable: true });
  socket.setTimeout(GIVE_MS, () => socket.destroy(new Error("the command was not read in time")));
  await new Promise<void>((resolve, reject) => {
    socket.once("error", reject);
    socket.once("close", () => resolve());
    socket.end(text);
  });
}

async function opened(pipe: string, reader: ProcessRef, until: number): Promise<number> {
  for (;;) {
    try {
      const descriptor = openSync(pipe, constants.O_WRONLY | constants.O_NONBLOCK | constants.O_NOFOLLOW);
      if (fstatSync(descriptor).isFIFO()) return descriptor;
      closeSync(descriptor);
      throw new CommandProblem("the container has replaced the pipe of its command");
    } catch (error) {
      // Nobody has opened its other end yet.
      if (errnoOf(error) !== "ENXIO") throw error;
    }
    if (!isAlive(reader)) throw new CommandProblem(ENDED_EARLY);
    if (Date.now() > until) throw new CommandProblem("the container did not take its command in time");
    await delay(POLL_MS);
  }
}
