import { readdir, rmdir } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { isImageReference } from "../../domain/image-reference.ts";
import type { ClassSettings } from "../classes.ts";
import { CommandTimeout, runCommand } from "../commands.ts";
import { loginFolder } from "../devcontainer/registry-logins.ts";
import { exists, makeFolder } from "../files.ts";
import type { Host } from "../host.ts";
import { ownerOf } from "../machine.ts";
import type { EnvironmentPaths } from "../paths.ts";
import { markedProcesses } from "../supervisor/automation/marked.ts";
import { containerShim, GIVEN_PIPE, OUTPUT_PIPE } from "../supervisor/automation/shim.ts";
import { gate } from "../supervisor/gate.ts";
import { processLimit } from "../supervisor/process-limit.ts";
import { userOf } from "../supervisor/processes.ts";
import type { UnixUser } from "../users.ts";
import { type ContainerEngine, EngineError } from "./engine.ts";
import { ENVIRONMENT_LABEL, labelsOf } from "./labels.ts";

// The containers of one environment's services and tasks. Who asks for them is the environment's own supervisor, and so
// anybody in the environment: everything it says is checked, and a container gets no more than the environment has.

/** A problem for people. */
export class ContainerProblem extends Error {}

/** A container that waits for its command. */
export interface StartedContainer {
  /** Its first process as the host counts. */
  pid: number;
  /** Folder that both can see, with the pipes between them. */
  shared: string;
}

/** The environment, as far as its containers need it. */
export interface ContainerSite {
  readonly host: Pick<Host, "engines" | "config" | "log">;
  readonly id: string;
  readonly paths: EnvironmentPaths;
  readonly record: { user?: UnixUser };
  /** Primary checkout. */
  readonly folder: string;
  readonly settings: ClassSettings | undefined;
}

interface Starting {
  controller: AbortController;
  started: Promise<StartedContainer>;
  onOutput: (text: string) => void;
}

const RUN_LABEL = "berth.run";

const RUN = /^[0-9a-f]{24}(-start)?$/;
const PART = /^[0-9a-f]{12}$/;
const MARK = /^[0-9a-f]{24}-(ready|stop)$/;
const PULL_MS = 20 * 60_000;
const QUICK_MS = 20_000;
const SHELL_MS = 10_000;
const POLL_MS = 20;
/** Services and executions that an environment may have, and one step at a time of each. */
const MOST = 300;
const PULLS_AT_ONCE = 3;
const PULLS_WAITING = 1_000;

const pullGate = gate(PULLS_AT_ONCE, PULLS_WAITING);

/** Removes containers of a runner that belong to environments for which nobody is there to use them. */
export async function removeStrayRuns(
  engine: ContainerEngine,
  dataDir: string,
  isUp: (environmentId: string) => boolean,
): Promise<void> {
  for (const { name, labels } of await engine.list(labelsOf("automation", dataDir))) {
    if (!isUp(labels[ENVIRONMENT_LABEL] ?? "")) await engine.remove(name);
  }
}

/** What an environment has in containers. Only its own supervisor asks for them, and only while there is one. */
export class EnvironmentContainers {
  readonly #site: ContainerSite;
  readonly #starting = new Map<string, Starting>();
  /** Runs that may have a container. */
  readonly #present = new Set<string>();
  #isOpen = false;

  constructor(site: ContainerSite) {
    this.#site = site;
  }

  /** The environment is up: containers may be started. */
  open(): void {
    this.#isOpen = true;
  }

