import { request as httpRequest } from "node:http";
import { connect } from "node:http2";
import { create, type DescMethod, toJson } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { cookieRules, cookieValue, isSameOrigin, safeReturnTo } from "../src/domain/browser.ts";
import { TokenKind } from "../src/domain/tokens.ts";
import { services } from "../src/routes.ts";
import { ruleOf } from "../src/rpc/policy.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { mint } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

// What the API makes of the cookie of a browser that has signed in.

const HOUR_MS = 60 * 60_000;

let plane: TestPlane;
let member: TestUser;
let accountId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  const [row] = await db().point<{ account_id: string }[]>`select account_id from users where id = ${member.id}`;
  accountId = row?.account_id ?? "";
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  expect(plane.logged()).not.toMatch(/berth_[a-z]{3,4}_\w{49}/);
  await plane[Symbol.asyncDispose]();
});

const db = () => plane.plane.app.db;
const newSession = (more: Partial<Parameters<typeof mint>[1]> = {}) =>
  mint(plane, { kind: TokenKind.SESSION, subjectId: member.id, ...more });
const newAccountSession = () =>
  newSession({ subjectId: accountId, subjectPrincipal: Principal.ACCOUNT, organizationId: undefined });

interface Answer {
  status: number;
  code?: string;
  message?: string;
  [field: string]: unknown;
}

/** Calls as a browser does: JSON, with its cookie, and whatever else it says. */
async function call(path: string, session: string, headers: Record<string, string> = {}, body: object = {}) {
  const response = await fetch(`${plane.url}${path.startsWith("/") ? path : `/gitpod.v1.${path}`}`, {
    method: "POST",
    headers: { "content-type": "application/json", cookie: `a=b; berth_session=${session}; c`, ...headers },
    body: JSON.stringify(body),
  });
  return { status: response.status, ...((await response.json()) as object) } as Answer;
}

const IDENTITY = "IdentityService/GetAuthenticatedIdentity";
const WRITE = "RunnerService/CreateRunner";
const newRunner = { name: "made by a browser", provider: RunnerProvider[RunnerProvider.LINUX_HOST] };
const provider = `RUNNER_PROVIDER_${newRunner.provider}`;
const write = (session: string, headers: Record<string, string> = {}) =>
  call(WRITE, session, headers, { ...newRunner, provider });

describe("a cookie", () => {
  test("is its user, below both prefixes", async () => {
    const session = await newSession();
    const subject = { id: member.id, principal: "PRINCIPAL_USER" };
    for (const prefix of ["/", "/api/"]) {
      const answer = await call(`${prefix}gitpod.v1.${IDENTITY}`, session);
      expect(answer).toMatchObject({ status: 200, subject, organizationId: plane.organizationId });
    }
  });

  test("is its account, while no organization is chosen", async () => {
    expect(await call(IDENTITY, await newAccountSession())).toEqual({
      status: 200,
      ...{ subject: { id: accountId, principal: "PRINCIPAL_ACCOUNT" }, organizationTier: "enterprise" },
    });
  });

  test("is nothing in a header, and no token is anything in a cookie", async () => {
    const session = await newSession();
    expect((await call(IDENTITY, "", { authorization: `Bearer ${session}` })).status).toBe(401);
    expect((await call(IDENTITY, member.token)).status).toBe(401);
    expect((await call(IDENTITY, "berth_ses_x")).status).toBe(401);
  });

  test("counts only without a header, which is never combined with it", async () => {
    const session = await newSession();
    const header = await call(IDENTITY, session, { authorization: `Bearer ${plane.adminToken}` });
    expect(header.subject).not.toMatchObject({ id: member.id });
    for (const authorization of ["", "Bearer x", "Basic eDp5"]) {
      expect((await call(IDENTITY, session, { authorization })).status).toBe(401);
    }
  });

  test("ends when it has not been used for long, at the latest after its lifetime, and with its user", async () => {
    const idleSeconds = 3600;
    const expiresAt = new Date(plane.plane.app.now().getTime() + 3 * HOUR_MS);
    const used = await newSession({ idleSeconds, expiresAt });
    const unused = await newSession({ idleSeconds, expiresAt });
    const others = await newSession();
    for (const minutes of [0, 50, 50, 50]) {
      plane.advance(minutes * 60_000);
      expect((await call(IDENTITY, used)).status).toBe(200);
      const now = plane.plane.app.now().getTime();
      await eventually(async () => {
        const [row] = await db().point<{ at: Date | null }[]>`
          select max(last_used_at) as at from tokens where idle_seconds is not null`;
        return (row?.at?.getTime() ?? 0) > now - 60_000;
      }, "the use is written");
    }
    const expired = await call(IDENTITY, unused);
    expect([expired.status, expired.message]).toEqual([401, "the token has expired"]);
    plane.advance(HOUR_MS);
    expect((await call(IDENTITY, used)).message).toBe("the token has expired");
    await db().write`update users set status = ${UserStatus.SUSPENDED} where id = ${member.id}`;
    expect((await call(IDENTITY, others)).status).toBe(401);
    await db().write`update users set status = ${UserStatus.ACTIVE} where id = ${member.id}`;
  });

  test("of an account ends with the account", async () => {
    const { id } = await plane.addUser();
    const [row] = await db().write<{ account_id: string }[]>`
      update users set account_id = null where id = ${id} returning (select account_id from users where id = ${id}) as account_id`;
    const subject = {
      subjectId: row?.account_id ?? "",
      subjectPrincipal: Principal.ACCOUNT,
      organizationId: undefined,
    };
    const session = await newSession(subject);
    expect((await call(IDENTITY, session)).status).toBe(200);
    await db().write`delete from accounts where id = ${subject.subjectId}`;
    expect((await call(IDENTITY, session)).status).toBe(401);
  });
});

