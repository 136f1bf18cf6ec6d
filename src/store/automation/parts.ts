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

/** Bytes of stored messages after which a page ends, full or not: answers and memory have their bounds too. */
const PAGE_BYTES = 8 * 1024 * 1024;

/** Rows of a page, newest first, one more than it holds. */
export interface PartRows<Row> {
  rows: Row[];
  /** It ends before it is full, because what follows would be too large. */
  isCut: boolean;
}

/**
 * Parts that the caller may read and that satisfy filters and conditions. The first filter that is given leads, one look
 * into its index for each of its values: together they would be a scan. Which parts belong to the page is decided before
 * any of them is read.
 */
export async function listParts<Row extends object>(
  sql: Sql,
  caller: Caller,
  query: {
    part: Part;
    columns: Fragment;
    /** Size of a part `p` in bytes. */
    bytes: Fragment;
    filters: readonly PartFilter[];
    conditions: readonly Fragment[];
    page: Page;
  },
): Promise<PartRows<Row>> {
  const { part, page } = query;
  const own: PartFilter[] =
    caller.principal === Principal.ENVIRONMENT ? [{ column: "environment_id", values: [caller.id] }] : [];
  const [lead, ...others] = [...query.filters, ...own].filter(({ values }) => values?.length);
  const limit = page.limit + 1;
  const where = conjunction(sql, [
    sql`p.organization_id = ${caller.organizationId}`,
    readsEnvironment(sql, caller),
    ...(lead ? [sql`p.${sql(lead.column)} = wanted.value`] : []),
    ...others.map((each) => sql`p.${sql(each.column)} in (select value from ${among(sql, each)})`),
    ...query.conditions,
    ...(page.after ? [sql`p.id < ${page.after}`] : []),
  ]);
  const newest = sql`
    select p.id, ${query.bytes} as bytes from ${sql(part)} p join environments e on e.id = p.environment_id
    where ${where} order by p.id desc limit ${limit}`;
  const found = lead
    ? sql`select each.* from ${among(sql, lead)} cross join lateral (${newest}) each order by each.id desc limit ${limit}`
    : newest;
  const rows = await sql<(Row & { total: number })[]>`
    with found as (${found}), sized as (
      select id, count(*) over ()::int as total,
        coalesce(sum(bytes) over (order by id desc rows between unbounded preceding and 1 preceding), 0) as before
      from found
    )
    select sized.total, ${query.columns} from sized join ${sql(part)} p on p.id = sized.id
    where sized.before < ${PAGE_BYTES} order by p.id desc`;
  return { rows, isCut: (rows[0]?.total ?? 0) > rows.length };
}
