import type { ServiceImpl } from "@connectrpc/connect";
import { OrganizationService } from "../../gen/gitpod/v1/organization_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";
import { oidcConfig } from "./organization/oidc-config.ts";

/** OrganizationService, as far as it is built. */
export function organizationService(app: App): ServiceImpl<typeof OrganizationService> {
  return withPending(
    OrganizationService,
    [
      "createOrganization",
      "joinOrganization",
      "getOrganization",
      "updateOrganization",
      "deleteOrganization",
      "listMembers",
      "setRole",
      "createOrganizationInvite",
      "getOrganizationInvite",
      "getOrganizationInviteSummary",
      "leaveOrganization",
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
      "getOrganizationPolicies",
      "updateOrganizationPolicies",
      "getAnnouncementBanner",
      "updateAnnouncementBanner",
      "createCustomDomain",
      "getCustomDomain",
      "updateCustomDomain",
      "deleteCustomDomain",
    ],
    oidcConfig(app),
  );
}
