import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { describe, expect, test } from "vitest";
import { FieldValueSchema, RunnerConfigurationSchemaSchema } from "../gen/gitpod/v1/runner_configuration_pb.js";
import {
  contentVersion,
  effectiveConfiguration,
  type HostFacts,
  linuxHostSchema,
  scmOnlySchema,
  validateConfiguration,
} from "../src/domain/environment-class.ts";

const CALLBACK = "https://berth.example/oauth/scm/callback";
const HOST: HostFacts = { cpuCores: 32, memoryMib: 128_000, diskGib: 500, hasContainerEngine: false };

const values = (...pairs: [string, string][]) => pairs.map(([key, value]) => create(FieldValueSchema, { key, value }));
const valid = (...more: [string, string][]) => values(["cpu", "4"], ["memory", "8192"], ...more);
const faults = (schema: ReturnType<typeof linuxHostSchema>, configuration: ReturnType<typeof values>) =>
  validateConfiguration(schema, configuration).map(({ field, key }) => [field, key]);

function field(schema: ReturnType<typeof linuxHostSchema>, id: string) {
  const found = schema.environmentClasses.find((candidate) => candidate.id === id);
  if (!found) throw new Error(`no field ${id}`);
  return found;
}

function foreign(
  ...fields: NonNullable<
    Exclude<MessageInitShape<typeof RunnerConfigurationSchemaSchema>, { $typeName: string }>["environmentClasses"]
  >
) {
  return create(RunnerConfigurationSchemaSchema, { environmentClasses: fields });
}

describe("schema of a Linux host", () => {
  test("fields, bounds and defaults follow the host", () => {
    const schema = linuxHostSchema(CALLBACK, HOST);
    expect(schema.environmentClasses.map(({ id, required, type }) => [id, required, type.case])).toEqual([
      ["cpu", true, "int"],
      ["memory", true, "int"],
      ["disk", false, "int"],
      ["isolation", false, "enum"],
      ["host", false, "display"],
    ]);
    expect(field(schema, "cpu").type.value).toMatchObject({ default: 2, min: 1, max: 32 });
    expect(field(schema, "memory").type.value).toMatchObject({ default: 4096, min: 512, max: 128_000 });
    expect(field(schema, "disk").type.value).toMatchObject({ default: 20, min: 1, max: 500 });
    expect(field(schema, "host").type.value).toMatchObject({ default: "32 CPU, 125 GiB" });
    expect(schema.runnerConfig).toEqual([]);
  });

  test("a small host lowers the defaults, and no bound is turned around", () => {
    const schema = linuxHostSchema(CALLBACK, { ...HOST, cpuCores: 1, memoryMib: 256, diskGib: 8.7 });
    expect(field(schema, "cpu").type.value).toMatchObject({ default: 1, min: 1, max: 1 });
    expect(field(schema, "memory").type.value).toMatchObject({ default: 512, min: 512, max: 512 });
    expect(field(schema, "disk").type.value).toMatchObject({ default: 8, min: 1, max: 8 });
  });

  test("the built-in copy has the widest bounds", () => {
    const schema = linuxHostSchema(CALLBACK);
    for (const id of ["cpu", "memory", "disk"]) {
      expect(field(schema, id).type.value).toMatchObject({ min: 1, max: 2_147_483_647 });
    }
    expect(validateConfiguration(schema, values(["cpu", "2147483647"], ["memory", "1"]))).toEqual([]);
  });

  test("container isolation is offered only with an engine; the deprecated fields mirror the titles", () => {
    const isolation = (hasContainerEngine: boolean) =>
      field(linuxHostSchema(CALLBACK, { ...HOST, hasContainerEngine }), "isolation").type.value;
    expect(isolation(false)).toMatchObject({
      default: "process",
      values: ["process"],
      possibleValues: [{ title: "process" }],
    });
    expect(isolation(true)).toMatchObject({
      defaultValue: { title: "process" },
      values: ["process", "container"],
      possibleValues: [{ title: "process" }, { title: "container" }],
    });
  });

  test("source-control entries", () => {
    for (const schema of [linuxHostSchema(CALLBACK, HOST), scmOnlySchema(CALLBACK)]) {
      const entries = schema.scm.map(({ scmId, defaultHosts, oauth, pat }) => [
        scmId,
        defaultHosts.join(),
        oauth?.callbackUrl,
        pat !== undefined,
      ]);
      expect(entries).toEqual([
        ["github", "github.com", CALLBACK, true],
        ["gitlab", "gitlab.com", CALLBACK, true],
        ["bitbucket", "bitbucket.org", CALLBACK, true],
        ["azuredevops_entra", "dev.azure.com", CALLBACK, true],
        ["azuredevops_server", "", undefined, true],
        ["git", "", undefined, true],
      ]);
    }
    expect(scmOnlySchema(CALLBACK)).toMatchObject({ version: "0", environmentClasses: [] });
  });

  test("the version is a hash of the content", () => {
    const schema = linuxHostSchema(CALLBACK, HOST);
    expect(schema.version).toMatch(/^[0-9a-f]{32}$/);
    expect(linuxHostSchema(CALLBACK, { ...HOST }).version).toBe(schema.version);
    expect(contentVersion(schema)).toBe(schema.version);
    expect(linuxHostSchema(CALLBACK, { ...HOST, cpuCores: 31 }).version).not.toBe(schema.version);
  });
});

