import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { ProjectRole } from "../../gen/gitpod/v1/project_pb.js";
import { RunnerRole } from "../../gen/gitpod/v1/runner_pb.js";
import { invalid, notFound } from "./errors.ts";

/**
 * Roles that can be assigned, by kind of resource. Those on one resource include each other: the highest first. Those
 * on the organization do not, and a group may hold several.
 */
const ASSIGNABLE: Partial<Record<ResourceType, readonly ResourceRole[]>> = {
  [ResourceType.ORGANIZATION]: [
    ResourceRole.ORG_ADMIN,
    ResourceRole.ORG_RUNNERS_ADMIN,
    ResourceRole.ORG_PROJECTS_ADMIN,
    ResourceRole.ORG_GROUPS_ADMIN,
    ResourceRole.ORG_ENVIRONMENTS_READER,
    ResourceRole.ORG_AUDIT_LOG_READER,
    // Kept without effect until there is what they are for.
    ResourceRole.ORG_AUTOMATIONS_ADMIN,
    ResourceRole.ORG_BILLING_VIEWER,
    ResourceRole.ORG_INSIGHTS_VIEWER,
    ResourceRole.ORG_SECURITY_ADMIN,
  ],
  [ResourceType.RUNNER]: [ResourceRole.RUNNER_ADMIN, ResourceRole.RUNNER_USER],
  [ResourceType.PROJECT]: [ResourceRole.PROJECT_ADMIN, ResourceRole.PROJECT_EDITOR, ResourceRole.PROJECT_USER],
  [ResourceType.ENVIRONMENT]: [
    ResourceRole.ENVIRONMENT_ADMIN,
    ResourceRole.ENVIRONMENT_USER,
    ResourceRole.ENVIRONMENT_VIEWER,
  ],
  [ResourceType.GROUP]: [ResourceRole.GROUP_ADMIN, ResourceRole.GROUP_VIEWER],
  [ResourceType.SERVICE_ACCOUNT]: [ResourceRole.SERVICE_ACCOUNT_ADMIN],
};

const kinds = Object.entries(ASSIGNABLE).map(([type, roles]) => ({ type: Number(type) as ResourceType, roles }));

/** Roles that can be assigned on a kind of resource; none on one that roles are not assigned on. */
export const assignableRoles = (type: ResourceType): readonly ResourceRole[] => ASSIGNABLE[type] ?? [];

/** Kind of resource that a role can be assigned on; undefined for a role that cannot be assigned. */
export const typeOfRole = (role: ResourceRole): ResourceType | undefined =>
  kinds.find(({ roles }) => roles.includes(role))?.type;

/** A role on a resource and those that include it. */
export function rolesFrom(role: ResourceRole): readonly ResourceRole[] {
  const ladder = kinds.find(({ type, roles }) => type !== ResourceType.ORGANIZATION && roles.includes(role))?.roles;
  return ladder ? ladder.slice(0, ladder.indexOf(role) + 1) : [role];
}

/** The highest role on each kind of resource that has an order of roles. */
export const ADMIN_ROLES: readonly ResourceRole[] = kinds
  .filter(({ type }) => type !== ResourceType.ORGANIZATION)
  .flatMap(({ roles }) => roles.slice(0, 1));

/** Refuses a role that cannot be assigned on a kind of resource; `field` is where the request has the role. */
export function checkAssignable(type: ResourceType, resourceId: string, role: ResourceRole, field: string): void {
  if (type === ResourceType.UNSPECIFIED || !(type in ResourceType))
    throw invalid({ field: "resource_type", message: "is not a kind of resource" });
  if (role === ResourceRole.UNSPECIFIED || !(role in ResourceRole)) throw invalid({ field, message: "is not a role" });
  const roles = ASSIGNABLE[type];
  if (!roles) throw notFound(resourceName(type), resourceId);
  if (!roles.includes(role)) throw invalid({ field, message: `cannot be assigned on ${resourceName(type)}s` });
}

/** A kind of resource in words: `service account`. */
export const resourceName = (type: ResourceType): string => ResourceType[type].toLowerCase().replaceAll("_", " ");

