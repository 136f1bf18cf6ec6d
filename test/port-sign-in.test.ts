import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AdmissionLevel, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { addressBelow, withPortToken } from "../src/domain/environment-ports.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { Browser, type Page } from "./harness/browser.ts";
import { reaches } from "./harness/environments.ts";
import { freePort } from "./harness/free-port.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { OidcProvider } from "./harness/oidc-provider.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { admitPort, runningEnvironment, servePort } from "./harness/ports.ts";
import { addOrganization } from "./harness/tenants.ts";

// A port in a browser: what shows no token goes to the control plane, and comes back with one.

const { ORGANIZATION, CREATOR_ONLY, UNSPECIFIED } = AdmissionLevel;
const TIMEOUT_MS = 90_000;

let provider: OidcProvider;
let plane: TestPlane;
let host: TestHost;
let creator: TestUser;
let member: TestUser;
let id: string;
let port: number;

beforeAll(async () => {
  provider = await OidcProvider.start();
  plane = await startTestPlane({
    BERTH_PORT: String(await freePort()),
    BERTH_OIDC_PROVIDERS: JSON.stringify([provider.config()]),
    BERTH_LOOPBACK_ISSUERS: "on",
  });
  await liftQuotas(plane);
  host = await startHost(plane);
  [creator, member] = [await plane.addUser(), await plane.addUser()];
  [id, port] = [await runningEnvironment(creator, host.classId), await freePort()];
  await servePort(creator, id, port, "first");
}, TIMEOUT_MS);

