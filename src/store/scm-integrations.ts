import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type RunnerKind,
  type SCMIntegration,
  SCMIntegrationSchema,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { notFound, Refusal } from "../domain/errors.ts";
import type { Page } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { administersRunner, readsRunner } from "./access.ts";
import { conjunction, oneOf } from "./conditions.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import { type Change, record, recorded } from "./record.ts";

/** An integration with what the caller may do with its runner. */
export interface StoredIntegration {
  message: SCMIntegration;
  administers: boolean;
  runnerKind: RunnerKind;
}

interface IntegrationRow {
  message: Uint8Array;
  administers: boolean;
  runner_kind: RunnerKind;
}

const toIntegration = (row: IntegrationRow): StoredIntegration => ({
  message: fromBinary(SCMIntegrationSchema, row.message),
  administers: row.administers,
  runnerKind: row.runner_kind,
});

const columns = (sql: Sql | Tx, caller: Caller) =>
  sql`i.message, r.kind as runner_kind, ${administersRunner(sql, caller)} as administers`;

/** Stores a new integration. ALREADY_EXISTS if the runner has one for the host. */
export async function insertIntegration(
  tx: Tx,
  organizationId: string,
  message: SCMIntegration,
  change: Change,
): Promise<void> {
  const rows = await tx`
    insert into scm_integrations (id, organization_id, runner_id, host, scm_id, pat, oauth, message)
    values (${message.id}, ${organizationId}, ${message.runnerId}, ${message.host}, ${message.scmId}, ${message.pat},
      ${message.oauth !== undefined}, ${toBinary(SCMIntegrationSchema, message)})
    on conflict do nothing returning id`;
  if (!rows.length) throw new Refusal("already_exists", "the runner has an integration for this host already");
  await record(tx, change);
}

export async function updateIntegration(tx: Tx, message: SCMIntegration, change: Change): Promise<void> {
  await tx`
    with ${recorded(tx, change)}
    update scm_integrations set pat = ${message.pat}, oauth = ${message.oauth !== undefined},
      message = ${toBinary(SCMIntegrationSchema, message)} where id = ${message.id}`;
}

export async function deleteIntegration(tx: Tx, id: string, change: Change): Promise<void> {
  await tx`with ${recorded(tx, change)} delete from scm_integrations where id = ${id}`;
}

/** An integration of a runner that the caller may read; NOT_FOUND otherwise. */
export async function getIntegration(
  sql: Sql | Tx,
  caller: Caller,
  id: string,
  lock = false,
): Promise<StoredIntegration> {
  const [row] = await sql<IntegrationRow[]>`
    select ${columns(sql, caller)} from scm_integrations i join runners r on r.id = i.runner_id
    where i.id = ${id} and ${readsRunner(sql, caller)} ${lock ? sql`for update of i` : sql``}`;
  if (!row) throw notFound("source control integration", id);
  return toIntegration(row);
}

/** Integrations of the runners that the caller may read, for a runner those that count for it, newest first, one more than the page holds. */
export async function listIntegrations(
  sql: Sql,
  caller: Caller,
  runnerIds: readonly string[],
  page: Page,
): Promise<StoredIntegration[]> {
  const isSeen = caller.principal === Principal.RUNNER ? countsFor(sql, caller.id) : readsRunner(sql, caller);
  const conditions: Fragment[] = [sql`i.organization_id = ${caller.organizationId}`, isSeen];
  if (runnerIds.length) conditions.push(oneOf(sql, sql`i.runner_id`, runnerIds));
  if (page.after) conditions.push(sql`i.id < ${page.after}`);
  const rows = await sql<IntegrationRow[]>`
    select ${columns(sql, caller)} from scm_integrations i join runners r on r.id = i.runner_id
    where ${conjunction(sql, conditions)} order by i.id desc limit ${page.limit + 1}`;
  return rows.map(toIntegration);
}

/** Condition: integration `i` is the one that counts on a runner for its host. */
const countsFor = (sql: Sql, runnerId: string): Fragment =>
  sql`i.id in (select id from effective_integrations(${runnerId}))`;

/**
 * The integrations that hold for a runner, by host: its own, and for local runners those that all of them share, where
 * it has none of its own.
 */
export async function effectiveIntegrations(
  sql: Sql | Tx,
  runnerId: string,
  hosts?: readonly string[],
): Promise<Map<string, SCMIntegration>> {
  const named = hosts ? sql`and i.host = any(${hosts as string[]})` : sql``;
  const rows = await sql<{ message: Uint8Array }[]>`
    select i.message from effective_integrations(${runnerId}) i where true ${named}`;
  const messages = rows.map((row) => fromBinary(SCMIntegrationSchema, row.message));
  return new Map(messages.map((message) => [message.host, message]));
}
