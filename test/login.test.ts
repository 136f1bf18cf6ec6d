import { decodeJwt } from "jose";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { TokenKind } from "../src/domain/tokens.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { Browser, type Page } from "./harness/browser.ts";
import { freePort } from "./harness/free-port.ts";
import { type Behaviour, OidcProvider } from "./harness/oidc-provider.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { addOrganization } from "./harness/tenants.ts";

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const ADMIN = "admin@example.org";

let provider: OidcProvider;
let plane: TestPlane;

beforeAll(async () => {
  provider = await OidcProvider.start();
  plane = await startLoginPlane({ BERTH_RETURN_TO_ORIGINS: "https://dash.example.org" });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain("was not served");
  expect(plane.logged()).not.toContain(provider.client.secret);
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
  await provider[Symbol.asyncDispose]();
});

/** A control plane whose public URL is where it listens, with the provider of this test. */
async function startLoginPlane(env: Record<string, string> = {}): Promise<TestPlane> {
  return startTestPlane({
    BERTH_PORT: String(await freePort()),
    BERTH_OIDC_PROVIDERS: JSON.stringify([provider.config()]),
    BERTH_LOOPBACK_ISSUERS: "on",
    BERTH_BOOTSTRAP_ADMIN_EMAIL: ADMIN,
    BERTH_BOOTSTRAP_ADMIN_NAME: "",
    ...env,
  });
}

const db = () => plane.plane.app.db;
const newPerson = () => {
  const sub = uuidv7();
  return { sub, email: `${sub}@example.org`, name: "Jo Doe" };
};
type Claims = { sub: string; email: string; [claim: string]: unknown };

const startUrl = (query: Record<string, string> = {}) => `${plane.url}/auth/oidc/start?${new URLSearchParams(query)}`;

/** Signs somebody in with a browser. */
async function signIn(
  claims: Claims,
  {
    browser = new Browser(),
    changes = {},
    query = {},
  }: { browser?: Browser; changes?: Partial<Behaviour>; query?: Record<string, string> } = {},
): Promise<{ browser: Browser; page: Page }> {
  provider.signsIn(claims, changes);
  return { browser, page: await browser.visit(startUrl(query)) };
}

const sessionOf = (browser: Browser) => browser.cookie(plane.url, "berth_session");

/** Who the API says that a browser is; the status of the answer if it is nobody. */
async function identityOf(
  browser: Browser,
): Promise<{ id: string; principal: string; organizationId: string } | number> {
  const page = await browser.send(`${plane.url}/api/gitpod.v1.IdentityService/GetAuthenticatedIdentity`, {});
  if (page.status !== 200) return page.status;
  const { subject, organizationId = "" } = JSON.parse(page.text);
  return { ...subject, organizationId };
}

async function accountOf(email: string) {
  const [row] = await db().point<{ id: string; name: string; avatar_url: string; login_provider: string }[]>`
    select id, name, avatar_url, login_provider from accounts where email = ${email}`;
  return row;
}

/** Makes whoever has an account a member of an organization; the id of the user. */
async function join(email: string, organizationId = plane.organizationId): Promise<string> {
  const id = uuidv7();
  await db().write`insert into users (id, organization_id, account_id, role, status, member_since)
    select ${id}, ${organizationId}, id, ${OrganizationRole.MEMBER}, ${UserStatus.ACTIVE}, now() from accounts where email = ${email}`;
  return id;
}

const entriesOf = (userId: string) =>
  db().point<{ action: string }[]>`select action, actor_id, credential_id is not null as "hasCredential" from audit_log
    where subject_id = ${userId} and action like 'Signed%' order by id`;

