import { create } from "@bufbuild/protobuf";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentSpec,
  type EnvironmentSpec_DevContainer,
  EnvironmentSpec_DevContainerSchema,
  type EnvironmentStatus_DevContainer,
} from "../../gen/gitpod/v1/environment_pb.js";
import { type ContainerProgress, containerName } from "./devcontainer/belongings.ts";
import { onHost } from "./devcontainer/container-keeper.ts";
import { ContainerWork, discardContainer } from "./devcontainer/container-work.ts";
import { DOTFILES, dotfilesCommand } from "./devcontainer/dotfiles.ts";
import { type LifecycleCommand, NO_LIFECYCLE, type StepOutcome } from "./devcontainer/lifecycle.ts";
import { type RunOptions, type Step, startRun } from "./devcontainer/run.ts";
import { ContentError } from "./git.ts";
import { writeEnvironmentVariables } from "./machine-steps.ts";
import type { LifecycleFacts } from "./record.ts";
import { type Application, type FoundDevContainer, findDevContainer } from "./repository-files.ts";
import { type EnvironmentSite, userOf } from "./site.ts";
import { variablesMark } from "./status.ts";

// Steps that apply the dev container of an environment: its variables, its commands, and the dotfiles of its creator.

const MAX_VARIABLES_CHARACTERS = 64 * 1024;
// Together less than a start may take.
const DOTFILES_MS = 10 * 60_000;
const COMMANDS_MS = 45 * 60_000;

export const devContainerOf = (spec: EnvironmentSpec): EnvironmentSpec_DevContainer =>
  spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);

/** A dev container that has been applied, or cannot be. */
export interface AppliedDevContainer {
  status: EnvironmentStatus_DevContainer;
  /** Hash of the file in use. */
  hash: string;
  lifecycle: LifecycleFacts;
}

function needsDevContainer({ status: { devcontainer } }: EnvironmentSite, spec: EnvironmentSpec): boolean {
  if (devcontainer?.session !== devContainerOf(spec).session) return true;
  return devcontainer.phase !== DevContainerPhase.RUNNING && devcontainer.phase !== DevContainerPhase.FAILED;
}

const sessionsOf = ({ machine, content, devcontainer }: EnvironmentSpec) =>
  JSON.stringify([machine?.session, content?.session, devcontainer?.session, devcontainer?.lifecycleStage]);

/**
 * Applies the dev container of the specification; its commands run in the background. Answers once that is done, and
 * undefined as long as it is not, or if nothing is to be done.
 */
export async function keepDevContainer(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  signal: AbortSignal,
): Promise<AppliedDevContainer | undefined> {
  if (!needsDevContainer(site, spec)) {
    await keepAttached(site, spec);
    return undefined;
  }
  if (site.application && site.application.key !== sessionsOf(spec)) await endCommands(site);
  site.application ??= await begin(site, spec);
  const { container, run, work } = site.application;
  await work?.advance(signal);
  if (work?.failure) await run.cancel();
  const { state } = run;
  await writeDown(site, run.take());
  if (work?.failure) return await abandoned(site, spec, container, work.failure);
  if (state === "running") return undefined;
  if (state === "lost") {
    await endCommands(site);
    return undefined;
  }
  if (work && !work.containerId) {
    work.want();
    return undefined;
  }
  site.application = undefined;
  return conclude(site, spec, container, work);
}

/** The container cannot be had: what is left runs on the host, and its users are told. */
async function abandoned(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  container: FoundDevContainer,
  failure: string,
): Promise<AppliedDevContainer> {
  site.application = undefined;
  const status = { ...container.status, phase: DevContainerPhase.FAILED, failureMessage: onHost(failure) };
  return conclude(site, spec, { ...container, status, lifecycle: NO_LIFECYCLE });
}

/** Ends the commands that are at work: their checkout, or what they were for, is about to go. */
export async function endCommands(site: EnvironmentSite): Promise<void> {
  const { application, attached } = site;
  const { run, work } = application ?? {};
  // Whoever waits for the container hears first that it will not come.
  await Promise.all([work?.cancel(), run?.cancel(), attached?.cancel()]);
  site.application = site.attached = undefined;
}

