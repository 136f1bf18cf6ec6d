import { create, type DescField, fromBinary, toBinary } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { durationFromMs, timestampFromDate, timestampMs } from "@bufbuild/protobuf/wkt";
import {
  AdmissionLevel,
  type Environment,
  type EnvironmentInitializer,
  EnvironmentMetadataSchema,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentSchema,
  type EnvironmentSpec,
  EnvironmentSpec_AutomationsFileSchema,
  EnvironmentSpec_ContentSchema,
  EnvironmentSpec_DevContainer_DotfilesSchema,
  EnvironmentSpec_DevContainerSchema,
  type EnvironmentSpec_EnvironmentPort,
  EnvironmentSpec_MachineSchema,
  type EnvironmentSpec_Secret,
  type EnvironmentSpec_SSHPublicKey,
  EnvironmentSpec_SSHPublicKeySchema,
  EnvironmentSpec_TimeoutSchema,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
  KernelControlsAction,
  type KernelControlsConfig,
  KernelControlsConfigSchema,
  EnvironmentSpec_DevContainer_LifecycleStage as LifecycleStage,
  type UpdateEnvironmentRequest,
  type UpdateEnvironmentRequest_Spec,
  type Veto_Exec,
  Veto_ExecSchema,
  type Veto_File,
  Veto_FileSchema,
  VetoFileBlockDevicesPolicySchema,
  type VetoFilePathEntry,
  VetoFilePathEntrySchema,
  type VetoFilePathPolicy,
  VetoFilePathPolicySchema,
  VetoSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { Principal, SubjectSchema } from "../../gen/gitpod/v1/identity_pb.js";
import type { OrganizationPolicies } from "../../gen/gitpod/v1/organization_pb.js";
import type { EnvironmentClass } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { FieldProblem } from "./errors.ts";
import { isUuid } from "./ids.ts";
import { imageProblem } from "./images.ts";
import { type EnvironmentState, isLeaving, newFacts, type Transition, transition } from "./lifecycle.ts";
import type { Caller } from "./principal.ts";

/** Idle timeout of an environment whose creator named none, in milliseconds. */
export const DEFAULT_TIMEOUT_MS = 1_800_000;
/** Image of generated dev containers where no policy names one. */
export const DEFAULT_DEVCONTAINER_IMAGE = "mcr.microsoft.com/devcontainers/base:ubuntu-24.04";

const NAME_LENGTH = 80;
const UPDATED_NAME_LENGTH = 128;
const ANNOTATIONS = { entries: 32, keyLength: 128, valueLength: 1024 };
const SSH_KEYS = { entries: 128, idLength: 256, valueLength: 16_384 };
const PORTS = 128;
const TEXT_LENGTH = 1024;
/** Sessions are opaque, but runners name files after them. */
const SESSION = /^[^\p{Cc}/\\]{0,128}$/u;

const CONTROL_CHARACTERS = /\p{Cc}/u;
const BASE64 = /^[A-Za-z0-9+/]+={0,2}$/;

/** Number of length-prefixed parts inside a public key, by type. */
const SSH_KEY_PARTS = new Map([
  ["ssh-ed25519", 2],
  ["ssh-rsa", 3],
  ["ecdsa-sha2-nistp256", 3],
  ["ecdsa-sha2-nistp384", 3],
  ["ecdsa-sha2-nistp521", 3],
  ["sk-ssh-ed25519@openssh.com", 3],
  ["sk-ecdsa-sha2-nistp256@openssh.com", 4],
]);

/** How somebody who sees an environment relates to it; "owner" is whoever holds ENVIRONMENT_ADMIN. */
export type ViewerRelation = "owner" | "user" | "viewer" | "org_admin" | "self" | "runner";

/** The names and mounts of secrets are for owner, self and runner. */
export const seesSecrets = (viewer: ViewerRelation) => viewer === "owner" || viewer === "self" || viewer === "runner";

/** The environment as that viewer may see it. */
export function visibleEnvironment(environment: Environment, viewer: ViewerRelation): Environment {
  if (seesSecrets(viewer) || !environment.spec || environment.spec.secrets.length === 0) return environment;
  return { ...environment, spec: { ...environment.spec, secrets: [] } };
}

/** The stored state as the message that clients read. */
export function environmentMessage(id: string, { metadata, spec, status }: EnvironmentState): Environment {
  return create(EnvironmentSchema, { id, metadata, spec, status });
}

/** The parts of an environment as they are stored. */
export interface EncodedEnvironment {
  id: string;
  metadata: Uint8Array;
  spec: Uint8Array;
  status: Uint8Array;
}

/** The specification without what only those who see secrets may see, as it is stored. */
export function withoutSecrets(encodedSpec: Uint8Array): Uint8Array {
  const spec = fromBinary(EnvironmentSpecSchema, encodedSpec);
  return spec.secrets.length ? toBinary(EnvironmentSpecSchema, { ...spec, secrets: [] }) : encodedSpec;
}

/** What `environmentMessage` makes of the parts, inside of `field` of another message, encoded. */
export function encodedEnvironment({ id, metadata, spec, status }: EncodedEnvironment, field: DescField): Uint8Array {
  const { id: idField, ...parts } = EnvironmentSchema.field;
  const writer = new BinaryWriter().tag(field.number, WireType.LengthDelimited).fork();
  writer.tag(idField.number, WireType.LengthDelimited).string(id);
  writer.tag(parts.metadata.number, WireType.LengthDelimited).bytes(metadata);
  writer.tag(parts.spec.number, WireType.LengthDelimited).bytes(spec);
  writer.tag(parts.status.number, WireType.LengthDelimited).bytes(status);
  return writer.join().finish();
}

/** `<repository or "environment">-<suffix>`; `suffix` is six random characters. */
export function generatedName(repositoryName: string, suffix: string): string {
  const plain = repositoryName.replace(/\p{Cc}/gu, "").trim() || "environment";
  return `${[...plain].slice(0, NAME_LENGTH - suffix.length - 1).join("")}-${suffix}`;
}

/** Lower-case host, no credentials, fragment or trailing slash; a text that is no URL stays as it is. */
export function normalizedContextUrl(text: string): string {
  if (!URL.canParse(text)) return text;
  const url = new URL(text);
  return `${url.protocol}//${url.host.toLowerCase()}${url.pathname.replace(/\/+$/, "")}${url.search}`;
}

/** What an environment was made from, for `metadata.original_context_url`; empty from scratch. */
export function originalContextUrl(initializer: EnvironmentInitializer | undefined): string {
  const sources = (initializer?.specs ?? []).map(({ spec }) => spec);
  const context = sources.find((source) => source.case === "contextUrl");
  if (context) return normalizedContextUrl(context.value.url);
  return sources.find((source) => source.case === "git")?.value.remoteUri ?? "";
}

// Problems with a request. `field` is the proto path inside the request.

function duplicates<T>(
  items: readonly T[],
  key: (item: T) => unknown,
  field: (index: number) => string,
): FieldProblem[] {
  const seen = new Set<unknown>();
  return items.flatMap((item, index) => {
    const fresh = !seen.has(key(item));
    seen.add(key(item));
    return fresh ? [] : [{ field: field(index), message: "must be unique" }];
  });
}

/** What is wrong with a public key in `authorized_keys` form, or undefined. Keys with options are refused. */
export function sshKeyProblem(value: string): string | undefined {
  if (value.length > SSH_KEYS.valueLength) return `must have at most ${SSH_KEYS.valueLength} characters`;
  const line = value.trim();
  if (CONTROL_CHARACTERS.test(line)) return "must be a single line";
  const [type = "", encoded = ""] = line.split(/ +/, 2);
  const parts = SSH_KEY_PARTS.get(type);
  if (parts === undefined) return "must begin with a known key type; options are not allowed";
  const blob = BASE64.test(encoded) ? Buffer.from(encoded, "base64") : Buffer.alloc(0);
  const found: Buffer[] = [];
  let offset = 0;
  while (offset + 4 <= blob.length && found.length <= parts) {
    const end = offset + 4 + blob.readUInt32BE(offset);
    if (end > blob.length) break;
    found.push(blob.subarray(offset + 4, end));
    offset = end;
  }
  const whole = offset === blob.length && found.length === parts && found[0]?.toString() === type;
  return whole ? undefined : "is not a public key";
}

function sshKeyProblems(keys: readonly { id: string; value?: string | undefined }[]): FieldProblem[] {
  const field = (index: number, name: string) => `spec.ssh_public_keys[${index}].${name}`;
  const problems = keys.flatMap(({ id, value }, index): FieldProblem[] => {
    const message = value && sshKeyProblem(value);
    return [
      ...(id && id.length <= SSH_KEYS.idLength && !CONTROL_CHARACTERS.test(id)
        ? []
        : [{ field: field(index, "id"), message: `must have 1 to ${SSH_KEYS.idLength} printable characters` }]),
      ...(message ? [{ field: field(index, "value"), message }] : []),
    ];
  });
  return [
    ...problems,
    ...duplicates(
      keys,
      (key) => key.id,
      (index) => field(index, "id"),
    ),
  ];
}

function portProblems(ports: readonly EnvironmentSpec_EnvironmentPort[]): FieldProblem[] {
  const field = (index: number, name: string) => `spec.ports[${index}].${name}`;
  return [
    ...duplicates(
      ports,
      (port) => port.port,
      (index) => field(index, "port"),
    ),
    ...ports.flatMap((port, index) =>
      port.admission in AdmissionLevel ? [] : [{ field: field(index, "admission"), message: "is not a known level" }],
    ),
    ...(ports.length > PORTS ? [{ field: "spec.ports", message: `must have at most ${PORTS} entries` }] : []),
  ];
}

function pathProblem(field: string, path: string | undefined): FieldProblem[] {
  const leaves = path?.split("/").includes("..") || CONTROL_CHARACTERS.test(path ?? "");
  return leaves ? [{ field, message: "must stay inside the checkout" }] : [];
}

function textProblem(field: string, text: string | undefined): FieldProblem[] {
  if (!text || (text.length <= TEXT_LENGTH && !CONTROL_CHARACTERS.test(text))) return [];
  return [{ field, message: `must have at most ${TEXT_LENGTH} printable characters` }];
}

function sessionProblem(part: string, session: string | undefined): FieldProblem[] {
  if (SESSION.test(session ?? "")) return [];
  return [{ field: `spec.${part}.session`, message: "must have at most 128 printable characters and no slash" }];
}

/** Characters as people and the wire rules count them. */
const length = (text: string) => [...text].length;

function partProblems(spec: EnvironmentSpec | UpdateEnvironmentRequest_Spec): FieldProblem[] {
  return [
    ...sshKeyProblems(spec.sshPublicKeys),
    ...portProblems(spec.ports),
    ...textProblem("spec.content.git_username", spec.content?.gitUsername),
    ...textProblem("spec.content.git_email", spec.content?.gitEmail),
    ...sessionProblem("content", spec.content?.session),
    ...sessionProblem("devcontainer", spec.devcontainer?.session),
    ...sessionProblem("automations_file", spec.automationsFile?.session),
    ...pathProblem("spec.devcontainer.devcontainer_file_path", spec.devcontainer?.devcontainerFilePath),
    ...pathProblem("spec.automations_file.automations_file_path", spec.automationsFile?.automationsFilePath),
  ];
}

/**
 * Problems of a create request that come before anything is looked up: the goal, and the form of the class id, which may
 * be absent where a project offers one.
 */
export function goalProblems(spec: EnvironmentSpec | undefined, needsClass = true): FieldProblem[] {
  const goal = spec?.desiredPhase ?? EnvironmentPhase.UNSPECIFIED;
  const starts = goal === EnvironmentPhase.UNSPECIFIED || goal === EnvironmentPhase.RUNNING;
  const machineClass = spec?.machine?.class ?? "";
  return [
    ...(starts ? [] : [{ field: "spec.desired_phase", message: "must be unset or RUNNING" }]),
    ...(isUuid(machineClass) || (!machineClass && !needsClass)
      ? []
      : [{ field: "spec.machine.class", message: "must be the id of an environment class" }]),
  ];
}

/** Problems of a create request that need no lookup, except those of `goalProblems` and of the initializer. */
export function specProblems(spec: EnvironmentSpec, annotations: Readonly<Record<string, string>>): FieldProblem[] {
  const image = imageProblem(spec.devcontainer?.defaultDevcontainerImage ?? "");
  const entries = Object.entries(annotations);
  const badAnnotation = entries.find(
    ([key, value]) => !key || length(key) > ANNOTATIONS.keyLength || length(value) > ANNOTATIONS.valueLength,
  );
  return [
    ...partProblems(spec),
    ...(spec.sshPublicKeys.length > SSH_KEYS.entries
      ? [{ field: "spec.ssh_public_keys", message: `must have at most ${SSH_KEYS.entries} entries` }]
      : []),
    ...spec.sshPublicKeys.flatMap((key, index) =>
      key.value ? [] : [{ field: `spec.ssh_public_keys[${index}].value`, message: "is required" }],
    ),
    ...(spec.admission in AdmissionLevel ? [] : [{ field: "spec.admission", message: "is not a known level" }]),
    ...(image ? [{ field: "spec.devcontainer.default_devcontainer_image", message: image }] : []),
    ...(entries.length > ANNOTATIONS.entries
      ? [{ field: "annotations", message: `must have at most ${ANNOTATIONS.entries} entries` }]
      : []),
    ...(badAnnotation
      ? [
          {
            field: "annotations",
            message: `keys must have 1 to ${ANNOTATIONS.keyLength} characters and values at most ${ANNOTATIONS.valueLength}`,
          },
        ]
      : []),
    ...(spec.workflowActionId === undefined
      ? []
      : [{ field: "spec.workflow_action_id", message: "is set by the server only" }]),
    ...(spec.securityPolicyId ? [{ field: "spec.security_policy_id", message: "must be empty" }] : []),
  ];
}

// Making an environment.

/** Everything that a new environment is made from; access, limits and policies have been checked. */
export interface NewEnvironment {
  id: string;
  /** Spec of the request, already merged with the project's values if there is a project. */
  spec: EnvironmentSpec;
  /** Name of the request; blank means generate one. */
  name: string;
  annotations: Readonly<Record<string, string>>;
  /** Six random characters for a generated name. */
  nameSuffix: string;
  /** Name of the primary repository for a generated name; empty from scratch. */
  repositoryName: string;
  /** Grouping id, given or new. */
  sessionId: string;
  /** Fresh ids; all but `machine` are used only where the request names none. */
  sessions: { machine: string; content: string; devcontainer: string; automationsFile: string };
  creator: Pick<Caller, "id" | "principal" | "organizationId" | "name" | "email">;
  environmentClass: Pick<EnvironmentClass, "id" | "runnerId">;
  /** Empty without a project. */
  projectId: string;
  /** Secrets as the server composed them. */
  secrets: EnvironmentSpec_Secret[];
  defaults: {
    /** The creator's dotfiles repository; empty if none. Used for users only. */
    dotfilesRepository: string;
    /** Image that the organization's policy names; empty if none. */
    devcontainerImage: string;
    /** Kernel controls that the organization's policies ask for. */
    kernelControls: KernelControlsConfig | undefined;
    /** Lifetime policy in milliseconds; 0 means unlimited. */
    maximumLifetimeMs: number;
  };
  now: Date;
}

const NARROWEST: ReadonlySet<AdmissionLevel> = new Set([AdmissionLevel.UNSPECIFIED, AdmissionLevel.OWNER_ONLY]);
const storedAdmission = (level: AdmissionLevel) => (NARROWEST.has(level) ? AdmissionLevel.CREATOR_ONLY : level);

function openedPort(port: EnvironmentSpec_EnvironmentPort, authNonce: bigint): EnvironmentSpec_EnvironmentPort {
  return { ...port, admission: storedAdmission(port.admission), authNonce };
}

function newDevContainer(input: NewEnvironment) {
  const { spec, creator, sessions, defaults } = input;
  const given = spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);
  const own = creator.principal === Principal.USER && defaults.dotfilesRepository;
  return {
    ...given,
    session: given.session || sessions.devcontainer,
    dotfiles:
      given.dotfiles ??
      (own
        ? create(EnvironmentSpec_DevContainer_DotfilesSchema, { repository: defaults.dotfilesRepository })
        : undefined),
    defaultDevcontainerImage:
      given.defaultDevcontainerImage || defaults.devcontainerImage || DEFAULT_DEVCONTAINER_IMAGE,
    lifecycleStage: given.lifecycleStage || LifecycleStage.FULL,
  };
}

