import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import { notFound } from "../../domain/errors.ts";
import type { EnvironmentState } from "../../domain/lifecycle.ts";
import type { Page } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { readsEnvironment } from "../access.ts";
import { conjunction } from "../conditions.ts";
import type { Fragment, Sql, Tx } from "../db.ts";

// Services, tasks and executions are parts of an environment: whoever may read it may read them, and whoever changes
// one of them holds its row.

/** A kind of part, with its table and what people call it. */
export type Part = "services" | "tasks" | "task_executions";
const NAMES: Record<Part, string> = { services: "service", tasks: "task", task_executions: "task execution" };

export const noSuchPart = (part: Part, id: string) => notFound(NAMES[part], id);

/** An environment as far as its parts need to know it. */
export interface HomeEnvironment extends EnvironmentState {
  id: string;
  organizationId: string;
}

/** Condition: part `p` has this id and lies in an environment that the caller may read. */
export const readablePart = (sql: Sql | Tx, caller: Caller, id: string): Fragment =>
  sql`p.id = ${id} and exists (select from environments e where e.id = p.environment_id and ${readsEnvironment(sql, caller)})`;

/** Values of one column, by any of which a part is wanted; none if all are. */
export interface PartFilter {
  column: "id" | "environment_id" | "task_id" | "reference" | "task_reference";
  values: readonly string[] | undefined;
}

const TEXTS: ReadonlySet<string> = new Set(["reference", "task_reference"]);

function among(sql: Sql, { column, values }: PartFilter): Fragment {
  const list = TEXTS.has(column) ? sql`${values as string[]}::text[]` : sql`${values as string[]}::uuid[]`;
  return sql`(select distinct value from unnest(${list}) as given (value)) as wanted`;
}

/**
 * Parts that the caller may read and that satisfy filters and conditions, newest first, one more than the page holds.
 * The first filter that is given leads, one look into its index for each of its values: together they would be a scan.
 */
export async function listParts<Row extends object>(
  sql: Sql,
  caller: Caller,
  query: { part: Part; columns: Fragment; filters: readonly PartFilter[]; conditions: readonly Fragment[]; page: Page },
): Promise<Row[]> {
  const { part, page } = query;
  const own: PartFilter[] =
    caller.principal === Principal.ENVIRONMENT ? [{ column: "environment_id", values: [caller.id] }] : [];
  const [lead, ...others] = [...query.filters, ...own].filter(({ values }) => values?.length);
  const limit = page.limit + 1;
  const where = conjunction(sql, [
    sql`p.organization_id = ${caller.organizationId}`,
    readsEnvironment(sql, caller),
    ...others.map((each) => sql`p.${sql(each.column)} in (select value from ${among(sql, each)})`),
    ...query.conditions,
    ...(page.after ? [sql`p.id < ${page.after}`] : []),
  ]);
  const from = sql`${sql(part)} p join environments e on e.id = p.environment_id`;
  if (!lead) return sql<Row[]>`select ${query.columns} from ${from} where ${where} order by p.id desc limit ${limit}`;
  return sql<Row[]>`
    select found.* from ${among(sql, lead)} cross join lateral (
      select ${query.columns} from ${from} where p.${sql(lead.column)} = wanted.value and ${where} order by p.id desc limit ${limit}
    ) found order by found.id desc limit ${limit}`;
}