/** What a step is known by: it runs once for each such key. */
const keyOf = ({ session }: EnvironmentSpec_DevContainer, name: string, ...more: string[]) =>
  [session, name, ...more].join(" ");

/** The installation of the dotfiles as it has begun, or is to; undefined if it has ended, or without any. */
async function dotfilesStep({ record: { lifecycle }, host }: EnvironmentSite, key: string, repository: string) {
  if (!repository || lifecycle.ended.some((each) => each.key === key)) return undefined;
  if (lifecycle.dotfiles?.key === key) return lifecycle.dotfiles;
  return { key, command: await dotfilesCommand(repository, host.guard) };
}

/** Commands of the file and of the runner, with the keys by which they are known to have ended. */
async function stepsOf(site: EnvironmentSite, spec: EnvironmentSpec, { lifecycle }: FoundDevContainer) {
  const devcontainer = devContainerOf(spec);
  const stepOf = (command: LifecycleCommand, ...more: string[]): Step => ({
    ...{ key: keyOf(devcontainer, command.name, ...more), command, endsRun: true },
  });
  const steps = lifecycle.create.map((command) => stepOf(command));
  steps.push(...lifecycle.start.map((command) => stepOf(command, spec.machine?.session ?? "")));
  const key = keyOf(devcontainer, DOTFILES);
  try {
    const dotfiles = await dotfilesStep(site, key, devcontainer.dotfiles?.repository ?? "");
    if (dotfiles) steps.unshift({ ...dotfiles, endsRun: false, timeoutMs: DOTFILES_MS });
    return { steps, refused: [], dotfiles };
  } catch (error) {
    if (!(error instanceof ContentError)) throw error;
    return { steps, refused: [{ key, failure: error.message }] };
  }
}

async function begin(site: EnvironmentSite, spec: EnvironmentSpec): Promise<Application> {
  await endCommands(site);
  const devcontainer = devContainerOf(spec);
  const checkout = { folder: site.folder, user: userOf(site) };
  const mode = site.settings?.inContainer ? "container" : site.host.config.hostDevcontainer;
  const container = await findDevContainer(checkout, devcontainer, mode, site.host.engines.present !== undefined);
  await site.supervision.hasTold();
  // There may be one of a class, or of a file, that was in use before.
  if (!container.plan && site.record.container) await discardContainer(site);
  await applyVariables(site, container.variables);
  const { steps, refused, dotfiles } = await stepsOf(site, spec, container);
  const known = new Set([...steps.map(({ key }) => key), keyOf(devcontainer, DOTFILES)]);
  const ended = [...site.record.lifecycle.ended.filter(({ key }) => known.has(key)), ...refused];
  const due = steps.filter(({ key }) => !ended.some((each) => each.key === key));
  const work = container.plan && new ContainerWork(site, container.plan, devcontainer.session);
  if (due.length > 0 || work) {
    const status = { ...container.status, phase: DevContainerPhase.CREATING, failureMessage: "", warningMessage: "" };
    await site.edit((record) => {
      record.lifecycle = { ended, attach: [], dotfiles };
      record.status.devcontainer = status;
    });
  } else site.record.lifecycle = { ended, attach: [] };
  const run = startRun(runOf(site, spec, due, COMMANDS_MS, work));
  return { key: sessionsOf(spec), container, run, ...(work && { work }) };
}

/** Who runs a step: everything but what prepares the host runs where the dev container does. */
function executor(site: EnvironmentSite, { command }: Step, work: ContainerProgress | undefined) {
  const isOnHost = command.name === "initializeCommand";
  if (work && !isOnHost) return work.client();
  const { client } = site.record.container && !isOnHost ? site.container : site.supervision;
  if (!client) throw new Error("the environment has no supervisor at the moment");
  return client;
}

