import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { actionable } from "../domain/errors.ts";
import { PERSONAL_ACCESS_MS, TokenKind } from "../domain/tokens.ts";
import type { Tx } from "./db.ts";
import { countUnexpired } from "./issued-tokens.ts";
import { type Actor, record } from "./record.ts";
import { insertToken } from "./tokens.ts";

const kind = TokenKind.PERSONAL_ACCESS;

/** A personal access token about to be stored. */
export interface NewPersonalAccessToken {
  id: string;
  text: string;
  organizationId: string;
  userId: string;
  description: string;
  readOnly?: boolean;
  /** 30 days unless said otherwise. */
  validForMs?: number;
}

/**
 * Makes a token of a user whom the transaction holds. RESOURCE_EXHAUSTED if the user has `most` unexpired ones already;
 * without `most` there is no limit.
 */
export async function issuePersonalAccessToken(
  tx: Tx,
  token: NewPersonalAccessToken,
  by: { actor: Actor; newId: () => string; at: Date; most?: number },
): Promise<void> {
  const { id, organizationId, userId, validForMs = PERSONAL_ACCESS_MS } = token;
  const { at, most } = by;
  if (most !== undefined && (await countUnexpired(tx, { kind, subjectId: userId }, at)) >= most) {
    const message = `a user may have at most ${most} unexpired tokens`;
    throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", message);
  }
  await insertToken(tx, {
    ...{ id, kind, text: token.text, organizationId, description: token.description, readOnly: token.readOnly },
    ...{ subjectId: userId, subjectPrincipal: Principal.USER },
    ...{ createdAt: at, expiresAt: new Date(at.getTime() + validForMs) },
  });
  await record(tx, {
    ...{ organizationId, resourceType: ResourceType.PERSONAL_ACCESS_TOKEN, resourceId: id, creatorId: userId, at },
    operation: ResourceOperation.CREATE,
    audit: { id: by.newId(), actor: by.actor, action: "Personal access token created" },
  });
}
