// Copies the published facts of the wire contract into test/contract, one fact per line so that a change reads as a diff.
// Usage: node scripts/contract-facts.ts FOLDER, where FOLDER holds one JSON file of facts per .proto file.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

interface Source {
  file: string;
  package: string;
  services: { name: string; rpcs: { name: string }[] }[];
  enums: Record<string, Record<string, number>>;
  messages: Record<string, { fields: { name: string }[] }>;
}

function factsOf({ file, services, enums, messages }: Source): object[] {
  return [
    ...services.flatMap(({ name: service, rpcs }) =>
      rpcs.map(({ name, ...rpc }) => ({ rpc: `${service}/${name}`, file, ...rpc })),
    ),
    ...Object.entries(enums).map(([name, values]) => ({ enum: name, file, values })),
    ...Object.entries(messages).flatMap(([message, { fields, ...about }]) => [
      { message, file, ...about },
      ...fields.map(({ name, ...field }) => ({ field: name, of: message, ...field })),
    ]),
  ];
}

const folder = process.argv[2];
if (!folder) {
  console.error("usage: node scripts/contract-facts.ts FOLDER");
  process.exit(2);
}
const lines = new Map<string, string[]>();
for (const name of readdirSync(folder).sort()) {
  if (!name.endsWith(".json")) continue;
  const source: Source = JSON.parse(readFileSync(join(folder, name), "utf8"));
  const ofPackage = lines.get(source.package) ?? [];
  lines.set(source.package, [...ofPackage, ...factsOf(source).map((fact) => JSON.stringify(fact))]);
}
for (const [name, facts] of lines) {
  writeFileSync(join(import.meta.dirname, "../test/contract", `${name}.jsonl`), `${facts.join("\n")}\n`);
}
