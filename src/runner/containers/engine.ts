import { mkdir } from "node:fs/promises";
import { Readable } from "node:stream";
import { isImageReference } from "../../domain/image-reference.ts";
import { type CommandOptions, type CommandResult, CommandTimeout, runCommand } from "../commands.ts";
import { lineBatches } from "../supervisor/automation/line-log.ts";

// A container engine of this host, by its command line. It runs as the runner's own user, with a clean environment and a
// folder of its own for what it keeps; whatever a user has a say in is checked before it becomes an argument.

/** Which engine is meant: docker or podman, whatever answers, or none at all. */
export type EngineChoice = "auto" | "docker" | "podman" | "none";

export type EngineName = Exclude<EngineChoice, "auto" | "none">;

/** What a container may use; undefined is unlimited. */
export interface ContainerLimits {
  cpuCores?: number | undefined;
  memoryMib?: number | undefined;
  processes?: number | undefined;
}

/** A container as it is started. All of it is kept by the engine, so nothing in it may be secret. */
export interface ContainerSpec {
  image: string;
  name: string;
  labels: Readonly<Record<string, string>>;
  user: ContainerUser;
  /** Folders of the host; nobody but the runner may be able to put another folder into their place. */
  mounts: readonly { source: string; target: string; readOnly?: boolean }[];
  workingDirectory: string;
  /** Program in place of the image's own. */
  entrypoint: string;
  args: readonly string[];
  variables: Readonly<Record<string, string>>;
  /** The host's network instead of one of its own. */
  hostNetwork: boolean;
  limits: ContainerLimits;
  /** The engine removes it once it has ended. */
  removeAtEnd: boolean;
}

export interface ContainerUser {
  uid: number;
  gid: number;
}

/** A command in a container that runs. None of it may be secret. */
export interface ContainerExec {
  user: ContainerUser;
  workingDirectory: string;
  variables: Readonly<Record<string, string>>;
  argv: readonly [string, ...string[]];
}

/** What an engine says about a container. */
export interface ContainerState {
  id: string;
  name: string;
  isRunning: boolean;
  /** Its first process as the host counts; 0 if it does not run. */
  pid: number;
  labels: Readonly<Record<string, string>>;
}

/** How an engine does what takes long. */
export interface EngineWork {
  /** What it says. */
  onLines: (lines: string[]) => void;
  timeoutMs: number;
  signal?: AbortSignal;
  /** Folder of a `config.json` with credentials for registries. */
  loginFolder?: string;
}

/** An image to be built; all of it is kept by the engine, so nothing in it may be secret. */
export type ImageBuild = {
  /** Its name. */
  tag: string;
  labels: Readonly<Record<string, string>>;
  network?: "none";
} & (
  | {
      /** A tar archive. */
      context: Readable;
      /** Path in it. */
      dockerfile: string;
      args: Readonly<Record<string, string>>;
      target?: string;
    }
  /** A Dockerfile without a context. */
  | { text: string }
);

/** What an image says about what runs in it. */
export interface ImageFacts {
  id: string;
  user: string;
  variables: Readonly<Record<string, string>>;
  labels: Readonly<Record<string, string>>;
}

/** An engine refused or failed; its text is the engine's last line. */
export class EngineError extends Error {}

const CALL_MS = 30_000;
const START_MS = 120_000;
const MAX_ANSWER_BYTES = 8 * 1024 * 1024;
const MESSAGE_CHARACTERS = 500;
const GONE = /no such (container|image)|image not known|no container with|is already in progress/i;
// Names and ids that can be nothing else than an operand.
const NAME = /^[a-zA-Z0-9][\w.-]{0,254}$/;

function checked(pattern: RegExp, text: string): string {
  if (!pattern.test(text)) throw new EngineError("is not the name of a container");
  return text;
}

function checkedImage(image: string): string {
  if (!isImageReference(image)) throw new EngineError("is not an image reference");
  return image;
}

/** One field of the value of `--mount`, which is read as a line of CSV. */
const mountField = (key: string, value: string) => `"${key}=${value.replaceAll('"', '""')}"`;

