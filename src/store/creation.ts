import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ObjectKind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentMetadataSchema,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { SecretSchema } from "../../gen/gitpod/v1/secret_pb.js";
import { archivableSince } from "../domain/lifecycle.ts";
import type { Caller } from "../domain/principal.ts";
import type { Candidate, Scope } from "../domain/secret.ts";
import { readsProject } from "./access.ts";
import type { BesideQuery } from "./credentials.ts";
import type { Fragment, Sql, Tx } from "./db.ts";
import {
  canCreate,
  toUsableClass,
  type UsableClass,
  type UsableClassRow,
  usableClassQuery,
} from "./environment-classes.ts";
import {
  encodeFacts,
  nextDueAt,
  optionalDate,
  type QuotaUse,
  type StoredEnvironment,
  searchText,
} from "./environments.ts";
import { type Limits, type LimitsRow, limitsColumns, toLimits } from "./organizations.ts";
import { usedProject } from "./project-usage.ts";
import { type Actor, recordedIf } from "./record.ts";
import { revised } from "./runners.ts";
import { assemble, pieces, run } from "./statement.ts";

// A creation reads what it depends on, decides, and then is one statement that holds what others may change, makes sure
// that it still is what was read, and stores the environment: nobody waits while this process thinks.

/** What an environment is made with that others may change. */
export interface Inputs {
  /** Secrets of its organization, its project and its creator. */
  secrets: readonly Candidate[];
  /** Hosts with an integration that holds for the runner, and whether it offers to sign in. */
  signIns: ReadonlyMap<string, boolean>;
  /** The newest usable credential of the creator on the runner, by host. */
  tokens: ReadonlyMap<string, { id: string; version: number }>;
  /** All of it as the database tells it. */
  text: string;
}

/** What a creation depends on. */
export interface Basis extends Limits {
  /** Repository of the creator's dotfiles; empty without one. */
  dotfilesRepository: string;
  /** The class that is asked for, with what an environment of it is made with; absent if the caller may not read it. */
  found?: { environmentClass: UsableClass; inputs: Inputs };
}

interface BasisRow extends LimitsRow, Omit<UsableClassRow, "message"> {
  dotfiles_repository: string | null;
  message: Uint8Array | null;
  inputs: string;
}

interface InputsJson {
  secrets: [scope: Scope, scopeId: string, session: string, message: string][] | null;
  signIns: [host: string, asks: boolean][] | null;
  tokens: [host: string, id: string, version: number][] | null;
}

function toInputs(text: string): Inputs {
  const { secrets, signIns, tokens }: InputsJson = JSON.parse(text);
  return {
    secrets: (secrets ?? []).map(([scope, id, session, message]) => ({
      message: fromBinary(SecretSchema, Buffer.from(message, "base64")),
      owner: { scope, id },
      session,
    })),
    signIns: new Map(signIns),
    tokens: new Map((tokens ?? []).map(([host, id, version]) => [host, { id, version }])),
    text,
  };
}

/** What is asked for: a class, hosts of repositories, and a project if there is one. */
export type Asked = readonly [classId: string | null, hosts: readonly string[], projectId: string | null];

const inputs = (
  sql: Sql,
  { organizationId, id }: Caller,
  hosts: readonly string[],
  projectId: string | null,
  now: Date,
) =>
  sql`creation_inputs(${organizationId}, array[${organizationId}, ${projectId}, ${id}]::uuid[], r.id, ${id}, ${hosts as string[]}, ${now})`;

/** Query for the one row of what a creation depends on. */
export const basisQuery: BesideQuery<Asked> = (sql, caller, [classId, hosts, projectId], now) => sql`
  select ${limitsColumns(sql)}, (select u.dotfiles_repository from users u where u.id = ${caller.id}), chosen.*
  from organizations o left join lateral (
    ${usableClassQuery(sql, caller, classId, sql`${inputs(sql, caller, hosts, projectId, now)} as inputs`)}
  ) chosen on true where o.id = ${caller.organizationId}`;

/** What a creation depends on; `found` is the row of the query, if it has been made already. */
export async function readBasis(
  sql: Sql | Tx,
  caller: Caller,
  asked: Asked,
  now: Date,
  found?: object,
): Promise<Basis> {
  const query = () => run<BasisRow>(sql, assemble(basisQuery(pieces, caller, asked, now)));
  const [row] = found ? [found as BasisRow] : await query();
  if (!row) throw new Error(`organization ${caller.organizationId} is gone`);
  const { message, dotfiles_repository: dotfiles } = row;
  return {
    ...toLimits(row),
    dotfilesRepository: dotfiles ?? "",
    ...(message && { found: { environmentClass: toUsableClass({ ...row, message }), inputs: toInputs(row.inputs) } }),
  };
}

