import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { TokenKind } from "../../src/domain/tokens.ts";
import { newGroup } from "../harness/groups.ts";
import type { TestPlane } from "../harness/plane.ts";
import { addOrganization, mint, share } from "../harness/tenants.ts";
import { newEnvironment, type Stage, type World } from "./world.ts";

/** Columns of the tables, in their order. */
export const COLUMNS = {
  no: "nobody: no credential, or one that the API does not take",
  ac: "a browser that is signed in as an account, not yet as a user",
  fo: "an admin of another organization",
  me: "a member without any role",
  ro: "the creator, with a token that may only read",
  cr: "the creator of environment, project, secrets and tokens, who may use the runner",
  ad: "an admin of the organization",
  st: "a service account",
  sa: "the same, with its short-lived access token",
  rt: "the runner",
  r2: "another runner of the organization",
  en: "the environment, from inside",
  e2: "another environment of the organization, on the other runner",
  or: "a member with ORG_RUNNERS_ADMIN",
  op: "a member with ORG_PROJECTS_ADMIN",
  og: "a member with ORG_GROUPS_ADMIN",
  oe: "a member with ORG_ENVIRONMENTS_READER",
  oa: "a member with ORG_AUDIT_LOG_READER",
  ra: "a member with RUNNER_ADMIN",
  ru: "a member with RUNNER_USER",
  pa: "a member with PROJECT_ADMIN",
  pe: "a member with PROJECT_EDITOR",
  pu: "a member with PROJECT_USER",
  ea: "a member with ENVIRONMENT_ADMIN",
  eu: "a member with ENVIRONMENT_USER",
  ev: "a member with ENVIRONMENT_VIEWER",
  ga: "a member with GROUP_ADMIN",
  sv: "a member with SERVICE_ACCOUNT_ADMIN",
} as const;
export type Column = keyof typeof COLUMNS;

/** Who calls, and as whom of the table it must be answered. */
export interface Caller {
  name: string;
  column: Column;
  headers: Record<string, string>;
  /** A role on one resource, which it is given on new ones, too. */
  role?: OneRole;
}

interface OneRole {
  userId: string;
  type: ResourceType;
  field: keyof World;
  role: ResourceRole;
}

const { RUNNER, PROJECT, ENVIRONMENT, GROUP, SERVICE_ACCOUNT } = ResourceType;

const ROLES: Partial<Record<Column, Omit<OneRole, "userId">>> = {
  ra: { type: RUNNER, field: "runnerId", role: ResourceRole.RUNNER_ADMIN },
  ru: { type: RUNNER, field: "runnerId", role: ResourceRole.RUNNER_USER },
  pa: { type: PROJECT, field: "projectId", role: ResourceRole.PROJECT_ADMIN },
  pe: { type: PROJECT, field: "projectId", role: ResourceRole.PROJECT_EDITOR },
  pu: { type: PROJECT, field: "projectId", role: ResourceRole.PROJECT_USER },
  ea: { type: ENVIRONMENT, field: "environmentId", role: ResourceRole.ENVIRONMENT_ADMIN },
  eu: { type: ENVIRONMENT, field: "environmentId", role: ResourceRole.ENVIRONMENT_USER },
  ev: { type: ENVIRONMENT, field: "environmentId", role: ResourceRole.ENVIRONMENT_VIEWER },
  ga: { type: GROUP, field: "groupId", role: ResourceRole.GROUP_ADMIN },
  sv: { type: SERVICE_ACCOUNT, field: "serviceAccountId", role: ResourceRole.SERVICE_ACCOUNT_ADMIN },
};

const OF_ORGANIZATION: Partial<Record<Column, ResourceRole>> = {
  or: ResourceRole.ORG_RUNNERS_ADMIN,
  op: ResourceRole.ORG_PROJECTS_ADMIN,
  og: ResourceRole.ORG_GROUPS_ADMIN,
  oe: ResourceRole.ORG_ENVIRONMENTS_READER,
  oa: ResourceRole.ORG_AUDIT_LOG_READER,
};

/** Roles that open nothing, or nothing more than every member may do. */
const WITHOUT_EFFECT = [
  ResourceRole.ORG_AUTOMATIONS_ADMIN,
  ResourceRole.ORG_BILLING_VIEWER,
  ResourceRole.ORG_INSIGHTS_VIEWER,
  ResourceRole.ORG_SECURITY_ADMIN,
];

const bearer = (token: string) => ({ authorization: `Bearer ${token}` });

/** Gives a caller its role on the objects of a world. */
export const assign = (plane: TestPlane, { userId, type, field, role }: OneRole, world: World) =>
  share(plane, userId, { type, id: world[field], role });

