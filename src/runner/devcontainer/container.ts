import { chmod } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { ContainerEngine, ContainerState } from "../containers/engine.ts";
import type { ContainerRuntime } from "../containers/runtime.ts";
import { makeFolder, writeAtomically } from "../files.ts";
import { baseVariables } from "../machine.ts";
import type { Supervisor } from "../machine-supervisor.ts";
import { CONTAINER_RUN_FOLDER, CONTAINER_SOCKET, runtimeFolder, supervisorSocket } from "../paths.ts";
import type { ContainerFacts } from "../record.ts";
import { type EnvironmentSite, userOf } from "../site.ts";
import { connectSupervisor, type SupervisorClient } from "../supervisor/client.ts";
import { ENTRANCE, LOGIN, parseSupervisorConfig } from "../supervisor/config.ts";
import { processLimit } from "../supervisor/process-limit.ts";
import { bootId, readProcess } from "../supervisor/processes.ts";
import { shellQuoted } from "../supervisor/shell.ts";
import { containerName, IMAGE_LABEL, labelsOf } from "./belongings.ts";
import { placeSecretFiles } from "./secret-files.ts";

// The container of an environment: its image, the environment's user and nothing more. Folders of the environment are at
// the same paths as on the host; the first process keeps a supervisor running, which owns all the others.

const ANSWER_MS = 30_000;
const POLL_MS = 100;
const PART = "container";
/** Supervisors that may die, one after the other, before the container ends with them. */
const SUPERVISORS = 20;

// Variables of an image are not for the supervisor. `wait` also takes in what loses its parent.
const entryScript = (command: readonly string[], config: string) => `#!/bin/sh
unset NODE_OPTIONS NODE_PATH NODE_EXTRA_CA_CERTS LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT
UV_THREADPOOL_SIZE=16
export UV_THREADPOOL_SIZE
ending= child= left=${SUPERVISORS}
trap 'ending=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
while [ -z "$ending" ] && [ "$left" -gt 0 ]; do
  left=$((left - 1))
  ${[...command, config].map(shellQuoted).join(" ")} </dev/null >/dev/null 2>&1 &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  child=
  [ -n "$ending" ] || sleep 1
done
`;

const program = (words: readonly string[]) => `#!/bin/sh\nexec ${words.map(shellQuoted).join(" ")} "$@"\n`;

async function writeProgram(path: string, text: string): Promise<void> {
  await writeAtomically(path, text);
  await chmod(path, 0o755);
}

/** The folder of the runner's that the environment's user sees, inside of the container too. */
export async function sharedFolder({ paths }: EnvironmentSite): Promise<string> {
  makeFolder(paths.container, 0o755);
  return paths.container;
}

/** Writes what the container starts with. */
async function writeEntry(site: EnvironmentSite, facts: ContainerFacts, runtime: ContainerRuntime): Promise<void> {
  const { host, id, paths } = site;
  const user = userOf(site);
  const folder = paths.container;
  const bin = join(folder, "bin");
  await sharedFolder(site);
  makeFolder(bin, 0o755);
  const config = parseSupervisorConfig({
    ...{ environmentId: id, root: paths.root, part: PART, socketPath: join(CONTAINER_RUN_FOLDER, CONTAINER_SOCKET) },
    ...{ workspaceFolder: site.folder, userName: facts.userName, shell: "/bin/bash" },
    ...{ envFile: join(folder, "variables.json"), version: host.program.version },
  });
  await writeAtomically(join(folder, "supervisor.json"), JSON.stringify(config), user);
  const { PATH, SHELL: _, ...base } = await baseVariables(host, id, paths, user, site.record.token?.text ?? "");
  const variables = {
    ...facts.variables,
    ...base,
    ...{ USER: facts.userName, LOGNAME: facts.userName, PATH: `${facts.variables.PATH ?? PATH}:${bin}` },
  };
  await writeAtomically(config.envFile, JSON.stringify(variables), user);
  await writeProgram(join(bin, "berth"), program(runtime.program));
  const socketPath = await supervisorSocket(paths, CONTAINER_SOCKET);
  await writeProgram(join(paths.root, ENTRANCE), program([...runtime.enter, socketPath, id]));
  await writeProgram(join(paths.root, LOGIN), program([...runtime.login, socketPath, id, paths.run]));
  await writeProgram(join(paths.container, "entry"), entryScript(runtime.supervisor, join(folder, "supervisor.json")));
}

