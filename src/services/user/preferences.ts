import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { GetPreferenceRequest, SetPreferenceRequest, UserService } from "../../../gen/gitpod/v1/user_pb.js";
import { type App, actorOf, transact } from "../../app.ts";
import { actionable, invalid, notFound } from "../../domain/errors.ts";
import { isUuid } from "../../domain/ids.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  changePreference,
  countPreferences,
  deletePreference,
  findPreference,
  insertPreference,
  listPreferences,
} from "../../store/preferences.ts";
import { type Change, record } from "../../store/record.ts";
import { holdCaller } from "../../store/users.ts";

function changeOf(app: App, caller: Caller, id: string, operation: ResourceOperation, action: string): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.USER_PREFERENCE,
    resourceId: id,
    operation,
    creatorId: caller.id,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}

async function setPreference(app: App, caller: Caller, { key, value }: SetPreferenceRequest): Promise<void> {
  await transact(app, async (tx) => {
    await holdCaller(tx, caller);
    const at = app.now();
    const before = await findPreference(tx, caller.id, { key });
    if (before?.value === value) return;
    if (before) {
      await changePreference(tx, before.id, value, at);
      return record(tx, changeOf(app, caller, before.id, ResourceOperation.UPDATE, "Preference changed"));
    }
    const most = app.limits.preferences;
    if ((await countPreferences(tx, caller.id)) >= most)
      throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", `a user may have at most ${most} preferences`);
    const id = app.newId();
    await insertPreference(tx, { id, userId: caller.id, key, value, at });
    await record(tx, changeOf(app, caller, id, ResourceOperation.CREATE, "Preference created"));
  });
}

/** Which preference is meant; the old field counts as an id. */
function wanted({ preference, userPreferenceId }: GetPreferenceRequest): { id: string } | { key: string } {
  if (preference.case === "preferenceKey") return { key: preference.value };
  const id = preference.value ?? userPreferenceId;
  if (!id) throw invalid({ field: "preference", message: "an id or a key is required" });
  if (!isUuid(id)) throw notFound("preference", id);
  return { id };
}

/** Settings that clients keep for a user, who alone sees them. */
export function preferences(app: App) {
  return {
    async setPreference(request, context) {
      await setPreference(app, principal(context), request);
      return {};
    },
    async getPreference(request, context) {
      const which = wanted(request);
      const preference = await findPreference(app.db.point, principal(context).id, which);
      if (!preference) throw notFound("preference", "id" in which ? which.id : which.key);
      return { preference };
    },
    async listPreferences(request, context) {
      const caller = principal(context);
      const page = openPage(request.pagination, ["preferences", caller.id]);
      const rows = await listPreferences(app.db.list, caller.id, page);
      const { items, nextToken } = closePage(page, rows, (each) => each.id);
      return { preferences: items, pagination: { nextToken } };
    },
    async deletePreference(request, context) {
      const caller = principal(context);
      const id = request.userPreferenceId;
      await transact(app, async (tx) => {
        if (!(await deletePreference(tx, caller.id, id))) throw notFound("preference", id);
        await record(tx, changeOf(app, caller, id, ResourceOperation.DELETE, "Preference deleted"));
      });
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof UserService>>;
}