function runOf(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  steps: readonly Step[],
  timeoutMs: number,
  work?: ContainerProgress,
): RunOptions {
  const sectionOf = ({ command }: Step) => (command.name === DOTFILES ? "dotfiles" : "devcontainer");
  return {
    clientOf: (step) => executor(site, step, work),
    ...{ paths: site.paths, uid: userOf(site).uid, folder: site.folder, steps, timeoutMs },
    attempt: `${spec.machine?.session} ${spec.content?.session}`,
    onStep(step) {
      if (timeoutMs > 0 && !site.sections.isOpen(sectionOf(step))) site.sections.open(sectionOf(step));
      site.log.write(`Running ${step.command.name}`);
    },
    onEnd(step, failure) {
      if (failure) site.log.write(failure);
      if (sectionOf(step) !== "dotfiles") return;
      site.sections.end("dotfiles", failure ? LogSectionOutcome.FAILURE : LogSectionOutcome.SUCCESS);
    },
    write: (line) => site.log.write(line),
    changed: site.wake,
  };
}

async function writeDown(site: EnvironmentSite, outcomes: readonly StepOutcome[]): Promise<void> {
  if (outcomes.length === 0) return;
  await site.edit(({ lifecycle }) => {
    lifecycle.ended.push(...outcomes);
  });
}

const withFailures = (warning: string, { ended }: LifecycleFacts) =>
  [warning, ...ended.map(({ failure }) => failure)].filter(Boolean).join("; ");

/** What is reported of the container itself. */
function containerStatus({ id, record }: EnvironmentSite, work: ContainerProgress | undefined) {
  const { container } = record;
  if (!work || !container) return undefined;
  const { userName: remoteUser } = container;
  return { containerId: work.containerId, containerName: containerName(id), remoteUser };
}

const warningsOf = ({ record: { container } }: EnvironmentSite) => [
  ...(container?.warnings ?? []),
  ...(container?.placed?.warnings ?? []),
];

function conclude(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  container: FoundDevContainer,
  work?: ContainerProgress,
): AppliedDevContainer {
  const { ended } = site.record.lifecycle;
  const warnings = [container.status.warningMessage, ...warningsOf(site)].filter(Boolean);
  const warningMessage = withFailures(warnings.join("; "), site.record.lifecycle);
  const { failureMessage } = container.status;
  if (!site.sections.isOpen("devcontainer")) site.sections.open("devcontainer");
  if (failureMessage || warningMessage) site.log.write(failureMessage || `Warning: ${warningMessage}`);
  const isWell = !failureMessage && ended.every(({ failure }) => failure === "");
  site.sections.end("devcontainer", isWell ? LogSectionOutcome.SUCCESS : LogSectionOutcome.FAILURE);
  const secretsInSync = variablesMark(spec) === site.record.secretVariables;
  return {
    status: { ...container.status, ...containerStatus(site, work), warningMessage, secretsInSync },
    hash: container.hash,
    lifecycle: { ended, attach: container.lifecycle.attach },
  };
}

/** Variables of the dev container go to every process that starts from now on. */
async function applyVariables(site: EnvironmentSite, wanted: Record<string, string>): Promise<void> {
  const text = JSON.stringify(wanted);
  const variables = text.length <= MAX_VARIABLES_CHARACTERS ? wanted : {};
  if (JSON.stringify(variables) === JSON.stringify(site.record.variables)) return;
  site.record.variables = variables;
  await writeEnvironmentVariables(site, userOf(site), site.record.token?.text ?? "");
}

/** Commands that nobody waits for run once the environment is there; what goes wrong is a warning. */
async function keepAttached(site: EnvironmentSite, spec: EnvironmentSpec): Promise<void> {
  const { attach } = site.record.lifecycle;
  if (attach.length === 0 || !site.passed) return;
  const machine = spec.machine?.session ?? "";
  const steps = attach.map((command) => ({
    ...{ key: keyOf(devContainerOf(spec), command.name, machine), command, endsRun: true },
  }));
  site.attached ??= startRun(runOf(site, spec, steps, 0));
  const { state } = site.attached;
  const outcomes = site.attached.take();
  if (state === "running") return;
  site.attached = undefined;
  if (state === "lost") return;
  await site.edit(({ lifecycle, status }) => {
    lifecycle.attach = [];
    const failures = { ended: outcomes, attach: [] };
    if (status.devcontainer) {
      status.devcontainer.warningMessage = withFailures(status.devcontainer.warningMessage, failures);
    }
  });
}
