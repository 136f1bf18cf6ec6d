import type { Environment } from "../../../gen/gitpod/v1/environment_pb.js";
import { environmentMessage, type ViewerRelation, visibleEnvironment } from "../../domain/environment.ts";
import type { Caller } from "../../domain/principal.ts";
import type { StoredEnvironment } from "../../store/environments.ts";

export function viewer(caller: Caller, { relation }: Pick<StoredEnvironment, "relation">): ViewerRelation {
  if (relation.self) return "self";
  if (relation.runner) return "runner";
  if (relation.owner) return "owner";
  if (caller.orgAdmin) return "org_admin";
  return relation.user ? "user" : "viewer";
}

/** An environment as its caller may see it. */
export const shown = (caller: Caller, state: StoredEnvironment): Environment =>
  visibleEnvironment(environmentMessage(state.id, state), viewer(caller, state));
