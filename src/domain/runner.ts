import { clone, create } from "@bufbuild/protobuf";
import type { Timestamp } from "@bufbuild/protobuf/wkt";
import { RunnerKind, RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import {
  type CreateRunnerRequest,
  LogLevel,
  RunnerConfigurationSchema,
  RunnerPhase,
  RunnerReleaseChannel,
  type RunnerSpec,
  RunnerSpecSchema,
  type RunnerStatus,
  RunnerStatusSchema,
  RunnerVariant,
  type UpdateWindow,
} from "../../gen/gitpod/v1/runner_pb.js";
import type { FieldProblem } from "./errors.ts";

/** Lease of a link, its renewal, and how often expiry is looked for; milliseconds. */
export const LEASE_MS = 30_000;
export const HEARTBEAT_MS = 10_000;
/** A runner that should go but stays silent is called deleted after this long. */
export const DELETE_DEADLINE_MS = 10 * 60_000;
export const PROTOCOL_VERSION = 1;
/** What a local runner says while its organization has them switched off. */
export const LOCAL_RUNNERS_OFF = "local runners are disabled";
/** One-time exchange token. */
export const EXCHANGE_TOKEN_MS = 24 * 60 * 60_000;
/** Access token of a runner. */
export const ACCESS_TOKEN_MS = 90 * 24 * 60 * 60_000;

const KIND_OF_PROVIDER: Partial<Record<RunnerProvider, RunnerKind>> = {
  [RunnerProvider.AWS_EC2]: RunnerKind.REMOTE,
  [RunnerProvider.GCP]: RunnerKind.REMOTE,
  [RunnerProvider.MANAGED]: RunnerKind.REMOTE,
  [RunnerProvider.DEV_AGENT]: RunnerKind.REMOTE,
  [RunnerProvider.LINUX_HOST]: RunnerKind.LOCAL,
  [RunnerProvider.DESKTOP_MAC]: RunnerKind.LOCAL,
};

const isDefined = (enumeration: object, value: number) => value in enumeration;

function windowProblems(window: UpdateWindow | undefined): FieldProblem[] {
  const field = "spec.configuration.update_window";
  if (!window || (window.startHour === undefined && window.endHour === undefined)) return [];
  if (window.startHour === undefined) return [{ field: `${field}.start_hour`, message: "is required with end_hour" }];
  for (const [name, hour] of [
    ["start_hour", window.startHour],
    ["end_hour", window.endHour ?? 0],
  ] as const) {
    if (hour > 23) return [{ field: `${field}.${name}`, message: "must be between 0 and 23" }];
  }
  if (window.endHour === undefined) return [];
  const length = window.endHour - window.startHour + (window.endHour >= window.startHour ? 0 : 24);
  return length < 2 ? [{ field, message: "must be at least 2 hours long" }] : [];
}

function specProblems(spec: RunnerSpec | undefined): FieldProblem[] {
  const problems: FieldProblem[] = [];
  const check = (valid: boolean, field: string, message: string) => {
    if (!valid) problems.push({ field, message });
  };
  const configuration = spec?.configuration;
  const desired = spec?.desiredPhase ?? RunnerPhase.UNSPECIFIED;
  check(
    [RunnerPhase.UNSPECIFIED, RunnerPhase.ACTIVE].includes(desired),
    "spec.desired_phase",
    "must be active or unset",
  );
  check(isDefined(RunnerVariant, spec?.variant ?? 0), "spec.variant", "is not a known variant");
  check(
    isDefined(RunnerReleaseChannel, configuration?.releaseChannel ?? 0),
    "spec.configuration.release_channel",
    "is not a known channel",
  );
  check(isDefined(LogLevel, configuration?.logLevel ?? 0), "spec.configuration.log_level", "is not a known level");
  const metrics = configuration?.metrics;
  const url = URL.parse(metrics?.url ?? "");
  check(
    !metrics?.enabled || /^https?:$/.test(url?.protocol ?? ""),
    "spec.configuration.metrics.url",
    "must be an http or https URL when metrics are enabled",
  );
  return [...problems, ...windowProblems(configuration?.updateWindow)];
}

/** Kind and provider that a request asks for, and everything that is wrong with it. */
export function checkNewRunner(request: CreateRunnerRequest): {
  kind: RunnerKind;
  provider: RunnerProvider;
  problems: FieldProblem[];
} {
  const problems = specProblems(request.spec);
  const managed = request.provider === RunnerProvider.MANAGED;
  if (!request.kind === !request.provider)
    problems.unshift({ field: "provider", message: "exactly one of kind and provider must be set" });
  if (request.kind === RunnerKind.LOCAL_CONFIGURATION)
    problems.push({ field: "kind", message: "the local configuration runner cannot be created" });
  if (managed && !request.runnerManagerId)
    problems.push({ field: "runner_manager_id", message: "is required for managed runners" });
  if (!managed && request.runnerManagerId)
    problems.push({ field: "runner_manager_id", message: "is only for managed runners" });
  const provider =
    request.provider || (request.kind === RunnerKind.LOCAL ? RunnerProvider.LINUX_HOST : RunnerProvider.UNSPECIFIED);
  return { kind: KIND_OF_PROVIDER[provider] ?? request.kind, provider, problems };
}

/** A stored spec: defaults filled in, write-only values removed. */
export function newRunnerSpec(requested: RunnerSpec | undefined): RunnerSpec {
  const spec = requested ? clone(RunnerSpecSchema, requested) : create(RunnerSpecSchema);
  spec.configuration ??= create(RunnerConfigurationSchema);
  const { configuration } = spec;
  spec.desiredPhase = RunnerPhase.ACTIVE;
  spec.variant ||= RunnerVariant.STANDARD;
  configuration.releaseChannel ||= RunnerReleaseChannel.STABLE;
  configuration.logLevel ||= LogLevel.INFO;
  configuration.encryptedHoneycombApiKey = new Uint8Array();
  if (configuration.metrics) configuration.metrics.password = "";
  if (configuration.updateWindow?.startHour === undefined) configuration.updateWindow = undefined;
  return spec;
}

/** The parts of a reported status that a runner owns, with the phase and time that the control plane decides. */
export function acceptStatus(reported: RunnerStatus, phase: RunnerPhase, updatedAt: Timestamp): RunnerStatus {
  const status = clone(RunnerStatusSchema, reported);
  status.phase = phase;
  status.updatedAt = updatedAt;
  return status;
}

/** A runner that can take new environments; a degraded one reports its failures per environment. */
export const isConnected = (phase: RunnerPhase) => phase === RunnerPhase.ACTIVE || phase === RunnerPhase.DEGRADED;

/** Removes what a reader without ADMIN does not see: operator data. */
export function blankedForUsers(spec: RunnerSpec, status: RunnerStatus): void {
  if (spec.configuration) {
    spec.configuration.metrics = undefined;
    spec.configuration.encryptedHoneycombApiKey = new Uint8Array();
  }
  status.supportBundleUrl = "";
  status.systemDetails = "";
}
