import {
  type DescEnum,
  type DescField,
  type DescMessage,
  fromJsonString,
  type JsonValue,
  type Message,
} from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { AutomationsFileSchema } from "../../gen/gitpod/v1/environment_automation_pb.js";

const MAX_DEPTH = 100;

const utf8 = new TextDecoder("utf-8", { fatal: true });
const fieldsByName = new WeakMap<DescMessage, Map<string, DescField>>();

/** Text of a request body; nothing at all stands for a message without fields. Throws for bytes that are not UTF-8. */
export function jsonText(bytes: Uint8Array): string {
  return bytes.length === 0 ? "{}" : utf8.decode(bytes);
}

/** Fields by the names that JSON may use, without those that cannot hold an enum. */
function enumFields(desc: DescMessage): Map<string, DescField> {
  const known = fieldsByName.get(desc);
  if (known) return known;
  const found = new Map<string, DescField>();
  fieldsByName.set(desc, found);
  for (const field of desc.fields) {
    const message = messageOf(field);
    if (!enumOf(field) && (!message || message.typeName.startsWith("google.protobuf."))) continue;
    found.set(field.name, field);
    found.set(field.jsonName, field);
  }
  return found;
}

const messageOf = (field: DescField): DescMessage | undefined => ("message" in field ? field.message : undefined);

function enumOf(field: DescField): DescEnum | undefined {
  const found = "enum" in field ? field.enum : undefined;
  return found?.typeName === "google.protobuf.NullValue" ? undefined : found;
}

const isObject = (value: unknown): value is Record<string, JsonValue> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

function* values(field: DescField, path: string, value: JsonValue): Generator<[string, JsonValue]> {
  if (field.fieldKind === "list" && Array.isArray(value)) {
    for (const [index, each] of value.entries()) yield [`${path}[${index}]`, each];
  } else if (field.fieldKind === "map" && isObject(value)) {
    for (const [key, each] of Object.entries(value)) yield [`${path}["${key}"]`, each];
  } else {
    yield [path, value];
  }
}

/** Messages that people write by hand: a field that the schema does not have is a mistake of theirs. */
const STRICT: ReadonlySet<string> = new Set([AutomationsFileSchema.typeName]);

function refuseUnknownField(desc: DescMessage, name: string, prefix: string): void {
  if (desc.fields.some((field) => field.name === name || field.jsonName === name)) return;
  throw new Error(`${prefix}${name.slice(0, 100)}: is not a known field`);
}

/**
 * Throws for the name of an enum value that the schema does not have. Fields that it does not have are ignored, because
 * newer clients send them; a value is different, since leaving it out would mean something else than was said.
 */
function refuseUnknownValues(desc: DescMessage, json: JsonValue, prefix = "", depth = 0, strict = false): void {
  if (!isObject(json) || depth > MAX_DEPTH) return;
  const fields = enumFields(desc);
  const isStrict = strict || STRICT.has(desc.typeName);
  for (const [name, given] of Object.entries(json)) {
    if (isStrict) refuseUnknownField(desc, name, prefix);
    const field = fields.get(name);
    if (!field || given === null) continue;
    const [known, message] = [enumOf(field), messageOf(field)];
    for (const [path, value] of values(field, prefix + field.name, given)) {
      if (message) refuseUnknownValues(message, value, `${path}.`, depth + 1, isStrict);
      else if (typeof value === "string" && !known?.values.some((each) => each.name === value)) {
        throw new Error(`${path}: ${JSON.stringify(value.slice(0, 100))} is no value of ${known?.typeName}`);
      }
    }
  }
}

/** As `jsonText`, for readers that parse themselves; throws for unknown enum values. */
export function checkedJsonText(desc: DescMessage, bytes: Uint8Array): string {
  const text = jsonText(bytes);
  refuseUnknownValues(desc, JSON.parse(text));
  return text;
}

/** Reads a message from JSON; INVALID_ARGUMENT for anything that is none. */
export function messageFromJson(desc: DescMessage, bytes: Uint8Array, options: object): Message {
  try {
    const text = jsonText(bytes);
    try {
      return fromJsonString(desc, text, options);
    } catch {
      // Most requests have no unknown fields and end above; only the others are looked at twice.
      refuseUnknownValues(desc, JSON.parse(text));
      return fromJsonString(desc, text, { ...options, ignoreUnknownFields: true });
    }
  } catch (error) {
    throw ConnectError.from(error, Code.InvalidArgument);
  }
}
