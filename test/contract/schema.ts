import { globSync } from "node:fs";
import { join } from "node:path";
import {
  createRegistry,
  type DescEnum,
  type DescField,
  type DescFile,
  type DescMessage,
  type DescService,
  getOption,
  hasOption,
  type JsonObject,
  ScalarType,
  toJson,
} from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import { FieldRulesSchema, field, message, oneof } from "../../gen/buf/validate/validate_pb.js";

const GEN = join(import.meta.dirname, "../../gen");

async function fileOf(path: string): Promise<DescFile> {
  const exported: Record<string, unknown> = await import(join(GEN, path));
  const name = Object.keys(exported).find((key) => key.startsWith("file_"));
  return exported[name!] as DescFile;
}

/** Descriptors of every generated file. */
export const files = await Promise.all(globSync("**/*_pb.js", { cwd: GEN }).map(fileOf));

export const registry = createRegistry(...files);

/** What a fact says besides its name: a plain JSON object without absent properties. */
export type Facts = Record<string, JsonObject>;

const scalarName = (scalar: ScalarType) => ScalarType[scalar].toLowerCase();

function elementType(element: { scalar?: ScalarType; enum?: DescEnum; message?: DescMessage }): string {
  return (element.enum ?? element.message)?.typeName ?? scalarName(element.scalar!);
}

function label(desc: DescField): string | undefined {
  if (desc.fieldKind === "list") return "repeated";
  if (desc.fieldKind === "map") return "map";
  return desc.proto.proto3Optional ? "optional" : undefined;
}

const present = (fact: Record<string, unknown>) =>
  Object.fromEntries(Object.entries(fact).filter(([, value]) => value !== undefined && value !== false)) as JsonObject;

function fieldFact(desc: DescField): JsonObject {
  const type = elementType(desc);
  return present({
    number: desc.number,
    type: desc.fieldKind === "map" ? `map<${scalarName(desc.mapKey)},${type}>` : type,
    label: label(desc),
    oneof: desc.oneof?.name,
    deprecated: desc.deprecated,
    rules: hasOption(desc, field) ? toJson(FieldRulesSchema, getOption(desc, field)) : undefined,
  });
}

function enumFacts(desc: DescEnum): Facts {
  return { [desc.typeName]: { values: Object.fromEntries(desc.values.map(({ name, number }) => [name, number])) } };
}

function messageFacts(desc: DescMessage): Facts {
  // Descriptors end ranges one past the last number.
  const reserved = desc.proto.reservedRange.map(({ start, end }) => [start, end - 1]);
  const own = present({
    reserved: reserved.length > 0 ? reserved : undefined,
    rules: hasOption(desc, message) || desc.oneofs.some((group) => hasOption(group, oneof)),
  });
  return Object.assign(
    { [desc.typeName]: own },
    ...desc.fields.map((each) => ({ [`${desc.typeName}.${each.name}`]: fieldFact(each) })),
    ...desc.nestedEnums.map(enumFacts),
    ...desc.nestedMessages.filter((nested) => !nested.proto.options?.mapEntry).map(messageFacts),
  );
}

function serviceFacts(desc: DescService): Facts {
  return Object.fromEntries(
    desc.methods.map((method) => [
      `${desc.typeName}/${method.name}`,
      present({
        input: method.input.typeName,
        output: method.output.typeName,
        readOnly: method.idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS,
        serverStreaming: method.methodKind === "server_streaming",
        clientStreaming: method.methodKind === "client_streaming" || method.methodKind === "bidi_streaming",
        deprecated: method.deprecated,
      }),
    ]),
  );
}

/** Everything the schema of one file says that the wire can tell, by full name. */
export function factsOf(file: DescFile): Facts {
  return Object.assign(
    {},
    ...file.services.map(serviceFacts),
    ...file.enums.map(enumFacts),
    ...file.messages.map(messageFacts),
  );
}
