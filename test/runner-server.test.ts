import { randomBytes } from "node:crypto";
import { request } from "node:http";
import { connect as connectHttp2 } from "node:http2";
import { Code, createClient, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED } = EnvironmentPhase;

let git: GitServer;
let plane: FakeControlPlane;
let runner: TestRunner;
let id: string;
let other: string;
beforeAll(async () => {
  git = await startGitServer();
  const repository = await git.createRepository("served");
  plane = await FakeControlPlane.start();
  runner = await TestRunner.create(plane, git.host);
  await runner.start();
  id = plane.create(contentOf(fromGit(repository.url)));
  other = plane.create();
  await plane.untilPhase(id, RUNNING);
  await plane.untilPhase(other, RUNNING);
});
afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await git.close();
});

const authorization =
  (token: string): Interceptor =>
  (next) =>
  (request) => {
    request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };

const sectionsOf = (text: string) =>
  text
    .split("\n")
    .filter((line) => line.startsWith("[section-"))
    .map((line) => {
      const [, mark, json = "{}"] = /^\[section-(\w+)\] (.*)$/.exec(line) ?? [];
      const { id: section, outcome } = JSON.parse(json) as { id: string; outcome?: string };
      return `${mark} ${section.split("-")[0]}${outcome ? ` ${outcome.replace("LOG_SECTION_OUTCOME_", "")}` : ""}`;
    });

test("ENV-29: a log is sections in order, and ends when the environment has stopped", async () => {
  const stopping = plane.create();
  await plane.untilPhase(stopping, RUNNING);
  const token = plane.grant(stopping, Kind.ENVIRONMENT_LOGS);
  const stored = await runner.logs(stopping, token, "?follow=false");
  expect(stored.headers.get("content-type")).toBe("text/plain; charset=utf-8");
  expect(sectionsOf(await stored.text())).toEqual([
    ...["create machine", "end machine SUCCESS", "create content", "end content SUCCESS"],
    ...["create devcontainer", "end devcontainer SUCCESS", "create system"],
  ]);
  const live = await runner.logs(stopping, token);
  const reading = live.text();
  plane.stopEnvironment(stopping);
  const text = await reading;
  expect(plane.environment(stopping).status?.phase).toBe(STOPPED);
  expect(sectionsOf(text).at(-1)).toBe("end system SUCCESS");
  expect(text).toMatch(/\[section-create\] \{"id":"system-\d+","title":"system","continuous":true\}/);
  const after = await runner.logs(stopping, token);
  expect(await after.text()).toBe(text);
});

test("ENV-29: the log of a failed start can be read, without credentials in it", async () => {
  const failing = plane.create(contentOf(fromGit(git.url("nowhere"))));
  await plane.untilPhase(failing, STOPPED);
  const text = await (await runner.logs(failing, plane.grant(failing, Kind.ENVIRONMENT_ACCESS))).text();
  expect(text).toContain(`repository not found: ${git.url("nowhere")}`);
  expect(sectionsOf(text)).toContain("end content FAILURE");
});

test("ENV-29: log endpoint codes", async () => {
  const expired = plane.grant(id, Kind.ENVIRONMENT_LOGS, new Date(Date.now() - 1000));
  const status = async (environmentId: string, token: string) => {
    const response = await runner.logs(environmentId, token, "?follow=false");
    await response.body?.cancel();
    return response.status;
  };
  expect(await status(id, "")).toBe(401);
  expect(await status(id, "junk")).toBe(401);
  expect(await status(id, tokenText(TokenKind.LOGS, randomBytes))).toBe(401);
  expect(await status(id, expired)).toBe(401);
  expect(await status(id, plane.grant(id, Kind.PORT_ACCESS))).toBe(401);
  expect(await status(id, plane.grant(id, Kind.ENVIRONMENT))).toBe(401);
  expect(await status(id, plane.grant(other, Kind.ENVIRONMENT_LOGS))).toBe(403);
  const unknown = uuidv7();
  expect(await status(unknown, plane.grant(unknown, Kind.ENVIRONMENT_LOGS))).toBe(404);
  expect(await status(id, plane.grant(id, Kind.ENVIRONMENT_LOGS))).toBe(200);
  expect((await fetch(`${runner.baseUrl}/environments/${id}/nothing`)).status).toBe(404);
  expect((await runner.logs(id, "", "", { method: "POST" })).status).toBe(405);
  const refused = plane.create({ kernelControlsConfig: { veto: { exec: { enabled: true } } } });
  await plane.untilPhase(refused, STOPPED);
  expect(await status(refused, plane.grant(refused, Kind.ENVIRONMENT_LOGS))).toBe(502);
});

test("ENV-29: before the supervisor is up a log is not ready; later it begins at the beginning", async () => {
  plane.withholdTokens = true;
  const coming = plane.create();
  const token = plane.grant(coming, Kind.ENVIRONMENT_LOGS);
  await plane.until(coming, (each) => Boolean(each.status?.environmentUrls?.logs), "the address of the log");
  const early = await runner.logs(coming, token);
  expect([early.status, await early.text()]).toEqual([502, "not ready yet\n"]);
  plane.withholdTokens = false;
  await plane.untilPhase(coming, RUNNING);
  const text = await (await runner.logs(coming, token, "?follow=false")).text();
  expect(sectionsOf(text).slice(0, 2)).toEqual(["create machine", "end machine SUCCESS"]);
});