function newSpec(input: NewEnvironment): EnvironmentSpec {
  const { spec, creator, sessions } = input;
  const content = spec.content ?? create(EnvironmentSpec_ContentSchema);
  const automationsFile = spec.automationsFile ?? create(EnvironmentSpec_AutomationsFileSchema);
  const machine = spec.machine ?? create(EnvironmentSpec_MachineSchema);
  return {
    ...spec,
    specVersion: 1n,
    desiredPhase: EnvironmentPhase.RUNNING,
    machine: { ...machine, session: sessions.machine, class: input.environmentClass.id },
    content: {
      ...content,
      session: content.session || sessions.content,
      gitUsername: content.gitUsername || creator.name,
      gitEmail: content.gitEmail || creator.email,
    },
    secrets: input.secrets,
    ports: spec.ports.map((port) => openedPort(port, 1n)),
    timeout: spec.timeout?.disconnected
      ? spec.timeout
      : create(EnvironmentSpec_TimeoutSchema, { disconnected: durationFromMs(DEFAULT_TIMEOUT_MS) }),
    admission: storedAdmission(spec.admission),
    devcontainer: newDevContainer(input),
    sshPublicKeys: spec.sshPublicKeys.map((key) => ({ ...key, value: key.value.trim() })),
    automationsFile: { ...automationsFile, session: automationsFile.session || sessions.automationsFile },
    kernelControlsConfig: spec.kernelControlsConfig ?? input.defaults.kernelControls,
  };
}

