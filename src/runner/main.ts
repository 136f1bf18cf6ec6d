import { hostname } from "node:os";
import { create } from "@bufbuild/protobuf";
import type { Logger } from "pino";
import {
  DeliveredPoliciesSchema,
  DeregisterRequest_Reason as Reason,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { RunnerCapability, RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import type { RunnerHostConfig } from "../config.ts";
import { linuxHostSchema } from "../domain/environment-class.ts";
import { createGuard } from "../scm/guard.ts";
import { Access } from "./access.ts";
import { AutomationReports } from "./automations/reports.ts";
import { Calls } from "./calls.ts";
import { ControlGroups } from "./cgroups.ts";
import { EngineAccess } from "./containers/find.ts";
import { prepareRuntime } from "./containers/runtime.ts";
import { connectControlPlane } from "./control-plane.ts";
import { Credentials, RefusedError } from "./credentials.ts";
import { Environments } from "./environments.ts";
import { type Host, hostFacts, programVersion, systemDetails } from "./host.ts";
import { Link } from "./link.ts";
import { lockDataDir } from "./lock.ts";
import { prepareDataDir } from "./machine.ts";
import { compileAhead } from "./machine-supervisor.ts";
import { compiledFolder } from "./paths.ts";
import { Reports } from "./reports.ts";
import { findSandbox } from "./sandbox/find.ts";
import type { Sandbox } from "./sandbox/sandbox.ts";
import { startRunnerServer } from "./server.ts";
import { sourceControl } from "./source-control.ts";
import { findSshServer, programsOf } from "./ssh/server.ts";
import { gate } from "./supervisor/gate.ts";
import { WaitingSupervisor } from "./waiting-supervisor.ts";

/** What a runner needs to start. */
export interface RunnerOptions {
  config: RunnerHostConfig;
  /** Where the runner reaches the control plane. */
  apiUrl: string;
  /** Where the processes of environments reach it. */
  publicApiUrl: string;
  /** First credential; needed as long as the data folder holds none. */
  exchangeToken?: string;
  log: Logger;
}

/** Why a runner ended: asked to, credential or data folder not accepted, another process took over, runner deleted. */
export type RunnerEnd = "stopped" | "refused" | "replaced" | "deleted";

/** A runner at work. */
export interface RunningRunner {
  /** Where it serves; differs from the configured port if that is 0. */
  port: number;
  /** Resolves with the first link that the control plane accepts. */
  registered: Promise<void>;
  /** Resolves when the runner has ended by itself or was stopped; never rejects. */
  finished: Promise<RunnerEnd>;
  /** Says goodbye and lets go; environments keep running. Safe to call more than once. */
  stop(): Promise<void>;
}

const MACHINES_AT_ONCE = 4;
const MACHINES_WAITING = 10_000;
const CLOSE_MS = 2_000;
const FIRST_SIGN_IN_MS = 20_000;

/**
 * Starts the Linux-host runner. Resolves when it serves its port and has used its first credential, or has tried to
 * for 20 s; signing up goes on in the background. Throws if the data folder or the port cannot be used,
 * or environments cannot be kept apart as the configuration requires.
 */
export async function startRunner(options: RunnerOptions): Promise<RunningRunner> {
  const dataDir = await prepareDataDir(options.config.dataDir);
  const unlock = await lockDataDir(dataDir);
  try {
    return await start({ ...options, config: { ...options.config, dataDir } }, unlock);
  } catch (error) {
    await unlock();
    throw error;
  }
}

async function start(options: RunnerOptions, unlock: () => Promise<void>): Promise<RunningRunner> {
  const { apiUrl, publicApiUrl, exchangeToken, log } = options;
  const config = { ...options.config };
  const credentials = await Credentials.open(config.dataDir, exchangeToken, log);
  const { containerEngine: choice, dockerHost } = config;
  const engines = await EngineAccess.open({ choice, dockerHost }, config.dataDir, log);
  const facts = await hostFacts(config.dataDir, engines);
  const program = await programVersion();
  const controlPlane = connectControlPlane(apiUrl, () => credentials.accessToken);
  const guard = createGuard({ allowHosts: config.scm.allowHosts, schemes: config.scm.schemes });
  const sshServer = await findSshServer(process.env.PATH ?? "");
  const { sandbox, problem: sandboxProblem } = await findSandbox(config, programsOf(sshServer));
  if (sandboxProblem) log.warn(`environments are not kept apart by bubblewrap: ${sandboxProblem}`);
  const sources = sourceControl(controlPlane, guard, publicApiUrl, (sealed) => credentials.openSealed(sealed));
  let link: Link | undefined;
  const host: Host = {
    ...{ config, publicApiUrl, program, controlPlane, log, ...sources },
    engines,
    containerRuntime: once(() => prepareRuntime(config.dataDir)),
    schema: linuxHostSchema(`${publicApiUrl}/oauth/scm/callback`, facts),
    sshServer,
    ...{ sandbox, sandboxProblem },
    controlGroups: await ControlGroups.open(),
    waitingSupervisor: await waitingSupervisor(config, sandbox),
    isDraining: () => link?.draining ?? false,
    reservedUids: (id) => environments.reservedUids(id),
    policies: create(DeliveredPoliciesSchema),
    startGate: gate(MACHINES_AT_ONCE, MACHINES_WAITING),
  };
  void compileAhead(host);
  const reports: Reports = new Reports(log, (id, outcome, status) => environments.judged(id, outcome, status));
  const automations = new AutomationReports(log, (id) => environments.removeAutomation(id));
  const environments: Environments = await Environments.open(
    host,
    (id, status) => reports.push(id, status),
    (id) => reports.forget(id),
    automations,
  );
  const server = await startRunnerServer({
    ...{ host: config.host, port: config.port, dataDir: config.dataDir, environments, log },
    access: new Access(host.controlPlane),
    publicUrl: () => config.publicUrl,
    portDomain: config.portDomain,
    signInUrl: publicApiUrl,
    isSharingOff: () => host.policies.portSharingDisabled,
    connected: () => link?.connected ?? false,
  }).catch(async (error: unknown) => {
    await environments.close();
    throw error;
  });
  // With a port that the system chose, the public URL can only be known now.
  config.publicUrl = withPort(config.publicUrl, server.port);

  const registered = Promise.withResolvers<void>();
  const status = () => ({
    phase: RunnerPhase.ACTIVE,
    version: program.version,
    systemDetails: `${hostname()}: ${systemDetails(facts)}`,
    capabilities: [RunnerCapability.ALLOW_ENV_TOKEN_POPULATION, RunnerCapability.PORT_AUTHENTICATION],
    additionalInfo: [{ key: "max_environments", value: String(config.maxEnvironments) }],
    publicKey: credentials.publicKey,
  });
  const calls = new Calls(host);
  const running = new Link({
    ...{ host, credentials, environments, reports, automations, calls, status },
    registered() {
      host.waitingSupervisor?.prepare();
      registered.resolve();
    },
  });
  link = running;

  const work = async (): Promise<RunnerEnd> => {
    const end = await running.run();
    if (end === "refused" || end === "deleted") await environments.haltAll();
    if (end === "deleted") await running.stop(Reason.DELETED);
    await environments.close();
    engines.close();
    await server.close(CLOSE_MS);
    host.waitingSupervisor?.close();
    await unlock();
    return end === "foreign" ? "refused" : end;
  };
  await signInFirst(credentials, host);
  const finished = work().catch((error: unknown): RunnerEnd => {
    log.error({ err: error }, "the runner could not end in order");
    return "stopped";
  });
  return {
    ...{ port: server.port, registered: registered.promise, finished },
    async stop() {
      await running.stop(Reason.STOPPING);
      await finished;
    },
  };
}

/** The users of environments tell whose a supervisor is, so that one can be there before its environment is known. */
async function waitingSupervisor(
  { dataDir }: RunnerHostConfig,
  sandbox: Sandbox | undefined,
): Promise<WaitingSupervisor | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  const enclosure = await sandbox?.unassigned().catch(() => undefined);
  return sandbox && !enclosure ? undefined : new WaitingSupervisor(compiledFolder(dataDir), enclosure);
}

/** Gives the first credential a moment to be used, so that whoever handed it over may forget it. */
async function signInFirst(credentials: Credentials, { controlPlane, log }: Host): Promise<void> {
  try {
    await credentials.signIn(controlPlane, AbortSignal.timeout(FIRST_SIGN_IN_MS));
  } catch (error) {
    // The link meets the same refusal and ends with it; anything else is tried again there.
    if (!(error instanceof RefusedError)) log.warn("the control plane could not be asked for an access token yet");
  }
}

/** Does something at the first call; only what has failed is tried again. */
function once<T>(work: () => Promise<T>): () => Promise<T> {
  let result: Promise<T> | undefined;
  return () => {
    result ??= work().catch((error: unknown) => {
      result = undefined;
      throw error;
    });
    return result;
  };
}

/** The URL with the port in place of a port 0. */
function withPort(publicUrl: string, port: number): string {
  const url = new URL(publicUrl);
  if (url.port !== "0") return publicUrl;
  url.port = String(port);
  return url.href.replace(/\/+$/, "");
}
