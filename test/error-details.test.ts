import { Code } from "@connectrpc/connect";
import Gitpod from "@gitpod/sdk";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import { TokenKind } from "../src/domain/tokens.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { refusal } from "./harness/refusal.ts";
import { changePolicies, connectRunner, mint } from "./harness/tenants.ts";

let helpful: TestPlane;
let plain: TestPlane;

beforeAll(async () => {
  helpful = await startTestPlane({ BERTH_DOCS_URL: "https://docs.example.org/berth/" });
  plain = await startTestPlane();
});

afterAll(async () => {
  await helpful[Symbol.asyncDispose]();
  await plain[Symbol.asyncDispose]();
});

/** The details of a refusal by a handler, and of one that comes before the message is read. */
async function refused(plane: TestPlane) {
  await changePolicies(plane, { allowLocalRunners: false });
  const runner = { name: "local", provider: RunnerProvider.LINUX_HOST };
  const reader = await plane.addUser({ readOnlyToken: true });
  const errors = [
    await refusal(plane.admin.runners.createRunner(runner)),
    await refusal(reader.client.runners.createRunner(runner)),
  ];
  return errors.map((error) => error.findDetails(ActionableErrorDetailsSchema)[0]);
}

test("what a person can do something about has a code, a sentence and, with a base for help links, a link", async () => {
  const link = (code: string) => ({
    ...{ actionId: "read_docs", label: "Read about it" },
    target: { case: "externalUrl", value: `https://docs.example.org/berth/errors#${code}` },
  });
  expect(await refused(helpful)).toMatchObject([
    { errorCode: "allow_local_runners", actions: [link("allow_local_runners")] },
    {
      errorCode: "AUTH_TOKEN_READ_ONLY",
      userMessage: "this token may only read",
      actions: [link("auth_token_read_only")],
    },
  ]);
  expect((await refused(plain)).map((details) => details?.actions)).toEqual([[], []]);
});

interface Answer {
  status: number;
  code: string;
  /** Types of the details, without their package. */
  details: string[];
  headers: Headers;
}

/** A call as REST clients make it. */
async function post(plane: TestPlane, token: string, rpc: string, body: object = {}): Promise<Answer> {
  const response = await fetch(`${plane.url}/api/gitpod.v1.${rpc}`, {
    method: "POST",
    headers: { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) },
    body: JSON.stringify(body),
  });
  const { code = "", details = [] } = (await response.json()) as { code?: string; details?: { type: string }[] };
  const { status, headers } = response;
  return { status, code, details: details.map(({ type }) => type.split(".").at(-1) ?? ""), headers };
}

/** Headers that tell clients what to do. */
const advice = ({ headers }: Answer) =>
  Object.fromEntries(
    ["www-authenticate", "x-should-retry", "retry-after", "ratelimit-retryafter"].flatMap((name) =>
      headers.has(name) ? [[name, headers.get(name)]] : [],
    ),
  );

