import { availableParallelism, release } from "node:os";
import type { Logger } from "pino";
import { engineFolder } from "../paths.ts";
import { ContainerEngine, type EngineChoice, EngineError, type EngineName, runEngine } from "./engine.ts";

// Engines are looked for when they are needed: one that comes up later, or goes, is noticed without a restart.

const DOCKER_SOCKET = "unix:///var/run/docker.sock";
const ANSWER_MS = 5_000;
const FRESH_MS = 10_000;
const LOOK_MS = 60_000;

interface Found {
  engine?: ContainerEngine;
  /** Why there is none; empty if nobody would expect one. */
  problem: string;
}

type Described = Record<string, unknown>;

const isObject = (value: unknown): value is Described => typeof value === "object" && value !== null;

async function described(name: EngineName, folder: string, env: Record<string, string>): Promise<Described> {
  const { code, stdout, stderr } = await runEngine(name, folder, ["info", "--format", "{{json .}}"], {
    ...{ timeoutMs: ANSWER_MS, env },
  });
  const problem = stderr.trim().split("\n").at(-1) || `${name} info ended with code ${code}`;
  if (code !== 0) throw new EngineError(problem);
  try {
    const value: unknown = JSON.parse(stdout);
    if (isObject(value)) return value;
  } catch {
    // Told below.
  }
  throw new EngineError(problem);
}

/** Docker behind a Unix socket, with the users and the kernel of this host. */
async function findDocker(folder: string, dockerHost: string | undefined): Promise<ContainerEngine> {
  const host = dockerHost ?? DOCKER_SOCKET;
  if (!host.startsWith("unix:///")) throw new EngineError("DOCKER_HOST is no Unix socket of this host");
  const env = { DOCKER_HOST: host };
  const { ServerVersion, KernelVersion, SecurityOptions, NCPU } = await described("docker", folder, env);
  if (typeof ServerVersion !== "string" || ServerVersion === "") throw new EngineError("docker does not answer");
  if (KernelVersion !== release()) throw new EngineError("docker runs containers on another machine");
  const options = Array.isArray(SecurityOptions) ? SecurityOptions.map(String) : [];
  if (options.some((option) => option.startsWith("name=rootless")))
    throw new EngineError("docker is rootless, so that its users are not those of this host");
  return new ContainerEngine({ name: "docker", folder, env, cores: coresOf(NCPU), userNamespace: "host" });
}

/** Podman without a service; where the runner is not root, its user stays the same in containers. */
async function findPodman(folder: string): Promise<ContainerEngine> {
  const { XDG_RUNTIME_DIR } = process.env;
  const env: Record<string, string> = XDG_RUNTIME_DIR ? { XDG_RUNTIME_DIR } : {};
  const { host } = await described("podman", folder, env);
  if (!isObject(host)) throw new EngineError("podman does not answer");
  if (host.serviceIsRemote === true || host.kernel !== release())
    throw new EngineError("podman runs containers on another machine");
  const isRootless = isObject(host.security) && host.security.rootless === true;
  const userNamespace = isRootless ? "keep-id" : "host";
  return new ContainerEngine({ name: "podman", folder, env, cores: coresOf(host.cpus), userNamespace });
}

const coresOf = (count: unknown) => (typeof count === "number" && count > 0 ? count : availableParallelism());

/** The container engine that this runner uses, if there is one at the moment. */
export class EngineAccess {
  readonly #choice: EngineChoice;
  readonly #folder: string;
  readonly #dockerHost: string | undefined;
  readonly #log: Logger;
  readonly #listeners = new Set<(engine: ContainerEngine) => void>();
  #found: Found = { problem: "" };
  #lookedAt = Number.NEGATIVE_INFINITY;
  #look: Promise<Found> | undefined;
  #timer: NodeJS.Timeout | undefined;

  private constructor(
    { choice, dockerHost }: { choice: EngineChoice; dockerHost: string | undefined },
    dataDir: string,
    log: Logger,
  ) {
    this.#choice = choice;
    this.#dockerHost = dockerHost;
    this.#folder = engineFolder(dataDir);
    this.#log = log;
  }

  /** Looks for the engine once, and says so where one that was asked for does not answer. */
  static async open(
    options: { choice: EngineChoice; dockerHost: string | undefined },
    dataDir: string,
    log: Logger,
  ): Promise<EngineAccess> {
    const access = new EngineAccess(options, dataDir, log);
    const engine = await access.find();
    const { choice } = options;
    if (engine) log.info({ engine: engine.name }, "a container engine answers");
    else if (choice === "docker" || choice === "podman")
      log.warn(
        { engine: choice, reason: access.problem },
        "the container engine does not answer; it is looked for again",
      );
    if (choice !== "none") {
      access.#timer = setInterval(() => void access.findNow(), LOOK_MS);
      access.#timer.unref();
    }
    return access;
  }

  /** The engine that answered when it was looked for last. */
  get present(): ContainerEngine | undefined {
    return this.#found.engine;
  }

  /** Why there is none, for people; empty if there is one. */
  get problem(): string {
    return this.#found.problem;
  }

  /** Calls back each time an engine answers that was not there before. */
  onAppear(listener: (engine: ContainerEngine) => void): void {
    this.#listeners.add(listener);
  }

  /** The engine that answers, as was seen not long ago. */
  async find(): Promise<ContainerEngine | undefined> {
    const { engine } = this.#found;
    return engine && Date.now() - this.#lookedAt < FRESH_MS ? engine : await this.findNow();
  }

  /** The engine that answers now. */
  async findNow(): Promise<ContainerEngine | undefined> {
    if (this.#choice === "none") {
      this.#found = { problem: "BERTH_RUNNER_CONTAINER_ENGINE is none" };
    } else {
      this.#look ??= this.#search().finally(() => {
        this.#look = undefined;
      });
      await this.#look;
    }
    return this.#found.engine;
  }

  close(): void {
    clearInterval(this.#timer);
    this.#listeners.clear();
  }

  async #search(): Promise<Found> {
    const before = this.#found.engine;
    const problems: string[] = [];
    let engine: ContainerEngine | undefined;
    for (const name of ["docker", "podman"] as const) {
      if (engine || (this.#choice !== "auto" && this.#choice !== name)) continue;
      try {
        engine = name === "docker" ? await findDocker(this.#folder, this.#dockerHost) : await findPodman(this.#folder);
      } catch (error) {
        problems.push(error instanceof EngineError ? error.message : String(error));
      }
    }
    this.#lookedAt = Date.now();
    // One that goes on answering stays the same object.
    const found: Found = engine
      ? { engine: before?.name === engine.name ? before : engine, problem: "" }
      : { problem: problems.join("; ") };
    this.#found = found;
    if (found.engine && found.engine !== before) for (const listener of this.#listeners) listener(found.engine);
    if (before && !found.engine) this.#log.warn({ reason: found.problem }, "the container engine no longer answers");
    return found;
  }
}