/** What an environment depends on when it is stored, beside what it consists of. */
export interface Conditions {
  caller: Caller;
  /** Empty without one. */
  projectId: string;
  runnerId: string;
  /** LOCAL runners are switched on. */
  localRunners: boolean;
  /** Quotas of the caller; 0 for none. */
  most: number;
  mostRunning: number;
  hosts: readonly string[];
  inputs: Inputs;
  at: Date;
}

const holding = (sql: Sql | Tx, { caller, projectId, runnerId, most, mostRunning, hosts, at }: Conditions): Fragment =>
  sql`hold_for_creation(${caller.organizationId}, ${projectId || null}, ${caller.id}, ${most > 0 || mostRunning > 0},
    ${runnerId}, ${hosts as string[]}, ${at})`;

/** What counts towards the quotas of a creator, and what runs on a runner; zero for what has no limit. */
export interface Use extends QuotaUse {
  onRunner: number;
}

interface UseRow {
  total: number | null;
  running: number | null;
  on_runner: number | null;
}

/** Holds what a creation depends on until the transaction ends. */
export async function holdForCreation(tx: Tx, conditions: Conditions): Promise<Use> {
  const query = pieces`select total, running, on_runner from ${holding(pieces, conditions)}`;
  const [row] = await run<UseRow>(tx, assemble(query));
  return { total: row?.total ?? 0, running: row?.running ?? 0, onRunner: row?.on_runner ?? 0 };
}

const CONNECTED = [RunnerPhase.ACTIVE, RunnerPhase.DEGRADED] as number[];

/** CTE `held`, which has a row if an environment of this class can be stored, and holds what that depends on. */
function held(sql: Tx, classId: string | undefined, conditions: Conditions): Fragment {
  const { caller, projectId, runnerId, localRunners, most, mostRunning, inputs } = conditions;
  const project = sql`exists (select from projects p where p.id = ${projectId} and ${readsProject(sql, caller)})`;
  return sql`held as materialized (
    select from environment_classes c join runners r on r.id = c.runner_id
      cross join lateral ${holding(sql, conditions)} h
    where c.id = ${classId} and r.id = ${runnerId} and r.organization_id = ${caller.organizationId} and ${canCreate(sql, caller, localRunners)}
      and h.has_project and h.runner_phase = any(${CONNECTED}) and h.inputs = ${inputs.text}
      and coalesce(h.on_runner < h.max_environments, true)
      ${projectId ? sql`and ${project}` : sql``}
      ${most > 0 ? sql`and h.total < ${most}` : sql``} ${mostRunning > 0 ? sql`and h.running < ${mostRunning}` : sql``}
  )`;
}

/**
 * Stores an environment if all that it was made from still is what it was and nothing forbids it: false otherwise. One
 * statement, which needs no transaction around it.
 */
export async function insertEnvironment(
  sql: Sql | Tx,
  state: StoredEnvironment,
  conditions: Conditions,
  { actor, auditId }: { actor: Actor; auditId: string },
): Promise<boolean> {
  const { id, organizationId, metadata, spec, status } = state;
  const { at } = conditions;
  const { creator, runnerId, projectId, sessionId } = metadata;
  const change = {
    ...{ organizationId, resourceType: ResourceType.ENVIRONMENT, resourceId: id, operation: ResourceOperation.CREATE },
    ...{ creatorId: creator?.id, environmentId: id, runnerId, at },
    audit: { id: auditId, actor, action: "Environment created" },
  };
  const given = pieces`held`;
  const use = { projectId, environmentId: id, creator, at };
  const insertion = pieces`
    with ${held(pieces, spec.machine?.class, conditions)}, ${recordedIf(pieces, given, change)},
    ${revised(pieces, runnerId, { kind: ObjectKind.ENVIRONMENT, objectId: id }, at, given)},
    session as (
      insert into environment_sessions (id, organization_id, creator_id, creator_principal)
      select ${sessionId}, ${organizationId}, ${creator?.id}, ${creator?.principal} from held on conflict do nothing
    ) ${projectId ? pieces`, ${usedProject(pieces, use, given)}` : pieces``}
    insert into environments (id, organization_id, creator_id, creator_principal, runner_id, class_id, project_id, session_id, role,
      phase, desired_phase, admission, created_at, lockdown_at, search, metadata, spec, status, facts, due_at,
      archivable_since)
    select ${id}, ${organizationId}, ${creator?.id}, ${creator?.principal}, ${runnerId}, ${spec.machine?.class},
      ${projectId || null}, ${sessionId}, ${metadata.role}, ${status.phase}, ${spec.desiredPhase}, ${spec.admission},
      ${at}, ${optionalDate(metadata.lockdownAt)}, ${searchText(id, state)}, ${toBinary(EnvironmentMetadataSchema, metadata)},
      ${toBinary(EnvironmentSpecSchema, spec)}, ${toBinary(EnvironmentStatusSchema, status)}, ${encodeFacts(state.facts)},
      ${nextDueAt(state)}, ${archivableSince(state)}
    from held returning id`;
  return (await run(sql, assemble(insertion))).length > 0;
}
