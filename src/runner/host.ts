import { readFile, statfs } from "node:fs/promises";
import { availableParallelism, release, type as systemType, totalmem } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Logger } from "pino";
import type { DeliveredPolicies } from "../../gen/berth/runner/v1/runner_control_pb.js";
import type { RunnerConfigurationSchema } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { RunnerHostConfig } from "../config.ts";
import type { HostFacts } from "../domain/environment-class.ts";
import type { Guard } from "../scm/guard.ts";
import type { ControlGroups } from "./cgroups.ts";
import type { EngineAccess } from "./containers/find.ts";
import type { ContainerRuntime } from "./containers/runtime.ts";
import type { ControlPlane } from "./control-plane.ts";
import type { Sandbox } from "./sandbox/sandbox.ts";
import type { SourceControl } from "./source-control.ts";
import type { SshServer } from "./ssh/server.ts";
import type { WaitingSupervisor } from "./waiting-supervisor.ts";

/** The program that runs here. */
export interface ProgramVersion {
  version: string;
  /** Commit it was built from, or "unknown". */
  commit: string;
}

/** What everything that works on environments shares. */
export interface Host {
  config: RunnerHostConfig;
  /** Base URL of the control plane as the processes of environments reach it. */
  publicApiUrl: string;
  program: ProgramVersion;
  schema: RunnerConfigurationSchema;
  engines: EngineAccess;
  /** What containers run this program with. */
  containerRuntime(): Promise<ContainerRuntime>;
  /** Absent where nobody can log in with SSH. */
  sshServer: SshServer | undefined;
  /** Absent where environments see the host's files as they are. */
  sandbox: Sandbox | undefined;
  /** Why; empty if there is one. */
  sandboxProblem: string;
  /** Absent where limits cannot be enforced. */
  controlGroups: ControlGroups | undefined;
  /** Absent where supervisors cannot be started before their environment is known. */
  waitingSupervisor: WaitingSupervisor | undefined;
  /** What the organization limits its members to, as far as the runner has heard. */
  policies: DeliveredPolicies;
  guard: Guard;
  resolveContext: SourceControl["resolveContext"];
  hostCredentials: SourceControl["hostCredentials"];
  controlPlane: ControlPlane;
  /** User ids that files of other environments on this host belong to. */
  reservedUids(environmentId: string): ReadonlySet<number>;
  /** Nothing new may be started. */
  isDraining(): boolean;
  /** Lets only some machines come up at the same time. */
  startGate<T>(work: () => Promise<T>): Promise<T>;
  log: Logger;
}

const GIB = 1024 ** 3;
const MIB = 1024 ** 2;
const COMMIT = /^[0-9a-f]{40}$/;

/** Containers of environments belong to users of their own, which only root can make. */
const canOwnContainers = () => process.getuid?.() === 0;

/** The machine, for the configuration schema. */
export async function hostFacts(dataDir: string, engines: EngineAccess): Promise<HostFacts> {
  const disk = await statfs(dataDir);
  return {
    cpuCores: availableParallelism(),
    memoryMib: Math.floor(totalmem() / MIB),
    diskGib: Math.floor((disk.blocks * disk.bsize) / GIB),
    hasContainerEngine: canOwnContainers() && engines.present !== undefined,
  };
}

/** One line about the machine, for runner admins. */
export const systemDetails = ({ cpuCores, memoryMib, diskGib }: HostFacts): string =>
  `${systemType()} ${release()} ${process.arch}, ${cpuCores} CPU, ${Math.floor(memoryMib / 1024)} GiB memory, ${diskGib} GiB disk, Node.js ${process.versions.node}`;

async function commitOf(folder: string): Promise<string> {
  const git = join(folder, ".git");
  const head = (await readFile(join(git, "HEAD"), "utf8")).trim();
  const ref = /^ref: (refs\/heads\/[\w./-]+)$/.exec(head)?.[1];
  return ref ? (await readFile(join(git, ref), "utf8")).trim() : head;
}

/** Version from package.json; the commit from its `gitHead`, which packages carry, else from the checkout. */
export async function programVersion(): Promise<ProgramVersion> {
  let folder = dirname(fileURLToPath(import.meta.url));
  for (let level = 0; level < 4; level++, folder = dirname(folder)) {
    const text = await readFile(join(folder, "package.json"), "utf8").catch(() => undefined);
    if (!text) continue;
    const { version = "unknown", gitHead } = JSON.parse(text) as { version?: string; gitHead?: string };
    const commit = gitHead ?? (await commitOf(folder).catch(() => ""));
    return { version, commit: COMMIT.test(commit) ? commit : "unknown" };
  }
  return { version: "unknown", commit: "unknown" };
}