describe("signing in", () => {
  test("goes to the provider with state, nonce and S256, and comes back as the user with that address", async () => {
    const seen = provider.authorizations.length;
    const { browser, page } = await signIn({ sub: "admin", email: "ADMIN@example.org" });
    expect(page.redirects.map((url) => url.split("?")[0])).toEqual([
      `${provider.issuer}/authorize`,
      `${plane.url}/auth/oidc/callback`,
      `${plane.url}/`,
    ]);
    const [asked] = provider.authorizations.slice(seen);
    expect(asked).toMatchObject({
      ...{ clientId: "berth", redirectUri: `${plane.url}/auth/oidc/callback`, method: "S256" },
      scope: "openid email profile",
    });
    for (const text of [asked?.state, asked?.nonce, asked?.codeChallenge]) expect(text).toMatch(/^[\w-]{43}$/);
    expect(new Set([asked?.state, asked?.nonce, asked?.codeChallenge]).size).toBe(3);
    const identity = await identityOf(browser);
    expect(identity).toMatchObject({ principal: "PRINCIPAL_USER", organizationId: plane.organizationId });
    const { user } = await plane.admin.users.getAuthenticatedUser({});
    expect(identity).toMatchObject({ id: user?.id });
    expect(await entriesOf(user?.id ?? "")).toMatchObject([
      { action: "Signed in with Test & Co", actor_id: user?.id, hasCredential: true },
    ]);
  });

  test("sets a cookie that scripts and other sites cannot get at, for as long as the login lasts", async () => {
    const { browser } = await signIn(newPerson());
    const [flow, session] = browser.setCookies;
    expect(flow).toMatch(/^berth_oidc=[\w-]{43}; Path=\/; Max-Age=600; HttpOnly; SameSite=Lax$/);
    expect(session).toMatch(/^berth_session=berth_ses_\w{49}; Path=\/; Max-Age=604800; HttpOnly; SameSite=Lax$/);
    const secure = await startTestPlane({
      ...{ BERTH_PUBLIC_URL: "https://berth.example.org", BERTH_LOOPBACK_ISSUERS: "on" },
      BERTH_OIDC_PROVIDERS: JSON.stringify([provider.config()]),
    });
    const start = await fetch(`${secure.url}/auth/oidc/start`, { redirect: "manual" });
    expect(start.headers.get("set-cookie")).toMatch(
      /^__Host-berth_oidc=[\w-]{43}; Path=\/; .*HttpOnly; SameSite=Lax; Secure$/,
    );
    await secure[Symbol.asyncDispose]();
  });

  test("makes an account for somebody new, which the provider describes, and the next login finds", async () => {
    const person = newPerson();
    const { browser } = await signIn({ ...person, name: "  Jo Doe ", picture: "https://img.example.org/jo.png" });
    const account = await accountOf(person.email);
    expect(account).toMatchObject({
      name: "Jo Doe",
      avatar_url: "https://img.example.org/jo.png",
      login_provider: "test",
    });
    expect(await identityOf(browser)).toEqual({ id: account?.id, principal: "PRINCIPAL_ACCOUNT", organizationId: "" });
    const changed = { ...person, email: `new-${person.email}`, name: "Jo Roe", picture: "javascript:alert(1)" };
    await signIn(changed);
    expect(await accountOf(person.email)).toBeUndefined();
    expect(await accountOf(changed.email)).toMatchObject({ id: account?.id, name: "Jo Roe", avatar_url: "" });
  });

  test("keeps the address of an account that somebody else has, and the name that the operator gave", async () => {
    const [first, second] = [newPerson(), newPerson()];
    await signIn(first);
    await signIn(second);
    await signIn({ ...second, email: first.email });
    expect([(await accountOf(first.email))?.name, (await accountOf(second.email))?.name]).toEqual(["Jo Doe", "Jo Doe"]);
    const { id } = await plane.addUser({ name: "Given Name" });
    await signIn({ sub: id, email: `${id}@example.org`, name: "Other Name" });
    expect(await accountOf(`${id}@example.org`)).toMatchObject({ name: "Given Name", login_provider: "local" });
  });

  test("of the same person in two tabs at once makes one account", async () => {
    const person = newPerson();
    provider.signsIn(person);
    const browser = new Browser();
    await browser.visit(startUrl(), { stopAt: () => true });
    const pages = await Promise.all([1, 2, 3].map(() => browser.visit(startUrl())));
    expect(pages.map(({ status }) => status)).toEqual([200, 200, 200]);
    const rows = await db().point`select from accounts where email = ${person.email}`;
    const identities = await db().point`select from account_identities where subject = ${person.sub}`;
    expect([rows.length, identities.length]).toEqual([1, 1]);
  });

  test("takes what is missing from userinfo, beneath the ID token's own claims", async () => {
    const { sub, email } = newPerson();
    await signIn({ sub } as Claims, { changes: { userinfo: { email, name: "From userinfo", sub } } });
    expect(await accountOf(email)).toMatchObject({ name: "From userinfo" });
    const foreign = newPerson();
    const { page } = await signIn({ sub: foreign.sub } as Claims, {
      changes: { userinfo: { email: foreign.email, sub: "x" } },
    });
    expect([page.status, await accountOf(foreign.email)]).toEqual([403, undefined]);
  });

  test("shows its secret in the header, or in the body where a provider only takes that", async () => {
    await signIn(newPerson());
    expect(new Set(provider.authentications)).toEqual(new Set(["client_secret_basic"]));
    await using other = await OidcProvider.start(["client_secret_post"]);
    const person = newPerson();
    other.signsIn(person);
    await using own = await startLoginPlane({ BERTH_OIDC_PROVIDERS: JSON.stringify([other.config("other")]) });
    expect((await new Browser().visit(`${own.url}/auth/oidc/start`)).status).toBe(200);
    expect(other.authentications).toEqual(["client_secret_post"]);
    const rows = await own.plane.app.db.point`select from accounts where email = ${person.email}`;
    expect(rows).toHaveLength(1);
  });

  test("is what ID tokens say of somebody afterwards", async () => {
    const { id, client } = await plane.addUser();
    await signIn({ sub: id, email: `${id}@example.org`, groups: ["dev"], acr: "x" });
    const { token } = await client.identity.getIDToken({ audience: ["a"] });
    expect(decodeJwt(token)).toMatchObject({
      idp: provider.issuer,
      idp_claims: { sub: id, email: `${id}@example.org`, email_verified: true, groups: ["dev"] },
    });
    expect(Object.keys(decodeJwt(token).idp_claims as object)).not.toContain("acr");
  });
});

