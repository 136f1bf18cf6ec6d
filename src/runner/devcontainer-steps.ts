import { create } from "@bufbuild/protobuf";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentSpec,
  type EnvironmentSpec_DevContainer,
  EnvironmentSpec_DevContainerSchema,
  type EnvironmentStatus_DevContainer,
} from "../../gen/gitpod/v1/environment_pb.js";
import { DOTFILES, dotfilesCommand } from "./devcontainer/dotfiles.ts";
import type { LifecycleCommand, StepOutcome } from "./devcontainer/lifecycle.ts";
import { type RunOptions, type Step, startRun } from "./devcontainer/run.ts";
import { ContentError } from "./git.ts";
import { writeEnvironmentVariables } from "./machine-steps.ts";
import type { LifecycleFacts } from "./record.ts";
import { type Application, type HostDevContainer, hostDevContainer } from "./repository-files.ts";
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
): Promise<AppliedDevContainer | undefined> {
  if (!needsDevContainer(site, spec)) {
    await keepAttached(site, spec);
    return undefined;
  }
  if (site.application && site.application.key !== sessionsOf(spec)) await endCommands(site);
  site.application ??= await begin(site, spec);
  const { container, run } = site.application;
  const { state } = run;
  await writeDown(site, run.take());
  if (state === "running") return undefined;
  site.application = undefined;
  return state === "done" ? conclude(site, spec, container) : undefined;
}

/** Ends the commands that are at work: their checkout, or what they were for, is about to go. */
export async function endCommands(site: EnvironmentSite): Promise<void> {
  const { application, attached } = site;
  await Promise.all([application?.run.cancel(), attached?.cancel()]);
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
async function stepsOf(site: EnvironmentSite, spec: EnvironmentSpec, { lifecycle }: HostDevContainer) {
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
  const container = await hostDevContainer(checkout, devcontainer, site.host.config.hostDevcontainer);
  await applyVariables(site, container.variables);
  const { steps, refused, dotfiles } = await stepsOf(site, spec, container);
  const known = new Set([...steps.map(({ key }) => key), keyOf(devcontainer, DOTFILES)]);
  const ended = [...site.record.lifecycle.ended.filter(({ key }) => known.has(key)), ...refused];
  const due = steps.filter(({ key }) => !ended.some((each) => each.key === key));
  if (due.length > 0) {
    const status = { ...container.status, phase: DevContainerPhase.CREATING, failureMessage: "", warningMessage: "" };
    await site.edit((record) => {
      record.lifecycle = { ended, attach: [], dotfiles };
      record.status.devcontainer = status;
    });
  } else site.record.lifecycle = { ended, attach: [] };
  return { key: sessionsOf(spec), container, run: startRun(runOf(site, spec, due, COMMANDS_MS)) };
}

function runOf(site: EnvironmentSite, spec: EnvironmentSpec, steps: readonly Step[], timeoutMs: number): RunOptions {
  const { client } = site.supervision;
  if (!client) throw new Error("the environment has no supervisor at the moment");
  const sectionOf = ({ command }: Step) => (command.name === DOTFILES ? "dotfiles" : "devcontainer");
  return {
    ...{ client, paths: site.paths, uid: userOf(site).uid, folder: site.folder, steps, timeoutMs },
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

function conclude(site: EnvironmentSite, spec: EnvironmentSpec, container: HostDevContainer): AppliedDevContainer {
  const { ended } = site.record.lifecycle;
  const warningMessage = withFailures(container.status.warningMessage, site.record.lifecycle);
  const { failureMessage } = container.status;
  if (!site.sections.isOpen("devcontainer")) site.sections.open("devcontainer");
  if (failureMessage || warningMessage) site.log.write(failureMessage || `Warning: ${warningMessage}`);
  const isWell = !failureMessage && ended.every(({ failure }) => failure === "");
  site.sections.end("devcontainer", isWell ? LogSectionOutcome.SUCCESS : LogSectionOutcome.FAILURE);
  const secretsInSync = variablesMark(spec) === site.record.secretVariables;
  return {
    status: { ...container.status, warningMessage, secretsInSync },
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
