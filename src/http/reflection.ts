import {
  type DescExtension,
  type DescFile,
  type DescMessage,
  type DescService,
  type MessageInitShape,
  toBinary,
} from "@bufbuild/protobuf";
import { nestedTypes } from "@bufbuild/protobuf/reflect";
import { FileDescriptorProtoSchema } from "@bufbuild/protobuf/wkt";
import { Code, type ServiceImpl } from "@connectrpc/connect";
import type {
  ServerReflection,
  ServerReflectionRequest,
  ServerReflectionResponseSchema,
} from "../../gen/grpc/reflection/v1/reflection_pb.js";
import type { ServerReflection as ServerReflectionAlpha } from "../../gen/grpc/reflection/v1alpha/reflection_pb.js";

type Question = ServerReflectionRequest["messageRequest"];
type Answer = MessageInitShape<typeof ServerReflectionResponseSchema>["messageResponse"];

/** What the schemas of some services declare, transitively. */
interface Schemas {
  files: Map<string, DescFile>;
  symbols: Map<string, DescFile>;
  extensions: DescExtension[];
}

function* withImports(file: DescFile, seen: Set<string>): Generator<DescFile> {
  if (seen.has(file.proto.name)) return;
  seen.add(file.proto.name);
  yield file;
  for (const imported of file.dependencies) yield* withImports(imported, seen);
}

function namesOf(file: DescFile): string[] {
  const names: string[] = [];
  for (const type of nestedTypes(file)) {
    names.push(type.typeName);
    if (type.kind === "service") names.push(...type.methods.map(({ name }) => `${type.typeName}.${name}`));
    if (type.kind === "message") names.push(...type.members.map(({ name }) => `${type.typeName}.${name}`));
    // Values of an enum live beside it, not inside.
    if (type.kind === "enum") {
      const scope = type.typeName.split(".").slice(0, -1);
      names.push(...type.values.map(({ name }) => [...scope, name].join(".")));
    }
  }
  return names;
}

function schemasOf(services: readonly DescService[]): Schemas {
  const seen = new Set<string>();
  const files = services.flatMap(({ file }) => [...withImports(file, seen)]);
  return {
    files: new Map(files.map((file) => [file.proto.name, file])),
    symbols: new Map(files.flatMap((file) => namesOf(file).map((name) => [name, file]))),
    extensions: files.flatMap((file) => [...nestedTypes(file)].filter((type) => type.kind === "extension")),
  };
}

const notFound = (what: string): Answer => ({
  case: "errorResponse",
  value: { errorCode: Code.NotFound, errorMessage: `${what.slice(0, 200)} is not known` },
});

function filesAnswer(file: DescFile | undefined, what: string, sent: Set<string>): Answer {
  if (!file) return notFound(what);
  // Asked for by name it is sent again, imports are not.
  sent.delete(file.proto.name);
  const files = [...withImports(file, sent)];
  return {
    case: "fileDescriptorResponse",
    value: { fileDescriptorProto: files.map(({ proto }) => toBinary(FileDescriptorProtoSchema, proto)) },
  };
}

const extends_ = (typeName: string) => (extension: { extendee: DescMessage }) =>
  extension.extendee.typeName === typeName;

/** Answers one question; `sent` are the files that this stream has sent. */
function answer(schemas: Schemas, services: readonly DescService[], question: Question, sent: Set<string>): Answer {
  switch (question.case) {
    case "listServices":
      return { case: "listServicesResponse", value: { service: services.map(({ typeName }) => ({ name: typeName })) } };
    case "fileByFilename":
      return filesAnswer(schemas.files.get(question.value), question.value, sent);
    case "fileContainingSymbol":
      return filesAnswer(schemas.symbols.get(question.value), question.value, sent);
    case "fileContainingExtension": {
      const { containingType, extensionNumber } = question.value;
      const found = schemas.extensions.filter(extends_(containingType)).find((each) => each.number === extensionNumber);
      return filesAnswer(found?.file, `extension ${extensionNumber} of ${containingType}`, sent);
    }
    case "allExtensionNumbersOfType": {
      const numbers = schemas.extensions.filter(extends_(question.value)).map((each) => each.number);
      if (!numbers.length && !schemas.symbols.has(question.value)) return notFound(question.value);
      const value = { baseTypeName: question.value, extensionNumber: numbers };
      return { case: "allExtensionNumbersResponse", value };
    }
    default:
      return { case: "errorResponse", value: { errorCode: Code.InvalidArgument, errorMessage: "nothing was asked" } };
  }
}

/** gRPC server reflection about `services`, for clients without schemas. */
export function reflectionService(services: () => readonly DescService[]): {
  v1: ServiceImpl<typeof ServerReflection>;
  v1alpha: ServiceImpl<typeof ServerReflectionAlpha>;
} {
  let schemas: Schemas | undefined;
  const v1: ServiceImpl<typeof ServerReflection> = {
    async *serverReflectionInfo(requests) {
      schemas ??= schemasOf(services());
      const sent = new Set<string>();
      for await (const request of requests) {
        const messageResponse = answer(schemas, services(), request.messageRequest, sent);
        yield { validHost: request.host, originalRequest: request, messageResponse };
      }
    },
  };
  // Both versions have the same messages.
  return { v1, v1alpha: v1 as unknown as ServiceImpl<typeof ServerReflectionAlpha> };
}