function mountsOf({ host, paths }: EnvironmentSite) {
  const same = [paths.workspace, paths.home, paths.secrets, paths.logs, paths.run];
  const shown = [paths.container, runtimeFolder(host.config.dataDir)];
  return [
    ...same.map((path) => ({ source: path, target: path })),
    { source: paths.run, target: CONTAINER_RUN_FOLDER },
    ...shown.map((path) => ({ source: path, target: path, readOnly: true })),
  ];
}

/** Finds the container of the facts, or makes it; resolves once it has been started. */
async function start(
  site: EnvironmentSite,
  engine: ContainerEngine,
  facts: ContainerFacts,
  signal: AbortSignal,
): Promise<void> {
  const { host, id, paths } = site;
  const name = containerName(id);
  const found = await engine.inspect(name);
  if (found?.labels[IMAGE_LABEL] === facts.image) {
    if (!found.isRunning) await begin(site, engine, name, signal);
    return;
  }
  if (found) await engine.remove(name);
  await engine.create(
    {
      ...{ image: facts.image, name, user: userOf(site), mounts: mountsOf(site), workingDirectory: "/" },
      labels: { ...labelsOf(host.config.dataDir, id), [IMAGE_LABEL]: facts.image },
      ...{ entrypoint: "/bin/sh", args: [join(paths.container, "entry")], variables: {} },
      ...{ hostNetwork: true, removeAtEnd: false, limits: { ...site.settings?.limits, processes: processLimit() } },
    },
    signal,
  );
  await begin(site, engine, name, signal);
}

/** Starts a container that does not run. */
async function begin(site: EnvironmentSite, engine: ContainerEngine, name: string, signal: AbortSignal): Promise<void> {
  const placed = await placeSecretFiles(site, engine, name, signal);
  await site.edit(({ container }) => {
    if (container) container.placed = placed;
  });
  await engine.start(name, signal);
}

async function connect(site: EnvironmentSite): Promise<SupervisorClient> {
  const { uid } = userOf(site);
  return connectSupervisor(await supervisorSocket(site.paths, CONTAINER_SOCKET), site.id, { uid });
}

/** The supervisor in a container that runs, if it answers as the one of the environment. */
async function supervisorIn(site: EnvironmentSite, { pid }: ContainerState): Promise<Supervisor | undefined> {
  const process = readProcess(pid);
  if (!process) return undefined;
  const client = await connect(site);
  try {
    const state = await client.health();
    if (state.environmentId !== site.id) return undefined;
    if (state.workspaceFolder !== site.folder) await client.setWorkspaceFolder(site.folder);
  } catch {
    return undefined;
  }
  return { process: { pid, startTime: process.startTime, bootId: bootId(), apart: true }, client };
}

/** The supervisor of the container as it is; undefined if there is none that answers. */
export async function findContainer(
  site: EnvironmentSite,
  engine: ContainerEngine,
  facts: ContainerFacts,
): Promise<Supervisor | undefined> {
  const found = await engine.inspect(containerName(site.id));
  const isCurrent = found?.isRunning && found.labels[IMAGE_LABEL] === facts.image;
  return isCurrent ? await supervisorIn(site, found) : undefined;
}

/** Brings the container up; resolves when its supervisor answers. Throws with a text for people if it does not. */
export async function startContainer(
  site: EnvironmentSite,
  engine: ContainerEngine,
  facts: ContainerFacts,
  signal: AbortSignal,
): Promise<{ supervisor: Supervisor; id: string }> {
  await writeEntry(site, facts, await site.host.containerRuntime());
  await start(site, engine, facts, signal);
  const name = containerName(site.id);
  for (const deadline = Date.now() + ANSWER_MS; ; await delay(POLL_MS)) {
    signal.throwIfAborted();
    const found = await engine.inspect(name);
    if (!found?.isRunning) throw new Error("the container ended at once");
    const supervisor = await supervisorIn(site, found);
    if (supervisor) return { supervisor, id: found.id };
    if (Date.now() > deadline) throw new Error("nothing answers in the container");
  }
}
