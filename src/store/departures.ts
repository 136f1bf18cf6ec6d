import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { actionable } from "../domain/errors.ts";
import { Scope } from "../domain/secret.ts";
import { TokenKind } from "../domain/tokens.ts";
import { deleteAccount, isOwnedBy } from "./accounts.ts";
import type { Tx } from "./db.ts";
import { removeFromGroups } from "./groups.ts";
import { orderHalt } from "./halts.ts";
import { endHostTokens } from "./host-tokens.ts";
import type { Attribution } from "./record.ts";
import { deleteSecretsOf } from "./secrets.ts";
import { type StoredServiceAccount, suspendServiceAccount } from "./service-accounts.ts";
import { type StoredUser, setUserStatus } from "./users.ts";

// All that ends with a user or service account, in the transaction that ends it. Rows are taken in one order: the
// organization, the principal, its environments, their runners, groups, secrets.

type Touched = (runnerId: string) => void;

/** Ends every credential of a principal, and what it had issued to act as somebody else. */
async function endTokens(tx: Tx, id: string): Promise<void> {
  await tx`delete from tokens where subject_id = ${id}
    or (issuer_id = ${id} and kind = ${TokenKind.SERVICE_ACCOUNT_ACCESS})`;
}

/** Takes a principal that is gone for good out of every group, and deletes what was its own. */
async function endBelongings(
  tx: Tx,
  { id, organizationId }: StoredUser | StoredServiceAccount,
  scope: Scope,
  by: Attribution,
) {
  await removeFromGroups(tx, { organizationId, memberId: id }, by.at);
  await deleteSecretsOf(tx, { scope, id }, { organizationId, ...by });
  await endHostTokens(tx, { subjectId: id }, { ...by, action: "Host authentication token deleted with its owner" });
}

/** Refuses to take the last active user with role ADMIN from an organization whose row the transaction holds. */
export async function refuseLastAdmin(tx: Tx, { id, organizationId, role, status }: StoredUser): Promise<void> {
  if (role !== OrganizationRole.ADMIN || status !== UserStatus.ACTIVE) return;
  const others = await tx`
    select from users where organization_id = ${organizationId} and id <> ${id}
      and role = ${OrganizationRole.ADMIN} and status = ${UserStatus.ACTIVE} limit 1`;
  if (others.length) return;
  const message = "the organization needs an active admin: make somebody else one first";
  throw actionable("failed_precondition", "ORG_STATE_LAST_ADMIN", message, { organization_id: organizationId });
}

/** How a membership ends: for a time, or for good. */
export interface Departure {
  status: typeof UserStatus.SUSPENDED | typeof UserStatus.LEFT;
  /** Text of the audit entry. */
  action: string;
  /** Its account is left to the caller. */
  keepsAccount?: true;
}

/**
 * Ends the membership of a user whom the transaction holds together with the organization. Its credentials end, and its
 * environments are asked to stop; when it leaves, also its shares, secrets, host tokens, preferences and dotfiles go, and
 * its account if the organization owns that. What others can use stays. FAILED_PRECONDITION if no admin would be left.
 */
export async function endMembership(
  tx: Tx,
  user: StoredUser,
  { status, action, keepsAccount }: Departure,
  by: Attribution,
  touched: Touched,
): Promise<void> {
  const { id, organizationId } = user;
  await refuseLastAdmin(tx, user);
  await endTokens(tx, id);
  await orderHalt(tx, { subjectId: id, organizationId, createdAt: by.at }, by, touched);
  await setUserStatus(tx, user, status, { ...by, action });
  if (status !== UserStatus.LEFT) return;
  await endBelongings(tx, user, Scope.USER, by);
  await tx`delete from user_preferences where user_id = ${id}`;
  await tx`update users set dotfiles_repository = '' where id = ${id}`;
  const { accountId } = user;
  if (accountId && !keepsAccount && (await isOwnedBy(tx, accountId, organizationId)))
    await deleteAccount(tx, accountId, { ...by, action: "Account deleted with its user", forgets: false });
}

/** As for a user who leaves; the row of a service account, which the transaction holds, stays suspended. */
export async function endServiceAccount(
  tx: Tx,
  account: StoredServiceAccount,
  by: Attribution,
  touched: Touched,
): Promise<void> {
  const { id, organizationId } = account;
  await suspendServiceAccount(tx, account, by);
  await endTokens(tx, id);
  await orderHalt(tx, { subjectId: id, organizationId, createdAt: by.at }, by, touched);
  await endBelongings(tx, account, Scope.SERVICE_ACCOUNT, by);
}
