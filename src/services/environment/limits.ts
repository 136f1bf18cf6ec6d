import { durationMs } from "@bufbuild/protobuf/wkt";
import {
  AdmissionLevel,
  type EnvironmentInitializer,
  type EnvironmentSpec,
  type UpdateEnvironmentRequest_Spec,
} from "../../../gen/gitpod/v1/environment_pb.js";
import type { OrganizationPolicies } from "../../../gen/gitpod/v1/organization_pb.js";
import { RunnerKind } from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import { requiredKernelControls, weakenedPolicies } from "../../domain/environment.ts";
import { isWider } from "../../domain/environment-ports.ts";
import { precondition, Refusal } from "../../domain/errors.ts";
import { policyRefusal } from "../../domain/policies.ts";
import type { Caller } from "../../domain/principal.ts";
import { isConnected } from "../../domain/runner.ts";
import { repositoryAddresses, sameRepository } from "../../scm/initializer.ts";
import type { Tx } from "../../store/db.ts";
import { countForQuota, type QuotaUse } from "../../store/environments.ts";
import type { StoredRunner } from "../../store/runners.ts";

// What every environment has to respect, whichever RPC creates, starts or changes it.

export function checkRunner(runner: { kind: RunnerKind; phase: StoredRunner["phase"] }, localRunners: boolean): void {
  if (runner.kind === RunnerKind.LOCAL && !localRunners) {
    throw policyRefusal(
      "failed_precondition",
      "allow_local_runners",
      "local runners are switched off in this organization",
    );
  }
  if (!isConnected(runner.phase)) throw precondition("runner is not connected");
}

/** Members who need a project for each environment take no repositories into it but those that are its own. */
export function checkRepositories(
  caller: Caller,
  { membersRequireProjects }: OrganizationPolicies,
  wanted: EnvironmentInitializer | undefined,
  ...own: (EnvironmentInitializer | undefined)[]
): void {
  if (caller.orgAdmin || !membersRequireProjects) return;
  const allowed = own.flatMap((each) => repositoryAddresses(each, true));
  const named = repositoryAddresses(wanted, true);
  if (named.every((address) => allowed.some((each) => sameRepository(address, each)))) return;
  throw policyRefusal(
    "permission_denied",
    "members_require_projects",
    "environments must hold repositories of their project",
  );
}

/** Members who may not start from scratch need at least one repository. */
export function checkHoldsRepository(
  caller: Caller,
  { disableFromScratch }: OrganizationPolicies,
  wanted: EnvironmentInitializer | undefined,
): void {
  if (caller.orgAdmin || !disableFromScratch || wanted?.specs.length) return;
  throw policyRefusal("permission_denied", "disable_from_scratch", "environments must be created from a repository");
}

type Bounded = Pick<EnvironmentSpec | UpdateEnvironmentRequest_Spec, "ports" | "timeout" | "kernelControlsConfig">;

/** What the organization allows to nobody: timeouts, open ports and kernel controls of a spec or of changes to one. */
export function checkPolicies(policies: OrganizationPolicies, spec: Bounded): void {
  const longest = policies.maximumEnvironmentTimeout ? durationMs(policies.maximumEnvironmentTimeout) : 0;
  const wanted = spec.timeout?.disconnected && durationMs(spec.timeout.disconnected);
  if (longest > 0 && wanted !== undefined && (wanted <= 0 || wanted > longest)) {
    throw policyRefusal(
      "failed_precondition",
      "maximum_environment_timeout",
      `the timeout must be between 1 and ${longest / 1000} seconds`,
    );
  }
  if (spec.ports.length && policies.portSharingDisabled) {
    throw policyRefusal(
      "failed_precondition",
      "port_sharing_disabled",
      "sharing ports is switched off in this organization",
    );
  }
  const cap = policies.maxPortAdmissionLevel;
  if (cap !== AdmissionLevel.UNSPECIFIED && spec.ports.some((port) => isWider(port.admission, cap))) {
    throw policyRefusal(
      "failed_precondition",
      "max_port_admission_level",
      "the admission of a port is wider than the organization allows",
    );
  }
  const [weakened] = spec.kernelControlsConfig
    ? weakenedPolicies(spec.kernelControlsConfig, requiredKernelControls(policies))
    : [];
  if (weakened)
    throw policyRefusal(
      "failed_precondition",
      weakened,
      "the kernel controls are weaker than the organization asks for",
    );
}

/** Whose quotas count; only people have any. */
export interface Limited {
  id: string;
  organizationId: string;
  limited: boolean;
}

/** As `countForQuota`, for whom there is a quota at all; undefined for everybody else. */
export async function quotaUse(
  tx: Tx,
  { id, organizationId, limited }: Limited,
  policies: OrganizationPolicies,
): Promise<QuotaUse | undefined> {
  const { maximumEnvironmentsPerUser: most, maximumRunningEnvironmentsPerUser: mostRunning } = policies;
  return limited && (most > 0n || mostRunning > 0n) ? countForQuota(tx, organizationId, id) : undefined;
}

export function checkQuotas(use: QuotaUse | undefined, policies: OrganizationPolicies, isNew: boolean): void {
  if (!use) return;
  const { total, running } = use;
  const most = Number(policies.maximumEnvironmentsPerUser);
  const mostRunning = Number(policies.maximumRunningEnvironmentsPerUser);
  if (isNew && most > 0 && total >= most) {
    throw policyRefusal(
      "resource_exhausted",
      "maximum_environments_per_user",
      `you have ${total} of at most ${most} environments`,
    );
  }
  if (mostRunning > 0 && running >= mostRunning) {
    throw policyRefusal(
      "resource_exhausted",
      "maximum_running_environments_per_user",
      `you have ${running} of at most ${mostRunning} running environments`,
    );
  }
}

export function checkCapacity(running: number, maxEnvironments: number | undefined): void {
  if (maxEnvironments !== undefined && running >= maxEnvironments)
    throw new Refusal("resource_exhausted", `the runner runs ${running} of at most ${maxEnvironments} environments`);
}