describe("ORG-39 what a browser writes comes from pages of this server", () => {
  const own = () => ({ origin: plane.url });
  const admin = async () => {
    const [row] = await db().point<
      { id: string }[]
    >`select id from users where role = ${OrganizationRole.ADMIN} limit 1`;
    return newSession({ subjectId: row?.id ?? "" });
  };

  test("a write from another origin, or from nowhere, is PERMISSION_DENIED; with a token it works", async () => {
    const session = await admin();
    const foreign: Record<string, string>[] = [
      {},
      { origin: "https://evil.example.org" },
      { origin: "null" },
      { origin: plane.url.replace("127.0.0.1", "localhost") },
      { ...own(), "sec-fetch-site": "cross-site" },
      { ...own(), "sec-fetch-site": "same-site" },
      { ...own(), "sec-fetch-site": "none" },
    ];
    for (const headers of foreign) {
      expect({ ...headers, ...(await write(session, headers)) }).toMatchObject({
        ...headers,
        ...{ status: 403, code: "permission_denied" },
      });
    }
    const withToken = { origin: "https://evil.example.org", authorization: `Bearer ${plane.adminToken}` };
    expect((await write("", withToken)).status).toBe(200);
  });

  test("a write from a page of this server works, whichever header says so", async () => {
    const session = await admin();
    for (const headers of [own(), { "sec-fetch-site": "same-origin" }]) {
      expect((await write(session, headers)).status).toBe(200);
    }
  });

  test("reading asks for nothing, not even with GET", async () => {
    const session = await newSession();
    const query = `?connect=v1&encoding=json&message=${encodeURIComponent("{}")}`;
    const headers = { cookie: `berth_session=${session}`, origin: "https://evil.example.org" };
    const response = await fetch(`${plane.url}/gitpod.v1.${IDENTITY}${query}`, { headers });
    expect(response.status).toBe(200);
    // The page that made the browser ask gets no answer: it is for whoever brings no cookie.
    expect(response.headers.get("access-control-allow-credentials")).toBeNull();
  });

  test("over HTTP/2 too", async () => {
    const session = await admin();
    const client = connect(plane.url);
    const send = (origin: string) =>
      new Promise<number>((resolve, reject) => {
        const stream = client.request({
          ...{ ":method": "POST", ":path": `/gitpod.v1.${WRITE}`, "content-type": "application/json" },
          ...{ cookie: `berth_session=${session}`, origin },
        });
        stream.on("response", (headers) => resolve(Number(headers[":status"])));
        stream.on("error", reject);
        stream.resume();
        stream.end(JSON.stringify({ ...newRunner, provider }));
      });
    expect([await send("https://evil.example.org"), await send(plane.url)]).toEqual([403, 200]);
    await new Promise<void>((resolve) => client.close(resolve));
  });

  test("behind a proxy that keeps the host", async () => {
    const session = await admin();
    const send = (origin: string) =>
      new Promise<number>((resolve, reject) => {
        const headers = { host: "berth.example.org", origin, cookie: `berth_session=${session}` };
        const sent = httpRequest(
          `${plane.url}/gitpod.v1.${WRITE}`,
          { method: "POST", headers: { ...headers, "content-type": "application/json" } },
          (response) => {
            response.resume();
            resolve(response.statusCode ?? 0);
          },
        );
        sent.on("error", reject);
        sent.end(JSON.stringify({ ...newRunner, provider }));
      });
    expect([await send("https://berth.example.org"), await send(plane.url)]).toEqual([200, 403]);
  });

  const methods = services.flatMap((service) => service.methods as readonly DescMethod[]);
  const path = (method: DescMethod) => `/${method.parent.typeName}/${method.name}`;

  test("no RPC writes for a foreign page, and none is open to an account that is not to be", async () => {
    const [session, account] = [await admin(), await newAccountSession()];
    for (const method of methods.filter(({ methodKind }) => methodKind === "unary")) {
      const rule = ruleOf(method.parent, method);
      const body = toJson(method.input, create(method.input)) as object;
      const foreign = await call(path(method), session, { origin: "https://evil.example.org" }, body);
      if (!rule.read && !rule.public)
        expect(`${path(method)} ${foreign.code}`).toBe(`${path(method)} permission_denied`);
      if (rule.public || rule.principals.includes(Principal.ACCOUNT)) continue;
      const closed = await call(path(method), account, own(), body);
      expect(`${path(method)} ${closed.code}`).toBe(`${path(method)} permission_denied`);
    }
    expect(methods.length).toBeGreaterThan(150);
  });
});

