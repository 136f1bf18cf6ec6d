import { createHash, randomBytes } from "node:crypto";
import { mkdir, mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { createBerthClient } from "../src/client.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { Browser } from "./harness/browser.ts";
import { freePort } from "./harness/free-port.ts";
import { OidcProvider } from "./harness/oidc-provider.ts";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { type Program, startProgram } from "./harness/program.ts";
import { addOrganization, mint } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

// `berth login`: the command, the pages that a browser shows for it, and what the two of them swap.

const ADMIN = "admin@example.org";
const MINUTE_MS = 60_000;

let provider: OidcProvider;
let plane: TestPlane;
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-login-"));
  provider = await OidcProvider.start();
  plane = await startTestPlane({
    BERTH_PORT: String(await freePort()),
    BERTH_OIDC_PROVIDERS: JSON.stringify([provider.config()]),
    BERTH_LOOPBACK_ISSUERS: "on",
    BERTH_BOOTSTRAP_ADMIN_EMAIL: ADMIN,
  });
  provider.signsIn({ sub: "admin", email: ADMIN });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain("was not served");
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
  await provider[Symbol.asyncDispose]();
  await rm(folder, { recursive: true, force: true });
});

const db = () => plane.plane.app.db;
const challengeOf = (verifier: string) => createHash("sha256").update(verifier).digest("base64url");
const newVerifier = () => randomBytes(32).toString("base64url");

interface Asked {
  port: string;
  state: string;
  code_challenge: string;
  machine: string;
}
const asked = (more: Partial<Asked> = {}): Asked => ({
  ...{ port: "45678", state: "a.state~_-", code_challenge: challengeOf("x"), machine: "laptop", ...more },
});
const pageUrl = (fields: object) => `${plane.url}/auth/cli?${new URLSearchParams(fields as Record<string, string>)}`;

/** Fields of the form that a page shows to agree with. */
function formOf(text: string): Record<string, string> {
  const form = /<form method="post" action="\/auth\/cli">.*?<\/form>/s.exec(text)?.[0] ?? "";
  return Object.fromEntries(
    [...form.matchAll(/name="(\w+)" value="([^"]*)"/g)].map(([, name, value]) => [name, value]),
  );
}

const isCallback = (url: string) => new URL(url).hostname === "127.0.0.1" && new URL(url).pathname === "/callback";

/** Agrees in a browser that is signed in; the code that it brings back. */
async function codeFor(verifier: string, browser = new Browser()): Promise<string> {
  const fields = asked({ code_challenge: challengeOf(verifier) });
  const page = await browser.visit(pageUrl(fields));
  const { redirects } = await browser.submit(`${plane.url}/auth/cli`, formOf(page.text), { stopAt: isCallback });
  return new URL(redirects.at(-1) ?? "").searchParams.get("code") ?? "";
}

async function swap(code: string, verifier: string) {
  const response = await fetch(`${plane.url}/auth/cli/token`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ code, code_verifier: verifier }),
  });
  return {
    status: response.status,
    ...((await response.json()) as { token?: string; code?: string; tokenId?: string }),
  };
}

const tokensOf = async (email: string) => {
  const [row] = await db().point<{ count: number }[]>`select count(*)::int as count from tokens
    where kind = ${TokenKind.PERSONAL_ACCESS} and subject_id in (select id from users where email = ${email})`;
  return row?.count ?? 0;
};

