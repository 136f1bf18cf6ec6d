import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import {
  EnvironmentSpec_SecretSchema,
  EnvironmentSpec_Secret_Scope as SpecScope,
} from "../gen/gitpod/v1/environment_pb.js";
import { OrganizationPoliciesSchema } from "../gen/gitpod/v1/organization_pb.js";
import { CreateSecretRequestSchema, SecretSchema } from "../gen/gitpod/v1/secret_pb.js";
import { Refusal } from "../src/domain/errors.ts";
import {
  basicCredentials,
  type Candidate,
  checkNewSecret,
  effectiveSecrets,
  isNamedByPolicy,
  registryHost,
  Scope,
  specSecrets,
  valueProblems,
} from "../src/domain/secret.ts";

const ID = "01981a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b";
const OTHER_ID = "01981a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5c";

type Request = Exclude<MessageInitShape<typeof CreateSecretRequestSchema>, { $typeName: string }>;
type Mount = NonNullable<Request["mount"]>;

const variable: Mount = { case: "environmentVariable", value: true };
const file = (value: string): Mount => ({ case: "filePath", value });
const registry = (value: string): Mount => ({ case: "containerRegistryBasicAuthHost", value });
const organization = { scope: { case: "organizationId" as const, value: ID } };
const jfrog = { value: { case: "oidcJfrog" as const, value: { host: "j.example.org", providerName: "p" } } };

const request = (more: Request = {}) =>
  create(CreateSecretRequestSchema, { name: "TOKEN", value: "v", mount: variable, scope: organization, ...more });

function refusalOf(more: Request): Refusal {
  try {
    checkNewSecret(request(more));
  } catch (error) {
    if (error instanceof Refusal) return error;
    throw error;
  }
  throw new Error("it was accepted");
}

const fieldsOf = (more: Request) => refusalOf(more).problems.map(({ field }) => field);

describe("PLT-39 what a new secret may be", () => {
  test("its owner is the scope, or the project that the deprecated field names", () => {
    expect(checkNewSecret(request())).toEqual({ scope: Scope.ORGANIZATION, id: ID });
    expect(checkNewSecret(request({ scope: undefined, projectId: ID.toUpperCase() }))).toEqual({
      ...{ scope: Scope.PROJECT, id: ID },
    });
    const project = (value: string) => ({ scope: { case: "projectId" as const, value } });
    expect(checkNewSecret(request({ scope: project(ID.toUpperCase()), projectId: ID }))).toEqual({
      ...{ scope: Scope.PROJECT, id: ID },
    });
    expect(fieldsOf({ scope: undefined })).toEqual(["scope"]);
    expect(fieldsOf({ scope: {} })).toEqual(["scope"]);
    expect(fieldsOf({ scope: project(ID), projectId: OTHER_ID })).toEqual(["scope"]);
    expect(fieldsOf({ projectId: ID })).toEqual(["scope"]);
    expect(fieldsOf({ scope: undefined, projectId: "x" })).toEqual(["project_id"]);
  });

  test.each([
    ["no mount", { mount: { case: undefined } }, "mount"],
    ["a variable that is none", { mount: { case: "environmentVariable", value: false } }, "environment_variable"],
    ["an API that is none", { mount: { case: "apiOnly", value: false } }, "api_only"],
    ["a variable with a leading digit", { name: "1ABC" }, "name"],
    ["a path out of the place", { mount: file("/a/../b") }, "file_path"],
    ["a path to a folder", { mount: file("/a/") }, "file_path"],
    ["an unprintable path", { mount: file("/a\u0007b") }, "file_path"],
    ["an endless path", { mount: file(`/${"a".repeat(2000)}`) }, "file_path"],
    ["no host", { mount: registry(""), value: "u:p" }, "container_registry_basic_auth_host"],
    ["a host with a path", { mount: registry("https://r.example.org/v2"), value: "u:p" }, registryField()],
    ["a host with a user", { mount: registry("https://u@r.example.org"), value: "u:p" }, registryField()],
    ["another scheme", { mount: registry("ftp://r.example.org"), value: "u:p" }, registryField()],
    ["a port beyond all ports", { mount: registry("r.example.org:70000"), value: "u:p" }, registryField()],
    ["a login without a password", { mount: registry("r.example.org"), value: "user" }, "value"],
    ["no value", { value: "" }, "value"],
    ["a variable with NUL", { value: "a\0b" }, "value"],
    ["a value that is not verbatim", { source: { value: { case: "verbatim", value: false } } }, "source.verbatim"],
    ["a value that comes from elsewhere as well", { source: jfrog }, "value"],
    ["a proxy without hosts", { credentialProxy: { header: "Authorization" } }, "credential_proxy.target_hosts"],
    ["a proxy for a URL", proxy({ targetHosts: ["https://a"] }), "credential_proxy.target_hosts[0]"],
    ["a proxy for any host", proxy({ targetHosts: ["a.example", "*"] }), "credential_proxy.target_hosts[1]"],
    ["a proxy with a strange header", proxy({ header: "X Y" }), "credential_proxy.header"],
    ["a proxy without a header", proxy({ header: "" }), "credential_proxy.header"],
    ["a proxy with an unknown format", proxy({ format: 9 }), "credential_proxy.format"],
  ] as [string, Request, string][])("%s is refused", (_what, more, field) => {
    expect(fieldsOf(more)).toEqual([field]);
  });

  function registryField() {
    return "container_registry_basic_auth_host";
  }

  function proxy(more: object): Request {
    return { credentialProxy: { targetHosts: ["api.example.org", "*.example.org"], header: "X-Token", ...more } };
  }

  test.each(["PATH", "path", "Ld_Preload", "HOME", "PWD", "SHELL", "user"])(
    "the variable %s is the system's",
    (name) => {
      const { problems, details } = refusalOf({ name });
      expect(problems.map(({ field }) => field)).toEqual(["name"]);
      expect(details).toMatchObject([
        { desc: ActionableErrorDetailsSchema, value: { errorCode: "SECRET_NAME_RESERVED" } },
      ]);
      checkNewSecret(request({ name, mount: file("/etc/x") }));
    },
  );

  test("everything else passes: digits and NUL in files, logins in both forms, proxies, values from elsewhere", () => {
    for (const more of [
      { name: "1ABC", mount: file("/a/.b/c d"), value: "a\0b" },
      { mount: registry("r.example.org"), value: "user:pass:word" },
      { mount: registry("http://[::1]:5000"), value: Buffer.from("user:pass").toString("base64") },
      { mount: { case: "apiOnly", value: true } },
      { value: "", source: jfrog },
      { source: { value: { case: "verbatim", value: true } } },
      proxy({ format: 2 }),
    ] as Request[]) {
      expect(checkNewSecret(request(more))).toEqual({ scope: Scope.ORGANIZATION, id: ID });
    }
  });
});