const lastLine = (text: string) =>
  (
    text
      .split("\n")
      .map((line) => line.trim())
      // Advice for somebody at a prompt, not the reason.
      .filter((line) => line !== "" && !/^(Run|See) '.*--help'/.test(line))
      .at(-1) ?? ""
  )
    .replace(/^docker: /, "")
    .slice(0, MESSAGE_CHARACTERS);

const pairs = (option: string, values: Readonly<Record<string, string>>) =>
  Object.entries(values).flatMap(([name, value]) => [option, `${name}=${value}`]);

const labelFilters = (labels: Readonly<Record<string, string>>) =>
  Object.entries(labels).flatMap(([name, value]) => ["--filter", `label=${name}=${value}`]);

const userOption = ({ uid, gid }: ContainerUser) => ["--user", `${uid}:${gid}`];

/** Limits as options; an engine refuses more processors than there are. */
function limitOptions({ cpuCores, memoryMib, processes }: ContainerLimits, cores: number): string[] {
  return [
    ...(cpuCores ? ["--cpus", String(Math.min(cpuCores, cores))] : []),
    ...(memoryMib ? ["--memory", `${memoryMib}m`] : []),
    // Of the container, and of its user wherever that runs something: several containers have no more than one.
    ...(processes ? ["--pids-limit", String(processes), "--ulimit", `nproc=${processes}:${processes}`] : []),
  ];
}

/** An engine that has answered. */
export class ContainerEngine {
  readonly name: EngineName;
  readonly #folder: string;
  readonly #env: Readonly<Record<string, string>>;
  readonly #cores: number;
  readonly #userNamespace: string;

  constructor(options: {
    name: EngineName;
    /** For what the program keeps; the runner's own. */
    folder: string;
    env: Readonly<Record<string, string>>;
    /** Processors that containers may be given. */
    cores: number;
    /** How users in a container are those of the host, as the engine calls it. */
    userNamespace: string;
  }) {
    this.name = options.name;
    this.#folder = options.folder;
    this.#env = options.env;
    this.#cores = options.cores;
    this.#userNamespace = options.userNamespace;
  }

  /** Variables that lead other programs to it. */
  get environment(): Readonly<Record<string, string>> {
    return this.#env;
  }

  /** Whether an image is there already, under exactly this reference. */
  async hasImage(image: string): Promise<boolean> {
    const { code } = await this.#run(["image", "inspect", "--format", "{{.Id}}", checkedImage(image)]);
    return code === 0;
  }

  /**
   * Fetches an image, with what the engine says as lines, in `timeoutMs` at most. `loginFolder` holds a `config.json`
   * with credentials for its registry. Throws EngineError, CommandTimeout, or the signal's reason.
   */
  async pull(image: string, options: EngineWork): Promise<void> {
    await this.#work(["pull", checkedImage(image)], options);
  }

