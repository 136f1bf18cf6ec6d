import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chown, mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { clone, create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { type Client, Code, ConnectError, createClient, type HandlerContext } from "@connectrpc/connect";
import { connectNodeAdapter, createConnectTransport } from "@connectrpc/connect-node";
import { pino } from "pino";
import { v7 as uuidv7 } from "uuid";
import {
  type CompleteCallRequest,
  DesiredEnvironmentSchema,
  Directive,
  IntrospectTokenResponse_Kind as Kind,
  ObjectKind,
  ReportResult_Outcome as Outcome,
  type RegisterRequest,
  RunnerControlService,
  type WatchRequest,
  type WatchResponse,
  WatchResponseSchema,
} from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  type Environment,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentSchema,
  EnvironmentService,
  type EnvironmentSpec,
  type EnvironmentSpec_Secret,
  EnvironmentSpec_SecretSchema,
  EnvironmentSpecSchema,
  type EnvironmentStatus,
  EnvironmentStatusSchema,
  type GitInitializer_CloneTargetMode as Mode,
} from "../gen/gitpod/v1/environment_pb.js";
import { IdentityService } from "../gen/gitpod/v1/identity_pb.js";
import {
  EnvironmentClassSchema,
  RunnerConfigurationService,
  type SCMIntegration,
} from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, RunnerService } from "../gen/gitpod/v1/runner_pb.js";
import { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import type { RunnerHostConfig } from "../src/config.ts";
import {
  applyReport,
  type EnvironmentState,
  newFacts,
  requestDelete,
  requestStart,
  requestStop,
  type Settled,
  settle,
  type Transition,
} from "../src/domain/lifecycle.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { type RunningRunner, startRunner } from "../src/runner/main.ts";
import { environmentPaths } from "../src/runner/paths.ts";
import { readRecord } from "../src/runner/record.ts";
import { removeScratch } from "../src/runner/sandbox/sandbox.ts";
import { killEnvironmentProcesses, type ProcessRef, terminateSession } from "../src/runner/supervisor/processes.ts";
import { removeUser } from "../src/runner/users.ts";
import { eventually } from "./harness/wait.ts";

const HEARTBEAT_MS = 200;
/** Machines that run tests are busy. */
const PATIENCE_MS = 90_000;

type Event = WatchResponse["event"];
type SpecInit = MessageInitShape<typeof EnvironmentSpecSchema>;

const event = (value: Event) => create(WatchResponseSchema, { event: value });
const newToken = (kind: TokenKind) => tokenText(kind, randomBytes);

interface Grant {
  kind: Kind;
  environmentId: string;
  expiresAt: Date | undefined;
}

/**
 * A control plane that speaks the private protocol over HTTP and keeps environments in memory by the rules of the
 * domain. Tests change goals, hand out tokens, and let it misbehave.
 */
export class FakeControlPlane implements AsyncDisposable {
  readonly runnerId = uuidv7();
  controlPlaneId = uuidv7();
  readonly exchangeToken = newToken(TokenKind.RUNNER_EXCHANGE);
  readonly registrations: RegisterRequest[] = [];
  readonly completed: CompleteCallRequest[] = [];
  readonly introspected: string[] = [];
  /** Port tokens that can be exchanged, and what for. */
  readonly redeemable = new Map<string, string>();
  readonly activity: string[] = [];
  readonly activitySources: string[] = [];
  readonly deregistered: number[] = [];
  /** Everything reported, in the order it came. */
  readonly reports: { environmentId: string; status: EnvironmentStatus; outcome: Outcome }[] = [];
  directive = Directive.UNSPECIFIED;
  heartbeats = 0;
  /** Values by the ids of secrets; credentials by host. */
  readonly secretValues = new Map<string, string>();
  readonly hostTokens = new Map<string, string>();
  /** What admins declared about hosts. */
  readonly integrations: SCMIntegration[] = [];
  /** Hosts whose credentials were asked for. */
  readonly hostsAsked: string[] = [];
  /** Ids of secrets that were asked for, call by call. */
  readonly secretsAsked: string[][] = [];
  /** No environment gets a token, so that no machine comes up. */
  withholdTokens = false;
  /** No environment gets values of secrets, nor credentials for hosts. */
  withholdSecrets = false;
  /** Revisions that streams were asked to resume from. */
  readonly resumed: bigint[] = [];
  /** Reports of this environment are answered with INVALID_ARGUMENT. */
  malformed = "";
  /** Values of the class of every environment. */
  classConfiguration: Record<string, string> = { cpu: "1", memory: "512" };
  url = "";

  readonly #states = new Map<string, EnvironmentState>();
  readonly #gone = new Set<string>();
  readonly #grants = new Map<string, Grant>();
  readonly #changes: { revision: bigint; id: string }[] = [];
  readonly #calls: Event[] = [];
  readonly #failures: Code[] = [];
  readonly #watchers = new Set<() => void>();
  readonly #streams = new Set<AbortController>();
  #accessTokens = new Set<string>();
  #used = false;
  #epoch = 0n;
  #linkId = "";
  #revision = 1n;
  #server: Server | undefined;

  static async start(): Promise<FakeControlPlane> {
    const plane = new FakeControlPlane();
    await plane.listen(0);
    return plane;
  }

  async listen(port: number): Promise<void> {
    const serve = connectNodeAdapter({
      routes: (router) => {
        router.service(RunnerControlService, {
          register: (request, context) => this.#register(request, context),
          heartbeat: (request, context) => {
            this.#check(context, request.linkId);
            this.heartbeats++;
            return { directive: this.directive, headRevision: this.#revision };
          },
          watch: (request, context) => this.#watch(request, context),
          reportEnvironments: (request, context) => {
            this.#check(context, request.linkId);
            if (request.items.some((item) => item.environmentId === this.malformed)) {
              throw new ConnectError("cannot be read", Code.InvalidArgument);
            }
            return { results: request.items.map((item) => this.#report(item.environmentId, item.status)) };
          },
          createEnvironmentToken: (request, context) => {
            this.#check(context);
            if (this.withholdTokens) throw new ConnectError("not now", Code.Unavailable);
            const state = this.#state(request.environmentId);
            if (state.spec.machine?.session !== request.machineSession) {
              throw new ConnectError("another start", Code.FailedPrecondition);
            }
            return { token: this.grant(request.environmentId, Kind.ENVIRONMENT) };
          },
          getEnvironmentSecrets: (request, context) => {
            this.#check(context);
            if (this.withholdSecrets) throw new ConnectError("not now", Code.Unavailable);
            this.secretsAsked.push(request.secretIds);
            const { spec } = this.#state(request.environmentId);
            const known = new Set(spec.secrets.map(({ sourceRef }) => sourceRef));
            if (request.secretIds.some((id) => !known.has(id))) throw new ConnectError("not its", Code.NotFound);
            const ids = request.secretIds.filter((id) => this.secretValues.has(id));
            return { secrets: ids.map((id) => ({ id, value: this.secretValues.get(id) })) };
          },
          getHostToken: (request, context) => {
            this.#check(context);
            this.hostsAsked.push(request.host);
            if (this.withholdSecrets) throw new ConnectError("not now", Code.Unavailable);
            const token = this.hostTokens.get(request.host);
            if (!token) throw new ConnectError("none", Code.NotFound);
            return { token, scmId: "github" };
          },
          introspectToken: (request, context) => {
            this.#check(context);
            this.introspected.push(request.token);
            const grant = this.#grants.get(request.token);
            const isActive = grant && (!grant.expiresAt || grant.expiresAt > new Date());
            if (!isActive) return { active: false };
            return { ...grant, active: true, expiresAt: grant.expiresAt && timestampFromDate(grant.expiresAt) };
          },
          redeemPortToken: (request, context) => {
            this.#check(context);
            const next = this.redeemable.get(request.token) ?? "";
            this.redeemable.delete(request.token);
            return { token: next };
          },
          completeCall: (request, context) => {
            this.#check(context);
            this.completed.push(request);
            return {};
          },
          deregister: (request, context) => {
            this.#check(context, request.linkId);
            this.deregistered.push(request.reason);
            return {};
          },
        });
        router.rpc(RunnerConfigurationService.method.listSCMIntegrations, (_request, context) => {
          this.#check(context);
          return { integrations: this.integrations };
        });
        router.rpc(IdentityService.method.exchangeToken, (request) => this.#exchange(request.exchangeToken));
        router.rpc(RunnerService.method.createRunnerToken, (request, context) => {
          this.#check(context);
          if (request.runnerId !== this.runnerId) throw new ConnectError("not you", Code.PermissionDenied);
          this.#used = false;
          return { exchangeToken: this.exchangeToken };
        });
        router.rpc(EnvironmentService.method.getEnvironment, (request, context) => {
          if (this.#grants.get(bearer(context))?.environmentId !== request.environmentId) {
            throw new ConnectError("not yours", Code.Unauthenticated);
          }
          return { environment: this.environment(request.environmentId) };
        });
        router.rpc(EnvironmentService.method.markEnvironmentActive, (request, context) => {
          if (this.#grants.get(bearer(context))?.environmentId !== request.environmentId) {
            throw new ConnectError("not yours", Code.Unauthenticated);
          }
          this.activity.push(request.environmentId);
          this.activitySources.push(request.activitySignal?.source ?? "");
          return {};
        });
      },
    });
    const server = createServer((request, response) => {
      request.url = request.url?.replace(/^\/api\//, "/");
      serve(request, response);
    });
    await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
    this.#server = server;
    this.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  }

  get #port(): number {
    return Number(new URL(this.url).port);
  }

  /** The server goes away; state stays. */
  async outage(): Promise<void> {
    const closed = new Promise((resolve) => this.#server?.close(resolve));
    this.#server?.closeAllConnections();
    await closed;
  }

  async back(): Promise<void> {
    await this.listen(this.#port);
  }

  exchanges = 0;

  #exchange(token: string) {
    if (token !== this.exchangeToken || this.#used) throw new ConnectError("used", Code.Unauthenticated);
    this.#used = true;
    this.exchanges++;
    const accessToken = newToken(TokenKind.RUNNER_ACCESS);
    this.#accessTokens.add(accessToken);
    return { accessToken };
  }

  /** The next call of the runner fails with this code. */
  failOnce(code: Code): void {
    this.#failures.push(code);
  }

  /** Another process registers for the same runner. */
  replaceLink(): void {
    this.#linkId = uuidv7();
  }

  /** No access token that was handed out is good any more. */
  revokeRunner(): void {
    this.#accessTokens = new Set();
  }

  #check(context: HandlerContext, linkId = this.#linkId): void {
    const failure = this.#failures.shift();
    if (failure !== undefined) throw new ConnectError("told to fail", failure);
    if (!this.#accessTokens.has(bearer(context))) throw new ConnectError("who are you", Code.Unauthenticated);
    if (linkId !== this.#linkId) throw new ConnectError("another process has registered", Code.Aborted);
  }

  #register(request: RegisterRequest, context: HandlerContext) {
    this.#check(context);
    this.registrations.push(request);
    this.#linkId = uuidv7();
    this.#epoch++;
    return {
      linkId: this.#linkId,
      epoch: this.#epoch,
      heartbeatInterval: durationFromMs(HEARTBEAT_MS),
      lease: durationFromMs(30_000),
      runner: { runnerId: this.runnerId, status: { phase: RunnerPhase.ACTIVE } },
      controlPlaneId: this.controlPlaneId,
    };
  }

  async *#watch(request: WatchRequest, context: HandlerContext): AsyncGenerator<WatchResponse> {
    this.#check(context, request.linkId);
    const linkId = request.linkId;
    this.resumed.push(request.resumeRevision);
    const cut = new AbortController();
    this.#streams.add(cut);
    let sent = request.resumeRevision;
    let calls = 0;
    try {
      if (sent === 0n) {
        const revision = this.#revision;
        yield event({ case: "snapshotBegin", value: this.#begin(revision) });
        for (const id of this.#states.keys()) yield this.#upsert(id, 0n);
        for (const id of this.registrations.at(-1)?.localEnvironmentIds ?? []) {
          if (this.#gone.has(id)) yield this.#remove(id, 0n);
        }
        yield event({ case: "snapshotEnd", value: { $typeName: "berth.runner.v1.SnapshotEnd", revision } });
        sent = revision;
      }
      for (;;) {
        this.#check(context, linkId);
        const from = sent;
        for (const { revision, id } of this.#changes.filter((change) => change.revision > from)) {
          if (this.#gone.has(id)) yield this.#remove(id, revision);
          else if (this.#states.has(id)) yield this.#upsert(id, revision);
          sent = revision;
        }
        for (; calls < this.#calls.length; calls++) yield event(this.#calls[calls] ?? { case: undefined });
        await this.#news(AbortSignal.any([context.signal, cut.signal]));
        if (context.signal.aborted) return;
        if (cut.signal.aborted) throw new ConnectError("cut", Code.Unavailable);
        yield event({ case: "bookmark", value: { $typeName: "berth.runner.v1.Bookmark", revision: sent } });
      }
    } finally {
      this.#streams.delete(cut);
    }
  }

  #begin(revision: bigint) {
    return { $typeName: "berth.runner.v1.SnapshotBegin" as const, revision, controlPlaneId: this.controlPlaneId };
  }

  #upsert(id: string, revision: bigint): WatchResponse {
    const environmentClass = create(EnvironmentClassSchema, {
      configuration: Object.entries(this.classConfiguration).map(([key, value]) => ({ key, value })),
    });
    const value = create(DesiredEnvironmentSchema, { environment: this.environment(id), environmentClass });
    const object = { case: "environment" as const, value };
    return event({ case: "upsert", value: { $typeName: "berth.runner.v1.Upsert", revision, object } });
  }

  #remove(id: string, revision: bigint): WatchResponse {
    const kind = ObjectKind.ENVIRONMENT;
    return event({ case: "remove", value: { $typeName: "berth.runner.v1.Remove", revision, kind, id } });
  }

  #news(signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        this.#watchers.delete(done);
        resolve();
      };
      this.#watchers.add(done);
      signal.addEventListener("abort", done, { once: true });
      if (signal.aborted) done();
    });
  }

  #touch(id: string): void {
    this.#changes.push({ revision: ++this.#revision, id });
    for (const wake of [...this.#watchers]) wake();
  }

  /** Ends every stream of desired state as a replica that goes away does. */
  cutStreams(): void {
    for (const stream of this.#streams) stream.abort();
  }

  ask(callId: string, contextUrl: string): void {
    const request = {
      case: "parseContext" as const,
      value: { $typeName: "berth.runner.v1.ParseContextCall" as const, contextUrl },
    };
    const deadline = timestampFromDate(new Date(Date.now() + 20_000));
    this.#calls.push({ case: "call", value: { $typeName: "berth.runner.v1.Call", callId, deadline, request } });
    for (const wake of [...this.#watchers]) wake();
  }

  #report(environmentId: string, status: EnvironmentStatus | undefined) {
    const state = this.#states.get(environmentId);
    const reported = status ?? create(EnvironmentStatusSchema);
    const judged = (outcome: Outcome) => {
      this.reports.push({ environmentId, status: reported, outcome });
      return { environmentId, outcome };
    };
    if (!state) return judged(Outcome.NOT_ASSIGNED);
    const { result, next } = applyReport(state, reported, new Date());
    if (result === "not_assigned") return judged(Outcome.NOT_ASSIGNED);
    if (result === "rejected") return judged(Outcome.REJECTED);
    this.#store(environmentId, next);
    return judged(Outcome.OK);
  }

  #store(id: string, next: Settled): void {
    const { changed, ...state } = next;
    this.#states.set(id, state);
    if (state.status.phase === EnvironmentPhase.DELETED) {
      this.#states.delete(id);
      this.#gone.add(id);
    }
    if (changed.spec || this.#gone.has(id)) this.#touch(id);
  }

  #state(id: string): EnvironmentState {
    const state = this.#states.get(id);
    if (!state) throw new Error(`no environment ${id}`);
    return state;
  }

  #apply(id: string, transition: Transition): void {
    if (transition.kind === "refused") throw new Error(transition.reason);
    if (transition.kind === "changed") this.#store(id, transition.next);
  }

  environment(id: string): Environment {
    const { metadata, spec, status } = this.#state(id);
    return create(EnvironmentSchema, { id, metadata, spec, status });
  }

  isGone = (id: string) => this.#gone.has(id);
  exists = (id: string) => this.#states.has(id);

  /** An environment that is to run, with fresh sessions; `spec` comes on top. */
  create(spec: SpecInit = {}, id = uuidv7()): string {
    const session = () => ({ session: uuidv7() });
    const state: EnvironmentState = {
      metadata: create(EnvironmentMetadataSchema, {
        runnerId: this.runnerId,
        lastStartedAt: timestampFromDate(new Date()),
      }),
      spec: create(EnvironmentSpecSchema, {
        specVersion: 1n,
        desiredPhase: EnvironmentPhase.RUNNING,
        ...spec,
        machine: session(),
        devcontainer: { ...session(), ...spec.devcontainer },
        automationsFile: { ...session(), ...spec.automationsFile },
        content: { ...session(), gitUsername: "Ada Lovelace", gitEmail: "ada@example.com", ...spec.content },
      } as SpecInit),
      status: create(EnvironmentStatusSchema, { phase: EnvironmentPhase.CREATING, statusVersion: 1n }),
      facts: newFacts(new Date()),
    };
    this.#states.set(id, state);
    this.#touch(id);
    return id;
  }

  /** An entry of a specification for a secret with this value. */
  secret(
    name: string,
    mount: EnvironmentSpec_Secret["mount"],
    value: string,
    more: MessageInitShape<typeof EnvironmentSpec_SecretSchema> = {},
  ): EnvironmentSpec_Secret {
    const sourceRef = uuidv7();
    this.secretValues.set(sourceRef, value);
    const ids = { id: uuidv7(), session: uuidv7(), sourceRef };
    return create(EnvironmentSpec_SecretSchema, { ...ids, name, mount, source: "control-plane", ...more });
  }

  /** Another value for the secret of an entry, and the marker that says so. */
  renewSecret(environmentId: string, name: string, value: string): void {
    this.edit(environmentId, ({ secrets }) => {
      const entry = secrets.find((each) => each.name === name);
      if (!entry) throw new Error(`no secret ${name}`);
      this.secretValues.set(entry.sourceRef, value);
      entry.session = uuidv7();
    });
  }

  /** Forgets an environment as if it had never been. */
  lose(id: string): void {
    this.#states.delete(id);
  }

  edit(id: string, change: (spec: EnvironmentSpec) => void): void {
    const state = this.#state(id);
    const spec = clone(EnvironmentSpecSchema, state.spec);
    change(spec);
    this.#store(id, settle(state, { ...state, spec }, new Date()));
  }

  startEnvironment(id: string): void {
    const state = this.#state(id);
    this.#apply(id, requestStart(state, { machineSession: uuidv7(), secrets: state.spec.secrets }, new Date()));
  }

  stopEnvironment(id: string): void {
    this.#apply(id, requestStop(this.#state(id), new Date()));
  }

  deleteEnvironment(id: string, force = false): void {
    this.#apply(id, requestDelete(this.#state(id), force, new Date()));
  }

  /** A token for an environment, as the control plane would hand it out. */
  grant(environmentId: string, kind: Kind, expiresAt?: Date): string {
    const kinds: Partial<Record<Kind, TokenKind>> = {
      [Kind.ENVIRONMENT]: TokenKind.ENVIRONMENT,
      [Kind.ENVIRONMENT_LOGS]: TokenKind.LOGS,
      [Kind.PORT_ACCESS]: TokenKind.PORT_ACCESS,
    };
    const token = newToken(kinds[kind] ?? TokenKind.ENVIRONMENT_ACCESS);
    this.#grants.set(token, { kind, environmentId, expiresAt });
    return token;
  }

  /** Waits until an environment satisfies a condition. */
  async until(id: string, condition: (environment: Environment) => boolean, what: string): Promise<Environment> {
    return await eventually(
      () => {
        if (!this.#states.has(id)) throw new Error("the environment is gone");
        const environment = this.environment(id);
        if (condition(environment)) return environment;
        throw new Error(
          JSON.stringify(environment.status, (_key, value) => (typeof value === "bigint" ? String(value) : value)),
        );
      },
      what,
      PATIENCE_MS,
    );
  }

  untilPhase(id: string, phase: EnvironmentPhase): Promise<Environment> {
    return this.until(id, (environment) => environment.status?.phase === phase, `phase ${EnvironmentPhase[phase]}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.outage();
  }
}

function bearer(context: HandlerContext): string {
  return context.requestHeader.get("authorization")?.replace(/^Bearer /, "") ?? "";
}

/** Content from git, as in a specification. */
export const fromGit = (
  remoteUri: string,
  more: { targetMode?: Mode; cloneTarget?: string; checkoutLocation?: string; upstreamRemoteUri?: string } = {},
) => ({
  spec: { case: "git" as const, value: { remoteUri, ...more } },
});

export const contentOf = (...specs: ReturnType<typeof fromGit>[]): SpecInit => ({
  content: { initializer: { specs } },
});

/** A runner that is a process of its own. */
export interface RunnerProcess {
  port: number;
  /** Exit code; null if a signal ended it. */
  exited: Promise<number | null>;
  kill(signal?: NodeJS.Signals): Promise<number | null>;
}

/** A data folder and runners in it, one at a time. */
export class TestRunner implements AsyncDisposable {
  readonly dataDir: string;
  readonly plane: FakeControlPlane;
  readonly gitHost: string;
  readonly lines: string[] = [];
  running: RunningRunner | undefined;
  exchangeToken: string;

  private constructor(plane: FakeControlPlane, dataDir: string, gitHost: string) {
    this.plane = plane;
    this.dataDir = dataDir;
    this.gitHost = gitHost;
    this.exchangeToken = plane.exchangeToken;
  }

  static async create(plane: FakeControlPlane, gitHost = "", folder = "r"): Promise<TestRunner> {
    return new TestRunner(plane, join(await mkdtemp(join(tmpdir(), "br-")), folder), gitHost);
  }

  config(more: Partial<RunnerHostConfig> = {}): RunnerHostConfig {
    return {
      name: "test",
      host: "127.0.0.1",
      port: 0,
      publicUrl: "http://127.0.0.1:0",
      dataDir: this.dataDir,
      maxEnvironments: 10,
      logDays: 30,
      allowUnenforced: false,
      sandbox: "auto",
      hiddenFolders: [],
      hostDevcontainer: "run",
      containerEngine: "none",
      sshPorts: { from: 22_000, to: 22_999 },
      scm: { fallback: true, allowHosts: this.gitHost ? [this.gitHost] : [], schemes: ["http"] },
      logLevel: "debug",
      ...more,
    };
  }

  async start(more: Partial<RunnerHostConfig> = {}): Promise<RunningRunner> {
    const log = pino({ level: "debug" }, { write: (line: string) => void this.lines.push(line) });
    const { url } = this.plane;
    const { exchangeToken } = this;
    this.running = await startRunner({ config: this.config(more), apiUrl: url, publicApiUrl: url, exchangeToken, log });
    return this.running;
  }

  /** Starts the runner as a process of its own, which can be killed; as another user if given. */
  async spawn(more: Partial<RunnerHostConfig> = {}, uid?: number): Promise<RunnerProcess> {
    const { url, exchangeToken } = this.plane;
    if (uid !== undefined) await chown(join(this.dataDir, ".."), uid, uid);
    const options = JSON.stringify({ config: this.config(more), apiUrl: url, publicApiUrl: url, exchangeToken });
    const program = fileURLToPath(new URL("./runner-process.ts", import.meta.url));
    const child = spawn(process.execPath, [program], {
      cwd: "/",
      env: { PATH: process.env.PATH, HOME: "/nonexistent" },
      stdio: ["pipe", "pipe", "pipe"],
      ...(uid !== undefined && { uid, gid: uid }),
    });
    child.stdin.end(options);
    child.stderr.setEncoding("utf8").on("data", (text: string) => this.lines.push(text));
    const exited = new Promise<number | null>((resolve) => child.once("exit", resolve));
    const port = await new Promise<number>((resolve, reject) => {
      child.stdout.once("data", (text: Buffer) => resolve(Number(text.toString())));
      child.once("exit", () => reject(new Error(`the runner ended: ${this.lines.join("")}`)));
    });
    const kill = async (signal: NodeJS.Signals = "SIGKILL") => {
      child.kill(signal);
      return await exited;
    };
    this.#spawned = { port, kill, exited };
    return this.#spawned;
  }

  #spawned: RunnerProcess | undefined;

  get baseUrl(): string {
    return `http://127.0.0.1:${this.running?.port ?? this.#spawned?.port}`;
  }

  folder(id: string, ...rest: string[]): string {
    return join(this.dataDir, "environments", id, ...rest);
  }

  /** The operations of an environment, with a token. */
  ops(
    id: string,
    token = this.plane.grant(id, Kind.ENVIRONMENT_ACCESS),
    baseUrl = this.baseUrl,
  ): Client<typeof EnvironmentOpsService> {
    return createClient(
      EnvironmentOpsService,
      createConnectTransport({
        baseUrl: `${baseUrl}/environments/${id}/ops`,
        httpVersion: "1.1",
        interceptors: [
          (next) => (request) => {
            if (token) request.header.set("authorization", `Bearer ${token}`);
            return next(request);
          },
        ],
      }),
    );
  }

  /** Runs a command in an environment and returns what it printed. */
  async exec(id: string, command: string): Promise<string> {
    const { stdout, stderr, exitCode } = await this.ops(id).exec({ command });
    if (exitCode !== 0) throw new Error(`${command} ended with ${exitCode}: ${stderr}`);
    return stdout.trim();
  }

  logs(id: string, token: string, query = "", init: RequestInit = {}): Promise<Response> {
    const headers = token ? { authorization: `Bearer ${token}` } : {};
    return fetch(`${this.baseUrl}/environments/${id}/logs${query}`, { ...init, headers });
  }

  async record(id: string): Promise<{
    user?: { name: string; uid: number; own: boolean };
    supervisor?: { pid: number };
    ssh?: { port: number; process?: ProcessRef };
  }> {
    return JSON.parse(await readFile(this.folder(id, "state.json"), "utf8"));
  }

  /** Stops the runner, then whatever it has left, and removes the folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.running?.stop();
    await this.#spawned?.kill();
    await cleanUp(this.dataDir);
    await rm(join(this.dataDir, ".."), { recursive: true, force: true });
  }
}

/** Ends what the runners of a data folder have left behind, and removes the users they made. */
async function cleanUp(dataDir: string): Promise<void> {
  for (const part of ["environments", "quarantine", "trash"]) {
    for (const name of await readdir(join(dataDir, part)).catch(() => [])) {
      const root = join(dataDir, part, name);
      const id = name.split(".")[0] ?? "";
      const record = await readRecord({ ...environmentPaths(dataDir, id), root, record: join(root, "state.json") });
      const uid = record?.user?.own ? record.user.uid : undefined;
      await killEnvironmentProcesses({ environmentId: id, uid });
      if (record?.ssh?.process) await terminateSession(record.ssh.process, 0);
      await removeUser(id, record?.user);
      await removeScratch(environmentPaths(dataDir, id));
    }
  }
}
