import { open } from "node:fs/promises";
import { toJson } from "@bufbuild/protobuf";
import { UpsertAutomationsFileResponseSchema } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { MAX_FILE_BYTES } from "../../domain/automation-upsert.ts";
import { fileWarnings, parseAutomationsFile } from "../../domain/automations-file.ts";
import { ExitCode, Failure } from "../exit.ts";
import { printable } from "../output.ts";
import type { AutomationsCommand } from "./command.ts";
import { table } from "./list.ts";

const STDIN = "-";

async function readAll(name: string, source: AsyncIterable<Uint8Array>): Promise<string> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of source) {
    size += chunk.length;
    if (size > MAX_FILE_BYTES) throw new Failure(`${name} has more than ${MAX_FILE_BYTES} bytes`);
    chunks.push(chunk);
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks));
  } catch {
    throw new Failure(`${name} is not a text in UTF-8`);
  }
}

async function readFile(path: string): Promise<string> {
  const failed = (error: unknown) =>
    error instanceof Failure
      ? error
      : new Failure(`${printable(path)} cannot be read: ${error instanceof Error ? error.message : String(error)}`);
  const file = await open(path).catch((error: unknown) => {
    throw failed(error);
  });
  try {
    return await readAll(printable(path), file.createReadStream({ autoClose: false }));
  } catch (error) {
    throw failed(error);
  } finally {
    await file.close();
  }
}

export const applyCommand: AutomationsCommand = {
  name: "apply",
  usage: "FILE [--json]",
  about: "create and change services and tasks as a file in YAML or JSON says, - for standard input",
  operands: 1,
  options: { json: { type: "boolean", default: false } },
  async run({ client, environmentId }, { operands: [path = ""], values, terminal }) {
    const text = path === STDIN ? await readAll("standard input", terminal.input) : await readFile(path);
    const { file, fault } = parseAutomationsFile(text);
    if (fault) {
      const { line, path: field, message } = fault;
      const where = `${path === STDIN ? "stdin" : path}:${line}:`;
      throw new Failure(printable([where, field, message].filter(Boolean).join(" ")));
    }
    const request = { environmentId, automationsFile: file };
    const answer = await client.environmentAutomation.upsertAutomationsFile(request);
    for (const warning of fileWarnings(file)) terminal.tell(`Note: ${printable(warning)}`);
    if (values.json) {
      terminal.say(JSON.stringify(toJson(UpsertAutomationsFileResponseSchema, answer)));
      return ExitCode.CLEAN;
    }
    const rows = [
      ...named("service", file.services, answer.updatedServiceIds),
      ...named("task", file.tasks, answer.updatedTaskIds),
    ];
    if (rows.length === 0) terminal.tell("The file is empty: nothing changes.");
    else terminal.say(table([["KIND", "REFERENCE", "ID"], ...rows]));
    return ExitCode.CLEAN;
  },
};

/** The answer lists ids in the order of the references. */
const named = (kind: string, items: Readonly<Record<string, unknown>>, ids: readonly string[]): string[][] =>
  Object.keys(items)
    .sort()
    .map((reference, index) => [kind, reference, ids[index] ?? ""]);
