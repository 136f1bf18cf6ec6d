import { request } from "node:http";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AdmissionLevel, EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { portRoute, portUrl } from "../src/runner/ports/route.ts";
import { getEnvironment, reaches } from "./harness/environments.ts";
import { freePort } from "./harness/free-port.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { admitPort, runningEnvironment, servePort } from "./harness/ports.ts";

const { EVERYONE, ORGANIZATION, CREATOR_ONLY, UNSPECIFIED } = AdmissionLevel;
const TIMEOUT_MS = 90_000;

let plane: TestPlane;
let host: TestHost;
let creator: TestUser;
let member: TestUser;
let id: string;
let port: number;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  host = await startHost(plane);
  [creator, member] = [await plane.addUser(), await plane.addUser()];
  [id, port] = [await running(creator), await freePort()];
  await servePort(creator, id, port, "first");
}, TIMEOUT_MS);

afterAll(async () => {
  await host[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
}, TIMEOUT_MS);

const running = (user: TestUser) => runningEnvironment(user, host.classId);
const admit = (admission: AdmissionLevel, environmentId = id, number = port) =>
  admitPort(creator, environmentId, number, admission);
const tokenFor = async (user: TestUser, environmentId = id, number = port) =>
  (await user.client.environments.createPortAccessToken({ environmentId, port: number })).accessToken;
const bearer = (token: string) => ({ headers: { authorization: `Bearer ${token}` }, redirect: "manual" as const });
const statusOf = async (url: string, init: RequestInit = {}) =>
  (await fetch(url, { redirect: "manual", ...init })).status;

describe("ENV-31 who gets through", () => {
  test("everybody, without a token, where the port is open to everyone", async () => {
    const url = await admit(EVERYONE);
    // ENV-47: below the runner's public URL.
    expect(url).toBe(`${host.url}/environments/${id}/ports/${port}/`);
    const answer = await fetch(`${url}a/b?c=d`, { method: "POST", body: "hello", headers: { "x-own": "kept" } });
    const seen = (await answer.json()) as { url: string; headers: Record<string, string> };
    expect(seen).toMatchObject({ who: "first", method: "POST", url: "/a/b?c=d", body: "hello" });
    expect(seen.headers).toMatchObject({
      "x-own": "kept",
      "x-forwarded-proto": "http",
      "x-forwarded-for": "127.0.0.1",
      "x-forwarded-prefix": `/environments/${id}/ports/${port}`,
    });
  });

  test("members of the organization, where it is open to them; nobody else", async () => {
    const url = await admit(ORGANIZATION);
    expect(await statusOf(url)).toBe(401);
    expect(await statusOf(url, bearer(await tokenFor(member)))).toBe(200);
    expect(await statusOf(url, bearer(plane.adminToken))).toBe(401);
  });

  test("the creator alone, where it is open to no one else; what was granted before is void", async () => {
    const url = await admit(ORGANIZATION);
    const token = await tokenFor(member);
    expect(await statusOf(url, bearer(token))).toBe(200);
    await admit(CREATOR_ONLY);
    expect(await statusOf(url, bearer(token))).toBe(403);
    expect(await statusOf(url, bearer(await tokenFor(creator)))).toBe(200);
    const { accessToken } = await creator.client.environments.createEnvironmentAccessToken({ environmentId: id });
    expect(await statusOf(url, bearer(accessToken))).toBe(200);
  });

  test("a token for one port opens no other, and none of another environment", async () => {
    await admit(CREATOR_ONLY);
    const token = await tokenFor(creator);
    const second = await freePort();
    const url = await admit(CREATOR_ONLY, id, second);
    expect(await statusOf(url, bearer(token))).toBe(403);
    const other = await running(creator);
    expect(await statusOf(await admit(CREATOR_ONLY, other, port), bearer(token))).toBe(403);
  });

  test("nobody once it is closed, and nobody while the environment does not run", async () => {
    const url = await admit(EVERYONE);
    expect(await admit(UNSPECIFIED)).toBe("closed");
    expect(await statusOf(url)).toBe(404);
    const stopping = await running(creator);
    const theirs = await admit(EVERYONE, stopping);
    await creator.client.environments.stopEnvironment({ environmentId: stopping });
    await reaches(creator.client, stopping, EnvironmentPhase.STOPPED);
    expect(await statusOf(theirs)).toBe(502);
    expect((await getEnvironment(creator.client, stopping)).status?.environmentUrls?.ports).toEqual([]);
  });
});

describe("browsers", () => {
  const html = { headers: { accept: "text/html" }, redirect: "manual" as const };

  test(
    "a person is sent to sign in, and comes back with a token that becomes a cookie",
    async () => {
      const url = await admit(CREATOR_ONLY);
      const sent = await fetch(`${url}page?x=1`, html);
      const location = new URL(sent.headers.get("location") ?? "");
      expect([sent.status, location.origin, location.pathname]).toEqual([302, plane.url, "/auth/port"]);
      expect(Object.fromEntries(location.searchParams)).toEqual({
        ...{ environment_id: id, port: String(port), return_to: `${url}page?x=1` },
      });
      const token = await tokenFor(creator);
      const back = await fetch(`${url}page?x=1&berth_port_token=${token}`, html);
      expect([back.status, back.headers.get("location")]).toEqual([303, `${new URL(url).pathname}page?x=1`]);
      const cookie = back.headers.get("set-cookie") ?? "";
      expect(cookie).toContain(`Path=${new URL(url).pathname}`);
      expect(cookie).toMatch(/HttpOnly; SameSite=Lax$/);
      const answer = await fetch(url, {
        headers: { cookie: `theirs=1; berth_session=x; __Host-berth_session=x; ${cookie.split(";")[0]}` },
      });
      const { headers } = (await answer.json()) as { headers: Record<string, string> };
      // The service sees its own cookies only.
      expect(headers.cookie).toBe("theirs=1");
      await admit(ORGANIZATION);
      await admit(CREATOR_ONLY);
      expect(await statusOf(url, { headers: { cookie: cookie.split(";")[0] ?? "" } })).toBe(403);
    },
    TIMEOUT_MS,
  );

  test("a token that opens nothing sets no cookie, and a way back leads nowhere else", async () => {
    const url = await admit(CREATOR_ONLY);
    const bad = await fetch(`${url}?berth_port_token=x`, { redirect: "manual" });
    expect([bad.status, bad.headers.get("set-cookie")]).toEqual([401, null]);
    const token = await tokenFor(creator);
    const answer = await raw(`${new URL(url).pathname}/./%2e//evil.example/?berth_port_token=${token}`);
    expect(answer.headers.location).toMatch(new RegExp(`^${new URL(url).pathname.slice(0, -1)}/[^/]`));
  });

  test("a target that would be another host's, or none at all, is a path of the service like any other", async () => {
    const url = await admit(EVERYONE);
    for (const path of ["//[", "//evil.example/x", "//?berth_port_token", "/%zz"]) {
      const answer = await raw(`${new URL(url).pathname.slice(0, -1)}${path}`);
      expect([path, answer.status]).toEqual([path, 200]);
    }
  });

  test("redirects and cookies of a service stay below its prefix", async () => {
    const url = await admit(EVERYONE);
    const moved = await fetch(`${url}moved`, { redirect: "manual" });
    const prefix = new URL(url).pathname.slice(0, -1);
    expect(moved.headers.get("location")).toBe(`${prefix}/there`);
    expect(moved.headers.get("set-cookie")).toBe(`a=b; Path=${prefix}/`);
  });

  test("a bearer token of the service's own reaches it, ours does not", async () => {
    const url = await admit(EVERYONE);
    const headersSeen = async (authorization: string) =>
      ((await (await fetch(url, { headers: { authorization } })).json()) as { headers: Record<string, string> })
        .headers;
    expect((await headersSeen("Bearer their-own")).authorization).toBe("Bearer their-own");
    expect((await headersSeen(`Bearer ${await tokenFor(creator)}`)).authorization).toBeUndefined();
  });
});

describe("connections", () => {
  test(
    "a WebSocket passes, both ways, and ends when the port closes",
    async () => {
      const url = await admit(EVERYONE);
      const socket = new WebSocket(url.replace("http", "ws"));
      const echoed = new Promise<string>((resolve, reject) => {
        socket.onmessage = ({ data }) => resolve(String(data));
        socket.onerror = () => reject(new Error("the socket failed"));
      });
      socket.onopen = () => socket.send("hello");
      expect(await echoed).toBe("hello");
      const closed = new Promise<void>((resolve) => {
        socket.onclose = () => resolve();
      });
      await admit(UNSPECIFIED);
      await closed;
    },
    TIMEOUT_MS,
  );

  test("an upgrade without a token is refused", async () => {
    const url = await admit(CREATOR_ONLY);
    const socket = new WebSocket(url.replace("http", "ws"));
    await new Promise((resolve) => {
      socket.onerror = resolve;
    });
    expect(socket.readyState).not.toBe(WebSocket.OPEN);
  });

  test("ENV-32 what another environment listens on is not there", async () => {
    const other = await running(creator);
    const url = await admit(EVERYONE, other, port);
    const answer = await fetch(url);
    expect([answer.status, await answer.text()]).toEqual([502, "nothing of this environment listens on the port\n"]);
    await servePort(creator, other, await freePort(), "second");
    expect(await statusOf(url)).toBe(502);
  });

  test("the control plane's own port, on the same loopback, is nobody's", async () => {
    const own = Number(new URL(plane.url).port);
    expect(await statusOf(await admit(EVERYONE, id, own))).toBe(502);
    const unused = await freePort();
    expect(await statusOf(await admit(EVERYONE, id, unused))).toBe(502);
  });
});

describe("addresses", () => {
  const environmentId = "018f3e66-7a3b-7c3d-9e1f-2a3b4c5d6e7f";

  test("below a domain each port has a host of its own", () => {
    expect(portUrl("https://r.example.org", "ports.example.org", environmentId, 3000)).toBe(
      `https://3000--${environmentId}.ports.example.org`,
    );
    const host = `3000--${environmentId}.PORTS.example.org:443`;
    expect(portRoute(host, "/a?b", "ports.example.org")).toEqual({
      ...{ environmentId, port: 3000, prefix: "", target: "/a?b" },
    });
    for (const other of [`3000--${environmentId}.example.org`, `x.3000--${environmentId}.ports.example.org`, "x"]) {
      expect(portRoute(other, "/", "ports.example.org")).toBeUndefined();
    }
  });

  test("a path names environment and port, nothing else does", () => {
    const prefix = `/environments/${environmentId}/ports/3000`;
    expect(portRoute("h", prefix, undefined)).toMatchObject({ port: 3000, prefix, target: "/" });
    expect(portRoute("h", `${prefix}?a`, undefined)).toMatchObject({ target: "/?a" });
    for (const path of [`${prefix}0000`, `/environments/${environmentId}/ports/0`, `/x${prefix}`, "/"]) {
      expect(portRoute("h", path, undefined)).toBeUndefined();
    }
  });
});

/** A request whose path is sent as it is. */
function raw(path: string): Promise<{ status: number | undefined; headers: Record<string, unknown> }> {
  const { hostname, port: number } = new URL(host.url);
  return new Promise((resolve, reject) => {
    const sent = request({ host: hostname, port: number, path }, (answer) => {
      answer.resume();
      resolve({ status: answer.statusCode, headers: answer.headers });
    });
    sent.on("error", reject);
    sent.end();
  });
}
