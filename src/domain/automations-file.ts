import {
  type DescField,
  type DescMessage,
  fromJson,
  type JsonObject,
  type JsonValue,
  ScalarType,
} from "@bufbuild/protobuf";
import { DurationSchema } from "@bufbuild/protobuf/wkt";
import {
  isAlias,
  isMap,
  isScalar,
  isSeq,
  Lexer,
  type Node,
  type Pair,
  parseDocument,
  type Scalar,
  type YAMLMap,
} from "yaml";
import {
  type AutomationsFile,
  AutomationsFile_ServiceSchema,
  AutomationsFile_TaskSchema,
  AutomationsFileSchema,
  RunsOn_DockerSchema,
  ServiceSpec_CommandsSchema,
} from "../../gen/gitpod/v1/environment_automation_pb.js";
import { MAX_FILE_BYTES } from "./automation-upsert.ts";

// The text of an automations file, YAML 1.2 or JSON. It is read by the structure of the message, so that every mistake
// is told with its line and its path, and by us: converting YAML to a value as the library does it takes time or memory
// that grows with the square of a hostile text, or faster.

/** What is wrong with a file, and where. */
export interface FileFault {
  /** Counted from 1. */
  line: number;
  /** For example `tasks.build.dependsOn[0]`; empty for the file as a whole. */
  path: string;
  message: string;
}

/** The file, or the first thing that is wrong with it. */
export type ParsedFile = { file: AutomationsFile; fault?: never } | { file?: never; fault: FileFault };

/** A fault as one sentence for people. */
export const faultText = ({ line, path, message }: FileFault) => `line ${line}: ${path ? `${path} ` : ""}${message}`;

