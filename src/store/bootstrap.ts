import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  EnvironmentClassSchema,
  type FieldValue,
  RunnerKind,
  RunnerProvider,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase, RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { RefusedStart } from "../domain/errors.ts";
import { SYSTEM } from "../domain/principal.ts";
import { EXCHANGE_TOKEN_MS, newRunnerSpec } from "../domain/runner.ts";
import { TokenKind } from "../domain/tokens.ts";
import type { Db, Sql, Tx } from "./db.ts";
import { masterKeyCheck } from "./envelope.ts";
import { insertClass } from "./environment-classes.ts";
import { insertFirstUser, insertOrganization, shareRunnerWithMembers } from "./organizations.ts";
import { record } from "./record.ts";
import { insertRunner } from "./runners.ts";
import { insertToken } from "./tokens.ts";

const BOOTSTRAP_LOCK = 7_482_932;
const ADMIN_TOKEN_MS = 90 * 24 * 60 * 60_000;

/** The database belongs to another master key: nothing that it keeps secret could be read. */
export class WrongMasterKey extends RefusedStart {}

/** The values of the database are being sealed anew, and whoever did so has not finished. */
export class UnfinishedRekey extends RefusedStart {}

/** Whether this is still the master key of the installation. */
export async function holdsMasterKey(sql: Sql, masterKey: Uint8Array): Promise<boolean> {
  const rows =
    await sql`select from installation where coalesce(next_master_key_check, master_key_check) = ${masterKeyCheck(masterKey)}`;
  return rows.length > 0;
}

/** Claims the database for this master key at the first start, or checks that it is the same; returns the installation's id. */
export async function claimInstallation(db: Db, masterKey: Uint8Array, newId: () => string, at: Date): Promise<string> {
  const check = masterKeyCheck(masterKey);
  await db.write`insert into installation (control_plane_id, master_key_check, created_at)
    values (${newId()}, ${check}, ${at}) on conflict do nothing`;
  const [row] = await db.write<
    { control_plane_id: string; master_key_check: Uint8Array; next_master_key_check: Uint8Array | null }[]
  >`select control_plane_id, master_key_check, next_master_key_check from installation`;
  if (row?.next_master_key_check)
    throw new UnfinishedRekey("the master key is being replaced: finish that with the same two keys first");
  if (!row || Buffer.compare(row.master_key_check, check) !== 0) {
    throw new WrongMasterKey("the database was set up with another master key");
  }
  return row.control_plane_id;
}

/** What the first organization is made of; texts of tokens are made by the caller, who alone shows them. */
export interface FirstStart {
  organizationName: string;
  adminEmail: string;
  adminName: string;
  adminToken: string;
  /** Absent when the installation starts without a runner of its own. */
  runner?: { name: string; exchangeToken: string; classConfiguration: FieldValue[] };
  newId: () => string;
  at: Date;
}

async function insertFirstRunner(
  tx: Tx,
  organizationId: string,
  userId: string,
  first: FirstStart,
  runner: NonNullable<FirstStart["runner"]>,
): Promise<void> {
  const { newId, at } = first;
  const id = newId();
  const status = create(RunnerStatusSchema, { phase: RunnerPhase.CREATED, updatedAt: timestampFromDate(at) });
  const stored = {
    id,
    organizationId,
    creatorId: userId,
    creatorPrincipal: Principal.USER,
    name: runner.name,
    kind: RunnerKind.LOCAL,
    provider: RunnerProvider.LINUX_HOST,
    runnerManagerId: "",
    spec: newRunnerSpec(undefined),
    status,
    createdAt: at,
  };
  const change = (resourceType: ResourceType, resourceId: string, action: string) => ({
    organizationId,
    resourceType,
    resourceId,
    operation: ResourceOperation.CREATE,
    creatorId: userId,
    runnerId: id,
    at,
    audit: { id: newId(), actor: SYSTEM, action },
  });
  await insertRunner(tx, stored, undefined, change(ResourceType.RUNNER, id, "Runner created"));
  await shareRunnerWithMembers(tx, { organizationId, runnerId: id }, { actor: SYSTEM, newId, at });
  const message = create(EnvironmentClassSchema, {
    id: newId(),
    runnerId: id,
    displayName: "Standard",
    description: "The default machine shape of this host",
    configuration: runner.classConfiguration,
    enabled: true,
  });
  await insertClass(
    tx,
    { message, organizationId, fits: true },
    change(ResourceType.ENVIRONMENT_CLASS, message.id, "Environment class created"),
  );
  await insertToken(tx, {
    id: newId(),
    text: runner.exchangeToken,
    kind: TokenKind.RUNNER_EXCHANGE,
    organizationId,
    subjectId: id,
    subjectPrincipal: Principal.RUNNER,
    runnerId: id,
    createdAt: at,
    expiresAt: new Date(at.getTime() + EXCHANGE_TOKEN_MS),
  });
}

/** Whether the first start is over. */
export async function hasOrganization(sql: Sql | Tx): Promise<boolean> {
  return (await sql`select from organizations limit 1`).length > 0;
}

/**
 * Makes the first organization, its admin and, if asked for, its runner, in one transaction. Of several replicas that
 * start together one does it; the others, and every later start, get false and have changed nothing.
 */
export async function bootstrap(db: Db, first: FirstStart): Promise<boolean> {
  const { newId, at } = first;
  return db.begin(async (tx) => {
    await tx`select pg_advisory_xact_lock(${BOOTSTRAP_LOCK})`;
    if (await hasOrganization(tx)) return false;
    const organizationId = newId();
    const [userId, accountId] = [newId(), newId()];
    await insertOrganization(tx, {
      id: organizationId,
      name: first.organizationName,
      creatorId: userId,
      at,
      actor: SYSTEM,
      newId,
    });
    await insertFirstUser(tx, {
      ...{ userId, accountId, organizationId, at, newId },
      email: first.adminEmail,
      name: first.adminName,
      loginProvider: "local",
      actor: SYSTEM,
    });
    const tokenId = newId();
    await insertToken(tx, {
      id: tokenId,
      text: first.adminToken,
      kind: TokenKind.PERSONAL_ACCESS,
      organizationId,
      subjectId: userId,
      subjectPrincipal: Principal.USER,
      description: "First start",
      createdAt: at,
      expiresAt: new Date(at.getTime() + ADMIN_TOKEN_MS),
    });
    await record(tx, {
      organizationId,
      resourceType: ResourceType.PERSONAL_ACCESS_TOKEN,
      resourceId: tokenId,
      operation: ResourceOperation.CREATE,
      creatorId: userId,
      at,
      audit: { id: newId(), actor: SYSTEM, action: "Personal access token created" },
    });
    if (first.runner) await insertFirstRunner(tx, organizationId, userId, first, first.runner);
    return true;
  });
}
