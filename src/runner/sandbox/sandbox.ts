import { constants } from "node:fs";
import { access, chmod, lstat, mkdir, open, realpath, stat } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, isAbsolute, join } from "node:path";
import { fileURLToPath } from "node:url";
import { authorities } from "../../scm/git.ts";
import { errnoOf, exists, makeFolder, type Owner, removeTree } from "../files.ts";
import type { Enclosure } from "../supervisor/enclosure.ts";
import type { Namespaces } from "../supervisor/namespaces.ts";
import { ARRANGE, type MountPoint, mountArguments, mountPoints, mountSteps, mountsOf, type View } from "./mounts.ts";

// Bubblewrap gives each supervisor a view of the host's files in which temporary folders are the environment's own and
// nothing of the runner's is to be seen. Processes keep their pids and live on when a supervisor is replaced, so the
// folders behind the view lie on the host, where every supervisor of the environment finds them again.

/** Folders of an environment that stand in for those that everybody on the host shares. */
export interface Scratch {
  root: string;
  tmp: string;
  varTmp: string;
  /** Around `shm`, so that nobody else on the host gets there. */
  shmRoot: string;
  shm: string;
}

/** What a sandbox is made with. */
export interface SandboxOptions {
  bwrap: string;
  /** Gives a view of processes in which other users' are missing; only root can use it. */
  mount: string | undefined;
  umount?: string | undefined;
  /** Folders of the product, hidden but for what an environment needs. */
  hidden: readonly string[];
  /** Folders of the product that environments read, though they lie in hidden ones. */
  readable: readonly string[];
  /** Code of the product as Node.js has compiled it. */
  compiledFolder: string;
  /** Programs that environments run though they may lie anywhere. */
  programs: readonly string[];
}

const SOCKETS = [
  "/run/docker.sock",
  "/run/containerd/containerd.sock",
  "/run/podman/podman.sock",
  "/run/crio/crio.sock",
  "/run/buildkit/buildkitd.sock",
];
const SHARED_MEMORY = "/dev/shm";
/** Where a view that is not arranged yet has the host as it is. */
const HOST_FOLDER = "/run/berth/host";
const STICKY = 0o1777;
const EVERYBODY_WRITES = 0o002;
const isRoot = () => process.getuid?.() === 0;

// Descriptors are for bubblewrap alone, but for the one that tells of the end of its work.
const PASS_ON = 'echo >&4; exec 3>&- 4>&- 5<&-; exec "$@"';
const HIDE_PROCESSES = `"$0" -n -t proc -o hidepid=invisible proc /proc || exit 1; ${PASS_ON}`;

async function realPaths(paths: readonly string[]): Promise<string[]> {
  const found = await Promise.all(paths.map((path) => realpath(path).catch(() => undefined)));
  return [...new Set(found.filter((path) => path !== undefined))];
}

/** Folders that the program and its libraries are loaded from. */
async function programFolders(): Promise<string[]> {
  const here = fileURLToPath(import.meta.url);
  const shared = here.indexOf("/node_modules/");
  if (shared >= 0) return [here.slice(0, shared + "/node_modules".length)];
  let folder = dirname(here);
  while (folder !== dirname(folder) && !(await exists(join(folder, "package.json")))) folder = dirname(folder);
  return await realPaths([folder, join(folder, "node_modules")]);
}

/** Makes the temporary folders of an environment; those that are there stay. */
export async function makeScratch({ tmp, varTmp, shmRoot, shm }: Scratch, owner: Owner | undefined): Promise<void> {
  // As on the host, they belong to the runner: what it puts there cannot be exchanged.
  makeFolder(tmp, STICKY);
  makeFolder(varTmp, STICKY);
  if (!(await exists(SHARED_MEMORY))) return;
  makeFolder(shmRoot, owner ? 0o710 : 0o700, owner && { uid: 0, gid: owner.gid });
  makeFolder(shm, STICKY);
}

/** Removes them with all that is in them. */
export async function removeScratch({ tmp, varTmp, shmRoot }: Scratch): Promise<void> {
  for (const folder of [tmp, varTmp, shmRoot]) await removeTree(folder);
}

/** Makes a place for something in a folder in which others may write, but not exchange what is the runner's. */
async function makeMountPoint({ folder, path, target }: MountPoint): Promise<void> {
  const names = path.split("/");
  const isFile = !(await stat(target)).isDirectory();
  let at = folder;
  for (const [index, name] of names.entries()) {
    at = join(at, name);
    const wantsFile = isFile && index === names.length - 1;
    const made = wantsFile ? open(at, "wx").then((file) => file.close()) : mkdir(at);
    await made.catch((error: unknown) => {
      if (errnoOf(error) !== "EEXIST") throw error;
    });
    const found = await lstat(at);
    const isUsable = found.uid === process.getuid?.() && (wantsFile ? found.isFile() : found.isDirectory());
    if (!isUsable) throw new Error(`${target} cannot be shown: something else is in its place`);
    await chmod(at, wantsFile ? 0o644 : 0o755);
  }
}

/** Bubblewrap, as it is used on this host. */
export class Sandbox {
  readonly #options: SandboxOptions;
  #common: Promise<Pick<View, "kept" | "shown">> | undefined;

  constructor(options: SandboxOptions) {
    this.#options = options;
  }

