import { join } from "node:path";
import { create, equals } from "@bufbuild/protobuf";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentSpec,
  type EnvironmentStatus_SSHPublicKey,
  EnvironmentStatus_SSHPublicKeySchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { commandPath } from "./commands.ts";
import { readSmall, writeAtomically } from "./files.ts";
import { commandUser, ownerOf } from "./machine.ts";
import { machineWarnings } from "./machine-steps.ts";
import { asUser, type Place, removeSecretFiles, VARIABLES_FILE, valueFile, writeSecretFile } from "./secrets/files.ts";
import { type EnvironmentSite, newSshState, textOf, userOf } from "./site.ts";
import { authorizedKeys, containedSessionScript, serverConfig, sessionScript, shellVariables } from "./ssh/config.ts";
import { isFree, launchSshd } from "./ssh/launch.ts";
import type { SshServer } from "./ssh/server.ts";
import { hasSession } from "./ssh/sessions.ts";
import { LOGIN } from "./supervisor/config.ts";
import { bootId, isAlive } from "./supervisor/processes.ts";

// Steps that let people log in to an environment: an SSH server of its own, its keys, and what their sessions get.

const SESSION_FILE = "session.sh";
const MAX_VARIABLES_BYTES = 1024 * 1024;
const RETRY_MS = 30_000;
const SESSIONS_MS = 10_000;
const LAUNCHES = 5;

const NO_SERVER = "SSH keys cannot be used: there is no SSH server on this runner";
const NO_NAME = "SSH keys cannot be used: the user of the environment has no name on this host";

const placeOf = (site: EnvironmentSite): Place => ({ environmentId: site.id, paths: site.paths, user: userOf(site) });

/**
 * Keeps an SSH server at work for a running machine, where there is one to be had, with the keys of the specification.
 * True, at most every ten seconds, if somebody is logged in.
 */
export async function keepSsh(site: EnvironmentSite, spec: EnvironmentSpec, signal: AbortSignal): Promise<boolean> {
  const server = site.host.sshServer;
  site.ssh.problem = server ? (userOf(site).unlisted ? NO_NAME : "") : NO_SERVER;
  if (!server || site.ssh.problem) {
    await report(site, spec, ContentPhase.UNAVAILABLE);
    return false;
  }
  try {
    await keepVariables(site);
    await keepKeys(site, spec);
    await keepScript(site, spec, server);
    await keepServer(site, server, signal);
  } catch (error) {
    if (signal.aborted) throw error;
    site.ssh.problem = `SSH keys cannot be used: ${textOf(error)}`;
  }
  await report(site, spec, site.ssh.problem ? ContentPhase.FAILED : ContentPhase.READY);
  return await isInUse(site);
}

async function report(site: EnvironmentSite, spec: EnvironmentSpec, phase: ContentPhase): Promise<void> {
  const keys = spec.sshPublicKeys.map(({ id }) => create(EnvironmentStatus_SSHPublicKeySchema, { id, phase }));
  const warningMessage = machineWarnings(site, userOf(site), spec);
  const { machine, sshPublicKeys } = site.status;
  if (machine?.warningMessage === warningMessage && areSame(sshPublicKeys, keys)) return;
  await site.edit(({ status }) => {
    status.sshPublicKeys = keys;
    if (status.machine) status.machine.warningMessage = warningMessage;
  });
}

const areSame = (present: readonly EnvironmentStatus_SSHPublicKey[], next: readonly EnvironmentStatus_SSHPublicKey[]) =>
  present.length === next.length &&
  present.every((key, index) => {
    const other = next[index];
    return other !== undefined && equals(EnvironmentStatus_SSHPublicKeySchema, key, other);
  });

/** Writes what sessions get, when something of it has changed. */
async function keepVariables(site: EnvironmentSite): Promise<void> {
  const { status, variables, token } = site.record;
  const secrets = status.secrets.map(({ id, session, phase }) => [id, session, phase]);
  const mark = JSON.stringify([secrets, variables, token?.session]);
  if (mark === site.ssh.variables) return;
  const { paths, id } = site;
  const { uid } = userOf(site);
  const read = async (path: string) => (await readSmall(path, MAX_VARIABLES_BYTES, uid)) ?? "{}";
  const [base, values] = await Promise.all([read(paths.variables), read(valueFile(paths, VARIABLES_FILE))]);
  const all = { ...parsed(base), ...parsed(values), BERTH_ENVIRONMENT_ID: id, GITPOD_ENVIRONMENT_ID: id };
  await writeSecretFile(placeOf(site), SESSION_FILE, shellVariables(all));
  site.ssh.variables = mark;
}

function parsed(text: string): Record<string, string> {
  const value: unknown = JSON.parse(text);
  const entries = Object.entries(Object(value)).filter(
    (entry): entry is [string, string] => typeof entry[1] === "string",
  );
  return Object.fromEntries(entries);
}

async function keepKeys(site: EnvironmentSite, spec: EnvironmentSpec): Promise<void> {
  const keys = authorizedKeys(spec.sshPublicKeys);
  if (keys === site.ssh.keys) return;
  await writeAtomically(site.paths.authorizedKeys, keys, ownerOf(userOf(site)));
  site.ssh.keys = keys;
}