test("a registry has one spelling, and a login too", () => {
  const hosts = [
    "HTTPS://R.Example.org:0443",
    "r.example.org:443",
    "docker.io",
    "a..b",
    "-a.example",
    "a b",
    "[::1]:5000",
  ];
  expect(hosts.map(registryHost)).toEqual([
    ...["r.example.org:443", "r.example.org:443", "docker.io"],
    ...[undefined, undefined, undefined, "[::1]:5000"],
  ]);
  const logins = ["user:pass", "dXNlcjpwYXNz", "dXNlcjpwYXNz\n", ":pass", "user:", "user", "us\ner:x", "/wA6eA=="];
  expect(logins.map(basicCredentials)).toEqual(["user:pass", "user:pass", ...Array(6).fill(undefined)]);
});

test("a new value has to suit the mount as the first one did", () => {
  const fields = (mount: Mount, value: string) =>
    valueProblems(create(SecretSchema, { mount }).mount, value).map(({ field }) => field);
  expect(fields(variable, "x")).toEqual([]);
  expect(fields(variable, "\0")).toEqual(["value"]);
  expect(fields(registry("a"), "x")).toEqual(["value"]);
  expect(fields(file("/a"), "")).toEqual(["value"]);
});

test("a policy names a secret by its id, if that agent is on, or by its name", () => {
  const secret = create(SecretSchema, { id: ID, name: "FALCON_CID" });
  const named = (securityAgentPolicy: MessageInitShape<typeof OrganizationPoliciesSchema>["securityAgentPolicy"]) =>
    isNamedByPolicy(create(OrganizationPoliciesSchema, { securityAgentPolicy }), secret);
  expect(named(undefined)).toBe(false);
  expect(
    named({
      crowdstrike: { enabled: true, cidSecretId: OTHER_ID },
      customAgents: [{ envMappings: [{ secretName: "OTHER" }] }],
    }),
  ).toBe(false);
  expect(named({ crowdstrike: { cidSecretId: ID } })).toBe(false);
  expect(named({ crowdstrike: { enabled: true, cidSecretId: ID } })).toBe(true);
  expect(named({ customAgents: [{}, { envMappings: [{ secretName: "A" }, { secretName: "FALCON_CID" }] }] })).toBe(
    true,
  );
});