const MAX_TOKENS = 100_000;
const MAX_NESTING = 100;
const DAY_S = 86_400;
const REFERENCE = /^[a-zA-Z0-9_-]{1,128}$/;
const SECONDS = /^(\d{1,9})(?:\.\d{1,9})?s$/;
/** What the lexer adds to the text, in which it has no place. */
const MARKS = new Set(["\u0002", "\u0018", "\u001f"]);
const BAD_ESCAPE = /\\(?![0abt\tnvfre "/\\N_LP\r\n]|x[\da-f]{2}|u[\da-f]{4}|U[\da-f]{8})./is;

class Fault extends Error {
  readonly path: string;
  readonly offset: number;

  constructor(offset: number, path: string, message: string) {
    super(message);
    this.offset = offset;
    this.path = path;
  }
}

const start = (node: unknown) => (node as Node | null)?.range?.[0] ?? 0;

/** Refuses texts that take long to compose: too much of everything but words. */
function checkEffort(text: string): void {
  let [offset, tokens, depth] = [0, 0, 0];
  for (const token of new Lexer().lex(text)) {
    if (++tokens > MAX_TOKENS) throw new Fault(offset, "", `has more than ${MAX_TOKENS} tokens`);
    if (token === "[" || token === "{") depth++;
    if (token === "]" || token === "}") depth--;
    if (depth > MAX_NESTING) throw new Fault(offset, "", "is nested too deeply");
    if (token.startsWith('"') && BAD_ESCAPE.test(token)) throw new Fault(offset, "", "has an unknown escape sequence");
    if (!MARKS.has(token)) offset += token.length;
  }
}

/** Fields that people look for where there are none, by message. */
const HINTS: Record<string, Record<string, string>> = {
  [AutomationsFile_ServiceSchema.typeName]: {
    dependsOn: "is not a field of services: only tasks can depend on others",
    command: "is not a field of services: use commands.start",
  },
};
const NO_VARIABLES = "does not exist: use secrets, or runsOn.docker.environment";

function unknownField({ typeName, fields }: DescMessage, name: string): string {
  if (name === "<<") return "is not a field: merging is not part of YAML 1.2";
  const hint = HINTS[typeName]?.[name.replace(/_(.)/g, (_all, letter: string) => letter.toUpperCase())];
  if (hint) return hint;
  if (name === "env") return NO_VARIABLES;
  return `is not a known field; there are ${fields.map(({ jsonName }) => jsonName).join(", ")}`;
}

const TRIGGERS = new Set(["manual", "postEnvironmentStart", "postDevcontainerStart", "prebuild"]);
const API_TRIGGERS = new Set(["postMachineStart", "beforeSnapshot"]);
const ROLES = new Set(["", "default", "editor", "ai-agent"]);

const isText = (value: JsonValue | undefined) => typeof value === "string" && value !== "";

function triggerProblem(value: JsonValue): string | undefined {
  if (TRIGGERS.has(String(value))) return undefined;
  if (API_TRIGGERS.has(String(value))) return "can only be set through the API";
  return `must be one of ${[...TRIGGERS].join(", ")}`;
}

function roleProblem(value: JsonValue): string | undefined {
  if (ROLES.has(String(value))) return undefined;
  return value === "security-agent" ? "can only be set through the API" : "must be default, editor or ai-agent";
}

function durationProblem(value: JsonValue): string | undefined {
  const [, seconds] = SECONDS.exec(String(value)) ?? [];
  if (seconds === undefined) return 'must be in seconds, for example "90s"';
  return Number.parseFloat(String(value)) > DAY_S ? `must be at most ${DAY_S}s` : undefined;
}

/** What the schema demands of single values, by message and field. */
const VALUES: Record<string, Record<string, (value: JsonValue) => string | undefined>> = {
  [AutomationsFile_ServiceSchema.typeName]: {
    triggeredBy: triggerProblem,
    role: roleProblem,
    readinessTimeout: durationProblem,
  },
  [AutomationsFile_TaskSchema.typeName]: { triggeredBy: triggerProblem },
};

/** Fields that must be there and not empty, by message. */
const REQUIRED: Record<string, readonly string[]> = {
  [AutomationsFile_ServiceSchema.typeName]: ["name"],
  [AutomationsFile_TaskSchema.typeName]: ["name", "command"],
  [ServiceSpec_CommandsSchema.typeName]: ["start"],
  [RunsOn_DockerSchema.typeName]: ["image"],
};

/** Reads nodes in the order of the text, and counts what anchors make of it. */
class Reader {
  readonly #anchors = new Map<string, Node>();
  /** Anchored nodes that are being read: one that holds itself would never end. */
  readonly #open = new Set<Node>();
  #bytes = 0;
  #copies = 0;

  file(node: unknown): JsonObject {
    const isEmpty = node === null || (isScalar(node) && node.value === null);
    return isEmpty ? {} : this.#message(AutomationsFileSchema, node, "");
  }

  /** The node that is meant, be it anchored or an alias of one, read by `read`. */
  #read<T>(node: unknown, path: string, read: (node: Node | null) => T): T {
    if (!isAlias(node)) {
      const own = node as Node | null;
      const anchor = own && "anchor" in own ? (own.anchor as string | undefined) : undefined;
      if (own && anchor && this.#copies === 0) this.#anchors.set(anchor, own);
      if (own) this.#open.add(own);
      const value = read(own);
      if (own) this.#open.delete(own);
      return value;
    }
    const target = this.#anchors.get(node.source);
    if (!target) throw new Fault(start(node), path, `refers to &${node.source}, which is not defined before it`);
    if (this.#open.has(target)) throw new Fault(start(node), path, `refers to &${node.source}, which it is part of`);
    this.#copies++;
    const value = this.#read(target, path, read);
    this.#copies--;
    return value;
  }

  #count(node: Node | null, path: string, text: string): void {
    this.#bytes += Buffer.byteLength(text) + 1;
    if (this.#bytes > MAX_FILE_BYTES)
      throw new Fault(start(node), path, `has more than ${MAX_FILE_BYTES} bytes once its anchors are expanded`);
  }

  #keyOf(pair: Pair, path: string): string {
    return this.#read(pair.key, path, (key) => {
      if (!isScalar(key)) throw new Fault(start(key), path, "has a key that is not a word");
      // As it is written: 1 and true are references like any other.
      const text = key.source ?? String(key.value);
      this.#count(key, path, text);
      return text;
    });
  }

  #pairs(node: Node | null, path: string): { key: string; pair: Pair; path: string }[] {
    if (!isMap(node)) throw new Fault(start(node), path, mappingExpected(node, path));
    this.#count(node, path, "");
    return (node as YAMLMap).items.map((pair) => {
      const key = this.#keyOf(pair, path);
      return { key, pair, path: path ? `${path}.${key}` : key };
    });
  }

  #message(desc: DescMessage, node: unknown, path: string): JsonObject {
    return this.#read(node, path, (own) => {
      const found = new Map<string, JsonValue>();
      const given = new Set<string>();
      const choices = new Set<unknown>();
      for (const { key, pair, path: at } of this.#pairs(own, path)) {
        const field = desc.fields.find(({ name, jsonName }) => key === jsonName || key === name);
        if (!field) throw new Fault(start(pair.key), at, unknownField(desc, key));
        if (given.has(field.jsonName)) throw new Fault(start(pair.key), at, "is given twice");
        given.add(field.jsonName);
        const value = this.#field(desc, field, pair.value, at);
        if (value === null) continue;
        if (field.oneof && choices.has(field.oneof))
          throw new Fault(start(pair.key), at, "cannot be combined with the other target");
        choices.add(field.oneof);
        found.set(field.jsonName, value);
      }
      for (const name of REQUIRED[desc.typeName] ?? []) {
        if (!isText(found.get(name)))
          throw new Fault(start(own), path ? `${path}.${name}` : name, "is required and must not be empty");
      }
      return Object.fromEntries(found);
    });
  }

  #field(desc: DescMessage, field: DescField, node: unknown, path: string): JsonValue {
    const check = VALUES[desc.typeName]?.[field.jsonName];
    return this.#read(node, path, (own) => {
      if (own === null || (isScalar(own) && own.value === null)) return null;
      if (field.fieldKind === "map" && field.mapKind === "message") return this.#map(field.message, own, path);
      if (field.fieldKind === "message" && field.message.typeName !== DurationSchema.typeName)
        return this.#message(field.message, own, path);
      if (field.fieldKind !== "list") return this.#scalar(own, path, isFlag(field), check);
      if (!isSeq(own)) throw new Fault(start(own), path, "must be a list");
      return own.items.map((item, index) =>
        this.#read(item, `${path}[${index}]`, (each) => this.#scalar(each, `${path}[${index}]`, false, check)),
      );
    });
  }

  #map(desc: DescMessage, node: Node, path: string): JsonObject {
    const found = new Map<string, JsonValue>();
    for (const { key, pair, path: at } of this.#pairs(node, path)) {
      if (!REFERENCE.test(key) || key === "__proto__")
        throw new Fault(start(pair.key), at, "must be a reference of 1 to 128 letters, digits, _ or -");
      if (found.has(key)) throw new Fault(start(pair.key), at, "is given twice");
      found.set(key, this.#message(desc, pair.value ?? pair.key, at));
    }
    return Object.fromEntries(found);
  }

  #scalar(
    node: Node | null,
    path: string,
    isFlag: boolean,
    check: ((value: JsonValue) => string | undefined) | undefined,
  ): JsonValue {
    const value = isScalar(node) ? (node as Scalar).value : undefined;
    if (isFlag && typeof value === "boolean") return value;
    if (isFlag || typeof value !== "string")
      throw new Fault(start(node), path, isFlag ? "must be true or false" : "must be a text; put it in quotes");
    this.#count(node, path, value);
    const problem = check?.(value);
    if (problem) throw new Fault(start(node), path, problem);
    return value;
  }
}

