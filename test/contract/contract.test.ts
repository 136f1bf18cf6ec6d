import { fromJson, type JsonValue } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";
import { describe, expect, test } from "vitest";
import { published } from "./facts.ts";
import requests from "./requests.json" with { type: "json" };
import { factsOf, files, registry } from "./schema.ts";

const validator = createValidator({ registry });

function inputOf(rpc: string) {
  const [service = "", name] = rpc.split("/");
  const method = registry.getService(service)?.methods.find((each) => each.name === name);
  if (!method) throw new Error(`no RPC ${rpc}`);
  return method.input;
}

/** The fields a request is refused for; empty if it is accepted. */
function violations(rpc: string, body: JsonValue): string[] {
  const input = inputOf(rpc);
  const result = validator.validate(input, fromJson(input, body));
  if (result.kind === "error") throw result.error;
  return (result.violations ?? []).map((violation) => violation.toString());
}

describe("the schema is the published contract", () => {
  const ours = new Map(files.map((file) => [file.proto.name, file]));

  test("no file is missing or superfluous", () => {
    const own = /^(berth|buf|google|grpc)\//;
    expect([...ours.keys()].filter((name) => !own.test(name)).sort()).toEqual([...published.keys()].sort());
  });

  test.each([...published])("%s: RPCs, fields, numbers, types, enums and rules", (name, facts) => {
    const file = ours.get(name);
    expect(file && factsOf(file)).toEqual(facts);
  });

  test("the facts are complete", () => {
    const names = [...published.values()].flatMap((facts) => Object.keys(facts));
    expect(names.filter((name) => name.includes("/"))).toHaveLength(197);
    expect(new Set(names).size).toBe(names.length);
  });
});

describe("documented requests", () => {
  const bodies = Object.entries(requests).flatMap(([rpc, examples]) => examples.map((body) => [rpc, body] as const));

  test.each(bodies)("%s accepts its example", (rpc, body) => {
    expect(violations(rpc, body)).toEqual([]);
  });
});

describe("rules", () => {
  const id = "07e03a28-65a5-4d98-b532-8ea67b188048";
  const create = "gitpod.v1.EnvironmentService/CreateEnvironment";
  const update = "gitpod.v1.EnvironmentService/UpdateEnvironment";
  const policies = "gitpod.v1.OrganizationService/UpdateOrganizationPolicies";
  const search = "gitpod.v1.RunnerService/SearchRepositories";
  const list = "gitpod.v1.EnvironmentService/ListEnvironments";
  const validate = "gitpod.v1.RunnerConfigurationService/ValidateRunnerConfiguration";

  const accepted: [string, string, JsonValue][] = [
    ["no timeout", create, { spec: { timeout: { disconnected: "0s" } } }],
    ["the shortest timeout", create, { spec: { timeout: { disconnected: "1800s" } } }],
    ["no timeout on update", update, { environmentId: id, spec: { timeout: { disconnected: "0s" } } }],
    ["the first port that is not privileged", create, { spec: { ports: [{ name: "web", port: 1024 }] } }],
    ["an empty session id", create, { sessionId: "" }],
    ["a session id", create, { sessionId: id }],
    ["an absent path", create, { spec: { automationsFile: {} } }],
    ["a relative path", create, { spec: { automationsFile: { automationsFilePath: "a/b.yaml" } } }],
    ["the largest page", list, { pagination: { pageSize: 100 } }],
    ["25 values in a filter", list, { filter: { runnerIds: Array(25).fill(id) } }],
    ["an empty security policy", policies, { organizationId: id, securityPolicyId: "" }],
    ["no security policy", policies, { organizationId: id }],
    ["a security policy", policies, { organizationId: id, securityPolicyId: id }],
    ["whole days", policies, { organizationId: id, archiveEnvironmentsAfter: "172800s" }],
    ["a limit of zero, which is unset", search, { runnerId: id, limit: 0 }],
    ["a configuration without a runner", validate, {}],
    ["a configuration that is wrong in itself", validate, { runnerId: "x", environmentClass: { id: "x" } }],
  ];

  test.each(accepted)("%s is accepted by %s", (_, rpc, body) => {
    expect(violations(rpc, body)).toEqual([]);
  });

  const refused: [string, string, JsonValue, RegExp][] = [
    ["a timeout of 10 s", create, { spec: { timeout: { disconnected: "10s" } } }, /spec\.timeout\.disconnected/],
    ["one of 1799 s", update, { environmentId: id, spec: { timeout: { disconnected: "1799s" } } }, /disconnected/],
    ["a negative timeout", create, { spec: { timeout: { disconnected: "-1s" } } }, /disconnected/],
    ["port 80", create, { spec: { ports: [{ name: "web", port: 80 }] } }, /spec\.ports\[0\]\.port/],
    ["port 65536", create, { spec: { ports: [{ name: "web", port: 65_536 }] } }, /spec\.ports\[0\]\.port/],
    ["a session that is no id", create, { sessionId: "x" }, /session_id/],
    ["an absolute path", create, { spec: { automationsFile: { automationsFilePath: "/a" } } }, /automations_file_path/],
    ["a name of 81 characters", create, { name: "n".repeat(81) }, /name/],
    ["a page of 101", list, { pagination: { pageSize: 101 } }, /pagination\.page_size/],
    ["26 values in a filter", list, { filter: { runnerIds: Array(26).fill(id) } }, /filter\.runner_ids/],
    ["an undefined sort field", list, { sort: { field: 99 } }, /sort\.field/],
    ["no organization", policies, {}, /organization_id/],
    ["a security policy that is no id", policies, { organizationId: id, securityPolicyId: "x" }, /security_policy_id/],
    ["part of a day", policies, { organizationId: id, archiveEnvironmentsAfter: "90000s" }, /whole number of days/],
    ["31 days", policies, { organizationId: id, archiveEnvironmentsAfter: "2678400s" }, /archive_environments_after/],
    ["a limit of 101", search, { runnerId: id, limit: 101 }, /limit/],
  ];

  test.each(refused)("%s is refused by %s", (_, rpc, body, why) => {
    expect(violations(rpc, body)).toEqual([expect.stringMatching(why)]);
  });
});