describe("which secrets are delivered", () => {
  /** Secrets in the order of their ids: name, scope, mount. */
  const candidates = (...list: [string, Scope, Mount][]): Candidate[] =>
    list.map(([name, scope, mount], index) => ({
      message: create(SecretSchema, { id: `id-${index}`, name, mount }),
      owner: { scope, id: ID },
      session: `session-${index}`,
    }));
  const delivered = (...list: [string, Scope, Mount][]) =>
    effectiveSecrets(candidates(...list)).map(({ message }) => message.id);
  const { PROJECT, USER, ORGANIZATION, SERVICE_ACCOUNT } = Scope;

  test("PLT-35 the user's wins over the project's, and that over the organization's, whatever the order", () => {
    expect(delivered(["A", USER, variable], ["A", ORGANIZATION, variable], ["A", PROJECT, variable])).toEqual(["id-0"]);
    expect(
      delivered(["A", ORGANIZATION, variable], ["A", PROJECT, variable], ["A", SERVICE_ACCOUNT, variable]),
    ).toEqual(["id-2"]);
    expect(delivered(["A", ORGANIZATION, variable], ["A", PROJECT, variable])).toEqual(["id-1"]);
  });

  test("PLT-35 only what is mounted in the same way collides by its name", () => {
    const api: Mount = { case: "apiOnly", value: true };
    const kinds: Mount[] = [variable, file("/a"), registry("a"), api];
    expect(delivered(...kinds.map((mount): [string, Scope, Mount] => ["A", ORGANIZATION, mount]))).toHaveLength(4);
    for (const mount of kinds) expect(delivered(["A", ORGANIZATION, mount], ["A", USER, mount])).toEqual(["id-1"]);
    expect(delivered(["A", ORGANIZATION, variable], ["a", USER, variable])).toHaveLength(2);
  });

  test("two files cannot share a path, nor two logins a registry; of one owner the newest is taken", () => {
    expect(delivered(["A", ORGANIZATION, file("/x")], ["B", USER, file("/x")])).toEqual(["id-1"]);
    expect(delivered(["A", USER, file("/x")], ["B", USER, file("/x")])).toEqual(["id-1"]);
    expect(delivered(["A", USER, registry("R.example")], ["B", ORGANIZATION, registry("https://r.example")])).toEqual([
      "id-0",
    ]);
  });

  test("what is beaten does not beat anything itself", () => {
    const list: [string, Scope, Mount][] = [
      ["A", ORGANIZATION, file("/x")],
      ["B", PROJECT, file("/x")],
      ["B", USER, file("/y")],
    ];
    expect(delivered(...list)).toEqual(["id-0", "id-2"]);
  });

  test("entries keep their ids and the order of the secrets; those of other sources stay", () => {
    let made = 0;
    const newId = () => `entry-${made++}`;
    const foreign = create(EnvironmentSpec_SecretSchema, { id: "git", source: "runner", sourceRef: "id-0" });
    const list: [string, Scope, Mount][] = [
      ["A", ORGANIZATION, variable],
      ["B", USER, file("/x")],
    ];
    const first = specSecrets(candidates(...list), [foreign], newId);
    expect(first).toMatchObject([
      { id: "git", source: "runner" },
      {
        ...{ id: "entry-0", name: "A", source: "control-plane", sourceRef: "id-0", session: "session-0" },
        ...{ mount: { case: "environmentVariable", value: "A" }, scope: SpecScope.ORGANIZATION },
      },
      { id: "entry-1", name: "B", sourceRef: "id-1", mount: file("/x"), scope: SpecScope.USER },
    ]);
    const [, changed, fresh] = candidates(["A", ORGANIZATION, variable], ...list.slice(1), ["C", PROJECT, variable]);
    const next = specSecrets([{ ...(changed as Candidate), session: "new" }, fresh as Candidate], first, newId);
    expect(next.map(({ id, session }) => [id, session])).toEqual([
      ["git", ""],
      ["entry-1", "new"],
      ["entry-2", "session-2"],
    ]);
  });
});