afterAll(async () => {
  expect(plane.logged()).not.toContain("was not served");
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await host[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await provider[Symbol.asyncDispose]();
}, TIMEOUT_MS);

const db = () => plane.plane.app.db;
const admit = (admission: AdmissionLevel) => admitPort(creator, id, port, admission);
const emailOf = (user: Pick<TestUser, "id">) => `${user.id}@example.org`;
const pathsOf = ({ redirects }: Page) => redirects.map((url) => new URL(url).pathname);

/** A browser in which somebody signs in where they are asked to. */
function browserOf(user: Pick<TestUser, "id">): Browser {
  provider.signsIn({ sub: user.id, email: emailOf(user) });
  return new Browser();
}

async function signedIn(user: Pick<TestUser, "id">): Promise<Browser> {
  const browser = browserOf(user);
  await browser.visit(`${plane.url}/auth/oidc/start`);
  return browser;
}

const doorUrl = (fields: { environment_id?: string; port?: string; return_to?: string }) =>
  `${plane.url}/auth/port?${new URLSearchParams({ environment_id: id, port: String(port), ...fields })}`;

async function portTokens(): Promise<number> {
  const [row] = await db().point<{ count: number }[]>`
    select count(*)::int as count from tokens where kind = ${TokenKind.PORT_ACCESS}`;
  return row?.count ?? 0;
}

/** What a refused visit shows; it leads nowhere and makes no token. */
async function refusal(browser: Browser, url: string): Promise<Page> {
  const before = await portTokens();
  const page = await browser.visit(url);
  expect(page.redirects).toEqual([]);
  expect(page.headers.get("content-type")).toContain("text/html");
  expect(page.headers.get("cache-control")).toBe("no-store");
  expect(await portTokens()).toBe(before);
  return page;
}

describe("ENV-31 a person opens a port in a browser", () => {
  test("signs in on the way, and sees the very address that they wanted; the service learns nothing of it", async () => {
    const url = await admit(CREATOR_ONLY);
    const wanted = `${url}a%20page?x=1&flag&y=%2F+`;
    const browser = browserOf(creator);
    const page = await browser.visit(wanted);
    const prefix = new URL(url).pathname;
    expect(pathsOf(page)).toEqual([
      ...["/auth/port", "/auth/oidc/start", "/authorize", "/auth/oidc/callback", "/auth/port"],
      ...[`${prefix}a%20page`, `${prefix}a%20page`],
    ]);
    expect([page.status, page.url]).toEqual([200, wanted]);
    const seen = JSON.parse(page.text) as { url: string; headers: Record<string, string> };
    expect(seen.url).toBe("/a%20page?x=1&flag&y=%2F+");
    expect(JSON.stringify(seen.headers)).not.toContain("berth_");
    expect(browser.cookie(url, "berth_port")).toMatch(/^berth_prt_\w{49}$/);
    expect(browser.cookie(host.url, "berth_port")).toBeUndefined();
    const [entry] = await db().point<{ actor_id: string }[]>`
      select actor_id from audit_log where subject_id = ${id} and action = ${`Access token for port ${port} issued`}
      order by id desc limit 1`;
    expect(entry?.actor_id).toBe(creator.id);
    const again = await browser.visit(`${url}more`);
    expect([again.status, again.redirects]).toEqual([200, []]);
  });

  test("who has signed in before is back at once, by answers that nobody keeps and that tell no one", async () => {
    const url = await admit(ORGANIZATION);
    const browser = await signedIn(member);
    const stop = await browser.visit(url, { stopAt: (to) => to.includes("berth_port_token=") });
    expect([stop.status, stop.url.split("?")[0]]).toEqual([303, `${plane.url}/auth/port`]);
    expect(stop.headers.get("cache-control")).toBe("no-store");
    expect(stop.headers.get("referrer-policy")).toBe("no-referrer");
    const page = await browser.visit(url);
    expect([page.status, pathsOf(page).filter((path) => path.startsWith("/auth/"))]).toEqual([200, ["/auth/port"]]);
  });

  test("a new admission voids what they had: whom it still admits is asked again, and others are refused", async () => {
    const url = await admit(ORGANIZATION);
    const browsers = [await signedIn(creator), await signedIn(member)] as const;
    for (const browser of browsers) expect((await browser.visit(url)).status).toBe(200);
    const before = browsers[0].cookie(url, "berth_port");
    await admit(CREATOR_ONLY);
    const [own, theirs] = [await browsers[0].visit(url), await browsers[1].visit(url)];
    expect([own.status, pathsOf(own)[0]]).toEqual([200, "/auth/port"]);
    expect(browsers[0].cookie(url, "berth_port")).not.toBe(before);
    expect([theirs.status, new URL(theirs.url).pathname]).toEqual([404, "/auth/port"]);
  });

  test("the token in the address is good for one cookie and for nothing else", async () => {
    const url = await admit(CREATOR_ONLY);
    const browser = await signedIn(creator);
    const stop = await browser.visit(url, { stopAt: (to) => to.includes("berth_port_token=") });
    const address = stop.headers.get("location") ?? "";
    const token = new URL(address).searchParams.get("berth_port_token") ?? "";
    // Whoever has read it along the way can do nothing else with it.
    expect((await fetch(url, { headers: { authorization: `Bearer ${token}` } })).status).toBe(401);
    expect((await fetch(url, { headers: { cookie: `berth_port=${token}` } })).status).toBe(401);
    const first = await browser.visit(address);
    expect([first.status, first.url]).toEqual([200, url]);
    const cookie = browser.cookie(url, "berth_port");
    expect(cookie).toMatch(/^berth_prt_\w{49}$/);
    expect(cookie).not.toBe(token);
    const thief = await new Browser().visit(address);
    expect([thief.status, thief.redirects]).toEqual([401, []]);
    const reloaded = await browser.visit(address);
    expect([reloaded.status, reloaded.url, browser.cookie(url, "berth_port")]).toEqual([200, url, cookie]);
  });

  test("a token in the address that nobody comes with is over after a minute", async () => {
    const url = await admit(CREATOR_ONLY);
    const browser = await signedIn(creator);
    const stop = await browser.visit(url, { stopAt: (to) => to.includes("berth_port_token=") });
    await db().write`update tokens set expires_at = ${new Date()} where kind = ${TokenKind.PORT_ACCESS} and to_redeem`;
    const late = await browser.visit(stop.headers.get("location") ?? "");
    expect(late.status).toBe(401);
  });

  test("a token in the address that opens nothing is not asked for again, without end", async () => {
    const url = await admit(CREATOR_ONLY);
    const page = await (await signedIn(creator)).visit(`${url}?berth_port_token=x`);
    expect([page.status, page.redirects]).toEqual([401, []]);
  });
});

describe("ENV-31 refuses", () => {
  test("members whom the port does not admit: who may see the environment hears that, others of no such environment", async () => {
    const url = await admit(CREATOR_ONLY);
    const admin = await plane.addUser({ role: OrganizationRole.ADMIN });
    const page = await (await signedIn(admin)).visit(url);
    expect([page.status, page.text.includes("the port does not admit you")]).toEqual([403, true]);
    const other = await (await signedIn(member)).visit(url);
    expect([other.status, other.text.includes(`environment ${id} not found`)]).toEqual([404, true]);
  });

  test("strangers, to whom an environment of others is one that does not exist", async () => {
    const url = await admit(ORGANIZATION);
    const stranger = await plane.addUser({ organizationId: await addOrganization(plane) });
    const browser = await signedIn(stranger);
    const page = await browser.visit(url);
    expect([page.status, new URL(page.url).origin]).toEqual([404, plane.url]);
    const nothing = "01981a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b";
    const none = await refusal(browser, doorUrl({ environment_id: nothing, return_to: url }));
    expect([none.status, none.text.replaceAll(nothing, id)]).toEqual([404, page.text]);
    const hostile = await refusal(browser, doorUrl({ return_to: "https://evil.example.org/" }));
    expect([hostile.status, hostile.text]).toEqual([404, page.text]);
  });

  test("who belongs to no organization", async () => {
    const url = await admit(ORGANIZATION);
    const nobody = { id: "01981a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5c" };
    const page = await browserOf(nobody).visit(url);
    expect([page.status, page.text.includes("you belong to no organization yet")]).toEqual([403, true]);
  });

  test("a port that is closed, shared against the rules, or of an environment that does not run", async () => {
    const browser = await signedIn(creator);
    const url = await admit(CREATOR_ONLY);
    const said = async (text: string, fields = {}) => {
      const page = await refusal(browser, doorUrl({ return_to: url, ...fields }));
      expect([page.status, page.text.includes(text)]).toEqual([400, true]);
    };
    await said("the environment does not list port 1", { port: "1" });
    const { organizationId } = plane;
    await plane.admin.organizations.updateOrganizationPolicies({ organizationId, portSharingDisabled: true });
    await said("sharing ports is switched off");
    await plane.admin.organizations.updateOrganizationPolicies({ organizationId, portSharingDisabled: false });
    await admit(UNSPECIFIED);
    const other = await runningEnvironment(creator, host.classId);
    const theirs = await admitPort(creator, other, port, CREATOR_ONLY);
    await creator.client.environments.stopEnvironment({ environmentId: other });
    await reaches(creator.client, other, EnvironmentPhase.STOPPED);
    await said("the environment is not running", { environment_id: other, return_to: theirs });
  });

  test.each([
    [{ environment_id: "" }],
    [{ environment_id: "x' or 1=1" }],
    [{ port: "" }],
    [{ port: "0" }],
    [{ port: "65536" }],
    [{ port: "1e3" }],
    [{ return_to: "" }],
    [{ return_to: "/environments" }],
    [{ return_to: `https://r.example.org/${"x".repeat(8192)}` }],
  ])("%j before anything else", async (change) => {
    const page = await refusal(new Browser(), doorUrl({ return_to: "https://r.example.org/", ...change }));
    expect([page.status, page.text.includes(Object.keys(change)[0] ?? "?")]).toEqual([400, true]);
  });

  test("any way back but to the port itself", async () => {
    const url = await admit(CREATOR_ONLY);
    const browser = await signedIn(creator);
    const second = await freePort();
    const other = await runningEnvironment(creator, host.classId);
    const { origin, host: authority, pathname } = new URL(url);
    const hostile = [
      ...[
        `https://evil.example.org${pathname}`,
        `${origin}.evil.example.org${pathname}`,
        `https://${authority}${pathname}`,
      ],
      ...[`http://${authority}@evil.example.org${pathname}`, `http://me@${authority}${pathname}`],
      ...[`http://:x@${authority}${pathname}`, `http://evil.example.org\\@${authority}${pathname}`],
      ...[`http:\\\\${authority}${pathname}`, `${url}\\..\\..\\${second}\\`, `${url}\n`, `//${authority}${pathname}`],
      ...[`${url}../${second}/`, `${url}%2e%2e/${second}/`, `${url}.%2E/${second}/x?y`, `${url}../../../`],
      ...[url.slice(0, -1), `${url.slice(0, -1)}0/`, url.replace(String(port), String(second)), url.replace(id, other)],
      ...[
        `${origin}/`,
        `${origin}/x${pathname}`,
        `${origin}/${pathname}`,
        "javascript:alert(1)",
        `data:text/html,${url}`,
      ],
      ...[encodeURIComponent(url), `blob:${url}`, `${plane.url}${pathname}`],
    ];
    for (const address of hostile) {
      const page = await refusal(browser, doorUrl({ return_to: address }));
      expect([address, page.status, page.text.includes("return_to")]).toEqual([address, 400, true]);
    }
  });
});

test("somebody of several organizations says first which one they mean, and gets on from there", async () => {
  const url = await admit(ORGANIZATION);
  const stranger = await plane.addUser({ organizationId: await addOrganization(plane) });
  await db().write`insert into users (id, organization_id, account_id, role, status, member_since)
    select gen_random_uuid(), ${plane.organizationId}, account_id, ${OrganizationRole.MEMBER}, ${UserStatus.ACTIVE}, now()
    from users where id = ${stranger.id}`;
  const browser = browserOf(stranger);
  const page = await browser.visit(`${url}deep?x=1`);
  expect([page.status, page.text.includes("Choose an organization")]).toEqual([200, true]);
  // Browsers hold an answer to a form to this, however often it leads on.
  expect(page.headers.get("content-security-policy")).toContain(`form-action 'self' ${host.url};`);
  const choose = (organizationId: string, from: Page) =>
    browser.submit(`${plane.url}/auth/session/organization`, {
      ...{ organizationId, return_to: new URL(from.url).pathname + new URL(from.url).search },
    });
  const other = /name="organizationId" value="([^"]+)"/g;
  const ids = [...page.text.matchAll(other)].map(([, found]) => found ?? "");
  expect(ids).toContain(plane.organizationId);
  const wrong = await choose(ids.find((each) => each !== plane.organizationId) ?? "", page);
  expect([wrong.status, wrong.text.includes(`environment ${id} not found`)]).toEqual([404, true]);
  const right = await choose(plane.organizationId, wrong);
  expect([right.status, right.url]).toEqual([200, `${url}deep?x=1`]);
});

test("an address gets a token in place of the one that it has, and stays as it is written", () => {
  const given = (address: string) => withPortToken(addressBelow("https://h.example/p/1/", address) as URL, "t");
  expect(given("https://h.example/p/1/?berth_port_token=old&a&%62erth_port_token=x&b=%20#c")).toBe(
    "https://h.example/p/1/?a&b=%20&berth_port_token=t",
  );
  expect(given("https://h.example/p/1/..%2f2")).toBe("https://h.example/p/1/..%2f2?berth_port_token=t");
  expect(addressBelow("https://3000--x.example", "https://3000--x.example")?.href).toBe("https://3000--x.example/");
  expect(addressBelow("javascript:1", "javascript:1")).toBeUndefined();
});
