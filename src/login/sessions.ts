import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { type App, newTokenText, transact } from "../app.ts";
import { cookieRules, cookieValue } from "../domain/browser.ts";
import { notFound, Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { TokenKind } from "../domain/tokens.ts";
import { findSession, touchToken } from "../store/credentials.ts";
import type { Tx } from "../store/db.ts";
import { activeMemberships, type Membership } from "../store/identities.ts";
import { insertSession, recordSession, takeSession } from "../store/sessions.ts";

/** Whoever has signed in with the browser that sent this cookie header; undefined if nobody has. */
export async function signedIn(app: App, cookieHeader: string | undefined): Promise<Caller | undefined> {
  const text = cookieValue(cookieHeader, cookieRules(app.config.publicUrl).session);
  const found = text ? await findSession(app.db.point, text, app.now()) : undefined;
  if (found?.state !== "ok") return undefined;
  if (found.stale) await touchToken(app.db.write, found.caller.tokenId, app.now());
  return found.caller;
}

/** Signs a browser in: as the only active user of the account, or as the account itself. Returns the cookie's value. */
export async function startSession(
  app: App,
  tx: Tx,
  { accountId, how, replaces }: { accountId: string; how: string; replaces?: string },
): Promise<string> {
  if (replaces) await takeSession(tx, replaces);
  const [only, ...others] = await activeMemberships(tx, accountId);
  const expiresAt = new Date(app.now().getTime() + app.config.login.sessionMaxMs);
  return openSession(app, tx, { accountId, membership: others.length ? undefined : only, how, expiresAt });
}

async function openSession(
  app: App,
  tx: Tx,
  session: { accountId: string; membership: Membership | undefined; how: string; expiresAt: Date },
): Promise<string> {
  const { accountId, membership, how, expiresAt } = session;
  const [id, text, at] = [app.newId(), newTokenText(app, TokenKind.SESSION), app.now()];
  const idleSeconds = app.config.login.sessionIdleMs / 1000;
  await insertSession(tx, { id, text, accountId, membership, description: how, at, expiresAt, idleSeconds });
  if (membership) {
    const { userId, organizationId } = membership;
    await recordSession(tx, {
      id: app.newId(),
      tokenId: id,
      userId,
      organizationId,
      action: `Signed in with ${how}`,
      at,
    });
  }
  return text;
}

/** Organizations in which whoever has signed in can act. */
export const organizationsOf = (app: App, caller: Caller): Promise<Membership[]> =>
  activeMemberships(app.db.point, caller.accountId);

/**
 * Lets a browser act as the user of its account in an organization. It is signed in anew, until the time that was set
 * before, so that what goes on in the name of the old one ends. Returns the cookie's value; NOT_FOUND without such a user.
 */
export async function chooseOrganization(
  app: App,
  caller: Caller,
  session: string,
  organizationId: string,
): Promise<string> {
  return transact(app, async (tx) => {
    const { accountId } = caller;
    const memberships = await activeMemberships(tx, accountId);
    const membership = memberships.find((each) => each.organizationId === organizationId.toLowerCase());
    if (!membership) throw notFound("organization", organizationId);
    const before = await takeSession(tx, session);
    if (!before) throw new Refusal("unauthenticated", "you are not signed in");
    return openSession(app, tx, { accountId, membership, how: before.description, expiresAt: before.expiresAt });
  });
}

/** Ends a browser login; nothing happens if it has ended. */
export async function signOut(app: App, caller: Caller, session: string): Promise<void> {
  await transact(app, async (tx) => {
    if (!(await takeSession(tx, session)) || caller.principal !== Principal.USER) return;
    const { id: userId, organizationId, tokenId } = caller;
    const entry = { id: app.newId(), tokenId, userId, organizationId, action: "Signed out", at: app.now() };
    await recordSession(tx, entry);
  });
}
