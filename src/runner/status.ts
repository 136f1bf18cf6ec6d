import { clone, create } from "@bufbuild/protobuf";
import type { DeliveredPolicies } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentPhase,
  type EnvironmentSpec,
  type EnvironmentSpec_Secret,
  type EnvironmentStatus,
  EnvironmentStatus_AutomationsFileSchema,
  EnvironmentStatus_ContentSchema,
  EnvironmentStatus_DevContainerSchema,
  EnvironmentStatus_EnvironmentPortURLSchema,
  EnvironmentStatus_EnvironmentURLsSchema,
  EnvironmentStatus_MachineSchema,
  EnvironmentStatus_RunnerACKSchema,
  EnvironmentStatusSchema,
  type KernelControlsConfig,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";

// Pure rules about the status that a runner reports.

/** Why a specification cannot be realised here. */
export interface Refusal {
  code: AckCode;
  message: string;
}

const BUSY: ReadonlySet<ContentPhase> = new Set([
  ContentPhase.CREATING,
  ContentPhase.INITIALIZING,
  ContentPhase.UPDATING,
]);

export const acknowledgement = (spec: EnvironmentSpec, refusal?: Refusal) =>
  create(EnvironmentStatus_RunnerACKSchema, {
    specVersion: spec.specVersion,
    statusCode: refusal?.code ?? AckCode.OK,
    message: refusal?.message ?? "",
  });

/** Kernel control rules that are switched on, by field name. */
export function enabledRules(controls: KernelControlsConfig | undefined): string[] {
  const { exec, file } = controls?.veto ?? {};
  const rules: [string, boolean | undefined][] = [
    ["veto.exec", exec?.enabled],
    ["veto.file", file?.enabled],
    ["veto.file.block_devices", file?.blockDevices?.enabled],
  ];
  return rules.filter(([, enabled]) => enabled).map(([name]) => name);
}

/** Names of the security agents that policies ask for. */
export function enabledAgents({ securityAgentPolicy }: DeliveredPolicies): string[] {
  const { crowdstrike, customAgents = [] } = securityAgentPolicy ?? {};
  const custom = customAgents.filter(({ enabled }) => enabled).map(({ name }) => name);
  return [...(crowdstrike?.enabled ? ["CrowdStrike"] : []), ...custom];
}

/**
 * Status with which a start begins: content that is in place stays, by its session (empty for none), and nothing of the
 * attempt before is left.
 */
export function startedStatus(status: EnvironmentStatus, spec: EnvironmentSpec, placed: string): EnvironmentStatus {
  const session = spec.content?.session ?? "";
  const content =
    placed && status.content
      ? { ...status.content, session: placed, phase: ContentPhase.READY, failureMessage: "" }
      : create(EnvironmentStatus_ContentSchema, { session, phase: ContentPhase.CREATING });
  return create(EnvironmentStatusSchema, {
    runnerAck: acknowledgement(spec),
    machine: create(EnvironmentStatus_MachineSchema, {
      session: spec.machine?.session ?? "",
      phase: MachinePhase.CREATING,
    }),
    content,
    devcontainer: create(EnvironmentStatus_DevContainerSchema, {
      session: spec.devcontainer?.session ?? "",
      phase: DevContainerPhase.CREATING,
    }),
    automationsFile: create(EnvironmentStatus_AutomationsFileSchema, {
      session: spec.automationsFile?.session ?? "",
      phase: ContentPhase.CREATING,
    }),
  });
}

/** Parts after the last process has gone: what was under way begins anew with the next start. */
export function stoppedStatus(status: EnvironmentStatus): EnvironmentStatus {
  const next = clone(EnvironmentStatusSchema, status);
  if (next.machine) next.machine.phase = MachinePhase.STOPPED;
  if (next.devcontainer && next.devcontainer.phase !== DevContainerPhase.FAILED) {
    next.devcontainer.phase = DevContainerPhase.STOPPED;
  }
  if (next.content && BUSY.has(next.content.phase)) next.content.phase = ContentPhase.CREATING;
  if (next.automationsFile && BUSY.has(next.automationsFile.phase)) next.automationsFile.phase = ContentPhase.CREATING;
  return next;
}

const SETTLED: ReadonlySet<ContentPhase> = new Set([ContentPhase.READY, ContentPhase.FAILED, ContentPhase.UNAVAILABLE]);

/** A secret is where it should be, with the value of its session, or it is known that it cannot be. */
export const isSecretSettled = ({ secrets }: EnvironmentStatus, { id, session }: EnvironmentSpec_Secret): boolean =>
  secrets.some((each) => each.id === id && each.session === session && SETTLED.has(each.phase));

/** The secrets in variables, as one text: another one when one of them has changed. */
export const variablesMark = ({ secrets }: EnvironmentSpec): string =>
  secrets
    .filter(({ mount }) => mount.case === "environmentVariable")
    .map(({ id, session }) => `${id} ${session}`)
    .sort()
    .join("\n");

/** Content, dev container and secrets are ready for the sessions of the specification. */
export function isReady(status: EnvironmentStatus, spec: EnvironmentSpec): boolean {
  const { machine, content, devcontainer } = status;
  const settled = [DevContainerPhase.RUNNING, DevContainerPhase.FAILED];
  return (
    machine?.phase === MachinePhase.RUNNING &&
    content?.phase === ContentPhase.READY &&
    content.session === (spec.content?.session ?? "") &&
    devcontainer !== undefined &&
    settled.includes(devcontainer.phase) &&
    devcontainer.session === (spec.devcontainer?.session ?? "") &&
    spec.secrets.every((secret) => isSecretSettled(status, secret))
  );
}

/** Where an environment is reached below the runner's public URL. */
export const environmentUrl = (publicUrl: string, environmentId: string) =>
  `${publicUrl}/environments/${environmentId}`;

/** A report: a copy of the status with the URLs that go with it. The log is served from the first machine report on. */
export function reportOf(
  status: EnvironmentStatus,
  base: string,
  serving: boolean,
  ports: readonly { port: number; url: string }[],
  ssh: string,
): EnvironmentStatus {
  const report = clone(EnvironmentStatusSchema, status);
  const hasMachine = (status.machine?.phase ?? MachinePhase.UNSPECIFIED) !== MachinePhase.UNSPECIFIED;
  report.environmentUrls = create(EnvironmentStatus_EnvironmentURLsSchema, {
    logs: hasMachine ? `${base}/logs` : "",
    ops: serving ? `${base}/ops` : "",
    ssh: serving && ssh ? { url: ssh } : undefined,
    ports: serving ? ports.map((each) => create(EnvironmentStatus_EnvironmentPortURLSchema, each)) : [],
  });
  return report;
}

/** What the environment should do, as one text: a pass that works towards another one is cut short. */
export function courseOf(spec: EnvironmentSpec): string {
  if (spec.desiredPhase !== EnvironmentPhase.RUNNING) return EnvironmentPhase[spec.desiredPhase] ?? "";
  return `RUNNING ${spec.machine?.session} ${spec.content?.session}`;
}