/** A new environment in CREATING, both versions 1, with defaults filled in; a fixed point of `settle`. */
export function newEnvironment(input: NewEnvironment): EnvironmentState & { id: string } {
  const { creator, defaults, now } = input;
  const limited = defaults.maximumLifetimeMs > 0;
  const spec = newSpec(input);
  const metadata = create(EnvironmentMetadataSchema, {
    organizationId: creator.organizationId,
    annotations: input.annotations,
    name: input.name.trim() || generatedName(input.repositoryName, input.nameSuffix),
    creator: create(SubjectSchema, { id: creator.id, principal: creator.principal }),
    originalContextUrl: originalContextUrl(spec.content?.initializer),
    createdAt: timestampFromDate(now),
    lastStartedAt: timestampFromDate(now),
    projectId: input.projectId,
    runnerId: input.environmentClass.runnerId,
    role: spec.workflowActionId === undefined ? EnvironmentRole.DEFAULT : EnvironmentRole.WORKFLOW,
    sessionId: input.sessionId,
    ...(limited && { lockdownAt: timestampFromDate(new Date(now.getTime() + defaults.maximumLifetimeMs)) }),
  });
  return {
    id: input.id,
    metadata,
    spec,
    status: create(EnvironmentStatusSchema, { statusVersion: 1n, phase: EnvironmentPhase.CREATING }),
    facts: { ...newFacts(now), lockdownSource: limited ? "policy" : null },
  };
}

