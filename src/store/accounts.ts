import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { Tx } from "./db.ts";
import { type Attribution, record } from "./record.ts";

/** Whether an account belongs to an organization, and to nobody else: its only user is there. It stays so. */
export async function isOwnedBy(tx: Tx, accountId: string, organizationId: string): Promise<boolean> {
  const rows = await tx`
    select from accounts where id = ${accountId} and owner_organization_id = ${organizationId} for update`;
  return rows.length > 0;
}

/**
 * Deletes an account whose users have all left, with its logins. What they made goes on to show who they were, unless
 * `forgets`: then nothing about the person stays. Every organization that knew the account is told.
 */
export async function deleteAccount(
  tx: Tx,
  accountId: string,
  { forgets, ...by }: Attribution & { action: string; forgets: boolean },
): Promise<void> {
  const forgotten = forgets
    ? tx`, full_name = 'Deleted user', email = id || '@deleted.invalid', avatar_url = ''`
    : tx``;
  const rows = await tx<{ organization_id: string }[]>`
    update users set account_id = null ${forgotten} where account_id = ${accountId} returning organization_id`;
  await tx`delete from tokens where subject_id = ${accountId}`;
  await tx`delete from accounts where id = ${accountId}`;
  for (const organizationId of new Set(rows.map((row) => row.organization_id))) {
    await record(tx, {
      ...{ organizationId, resourceType: ResourceType.ACCOUNT, resourceId: accountId },
      ...{ operation: ResourceOperation.DELETE, at: by.at },
      audit: { id: by.newId(), actor: by.actor, action: by.action },
    });
  }
}
