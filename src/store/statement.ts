import type postgres from "postgres";
import type { Fragment, Sql, Tx } from "./db.ts";

// The driver makes a query with all that belongs to one of every piece of a statement, which for one of many pieces takes
// longer than to send it and read the answer. Where that matters, pieces are put together here, and the driver gets text.

/** A piece of a statement: text, and what comes between. */
class Piece {
  readonly strings: readonly string[];
  readonly values: readonly unknown[];

  constructor(strings: readonly string[], values: readonly unknown[]) {
    this.strings = strings;
    this.values = values;
  }
}

/** Makes pieces like a client does, for functions that are given one to do so; nothing that it makes can be run itself. */
export const pieces = ((strings: readonly string[], ...values: unknown[]) =>
  new Piece(strings, values)) as unknown as Sql & Tx;

/** A statement as the database takes it. */
export interface Statement {
  text: string;
  parameters: unknown[];
}

function append(piece: Piece, parameters: unknown[]): string {
  let text = piece.strings[0] ?? "";
  for (const [index, value] of piece.values.entries()) {
    text += value instanceof Piece ? append(value, parameters) : `$${parameters.push(value)}`;
    text += piece.strings[index + 1];
  }
  return text;
}

/** The statement of what `pieces` has made. */
export function assemble(fragment: Fragment): Statement {
  const parameters: unknown[] = [];
  return { text: append(fragment as unknown as Piece, parameters), parameters };
}

/** Sends a statement, at once. It is prepared once on each connection, so texts must not differ from call to call. */
export const run = <T extends postgres.Row>(sql: Sql | Tx, { text, parameters }: Statement): Promise<T[]> =>
  sql.unsafe<T[]>(text, parameters as never[], { prepare: true }).execute();
