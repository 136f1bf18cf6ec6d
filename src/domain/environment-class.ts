import { createHash } from "node:crypto";
import { createContext, runInContext } from "node:vm";
import { create, toBinary } from "@bufbuild/protobuf";
import {
  type FieldValue,
  type RunnerConfigurationSchema,
  type RunnerConfigurationSchema_EnumField,
  type RunnerConfigurationSchema_Field,
  RunnerConfigurationSchema_FieldSchema,
  type RunnerConfigurationSchema_IntField,
  type RunnerConfigurationSchema_SCMConfigSchema,
  RunnerConfigurationSchema_SCMConfigSchemaSchema,
  RunnerConfigurationSchemaSchema,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { FieldProblem } from "./errors.ts";

const INT32_MAX = 2_147_483_647;
const INT32_MIN = -2_147_483_648;
const MIN_MEMORY_MIB = 512;
const DEFAULT_CORES = 2;
const DEFAULT_MEMORY_MIB = 4096;
const DEFAULT_DISK_GIB = 20;
const VERSION_LENGTH = 32;
const PATTERN_TIMEOUT_MS = 50;
const PATTERN_LENGTH = 1024;
const VALUE_LENGTH = 4096;
const ENTRIES = 100;
const UNCHECKED = "cannot be checked against the pattern of this field";

/** The machine that a LINUX_HOST runner lives on. */
export interface HostFacts {
  cpuCores: number;
  memoryMib: number;
  /** Size of the data volume. */
  diskGib: number;
  /** Docker or Podman answers. */
  hasContainerEngine: boolean;
}

/** A fault of a class configuration; `key` is the id of the schema field. */
export interface ConfigurationProblem extends FieldProblem {
  key: string;
}

function intField(id: string, name: string, required: boolean, preset: number, min: number, max: number) {
  const value = { default: Math.min(Math.max(preset, min), max), min, max };
  return create(RunnerConfigurationSchema_FieldSchema, { id, name, required, type: { case: "int", value } });
}

function enumField(id: string, name: string, titles: readonly { title: string; subtitle: string }[]) {
  return create(RunnerConfigurationSchema_FieldSchema, {
    id,
    name,
    type: {
      case: "enum",
      value: {
        default: titles[0]?.title ?? "",
        values: titles.map(({ title }) => title),
        ...(titles[0] && { defaultValue: titles[0] }),
        possibleValues: [...titles],
      },
    },
  });
}

function classFields(host: HostFacts | undefined): RunnerConfigurationSchema_Field[] {
  const most = (value: number | undefined, min: number) =>
    Math.min(Math.max(Math.floor(value ?? INT32_MAX), min), INT32_MAX);
  const leastMemory = host ? MIN_MEMORY_MIB : 1;
  const isolation = [
    { title: "process", subtitle: "Own Linux user and control group" },
    ...(host?.hasContainerEngine ? [{ title: "container", subtitle: "Own container" }] : []),
  ];
  const summary = host ? `${host.cpuCores} CPU, ${Math.floor(host.memoryMib / 1024)} GiB` : "";
  return [
    intField("cpu", "CPU cores", true, DEFAULT_CORES, 1, most(host?.cpuCores, 1)),
    intField("memory", "Memory in MiB", true, DEFAULT_MEMORY_MIB, leastMemory, most(host?.memoryMib, leastMemory)),
    intField("disk", "Disk in GiB", false, DEFAULT_DISK_GIB, 1, most(host?.diskGib, 1)),
    enumField("isolation", "Isolation", isolation),
    create(RunnerConfigurationSchema_FieldSchema, {
      id: "host",
      name: "Host",
      type: { case: "display", value: { default: summary } },
    }),
  ];
}

const AZURE_DOCS =
  "https://learn.microsoft.com/azure/devops/organizations/accounts/use-personal-access-tokens-to-authenticate";
const PROVIDERS = [
  {
    scmId: "github",
    name: "GitHub",
    defaultHosts: ["github.com"],
    oauth: true,
    pat: {
      description: "Token with the scopes repo, read:user, user:email and workflow",
      docsLink:
        "https://docs.github.com/authentication/keeping-your-account-and-data-secure/managing-your-personal-access-tokens",
    },
  },
  {
    scmId: "gitlab",
    name: "GitLab",
    defaultHosts: ["gitlab.com"],
    oauth: true,
    pat: {
      description: "Token with the scopes api, read_user and read_repository",
      docsLink: "https://docs.gitlab.com/user/profile/personal_access_tokens/",
    },
  },
  {
    scmId: "bitbucket",
    name: "Bitbucket Cloud",
    defaultHosts: ["bitbucket.org"],
    oauth: true,
    pat: {
      description: "Access token with the scopes repository:write, pullrequest and account",
      docsLink: "https://support.atlassian.com/bitbucket-cloud/docs/access-tokens/",
    },
  },
  {
    scmId: "azuredevops_entra",
    name: "Azure DevOps",
    defaultHosts: ["dev.azure.com"],
    oauth: true,
    pat: { description: "Token with the scope vso.code_write", docsLink: AZURE_DOCS },
  },
  {
    scmId: "azuredevops_server",
    name: "Azure DevOps Server",
    defaultHosts: [],
    oauth: false,
    pat: { description: "Token that may read and write code", docsLink: AZURE_DOCS },
  },
  {
    scmId: "git",
    name: "Other git server",
    defaultHosts: [],
    oauth: false,
    pat: { description: "Secret for basic authentication, as user:secret or the secret alone", docsLink: "" },
  },
];

/** Source-control providers that every runner offers; `callbackUrl` is where OAuth comes back to. */
export function scmSchemas(callbackUrl: string): RunnerConfigurationSchema_SCMConfigSchema[] {
  return PROVIDERS.map(({ oauth, ...provider }) =>
    create(RunnerConfigurationSchema_SCMConfigSchemaSchema, { ...provider, ...(oauth && { oauth: { callbackUrl } }) }),
  );
}

/** Hash of the content of a schema, whatever version it carries; 32 hex digits. */
export function contentVersion(schema: RunnerConfigurationSchema): string {
  const content = toBinary(RunnerConfigurationSchemaSchema, { ...schema, version: "" });
  return createHash("sha256").update(content).digest("hex").slice(0, VERSION_LENGTH);
}

/** Schema of a LINUX_HOST runner. Without `host` the built-in one for runners that have not registered yet. */
export function linuxHostSchema(callbackUrl: string, host?: HostFacts): RunnerConfigurationSchema {
  const schema = create(RunnerConfigurationSchemaSchema, {
    environmentClasses: classFields(host),
    scm: scmSchemas(callbackUrl),
  });
  return { ...schema, version: contentVersion(schema) };
}

/** Schema of a runner of which nothing is known but that source control can be set up. */
export function scmOnlySchema(callbackUrl: string): RunnerConfigurationSchema {
  return create(RunnerConfigurationSchemaSchema, { version: "0", scm: scmSchemas(callbackUrl) });
}

const enumTitles = (field: RunnerConfigurationSchema_EnumField) => [
  ...field.possibleValues.map(({ title }) => title),
  ...field.values,
];

const intBounds = ({ min, max }: RunnerConfigurationSchema_IntField): [number, number] =>
  min === 0 && max === 0 ? [INT32_MIN, INT32_MAX] : [min, max];

function intProblem(field: RunnerConfigurationSchema_IntField, value: string): string | undefined {
  const [min, max] = intBounds(field);
  const number = /^-?[0-9]+$/.test(value) ? Number(value) : Number.NaN;
  return number >= min && number <= max ? undefined : `must be a whole number from ${min} to ${max}`;
}

const patternContext = createContext(Object.create(null));

type PatternCheck = (pattern: string, value: string) => string | undefined;

/**
 * Patterns come from runners and may backtrack for ever, which only an interruptible evaluation survives. After the
 * first that does, no other is tried.
 */
function patternCheck(): PatternCheck {
  let exhausted = false;
  return (pattern, value) => {
    const source = `new RegExp(${JSON.stringify(`^(?:${pattern})$`)}, "u").test(${JSON.stringify(value)})`;
    try {
      if (exhausted || pattern.length > PATTERN_LENGTH) return UNCHECKED;
      return runInContext(source, patternContext, { timeout: PATTERN_TIMEOUT_MS })
        ? undefined
        : `must match ${pattern}`;
    } catch (error) {
      // No instanceof: the error belongs to the context in which the pattern ran.
      exhausted = Object(error).code === "ERR_SCRIPT_EXECUTION_TIMEOUT";
      return UNCHECKED;
    }
  };
}

function valueProblem(field: RunnerConfigurationSchema_Field, value: string, check: PatternCheck): string | undefined {
  const { type, required } = field;
  if (value.length > VALUE_LENGTH) return `must have at most ${VALUE_LENGTH} characters`;
  switch (type.case) {
    case "int":
      return intProblem(type.value, value);
    case "bool":
      return value === "true" || value === "false" ? undefined : "must be true or false";
    case "enum": {
      const titles = [...new Set(enumTitles(type.value))];
      return titles.includes(value) ? undefined : `must be one of ${titles.join(", ")}`;
    }
    case "string":
      if (required && !value) return "must not be empty";
      return type.value.pattern ? check(type.value.pattern, value) : undefined;
    default:
      return undefined;
  }
}

/** All faults of a class configuration, one per fault; empty if it fits the schema. */
export function validateConfiguration(
  schema: RunnerConfigurationSchema,
  configuration: readonly FieldValue[],
): ConfigurationProblem[] {
  if (configuration.length > ENTRIES) {
    return [{ key: "", field: "configuration", message: `must have at most ${ENTRIES} entries` }];
  }
  const fields = new Map(schema.environmentClasses.map((field) => [field.id, field]));
  const check = patternCheck();
  const seen = new Set<string>();
  const problems = configuration.flatMap(({ key, value }, index): ConfigurationProblem[] => {
    const problem = (part: "key" | "value", message: string) => [
      { key, field: `configuration[${index}].${part}`, message },
    ];
    const field = fields.get(key);
    if (!field) return problem("key", "is not a field of the schema");
    if (field.type.case === "display") return problem("key", "is read-only");
    if (seen.has(key)) return problem("key", "is given twice");
    seen.add(key);
    const message = valueProblem(field, value, check);
    return message ? problem("value", message) : [];
  });
  const missing = schema.environmentClasses.filter(
    (field) => field.required && field.type.case !== "display" && !seen.has(field.id),
  );
  return [...problems, ...missing.map(({ id }) => ({ key: id, field: "configuration", message: `${id} is required` }))];
}

function fieldDefault({ type }: RunnerConfigurationSchema_Field): string | undefined {
  switch (type.case) {
    case "int":
      return intProblem(type.value, String(type.value.default)) ? undefined : String(type.value.default);
    case "bool":
      return String(type.value.default);
    case "string":
      return type.value.default;
    case "enum":
      return (type.value.defaultValue?.title ?? type.value.default) || undefined;
    default:
      return undefined;
  }
}

/** Values with which an environment of the class starts: those given, and defaults for the optional ones missing. */
export function effectiveConfiguration(
  schema: RunnerConfigurationSchema,
  configuration: readonly FieldValue[],
): Map<string, string> {
  const values = new Map(configuration.map(({ key, value }) => [key, value]));
  for (const field of schema.environmentClasses) {
    const preset = field.required || values.has(field.id) ? undefined : fieldDefault(field);
    if (preset !== undefined) values.set(field.id, preset);
  }
  return values;
}