describe("over HTTP, each code has its status, details and headers", () => {
  let plane: TestPlane;
  let member: TestUser;
  const NO_RETRY = { "x-should-retry": "false" };
  const local = { name: "local", provider: "RUNNER_PROVIDER_LINUX_HOST" };

  beforeAll(async () => {
    plane = await startTestPlane({}, { runnerCallMs: 25, streamsPerPrincipal: 0 });
    member = await plane.addUser();
  });

  afterAll(() => plane[Symbol.asyncDispose]());

  test("UNAUTHENTICATED: 401 and how to authenticate; an expired token says so", async () => {
    const rpc = "IdentityService/GetAuthenticatedIdentity";
    const none = await post(plane, "", rpc);
    expect(none).toMatchObject({ status: 401, code: "unauthenticated", details: [] });
    expect(advice(none)).toEqual({ "www-authenticate": "Bearer" });
    const expiresAt = new Date(Date.now() - 1000);
    const kind = TokenKind.PERSONAL_ACCESS;
    const expired = await post(plane, await mint(plane, { kind, subjectId: member.id, expiresAt }), rpc);
    expect(expired).toMatchObject({ status: 401, details: ["ActionableErrorDetails"] });
  });

  test("PERMISSION_DENIED: 403; NOT_FOUND: 404; neither says anything about trying again", async () => {
    const denied = await post(plane, member.token, "RunnerService/CreateRunner", local);
    expect(denied).toMatchObject({ status: 403, code: "permission_denied" });
    const missing = await post(plane, plane.adminToken, "RunnerService/GetRunner", { runnerId: uuidv7() });
    expect(missing).toMatchObject({ status: 404, code: "not_found" });
    expect([advice(denied), advice(missing)]).toEqual([{}, {}]);
  });

  test("INVALID_ARGUMENT: 400 and what is wrong where, by the rules of the schema and beyond them", async () => {
    const byRule = await post(plane, plane.adminToken, "RunnerService/GetRunner", { runnerId: "x" });
    const own = await post(plane, plane.adminToken, "EventService/ListAuditLogs", { sort: { field: "x" } });
    for (const answer of [byRule, own]) {
      expect(answer).toMatchObject({ status: 400, code: "invalid_argument", details: ["Violations"] });
      expect(advice(answer)).toEqual({});
    }
  });

  test("FAILED_PRECONDITION: 400; of a policy with its name", async () => {
    await changePolicies(plane, { allowLocalRunners: false });
    const answer = await post(plane, plane.adminToken, "RunnerService/CreateRunner", local);
    await changePolicies(plane, { allowLocalRunners: true });
    const details = ["ActionableErrorDetails", "PolicyEnforcedFailedPreconditionDetails"];
    expect(answer).toMatchObject({ status: 400, code: "failed_precondition", details });
    expect(advice(answer)).toEqual({});
  });

  test("UNIMPLEMENTED: 501, whoever asks", async () => {
    for (const rpc of ["AccountService/BlockAccount", "TeamService/ListTeams"])
      expect(await post(plane, "", rpc)).toMatchObject({ status: 501, code: "unimplemented" });
  });

  test("RESOURCE_EXHAUSTED of a quota: 429, not to be tried again", async () => {
    const answer = await post(plane, member.token, "EventService/WatchEvents");
    // The body of a stream in JSON lines is one plain message.
    expect(answer.status).toBe(415);
    const response = await fetch(`${plane.url}/api/gitpod.v1.EventService/WatchEvents`, {
      method: "POST",
      headers: {
        ...{ "content-type": "application/json", accept: "application/jsonl" },
        authorization: `Bearer ${member.token}`,
      },
      body: "{}",
    });
    const { code, details } = (await response.json()) as { code: string; details: { type: string }[] };
    expect([response.status, code]).toEqual([429, "resource_exhausted"]);
    expect(details.map(({ type }) => type)).toEqual(["gitpod.v1.ActionableErrorDetails"]);
    expect(advice({ headers: response.headers } as Answer)).toEqual(NO_RETRY);
  });

  test("ALREADY_EXISTS: 409, not to be tried again; ABORTED: 409, may be", async () => {
    const group = { organizationId: plane.organizationId, name: "Twice" };
    await post(plane, plane.adminToken, "GroupService/CreateGroup", group);
    const again = await post(plane, plane.adminToken, "GroupService/CreateGroup", group);
    expect(again).toMatchObject({ status: 409, code: "already_exists" });
    expect(advice(again)).toEqual(NO_RETRY);
    const { runner } = await connectRunner(plane);
    const older = runner.twin(plane.url);
    await runner.register();
    const lost = await refusal(older.heartbeat());
    expect(lost.code).toBe(Code.Aborted);
    expect(lost.metadata.get("x-should-retry")).toBeNull();
  });

  test("DEADLINE_EXCEEDED: 504", async () => {
    const { runner } = await connectRunner(plane);
    const request = { runnerId: runner.id, contextUrl: "https://git.example.org/a/b" };
    const answer = await post(plane, plane.adminToken, "RunnerService/ParseContextURL", request);
    expect(answer).toMatchObject({ status: 504, code: "deadline_exceeded" });
    expect(advice(answer)).toEqual({});
  });
});

