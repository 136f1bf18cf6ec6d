import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { RunnerKind } from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import type { RunnerPolicySchema, RunnerService } from "../../../gen/gitpod/v1/runner_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { denied, precondition } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import { roleOfRunnerPolicy, runnerRole } from "../../domain/roles.ts";
import { principal } from "../../rpc/authenticate.ts";
import { listDirectAssignments, type StoredAssignment } from "../../store/assignment-rows.ts";
import { assignRole, changeRole, withdrawRole } from "../../store/role-assignments.ts";
import { getRunner } from "../../store/runners.ts";

type Policies = "listRunnerPolicies" | "createRunnerPolicy" | "updateRunnerPolicy" | "deleteRunnerPolicy";

const message = ({ groupId, role }: StoredAssignment): MessageInitShape<typeof RunnerPolicySchema> => ({
  groupId,
  role: runnerRole(role),
});

const holding = ({ runnerId, groupId }: { runnerId: string; groupId: string }) => ({
  ...{ groupId, resourceType: ResourceType.RUNNER, resourceId: runnerId },
});

/** Policies of runners: the roles that groups are assigned on them. */
export function runnerPolicies(app: App): Pick<ServiceImpl<typeof RunnerService>, Policies> {
  return {
    async listRunnerPolicies(request, context) {
      const caller = principal(context);
      const runner = await getRunner(app.db.point, caller, request.runnerId);
      if (!runner.administers) throw denied("seeing the policies of a runner needs the role admin on it");
      if (runner.kind === RunnerKind.LOCAL_CONFIGURATION)
        throw precondition("the local configuration runner has no policies");
      const page = openPage(request.pagination, ["runner policies", caller.id, runner.id]);
      const rows = await listDirectAssignments(app.db.list, ResourceType.RUNNER, runner.id, page);
      const { items, nextToken } = closePage(page, rows, ({ id }) => id);
      return { policies: items.map(message), pagination: { nextToken } };
    },
    async createRunnerPolicy(request, context) {
      const caller = principal(context);
      const wanted = { ...holding(request), role: roleOfRunnerPolicy(request.role) };
      const assignment = await transact(app, (tx) => assignRole(tx, caller, wanted, attribution(app, caller)));
      return { policy: message(assignment) };
    },
    async updateRunnerPolicy(request, context) {
      const caller = principal(context);
      const wanted = { ...holding(request), role: roleOfRunnerPolicy(request.role) };
      const assignment = await transact(app, (tx) => changeRole(tx, caller, wanted, attribution(app, caller)));
      return { policy: message(assignment) };
    },
    async deleteRunnerPolicy(request, context) {
      const caller = principal(context);
      await transact(app, (tx) => withdrawRole(tx, caller, holding(request), attribution(app, caller)));
      return {};
    },
  };
}
