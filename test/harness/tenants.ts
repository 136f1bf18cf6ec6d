import { randomBytes } from "node:crypto";
import type { MessageShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromMs } from "@bufbuild/protobuf/wkt";
import { v7 as uuidv7 } from "uuid";
import type { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { OrganizationPoliciesSchema } from "../../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { BerthClient } from "../../src/client.ts";
import { SYSTEM } from "../../src/domain/principal.ts";
import { tokenText } from "../../src/domain/tokens.ts";
import { insertOrganization } from "../../src/store/organizations.ts";
import { insertToken, type NewToken } from "../../src/store/tokens.ts";
import { FakeRunner } from "./fake-runner.ts";
import { shareRunner, type TestPlane, type TestUser } from "./plane.ts";

const YEAR_MS = 365 * 24 * 60 * 60_000;

// What organizations consist of, written to the database where the API for it does not exist yet.

type Policies = Omit<MessageShape<typeof OrganizationPoliciesSchema>, "$typeName" | "$unknown">;

/** What is empty says in an update that it stays: these say that it is to be empty. */
const CLEARED = {
  allowedEditorIds: [""],
  editorVersionRestrictions: { "": {} },
  securityAgentPolicy: { crowdstrike: { enabled: false } },
  vetoExecPolicy: {},
  vetoFilePolicy: {},
};

/** Changes some of the policies of the organization, to exactly these values. */
export async function changePolicies(
  { admin, organizationId }: TestPlane,
  changes: Partial<Omit<Policies, "agentPolicy">>,
): Promise<void> {
  const isEmpty = (value: unknown) =>
    value === undefined || (typeof value === "object" && !Object.keys(value ?? {}).length);
  const sent = Object.entries(changes).map(([name, value]) => {
    const cleared = CLEARED[name as keyof typeof CLEARED];
    return [name, cleared && isEmpty(value) ? cleared : value];
  });
  await admin.organizations.updateOrganizationPolicies({ organizationId, ...Object.fromEntries(sent) });
}

/** Another organization on the same installation, without users; its id. */
export async function addOrganization({ plane: { app } }: TestPlane): Promise<string> {
  const id = uuidv7();
  await app.db.write.begin((tx) =>
    insertOrganization(tx, {
      ...{ id, name: "Another", creatorId: uuidv7(), at: app.now() },
      actor: SYSTEM,
      newId: uuidv7,
    }),
  );
  return id;
}

/** A token as if it had been issued, of any kind; its text. */
export async function mint(
  { plane: { app }, organizationId }: TestPlane,
  token: Pick<NewToken, "kind" | "subjectId"> & Partial<NewToken>,
): Promise<string> {
  const text = tokenText(token.kind, randomBytes);
  await insertToken(app.db.write, {
    ...{ id: uuidv7(), text, organizationId, subjectPrincipal: Principal.USER, createdAt: app.now() },
    ...token,
  });
  return text;
}

/** What only an access token of a service account may do, as its administrator has one issued; a client with it. */
export async function actAsServiceAccount(
  test: TestPlane,
  serviceAccountId: string,
  by = test.admin,
): Promise<BerthClient> {
  const { token } = await by.serviceAccounts.createServiceAccountAccessToken({ serviceAccountId });
  return test.client(token);
}

/** A service account with a token, member of `org-members`. */
export async function addServiceAccount(test: TestPlane, name = "Robot"): Promise<TestUser> {
  const validUntil = timestampFromMs(test.plane.app.now().getTime() + 10 * YEAR_MS);
  const { serviceAccount } = await test.admin.serviceAccounts.createServiceAccount({ name, validUntil });
  const { id = "" } = serviceAccount ?? {};
  const access = await actAsServiceAccount(test, id);
  const validFor = durationFromMs(9 * YEAR_MS);
  const { token } = await access.serviceAccounts.createServiceAccountToken({ validFor });
  return { id, token, client: test.client(token) };
}

/** Gives one user a role on a resource, as a direct share does; returns how to take it away. */
export async function share(
  { plane: { app }, organizationId }: TestPlane,
  userId: string,
  resource: { type: ResourceType; id: string; role: ResourceRole },
): Promise<() => Promise<void>> {
  const id = uuidv7();
  await app.db.write`
    with made as (
      insert into groups (id, organization_id, name, direct_share, direct_share_of, created_at, updated_at)
      values (${uuidv7()}, ${organizationId}, ${`direct-share-${userId}`}, true, ${userId}, now(), now())
      on conflict do nothing returning id
    )
    insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
    select ${uuidv7()}::uuid, id, ${organizationId}, ${userId}, ${Principal.USER}, now() from made`;
  await app.db.write`
    insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
    select ${id}::uuid, organization_id, id, ${resource.type}, ${resource.id}, ${resource.role}, now() from groups
    where direct_share_of = ${userId}`;
  return async () => void (await app.db.write`delete from role_assignments where id = ${id}`);
}

/** Takes away what `shareRunner` gave. */
export async function unshareRunner({ plane: { app } }: TestPlane, runnerId: string): Promise<void> {
  await app.db.write`delete from role_assignments
    where resource_id = ${runnerId} and resource_role = ${ResourceRole.RUNNER_USER}`;
}

/** A registered runner with an enabled class, shared with all members unless told otherwise. */
export async function connectRunner(
  test: TestPlane,
  options: { maxEnvironments?: number; shared?: boolean } = {},
): Promise<{ runner: FakeRunner; classId: string }> {
  const { admin } = test;
  const created = await admin.runners.createRunner({ name: "test runner", provider: RunnerProvider.LINUX_HOST });
  const { accessToken } = await admin.identity.exchangeToken({ exchangeToken: created.exchangeToken });
  const runner = new FakeRunner(test.url, accessToken);
  await runner.register({ maxEnvironments: options.maxEnvironments });
  if (options.shared ?? true) await shareRunner(test, runner.id);
  return { runner, classId: await addClass(test, runner.id) };
}

/** Another enabled class on a runner; its id. */
export async function addClass({ admin }: TestPlane, runnerId: string): Promise<string> {
  const { id } = await admin.runnerConfiguration.createEnvironmentClass({
    ...{ runnerId, displayName: "Standard", description: "For tests" },
    configuration: [
      { key: "cpu", value: "2" },
      { key: "memory", value: "4096" },
    ],
  });
  return id;
}

/** A project of a repository that nobody will clone; its id. */
export async function addProject(client: BerthClient, name = "Project"): Promise<string> {
  const remote = { case: "git" as const, value: { remoteUri: "https://git.example.org/a/b.git" } };
  const { project } = await client.projects.createProject({ name, initializer: { specs: [{ spec: remote }] } });
  return project?.id ?? "";
}
