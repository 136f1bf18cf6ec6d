import { OrganizationRole, OrganizationService } from "../../gen/gitpod/v1/organization_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

/** Has whatever RPCs about organizations ask for. */
const everything = ({ organizationId, otherUserId, unknownId }: World) => ({
  ...{ organizationId, userId: otherUserId, role: OrganizationRole.MEMBER, name: "Another", message: "Hello" },
  ...{ domain: "example.org", domainName: "berth.example.org", domainVerificationId: unknownId, inviteId: unknownId },
  ...{ clientId: "x", clientSecret: "x", issuerUrl: "https://login.example.org" },
  ...{ ssoConfigurationId: unknownId, scimConfigurationId: unknownId },
  oidcConfig: { version: { case: "v3", value: {} } },
});

const TABLE = `
                               no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createOrganization           U  i  i  i  D  i  i  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  joinOrganization             U  i  i  i  D  i  i  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getOrganization              U  ✓  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateOrganization           U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteOrganization           U  D  i  i  D  i  i  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listMembers                  U  ✓  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  setRole                      U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createOrganizationInvite     U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getOrganizationInvite        U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getOrganizationInviteSummary U  i  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  leaveOrganization            U  N  N  N  D  N  N  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createSSOConfiguration       U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getSSOConfiguration          U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSSOConfigurations        U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteSSOConfiguration       U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateSSOConfiguration       U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createSCIMConfiguration      U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getSCIMConfiguration         U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSCIMConfigurations       U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateSCIMConfiguration      U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteSCIMConfiguration      U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  regenerateSCIMToken          U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createDomainVerification     U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getDomainVerification        U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listDomainVerifications      U  D  i  i  i  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  verifyDomain                 U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteDomainVerification     U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getOrganizationPolicies      U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateOrganizationPolicies   U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getOIDCConfig                U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateOIDCConfig             U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getAnnouncementBanner        U  D  i  i  i  i  i  i  i  D  D  i  i  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateAnnouncementBanner     U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createCustomDomain           U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getCustomDomain              U  D  i  i  i  i  i  i  i  D  D  i  i  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateCustomDomain           U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteCustomDomain           U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const organization = section(OrganizationService, TABLE, {
  ...Object.fromEntries(OrganizationService.methods.map(({ localName }) => [localName, { request: everything }])),
  listMembers: { request: everything, finds: ({ otherUserId }) => otherUserId },
  leaveOrganization: { request: ({ unknownId }) => ({ userId: unknownId }) },
});
