import { create } from "@bufbuild/protobuf";
import { AdmissionLevel } from "../../gen/gitpod/v1/environment_pb.js";
import {
  ConversationSharingPolicy,
  type OrganizationPolicies,
  OrganizationPoliciesSchema,
  PolicyEnforcedFailedPreconditionDetailsSchema,
} from "../../gen/gitpod/v1/organization_pb.js";
import { actionable, type Refusal } from "./errors.ts";

const DAY_S = 86_400n;

/** What a new organization starts with: nothing is forbidden, stopped environments are archived after three days. */
export function defaultPolicies(organizationId: string): OrganizationPolicies {
  return create(OrganizationPoliciesSchema, {
    organizationId,
    maximumEnvironmentTimeout: { seconds: 0n },
    membersCreateProjects: true,
    allowLocalRunners: true,
    maximumRunningEnvironmentsPerUser: 10n,
    maximumEnvironmentsPerUser: 50n,
    deleteArchivedEnvironmentsAfter: { seconds: 0n },
    agentPolicy: { conversationSharingPolicy: ConversationSharingPolicy.DISABLED },
    maximumEnvironmentLifetime: { seconds: 0n },
    maxPortAdmissionLevel: AdmissionLevel.UNSPECIFIED,
    archiveEnvironmentsAfter: { seconds: 3n * DAY_S },
  });
}

/** Name of the field of OrganizationPolicies that a refusal is about. */
export type PolicyName =
  | "allow_local_runners"
  | "allowed_editor_ids"
  | "disable_from_scratch"
  | "editor_version_restrictions"
  | "max_port_admission_level"
  | "maximum_environment_lifetime_strict"
  | "maximum_environment_timeout"
  | "maximum_environments_per_user"
  | "maximum_running_environments_per_user"
  | "members_create_projects"
  | "members_require_projects"
  | "port_sharing_disabled"
  | "veto_exec_policy"
  | "veto_file_policy";

/**
 * A refusal by policy: PERMISSION_DENIED when it depends on the role, FAILED_PRECONDITION when the value is forbidden
 * to everyone, RESOURCE_EXHAUSTED for a count. The details name the policy, so that clients can say which.
 */
export function policyRefusal(
  kind: "permission_denied" | "failed_precondition" | "resource_exhausted",
  policyName: PolicyName,
  message: string,
): Refusal {
  const enforced = { desc: PolicyEnforcedFailedPreconditionDetailsSchema, value: { message, policyName } };
  return actionable(kind, policyName, message, {}, kind === "failed_precondition" ? [enforced] : []);
}