async function holders(plane: TestPlane, world: World): Promise<Caller[]> {
  const callers: Caller[] = [];
  for (const [column, role] of Object.entries(ROLES) as [Column, Omit<OneRole, "userId">][]) {
    const { id: userId, token } = await plane.addUser();
    await assign(plane, { userId, ...role }, world);
    callers.push({ name: ResourceRole[role.role], column, headers: bearer(token), role: { userId, ...role } });
  }
  for (const [column, role] of Object.entries(OF_ORGANIZATION) as [Column, ResourceRole][]) {
    const user = await plane.addUser();
    await newGroup(plane, { users: [user], organizationRoles: [role] });
    callers.push({ name: ResourceRole[role], column, headers: bearer(user.token) });
  }
  const user = await plane.addUser();
  await newGroup(plane, { users: [user], organizationRoles: WITHOUT_EFFECT });
  await share(plane, user.id, { type: GROUP, id: world.groupId, role: ResourceRole.GROUP_VIEWER });
  callers.push({ name: "roles without effect", column: "me", headers: bearer(user.token) });
  return callers;
}

/** Texts that are no credential for the API, or none any more. */
async function nobodies(plane: TestPlane, { userId, environmentId, exchangeToken }: World): Promise<Caller[]> {
  const { PERSONAL_ACCESS, ENVIRONMENT_ACCESS, PORT_ACCESS, LOGS, SCIM, SESSION } = TokenKind;
  const own = { subjectId: userId, environmentId };
  const suspended = await plane.addUser();
  await plane.admin.users.setSuspended({ userId: suspended.id, suspended: true });
  // Its tokens are gone with it; this one is made afterwards.
  const late = await mint(plane, { kind: PERSONAL_ACCESS, subjectId: suspended.id });
  const texts: Record<string, string> = {
    "exchange token": exchangeToken,
    "environment access token": await mint(plane, { kind: ENVIRONMENT_ACCESS, ...own }),
    "port token": await mint(plane, { kind: PORT_ACCESS, ...own, port: 3000 }),
    "logs token": await mint(plane, { kind: LOGS, ...own }),
    "SCIM token": await mint(plane, { kind: SCIM, subjectId: userId }),
    "session as bearer": await mint(plane, { kind: SESSION, subjectId: userId }),
    "expired token": await mint(plane, { kind: PERSONAL_ACCESS, subjectId: userId, expiresAt: new Date(0) }),
    "token of a suspended user": suspended.token,
    "later token of a suspended user": late,
    nonsense: "x",
  };
  const withText = Object.entries(texts).map(([name, text]): Caller => ({ name, column: "no", headers: bearer(text) }));
  return [{ name: "no header", column: "no", headers: {} }, ...withText];
}

async function accountOf({ plane: { app } }: TestPlane, userId: string): Promise<string> {
  const [row] = await app.db.point<{ account_id: string }[]>`select account_id from users where id = ${userId}`;
  return row?.account_id ?? "";
}

/** Browsers: a cookie, and a page of this server from which they call. */
async function browsers(plane: TestPlane, { userId }: World): Promise<Caller[]> {
  const cookie = (text: string) => ({ cookie: `berth_session=${text}`, origin: plane.url });
  const kind = TokenKind.SESSION;
  const accountId = await accountOf(plane, (await plane.addUser()).id);
  const asAccount = { subjectId: accountId, subjectPrincipal: Principal.ACCOUNT, organizationId: undefined };
  return [
    { name: "session of the creator", column: "cr", headers: cookie(await mint(plane, { kind, subjectId: userId })) },
    { name: "session of an account", column: "ac", headers: cookie(await mint(plane, { kind, ...asAccount })) },
  ];
}

/** Everybody who calls. Several of one column must be answered alike. */
export async function allCallers(stage: Stage, world: World, environmentToken: string): Promise<Caller[]> {
  const { plane, creator, robot, runner, otherRunner } = stage;
  const { PERSONAL_ACCESS } = TokenKind;
  const organizationId = await addOrganization(plane);
  const foreigner = await plane.addUser({ organizationId, role: OrganizationRole.ADMIN });
  const admin = await plane.addUser({ role: OrganizationRole.ADMIN });
  const byGroup = await plane.addUser();
  await newGroup(plane, { users: [byGroup], organizationRoles: [ResourceRole.ORG_ADMIN] });
  const readOnly = await mint(plane, { kind: PERSONAL_ACCESS, subjectId: creator.id, readOnly: true });
  const access = await plane.admin.serviceAccounts.createServiceAccountAccessToken({ serviceAccountId: robot.id });
  const other = await newEnvironment(stage.otherClassId, { by: plane.admin, on: otherRunner });
  const single = (name: string, column: Column, token: string): Caller => ({ name, column, headers: bearer(token) });
  return [
    ...(await nobodies(plane, world)),
    ...(await browsers(plane, world)),
    single("foreign admin", "fo", foreigner.token),
    single("member", "me", (await plane.addUser()).token),
    single("read-only token", "ro", readOnly),
    single("creator", "cr", creator.token),
    single("admin", "ad", admin.token),
    single("admin by a group", "ad", byGroup.token),
    single("service account", "st", robot.token),
    single("access token of a service account", "sa", access.token),
    single("runner", "rt", runner.token),
    single("another runner", "r2", otherRunner.token),
    single("environment", "en", environmentToken),
    single("another environment", "e2", other.token),
    ...(await holders(plane, world)),
  ];
}
