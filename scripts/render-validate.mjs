// Writes buf/validate/validate.proto from the descriptor inside @bufbuild/protovalidate, so that code generation
// needs no schema registry. Only the shape is rendered: the CEL behind the standard rules stays in the library.
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const library = dirname(fileURLToPath(import.meta.resolve("@bufbuild/protovalidate")));
const { file_buf_validate_validate: file } = await import(
  pathToFileURL(join(library, "gen/buf/validate/validate_pb.js")).href
);

const SCALARS = [
  "",
  "double",
  "float",
  "int64",
  "uint64",
  "int32",
  "fixed64",
  "fixed32",
  "bool",
  "string",
  "group",
  "message",
  "bytes",
  "uint32",
  "enum",
  "sfixed32",
  "sfixed64",
  "sint32",
  "sint64",
];
const LABELS = ["", "optional ", "required ", "repeated "];

const typeOf = (f) => (f.typeName ? f.typeName : SCALARS[f.type]);

function field(f, indent, inOneof = false) {
  const options = [];
  if (f.options?.deprecated) options.push("deprecated = true");
  const label = inOneof ? "" : LABELS[f.label];
  return `${indent}${label}${typeOf(f)} ${f.name} = ${f.number}${options.length ? ` [${options.join(", ")}]` : ""};`;
}

function ranges(list) {
  return list.map((r) => `${r.start} to ${r.end > 536_870_911 ? "max" : r.end - 1}`).join(", ");
}

function enumeration(e, indent) {
  const lines = [`${indent}enum ${e.name} {`];
  for (const r of e.reservedRange) lines.push(`${indent}  reserved ${r.start} to ${r.end};`);
  for (const v of e.value) lines.push(`${indent}  ${v.name} = ${v.number};`);
  return [...lines, `${indent}}`];
}

function message(m, indent) {
  const inner = `${indent}  `;
  const lines = [`${indent}message ${m.name} {`];
  for (const nested of m.nestedType) lines.push(...message(nested, inner));
  for (const nested of m.enumType) lines.push(...enumeration(nested, inner));
  if (m.reservedRange.length) lines.push(`${inner}reserved ${ranges(m.reservedRange)};`);
  if (m.reservedName.length) lines.push(`${inner}reserved ${m.reservedName.map((n) => `"${n}"`).join(", ")};`);
  if (m.extensionRange.length) lines.push(`${inner}extensions ${ranges(m.extensionRange)};`);
  const inOneof = (f) => Object.hasOwn(f, "oneofIndex") && !f.proto3Optional;
  m.oneofDecl.forEach((oneof, index) => {
    const members = m.field.filter((f) => inOneof(f) && f.oneofIndex === index);
    if (!members.length) return;
    lines.push(`${inner}oneof ${oneof.name} {`, ...members.map((f) => field(f, `${inner}  `, true)), `${inner}}`);
  });
  for (const f of m.field) if (!inOneof(f)) lines.push(field(f, inner));
  return [...lines, `${indent}}`];
}

const { proto } = file;
if ((proto.syntax || "proto2") !== "proto2") throw new Error(`validate.proto is ${proto.syntax}: teach this script`);
const text = [
  "// Rendered by scripts/render-validate.mjs; do not edit, do not commit.",
  'syntax = "proto2";',
  `package ${proto.package};`,
  ...proto.dependency.map((d) => `import "${d}";`),
  ...proto.messageType.flatMap((m) => message(m, "")),
  ...proto.enumType.flatMap((e) => enumeration(e, "")),
  ...proto.extension.flatMap((f) => [`extend ${f.extendee} {`, field(f, "  "), "}"]),
  "",
].join("\n");

const target = join(root, ".buf/validate/buf/validate/validate.proto");
mkdirSync(dirname(target), { recursive: true });
writeFileSync(target, text);