  /** Starts a container for a run, or finds the one that it has. Rejects with a ContainerProblem. */
  async start(run: string, image: string, onOutput: (text: string) => void): Promise<StartedContainer> {
    if (!RUN.test(run)) throw new ContainerProblem("is not the name of a run");
    if (!isImageReference(image)) throw new ContainerProblem("runs_on.docker.image is not an image reference");
    const known = this.#starting.get(run);
    if (known) {
      known.onOutput = onOutput;
      return await known.started;
    }
    if (this.#present.size >= MOST) throw new ContainerProblem(`an environment has at most ${MOST} containers`);
    this.#present.add(run);
    const controller = new AbortController();
    const starting: Starting = {
      controller,
      onOutput,
      started: this.#start(run, image, (text) => starting.onOutput(text), controller.signal),
    };
    this.#starting.set(run, starting);
    try {
      return await starting.started;
    } finally {
      this.#starting.delete(run);
    }
  }

  /** Starts a shell that waits for its command, beside what runs in a container; resolves with its pid. */
  async exec(run: string, part: string, mark: string): Promise<{ pid: number }> {
    if (![RUN.test(run), PART.test(part), MARK.test(mark)].every(Boolean)) {
      throw new ContainerProblem("is not the name of a run");
    }
    const engine = this.#site.host.engines.present ?? (await this.#engine());
    await explained("the command cannot be started in its container", async () => {
      await engine.exec(this.#name(run), {
        ...{ user: this.#user(), workingDirectory: this.#site.folder, variables: this.#marks(mark) },
        argv: ["sh", ...containerShim(join(this.#shared(run), part), false)],
      });
    });
    return { pid: await shellOf(mark) };
  }

  /** Kills and removes the container of a run, or keeps it from coming. */
  async remove(run: string): Promise<void> {
    if (!RUN.test(run)) return;
    const starting = this.#starting.get(run);
    starting?.controller.abort(new ContainerProblem("it is not wanted any more"));
    await starting?.started.catch(() => undefined);
    await this.#site.host.engines.present?.remove(this.#name(run));
    await this.#removeShared(run);
    this.#present.delete(run);
  }

  /** Removes the containers of all other runs. */
  async keepOnly(runs: readonly string[]): Promise<void> {
    const kept = new Set(runs);
    // Whatever is started from now on is in use as well.
    for (const run of [...this.#present]) if (!kept.has(run)) this.#present.delete(run);
    const isStray = (run: string) => !kept.has(run) && !this.#present.has(run);
    for (const [run, { controller }] of this.#starting) {
      if (isStray(run)) controller.abort(new ContainerProblem("it is not wanted any more"));
    }
    for (const { id, labels } of await this.#list()) {
      const run = labels[RUN_LABEL] ?? "";
      if (isStray(run)) await this.#site.host.engines.present?.remove(id);
      else this.#present.add(run);
    }
    const folders = await readdir(this.#folder).catch(() => []);
    for (const run of folders) if (isStray(run)) await this.#removeShared(run);
  }

  /** Removes all; none is started after that. What the engine does not do at the moment holds nothing up. */
  async endAll(): Promise<void> {
    this.#isOpen = false;
    const starting = [...this.#starting.values()];
    for (const { controller } of starting) controller.abort(new ContainerProblem("the environment stops"));
    await Promise.allSettled(starting.map(({ started }) => started));
    try {
      for (const { id } of await this.#list()) await this.#site.host.engines.present?.remove(id);
      for (const run of await readdir(this.#folder).catch(() => [])) await this.#removeShared(run);
      this.#present.clear();
    } catch (error) {
      this.#site.host.log.warn(
        { environmentId: this.#site.id, error: String(error) },
        "containers could not be removed",
      );
    }
  }

  get #folder(): string {
    return this.#site.paths.containers;
  }

  #shared(run: string): string {
    return join(this.#folder, run);
  }

  #name(run: string): string {
    return `berth-${this.#site.id}-${run}`;
  }

  #labels() {
    const { host, id } = this.#site;
    return labelsOf("automation", host.config.dataDir, id);
  }

  /** Variables by which processes are found; a command does not get to see the environment's. */
  #marks(mark: string) {
    return { BERTH_RUN: mark, BERTH_ENVIRONMENT_ID: this.#site.id };
  }

  #user(): UnixUser {
    const { user } = this.#site.record;
    if (!user || user.uid === 0) throw new ContainerProblem("nothing runs as root in a container");
    return user;
  }

  async #list() {
    return (await this.#site.host.engines.present?.list(this.#labels())) ?? [];
  }

  async #engine(): Promise<ContainerEngine> {
    const { engines, config } = this.#site.host;
    const engine = await engines.findNow();
    if (engine) return engine;
    const reason = engines.problem ? ` (${engines.problem})` : "";
    throw new ContainerProblem(`runs_on.docker needs a container engine; none found on runner ${config.name}${reason}`);
  }

  async #start(
    run: string,
    image: string,
    onOutput: (text: string) => void,
    signal: AbortSignal,
  ): Promise<StartedContainer> {
    const engine = await this.#engine();
    const user = this.#user();
    const present = await explained("the engine cannot be asked", () => engine.inspect(this.#name(run)));
    // Of a runner before this one: whoever asked is still there, and its command has not begun.
    if (present?.isRunning) return { pid: present.pid, shared: this.#shared(run) };
    if (!this.#isOpen) throw new ContainerProblem("the environment does not run");
    await this.#fetch(engine, image, onOutput, signal);
    // An engine would make it, and as root.
    if (!(await exists(this.#site.folder))) throw new ContainerProblem("the folder of the checkout does not exist");
    await this.#makeShared(run, user);
    const pid = await explained(`a container of ${image} cannot be started`, () =>
      this.#run(engine, run, image, user, signal),
    ).catch(async (error: unknown) => {
      await engine.remove(this.#name(run)).catch(() => undefined);
      throw error;
    });
    return { pid, shared: this.#shared(run) };
  }

  async #fetch(
    engine: ContainerEngine,
    image: string,
    onOutput: (text: string) => void,
    signal: AbortSignal,
  ): Promise<void> {
    const onLines = (lines: string[]) => onOutput(lines.map((line) => `${line}\n`).join(""));
    await explained(`the image ${image} cannot be fetched`, async () => {
      if (await engine.hasImage(image)) return;
      const logins = await loginFolder(this.#site.paths, this.#user());
      await pullGate(() =>
        engine.pull(image, { onLines, timeoutMs: PULL_MS, signal, ...(logins && { loginFolder: logins }) }),
      );
    });
  }

  async #run(
    engine: ContainerEngine,
    run: string,
    image: string,
    user: UnixUser,
    signal: AbortSignal,
  ): Promise<number> {
    signal.throwIfAborted();
    const { paths, folder, settings } = this.#site;
    const [name, shared] = [this.#name(run), this.#shared(run)];
    const id = await engine.run({
      ...{ image, name, user, workingDirectory: folder, entrypoint: "sh", args: containerShim(shared, true) },
      labels: { ...this.#labels(), [RUN_LABEL]: run },
      // Both lie in folders of the runner's, so that the environment cannot put links into their place.
      mounts: [paths.workspace, shared].map((path) => ({ source: path, target: path })),
      variables: this.#marks(run),
      limits: { ...settings?.limits, processes: processLimit() },
      ...{ hostNetwork: true, removeAtEnd: true },
    });
    signal.throwIfAborted();
    const state = await engine.inspect(id);
    if (!state?.isRunning) throw new EngineError("it has ended at once");
    if (userOf(state.pid) !== user.uid) throw new EngineError("its processes are not those of a user of this host");
    return state.pid;
  }

  /** A folder that the environment's user can fill but not exchange, with the pipes. */
  async #makeShared(run: string, user: UnixUser): Promise<void> {
    await this.#removeShared(run);
    const shared = this.#shared(run);
    const asUser = ownerOf(user);
    makeFolder(this.#folder, asUser ? 0o711 : 0o700);
    makeFolder(shared, 0o700, asUser);
    const pipes = [OUTPUT_PIPE, GIVEN_PIPE].map((name) => join(shared, name));
    const { code } = await runCommand("mkfifo", ["-m", "0600", "--", ...pipes], { user: asUser, timeoutMs: QUICK_MS });
    if (code !== 0) throw new ContainerProblem("the pipes of the container cannot be made");
  }

  /** As its user, since whoever is in the environment may exchange what is in it meanwhile. */
  async #removeShared(run: string): Promise<void> {
    const shared = this.#shared(run);
    if (!RUN.test(run) || !(await exists(shared))) return;
    const { user } = this.#site.record;
    const asUser = user && ownerOf(user);
    await runCommand("find", [shared, "-mindepth", "1", "-delete"], { user: asUser, timeoutMs: QUICK_MS });
    await rmdir(shared);
  }
}

/** Pid of the shell that was started in a container, as soon as it is there. */
async function shellOf(mark: string): Promise<number> {
  const until = Date.now() + SHELL_MS;
  while (Date.now() < until) {
    const found = markedProcesses(mark).find(({ pid, session }) => pid === session);
    if (found) return found.pid;
    await delay(POLL_MS);
  }
  throw new ContainerProblem("the command did not come up in its container");
}

/** Lets people know what an engine says; why something was given up needs no explanation. */
async function explained<T>(what: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof CommandTimeout) throw new ContainerProblem(`${what} in time`);
    if (!(error instanceof EngineError)) throw error;
    const hasNoShell = /exec: \\?"sh\\?"/.test(error.message);
    throw new ContainerProblem(`${what}: ${hasNoShell ? "it has no shell (sh)" : error.message}`);
  }
}