// Updating an environment.

/** Problems of an UpdateEnvironment request that need no lookup, except those of the initializer. */
export function updateProblems(request: UpdateEnvironmentRequest, now: Date): FieldProblem[] {
  const { metadata, spec } = request;
  if (!metadata && !spec) return [{ field: "spec", message: "nothing to update is given" }];
  const name = metadata?.name?.trim();
  const lockdown = metadata?.lockdownAt && timestampMs(metadata.lockdownAt);
  return [
    ...(name === undefined || (name && length(name) <= UPDATED_NAME_LENGTH)
      ? []
      : [{ field: "metadata.name", message: `must have 1 to ${UPDATED_NAME_LENGTH} characters` }]),
    ...(lockdown && lockdown < now.getTime()
      ? [{ field: "metadata.lockdown_at", message: "must not be in the past" }]
      : []),
    ...(spec ? partProblems(spec) : []),
  ];
}

function updatedKeys(state: EnvironmentState, changes: UpdateEnvironmentRequest_Spec): EnvironmentSpec_SSHPublicKey[] {
  const keys = new Map(state.spec.sshPublicKeys.map((key) => [key.id, key]));
  for (const { id, value } of changes.sshPublicKeys) {
    if (value) keys.set(id, create(EnvironmentSpec_SSHPublicKeySchema, { id, value: value.trim() }));
    else keys.delete(id);
  }
  return [...keys.values()];
}

