import { create } from "@bufbuild/protobuf";
import type { EnvironmentInitializer } from "../../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type OIDCConfig, OIDCConfigSchema } from "../../gen/gitpod/v1/organization_pb.js";
import type { FieldProblem } from "./errors.ts";

/** What an identity provider says about somebody. */
export interface Person {
  email?: string;
  name?: string;
  /** Issuer of the provider that they signed in with last. */
  idp?: string;
  /** What it said then. */
  idpClaims?: Readonly<Record<string, unknown>>;
}

/** Whom an ID token is about. */
export type IdTokenSubject = { organizationId: string } & (
  | {
      kind: "environment";
      environmentId: string;
      projectId: string;
      runnerId: string;
      creator: Person & { id: string; principal: Principal };
      initializer: EnvironmentInitializer | undefined;
      contextUrl: string;
    }
  | ({ kind: "user"; userId: string; accountId: string } & Person)
  | { kind: "service_account"; serviceAccountId: string; name: string }
  | { kind: "runner"; runnerId: string; name: string }
);

type Claims = Record<string, unknown>;

const MAX_KEY_LENGTH = 256;
const INITIALIZERS = "environment_initializers";
// Claims that hold one value, in tokens of any principal.
const EXTRA_KEYS: ReadonlySet<string> = new Set([
  ...["organization_id", "project_id", "environment_id", "runner_id", "runner_name"],
  ...["creator_principal", "creator_id", "creator_email", "creator_name", "creator_idp"],
  ...["user_id", "account_id", "service_account_id", "email", "name", "idp"],
  ...["context_url", "git.remote_uri", "git.upstream_remote_uri"].map((key) => `${INITIALIZERS}.${key}`),
]);
const IDP_CLAIM = /^((?:creator_)?idp_claims)\.(.+)$/s;

/** The setting of a new organization. */
export const defaultOidcConfig = (): OIDCConfig =>
  create(OIDCConfigSchema, { version: { case: "v3", value: { extraSubFields: [] } } });

/** What is wrong with a setting. */
export function oidcConfigProblems({ version }: OIDCConfig): FieldProblem[] {
  if (!version.case) return [{ field: "oidc_config.version", message: "v2 or v3 must be set" }];
  if (version.case === "v2") return [];
  return version.value.extraSubFields.flatMap((key, index) =>
    key.length <= MAX_KEY_LENGTH && (EXTRA_KEYS.has(key) || IDP_CLAIM.test(key))
      ? []
      : [{ field: `oidc_config.v3.extra_sub_fields[${index}]`, message: "is no claim that can be part of sub" }],
  );
}

/** Whether two settings give the same tokens. */
export function sameOidcConfig({ version: a }: OIDCConfig, { version: b }: OIDCConfig): boolean {
  if (a.case !== "v3" || b.case !== "v3") return a.case === b.case;
  const sorted = [a, b].map(({ value }) => JSON.stringify([...value.extraSubFields].sort()));
  return sorted[0] === sorted[1];
}

function present(claims: Claims): Claims {
  return Object.fromEntries(Object.entries(claims).filter(([, value]) => value !== undefined && value !== ""));
}

function initializersOf(initializer: EnvironmentInitializer | undefined, contextUrl: string): Claims[] {
  return (initializer?.specs ?? []).map(({ spec }, index) => {
    const git =
      spec.case === "git"
        ? present({ remote_uri: spec.value.remoteUri, upstream_remote_uri: spec.value.upstreamRemoteUri })
        : undefined;
    const url = spec.case === "contextUrl" ? spec.value.url : index === 0 ? contextUrl : "";
    return present({ git, context_url: url });
  });
}

/** The claims of format 3 beside those that every JWT has. */
function claimsOf(subject: IdTokenSubject): Claims {
  const { organizationId: organization_id } = subject;
  switch (subject.kind) {
    case "environment": {
      const { creator } = subject;
      return present({
        environment_id: subject.environmentId,
        organization_id,
        project_id: subject.projectId,
        runner_id: subject.runnerId,
        creator_principal: Principal[creator.principal].toLowerCase(),
        creator_id: creator.id,
        creator_email: creator.email,
        creator_name: creator.name,
        creator_idp: creator.idp,
        creator_idp_claims: creator.idpClaims,
        [INITIALIZERS]: initializersOf(subject.initializer, subject.contextUrl),
      });
    }
    case "user": {
      const { userId: user_id, accountId: account_id, email, name, idp, idpClaims: idp_claims } = subject;
      return present({ user_id, account_id, organization_id, email, name, idp, idp_claims });
    }
    case "service_account":
      return present({ service_account_id: subject.serviceAccountId, organization_id, name: subject.name });
    case "runner":
      return present({ runner_id: subject.runnerId, runner_name: subject.name, organization_id });
  }
}

function pathOf(subject: IdTokenSubject): string {
  switch (subject.kind) {
    case "environment":
      return `${subject.projectId ? `/prj:${subject.projectId}` : ""}/env:${subject.environmentId}`;
    case "user":
      return `/user:${subject.userId}`;
    case "service_account":
      return `/sa:${subject.serviceAccountId}`;
    case "runner":
      return `/rnr:${subject.runnerId}`;
  }
}

/** Keys of the claims that `sub` begins with. */
function keysOf(subject: IdTokenSubject): string[] {
  if (subject.kind !== "environment") return ["organization_id", `${subject.kind}_id`];
  return ["organization_id", subject.projectId ? "project_id" : "environment_id"];
}

/** One value of the claims; undefined if there is none, or more than one. */
function singleValue(claims: Claims, key: string): string | undefined {
  const [, group, name = ""] = IDP_CLAIM.exec(key) ?? [];
  let value: unknown = claims[key];
  if (group) value = Object.entries(claims[group] ?? {}).find(([each]) => each === name)?.[1];
  if (key.startsWith(`${INITIALIZERS}.`)) {
    const [first] = (claims[INITIALIZERS] ?? []) as Claims[];
    value = key
      .split(".")
      .slice(1)
      .reduce<unknown>((at, part) => (at as Claims | undefined)?.[part], first);
  }
  const isSingle = ["string", "number", "boolean"].includes(typeof value);
  return isSingle && value !== "" ? String(value) : undefined;
}

// Neither a value nor the name of a claim must look like another field.
const escaped = (value: string) => value.replace(/[%:]/g, encodeURIComponent);

/** `sub` and the claims beside it of an ID token in the format that the organization has chosen. */
export function idTokenClaims({ version }: OIDCConfig, subject: IdTokenSubject): { sub: string; claims: Claims } {
  if (version.case === "v2") return { sub: `org:${subject.organizationId}${pathOf(subject)}`, claims: {} };
  const claims = claimsOf(subject);
  const own = keysOf(subject);
  const extra = (version.value?.extraSubFields ?? []).filter((key) => !own.includes(key)).sort();
  const fields = [...own, ...extra].flatMap((key) => {
    const value = singleValue(claims, key);
    return value === undefined ? [] : [`${escaped(key)}:${escaped(value)}`];
  });
  return { sub: fields.join(":"), claims };
}
