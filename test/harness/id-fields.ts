import { clone, create, type DescField, type DescMessage, type Message, ScalarType } from "@bufbuild/protobuf";

// Where a request can name something: string fields that hold ids, at any depth.

/** Fields that hold ids without saying so in their names. */
const ALSO = new Set(["class", "depends_on", "recommended_environment_classes", "source_ref"]);
const MAX_DEPTH = 8;

/** The way to a field, from the request on; ends with a string, or a list of them. */
export type FieldPath = readonly DescField[];

const holdsStrings = (field: DescField) =>
  (field.fieldKind === "scalar" || (field.fieldKind === "list" && field.listKind === "scalar")) &&
  field.scalar === ScalarType.STRING;

const isId = (field: DescField) => holdsStrings(field) && (/(^|_)ids?$/.test(field.name) || ALSO.has(field.name));

/** Every field of a request in which an id can stand. */
export function idFields(desc: DescMessage, path: FieldPath = [], above: readonly DescMessage[] = []): FieldPath[] {
  if (above.includes(desc) || above.length > MAX_DEPTH || desc.typeName.startsWith("google.protobuf.")) return [];
  return desc.fields.flatMap((field) => {
    if (isId(field)) return [[...path, field]];
    const isMessage = field.fieldKind === "message" || (field.fieldKind === "list" && field.listKind === "message");
    return isMessage && field.message ? idFields(field.message, [...path, field], [...above, desc]) : [];
  });
}

export const textOf = (path: FieldPath): string => path.map((field) => field.name).join(".");

type Fields = Record<string, unknown>;
type Choice = { case?: string; value?: unknown };

function valueAt(message: Message, field: DescField): unknown {
  const fields = message as unknown as Fields;
  if (!field.oneof) return fields[field.localName];
  const choice = fields[field.oneof.localName] as Choice;
  return choice.case === field.localName ? choice.value : undefined;
}

function put(message: Message, field: DescField, value: unknown): void {
  const fields = message as unknown as Fields;
  if (field.oneof) fields[field.oneof.localName] = { case: field.localName, value };
  else fields[field.localName] = value;
}

/** What has to stand beside an id for a request to be understood, by the type of message. */
export type Around = Record<string, object>;

function set(message: Message, [field, ...rest]: FieldPath, id: string, around: Around): void {
  if (!field) return;
  const isList = field.fieldKind === "list";
  if (rest.length) {
    const before = valueAt(message, field);
    const [first, ...others] = isList ? ((before ?? []) as Message[]) : [before as Message | undefined];
    const { message: desc } = field as { message: DescMessage };
    const child = first ?? create(desc, (around[desc.typeName] ?? {}) as Fields);
    set(child, rest, id, around);
    put(message, field, isList ? [child, ...others] : child);
  } else put(message, field, isList ? [id] : id);
}

/** A copy of a request with an id in one place; what leads there is made. */
export function withId<M extends Message>(
  desc: DescMessage,
  request: M,
  path: FieldPath,
  id: string,
  around: Around,
): M {
  const copy = clone(desc, request) as M;
  set(copy, path, id, around);
  return copy;
}

/** The id, or ids, that a request has in a place. */
export function idsAt(message: Message | undefined, [field, ...rest]: FieldPath): string[] {
  if (!message || !field) return [];
  const value = valueAt(message, field);
  const values = value === undefined ? [] : Array.isArray(value) ? value : [value];
  return rest.length ? values.flatMap((each) => idsAt(each as Message, rest)) : values.filter(Boolean).map(String);
}