function updatedPorts({ spec }: EnvironmentState, changes: UpdateEnvironmentRequest_Spec) {
  const ports = new Map(spec.ports.map((port) => [port.port, port]));
  for (const change of changes.ports) {
    const before = ports.get(change.port);
    // A port that is opened anew starts above every nonce it can have had, or old cookies would open it again.
    const nonce = before ? before.authNonce : spec.specVersion + 1n;
    const port = openedPort(change, nonce);
    if (change.admission === AdmissionLevel.UNSPECIFIED) ports.delete(change.port);
    else if (before && before.admission !== port.admission) ports.set(port.port, { ...port, authNonce: nonce + 1n });
    else ports.set(port.port, port);
  }
  return [...ports.values()];
}

function updatedSpec(state: EnvironmentState, changes: UpdateEnvironmentRequest_Spec): EnvironmentSpec {
  const { spec } = state;
  const content = spec.content ?? create(EnvironmentSpec_ContentSchema);
  const devcontainer = spec.devcontainer ?? create(EnvironmentSpec_DevContainerSchema);
  const automationsFile = spec.automationsFile ?? create(EnvironmentSpec_AutomationsFileSchema);
  const { disconnected } = changes.timeout ?? {};
  return {
    ...spec,
    content: {
      ...content,
      session: changes.content?.session || content.session,
      initializer: changes.content?.initializer ?? content.initializer,
      gitUsername: changes.content?.gitUsername ?? content.gitUsername,
      gitEmail: changes.content?.gitEmail ?? content.gitEmail,
    },
    devcontainer: {
      ...devcontainer,
      session: changes.devcontainer?.session || devcontainer.session,
      devcontainerFilePath: changes.devcontainer?.devcontainerFilePath ?? devcontainer.devcontainerFilePath,
    },
    automationsFile: {
      ...automationsFile,
      session: changes.automationsFile?.session || automationsFile.session,
      automationsFilePath: changes.automationsFile?.automationsFilePath ?? automationsFile.automationsFilePath,
    },
    sshPublicKeys: updatedKeys(state, changes),
    ports: updatedPorts(state, changes),
    timeout: disconnected ? create(EnvironmentSpec_TimeoutSchema, { disconnected }) : spec.timeout,
    kernelControlsConfig: changes.kernelControlsConfig ?? spec.kernelControlsConfig,
  };
}

