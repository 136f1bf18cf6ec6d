import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { UserService } from "../../../gen/gitpod/v1/user_pb.js";
import { type App, actorOf, transact } from "../../app.ts";
import { refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { remoteUriProblem } from "../../scm/initializer.ts";
import { record } from "../../store/record.ts";
import { findDotfiles, getUser, holdCaller, setDotfiles, userMessage } from "../../store/users.ts";

async function changeDotfiles(app: App, caller: Caller, repository: string): Promise<void> {
  const message = repository && remoteUriProblem(repository, app.config.scm.schemes);
  refuseProblems(message ? [{ field: "repository", message }] : []);
  await transact(app, async (tx) => {
    await holdCaller(tx, caller);
    if (!(await setDotfiles(tx, caller.id, repository))) return;
    await record(tx, {
      organizationId: caller.organizationId,
      resourceType: ResourceType.USER,
      resourceId: caller.id,
      operation: ResourceOperation.UPDATE,
      at: app.now(),
      audit: { id: app.newId(), actor: actorOf(caller), action: repository ? "Dotfiles changed" : "Dotfiles removed" },
    });
  });
}

/** Who users are, and where their dotfiles come from. */
export function profile(app: App) {
  return {
    async getAuthenticatedUser(_request, context) {
      const caller = principal(context);
      return { user: userMessage(await getUser(app.db.point, caller, caller.id)) };
    },
    async getUser(request, context) {
      return { user: userMessage(await getUser(app.db.point, principal(context), request.userId)) };
    },
    async getDotfilesConfiguration(_request, context) {
      return { dotfilesConfiguration: { repository: await findDotfiles(app.db.point, principal(context).id) } };
    },
    async setDotfilesConfiguration(request, context) {
      await changeDotfiles(app, principal(context), request.repository);
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof UserService>>;
}