test("ENV-47: tokens that a runner must not see are refused and shown to nobody", async () => {
  const foreign = [
    TokenKind.PERSONAL_ACCESS,
    TokenKind.SERVICE_ACCOUNT,
    TokenKind.SERVICE_ACCOUNT_ACCESS,
    TokenKind.RUNNER_ACCESS,
  ];
  for (const kind of foreign) {
    const token = tokenText(kind, randomBytes);
    expect((await runner.logs(id, token)).status).toBe(401);
    await expect(runner.ops(id, token).listCapabilities({})).rejects.toMatchObject({ code: Code.Unauthenticated });
    expect(plane.introspected).not.toContain(token);
  }
});

test("operations need a token for the environment, and the environment to run", async () => {
  const code = async (environmentId: string, token: string) =>
    await runner
      .ops(environmentId, token)
      .exec({ command: "true" })
      .then(
        () => undefined,
        (error: { code: Code }) => error.code,
      );
  expect(await code(id, "")).toBe(Code.Unauthenticated);
  expect(await code(id, plane.grant(id, Kind.ENVIRONMENT_LOGS))).toBe(Code.Unauthenticated);
  expect(await code(id, plane.grant(id, Kind.PORT_ACCESS))).toBe(Code.Unauthenticated);
  expect(await code(id, plane.grant(other, Kind.ENVIRONMENT_ACCESS))).toBe(Code.PermissionDenied);
  expect(await code(id, plane.grant(id, Kind.ENVIRONMENT))).toBeUndefined();
  const stopped = plane.create();
  await plane.untilPhase(stopped, RUNNING);
  plane.stopEnvironment(stopped);
  await plane.untilPhase(stopped, STOPPED);
  expect(await code(stopped, plane.grant(stopped, Kind.ENVIRONMENT_ACCESS))).toBe(Code.Unavailable);
});

test("operations speak Connect, gRPC and gRPC-Web, on HTTP/1.1 and HTTP/2, in binary and JSON", async () => {
  const interceptors = [authorization(plane.grant(id, Kind.ENVIRONMENT_ACCESS))];
  const baseUrl = `${runner.baseUrl}/environments/${id}/ops`;
  for (const transport of [
    createConnectTransport({ baseUrl, httpVersion: "1.1", interceptors, useBinaryFormat: false }),
    createConnectTransport({ baseUrl, httpVersion: "2", interceptors }),
    createGrpcTransport({ baseUrl, interceptors }),
    createGrpcWebTransport({ baseUrl, httpVersion: "1.1", interceptors }),
  ]) {
    const ops = createClient(EnvironmentOpsService, transport);
    expect(await ops.exec({ command: "echo out; exit 3" })).toMatchObject({ stdout: "out\n", exitCode: 3 });
    await expect(ops.readFile({ path: "/no/such" })).rejects.toMatchObject({ code: Code.NotFound });
  }
});

test("a request without a usable token is refused before its body is read", async () => {
  const refused = await new Promise<number | undefined>((resolve, reject) => {
    const url = `${runner.baseUrl}/environments/${id}/ops/supervisor.v1.EnvironmentOpsService/Exec`;
    const headers = { "content-type": "application/json", "content-length": "1000000" };
    const sending = request(url, { method: "POST", headers }, (response) => {
      resolve(response.statusCode);
      sending.destroy();
    });
    sending.once("error", reject);
    sending.write("{");
  });
  expect(refused).toBe(401);
});

test("browsers may ask from anywhere", async () => {
  for (const path of ["logs", "ops/supervisor.v1.EnvironmentOpsService/Exec"]) {
    const url = `${runner.baseUrl}/environments/${id}/${path}`;
    const preflight = await fetch(url, {
      method: "OPTIONS",
      headers: { origin: "https://x", "access-control-request-method": "POST" },
    });
    expect(preflight.status).toBe(204);
    expect(preflight.headers.get("access-control-allow-headers")).toContain("authorization");
    const refused = await fetch(url, { headers: { origin: "https://x" } });
    expect(refused.headers.get("access-control-allow-origin")).toBe("*");
    await refused.body?.cancel();
  }
});

test("health, readiness and metrics; HTTP/2 on the same port", async () => {
  expect((await fetch(`${runner.baseUrl}/healthz`)).status).toBe(200);
  expect((await fetch(`${runner.baseUrl}/readyz`)).status).toBe(200);
  expect(await (await fetch(`${runner.baseUrl}/metrics`)).text()).toMatch(/berth_runner_connected 1/);
  const session = connectHttp2(runner.baseUrl);
  const stream = session.request({ ":path": "/healthz" });
  const status = await new Promise((resolve) => stream.once("response", (headers) => resolve(headers[":status"])));
  session.close();
  expect(status).toBe(200);
});