/**
 * UpdateEnvironment, for a request without problems; who may set what, and policies, are checked by the caller. `secrets`
 * are those that the environment is to have with it, by default those that it has.
 */
export function requestUpdate(
  state: EnvironmentState,
  request: UpdateEnvironmentRequest,
  now: Date,
  secrets = state.spec.secrets,
): Transition {
  if (isLeaving(state)) return { kind: "refused", reason: "the environment is deleted or being deleted" };
  if (request.spec && state.metadata.archivedAt) {
    return { kind: "refused", reason: "the environment is archived; unarchive it first" };
  }
  const spec = request.spec ? { ...updatedSpec(state, request.spec), secrets } : state.spec;
  if (spec.ports.length > PORTS || spec.sshPublicKeys.length > SSH_KEYS.entries) {
    return { kind: "refused", reason: `an environment has at most ${PORTS} ports and ${SSH_KEYS.entries} SSH keys` };
  }
  const { name, lockdownAt } = request.metadata ?? {};
  const cleared = lockdownAt && timestampMs(lockdownAt) === 0;
  const metadata = {
    ...state.metadata,
    name: name?.trim() ?? state.metadata.name,
    lockdownAt: lockdownAt ? (cleared ? undefined : lockdownAt) : state.metadata.lockdownAt,
  };
  const lockdownSource = lockdownAt ? (cleared ? null : "admin") : state.facts.lockdownSource;
  return transition(state, { metadata, spec, facts: { ...state.facts, lockdownSource } }, now);
}