describe("too many calls", () => {
  let plane: TestPlane;

  beforeAll(async () => {
    plane = await startTestPlane({ BERTH_RATE_LIMIT: "1" });
  });

  afterAll(() => plane[Symbol.asyncDispose]());

  const IDENTITY = "IdentityService/GetAuthenticatedIdentity";

  test("a user may call so often a second, four times that at once, and is told when to come back; others go on", async () => {
    const [one, other] = [await plane.addUser(), await plane.addUser()];
    for (let index = 0; index < 4; index += 1) expect((await post(plane, one.token, IDENTITY)).status).toBe(200);
    const refused = await post(plane, one.token, IDENTITY);
    expect(refused).toMatchObject({ status: 429, code: "resource_exhausted" });
    expect(refused.details).toEqual(["ActionableErrorDetails", "RetryInfo"]);
    expect(advice(refused)).toEqual({ "retry-after": "1", "ratelimit-retryafter": "1" });
    expect((await post(plane, other.token, IDENTITY)).status).toBe(200);
    const error = await refusal(one.client.identity.getAuthenticatedIdentity({}));
    expect(error.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode).toBe("PLATFORM_LIMIT_RATE");
    expect(error.findDetails(RetryInfoSchema)[0]?.retryDelay).toBeDefined();
  });

  test("another token of the same user is no way around; tokens of a service account count for it", async () => {
    const user = await plane.addUser();
    const second = await mint(plane, { kind: TokenKind.PERSONAL_ACCESS, subjectId: user.id });
    for (let index = 0; index < 4; index += 1) await post(plane, user.token, IDENTITY);
    expect((await post(plane, second, IDENTITY)).status).toBe(429);
  });

  test("runners are exempt", async () => {
    const { runnerId, exchangeToken } = await plane.admin.runners
      .createRunner({
        ...{ name: "busy", provider: RunnerProvider.LINUX_HOST },
      })
      .then(({ runner, exchangeToken }) => ({ runnerId: runner!.runnerId, exchangeToken }));
    const { accessToken } = await plane.admin.identity.exchangeToken({ exchangeToken });
    for (let index = 0; index < 20; index += 1)
      expect((await post(plane, accessToken, "RunnerService/GetRunner", { runnerId })).status).toBe(200);
  });

  test("what needs no credential is limited to 30 calls a minute and address", async () => {
    const exchange = () => post(plane, "", "IdentityService/ExchangeToken", { exchangeToken: "x" });
    const statuses: number[] = [];
    while (statuses.at(-1) !== 429 && statuses.length < 40) statuses.push((await exchange()).status);
    expect(statuses.slice(0, -1).every((status) => status === 401)).toBe(true);
    expect(statuses.length).toBeLessThanOrEqual(31);
    expect(advice(await exchange())).toMatchObject({ "retry-after": expect.stringMatching(/^[12]$/) });
  });
});

test("the official SDK tries again when it is worth it, and only then", async () => {
  const plane = await startTestPlane({ BERTH_RATE_LIMIT: "2" });
  const user = await plane.addUser({ role: OrganizationRole.ADMIN });
  let requests = 0;
  const sdk = new Gitpod({
    ...{ baseURL: `${plane.url}/api`, bearerToken: user.token },
    fetch: (url, init) => {
      requests += 1;
      return fetch(url, init);
    },
  });
  const errorOf = (call: Promise<unknown>) =>
    call.then(
      () => undefined,
      (error: unknown) => error,
    );
  const scope = { userId: user.id };
  const secret = { name: "ONLY_ONCE", value: "x", environmentVariable: true, scope };
  await sdk.secrets.create(secret);
  requests = 0;
  expect(await errorOf(sdk.secrets.create(secret))).toBeInstanceOf(Gitpod.ConflictError);
  expect(await errorOf(sdk.runners.retrieve({ runnerId: uuidv7() }))).toBeInstanceOf(Gitpod.NotFoundError);
  expect(await errorOf(sdk.runners.retrieve({ runnerId: "x" }))).toBeInstanceOf(Gitpod.BadRequestError);
  expect(requests).toBe(3);
  // Used up: it waits as long as it is told, and gets its answer.
  const found = await Promise.all(Array.from({ length: 8 }, () => sdk.identity.getAuthenticatedIdentity({})));
  expect(new Set(found.map(({ subject }) => subject?.id))).toEqual(new Set([user.id]));
  expect(requests).toBeGreaterThan(3 + 8);
  await plane[Symbol.asyncDispose]();
});