test("PLT-8 GetIDToken is refused to an account, which has no user", async () => {
  const answer = await call(
    "IdentityService/GetIDToken",
    await newAccountSession(),
    { origin: plane.url },
    { audience: ["a"] },
  );
  expect(answer).toMatchObject({ status: 403, code: "permission_denied" });
});

describe("rules", () => {
  test("cookies are secure wherever they leave the machine", () => {
    expect(cookieRules("https://berth.example.org/base")).toEqual({
      ...{ secure: true, session: "__Host-berth_session", flow: "__Host-berth_oidc" },
    });
    expect(cookieRules("http://berth.example.org").secure).toBe(true);
    for (const url of ["http://127.0.0.1:8080", "http://localhost", "http://[::1]:1", "http://127.1.2.3"]) {
      expect(cookieRules(url)).toEqual({ secure: false, session: "berth_session", flow: "berth_oidc" });
    }
    for (const url of ["http://127.0.0.1.example.org", "http://10.0.0.1", "https://localhost"]) {
      expect(cookieRules(url).secure).toBe(true);
    }
  });

  test("a cookie is found by its whole name", () => {
    expect(cookieValue("xa=1; a=2=3 ; a=4", "a")).toBe("2=3");
    expect([cookieValue("ab=1; a", "a"), cookieValue(null, "a"), cookieValue("", "a")]).toEqual([
      undefined,
      undefined,
      undefined,
    ]);
  });

  test("an origin is that of the host, with its port", () => {
    const at = (origin: string | null, host: string | undefined) => isSameOrigin({ origin, fetchSite: null, host });
    expect([at("https://a.example", "A.example"), at("http://a.example:81", "a.example:81")]).toEqual([true, true]);
    const foreign = [
      at("https://a.example:444", "a.example"),
      at("https://a.example.evil", "a.example"),
      at("a.example", "a.example"),
      at("file://a.example", "a.example"),
      at("", undefined),
      at(null, ""),
    ];
    expect(foreign).toEqual(foreign.map(() => false));
  });

  test.each([
    ["/auth/cli?a=b#c", "/auth/cli?a=b#c"],
    ["https://berth.example.org/x", "/x"],
    ["x", "/x"],
    ["", "/base/"],
    ["https://dash.example.org/y?z", "https://dash.example.org/y?z"],
    ["https://evil.example.org/", "/base/"],
    ["//evil.example.org", "/base/"],
    ["/.//evil.example.org", "/base/"],
    ["/\\evil.example.org", "/base/"],
    ["\\\\evil.example.org", "/base/"],
    ["/\t/evil.example.org", "/base/"],
    ["https://berth.example.org@evil.example.org", "/base/"],
    ["https://u@berth.example.org/", "/base/"],
    ["http://berth.example.org/", "/base/"],
    ["javascript:alert(1)", "/base/"],
    ["https://dash.example.org.evil/", "/base/"],
  ])("one returns from %j to %j", (text, target) => {
    expect(safeReturnTo(text, "https://berth.example.org/base/", ["https://dash.example.org"])).toBe(target);
    expect(safeReturnTo("//x", "https://berth.example.org", [])).toBe("/");
  });
});