describe("ORG-36 what is not as it should be signs nobody in", () => {
  const refused: [string, Partial<Behaviour>, object?][] = [
    ["an HS256 token", { algorithm: "HS256" }],
    ["an unsigned token", { algorithm: "none" }],
    ["a token signed with another key", { foreignKey: true }],
    ["another nonce", { token: { nonce: "x" } }],
    ["no nonce", { token: { nonce: undefined } }],
    ["an expired token", { token: { exp: Math.floor(Date.now() / 1000) - 61 } }],
    ["a token of the future", { token: { nbf: Math.floor(Date.now() / 1000) + 300 } }],
    ["another audience", { token: { aud: "other" } }],
    ["several audiences without saying which", { token: { aud: ["berth", "other"] } }],
    ["another issuer", { token: { iss: "http://127.0.0.1:1" } }],
    ["no verified address", {}, { email_verified: false }],
    ["an address of which nobody says whether it is verified", {}, { email_verified: undefined }],
    ["an address that says 'true'", {}, { email_verified: "true" }],
    ["no address", {}, { email: undefined }],
    ["an address that is none", {}, { email: "a b@example.org" }],
    ["no subject", {}, { sub: undefined }],
    ["an error of the provider", { error: "access_denied" }],
  ];

  test.each(refused)("%s", async (_what, changes, claims) => {
    const person = newPerson();
    const { browser, page } = await signIn({ ...person, ...claims }, { changes });
    expect(page.status).toBe(403);
    expect(page.headers.get("content-type")).toContain("text/html");
    expect([await accountOf(person.email), sessionOf(browser), await identityOf(browser)]).toEqual([
      undefined,
      undefined,
      401,
    ]);
  });

  test("a provider that goes away in between, which is worth another try", async () => {
    const browser = new Browser();
    provider.signsIn(newPerson());
    const { redirects } = await browser.visit(startUrl(), { stopAt: (url) => url.includes("/auth/oidc/callback") });
    provider.behaviour.down = 500;
    const page = await browser.visit(redirects.at(-1) ?? "");
    expect([page.status, page.text.includes("later")]).toEqual([503, true]);
  });

  /** A browser that has been at the provider, and where it is sent from there. */
  async function atCallback(person = newPerson()) {
    const browser = new Browser();
    provider.signsIn(person);
    const { redirects } = await browser.visit(startUrl(), { stopAt: (url) => url.includes("/auth/oidc/callback") });
    return { person, browser, callback: redirects.at(-1) ?? "" };
  }

  test("a callback that is opened twice, or in another browser, or with another state", async () => {
    const { browser, callback, person } = await atCallback();
    expect((await new Browser().visit(callback)).status).toBe(400);
    const stranger = new Browser();
    await stranger.visit(startUrl(), { stopAt: () => true });
    expect((await stranger.visit(callback)).status).toBe(400);
    const other = new URL(callback);
    other.searchParams.set("state", "x".repeat(43));
    expect((await browser.visit(other.href)).status).toBe(400);
    expect(await accountOf(person.email)).toBeUndefined();
    expect((await browser.visit(callback)).status).toBe(200);
    expect((await browser.visit(callback)).status).toBe(400);
  });

  test("a callback from another issuer", async () => {
    const { browser, callback, person } = await atCallback();
    const other = new URL(callback);
    other.searchParams.set("iss", "https://evil.example.org");
    expect((await browser.visit(other.href)).status).toBe(403);
    expect(await accountOf(person.email)).toBeUndefined();
  });

  test("a callback after ten minutes; what was remembered of it is removed", async () => {
    const { browser, callback, person } = await atCallback();
    plane.advance(10 * MINUTE_MS);
    expect((await browser.visit(callback)).status).toBe(400);
    expect(await accountOf(person.email)).toBeUndefined();
    await sweeps.find(({ name }) => name === "abandoned logins")?.run(plane.plane.app);
    expect(await db().point`select from login_flows`).toHaveLength(0);
  });
});