describe("the page", () => {
  test("wants a login first, and says who asks, for whom, and where; the form goes to that port alone", async () => {
    const browser = new Browser();
    const page = await browser.visit(pageUrl(asked()));
    expect(page.redirects[0]).toMatch(/\/auth\/oidc\/start\?return_to=%2Fauth%2Fcli%3Fport%3D45678%26/);
    expect([page.status, page.url]).toEqual([200, pageUrl(asked())]);
    for (const text of ["laptop", ADMIN, "30 days", "Agree"]) expect(page.text).toContain(text);
    expect(page.headers.get("content-security-policy")).toContain("form-action 'self' http://127.0.0.1:45678;");
    expect(formOf(page.text)).toEqual(asked());
    const agreed = await browser.submit(`${plane.url}/auth/cli`, formOf(page.text), { stopAt: isCallback });
    expect(agreed.status).toBe(303);
    const callback = new URL(agreed.redirects.at(-1) ?? "");
    expect([callback.origin, callback.searchParams.get("state")]).toEqual(["http://127.0.0.1:45678", "a.state~_-"]);
    expect(callback.searchParams.get("code")).toMatch(/^[\w-]{43}$/);
  });

  test.each([
    [{ port: "80" }],
    [{ port: "65536" }],
    [{ port: "x" }],
    [{ port: "8080@evil.example.org" }],
    [{ state: "" }],
    [{ state: "x".repeat(129) }],
    [{ state: "<script>" }],
    [{ code_challenge: "short" }],
    [{ code_challenge: `${"x".repeat(42)}=` }],
    [{ machine: "<b>" }],
    [{ machine: "x".repeat(65) }],
  ])("refuses %j before anything else, to look at and to agree with", async (change) => {
    const browser = new Browser();
    expect((await browser.visit(pageUrl(asked(change)))).status).toBe(400);
    await browser.visit(`${plane.url}/auth/oidc/start`);
    expect((await browser.submit(`${plane.url}/auth/cli`, { ...asked(change) })).status).toBe(400);
  });

  test("cannot be agreed with from elsewhere, nor without a login", async () => {
    const browser = new Browser();
    await browser.visit(`${plane.url}/auth/oidc/start`);
    const url = `${plane.url}/auth/cli`;
    const foreign = await browser.submit(url, { ...asked() }, { origin: "https://evil.example.org" });
    expect([foreign.status, foreign.redirects]).toEqual([403, []]);
    expect((await new Browser().submit(url, { ...asked() })).status).toBe(401);
    expect(await db().point`select from login_codes where description = 'berth login laptop'`).toHaveLength(1);
  });

  test("lets somebody without an organization choose one, if there are any", async () => {
    const email = "nobody@example.org";
    provider.signsIn({ sub: "nobody", email });
    const browser = new Browser();
    const none = await browser.visit(pageUrl(asked()));
    expect(none.text).toContain("no organization");
    expect((await browser.submit(`${plane.url}/auth/cli`, { ...asked() })).status).toBe(403);
    const other = await addOrganization(plane);
    for (const id of [plane.organizationId, other]) {
      await db().write`insert into users (id, organization_id, account_id, role, status, member_since)
        select gen_random_uuid(), ${id}, id, ${OrganizationRole.MEMBER}, ${UserStatus.ACTIVE}, now() from accounts where email = ${email}`;
    }
    const choice = await browser.visit(pageUrl(asked()));
    expect(choice.text).toContain("Another");
    const chosen = await browser.submit(`${plane.url}/auth/session/organization`, {
      ...{ organizationId: other, return_to: pageUrl(asked()) },
    });
    expect(chosen.url).toBe(pageUrl(asked()));
    expect(formOf(chosen.text)).toEqual(asked());
    provider.signsIn({ sub: "admin", email: ADMIN });
  });
});

