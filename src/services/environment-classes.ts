import type { MessageInitShape } from "@bufbuild/protobuf";
import type {
  ListEnvironmentClassesRequest,
  ListEnvironmentClassesResponseSchema,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { App } from "../app.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { listClasses } from "../store/environment-classes.ts";
import { readPolicies } from "../store/organizations.ts";

/** ListEnvironmentClasses: one answer that the contract offers in two services. */
export async function listEnvironmentClasses(
  app: App,
  caller: Caller,
  request: ListEnvironmentClassesRequest,
): Promise<MessageInitShape<typeof ListEnvironmentClassesResponseSchema>> {
  const page = openPage(request.pagination, ["environment classes", caller.id, request.filter]);
  const { localRunners } = await readPolicies(app.db.point, caller.organizationId);
  const rows = await listClasses(app.db.list, caller, request.filter, localRunners, page);
  const { items, nextToken } = closePage(page, rows, (each) => each.id);
  return { environmentClasses: items, pagination: { nextToken } };
}
