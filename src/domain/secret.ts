import { create } from "@bufbuild/protobuf";
import {
  type EnvironmentSpec_Secret,
  EnvironmentSpec_Secret_Scope,
  EnvironmentSpec_SecretSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { OrganizationPolicies } from "../../gen/gitpod/v1/organization_pb.js";
import {
  type CreateSecretRequest,
  type Secret,
  type Secret_CredentialProxy,
  Secret_CredentialProxy_Format,
  type Secret_Source,
  type SecretScope,
  SecretScopeSchema,
} from "../../gen/gitpod/v1/secret_pb.js";
import { actionable, type FieldProblem, Refusal, refuseProblems } from "./errors.ts";

/** Kinds of owners, as they are stored: the field numbers of SecretScope. */
export const Scope = { PROJECT: 1, USER: 2, ORGANIZATION: 3, SERVICE_ACCOUNT: 4 } as const;
export type Scope = (typeof Scope)[keyof typeof Scope];

/** Whom a secret belongs to. */
export interface Owner {
  scope: Scope;
  id: string;
}

type Field = Exclude<SecretScope["scope"]["case"], undefined>;
const SCOPES: Record<Field, Scope> = {
  projectId: Scope.PROJECT,
  userId: Scope.USER,
  organizationId: Scope.ORGANIZATION,
  serviceAccountId: Scope.SERVICE_ACCOUNT,
};
const FIELDS = Object.fromEntries(Object.entries(SCOPES).map(([field, scope]) => [scope, field])) as Record<
  Scope,
  Field
>;
const RESOURCE_TYPES: Record<Scope, ResourceType> = {
  [Scope.PROJECT]: ResourceType.SECRET,
  [Scope.USER]: ResourceType.USER_SECRET,
  [Scope.ORGANIZATION]: ResourceType.ORGANIZATION_SECRET,
  [Scope.SERVICE_ACCOUNT]: ResourceType.SERVICE_ACCOUNT_SECRET,
};
const SPEC_SCOPES: Record<Scope, EnvironmentSpec_Secret_Scope> = {
  [Scope.PROJECT]: EnvironmentSpec_Secret_Scope.PROJECT,
  [Scope.USER]: EnvironmentSpec_Secret_Scope.USER,
  [Scope.ORGANIZATION]: EnvironmentSpec_Secret_Scope.ORGANIZATION,
  [Scope.SERVICE_ACCOUNT]: EnvironmentSpec_Secret_Scope.SERVICE_ACCOUNT,
};

/** Type under which events and audit entries tell of a secret. */
export const resourceTypeOf = ({ scope }: Owner): ResourceType => RESOURCE_TYPES[scope];

/** The owner as clients read it. */
export const scopeMessage = ({ scope, id }: Owner): SecretScope =>
  create(SecretScopeSchema, { scope: { case: FIELDS[scope], value: id } as SecretScope["scope"] });

/** The owner that a scope names; undefined for none. */
export function ownerOf(message: SecretScope | undefined): Owner | undefined {
  const scope = message?.scope;
  return scope?.case && { scope: SCOPES[scope.case], id: scope.value.toLowerCase() };
}

// What a request may say.

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const RESERVED: ReadonlySet<string> = new Set(["HOME", "LD_PRELOAD", "PATH", "PWD", "SHELL", "USER"]);
const PATH_LENGTH = 1024;
const PROXY_HOSTS = 100;
const HOST_LENGTH = 253;
const LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
const HOST_NAME = new RegExp(`^${LABEL}(\\.${LABEL})*$`, "i");
const REGISTRY = /^(?:https?:\/\/)?([^/:[\]@]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?$/i;
const HEADER = /^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}$/;
const BASE64 = /^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/;
const CONTROL_CHARACTERS = /\p{Cc}/u;
const MAX_PORT = 65_535;

/** Owner of a new secret; a project that the deprecated field names alone counts as one. */
export function requestedOwner(request: Pick<CreateSecretRequest, "projectId" | "scope">): Owner | FieldProblem {
  const owner = ownerOf(request.scope);
  const projectId = request.projectId.toLowerCase();
  if (!projectId) return owner ?? { field: "scope", message: "must name an owner" };
  if (!UUID.test(projectId)) return { field: "project_id", message: "must be a UUID" };
  if (!owner) return { scope: Scope.PROJECT, id: projectId };
  const same = owner.scope === Scope.PROJECT && owner.id === projectId;
  return same ? owner : { field: "scope", message: "names another owner than project_id" };
}

/** Host of a container registry in one spelling, `host` or `host:port`; undefined if the text names none. */
export function registryHost(text: string): string | undefined {
  const [, host = "", port] = REGISTRY.exec(text) ?? [];
  const isHost = host.startsWith("[") || (host.length <= HOST_LENGTH && HOST_NAME.test(host));
  if (!host || !isHost || (port !== undefined && (Number(port) < 1 || Number(port) > MAX_PORT))) return undefined;
  return `${host.toLowerCase()}${port === undefined ? "" : `:${Number(port)}`}`;
}

/** `user:password` from a value that is either that or its base64; undefined if it is neither. */
export function basicCredentials(value: string): string | undefined {
  const isPair = (text: string) => /^[^:]+:./.test(text) && !CONTROL_CHARACTERS.test(text) && !text.includes("\ufffd");
  if (isPair(value)) return value;
  const decoded = BASE64.test(value) ? Buffer.from(value, "base64").toString() : "";
  return isPair(decoded) ? decoded : undefined;
}

function pathProblem(path: string): string | undefined {
  if (path.length > PATH_LENGTH) return `must have at most ${PATH_LENGTH} characters`;
  const [, ...segments] = path.split("/");
  const isPlain = !CONTROL_CHARACTERS.test(path) && segments.every((each) => !["", ".", ".."].includes(each));
  return isPlain ? undefined : "must be a plain absolute path to a file";
}

function mountProblems({ mount, name }: Pick<CreateSecretRequest, "mount" | "name">): FieldProblem[] {
  switch (mount.case) {
    case undefined:
      return [{ field: "mount", message: "must say how the secret is mounted" }];
    case "environmentVariable":
      return [
        ...(mount.value ? [] : [{ field: "environment_variable", message: "can only be true" }]),
        ...(/^\d/.test(name) ? [{ field: "name", message: "of a variable must not begin with a digit" }] : []),
      ];
    case "apiOnly":
      return mount.value ? [] : [{ field: "api_only", message: "can only be true" }];
    case "filePath": {
      const message = pathProblem(mount.value);
      return message ? [{ field: "file_path", message }] : [];
    }
    case "containerRegistryBasicAuthHost":
      if (registryHost(mount.value)) return [];
      return [{ field: "container_registry_basic_auth_host", message: "must be a host with an optional port" }];
  }
}

function proxyProblems(proxy: Secret_CredentialProxy | undefined): FieldProblem[] {
  if (!proxy) return [];
  const { targetHosts, header, format } = proxy;
  const isTarget = (text: string) => text.length <= HOST_LENGTH && HOST_NAME.test(text.replace(/^\*\./, ""));
  const count = targetHosts.length;
  return [
    ...(count > 0 && count <= PROXY_HOSTS
      ? []
      : [{ field: "credential_proxy.target_hosts", message: `must have 1 to ${PROXY_HOSTS} entries` }]),
    ...targetHosts.flatMap((host, index) =>
      isTarget(host)
        ? []
        : [{ field: `credential_proxy.target_hosts[${index}]`, message: "must be a host name, or *. and one" }],
    ),
    ...(HEADER.test(header) ? [] : [{ field: "credential_proxy.header", message: "must be the name of a header" }]),
    ...(format in Secret_CredentialProxy_Format
      ? []
      : [{ field: "credential_proxy.format", message: "is not a known format" }]),
  ];
}

/** The value is not kept here: it comes from somewhere else when it is needed. */
export const isElsewhere = (source: Secret_Source | undefined) => source?.value.case === "oidcJfrog";

/** Problems of a value that is to be stored for a mount. */
export function valueProblems(mount: Secret["mount"], value: string): FieldProblem[] {
  const wrong = (message: string) => [{ field: "value", message }];
  if (!value) return wrong("must not be empty");
  if (mount.case === "environmentVariable" && value.includes("\0")) return wrong("of a variable must not hold NUL");
  if (mount.case === "containerRegistryBasicAuthHost" && !basicCredentials(value)) {
    return wrong("must be user:password, or its base64");
  }
  return [];
}

function sourceProblems({ source, value, mount }: CreateSecretRequest): FieldProblem[] {
  if (isElsewhere(source)) return value ? [{ field: "value", message: "comes from the source: must be empty" }] : [];
  if (source?.value.case === "verbatim" && !source.value.value) {
    return [{ field: "source.verbatim", message: "can only be true" }];
  }
  return valueProblems(mount, value);
}

function reservedName(name: string): Refusal {
  const message = `the variable ${name} belongs to the system: choose another name`;
  const { details } = actionable("invalid_argument", "SECRET_NAME_RESERVED", message);
  return new Refusal("invalid_argument", message, { problems: [{ field: "name", message }], details: [...details] });
}

/** Throws INVALID_ARGUMENT for whatever is wrong with a new secret beyond what the schema says; returns its owner. */
export function checkNewSecret(request: CreateSecretRequest): Owner {
  const isVariable = request.mount.case === "environmentVariable";
  if (isVariable && RESERVED.has(request.name.toUpperCase())) throw reservedName(request.name);
  const owner = requestedOwner(request);
  refuseProblems([
    ...("field" in owner ? [owner] : []),
    ...mountProblems(request),
    ...proxyProblems(request.credentialProxy),
    ...sourceProblems(request),
  ]);
  return owner as Owner;
}

/** Whether an organization policy names this secret of the organization: security agents get their settings from them. */
export function isNamedByPolicy({ securityAgentPolicy }: OrganizationPolicies, { id, name }: Secret): boolean {
  const { crowdstrike, customAgents = [] } = securityAgentPolicy ?? {};
  return (
    (crowdstrike?.enabled && crowdstrike.cidSecretId.toLowerCase() === id) ||
    customAgents.some(({ envMappings }) => envMappings.some((each) => each.secretName === name))
  );
}

// What an environment gets.

/** Source of entries whose values the control plane holds. */
export const CONTROL_PLANE = "control-plane";
/** Source of entries whose values the runner asks for by host: credentials for source control. */
export const RUNNER = "runner";

/** A secret that may go into an environment. */
export interface Candidate {
  message: Secret;
  owner: Owner;
  session: string;
}

/** Higher wins. */
const PRECEDENCE: Record<Scope, number> = {
  [Scope.ORGANIZATION]: 1,
  [Scope.PROJECT]: 2,
  [Scope.SERVICE_ACCOUNT]: 3,
  [Scope.USER]: 3,
};

/** The places that a secret takes; two that share one collide. */
function placesOf({ name, mount }: Secret): string[] {
  const named = `${mount.case} ${name}`;
  switch (mount.case) {
    case "filePath":
      return [named, `file ${mount.value}`];
    case "containerRegistryBasicAuthHost":
      return [named, `registry ${registryHost(mount.value)}`];
    default:
      return [named];
  }
}

/**
 * The secrets that are delivered, in the order of their ids. Where several want the same place, that of the user or
 * service account wins over the project's, and that over the organization's; of one owner the newest.
 */
export function effectiveSecrets<T extends Candidate>(candidates: readonly T[]): T[] {
  const newestFirst = candidates.toSorted((left, right) => (left.message.id < right.message.id ? 1 : -1));
  const order = newestFirst.sort((left, right) => PRECEDENCE[right.owner.scope] - PRECEDENCE[left.owner.scope]);
  const taken = new Set<string>();
  const delivered = order.filter(({ message }) => {
    const places = placesOf(message);
    if (places.some((place) => taken.has(place))) return false;
    for (const place of places) taken.add(place);
    return true;
  });
  return delivered.sort((left, right) => (left.message.id < right.message.id ? -1 : 1));
}

/** In a specification a variable is given by its name. */
const specMount = ({ name, mount }: Secret): EnvironmentSpec_Secret["mount"] =>
  mount.case === "environmentVariable" ? { case: mount.case, value: name } : mount;

/**
 * The secrets of a specification: those of other sources as they were, then these. An entry keeps its id as long as its
 * secret is delivered; `newId` makes the ids of new ones.
 */
export function specSecrets(
  candidates: readonly Candidate[],
  before: readonly EnvironmentSpec_Secret[],
  newId: () => string,
): EnvironmentSpec_Secret[] {
  const known = new Map(before.filter(({ source }) => source === CONTROL_PLANE).map((each) => [each.sourceRef, each]));
  const entries = effectiveSecrets(candidates).map(({ message, owner, session }) =>
    create(EnvironmentSpec_SecretSchema, {
      id: known.get(message.id)?.id ?? newId(),
      name: message.name,
      source: CONTROL_PLANE,
      sourceRef: message.id,
      mount: specMount(message),
      session,
      scope: SPEC_SCOPES[owner.scope],
      credentialProxy: message.credentialProxy,
      sourceDetails: message.source,
    }),
  );
  return [...before.filter(({ source }) => source !== CONTROL_PLANE), ...entries];
}
