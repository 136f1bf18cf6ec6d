import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { TokenKind } from "./tokens.ts";

/** Who calls: the outcome of looking a credential up. */
export interface Caller {
  /** Kind of the principal. */
  principal: Principal;
  /** Its id. */
  id: string;
  /** Organization that bounds everything it can see. */
  organizationId: string;
  /** Role ADMIN, or in a group that holds ORG_ADMIN. */
  orgAdmin: boolean;
  /** In a group that holds ORG_RUNNERS_ADMIN. */
  runnersAdmin: boolean;
  /** In a group that holds ORG_ENVIRONMENTS_READER. */
  environmentsReader: boolean;
  /** Kind of the credential. */
  tokenKind: TokenKind;
  /** Id of the credential, kept with audit entries. */
  tokenId: string;
  /** The credential may only read. */
  readOnly: boolean;
  /** Runner of an environment principal; empty otherwise. */
  runnerId: string;
  /** Display name, for defaults such as the git author. */
  name: string;
  /** Mail address of a user; empty for others. */
  email: string;
}

export const isPerson = (caller: Caller) =>
  caller.principal === Principal.USER || caller.principal === Principal.SERVICE_ACCOUNT;

/** Actor of work that no caller asked for. */
export const SYSTEM = { id: null, principal: Principal.UNSPECIFIED, tokenId: null } as const;