  /** Lets the engine do what takes long, and tells what it says. */
  async #work(args: readonly string[], options: EngineWork & Pick<CommandOptions, "input">): Promise<void> {
    const { onLines, timeoutMs, signal, loginFolder, input } = options;
    const lines = lineBatches((batch) => {
      if (batch.length > 0) onLines(batch);
    });
    const result = await this.#run(args, {
      ...{ timeoutMs, onOutput: lines.write },
      ...(signal && { signal }),
      ...(input !== undefined && { input }),
      ...(loginFolder && { env: { DOCKER_CONFIG: loginFolder, REGISTRY_AUTH_FILE: `${loginFolder}/config.json` } }),
    });
    lines.end();
    if (result.code !== 0) throw this.#error(result);
  }

  /** What an image says about what runs in it; undefined if it is not there. */
  async imageFacts(image: string): Promise<ImageFacts | undefined> {
    const result = await this.#run(["image", "inspect", "--format", "{{json .}}", checkedImage(image)]);
    if (result.code === 0) return imageFacts(result.stdout);
    if (GONE.test(result.stderr)) return undefined;
    throw this.#error(result);
  }

  /**
   * Builds an image from a context, as a tar archive, or from a Dockerfile alone. Throws EngineError, CommandTimeout, or
   * the signal's reason.
   */
  async build(spec: ImageBuild, options: EngineWork): Promise<void> {
    const { tag, labels, network } = spec;
    const { dockerfile, args = {}, target } = "context" in spec ? spec : {};
    const input = "context" in spec ? spec.context : spec.text;
    await this.#work(
      [
        ...["build", "--force-rm", "--tag", checkedImage(tag), ...pairs("--label", labels)],
        ...(network ? ["--network", network] : []),
        ...pairs("--build-arg", args),
        ...(target ? ["--target", checked(NAME, target)] : []),
        ...(dockerfile ? ["--file", dockerfile] : []),
        "-",
      ],
      { ...options, input },
    );
  }

  /** Gives an image another name. */
  async tag(image: string, name: string): Promise<void> {
    await this.#ask(["tag", checkedImage(image), checkedImage(name)]);
  }

  /** Takes a name away from an image, which goes with its last one. One that is gone is fine. */
  async removeImage(image: string): Promise<void> {
    await this.#unlessGone(["image", "rm", checkedImage(image)], START_MS);
  }

  /** Names of the images that carry all of these labels; short ids of those that have none, the newest first. */
  async images(labels: Readonly<Record<string, string>>): Promise<string[]> {
    const format = ["--format", "{{.Repository}}:{{.Tag}} {{.ID}}"];
    const lines = (await this.#ask(["images", "--all", ...format, ...labelFilters(labels)])).split("\n");
    return lines.flatMap((line) => line.split(" ").find(isImageReference) ?? []);
  }

  /** Starts a container that has ended. */
  async start(container: string, signal?: AbortSignal): Promise<void> {
    await this.#ask(["start", checked(NAME, container)], { timeoutMs: START_MS, ...(signal && { signal }) });
  }

  /** Starts a container of an image that is there and lets it run; resolves with its id. */
  async run(spec: ContainerSpec, signal?: AbortSignal): Promise<string> {
    return await this.#make(["run", "--detach"], spec, signal);
  }

  /** As `run`, without starting it. */
  async create(spec: ContainerSpec, signal?: AbortSignal): Promise<string> {
    return await this.#make(["create"], spec, signal);
  }

  async #make(how: readonly string[], spec: ContainerSpec, signal?: AbortSignal): Promise<string> {
    const mounts = spec.mounts.map(({ source, target, readOnly }) =>
      ["type=bind", mountField("source", source), mountField("target", target), readOnly ? "readonly" : ""]
        .filter(Boolean)
        .join(","),
    );
    const args = [
      ...[...how, "--pull", "never", "--name", checked(NAME, spec.name)],
      ...(spec.removeAtEnd ? ["--rm"] : []),
      ...pairs("--label", spec.labels),
      ...pairs("--env", spec.variables),
      ...userOption(spec.user),
      ...["--userns", this.#userNamespace, "--cap-drop", "ALL"],
      ...["--security-opt", "no-new-privileges", "--security-opt", "label=disable"],
      ...(spec.hostNetwork ? ["--network", "host"] : []),
      ...limitOptions(spec.limits, this.#cores),
      // What it writes goes elsewhere; nothing runs in it that nobody has asked for.
      ...["--log-driver", "none", "--no-healthcheck"],
      ...mounts.flatMap((mount) => ["--mount", mount]),
      ...["--workdir", spec.workingDirectory, "--entrypoint", spec.entrypoint],
      ...[checkedImage(spec.image), ...spec.args],
    ];
    return await this.#ask(args, { timeoutMs: START_MS, ...(signal && { signal }) });
  }

  /** Puts what is in a tar archive into the file system of a container. */
  async unpack(container: string, archive: Buffer, signal?: AbortSignal): Promise<void> {
    const input = Readable.from([archive]);
    await this.#ask(["cp", "-", `${checked(NAME, container)}:/`], { input, ...(signal && { signal }) });
  }

  /** Starts a command in a container and does not wait for it. */
  async exec(container: string, { user, workingDirectory, variables, argv }: ContainerExec): Promise<void> {
    const options = [...userOption(user), "--workdir", workingDirectory, ...pairs("--env", variables)];
    await this.#ask(["exec", "--detach", ...options, checked(NAME, container), ...argv]);
  }

  /** Undefined if there is no such container. */
  async inspect(container: string): Promise<ContainerState | undefined> {
    return (await this.#inspect([checked(NAME, container)]))[0];
  }

  /** Containers that carry all of these labels, whether they run or not. */
  async list(labels: Readonly<Record<string, string>>): Promise<ContainerState[]> {
    const ids = await this.#ask(["ps", "--all", "--quiet", "--no-trunc", ...labelFilters(labels)]);
    return ids === "" ? [] : await this.#inspect(ids.split("\n"));
  }

  /** Asks a container to end, and kills it after the grace. One that is gone is fine. */
  async stop(container: string, graceSeconds: number): Promise<void> {
    const timeoutMs = graceSeconds * 1000 + CALL_MS;
    await this.#unlessGone(["stop", "--time", String(graceSeconds), checked(NAME, container)], timeoutMs);
  }

  /** Kills and removes a container with everything that only it has used. One that is gone is fine. */
  async remove(container: string): Promise<void> {
    await this.#unlessGone(["rm", "--force", "--volumes", checked(NAME, container)], CALL_MS);
  }

  async #unlessGone(args: readonly string[], timeoutMs: number): Promise<void> {
    const result = await this.#run(args, { timeoutMs });
    if (result.code !== 0 && !GONE.test(result.stderr)) throw this.#error(result);
  }

  /** Those of them that are still there. */
  async #inspect(containers: readonly string[]): Promise<ContainerState[]> {
    const result = await this.#run(["container", "inspect", "--format", "{{json .}}", ...containers]);
    if (result.code !== 0 && !GONE.test(result.stderr)) throw this.#error(result);
    return result.stdout.split("\n").filter(Boolean).map(containerState);
  }

  async #ask(args: readonly string[], options: Partial<CommandOptions> = {}): Promise<string> {
    const result = await this.#run(args, options);
    if (result.code !== 0) throw this.#error(result);
    return result.stdout.trim();
  }

  #error({ stdout, stderr, code }: CommandResult): EngineError {
    return new EngineError(lastLine(stderr) || lastLine(stdout) || `${this.name} ended with code ${code}`);
  }

  async #run(args: readonly string[], options: Partial<CommandOptions> = {}): Promise<CommandResult> {
    return await runEngine(this.name, this.#folder, args, { ...options, env: { ...this.#env, ...options.env } });
  }
}