const ON_HOST = "the dev container has failed: this is the host";

/**
 * Sessions belong where the dev container does. That is the host once one has failed that was to have a container; until
 * that is known nobody gets in.
 */
async function keepScript(site: EnvironmentSite, spec: EnvironmentSpec, { sftpServer }: SshServer): Promise<void> {
  const { id, paths, record, settings, status } = site;
  const { devcontainer } = status;
  const isCurrent = devcontainer?.session === (spec.devcontainer?.session ?? "");
  const hasFailed = isCurrent && devcontainer?.phase === DevContainerPhase.FAILED;
  const variables = valueFile(paths, SESSION_FILE);
  const contained = { environmentId: id, variables, login: join(paths.root, LOGIN), sftpServer };
  const isInside = record.container !== undefined || (settings?.inContainer && !hasFailed);
  const notice = settings?.inContainer ? ON_HOST : "";
  const script = isInside ? containedSessionScript(contained) : sessionScript(variables, notice);
  if (script === site.ssh.script) return;
  await writeAtomically(paths.sshSession, script, ownerOf(userOf(site)));
  site.ssh.script = script;
}

async function keepServer(site: EnvironmentSite, server: SshServer, signal: AbortSignal): Promise<void> {
  const { ssh } = site.record;
  if (ssh?.process?.bootId === bootId() && isAlive(ssh.process)) return;
  if (Date.now() < site.ssh.retryAt) throw new Error(site.ssh.failure);
  try {
    await keepHostKey(site, server);
    await startServer(site, server, signal);
    site.ssh.retryAt = 0;
  } catch (error) {
    site.ssh.retryAt = Date.now() + RETRY_MS;
    site.ssh.failure = textOf(error);
    throw error;
  }
}

/** The key by which people know the environment again; made once. */
async function keepHostKey(site: EnvironmentSite, { keygen }: SshServer): Promise<void> {
  const script = `[ -s "$2" ] || { rm -f -- "$2.new" "$2.new.pub" && "$1" -q -t ed25519 -N '' -C '' -f "$2.new" &&
  mv -f -- "$2.new.pub" "$2.pub" && mv -f -- "$2.new" "$2"; }`;
  const { code, stderr } = await asUser(placeOf(site), "sh", ["-c", script, "sh", keygen, site.paths.hostKey]);
  if (code !== 0) throw new Error(`no host key could be made: ${stderr.slice(0, 200)}`);
}

/** Ports to try: the one of before, then all from a place of the environment's own on. */
function* portsOf(site: EnvironmentSite): Generator<number> {
  const { from, to } = site.host.config.sshPorts;
  const before = site.record.ssh?.port ?? 0;
  if (before >= from && before <= to) yield before;
  const size = to - from + 1;
  const start = Number.parseInt(site.id.slice(-8), 16);
  for (let step = 0; step < size; step++) yield from + ((start + step) % size);
}

async function startServer(site: EnvironmentSite, server: SshServer, signal: AbortSignal): Promise<void> {
  const { host, id, paths } = site;
  const user = userOf(site);
  const address = host.config.host;
  const write = (path: string, text: string) => writeAtomically(path, text, ownerOf(user));
  let launches = 0;
  for (const port of portsOf(site)) {
    if (launches >= LAUNCHES) break;
    if (!(await isFree(address, port))) continue;
    const files = { hostKey: paths.hostKey, authorizedKeys: paths.authorizedKeys, sessionScript: paths.sshSession };
    const settings = {
      ...{ address, port, userName: user.name, sftpServer: server.sftpServer, ...files },
      isContained: site.settings?.inContainer ?? false,
    };
    await write(paths.sshConfig, serverConfig(settings));
    launches++;
    const isUp = await launchSshd(
      {
        ...{ program: server.sshd, configFile: paths.sshConfig, logFile: paths.sshLog, address, port },
        env: { PATH: commandPath(), HOME: paths.home, BERTH_ENVIRONMENT_ID: id },
        user: commandUser(user),
        async onStart(process) {
          await host.controlGroups?.add(id, process.pid);
          await site.edit((record) => {
            record.ssh = { port, process };
          });
        },
      },
      signal,
    );
    if (isUp) return;
  }
  await site.edit((record) => {
    delete record.ssh?.process;
  });
  throw new Error(launches > 0 ? "the SSH server does not start, see logs/sshd.log" : "no port for SSH is free");
}

async function isInUse(site: EnvironmentSite): Promise<boolean> {
  const { ssh } = site.record;
  if (!ssh?.process || Date.now() - site.ssh.seenAt < SESSIONS_MS) return false;
  site.ssh.seenAt = Date.now();
  return await hasSession(ssh.process);
}

/** Where people log in; empty if they cannot. */
export function sshUrl({ host, record: { ssh, user } }: EnvironmentSite): string {
  return ssh?.process && user ? `ssh://${user.name}@${new URL(host.config.publicUrl).hostname}:${ssh.port}` : "";
}

/** Removes what sessions got from the disk of an environment that has stopped. */
export async function forgetSsh(site: EnvironmentSite): Promise<void> {
  Object.assign(site.ssh, newSshState());
  if (site.record.ssh && site.record.user) await removeSecretFiles(placeOf(site), [SESSION_FILE]);
}