describe("PLT-50 a code", () => {
  test("gets a token for 30 days, once", async () => {
    const verifier = newVerifier();
    const code = await codeFor(verifier);
    const before = await tokensOf(ADMIN);
    const answers = await Promise.all([swap(code, verifier), swap(code, verifier)]);
    expect(answers.map(({ status }) => status).sort()).toEqual([200, 401]);
    expect(await tokensOf(ADMIN)).toBe(before + 1);
    const { token = "", tokenId = "" } = answers.find(({ status }) => status === 200) ?? {};
    const { user } = await plane.client(token).users.getAuthenticatedUser({});
    expect(user?.email).toBe(ADMIN);
    const { pat } = await plane.admin.users.getPersonalAccessToken({ personalAccessTokenId: tokenId });
    expect(pat).toMatchObject({ description: "berth login laptop", readOnly: false });
    const days = Number((pat?.expiresAt?.seconds ?? 0n) - (pat?.createdAt?.seconds ?? 0n)) / 86_400;
    expect(days).toBe(30);
    const entries = await db()
      .point`select actor_id, credential_id, action from audit_log where subject_id = ${tokenId}`;
    expect(entries).toEqual([{ actor_id: user?.id, credential_id: tokenId, action: "Personal access token created" }]);
  });

  test("gets nothing with another verifier, and then nothing with the right one", async () => {
    const verifier = newVerifier();
    const code = await codeFor(verifier);
    const before = await tokensOf(ADMIN);
    for (const wrong of [newVerifier(), verifier]) {
      expect(await swap(code, wrong)).toMatchObject({ status: 401, code: "unauthenticated" });
    }
    expect((await swap("x", verifier)).status).toBe(401);
    expect((await swap("", "")).status).toBe(401);
    expect(await tokensOf(ADMIN)).toBe(before);
  });

  test("gets nothing after five minutes, and is removed", async () => {
    const verifier = newVerifier();
    const [late, unused] = [await codeFor(verifier), await codeFor(newVerifier())];
    expect(unused).not.toBe(late);
    plane.advance(5 * MINUTE_MS);
    expect((await swap(late, verifier)).status).toBe(401);
    await sweeps.find(({ name }) => name === "abandoned logins")?.run(plane.plane.app);
    expect(await db().point`select from login_codes`).toHaveLength(0);
  });

  test("gets nothing for a user who has been suspended meanwhile, or has too many tokens", async () => {
    const { id } = await plane.addUser();
    provider.signsIn({ sub: id, email: `${id}@example.org` });
    const verifier = newVerifier();
    const [first, second] = [await codeFor(verifier), await codeFor(verifier)];
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${id}`;
    expect((await swap(first, verifier)).status).toBe(401);
    await db().write`update users set status = ${UserStatus.ACTIVE} where id = ${id}`;
    const most = plane.plane.app.limits.personalAccessTokens;
    for (let count = 1; count < most; count++) await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: id });
    expect(await swap(second, verifier)).toMatchObject({ status: 429, code: "resource_exhausted" });
    expect(await tokensOf(`${id}@example.org`)).toBe(most);
    provider.signsIn({ sub: "admin", email: ADMIN });
  });

  test("is not stored as it is (PLT-5)", async () => {
    const code = await codeFor(newVerifier());
    const rows = await db().point<{ text: string }[]>`select t::text as text from login_codes t`;
    expect(rows.length).toBeGreaterThan(0);
    for (const form of [code, Buffer.from(code).toString("hex")]) expect(JSON.stringify(rows)).not.toContain(form);
  });
});

describe("the command", () => {
  const newHome = () => mkdtemp(join(folder, "home-"));
  const configPath = (home: string) => join(home, "berth", "config.json");
  const run = (args: string[], home: string) => startProgram(args, { XDG_CONFIG_HOME: home });

  async function ended(args: string[], home: string) {
    await using program = run(args, home);
    const code = await program.ended();
    return { code, printed: program.printed(), output: program.output() };
  }

  /** The page that a command asks to open. */
  async function pageOf(program: Program): Promise<string> {
    return eventually(() => /^ {2}(http:\S+)$/m.exec(program.output())?.[1], "the command says which page to open");
  }

  /** Signs in on the command line with a browser. */
  async function login(home: string, browser = new Browser()) {
    await using program = run(["login", plane.url, "--no-browser"], home);
    const page = await browser.visit(await pageOf(program));
    const done = await browser.submit(`${plane.url}/auth/cli`, formOf(page.text));
    return { code: await program.ended(), printed: program.printed(), output: program.output(), done };
  }

  test("waits for the browser, keeps the token where only its owner can read it, and forgets it again", async () => {
    const home = await newHome();
    const { code, printed, output, done } = await login(home);
    expect([code, printed]).toEqual([0, ""]);
    expect(output).toContain(`as ${ADMIN} in Default`);
    expect(output).not.toMatch(/berth_pat_/);
    expect([done.status, done.text]).toEqual([200, expect.stringContaining("signed in")]);
    expect((await stat(configPath(home))).mode & 0o777).toBe(0o600);
    expect((await stat(join(home, "berth"))).mode & 0o777).toBe(0o700);

    const token = await ended(["token"], home);
    expect([token.code, token.output]).toEqual([0, expect.stringMatching(/^berth_pat_\w{49}\n$/)]);
    const client = createBerthClient({ baseUrl: plane.url, token: token.printed.trim() });
    expect((await client.users.getAuthenticatedUser({})).user?.email).toBe(ADMIN);

    const logout = await ended(["logout"], home);
    expect([logout.code, logout.output]).toEqual([0, expect.stringContaining("Signed out")]);
    await expect(client.users.getAuthenticatedUser({})).rejects.toThrow(/not valid/);
    expect(await readFile(configPath(home), "utf8")).not.toContain("berth_pat_");
    expect((await ended(["logout", plane.url], home)).code).toBe(0);
    expect((await ended(["token", plane.url], home)).code).toBe(3);
  });

  test("keeps the tokens of several servers, and means the last one", async () => {
    const home = await newHome();
    await mkdir(join(home, "berth"));
    const other = { token: "other", tokenId: "x", expiresAt: "", email: "a", organizationName: "b" };
    const servers = { "https://other.example.org": other };
    await writeFile(configPath(home), JSON.stringify({ current: "https://other.example.org", servers }));
    expect((await ended(["token"], home)).printed).toBe("other\n");
    await login(home);
    expect((await ended(["token"], home)).printed).toMatch(/^berth_pat_/);
    expect((await ended(["token", "https://other.example.org/"], home)).printed).toBe("other\n");
    // A server that cannot be reached does not keep anybody from forgetting its token.
    const gone = `http://127.0.0.1:${await freePort()}`;
    await writeFile(configPath(home), JSON.stringify({ current: gone, servers: { ...servers, [gone]: other } }));
    const logout = await ended(["logout"], home);
    expect([logout.code, logout.output]).toEqual([1, expect.stringContaining("removed here")]);
    expect(JSON.parse(await readFile(configPath(home), "utf8"))).toEqual({ servers });
  });

  test("takes a code only with its own state, and no other path", async () => {
    const home = await newHome();
    await using program = run(["login", plane.url, "--no-browser"], home);
    const page = new URL(await pageOf(program));
    const port = page.searchParams.get("port");
    for (const path of [
      "/callback?code=x&state=y",
      "/callback?code=x",
      `/?code=x&state=${page.searchParams.get("state")}`,
    ]) {
      expect((await fetch(`http://127.0.0.1:${port}${path}`)).status).toBe(404);
    }
    const browser = new Browser();
    const shown = await browser.visit(page.href);
    await browser.submit(`${plane.url}/auth/cli`, formOf(shown.text));
    expect(await program.ended()).toBe(0);
  });

  test("says why it got no token", async () => {
    const home = await newHome();
    const answer = createServer((_request, response) => {
      response.writeHead(401, { "content-type": "application/json" }).end('{"message":"the code is not valid"}');
    });
    await new Promise<void>((resolve) => answer.listen(0, "127.0.0.1", resolve));
    await using program = run(
      ["login", `http://127.0.0.1:${(answer.address() as AddressInfo).port}`, "--no-browser"],
      home,
    );
    const page = new URL(await pageOf(program));
    const query = new URLSearchParams({ code: "x", state: page.searchParams.get("state") ?? "" });
    await fetch(`http://127.0.0.1:${page.searchParams.get("port")}/callback?${query}`);
    expect(await program.ended()).toBe(3);
    expect(program.output()).toContain("the code is not valid");
    await new Promise((resolve) => answer.close(resolve));
  });

  test.each([
    [["login", "ftp://x"]],
    [["login", "x", "y"]],
    [["login", "--browser"]],
    [["logout", "http://a?b"]],
    [["token", "--all"]],
  ])("%j ends with 2", async (args) => {
    expect((await ended(args, await newHome())).code).toBe(2);
  });

  test("says that its file is damaged, and does not overwrite it", async () => {
    const home = await newHome();
    await mkdir(join(home, "berth"));
    await writeFile(configPath(home), "{");
    const { code, output } = await ended(["token"], home);
    expect([code, output]).toEqual([2, expect.stringContaining("config.json is damaged")]);
    expect(await readFile(configPath(home), "utf8")).toBe("{");
  });
});
