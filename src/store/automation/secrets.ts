import type { SecretUse } from "../../domain/automation.ts";
import type { FieldProblem } from "../../domain/errors.ts";
import { type Caller, isPerson } from "../../domain/principal.ts";
import { readsSecret } from "../access.ts";
import type { Sql, Tx } from "../db.ts";
import { ownersOf } from "../secret-delivery.ts";
import type { HomeEnvironment } from "./parts.ts";

/** Those of these secrets that the caller can use and the environment has in scope; its own processes can use all such. */
async function secretsUsableBy(
  sql: Sql | Tx,
  caller: Caller,
  environment: HomeEnvironment,
  secretIds: readonly string[],
): Promise<ReadonlySet<string>> {
  const rows = await sql<{ id: string }[]>`
    select s.id from secrets s
    where s.id = any(${secretIds as string[]}) and s.organization_id = ${environment.organizationId}
      and s.scope_id = any(${ownersOf(environment)}) and ${isPerson(caller) ? readsSecret(sql, caller) : sql`true`}`;
  return new Set(rows.map(({ id }) => id));
}

/**
 * Those of these secrets that the services of an environment, or its executions that have not ended, name, and whether
 * each still exists in its scope.
 */
export async function secretsNamed(
  sql: Sql,
  environment: HomeEnvironment,
  secretIds: readonly string[],
): Promise<ReadonlyMap<string, boolean>> {
  const { id, organizationId } = environment;
  const rows = await sql<{ id: string; usable: boolean }[]>`
    select given.id, s.id is not null as usable from unnest(${secretIds as string[]}::uuid[]) as given (id)
    left join secrets s on s.id = given.id and s.organization_id = ${organizationId} and s.scope_id = any(${ownersOf(environment)})
    where exists (select from services p where p.environment_id = ${id} and given.id = any(p.secret_ids))
      or exists (select from task_executions p where p.environment_id = ${id} and p.completed_at is null and given.id = any(p.secret_ids))`;
  return new Map(rows.map((row) => [row.id, row.usable]));
}

/** Problems of the secrets that variables name; the same for one that does not exist and one that is out of reach. */
export async function secretProblems(
  sql: Sql | Tx,
  caller: Caller,
  environment: HomeEnvironment,
  uses: readonly SecretUse[],
): Promise<FieldProblem[]> {
  if (uses.length === 0) return [];
  const ids = uses.map(({ secretId }) => secretId.toLowerCase());
  const usable = await secretsUsableBy(sql, caller, environment, ids);
  return uses
    .filter(({ secretId }) => !usable.has(secretId.toLowerCase()))
    .map(({ field }) => ({ field, message: "is not a secret that can be used here" }));
}
