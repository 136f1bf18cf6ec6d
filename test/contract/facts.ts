import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fromJson, type JsonObject, toJson } from "@bufbuild/protobuf";
import { FieldRulesSchema } from "../../gen/buf/validate/validate_pb.js";
import type { Facts } from "./schema.ts";

interface Fact {
  rpc?: string;
  enum?: string;
  message?: string;
  field?: string;
  [property: string]: unknown;
}

interface FieldFact {
  type: string;
  label?: "optional" | "repeated" | "map";
  oneof?: string;
  rules?: JsonObject;
}

// Published as { uuid, ignore if default }: the ignore that lets an empty value pass is gone for fields with presence.
const EXPRESSED_OTHERWISE: Record<string, JsonObject> = {
  "gitpod.v1.UpdateOrganizationPoliciesRequest.security_policy_id": {
    string: { pattern: "^$|^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$" },
  },
};

const lines = globSync("*.jsonl", { cwd: import.meta.dirname }).flatMap((name) =>
  readFileSync(join(import.meta.dirname, name), "utf8")
    .trimEnd()
    .split("\n"),
);
const all: Fact[] = lines.map((line) => JSON.parse(line));
const enums = new Set(all.map((fact) => fact.enum));
const unvalidated = new Set(
  all.filter((fact) => (fact.rules as JsonObject)?.disabled === true).map((fact) => fact.message),
);

function hasPresence({ type, label, oneof }: FieldFact): boolean {
  const isMessage = type.includes(".") && !enums.has(type);
  return label === "optional" || oneof !== undefined || (isMessage && label === undefined);
}

/** The published rules in the words of the installed protovalidate, which renamed `ignore` and dropped `disabled`. */
function rulesOf(name: string, message: string, fact: FieldFact): JsonObject | undefined {
  if (unvalidated.has(message)) return { ignore: "IGNORE_ALWAYS" };
  if (EXPRESSED_OTHERWISE[name]) return EXPRESSED_OTHERWISE[name];
  const { ignore, ...rules } = fact.rules ?? {};
  const known: Record<string, boolean> = {
    undefined: false,
    IGNORE_IF_UNPOPULATED: !hasPresence(fact),
    IGNORE_IF_DEFAULT_VALUE: true,
  };
  const ignoresZero = known[String(ignore)];
  if (ignoresZero === undefined) throw new Error(`${name}: unknown ignore ${ignore}`);
  const renamed = { ...rules, ...(ignoresZero && { ignore: "IGNORE_IF_ZERO_VALUE" }) };
  // Parsing holds the facts to the vocabulary of the rules, writing gives both sides one form.
  const canonical = toJson(FieldRulesSchema, fromJson(FieldRulesSchema, renamed)) as JsonObject;
  return Object.keys(canonical).length > 0 ? canonical : undefined;
}

function entryOf(fact: Fact): [string, JsonObject] {
  const { rpc, enum: enumeration, message, field, of, file, tier, note, rules, ...rest } = fact as Fact & JsonObject;
  if (!field) return [(rpc ?? enumeration ?? message)!, rest];
  const name = `${of}.${field}`;
  const canonical = rulesOf(name, String(of), fact as unknown as FieldFact);
  return [name, { ...rest, ...(canonical && { rules: canonical }) }];
}

const fileOfMessage = new Map(all.map((fact) => [fact.message, fact.file]));
const fileOf = (fact: Fact) => String(fact.file ?? fileOfMessage.get(String(fact.of)));

/** The published contract by .proto file, in the form in which the schema is read. */
export const published: ReadonlyMap<string, Facts> = new Map(
  [...Map.groupBy(all, fileOf)].map(([file, facts]) => [file, Object.fromEntries(facts.map(entryOf))]),
);
