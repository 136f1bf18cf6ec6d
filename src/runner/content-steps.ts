import { clone, create, equals } from "@bufbuild/protobuf";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentGitStatus,
  type EnvironmentSpec,
  EnvironmentSpec_ContentSchema,
  EnvironmentStatus_ContentSchema,
  EnvironmentStatusSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { configureGit, contentGitStatus, gitIdentity, initializeContent, type Workspace } from "./content.ts";
import { isTransient } from "./control-plane.ts";
import { devContainerOf, endCommands, keepDevContainer } from "./devcontainer-steps.ts";
import { ContentError } from "./git.ts";
import type { ContentFacts } from "./record.ts";
import { devContainerHash } from "./repository-files.ts";
import { gitHelpers } from "./secrets/git-helper.ts";
import { type EnvironmentSite, textOf, userOf } from "./site.ts";
import { isReady } from "./status.ts";

// Steps that put the content of an environment in place and apply what its files ask for.

const contentOf = (spec: EnvironmentSpec) => spec.content ?? create(EnvironmentSpec_ContentSchema);

function workspaceOf(site: EnvironmentSite, signal: AbortSignal): Workspace {
  return {
    ...{ host: site.host, environmentId: site.id, paths: site.paths, user: userOf(site), signal },
    helpers: gitHelpers(site.paths, site.record.secrets),
    write: (line) => site.log.write(line),
    save: (facts: ContentFacts) =>
      site.edit((record) => {
        record.content = facts;
      }),
  };
}

/** Puts the content of the specification in place; tells whether it had to, and whether the first attempt has failed. */
export async function keepContent(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  signal: AbortSignal,
): Promise<"kept" | "placed" | "failed"> {
  const { session } = contentOf(spec);
  const reported = site.status.content;
  const isSettled = reported?.session === session && site.record.content.session === session;
  if (isSettled && reported.phase === ContentPhase.READY) {
    await keepIdentity(site, spec, signal);
    return "kept";
  }
  if (reported?.session === session && reported.phase === ContentPhase.FAILED) return "failed";
  const isFirst = site.record.content.session === "";
  await endCommands(site);
  site.sections.open("content");
  site.note(({ status }) => {
    const { git, contentLocationInMachine = "" } = status.content ?? {};
    const phase = isFirst ? ContentPhase.INITIALIZING : ContentPhase.UPDATING;
    status.content = create(EnvironmentStatus_ContentSchema, { session, phase, git, contentLocationInMachine });
  });
  let placed: Awaited<ReturnType<typeof placeContent>>;
  try {
    placed = await placeContent(site, spec, signal);
  } catch (error) {
    site.sections.end("content", signal.aborted ? LogSectionOutcome.CANCELLED : LogSectionOutcome.FAILURE);
    // A control plane that is away for a moment is waited for.
    if (signal.aborted || isTransient(error)) throw error;
    return await contentFailed(site, spec, isFirst, error);
  }
  await contentReady(site, spec, placed.facts, placed.git, placed.warnings.join("; "));
  return "placed";
}

async function placeContent(site: EnvironmentSite, spec: EnvironmentSpec, signal: AbortSignal) {
  const content = contentOf(spec);
  const workspace = workspaceOf(site, signal);
  const placed = await initializeContent(workspace, content.session, content.initializer, site.record.content);
  await configureGit(workspace, content, placed.facts);
  const git = await contentGitStatus(site.id, site.paths, userOf(site), placed.facts, placed.pristine);
  return { ...placed, git };
}