  /** Other users' processes, and their command lines, cannot be seen from inside. */
  get hidesProcesses(): boolean {
    return this.#options.mount !== undefined;
  }

  /**
   * What a supervisor is to be started in. Its temporary folders must exist. With namespaces of the environment's, the
   * processes in them and those of the supervisor can trace each other.
   */
  async enclosure(scratch: Scratch, socketPath: string, present?: Namespaces): Promise<Enclosure> {
    const { bwrap, mount } = this.#options;
    const mounts = mountsOf(await this.#view(scratch, socketPath));
    for (const point of mountPoints(mounts)) await makeMountPoint(point);
    const joined = present?.user === undefined ? [] : ["--userns", "5"];
    const become = mount ? [HIDE_PROCESSES, mount] : [PASS_ON, "sh"];
    return {
      file: bwrap,
      args: [
        ...[...joined, ...mountArguments(mounts), "--new-session", "--info-fd", "3"],
        ...["--", "/bin/sh", "-c", ...become],
      ],
      descriptors: present?.user === undefined ? [] : [present.user],
    };
  }

  /**
   * What a supervisor is started in before its environment is known; undefined where that cannot be. Nothing is hidden
   * from it but other users' processes, and `arrangement` is for what else is to change.
   */
  async unassigned(): Promise<Enclosure | undefined> {
    const { bwrap, mount, umount } = this.#options;
    if (!mount || !umount) return undefined;
    makeFolder(dirname(HOST_FOLDER), 0o711);
    makeFolder(HOST_FOLDER, 0o700);
    const views = [...["--dev-bind", "/", "/"], ...["--dev-bind", "/", HOST_FOLDER]];
    return {
      file: bwrap,
      args: [...views, ...["--new-session", "--info-fd", "3", "--", "/bin/sh", "-c", HIDE_PROCESSES, mount]],
      descriptors: [],
    };
  }

  /** The command that, run as root where nothing is hidden yet, leaves an environment's view behind. */
  async arrangement(scratch: Scratch, socketPath: string): Promise<{ file: string; args: string[] }> {
    const { mount = "", umount = "" } = this.#options;
    const mounts = mountsOf(await this.#view(scratch, socketPath));
    for (const point of mountPoints(mounts)) await makeMountPoint(point);
    return { file: "/bin/sh", args: ["-c", ARRANGE, "sh", mount, umount, HOST_FOLDER, ...mountSteps(mounts)] };
  }

  async #view({ root, tmp, varTmp, shm }: Scratch, socketPath: string): Promise<View> {
    this.#common ??= this.#sharedView();
    const { kept, shown } = await this.#common;
    const own: View["own"][number][] = [];
    for (const [path, source] of [
      ["/tmp", tmp],
      ["/var/tmp", varTmp],
      [SHARED_MEMORY, shm],
    ] as const) {
      const real = await realpath(path).catch(() => undefined);
      if (real && !own.some((each) => each.path === real)) own.push({ path: real, source });
    }
    // A long path is reached through a folder of links.
    const links = socketPath.startsWith(`${root}/`) ? [] : await realPaths([dirname(dirname(socketPath))]);
    return {
      ...{ own, kept },
      // Those that are not there yet may be with the next start.
      hidden: await realPaths([...this.#options.hidden, ...(isRoot() ? [] : hiddenByUser())]),
      blocked: await reachableSockets(),
      shown: [...shown, ...links.map((path) => ({ path, writable: false })), { path: root, writable: true }],
    };
  }

  /** What is the same for all environments. */
  async #sharedView(): Promise<Pick<View, "kept" | "shown">> {
    const { compiledFolder } = this.#options;
    const programs = await programFolders();
    const needed = [...programs, ...this.#options.readable, ...(await this.#neededPaths())];
    return {
      // Whatever belongs to the runner's own user could be written to.
      kept: isRoot() ? [] : (await realPaths([homedir(), ...programs])).filter((path) => path !== "/"),
      shown: [
        ...(await realPaths(needed)).map((path) => ({ path, writable: false })),
        { path: compiledFolder, writable: isRoot() },
      ],
    };
  }

  /** What processes of environments run or read and may lie in a folder that is hidden. */
  async #neededPaths(): Promise<string[]> {
    const programs = [process.execPath, ...this.#options.programs];
    const links = await realPaths(programs);
    const certificates = Object.values(authorities()).flatMap((list) => String(list).split(":"));
    return [...[...programs, ...links].map(dirname), ...certificates.filter(isAbsolute)];
  }
}

/** Folders that an ordinary user's environments are better off without. */
const hiddenByUser = (): string[] => [
  // Whoever talks to the services there is out of the sandbox.
  process.env.XDG_RUNTIME_DIR || `/run/user/${process.getuid?.()}`,
  // Root's files have no known owner in a user namespace, and ssh refuses to go on when it finds such a one here.
  "/etc/ssh/ssh_config.d",
];

/** Sockets of container engines that processes of environments could give orders to. */
async function reachableSockets(): Promise<string[]> {
  const reachable = [];
  for (const path of await realPaths(SOCKETS)) {
    const found = await stat(path).catch(() => undefined);
    const isOpen = isRoot() ? found && (found.mode & EVERYBODY_WRITES) !== 0 : await isWritable(path);
    if (isOpen) reachable.push(path);
  }
  return reachable;
}

const isWritable = (path: string) =>
  access(path, constants.W_OK).then(
    () => true,
    () => false,
  );