// Kernel controls: what an organization's veto policies ask of each environment.

type VetoPolicies = Pick<OrganizationPolicies, "vetoExecPolicy" | "vetoFilePolicy">;
type VetoPolicyName = "veto_exec_policy" | "veto_file_policy";

const strength = (action: KernelControlsAction) => (action === KernelControlsAction.AUDIT ? 1 : 2);
const stronger = (left: KernelControlsAction, right: KernelControlsAction) =>
  strength(left) >= strength(right) ? left : right;
const within = (path: string, parent: string) => path === parent || path.startsWith(`${parent.replace(/\/$/, "")}/`);

/** The enabled veto policies as kernel controls; undefined if none is enabled. */
export function requiredKernelControls(policies: VetoPolicies): KernelControlsConfig | undefined {
  const { vetoExecPolicy: exec, vetoFilePolicy: file } = policies;
  if (!exec?.enabled && !file?.enabled) return undefined;
  const veto = create(VetoSchema);
  if (exec?.enabled) {
    const action = exec.action || KernelControlsAction.BLOCK;
    veto.exec = create(Veto_ExecSchema, { enabled: true, denylist: exec.executables, action });
  }
  if (file?.enabled) {
    veto.file = create(Veto_FileSchema, { enabled: true, paths: file.paths, blockDevices: file.blockDevices });
  }
  return create(KernelControlsConfigSchema, { veto });
}

function execWeaker(given: Veto_Exec | undefined, required: Veto_Exec): boolean {
  const denied = new Set(given?.denylist);
  return (
    !given?.enabled ||
    strength(given.action) < strength(required.action) ||
    required.denylist.some((executable) => !denied.has(executable))
  );
}

/** Entries with the defaults of their policy written out. */
function explicitEntries(policy: VetoFilePathPolicy | undefined): VetoFilePathEntry[] {
  return (policy?.entries ?? []).map((entry) => ({
    ...entry,
    surface: entry.surface || (policy?.defaultSurface ?? 0),
    effect: entry.effect || policy?.defaultEffect || KernelControlsAction.BLOCK,
  }));
}

