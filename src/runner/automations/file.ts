import { create, equals } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import type { AutomationsFile } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import {
  type EnvironmentSpec,
  type EnvironmentSpec_AutomationsFile,
  EnvironmentSpec_AutomationsFileSchema,
  type EnvironmentStatus_AutomationsFile,
  EnvironmentStatus_AutomationsFileSchema,
  EnvironmentStatus_ContentPhase as Phase,
  EnvironmentStatus_AutomationsFile_Presence as Presence,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { faultText, fileWarnings, parseAutomationsFile } from "../../domain/automations-file.ts";
import { describe } from "../control-plane.ts";
import { type FoundFile, findFile } from "../repository-files.ts";
import { type EnvironmentSite, userOf } from "../site.ts";

// The automations file of a checkout, applied with the environment's own token. It holds up nothing else, and applying
// it again changes nothing, so that it may be cut short anywhere.

const FILES = [
  ".ona/automations.yaml",
  ".ona/automations.yml",
  ".ona/automations.json",
  ".gitpod/automations.yaml",
  ".gitpod/automations.yml",
];
const MAX_MESSAGE_CHARACTERS = 2_000;
/** What the control plane says of the file, and not of the moment. */
const VERDICTS: ReadonlySet<Code> = new Set([
  Code.InvalidArgument,
  Code.FailedPrecondition,
  Code.AlreadyExists,
  Code.ResourceExhausted,
  Code.PermissionDenied,
  Code.NotFound,
  Code.Unimplemented,
]);

const specOf = (spec: EnvironmentSpec) => spec.automationsFile ?? create(EnvironmentSpec_AutomationsFileSchema);

function isSettled({ status: { automationsFile: file } }: EnvironmentSite, spec: EnvironmentSpec): boolean {
  return file?.session === specOf(spec).session && (file.phase === Phase.READY || file.phase === Phase.FAILED);
}

/** Where the file is, before it is applied. */
function found(
  { session, automationsFilePath: specified }: EnvironmentSpec_AutomationsFile,
  file: FoundFile | undefined,
): EnvironmentStatus_AutomationsFile {
  const discovered = file ? Presence.DISCOVERED : Presence.ABSENT;
  return create(EnvironmentStatus_AutomationsFileSchema, {
    session,
    automationsFilePath: specified || (file?.path ?? ""),
    automationsFilePresence: specified ? Presence.SPECIFIED : discovered,
  });
}

/** Stores the file; the sentence that keeps it from being applied, or undefined. Throws if that cannot be known yet. */
async function apply(
  site: EnvironmentSite,
  automationsFile: AutomationsFile,
  signal: AbortSignal,
): Promise<string | undefined> {
  const automations = site.host.controlPlane.automations(site.record.token?.text ?? "");
  try {
    await automations.upsertAutomationsFile({ environmentId: site.id, automationsFile }, { signal });
    return undefined;
  } catch (error) {
    const { code, rawMessage } = ConnectError.from(error);
    if (!VERDICTS.has(code)) throw error;
    return rawMessage;
  }
}

async function settle(
  site: EnvironmentSite,
  status: EnvironmentStatus_AutomationsFile,
  outcome: { failure?: string; warnings?: readonly string[] },
): Promise<void> {
  const failureMessage = (outcome.failure ?? "").slice(0, MAX_MESSAGE_CHARACTERS);
  const warningMessage = (outcome.warnings ?? []).join("; ").slice(0, MAX_MESSAGE_CHARACTERS);
  if (failureMessage) site.log.write(`Automations: ${failureMessage}`);
  if (warningMessage) site.log.write(`Warning: ${warningMessage}`);
  await site.edit((record) => {
    record.status.automationsFile = {
      ...{ ...status, failureMessage, warningMessage },
      phase: failureMessage ? Phase.FAILED : Phase.READY,
    };
  });
}

/** Applies the automations file of the checkout once per start and session; tries again later if nobody answers. */
export async function keepAutomationsFile(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  signal: AbortSignal,
): Promise<void> {
  if (isSettled(site, spec)) return;
  const wanted = specOf(spec);
  const specified = wanted.automationsFilePath;
  const file = await findFile({ folder: site.folder, user: userOf(site) }, specified ? [specified] : FILES);
  signal.throwIfAborted();
  const status = found(wanted, file);
  if (!file) {
    const failure = specified && `automations file ${specified.slice(0, 200)} not found`;
    return await settle(site, status, { failure: failure || undefined });
  }
  const parsed = parseAutomationsFile(file.text);
  if (parsed.fault) return await settle(site, status, { failure: `${file.path}: ${faultText(parsed.fault)}` });
  const applying = { ...status, phase: Phase.INITIALIZING };
  const { automationsFile: before } = site.status;
  if (!before || !equals(EnvironmentStatus_AutomationsFileSchema, before, applying)) {
    await site.edit((record) => {
      record.status.automationsFile = applying;
    });
  }
  try {
    const failure = await apply(site, parsed.file, signal);
    await settle(
      site,
      status,
      failure ? { failure: `${file.path}: ${failure}` } : { warnings: fileWarnings(parsed.file) },
    );
  } catch (error) {
    signal.throwIfAborted();
    site.host.log.info({ environmentId: site.id, error: describe(error) }, "the automations file is applied later");
  }
}