/** The first content that cannot be had is fatal; later the old one stays, with a warning. */
async function contentFailed(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  isFirst: boolean,
  error: unknown,
): Promise<"placed" | "failed"> {
  const failureMessage = site.log.clean(textOf(error));
  if (!(error instanceof ContentError)) {
    site.host.log.error({ environmentId: site.id, error: failureMessage }, "content could not be initialized");
  }
  site.log.write(failureMessage);
  if (!isFirst) {
    const facts = { ...site.record.content, session: contentOf(spec).session };
    const git = await contentGitStatus(site.id, site.paths, userOf(site), facts);
    await contentReady(site, spec, facts, git, `the content was not replaced: ${failureMessage}`);
    return "placed";
  }
  await site.edit(({ status }) => {
    if (status.content) Object.assign(status.content, { phase: ContentPhase.FAILED, failureMessage });
  });
  return "failed";
}

async function contentReady(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  facts: ContentFacts,
  git: EnvironmentGitStatus | undefined,
  warningMessage: string,
): Promise<void> {
  const content = contentOf(spec);
  const folder = facts.folder || site.paths.workspace;
  if (warningMessage) site.log.write(`Warning: ${warningMessage}`);
  site.sections.end("content", LogSectionOutcome.SUCCESS);
  // Whatever begins to work with it is written down first, and this with it.
  site.note((record) => {
    record.content = facts;
    record.gitIdentity = gitIdentity(content, facts);
    record.status.content = create(EnvironmentStatus_ContentSchema, {
      ...{ session: content.session, phase: ContentPhase.READY, git, warningMessage },
      contentLocationInMachine: folder,
    });
    // Its files may have changed with the checkout.
    const { devcontainer, automationsFile: automations } = record.status;
    if (devcontainer) devcontainer.phase = DevContainerPhase.CREATING;
    if (automations) automations.phase = ContentPhase.CREATING;
  });
  // One that does not answer is not the content's failure: the next pass replaces it, and its successor knows.
  site.supervision.tellWorkspaceFolder(folder);
}

/** Name and address for commits can change at any time. */
async function keepIdentity(site: EnvironmentSite, spec: EnvironmentSpec, signal: AbortSignal): Promise<void> {
  const identity = gitIdentity(contentOf(spec), site.record.content);
  if (identity === site.record.gitIdentity) return;
  await configureGit(workspaceOf(site, signal), contentOf(spec), site.record.content);
  await site.edit((record) => {
    record.gitIdentity = identity;
  });
}

/**
 * Dev container, secrets and keys. When they are the last that was missing, the same change marks
 * the start as done: whoever reads that the environment runs must find its operations too.
 */
export async function keepRepositoryFiles(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  signal: AbortSignal,
): Promise<void> {
  const container = await keepDevContainer(site, spec, signal);
  signal.throwIfAborted();
  const next = clone(EnvironmentStatusSchema, site.status);
  if (container) next.devcontainer = container.status;
  const passes = !site.passed && isReady(next, spec);
  if (!passes && equals(EnvironmentStatusSchema, next, site.status)) return;
  if (passes) {
    site.sections.endAll(LogSectionOutcome.SUCCESS);
    site.sections.open("system");
    site.log.write("The environment is running");
  }
  await site.edit((record) => {
    record.status = next;
    if (container) {
      record.devcontainerHash = container.hash;
      record.lifecycle = container.lifecycle;
    }
    if (passes) record.gatesPassedSession = spec.machine?.session ?? "";
  });
}

/** Looks at what people change: the git status, and whether the dev container file is the one in use; true if news. */
export async function observeFiles(site: EnvironmentSite, spec: EnvironmentSpec): Promise<boolean> {
  const user = userOf(site);
  const git = await contentGitStatus(site.id, site.paths, user, site.record.content);
  const hash = await devContainerHash({ folder: site.folder, user }, devContainerOf(spec));
  const next = clone(EnvironmentStatusSchema, site.status);
  if (next.content) next.content.git = git;
  if (next.devcontainer) next.devcontainer.devcontainerconfigInSync = hash === site.record.devcontainerHash;
  if (equals(EnvironmentStatusSchema, next, site.status)) return false;
  await site.edit((record) => {
    record.status = next;
  });
  return true;
}
