import { AuditLogEntryKind, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { TokenKind, tokenHash } from "../domain/tokens.ts";
import type { Sql, Tx } from "./db.ts";
import type { Membership } from "./identities.ts";
import { recordAccess } from "./record.ts";
import { insertToken } from "./tokens.ts";

/** A browser login about to be stored. */
export interface NewSession {
  id: string;
  text: string;
  accountId: string;
  /** The user that it acts as; without one it acts as the account. */
  membership?: Membership;
  /** How the person signed in, for the audit log. */
  description: string;
  at: Date;
  expiresAt: Date;
  idleSeconds: number;
}

export async function insertSession(tx: Tx, session: NewSession): Promise<void> {
  const { id, text, accountId, membership, description, at, expiresAt, idleSeconds } = session;
  await insertToken(tx, {
    ...{ id, text, kind: TokenKind.SESSION, description, createdAt: at, expiresAt, idleSeconds },
    organizationId: membership?.organizationId,
    subjectId: membership?.userId ?? accountId,
    subjectPrincipal: membership ? Principal.USER : Principal.ACCOUNT,
  });
}

/** Ends a browser login by its text and tells when it would have ended; undefined if there is none. */
export async function takeSession(tx: Tx, text: string): Promise<{ description: string; expiresAt: Date } | undefined> {
  const [row] = await tx<{ description: string; expires_at: Date }[]>`
    delete from tokens where hash = ${tokenHash(text)} and kind = ${TokenKind.SESSION} returning description, expires_at`;
  return row && { description: row.description, expiresAt: row.expires_at };
}

/** A sign-in or sign-out in the log of the organization. */
export async function recordSession(
  sql: Sql | Tx,
  entry: { id: string; tokenId: string; userId: string; organizationId: string; action: string; at: Date },
): Promise<void> {
  const { id, tokenId, userId, organizationId, action, at } = entry;
  await recordAccess(sql, {
    ...{ id, organizationId, action, at, kind: AuditLogEntryKind.RESOURCE_CHANGE },
    actor: { id: userId, principal: Principal.USER, tokenId },
    ...{ subjectId: userId, subjectType: ResourceType.USER },
  });
}