/** The entry would soften what is required for its path or a directory above it. */
function softens(entry: VetoFilePathEntry, required: readonly VetoFilePathEntry[]): boolean {
  const above = required.filter((rule) => rule.surface === entry.surface && within(entry.path, rule.path));
  const closest = above.sort((left, right) => right.path.length - left.path.length)[0];
  return closest !== undefined && strength(entry.effect) < strength(closest.effect);
}

function covers(entries: readonly VetoFilePathEntry[], rule: VetoFilePathEntry): boolean {
  return entries.some(
    (entry) =>
      entry.path === rule.path &&
      entry.surface === rule.surface &&
      strength(entry.effect) >= strength(rule.effect) &&
      (entry.trackChanges || !rule.trackChanges),
  );
}

function fileWeaker(given: Veto_File | undefined, required: Veto_File): boolean {
  const entries = explicitEntries(given?.paths);
  const rules = explicitEntries(required.paths);
  const devices = required.blockDevices;
  return (
    !given?.enabled ||
    rules.some((rule) => !covers(entries, rule)) ||
    entries.some((entry) => softens(entry, rules)) ||
    (devices?.enabled === true &&
      (!given.blockDevices?.enabled || strength(given.blockDevices.action) < strength(devices.action)))
  );
}

/** The policies than which a configuration is weaker; a refusal names the first. */
export function weakenedPolicies(
  config: KernelControlsConfig | undefined,
  required: KernelControlsConfig | undefined,
): VetoPolicyName[] {
  const { exec, file } = required?.veto ?? {};
  return [
    ...(exec && execWeaker(config?.veto?.exec, exec) ? (["veto_exec_policy"] as const) : []),
    ...(file && fileWeaker(config?.veto?.file, file) ? (["veto_file_policy"] as const) : []),
  ];
}

function strengthenedExec(given: Veto_Exec | undefined, required: Veto_Exec): Veto_Exec {
  if (!given?.enabled) return { ...required, watch: given?.watch ?? false, untouchable: given?.untouchable ?? false };
  const denylist = [...new Set([...given.denylist, ...required.denylist])];
  return { ...given, denylist, action: stronger(given.action, required.action) };
}

function strengthenedFile(given: Veto_File | undefined, required: Veto_File): Veto_File {
  if (!given?.enabled) return { ...required, supervisorProtection: given?.supervisorProtection };
  const rules = explicitEntries(required.paths);
  const kept = explicitEntries(given.paths).filter((entry) => !softens(entry, rules));
  const added = rules.filter((rule) => !covers(kept, rule));
  const entries = [...kept, ...added.map((rule) => create(VetoFilePathEntrySchema, rule))];
  const devices = required.blockDevices;
  const paths = entries.length > 0 ? { ...(given.paths ?? create(VetoFilePathPolicySchema)), entries } : given.paths;
  const enforced = devices?.enabled
    ? create(VetoFileBlockDevicesPolicySchema, {
        enabled: true,
        action: given.blockDevices?.enabled ? stronger(given.blockDevices.action, devices.action) : devices.action,
      })
    : given.blockDevices;
  return { ...given, paths, blockDevices: enforced };
}

/** The configuration with the required rules added; one that is strong enough comes back as it is. */
export function strengthened(
  config: KernelControlsConfig | undefined,
  required: KernelControlsConfig | undefined,
): KernelControlsConfig | undefined {
  if (weakenedPolicies(config, required).length === 0) return config;
  const { exec, file } = required?.veto ?? {};
  const given = config?.veto;
  const veto = {
    ...(given ?? create(VetoSchema)),
    exec: exec ? strengthenedExec(given?.exec, exec) : given?.exec,
    file: file ? strengthenedFile(given?.file, file) : given?.file,
  };
  return { ...(config ?? create(KernelControlsConfigSchema)), veto };
}