const isFlag = (field: DescField) => field.fieldKind === "scalar" && field.scalar === ScalarType.BOOL;

function mappingExpected(node: Node | null, path: string): string {
  const isTarget = isScalar(node) && path.endsWith("runsOn");
  return isTarget ? "must be a mapping such as { machine: {} }" : "must be a mapping";
}

function compose(text: string): unknown {
  // Keys are compared by the reader: the library looks through all of them for each.
  const document = parseDocument(text, {
    ...{ version: "1.2", schema: "core", uniqueKeys: false, prettyErrors: false, logLevel: "error" },
  });
  const [fault] = [...document.errors, ...document.warnings];
  if (fault) throw new Fault(fault.pos[0], "", `is not valid: ${fault.message}`);
  return document.contents;
}

/** Reads the text of an automations file; an empty one is valid. */
export function parseAutomationsFile(text: string): ParsedFile {
  try {
    if (Buffer.byteLength(text) > MAX_FILE_BYTES) throw new Fault(0, "", `has more than ${MAX_FILE_BYTES} bytes`);
    checkEffort(text);
    const json = new Reader().file(compose(text));
    return { file: fromJson(AutomationsFileSchema, json) };
  } catch (error) {
    if (error instanceof RangeError) return { fault: { line: 1, path: "", message: "is nested too deeply" } };
    if (!(error instanceof Fault)) throw error;
    const { offset, path, message } = error;
    const line = text.slice(0, offset).split("\n").length;
    return { fault: { line, path, message } };
  }
}

/** What is odd about a file that can be applied, as sentences for people. */
export function fileWarnings({ services, tasks }: AutomationsFile): string[] {
  const items = [...Object.values(services), ...Object.values(tasks)];
  const isIdle = items.length > 0 && items.every(({ triggeredBy }) => triggeredBy.length === 0);
  const unstartable = Object.keys(services)
    .filter((reference) => !services[reference]?.commands?.start)
    .sort();
  return [
    ...(isIdle ? ["nothing in the automations file has a trigger, so nothing of it starts by itself"] : []),
    ...unstartable.map((reference) => `service ${reference} has no start command and can never be started`),
  ];
}
