import type { Fragment, Sql, Tx } from "./db.ts";

/** Pattern for `like` that matches a literal substring of a lower-case text. */
export const containing = (text: string) => `%${text.toLowerCase().replace(/[\\%_]/g, "\\$&")}%`;

/** `=` for one id: `= any` with a rare one in a large organization reads the whole index. */
export function oneOf(sql: Sql | Tx, column: Fragment, values: readonly (string | number)[]): Fragment {
  const [first] = values;
  // The contract lets any number through, the columns are small.
  if (typeof first === "number") return sql`${column} = any(${values as number[]}::int[])`;
  if (values.length === 1 && first !== undefined) return sql`${column} = ${first}`;
  return sql`${column} = any(${values as string[]})`;
}

/** All of them; at least one. */
export const conjunction = (sql: Sql | Tx, conditions: readonly Fragment[]): Fragment =>
  conditions.reduce((all, each) => sql`${all} and ${each}`);

/** One of them; at least one. */
export const disjunction = (sql: Sql | Tx, conditions: readonly Fragment[]): Fragment =>
  sql`(${conditions.reduce((any, each) => sql`${any} or ${each}`)})`;

/** The rows of all queries; at least one. */
export const union = (sql: Sql | Tx, queries: readonly Fragment[]): Fragment =>
  queries.reduce((all, each) => sql`${all} union all ${each}`);
