import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { OrganizationService, UpdateOrganizationPoliciesRequest } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, attribution, transact } from "../../app.ts";
import { denied, refuseProblems } from "../../domain/errors.ts";
import {
  changedPolicies,
  concernsRunners,
  policyReferences,
  updatedPolicies,
  visiblePolicies,
} from "../../domain/organization-policies.ts";
import { type Caller, ownOrganization } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { switchOffLocalRunners } from "../../store/local-runners.ts";
import { holdPolicies, missingReferences, readPolicies, setPolicies } from "../../store/organizations.ts";
import { record } from "../../store/record.ts";
import { policiesRevised } from "../../store/runners.ts";

async function updatePolicies(app: App, caller: Caller, request: UpdateOrganizationPoliciesRequest): Promise<void> {
  const organizationId = ownOrganization(caller, request.organizationId);
  if (!caller.orgAdmin) throw denied("changing the policies of the organization needs the role admin in it");
  await transact(app, async (tx, touched) => {
    const before = await holdPolicies(tx, organizationId);
    const { next, problems } = updatedPolicies(before, request, app.newId);
    refuseProblems([...problems, ...(await missingReferences(tx, organizationId, policyReferences(next, request)))]);
    const changed = changedPolicies(before, next);
    if (!changed.length) return;
    const by = attribution(app, caller);
    await setPolicies(tx, next);
    await record(tx, {
      ...{ organizationId, resourceType: ResourceType.ORGANIZATION_POLICY, resourceId: organizationId },
      ...{ operation: ResourceOperation.UPDATE, at: by.at },
      audit: { id: by.newId(), actor: by.actor, action: `Organization policies changed: ${changed.join(", ")}` },
    });
    if (before.allowLocalRunners && !next.allowLocalRunners)
      await switchOffLocalRunners(tx, organizationId, by, touched);
    if (!concernsRunners(before, next)) return;
    for (const runnerId of await policiesRevised(tx, organizationId, by.at)) touched(runnerId);
  });
}

/** What an organization limits its members to. */
export function policies(app: App) {
  return {
    async getOrganizationPolicies(request, context) {
      const caller = principal(context);
      const { policies } = await readPolicies(app.db.point, ownOrganization(caller, request.organizationId));
      return { policies: visiblePolicies(policies, caller.orgAdmin) };
    },
    async updateOrganizationPolicies(request, context) {
      await updatePolicies(app, principal(context), request);
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof OrganizationService>>;
}
