import type { ServiceImpl } from "@connectrpc/connect";
import { type SetSuspendedRequest, type UserService, UserStatus } from "../../../gen/gitpod/v1/user_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { denied, precondition } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { endMembership } from "../../store/departures.ts";
import { getUser, holdUser, setUserStatus } from "../../store/users.ts";

async function setSuspended(app: App, caller: Caller, { userId, suspended }: SetSuspendedRequest): Promise<void> {
  const visible = await getUser(app.db.point, caller, userId);
  if (!caller.orgAdmin) throw denied("suspending users needs the role admin in the organization");
  if (suspended && visible.id === caller.id) throw precondition("you cannot suspend yourself");
  const by = attribution(app, caller);
  await transact(app, async (tx, touched) => {
    const user = await holdUser(tx, visible);
    if (user.status === UserStatus.LEFT) throw precondition("the user has left the organization");
    if ((user.status === UserStatus.SUSPENDED) === suspended) return;
    if (suspended)
      await endMembership(tx, user, { status: UserStatus.SUSPENDED, action: "User suspended" }, by, touched);
    else await setUserStatus(tx, user, UserStatus.ACTIVE, { ...by, action: "User let in again" });
  });
}

async function deleteUser(app: App, caller: Caller, userId: string): Promise<void> {
  const visible = await getUser(app.db.point, caller, userId);
  if (visible.id !== caller.id && !caller.orgAdmin)
    throw denied("deleting others needs the role admin in the organization");
  await transact(app, async (tx, touched) => {
    const user = await holdUser(tx, visible);
    if (user.status === UserStatus.LEFT) return;
    const departure = { status: UserStatus.LEFT, action: "User deleted" } as const;
    await endMembership(tx, user, departure, attribution(app, caller), touched);
  });
}

/** How users are kept out for a time, or for good. */
export function membership(app: App) {
  return {
    async setSuspended(request, context) {
      await setSuspended(app, principal(context), request);
      return {};
    },
    async deleteUser(request, context) {
      await deleteUser(app, principal(context), request.userId);
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof UserService>>;
}
