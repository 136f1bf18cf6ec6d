import { create, fromBinary, fromJson, toBinary, toJson } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  EnvironmentSpec_SecretSchema,
  EnvironmentSpecSchema,
  GetEnvironmentRequestSchema,
  GetEnvironmentResponseSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { connectRunner, share } from "./harness/tenants.ts";

// GetEnvironment reads the environment along with the credential, for whom the credential stood for last. Each test makes
// one call that leaves such a guess behind, makes it wrong, and calls again.

let plane: TestPlane;
let runner: FakeRunner;
let owner: TestUser;
let environmentId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  const place = await connectRunner(plane, { maxEnvironments: 100 });
  runner = place.runner;
  owner = await plane.addUser();
  const spec = { machine: { class: place.classId } };
  const { environment } = await owner.client.environments.createEnvironment({ name: "Wanted", spec });
  environmentId = environment?.id ?? "";
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"/);
  await plane[Symbol.asyncDispose]();
});

const FORMATS = ["proto", "json"] as const;
type Format = (typeof FORMATS)[number];

const encode = (format: Format, id: string) => {
  const request = create(GetEnvironmentRequestSchema, { environmentId: id });
  return format === "proto"
    ? toBinary(GetEnvironmentRequestSchema, request)
    : JSON.stringify(toJson(GetEnvironmentRequestSchema, request));
};

async function call(token: string, format: Format, body: Uint8Array | string) {
  const response = await fetch(`${plane.url}/gitpod.v1.EnvironmentService/GetEnvironment`, {
    method: "POST",
    headers: { authorization: `Bearer ${token}`, "content-type": `application/${format}` },
    body: body as string,
  });
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (response.status !== 200) return { code: JSON.parse(Buffer.from(bytes).toString()).code as string };
  if (format === "proto") return fromBinary(GetEnvironmentResponseSchema, bytes);
  return fromJson(GetEnvironmentResponseSchema, JSON.parse(Buffer.from(bytes).toString()));
}

const get = (token: string, format: Format, id = environmentId) => call(token, format, encode(format, id));
const found = (name = "Wanted") => ({ environment: { id: environmentId, metadata: { name } } });

describe.each(FORMATS)("a call in %s after one with the same credential", (format) => {
  test("is answered as before, and for each id by itself", async () => {
    for (let round = 0; round < 3; round += 1) expect(await get(owner.token, format)).toMatchObject(found());
    expect(await get(owner.token, format, plane.organizationId)).toEqual({ code: "not_found" });
    expect(await get(owner.token, format, environmentId.toUpperCase())).toMatchObject(found());
  });

  test("sees what has changed", async () => {
    expect(await get(owner.token, format)).toMatchObject(found());
    await owner.client.environments.updateEnvironment({ environmentId, metadata: { name: `Another in ${format}` } });
    expect(await get(owner.token, format)).toMatchObject(found(`Another in ${format}`));
    await owner.client.environments.updateEnvironment({ environmentId, metadata: { name: "Wanted" } });
  });

  test("is refused once the token has been revoked, whatever it says", async () => {
    const { token } = await owner.client.users.createPersonalAccessToken({
      userId: owner.id,
      description: "soon gone",
    });
    expect(await get(token, format)).toMatchObject(found());
    const { personalAccessTokens } = await owner.client.users.listPersonalAccessTokens({});
    const { id } = personalAccessTokens.find(({ description }) => description === "soon gone") ?? {};
    await owner.client.users.deletePersonalAccessToken({ personalAccessTokenId: id ?? "" });
    expect(await get(token, format)).toEqual({ code: "unauthenticated" });
    expect(await get(token, format, "no id at all")).toEqual({ code: "unauthenticated" });
  });

  test("is refused at once for a user who has been suspended", async () => {
    const user = await plane.addUser({ role: OrganizationRole.ADMIN });
    expect(await get(user.token, format)).toMatchObject(found());
    await plane.plane.app.db.write`update users set status = ${UserStatus.SUSPENDED} where id = ${user.id}`;
    expect(await get(user.token, format)).toEqual({ code: "unauthenticated" });
  });

  test("finds no more than the roles of this moment let it, and no less", async () => {
    const user = await plane.addUser();
    const { organizationId, admin } = plane;
    const setRole = (role: OrganizationRole) => admin.organizations.setRole({ organizationId, userId: user.id, role });
    expect(await get(user.token, format)).toEqual({ code: "not_found" });
    await setRole(OrganizationRole.ADMIN);
    expect(await get(user.token, format)).toMatchObject(found());
    await setRole(OrganizationRole.MEMBER);
    expect(await get(user.token, format)).toEqual({ code: "not_found" });
    const unshare = await share(plane, user.id, {
      ...{ type: ResourceType.ENVIRONMENT, id: environmentId, role: ResourceRole.ENVIRONMENT_USER },
    });
    expect(await get(user.token, format)).toMatchObject(found());
    await unshare();
    expect(await get(user.token, format)).toEqual({ code: "not_found" });
  });

  test("that is malformed is told so only with a good credential", async () => {
    expect(await get(owner.token, format)).toMatchObject(found());
    const nonsense = format === "proto" ? Uint8Array.of(0x0a, 0xff, 1) : "{";
    expect(await call(owner.token, format, nonsense)).toEqual({ code: "invalid_argument" });
    expect(await get(owner.token, format, "no id at all")).toEqual({ code: "invalid_argument" });
    const { id, token } = await plane.addUser();
    expect(await get(token, format)).toEqual({ code: "not_found" });
    await plane.plane.app.db.write`delete from tokens where subject_id = ${id}`;
    expect(await call(token, format, nonsense)).toEqual({ code: "unauthenticated" });
  });

  test("shows secrets to the owner alone, and the rest to those who may look", async () => {
    const spec = await plane.plane.app.db.begin(async (tx) => {
      const [row] = await tx<
        { spec: Uint8Array }[]
      >`select spec from environments where id = ${environmentId} for update`;
      const spec = fromBinary(EnvironmentSpecSchema, row?.spec ?? new Uint8Array());
      spec.secrets = [create(EnvironmentSpec_SecretSchema, { id: environmentId, name: "SECRET" })];
      await tx`update environments set spec = ${toBinary(EnvironmentSpecSchema, spec)} where id = ${environmentId}`;
      return spec;
    });
    for (let round = 0; round < 2; round += 1) {
      expect(await get(owner.token, format)).toMatchObject({ environment: { spec } });
      const seen = await get(plane.adminToken, format);
      expect(seen).toMatchObject({ environment: { spec: { machine: spec.machine, secrets: [] } } });
    }
  });
});
