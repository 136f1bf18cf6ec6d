import { create, type DescField, type DescMessage, type DescService, type Message } from "@bufbuild/protobuf";
import { type Duration, DurationSchema, type Timestamp, TimestampSchema } from "@bufbuild/protobuf/wkt";
import { createValidator, type Validator } from "@bufbuild/protovalidate";
import type { Interceptor } from "@connectrpc/connect";
import { createValidateInterceptor } from "@connectrpc/validate";
import { invalid } from "../domain/errors.ts";

// One per process: the rules of a message type are compiled at its first use, which takes far longer than any later one.
const rules = createValidator();

// The years 1 to 9999, and 10000 years: as the types themselves define it, and as JSON is held to.
const EARLIEST_S = -62_135_596_800n;
const LATEST_S = 253_402_300_799n;
const LONGEST_S = 315_576_000_000n;
const SECOND_NS = 1_000_000_000;

const isTimestamp = ({ seconds, nanos }: Timestamp) =>
  seconds >= EARLIEST_S && seconds <= LATEST_S && nanos >= 0 && nanos < SECOND_NS;

function isDuration({ seconds, nanos }: Duration): boolean {
  const agrees = seconds === 0n || nanos === 0 || seconds > 0n === nanos > 0;
  return agrees && seconds >= -LONGEST_S && seconds <= LONGEST_S && Math.abs(nanos) < SECOND_NS;
}

const TIMES = new Map<string, (time: never) => boolean>([
  [TimestampSchema.typeName, isTimestamp],
  [DurationSchema.typeName, isDuration],
]);
const timeFields = new WeakMap<DescMessage, DescField[]>();
const typeOf = (field: DescField): DescMessage | undefined => ("message" in field ? field.message : undefined);

function leadsToTime(desc: DescMessage, seen: Set<DescMessage>): boolean {
  if (TIMES.has(desc.typeName)) return true;
  if (seen.has(desc)) return false;
  seen.add(desc);
  return desc.fields.some((field) => {
    const type = typeOf(field);
    return type !== undefined && leadsToTime(type, seen);
  });
}

/** Fields of a message in which, or somewhere below which, there are times. */
function fieldsWithTimes(desc: DescMessage): DescField[] {
  const known = timeFields.get(desc);
  if (known) return known;
  const found = desc.fields.filter((field) => {
    const type = typeOf(field);
    return type !== undefined && leadsToTime(type, new Set());
  });
  timeFields.set(desc, found);
  return found;
}

function valuesOf(message: Message, field: DescField): unknown[] {
  const fields = message as unknown as Record<string, unknown>;
  const choice = field.oneof && (fields[field.oneof.localName] as { case?: string; value?: unknown });
  const value = choice ? (choice.case === field.localName ? choice.value : undefined) : fields[field.localName];
  if (value === undefined) return [];
  if (field.fieldKind === "map") return Object.values(value as object);
  return Array.isArray(value) ? value : [value];
}

/**
 * Refuses times outside of what their types allow: binary messages can hold any number, and neither a `Date` nor the
 * database could.
 */
function checkTimes(desc: DescMessage, message: Message, path = ""): void {
  for (const field of fieldsWithTimes(desc)) {
    const type = typeOf(field) as DescMessage;
    for (const value of valuesOf(message, field)) {
      const isValid = TIMES.get(type.typeName);
      if (!isValid) checkTimes(type, value as Message, `${path}${field.name}.`);
      else if (!isValid(value as never)) throw invalid({ field: path + field.name, message: "is out of range" });
    }
  }
}

const validator: Validator = {
  validate(schema, message) {
    checkTimes(schema, message);
    return rules.validate(schema, message);
  },
};

/** Checks request messages against the rules in the schema; INVALID_ARGUMENT with the violations. */
export const validation = (): Interceptor => createValidateInterceptor({ validator });

/** Compiles the rules of the request messages of services before the first caller has to wait for it. */
export function warmValidation(services: Iterable<DescService>): void {
  for (const { methods } of services) for (const { input } of methods) validator.validate(input, create(input));
}