const OF_RUNNERS = new Map([
  [RunnerRole.ADMIN, ResourceRole.RUNNER_ADMIN],
  [RunnerRole.USER, ResourceRole.RUNNER_USER],
]);
const OF_PROJECTS = new Map([
  [ProjectRole.ADMIN, ResourceRole.PROJECT_ADMIN],
  [ProjectRole.EDITOR, ResourceRole.PROJECT_EDITOR],
  [ProjectRole.USER, ResourceRole.PROJECT_USER],
]);

function assigned<Role>(roles: ReadonlyMap<Role, ResourceRole>, role: Role): ResourceRole {
  const found = roles.get(role);
  if (found === undefined) throw invalid({ field: "role", message: "is not a role" });
  return found;
}

function named<Role>(roles: ReadonlyMap<Role, ResourceRole>, role: ResourceRole): Role {
  for (const [name, each] of roles) if (each === role) return name;
  throw new Error(`${ResourceRole[role]} is no role of a policy`);
}

/** Role of a runner policy as it is assigned; INVALID_ARGUMENT for one that does not exist. */
export const roleOfRunnerPolicy = (role: RunnerRole): ResourceRole => assigned(OF_RUNNERS, role);
/** An assigned role as a runner policy names it. */
export const runnerRole = (role: ResourceRole): RunnerRole => named(OF_RUNNERS, role);
/** Role of a project policy as it is assigned; INVALID_ARGUMENT for one that does not exist. */
export const roleOfProjectPolicy = (role: ProjectRole): ResourceRole => assigned(OF_PROJECTS, role);
/** An assigned role as a project policy names it. */
export const projectRole = (role: ResourceRole): ProjectRole => named(OF_PROJECTS, role);

/** A role on every resource of a kind that follows from a role on the organization. */
export interface Derivation {
  type: ResourceType;
  role: ResourceRole;
  from: ResourceRole;
}

const derive = (type: ResourceType, role: ResourceRole, ...from: ResourceRole[]): Derivation[] =>
  [ResourceRole.ORG_ADMIN, ...from].map((each) => ({ type, role, from: each }));

/** What follows from which role on the organization. Environments are not among it: admins must not let themselves in. */
export const DERIVATIONS: readonly Derivation[] = [
  ...derive(ResourceType.RUNNER, ResourceRole.RUNNER_ADMIN, ResourceRole.ORG_RUNNERS_ADMIN),
  ...derive(ResourceType.PROJECT, ResourceRole.PROJECT_ADMIN, ResourceRole.ORG_PROJECTS_ADMIN),
  ...derive(ResourceType.GROUP, ResourceRole.GROUP_ADMIN, ResourceRole.ORG_GROUPS_ADMIN),
  ...derive(ResourceType.SERVICE_ACCOUNT, ResourceRole.SERVICE_ACCOUNT_ADMIN),
];

// A derived assignment has no row, so its id is the exclusive or of the two that it follows from, as a UUID of version 8:
// with either of the two it gives the other one back.
const VERSION_SHIFT = 76n;
const VARIANT_SHIFT = 62n;
const STAMPED = (0xfn << VERSION_SHIFT) | (0x3n << VARIANT_SHIFT);
const ROW_VERSION = 7n;
const DERIVED_VERSION = 8n;
const VERSION_INDEX = 14;

function combined(left: string, right: string, version: bigint): string {
  const [a, b] = [left, right].map((id) => BigInt(`0x${id.replaceAll("-", "")}`)) as [bigint, bigint];
  const bits = ((a ^ b) & ~STAMPED) | (version << VERSION_SHIFT) | (0x2n << VARIANT_SHIFT);
  return bits
    .toString(16)
    .padStart(32, "0")
    .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

/** Id of the assignment on a resource that follows from an assignment on the organization; always the same. */
export const derivedId = (assignmentId: string, resourceId: string): string =>
  combined(assignmentId, resourceId, DERIVED_VERSION);

/** The resource of a derived assignment that follows from this assignment on the organization. */
export const resourceOfDerived = (id: string, assignmentId: string): string => combined(id, assignmentId, ROW_VERSION);

/** Whether an id can be that of a derived assignment. */
export const isDerivedId = (id: string): boolean => id[VERSION_INDEX] === String(DERIVED_VERSION);
