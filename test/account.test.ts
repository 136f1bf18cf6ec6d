import { timestampMs } from "@bufbuild/protobuf/wkt";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole, OrganizationTier } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { emailDomain, isPublicEmailDomain } from "../src/domain/email-domains.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { auditActions } from "./harness/audit.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, mint } from "./harness/tenants.ts";

const { ADMIN, MEMBER } = OrganizationRole;

let plane: TestPlane;

const provider = (id: string) => ({ id, issuer: "https://login.example.org", client_id: "berth", client_secret: "x" });

beforeAll(async () => {
  plane = await startTestPlane({
    BERTH_PUBLIC_EMAIL_DOMAINS: "free.example.org",
    BERTH_OIDC_PROVIDERS: JSON.stringify([provider("work"), provider("github")]),
  });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const db = () => plane.plane.app.db;

/** A client that a browser's login speaks for. */
function withCookie(session: string): BerthClient {
  return createBerthClient({
    baseUrl: plane.url,
    interceptors: [
      (next) => (request) => {
        request.header.set("cookie", `berth_session=${session}`);
        request.header.set("sec-fetch-site", "same-origin");
        return next(request);
      },
    ],
  });
}

interface Person extends TestUser {
  accountId: string;
  /** Signed in, with no organization chosen. */
  account: BerthClient;
}

async function addPerson(options: { email?: string; verified?: boolean } = {}): Promise<Person> {
  const user = await plane.addUser({ name: "Ada" });
  const [row] = await db().write<{ id: string }[]>`
    update accounts set email = coalesce(${options.email ?? null}, email), email_verified = ${options.verified ?? true}
    where id = (select account_id from users where id = ${user.id}) returning id`;
  const accountId = row?.id ?? "";
  const kind = TokenKind.SESSION;
  const subjectPrincipal = Principal.ACCOUNT;
  const session = await mint(plane, { kind, subjectId: accountId, subjectPrincipal, organizationId: undefined });
  return { ...user, accountId, account: withCookie(session) };
}

/** Makes an account a user of another organization, too; the id of that user. */
async function join(
  accountId: string,
  organizationId: string,
  status: UserStatus = UserStatus.ACTIVE,
): Promise<string> {
  const id = uuidv7();
  await db().write`insert into users (id, organization_id, account_id, role, status, member_since)
    values (${id}, ${organizationId}, ${accountId}, ${ADMIN}, ${status}, now())`;
  return id;
}

describe("GetAccount", () => {
  test("shows the account behind a user or a login, with where it is a member and as what", async () => {
    const person = await addPerson();
    const other = await addOrganization(plane);
    const third = await addOrganization(plane);
    const otherUser = await join(person.accountId, other);
    await join(person.accountId, third, UserStatus.LEFT);
    const { account } = await person.account.accounts.getAccount({});
    expect(account).toMatchObject({
      ...{ id: person.accountId, name: "Ada", email: `${person.id}@example.org`, joinables: [], avatarUrl: "" },
      publicEmailProvider: false,
    });
    expect(account?.organizationId).toBeUndefined();
    const [row] = await db().point<{ count: number }[]>`
      select count(*)::int from users where organization_id = ${plane.organizationId} and status = ${UserStatus.ACTIVE}`;
    const organizationTier = OrganizationTier.ENTERPRISE;
    expect(account?.memberships).toMatchObject([
      {
        ...{ userId: person.id, userRole: MEMBER, organizationId: plane.organizationId, organizationTier },
        ...{ organizationName: "Default", organizationMemberCount: row?.count },
      },
      { userId: otherUser, userRole: ADMIN, organizationId: other, organizationMemberCount: 1, organizationTier },
    ]);
    expect((await person.client.accounts.getAccount({})).account).toEqual(account);
    expect(await codeOf((await addServiceAccount(plane)).client.accounts.getAccount({}))).toBe("PermissionDenied");
  });

  test("knows whose mail addresses say nothing about them, and which organization owns the account", async () => {
    for (const domain of ["gmail.com", "GMX.de", "free.example.org"]) {
      const person = await addPerson({ email: `${uuidv7()}@${domain}`.toLowerCase() });
      expect((await person.account.accounts.getAccount({})).account?.publicEmailProvider).toBe(true);
    }
    const owned = await addPerson();
    await db().write`update accounts set owner_organization_id = ${plane.organizationId} where id = ${owned.accountId}`;
    const { account } = await owned.client.accounts.getAccount({});
    expect(account).toMatchObject({ organizationId: plane.organizationId, publicEmailProvider: false });
    expect(timestampMs(account!.updatedAt!)).toBeGreaterThanOrEqual(timestampMs(account!.createdAt!));
  });

  test("domains are compared as a whole", () => {
    expect(["a@b@Example.org", "nobody", "a@"].map(emailDomain)).toEqual(["example.org", "", ""]);
    expect(
      ["gmail.com", "Gmail.com", "mail.gmail.com", "notgmail.com", ""].map((each) => isPublicEmailDomain(each, [])),
    ).toEqual([...[true, true, false, false, false]]);
  });
});

describe("a login without an organization", () => {
  test("reads the organizations in which it is an active member, and nothing else", async () => {
    const person = await addPerson();
    const { organizationId } = plane;
    const { organizations } = person.account;
    expect((await organizations.getOrganization({ organizationId })).organization?.name).toBe("Default");
    const { members } = await organizations.listMembers({ organizationId });
    expect(members[0]?.userId).toBe(person.id);
    const foreign = await addOrganization(plane);
    expect(await codeOf(organizations.getOrganization({ organizationId: foreign }))).toBe("NotFound");
    expect(await codeOf(organizations.listMembers({ organizationId: foreign }))).toBe("NotFound");
    expect(await codeOf(person.account.users.getUser({ userId: person.id }))).toBe("PermissionDenied");
    expect(await codeOf(organizations.getOrganizationPolicies({ organizationId }))).toBe("PermissionDenied");
    await plane.admin.users.setSuspended({ userId: person.id, suspended: true });
    expect(await codeOf(organizations.getOrganization({ organizationId }))).toBe("NotFound");
    expect((await person.account.accounts.getAccount({})).account?.memberships).toEqual([]);
  });

  test("leaves with one of its own users, not with those of others", async () => {
    const [person, other] = [await addPerson(), await addPerson()];
    const { organizations } = person.account;
    expect(await codeOf(organizations.leaveOrganization({ userId: other.id }))).toBe("NotFound");
    await organizations.leaveOrganization({ userId: person.id });
    expect((await plane.admin.users.getUser({ userId: person.id })).user?.status).toBe(UserStatus.LEFT);
    // The account outlives it.
    expect((await person.account.accounts.getAccount({})).account?.id).toBe(person.accountId);
  });
});

describe("DeleteAccount", () => {
  const remove = (client: BerthClient, accountId: string, reason?: string) =>
    client.accounts.deleteAccount({ accountId, reason });

  test("is refused while the account is an active member anywhere, and for the account of somebody else", async () => {
    const [person, other] = [await addPerson(), await addPerson()];
    for (const client of [person.account, person.client])
      expect(await codeOf(remove(client, person.accountId))).toBe("FailedPrecondition");
    for (const id of [other.accountId, uuidv7()]) expect(await codeOf(remove(person.account, id))).toBe("NotFound");
    expect((await person.account.accounts.getAccount({})).account?.memberships).toHaveLength(1);
  });

  test("takes the logins and everything about the person along, and leaves what others need to understand", async () => {
    const person = await addPerson();
    const other = await addOrganization(plane);
    await join(person.accountId, other, UserStatus.SUSPENDED);
    await person.account.organizations.leaveOrganization({ userId: person.id });
    await remove(person.account, person.accountId, " I have had enough ");
    expect(await codeOf(person.account.accounts.getAccount({}))).toBe("Unauthenticated");
    const { user } = await plane.admin.users.getUser({ userId: person.id });
    expect(user).toMatchObject({ name: "Deleted user", status: UserStatus.LEFT, avatarUrl: "" });
    expect(user?.email).toBe(`${person.id}@deleted.invalid`);
    const rows = await db().point<{ organization_id: string }[]>`
      select organization_id from audit_log where subject_id = ${person.accountId}`;
    expect(new Set(rows.map((row) => row.organization_id))).toEqual(new Set([plane.organizationId, other]));
    expect(await auditActions(plane, person.accountId)).toEqual(Array(2).fill("Account deleted: I have had enough"));
    const left = await db().point`
      select from users where account_id = ${person.accountId} or (organization_id = ${other} and status <> ${UserStatus.LEFT})`;
    expect(left).toHaveLength(0);
  });
});

test("an account that never was anywhere leaves an entry in the log of the installation", async () => {
  const accountId = uuidv7();
  await db().write`insert into accounts (id, email, email_verified, name, login_provider, created_at)
    values (${accountId}, ${`${accountId}@example.org`}, true, 'Nobody', 'local', now())`;
  const subject = { subjectId: accountId, subjectPrincipal: Principal.ACCOUNT, organizationId: undefined };
  const account = withCookie(await mint(plane, { kind: TokenKind.SESSION, ...subject }));
  await account.accounts.deleteAccount({ accountId });
  expect(await auditActions(plane, accountId)).toEqual(["Account deleted"]);
  expect(await codeOf(account.accounts.getAccount({}))).toBe("Unauthenticated");
});

describe("ListJoinableOrganizations", () => {
  const list = async (client: BerthClient, pagination = {}) =>
    client.accounts.listJoinableOrganizations({ pagination });
  const invite = (organizationId: string, domains: string[]) =>
    db().write`update organizations set invite_domains = ${domains} where id = ${organizationId}`;

  test("are those that invite exactly the domain of the verified address, newest first, page by page", async () => {
    const domain = `${uuidv7()}.test`;
    const [first, second] = [await addOrganization(plane), await addOrganization(plane)];
    await invite(first, ["example.com", domain]);
    await invite(second, [domain]);
    const person = await addPerson({ email: `a@${domain}` });
    const { joinableOrganizations } = await list(person.account);
    expect(joinableOrganizations).toMatchObject([
      { organizationId: second, organizationName: "Another", organizationMemberCount: 0 },
      { organizationId: first },
    ]);
    expect((await list(person.client)).joinableOrganizations).toEqual(joinableOrganizations);
    const page = await list(person.account, { pageSize: 1 });
    expect(page.joinableOrganizations).toHaveLength(1);
    const rest = await list(person.account, { pageSize: 1, token: page.pagination?.nextToken });
    expect(rest.joinableOrganizations).toMatchObject([{ organizationId: first }]);
    expect(rest.pagination?.nextToken).toBe("");

    for (const stranger of [
      await addPerson({ email: `a@sub.${domain}` }),
      await addPerson({ email: `b@${domain}`, verified: false }),
      await addPerson(),
    ])
      expect((await list(stranger.account)).joinableOrganizations).toEqual([]);
  });

  test("are none that the account is in, or is kept out of; but those that it has left", async () => {
    const domain = `${uuidv7()}.test`;
    const person = await addPerson({ email: `a@${domain}` });
    const organizations = await Promise.all(Array.from({ length: 4 }, () => addOrganization(plane)));
    for (const organizationId of organizations) await invite(organizationId, [domain]);
    const [active = "", suspended = "", left = "", fresh = ""] = organizations;
    await join(person.accountId, active);
    await join(person.accountId, suspended, UserStatus.SUSPENDED);
    await join(person.accountId, left, UserStatus.LEFT);
    const found = (await list(person.account)).joinableOrganizations.map(({ organizationId }) => organizationId);
    expect(new Set(found)).toEqual(new Set([left, fresh]));
    await db().write`update accounts set owner_organization_id = ${active} where id = ${person.accountId}`;
    expect((await list(person.account)).joinableOrganizations).toEqual([]);
  });
});

describe("ways to sign in", () => {
  const nobody = () => createBerthClient({ baseUrl: plane.url }).accounts;

  test("no domain has a login of its own; nobody learns whether somebody exists", async () => {
    const person = await addPerson();
    for (const email of [`${person.id}@example.org`, "nobody@example.org"]) {
      expect(await codeOf(nobody().getSSOLoginURL({ email }))).toBe("NotFound");
      expect(await nobody().listSSOLogins({ email })).toMatchObject({ logins: [], pagination: { nextToken: "" } });
    }
    expect(await codeOf(nobody().getSSOLoginURL({ email: "nobody" }))).toBe("InvalidArgument");
    expect(await codeOf(nobody().listSSOLogins({ email: "a@b.test", pagination: { token: "x" } }))).toBe(
      "InvalidArgument",
    );
  });
});

test("the operator's providers are offered in the operator's order, to whoever asks", async () => {
  const { accounts } = createBerthClient({ baseUrl: plane.url });
  const loginUrl = (id: string) => `${plane.plane.app.config.publicUrl}/auth/oidc/start?provider=${id}`;
  const all = ["work", "github"].map((id) => ({ provider: id, loginUrl: loginUrl(id) }));
  expect(await accounts.listLoginProviders({})).toMatchObject({ loginProviders: all, allowCustom: false });
  const filter = { email: "somebody@example.org" };
  expect((await accounts.listLoginProviders({ filter })).allowCustom).toBe(false);
  const { loginProviders, pagination } = await accounts.listLoginProviders({ pagination: { pageSize: 1 } });
  expect(loginProviders).toMatchObject(all.slice(0, 1));
  const token = pagination?.nextToken ?? "";
  const rest = await accounts.listLoginProviders({ pagination: { pageSize: 1, token } });
  expect(rest).toMatchObject({ loginProviders: all.slice(1), pagination: { nextToken: "" } });
  expect(await codeOf(accounts.listLoginProviders({ filter: { inviteId: uuidv7() } }))).toBe("NotFound");
  expect(await codeOf(accounts.listLoginProviders({ filter, pagination: { token } }))).toBe("InvalidArgument");
});

test("PLT-47 what is outside of the contract is UNIMPLEMENTED, with and without a credential", async () => {
  const outside = [
    ...["AccountService/BlockAccount", "AccountService/UnblockAccount", "InsightsService/GetInsights"],
    ...["TeamService/ListTeams", "WebhookService/CreateWebhook", "BillingService/GetBilling"],
    ...["PrebuildService/CreatePrebuild", "OrganizationService/SetStripeCustomerID"],
  ];
  for (const rpc of outside) {
    for (const authorization of [undefined, `Bearer ${plane.adminToken}`, "Bearer nonsense"]) {
      const response = await fetch(`${plane.url}/gitpod.v1.${rpc}`, {
        method: "POST",
        headers: { "content-type": "application/json", ...(authorization && { authorization }) },
        body: "{}",
      });
      expect([rpc, response.status, ((await response.json()) as { code: string }).code]).toEqual([
        ...[rpc, 501, "unimplemented"],
      ]);
    }
  }
});
