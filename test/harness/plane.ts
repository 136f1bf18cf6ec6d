import { randomBytes } from "node:crypto";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { v7 as uuidv7 } from "uuid";
import { inject } from "vitest";
import { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import type { Limits } from "../../src/app.ts";
import { type BerthClient, createBerthClient } from "../../src/client.ts";
import { readServerConfig } from "../../src/config.ts";
import { type ControlPlane, startControlPlane } from "../../src/control-plane.ts";
import { MEMBERS_GROUP } from "../../src/domain/group.ts";
import { TokenKind, tokenText } from "../../src/domain/tokens.ts";
import { openDb } from "../../src/store/db.ts";
import { syncBuiltInGroups } from "../../src/store/groups.ts";
import { insertToken } from "../../src/store/tokens.ts";
import { databaseUrl } from "./database.ts";

/** A control plane of its own for a test file, on a private clone of the migrated database. */
export interface TestPlane extends AsyncDisposable {
  plane: ControlPlane;
  url: string;
  databaseUrl: string;
  dataDir: string;
  /** Text of the first admin's token. */
  adminToken: string;
  admin: BerthClient;
  organizationId: string;
  /** The first runner's exchange token, if the plane was started with one. */
  exchangeToken?: string;
  /** Everything that the plane logged so far, one JSON line per entry. */
  logged(): string;
  client(token: string): BerthClient;
  /** Moves the plane's clock. */
  advance(ms: number): void;
  /** Another user of the organization, with a token. */
  addUser(options?: {
    role?: OrganizationRole;
    name?: string;
    readOnlyToken?: boolean;
    organizationId?: string;
  }): Promise<TestUser>;
  /** A second replica on the same database. */
  replica(): Promise<ControlPlane>;
}

export interface TestUser {
  id: string;
  token: string;
  client: BerthClient;
}

/** Starts a control plane on a fresh database; `env` are BERTH_* variables on top of the defaults for tests. */
export async function startTestPlane(
  env: Record<string, string> = {},
  limits: Partial<Limits> = {},
): Promise<TestPlane> {
  const cluster = inject("postgresUrl");
  const name = `t_${randomBytes(8).toString("hex")}`;
  const maintenance = openDb(cluster);
  await maintenance.write.unsafe(`create database ${name} template berth_template`);
  const url = databaseUrl(cluster, name);
  const dataDir = await mkdtemp(join(tmpdir(), "berth-plane-"));
  const adminToken = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  const lines: string[] = [];
  const log = pino({ level: "debug" }, { write: (line: string) => void lines.push(line) });
  const settings = {
    BERTH_PORT: "0",
    BERTH_RUNNER: "off",
    BERTH_RATE_LIMIT: "0",
    BERTH_DATA_DIR: dataDir,
    BERTH_BOOTSTRAP_ADMIN_TOKEN: adminToken,
    DATABASE_URL: url,
    ...env,
  };
  let offset = 0;
  const now = () => new Date(Date.now() + offset);
  const planes: ControlPlane[] = [];
  const start = async () => {
    const plane = await startControlPlane(readServerConfig(settings), log, { now, limits });
    planes.push(plane);
    return plane;
  };
  const cleanUp = async () => {
    await Promise.all(planes.map((each) => each.stop()));
    await maintenance.write.unsafe(`drop database ${name} with (force)`);
    await maintenance.close();
    await rm(dataDir, { recursive: true, force: true });
  };
  const plane = await start().catch(async (error: unknown) => {
    await cleanUp();
    throw error;
  });
  const client = (token: string) => createBerthClient({ baseUrl: plane.server.url, token });
  const admin = client(adminToken);
  const { organizationId } = await admin.identity.getAuthenticatedIdentity({});
  const { db } = plane.app;

  const addUser: TestPlane["addUser"] = async (options = {}) => {
    const [id, accountId] = [uuidv7(), uuidv7()];
    const organization = options.organizationId ?? organizationId;
    const role = options.role ?? OrganizationRole.MEMBER;
    const at = now();
    await db.write`insert into accounts (id, email, email_verified, name, login_provider, created_at)
      values (${accountId}, ${`${id}@example.org`}, true, ${options.name ?? "Somebody"}, 'local', ${at})`;
    await db.write`insert into users (id, organization_id, account_id, role, status, member_since)
      values (${id}, ${organization}, ${accountId}, ${role}, ${UserStatus.ACTIVE}, ${at})`;
    await db.begin((tx) =>
      syncBuiltInGroups(tx, { organizationId: organization, memberId: id }, { newId: uuidv7, at }),
    );
    const token = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
    await insertToken(db.write, {
      id: uuidv7(),
      text: token,
      kind: TokenKind.PERSONAL_ACCESS,
      organizationId: organization,
      subjectId: id,
      subjectPrincipal: Principal.USER,
      createdAt: at,
      readOnly: options.readOnlyToken,
    });
    return { id, token, client: client(token) };
  };

  return {
    plane,
    url: plane.server.url,
    databaseUrl: url,
    dataDir,
    adminToken,
    admin,
    organizationId,
    exchangeToken: plane.runnerExchangeToken,
    logged: () => lines.join(""),
    client,
    advance(ms) {
      offset += ms;
    },
    addUser,
    replica: start,
    [Symbol.asyncDispose]: cleanUp,
  };
}

/** Gives everybody in the organization the role USER on a runner, as sharing with `org-members` does. */
export async function shareRunner(test: TestPlane, runnerId: string, role = ResourceRole.RUNNER_USER): Promise<void> {
  await test.plane.app.db.write`
    insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
    select ${uuidv7()}::uuid, organization_id, id, ${ResourceType.RUNNER}, ${runnerId}, ${role}, now() from groups
    where organization_id = ${test.organizationId} and name = ${MEMBERS_GROUP}`;
}

/** Lifts the limits on how many environments a user may have and run. */
export async function liftQuotas({ admin, organizationId }: TestPlane): Promise<void> {
  const lifted = { maximumEnvironmentsPerUser: 0n, maximumRunningEnvironmentsPerUser: 0n };
  await admin.organizations.updateOrganizationPolicies({ organizationId, ...lifted });
}
