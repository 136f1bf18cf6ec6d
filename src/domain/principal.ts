import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { notFound } from "./errors.ts";
import type { TokenKind } from "./tokens.ts";

/** Who calls: the outcome of looking a credential up. */
export interface Caller {
  /** Kind of the principal. */
  principal: Principal;
  /** Its id. */
  id: string;
  /** Organization that bounds everything it can see; empty for an account that has not chosen one. */
  organizationId: string;
  /** Account of a person: that of a user, or the account itself; empty for others. */
  accountId: string;
  /** Role ADMIN, or in a group that holds ORG_ADMIN. */
  orgAdmin: boolean;
  /** In a group that holds ORG_RUNNERS_ADMIN. */
  runnersAdmin: boolean;
  /** In a group that holds ORG_PROJECTS_ADMIN. */
  projectsAdmin: boolean;
  /** In a group that holds ORG_GROUPS_ADMIN. */
  groupsAdmin: boolean;
  /** In a group that holds ORG_ENVIRONMENTS_READER. */
  environmentsReader: boolean;
  /** In a group that holds ORG_AUDIT_LOG_READER. */
  auditReader: boolean;
  /** Kind of the credential. */
  tokenKind: TokenKind;
  /** Id of the credential, kept with audit entries. */
  tokenId: string;
  /** Who had the credential issued, where that is somebody else: the person behind a service account's access token. */
  issuerId?: string;
  /** The credential may only read. */
  readOnly: boolean;
  /** Runner of an environment or runner principal; empty otherwise. */
  runnerId: string;
  /** Creator and, if it has one, project of an environment principal; empty otherwise. */
  creatorId: string;
  projectId: string;
  /** Display name, for defaults such as the git author. */
  name: string;
  /** Mail address of a user; empty for others. */
  email: string;
}

export const isPerson = (caller: Caller) =>
  caller.principal === Principal.USER || caller.principal === Principal.SERVICE_ACCOUNT;

/** The caller's organization, if that is the one which a request names; NOT_FOUND for every other. */
export function ownOrganization(caller: Caller, id: string): string {
  if (!caller.organizationId || id.toLowerCase() !== caller.organizationId) throw notFound("organization", id);
  return caller.organizationId;
}

/** Actor of work that no caller asked for. */
export const SYSTEM = { id: null, principal: Principal.UNSPECIFIED, tokenId: null } as const;