/** Runs the program of an engine. Throws EngineError if it cannot be started or does not end in time. */
export async function runEngine(
  name: EngineName,
  folder: string,
  args: readonly string[],
  options: Partial<CommandOptions> = {},
): Promise<CommandResult> {
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const env = { HOME: folder, DOCKER_CONFIG: folder, DOCKER_CLI_HINTS: "false", ...options.env };
  try {
    return await runCommand(name, args, { timeoutMs: CALL_MS, maxOutput: MAX_ANSWER_BYTES, ...options, env });
  } catch (error) {
    if (error instanceof CommandTimeout) throw new EngineError(`${name} ${args[0]} did not end in time`);
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    if (code === "ENOENT") throw new EngineError(`${name} is not installed`);
    throw error;
  }
}

function imageFacts(text: string): ImageFacts {
  const { Id, Config } = JSON.parse(text) as {
    Id: string;
    Config?: { User?: string; Env?: string[] | null; Labels?: Record<string, string> | null };
  };
  const variables = (Config?.Env ?? []).map((each): [string, string] => {
    const end = each.indexOf("=");
    return [each.slice(0, end), each.slice(end + 1)];
  });
  return {
    ...{ id: Id, user: Config?.User ?? "", labels: Config?.Labels ?? {} },
    variables: Object.fromEntries(variables.filter(([name]) => name !== "")),
  };
}

function containerState(line: string): ContainerState {
  const { Id, Name, State, Config } = JSON.parse(line) as {
    Id: string;
    Name: string;
    State?: { Running?: boolean; Pid?: number };
    Config?: { Labels?: Record<string, string> | null };
  };
  return {
    ...{ id: Id, name: Name.replace(/^\//, ""), labels: Config?.Labels ?? {} },
    ...{ isRunning: State?.Running === true, pid: State?.Pid ?? 0 },
  };
}
