import { type ChildProcess, execFile, spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { chmod, copyFile, mkdir, mkdtemp, readFile, rm, symlink } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { promisify } from "node:util";
import { readProcess } from "../../src/runner/supervisor/processes.ts";
import { eventually } from "./wait.ts";

// A container engine of a test file's own, with an image that is made of what lies on this host: no registry is needed.

const run = promisify(execFile);
const READY_MS = 30_000;
const END_MS = 20_000;
const HELPER_PID = "exec/containerd/containerd.pid";
/** What the image offers. */
const TOOLS = [
  "sh",
  "cat",
  "env",
  "sleep",
  "mv",
  "ls",
  "id",
  "mkdir",
  "chmod",
  "cp",
  "cut",
  "dirname",
  "touch",
  "nc",
  "head",
  "kill",
  "grep",
  "setsid",
  "rm",
  "pwd",
  "stty",
  "tty",
  "wc",
];

/** Why tests with containers cannot run here; undefined if they can. */
export function engineMissing(): string | undefined {
  if (process.getuid?.() !== 0) return "only root can start a container engine";
  const folders = (process.env.PATH ?? "").split(":").concat("/usr/sbin", "/usr/local/sbin");
  const missing = ["dockerd", "docker", "tar"].find((name) => !folders.some((each) => existsSync(join(each, name))));
  return missing && `${missing} is not installed`;
}

/** A dockerd that nobody else uses. */
export interface TestEngine extends AsyncDisposable {
  /** For the DOCKER_HOST of a runner. */
  dockerHost: string;
  /** An image with a shell and a few tools. */
  image: string;
  /** An image without a shell. */
  bareImage: string;
  /** Everything the engine keeps on disk. */
  dataRoot: string;
  /** Output of the engine's command line; rejects when it fails. */
  docker(...args: string[]): Promise<string>;
  /** Ends the engine without warning. */
  kill(): Promise<void>;
  /** Starts it again on the same data. */
  start(): Promise<void>;
}

/** Starts an engine in a folder of its own. */
export async function startContainerEngine(): Promise<TestEngine> {
  // The path of a Unix socket is short, whatever TMPDIR says.
  const folder = await mkdtemp("/tmp/berth-engine-");
  const dockerHost = `unix://${join(folder, "s")}`;
  const dataRoot = join(folder, "data");
  const env = { PATH: `${process.env.PATH}:/usr/sbin:/usr/local/sbin`, HOME: folder, DOCKER_CONFIG: folder };
  let daemon: ChildProcess | undefined;
  let output = "";
  const docker = async (...args: string[]) => {
    const { stdout } = await run("docker", ["--host", dockerHost, ...args], { env, maxBuffer: 64 * 1024 * 1024 });
    return stdout.trim();
  };
  const end = async (signal: NodeJS.Signals) => {
    const child = daemon;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.once("exit", resolve));
    child.kill(signal);
    const late = setTimeout(() => child.kill("SIGKILL"), END_MS);
    const helper = Number(await readFile(join(folder, HELPER_PID), "utf8").catch(() => "0"));
    await ended;
    clearTimeout(late);
    // It goes with its parent, but a moment later, and another engine would take it for its own.
    if (helper > 1 && readProcess(helper)) process.kill(helper, "SIGKILL");
    await eventually(() => !readProcess(helper), "what the engine has started has ended", END_MS);
  };
  const start = async () => {
    // Of one that was killed; whatever has got the number since would be taken for it.
    for (const file of ["pid", HELPER_PID]) await rm(join(folder, file), { force: true });
    const folders = ["--data-root", dataRoot, "--exec-root", join(folder, "exec"), "--pidfile", join(folder, "pid")];
    const network = ["--bridge=none", "--iptables=false", "--ip-masq=false"];
    const child = spawn("dockerd", [...folders, ...network, "--host", dockerHost, "--group", "root"], {
      ...{ env, stdio: ["ignore", "pipe", "pipe"] },
    });
    daemon = child;
    const collect = (chunk: Buffer) => {
      output = (output + chunk.toString()).slice(-3_000);
    };
    child.stdout.on("data", collect);
    child.stderr.on("data", collect);
    const isReady = async () => {
      if (child.exitCode !== null) throw new Error(`dockerd ended with ${child.exitCode}:\n${output}`);
      return await docker("version", "--format", "{{.Server.Version}}");
    };
    await eventually(isReady, "dockerd answers", READY_MS);
  };
  const engine: TestEngine = {
    ...{ dockerHost, dataRoot, docker, start, image: "berth.test/tools:1", bareImage: "berth.test/bare:1" },
    kill: () => end("SIGKILL"),
    async [Symbol.asyncDispose]() {
      // Only an engine can end what one that was killed has left running.
      if (daemon?.exitCode !== null || daemon.signalCode !== null) await start().catch(() => undefined);
      const left = await docker("ps", "--all", "--quiet").catch(() => "");
      if (left) await docker("rm", "--force", "--volumes", ...left.split("\n")).catch(() => undefined);
      await end("SIGTERM");
      await unmountBelow(folder);
      await rm(folder, { recursive: true, force: true, maxRetries: 5 });
    },
  };
  try {
    await start();
    await importImages(engine, join(folder, "image"));
  } catch (error) {
    await engine[Symbol.asyncDispose]();
    throw error;
  }
  return engine;
}

async function importImages({ docker, image, bareImage }: TestEngine, folder: string): Promise<void> {
  await mkdir(join(folder, "bin"), { recursive: true });
  await mkdir(join(folder, "tmp"));
  await chmod(join(folder, "tmp"), 0o1777);
  const pack = async (name: string) => {
    const archive = `${folder}.tar`;
    await run("tar", ["-C", folder, "-cf", archive, "."]);
    await docker("import", archive, name);
    await rm(archive);
  };
  await pack(bareImage);
  const busybox = ["/bin/busybox", "/usr/bin/busybox"].find((path) => existsSync(path));
  const isStatic = busybox && !(await librariesOf(busybox)).length;
  if (isStatic) {
    await copyFile(busybox, join(folder, "bin/busybox"));
    for (const tool of TOOLS) await symlink("busybox", join(folder, "bin", tool));
  } else for (const tool of TOOLS) await copyProgram(tool, folder);
  await pack(image);
}

/** Libraries that a program needs; none for a static one. */
async function librariesOf(program: string): Promise<string[]> {
  const { stdout } = await run("ldd", [program]).catch(() => ({ stdout: "" }));
  return [...stdout.matchAll(/(\/\S+) \(0x/g)].map(([, path = ""]) => path);
}

/** A program of this host with what it needs, if it is there. */
async function copyProgram(name: string, folder: string): Promise<void> {
  const path = ["/bin", "/usr/bin"].map((each) => join(each, name)).find((each) => existsSync(each));
  if (!path) return;
  await copyFile(path, join(folder, "bin", basename(path)));
  for (const library of await librariesOf(path)) {
    await mkdir(join(folder, dirname(library)), { recursive: true });
    await copyFile(library, join(folder, library));
  }
}

/** An engine that was killed leaves the file systems of its containers mounted. */
async function unmountBelow(folder: string): Promise<void> {
  const lines = (await readFile("/proc/self/mounts", "utf8")).split("\n");
  const targets = lines.map((line) => line.split(" ")[1] ?? "").filter((path) => path.startsWith(`${folder}/`));
  for (const target of targets.reverse()) await run("umount", ["-l", target]).catch(() => undefined);
}
