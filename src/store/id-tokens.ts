import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { EnvironmentMetadataSchema, EnvironmentSpecSchema } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type OIDCConfig, OIDCConfigSchema } from "../../gen/gitpod/v1/organization_pb.js";
import { notFound } from "../domain/errors.ts";
import { defaultOidcConfig, type IdTokenSubject, type Person } from "../domain/id-tokens.ts";
import type { Caller } from "../domain/principal.ts";
import type { Sql, Tx } from "./db.ts";
import { type Actor, recorded } from "./record.ts";

const decodeConfig = (bytes: Uint8Array | null) => (bytes ? fromBinary(OIDCConfigSchema, bytes) : defaultOidcConfig());

/** The format of an organization's ID tokens; `lock` keeps it still until the transaction ends. */
export async function readOidcConfig(sql: Sql | Tx, organizationId: string, lock = false): Promise<OIDCConfig> {
  const [row] = await sql<{ oidc_config: Uint8Array | null }[]>`
    select oidc_config from organizations where id = ${organizationId} ${lock ? sql`for update` : sql``}`;
  if (!row) throw notFound("organization", organizationId);
  return decodeConfig(row.oidc_config);
}

export async function setOidcConfig(
  tx: Tx,
  organizationId: string,
  config: OIDCConfig,
  by: { actor: Actor; auditId: string; at: Date },
): Promise<void> {
  const change = {
    organizationId,
    resourceType: ResourceType.ORGANIZATION,
    resourceId: organizationId,
    operation: ResourceOperation.UPDATE,
    at: by.at,
    audit: { id: by.auditId, actor: by.actor, action: "Format of ID tokens changed" },
  };
  await tx`with ${recorded(tx, change)}
    update organizations set oidc_config = ${toBinary(OIDCConfigSchema, config)} where id = ${organizationId}`;
}

interface SubjectRow {
  oidc_config: Uint8Array | null;
  runner_id: string | null;
  project_id: string | null;
  creator_id: string | null;
  creator_principal: Principal | null;
  spec: Uint8Array | null;
  metadata: Uint8Array | null;
  account_id: string | null;
  email: string | null;
  name: string | null;
  issuer: string | null;
  claims: string | null;
}

function personOf(row: SubjectRow): Person {
  const idpClaims = row.claims ? JSON.parse(row.claims) : undefined;
  return { email: row.email ?? "", name: row.name ?? "", idp: row.issuer ?? "", idpClaims };
}

function toSubject(caller: Caller, row: SubjectRow): IdTokenSubject {
  const { organizationId, id } = caller;
  switch (caller.principal) {
    case Principal.USER:
      return { kind: "user", organizationId, userId: id, accountId: row.account_id ?? "", ...personOf(row) };
    case Principal.SERVICE_ACCOUNT:
      return { kind: "service_account", organizationId, serviceAccountId: id, name: caller.name };
    case Principal.RUNNER:
      return { kind: "runner", organizationId, runnerId: id, name: caller.name };
  }
  if (!row.spec || !row.metadata) throw notFound("environment", id);
  return {
    kind: "environment",
    ...{ organizationId, environmentId: id, projectId: row.project_id ?? "", runnerId: row.runner_id ?? "" },
    creator: {
      id: row.creator_id ?? "",
      principal: row.creator_principal ?? Principal.UNSPECIFIED,
      ...personOf(row),
    },
    initializer: fromBinary(EnvironmentSpecSchema, row.spec).content?.initializer,
    contextUrl: fromBinary(EnvironmentMetadataSchema, row.metadata).originalContextUrl,
  };
}

/** Whom an ID token for this caller is about, and the format that it has in the organization. */
export async function readIdTokenSubject(
  sql: Sql,
  caller: Caller,
): Promise<{ config: OIDCConfig; subject: IdTokenSubject }> {
  const environmentId = caller.principal === Principal.ENVIRONMENT ? caller.id : null;
  const [row] = await sql<SubjectRow[]>`
    select o.oidc_config, e.runner_id, e.project_id, e.creator_id, e.creator_principal, e.spec, e.metadata,
      a.id as account_id, a.email, coalesce(a.name, s.name) as name, login.issuer, login.claims
    from organizations o
      left join environments e on e.id = ${environmentId}
      left join users u on u.id = coalesce(e.creator_id, ${caller.id})
      left join accounts a on a.id = u.account_id
      left join service_accounts s on s.id = e.creator_id
      left join lateral (
        select issuer, claims from account_identities where account_id = a.id order by last_login_at desc limit 1
      ) login on true
    where o.id = ${caller.organizationId}`;
  if (!row) throw notFound("organization", caller.organizationId);
  return { config: decodeConfig(row.oidc_config), subject: toSubject(caller, row) };
}