describe("where one comes back to", () => {
  test.each([
    ["/auth/cli?x=1", (url: string) => `${url}/auth/cli?x=1`],
    ["https://dash.example.org/a?b", () => "https://dash.example.org/a?b"],
    ["https://evil.example.org/", (url: string) => `${url}/`],
    ["//evil.example.org/", (url: string) => `${url}/`],
    ["javascript:alert(1)", (url: string) => `${url}/`],
  ])("%s", async (target, expected) => {
    const browser = new Browser();
    provider.signsIn(newPerson());
    const wanted = expected(plane.url);
    const page = await browser.visit(startUrl({ return_to: target }), { stopAt: (url) => url === wanted });
    expect(page.redirects.at(-1)).toBe(wanted);
  });
});

describe("the ways to sign in", () => {
  test("are a choice where there are several; names are text", async () => {
    await using own = await startLoginPlane({
      BERTH_OIDC_PROVIDERS: JSON.stringify([provider.config("one", "<b>One</b>"), provider.config("two", "Two")]),
    });
    const browser = new Browser();
    const page = await browser.visit(`${own.url}/auth/oidc/start?return_to=/auth/cli`);
    expect(page.text).toContain("&lt;b&gt;One&lt;/b&gt;");
    const links = [...page.text.matchAll(/href="([^"]+)"/g)].map(([, link = ""]) => link.replaceAll("&amp;", "&"));
    expect(links).toEqual(["one", "two"].map((id) => `/auth/oidc/start?provider=${id}&return_to=%2Fauth%2Fcli`));
    provider.signsIn(newPerson());
    const stopAt = (url: string) => url.startsWith(`${own.url}/auth/cli`);
    expect((await browser.visit(`${own.url}${links[1]}`, { stopAt })).redirects.at(-1)).toBe(`${own.url}/auth/cli`);
    expect((await browser.visit(`${own.url}/auth/oidc/start?provider=three`)).status).toBe(404);
  });

  test("are none without a provider, and none without TLS", async () => {
    await using none = await startLoginPlane({ BERTH_OIDC_PROVIDERS: "" });
    expect((await new Browser().visit(`${none.url}/auth/oidc/start`)).status).toBe(404);
    expect((await new Browser().visit(`${none.url}/`)).text).not.toContain("Sign in");
    await using open = await startLoginPlane({ BERTH_PUBLIC_URL: "http://berth.example.org" });
    const page = await new Browser().visit(`${open.url}/auth/oidc/start`);
    expect([page.status, page.text.includes("https")]).toEqual([400, true]);
  });

  test("do not lead to an address or a configuration of which nothing is known", async () => {
    for (const [name, value] of [
      ["email", "a@example.org"],
      ["sso_configuration_id", uuidv7()],
    ] as const) {
      expect((await new Browser().visit(startUrl({ [name]: value }))).status).toBe(404);
    }
  });

  test("issuers on the loopback are asked only if the operator allows it", async () => {
    const start = startLoginPlane({ BERTH_LOOPBACK_ISSUERS: "off" });
    await expect(start).rejects.toThrow(/^BERTH_OIDC_PROVIDERS .*BERTH_LOOPBACK_ISSUERS/);
    const secure = { ...provider.config(), issuer: provider.issuer.replace("http:", "https:") };
    await using own = await startLoginPlane({
      ...{ BERTH_LOOPBACK_ISSUERS: "off", BERTH_OIDC_PROVIDERS: JSON.stringify([secure]) },
    });
    expect((await new Browser().visit(`${own.url}/auth/oidc/start`)).status).toBe(503);
    expect(own.logged()).toContain("not allowed");
  });
});

