import { create, fromJson, type JsonValue, toJson } from "@bufbuild/protobuf";
import { type EnvironmentStatus, EnvironmentStatusSchema } from "../../gen/gitpod/v1/environment_pb.js";
import type { LifecycleCommand, StepOutcome } from "./devcontainer/lifecycle.ts";
import { exists, readSmall, writeAtomically } from "./files.ts";
import type { EnvironmentPaths } from "./paths.ts";
import type { Delivery, PlacedSecrets } from "./secrets/plan.ts";
import type { ProcessRef } from "./supervisor/processes.ts";
import type { UnixUser } from "./users.ts";

const MAX_RECORD_BYTES = 4 * 1024 * 1024;
const FORMAT = 1;

/** A process that a later runner process can find again. */
export interface RecordedProcess extends ProcessRef {
  bootId: string;
}

/** A supervisor, and whether bubblewrap keeps it apart from other environments. */
export interface RecordedSupervisor extends RecordedProcess {
  apart: boolean;
}

/** A repository that lies in the workspace. */
export interface Checkout {
  /** Relative to the workspace. */
  location: string;
}

/** What is in the workspace. */
export interface ContentFacts {
  /** Session whose content is in place; empty before the first. */
  session: string;
  checkouts: Checkout[];
  /** Folder of the primary checkout, absolute. */
  folder: string;
  /** A replacement that has begun to move files, so that it is finished after a crash. */
  replacing?: { session: string; old: string[]; keepBackup: boolean };
  /** Git at work for the runner. */
  process?: RecordedProcess;
}

/** A secret that was put into the environment, or is about to be, so that it can be taken out of it again. */
export interface DeliveredSecret {
  /** Id of its entry in the specification. */
  id: string;
  delivery: Delivery;
  /** Content session in which its link was made, for one that lies in the workspace. */
  contentSession?: string;
}

/** What has been run of the dev container, so that nothing is run twice. */
export interface LifecycleFacts {
  /** Steps that have ended or were left out. */
  ended: StepOutcome[];
  /** Commands that still have to run, and that nobody waits for. */
  attach: LifecycleCommand[];
  /** The step at work on the dotfiles: its text holds addresses, and must not become another one meanwhile. */
  dotfiles?: { key: string; command: LifecycleCommand };
}

/** The container that the dev container runs in. */
export interface ContainerFacts {
  /** Dev container session that it is for. */
  session: string;
  /** Its image, which is no other container's. */
  image: string;
  /** Owner of its processes. */
  uid: number;
  userName: string;
  variables: Record<string, string>;
  warnings: string[];
  /** What came of secrets at paths of its own, when it was last started. */
  placed?: PlacedSecrets;
  /** Times at which it had to be brought back, milliseconds since the epoch. */
  restarts: number[];
}

/** A section of the log that has not ended. */
export interface OpenSection {
  id: string;
  startedAt: number;
}

/** Everything the runner knows about an environment on its disk; survives the process at any moment. */
export interface EnvironmentRecord {
  /** The parts of the status that the runner owns. */
  status: EnvironmentStatus;
  user?: UnixUser;
  supervisor?: RecordedSupervisor;
  content: ContentFacts;
  /** Machine session for which everything needed was ready once; empty if none. */
  gatesPassedSession: string;
  /** Unplanned restarts of the machine, milliseconds since the epoch. */
  restarts: number[];
  sections: { count: number; open: OpenSection[] };
  /** Name and address last written to the git configuration, as one text. */
  gitIdentity: string;
  /** Hash of the dev container file in use; empty without one. */
  devcontainerHash: string;
  /** The SSH server, and the port it has or had last. */
  ssh?: { port: number; process?: RecordedProcess };
  /** Variables that the dev container adds. */
  variables: Record<string, string>;
  lifecycle: LifecycleFacts;
  /** The container engine may have something of it. */
  usesEngine?: boolean;
  container?: ContainerFacts;
  secrets: DeliveredSecret[];
  /** Secrets in variables with which the environment has started, as one text. */
  secretVariables: string;
  /** The environment token, and the machine session it was made for. */
  token?: { session: string; text: string };
}

export function newRecord(): EnvironmentRecord {
  return {
    status: create(EnvironmentStatusSchema),
    content: { session: "", checkouts: [], folder: "" },
    gatesPassedSession: "",
    restarts: [],
    sections: { count: 0, open: [] },
    gitIdentity: "",
    devcontainerHash: "",
    variables: {},
    lifecycle: { ended: [], attach: [] },
    secrets: [],
    secretVariables: "",
  };
}

/**
 * The record of an environment. One that is damaged is replaced by a new one that claims unknown content, so that
 * files are set aside rather than taken for leftovers. Undefined if nothing of the environment is on disk.
 */
export async function readRecord(
  paths: Pick<EnvironmentPaths, "root" | "record">,
): Promise<EnvironmentRecord | undefined> {
  if (!(await exists(paths.root))) return undefined;
  const text = await readSmall(paths.record, MAX_RECORD_BYTES).catch(() => "damaged");
  if (text === undefined) return newRecord();
  try {
    const { format, status, ...rest } = JSON.parse(text) as { format: number; status: JsonValue } & EnvironmentRecord;
    if (format !== FORMAT) throw new Error("unknown format");
    return {
      ...newRecord(),
      ...rest,
      status: fromJson(EnvironmentStatusSchema, status, { ignoreUnknownFields: true }),
    };
  } catch {
    const record = newRecord();
    return { ...record, content: { ...record.content, session: "unknown" } };
  }
}

export async function writeRecord(paths: EnvironmentPaths, { status, ...rest }: EnvironmentRecord): Promise<void> {
  const value = { format: FORMAT, ...rest, status: toJson(EnvironmentStatusSchema, status) };
  await writeAtomically(paths.record, JSON.stringify(value));
}
