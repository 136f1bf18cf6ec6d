import type { ServiceImpl } from "@connectrpc/connect";
import { OrganizationService } from "../../gen/gitpod/v1/organization_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";
import { principal } from "../rpc/authenticate.ts";
import { getOrganization } from "../store/organizations.ts";
import { members } from "./organization/members.ts";
import { oidcConfig } from "./organization/oidc-config.ts";
import { policies } from "./organization/policies.ts";

/** OrganizationService, as far as it is built. */
export function organizationService(app: App): ServiceImpl<typeof OrganizationService> {
  return withPending(
    OrganizationService,
    [
      "createOrganization",
      "joinOrganization",
      "updateOrganization",
      "deleteOrganization",
      "createOrganizationInvite",
      "getOrganizationInvite",
      "getOrganizationInviteSummary",
      "createSSOConfiguration",
      "getSSOConfiguration",
      "listSSOConfigurations",
      "deleteSSOConfiguration",
      "updateSSOConfiguration",
      "createSCIMConfiguration",
      "getSCIMConfiguration",
      "listSCIMConfigurations",
      "updateSCIMConfiguration",
      "deleteSCIMConfiguration",
      "regenerateSCIMToken",
      "createDomainVerification",
      "getDomainVerification",
      "listDomainVerifications",
      "verifyDomain",
      "deleteDomainVerification",
      "getAnnouncementBanner",
      "updateAnnouncementBanner",
      "createCustomDomain",
      "getCustomDomain",
      "updateCustomDomain",
      "deleteCustomDomain",
    ],
    {
      async getOrganization(request, context) {
        const organization = await getOrganization(app.db.point, principal(context), request.organizationId);
        return { organization };
      },
      ...oidcConfig(app),
      ...members(app),
      ...policies(app),
    },
  );
}