describe("configuration of a class", () => {
  const schema = linuxHostSchema(CALLBACK, HOST);

  test("RUN-22 a valid map passes; each fault of a bad one is reported once", () => {
    expect(faults(schema, valid(["disk", "100"], ["isolation", "process"]))).toEqual([]);
    expect(faults(schema, values(["cpu", "0"], ["memory", "512"]))).toEqual([["configuration[0].value", "cpu"]]);
    expect(faults(schema, valid(["gpu", "1"]))).toEqual([["configuration[2].key", "gpu"]]);
    expect(faults(schema, valid(["cpu", "0"]))).toEqual([["configuration[2].key", "cpu"]]);
    expect(faults(schema, values(["cpu", "1"]))).toEqual([["configuration", "memory"]]);
    expect(faults(schema, valid(["host", "mine"]))).toEqual([["configuration[2].key", "host"]]);
    expect(faults(schema, values(["cpu", "0"], ["gpu", "1"], ["cpu", "2"]))).toEqual([
      ["configuration[0].value", "cpu"],
      ["configuration[1].key", "gpu"],
      ["configuration[2].key", "cpu"],
      ["configuration", "memory"],
    ]);
    expect(validateConfiguration(schema, [])).toEqual([
      { key: "cpu", field: "configuration", message: "cpu is required" },
      { key: "memory", field: "configuration", message: "memory is required" },
    ]);
  });

  test.each(["", " 2", "2 ", "+2", "2.0", "1e1", "0x2", "two", "33", "-1", "99999999999999999999", "٢"])(
    "cpu %j is refused",
    (value) => {
      expect(validateConfiguration(schema, values(["cpu", value], ["memory", "512"]))).toEqual([
        { key: "cpu", field: "configuration[0].value", message: "must be a whole number from 1 to 32" },
      ]);
    },
  );

  test("integers without bounds are bounded by 32 bits", () => {
    const open = foreign({ id: "n", type: { case: "int", value: { min: 0, max: 0 } } });
    for (const value of ["-2147483648", "0", "2147483647", "007"])
      expect(faults(open, values(["n", value]))).toEqual([]);
    for (const value of ["-2147483649", "2147483648"]) expect(faults(open, values(["n", value]))).toHaveLength(1);
  });

  test("bool, enum and string", () => {
    const mixed = foreign(
      { id: "bool", type: { case: "bool", value: {} } },
      { id: "enum", type: { case: "enum", value: { possibleValues: [{ title: "a" }] } } },
      { id: "old enum", type: { case: "enum", value: { values: ["b"] } } },
      { id: "text", type: { case: "string", value: { pattern: "[a-z]+|[0-9]" } } },
      { id: "needed", required: true, type: { case: "string", value: {} } },
      { id: "untyped" },
    );
    const good = values(
      ["bool", "true"],
      ["enum", "a"],
      ["old enum", "b"],
      ["text", "abc"],
      ["needed", "x"],
      ["untyped", "anything"],
    );
    expect(faults(mixed, good)).toEqual([]);
    const bad = values(["bool", "True"], ["enum", "b"], ["old enum", "a"], ["text", "ab1"], ["needed", ""]);
    expect(faults(mixed, bad).map(([path]) => path)).toEqual(
      [0, 1, 2, 3, 4].map((index) => `configuration[${index}].value`),
    );
    expect(faults(mixed, values(["needed", "x".repeat(5000)]))).toEqual([["configuration[0].value", "needed"]]);
  });

  test("a pattern that backtracks for ever, is malformed or reaches for code ends in a fault", () => {
    const withPattern = (pattern: string) => foreign({ id: "text", type: { case: "string", value: { pattern } } });
    const hostile = ["(a+)+b", "(", '")+process.exit(1)+("', "a".repeat(5000)];
    for (const pattern of hostile) {
      const started = performance.now();
      expect(faults(withPattern(pattern), values(["text", "a".repeat(60)]))).toHaveLength(1);
      expect(performance.now() - started).toBeLessThan(2000);
    }
    expect(faults(withPattern("\u2028?'`[$]\\(a\\)\""), values(["text", "'`$(a)\""]))).toEqual([]);
  });

  test("many endless patterns take no longer than one, and harmless ones after a malformed one still count", () => {
    const text = (id: string, pattern: string) => ({ id, type: { case: "string" as const, value: { pattern } } });
    const ids = Array.from({ length: 100 }, (_, index) => `f${index}`);
    const started = performance.now();
    const endless = foreign(...ids.map((id) => text(id, "(a+)+b")));
    expect(faults(endless, values(...ids.map((id): [string, string] => [id, "a".repeat(60)])))).toHaveLength(100);
    expect(performance.now() - started).toBeLessThan(2000);
    expect(faults(foreign(text("bad", "("), text("good", "a+")), values(["bad", "a"], ["good", "a"]))).toHaveLength(1);
  });

  test("the number of entries is bounded", () => {
    const many = values(...Array.from({ length: 101 }, (_, index): [string, string] => [`k${index}`, ""]));
    expect(validateConfiguration(schema, many)).toEqual([
      { key: "", field: "configuration", message: "must have at most 100 entries" },
    ]);
  });

  test("defaults fill only what is optional and missing", () => {
    expect(Object.fromEntries(effectiveConfiguration(schema, values(["cpu", "4"], ["disk", "30"])))).toEqual({
      cpu: "4",
      disk: "30",
      isolation: "process",
    });
    const odd = foreign(
      { id: "outside", type: { case: "int", value: { default: 5, min: 10, max: 20 } } },
      { id: "flag", type: { case: "bool", value: {} } },
      { id: "text", type: { case: "string", value: { default: "t" } } },
      { id: "none", type: { case: "enum", value: { possibleValues: [{ title: "a" }] } } },
    );
    expect(Object.fromEntries(effectiveConfiguration(odd, []))).toEqual({ flag: "false", text: "t" });
  });
});
