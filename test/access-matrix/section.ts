import type { DescService } from "@bufbuild/protobuf";
import { COLUMNS, type Column } from "./callers.ts";
import type { Fresh, World } from "./world.ts";

/** What a letter of a table stands for. */
export const OUTCOMES: Record<string, string> = {
  "✓": "ok",
  // An answer without what others find in it.
  "0": "ok, but not in it",
  U: "Unauthenticated",
  D: "PermissionDenied",
  N: "NotFound",
  F: "FailedPrecondition",
  E: "AlreadyExists",
  A: "Aborted",
  T: "DeadlineExceeded",
  i: "Unimplemented",
};

/** What a call says. */
export interface Call {
  request?: (world: World) => object;
  /** Objects that it uses up, or that there must be only one of. */
  fresh?: readonly Fresh[];
  /** Text that the answer holds if there is something in it for the caller, of a list the id of the object. */
  finds?: (world: World) => string;
}

/**
 * The part of the access matrix about one service. A table has a line for each RPC, and more for other requests, which
 * have a word behind the name. Its first line names the columns; "." is what a member without a role is answered.
 */
export interface Section<S extends DescService = DescService> {
  service: S;
  table: string;
  calls: Record<string, Call>;
}

export const section = <S extends DescService>(service: S, table: string, calls: Record<string, Call>): Section<S> => ({
  ...{ service, table, calls },
});

/** A line of a table. */
export interface Row {
  /** For example `createSecret project`: the RPC and what is special about the call. */
  name: string;
  rpc: string;
  expected: Record<Column, string>;
}

const columns = Object.keys(COLUMNS) as Column[];

export function rowsOf({ table, service }: Section): Row[] {
  const [head = "", ...lines] = table
    .trim()
    .split("\n")
    .map((line) => line.trim());
  const names = head.split(/ +/);
  if (names.join() !== columns.join()) throw new Error(`${service.name}: the columns must be ${columns.join(" ")}`);
  return lines.filter(Boolean).map((line) => {
    const cells = line.split(/ +/);
    const letters = cells.splice(-columns.length);
    const name = cells.join(" ");
    const member = letters[columns.indexOf("me")];
    const expected = letters.map((letter) => {
      const meant = letter === "." ? member : letter;
      return OUTCOMES[meant ?? ""] ?? `the unknown letter ${meant}`;
    });
    return {
      ...{ name, rpc: cells[0] ?? "" },
      expected: Object.fromEntries(columns.map((column, index) => [column, expected[index]])) as Row["expected"],
    };
  });
}