describe("an organization", () => {
  const choose = (browser: Browser, organizationId: string, origin?: string) =>
    browser.send(`${plane.url}/auth/session/organization`, { organizationId }, origin);

  test("is that of the only user, and is chosen where there are several; what was opened before ends", async () => {
    const person = newPerson();
    await signIn(person);
    const here = await join(person.email);
    const { browser } = await signIn(person);
    expect(await identityOf(browser)).toMatchObject({ id: here, organizationId: plane.organizationId });
    const other = await addOrganization(plane);
    const there = await join(person.email, other);
    await signIn(person, { browser });
    const account = await accountOf(person.email);
    expect(await identityOf(browser)).toMatchObject({ id: account?.id, principal: "PRINCIPAL_ACCOUNT" });
    const home = await browser.visit(`${plane.url}/`);
    for (const text of [other, plane.organizationId, "Another", person.email]) expect(home.text).toContain(text);

    const before = sessionOf(browser);
    const chosen = await choose(browser, other.toUpperCase());
    expect([chosen.status, JSON.parse(chosen.text)]).toEqual([200, { organizationId: other.toUpperCase() }]);
    expect(await identityOf(browser)).toMatchObject({ id: there, organizationId: other });
    expect(sessionOf(browser)).not.toBe(before);
    const page = await browser.submit(`${plane.url}/auth/session/organization`, {
      ...{ organizationId: plane.organizationId, return_to: "/auth/oidc/start?provider=none" },
    });
    expect(page.url).toBe(`${plane.url}/auth/oidc/start?provider=none`);
    expect(await identityOf(browser)).toMatchObject({ id: here });
    expect(await entriesOf(there)).toMatchObject([{ action: "Signed in with Test & Co" }]);
    const old = await fetch(`${plane.url}/gitpod.v1.IdentityService/GetAuthenticatedIdentity`, {
      method: "POST",
      headers: { "content-type": "application/json", cookie: `berth_session=${before}` },
      body: "{}",
    });
    expect(old.status).toBe(401);
  });

  test("that one is not active in, or that a foreign page asks for, is not chosen", async () => {
    const person = newPerson();
    const { browser } = await signIn(person);
    const [other, left] = [await addOrganization(plane), await addOrganization(plane)];
    const user = await join(person.email, left);
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${user}`;
    for (const id of [other, left, "x", ""]) expect((await choose(browser, id)).status).toBe(404);
    await join(person.email, other);
    expect((await choose(browser, other, "https://evil.example.org")).status).toBe(403);
    expect((await choose(new Browser(), other)).status).toBe(401);
    expect(await identityOf(browser)).toMatchObject({ principal: "PRINCIPAL_ACCOUNT" });
    const get = await browser.visit(`${plane.url}/auth/session/organization`);
    expect([get.status, get.headers.get("allow")]).toEqual([405, "POST"]);
    const big = await browser.send(`${plane.url}/auth/session/organization`, { organizationId: "x".repeat(20_000) });
    expect(big.status).toBe(429);
    const broken = await fetch(`${plane.url}/auth/session/organization`, {
      ...{
        method: "POST",
        body: "{",
        headers: { "content-type": "application/json", "sec-fetch-site": "same-origin" },
      },
    });
    expect([broken.status, ((await broken.json()) as { code: string }).code]).toEqual([400, "invalid_argument"]);
  });

  test("chosen later does not make a login last longer", async () => {
    const person = newPerson();
    await signIn(person);
    await Promise.all([join(person.email), addOrganization(plane).then((id) => join(person.email, id))]);
    const { browser } = await signIn(person);
    const ends = async () => {
      const [row] = await db().point<{ at: Date }[]>`select max(expires_at) as at from tokens t
        where kind = ${TokenKind.SESSION} and subject_id in (select id from users where email = ${person.email} union select id from accounts where email = ${person.email})`;
      return row?.at.getTime();
    };
    const first = await ends();
    plane.advance(HOUR_MS);
    await choose(browser, plane.organizationId);
    expect(await ends()).toBe(first);
  });
});

describe("a browser login", () => {
  test("ends when one signs out, which only pages of this server can make a browser do", async () => {
    const person = newPerson();
    await signIn(person);
    const user = await join(person.email);
    const { browser } = await signIn(person);
    const session = sessionOf(browser);
    const foreign = await browser.submit(`${plane.url}/auth/logout`, {}, { origin: "https://evil.example.org" });
    expect([foreign.status, sessionOf(browser)]).toEqual([403, session]);
    const page = await browser.submit(`${plane.url}/auth/logout`, {});
    expect([page.url, sessionOf(browser)]).toEqual([`${plane.url}/`, undefined]);
    expect(page.text).toContain("Sign in");
    const [row] = await db().point<
      { count: number }[]
    >`select count(*)::int as count from tokens where subject_id = ${user}`;
    expect(row?.count).toBe(0);
    expect((await entriesOf(user)).map(({ action }) => action)).toEqual(["Signed in with Test & Co", "Signed out"]);
    expect((await browser.send(`${plane.url}/auth/logout`, {})).status).toBe(200);
  });

  test("is replaced by the next one in the same browser", async () => {
    const { browser } = await signIn(newPerson());
    const first = sessionOf(browser);
    await signIn(newPerson(), { browser });
    expect(sessionOf(browser)).not.toBe(first);
    const [row] = await db().point<
      { count: number }[]
    >`select count(*)::int as count from tokens where kind = ${TokenKind.SESSION}`;
    await signIn(newPerson(), { browser });
    const [after] = await db().point<
      { count: number }[]
    >`select count(*)::int as count from tokens where kind = ${TokenKind.SESSION}`;
    expect(after).toEqual(row);
  });

  test("lasts as long as the operator says", async () => {
    await using own = await startLoginPlane({ BERTH_SESSION_IDLE: "2m", BERTH_SESSION_MAX: "5m" });
    provider.signsIn({ sub: "admin", email: ADMIN });
    const browser = new Browser();
    await browser.visit(`${own.url}/auth/oidc/start`);
    const isIn = async () => (await browser.visit(`${own.url}/`)).text.includes("Signed in");
    const look = [];
    for (const seconds of [0, 100, 100, 90]) {
      own.advance(seconds * 1000);
      look.push(await isIn());
    }
    expect(look).toEqual([true, true, true, true]);
    own.advance(MINUTE_MS);
    expect(await isIn()).toBe(false);
    await browser.visit(`${own.url}/auth/oidc/start`);
    own.advance(2 * MINUTE_MS);
    expect(await isIn()).toBe(false);
  });
});

describe("pages", () => {
  test("run no scripts, are not framed, not kept, and hold people's names as text", async () => {
    const person = { ...newPerson(), name: `<script>alert("1")</script>'&` };
    const { page } = await signIn(person);
    expect(page.text).toContain("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&#39;&amp;");
    expect(page.text).not.toMatch(/<script|\son\w+=/);
    const policy = page.headers.get("content-security-policy") ?? "";
    expect(policy).toMatch(/^default-src 'none'; style-src 'sha256-[\w+/=]+'; form-action 'self'/);
    expect(policy).toContain("frame-ancestors 'none'");
    expect(page.headers.get("cache-control")).toBe("no-store");
    expect(page.headers.get("x-content-type-options")).toBe("nosniff");
    expect(page.headers.get("referrer-policy")).toBe("same-origin");
  });

  test("refuse other methods, and answer JSON to whoever wants it", async () => {
    const post = await fetch(startUrl(), { method: "POST", body: "x" });
    expect([post.status, post.headers.get("allow")]).toEqual([405, "GET"]);
    const json = await fetch(startUrl({ provider: "x" }), { headers: { accept: "application/json" } });
    expect([json.status, await json.json()]).toEqual([
      404,
      { code: "not_found", message: "there is no such way to sign in" },
    ]);
    expect((await fetch(`${plane.url}/nothing`)).status).toBe(404);
  });

  test("are shown 30 times a minute to one address, those that need no login", async () => {
    await using own = await startLoginPlane({ BERTH_RATE_LIMIT: "50" });
    const statuses = [];
    for (let i = 0; i < 31; i++) statuses.push((await fetch(`${own.url}/auth/oidc/callback`)).status);
    expect(statuses).toEqual([...Array<number>(30).fill(400), 429]);
    const limited = await fetch(`${own.url}/auth/oidc/start`, { redirect: "manual" });
    expect(limited.status).toBe(429);
    expect(Number(limited.headers.get("retry-after"))).toBeGreaterThan(0);
    const rpc = await fetch(`${own.url}/gitpod.v1.IdentityService/ExchangeToken`, {
      ...{ method: "POST", body: '{"exchangeToken":"x"}', headers: { "content-type": "application/json" } },
    });
    expect(rpc.status).toBe(429);
    expect((await fetch(`${own.url}/`)).status).toBe(200);
  });
});

test("PLT-5 no table holds the text of a login, or of what is on its way to one", async () => {
  const { browser } = await signIn(newPerson());
  provider.signsIn(newPerson());
  const waiting = await browser.visit(startUrl(), { stopAt: (url) => url.includes("/callback") });
  const state = new URL(waiting.redirects.at(-1) ?? "").searchParams.get("state") ?? "";
  const texts = [sessionOf(browser), browser.cookie(plane.url, "berth_oidc"), state].map((text) =>
    text?.replace(/^berth_ses_/, ""),
  );
  const tables = await db().point<
    { name: string }[]
  >`select tablename as name from pg_tables where schemaname = 'public'`;
  for (const { name } of tables) {
    const rows = (await db().point<{ text: string }[]>`select t::text as text from ${db().point(name)} t`)
      .map((row) => row.text)
      .join();
    for (const text of texts) {
      expect(text?.length).toBe(text === texts[0] ? 49 : 43);
      for (const form of [text ?? "", Buffer.from(text ?? "").toString("hex")]) expect(rows, name).not.toContain(form);
    }
  }
});
