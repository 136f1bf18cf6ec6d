import { RunnerProvider } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerRole, RunnerService } from "../../gen/gitpod/v1/runner_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const one = ({ runnerId }: World) => ({ runnerId });
const policy = ({ runnerId, powerfulGroupId }: World) => ({
  runnerId,
  groupId: powerfulGroupId,
  role: RunnerRole.USER,
});
const shared = ({ runnerId, sharingGroupId }: World) => ({ runnerId, groupId: sharingGroupId, role: RunnerRole.USER });

const TABLE = `
                             no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createRunner               U  D  ✓  D  D  D  ✓  D  D  D  D  D  D  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getRunner                  U  D  N  N  ✓  ✓  ✓  N  N  ✓  N  ✓  N  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  listRunners                U  D  0  0  ✓  ✓  ✓  0  0  ✓  0  ✓  0  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  updateRunner               U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteRunner               U  D  N  N  D  N  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  createRunnerToken          U  D  N  N  D  D  ✓  N  N  ✓  N  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  createRunnerLogsToken      U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  parseContextURL            U  D  N  N  T  T  T  N  N  D  D  T  N  T  .  .  .  .  T  T  .  .  .  .  .  .  .  .
  searchRepositories         U  D  i  i  i  i  i  i  i  D  D  i  i  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSCMOrganizations       U  D  i  i  i  i  i  i  i  D  D  i  i  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  checkAuthenticationForHost U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  checkRepositoryAccess      U  D  i  i  i  i  i  i  i  D  D  i  i  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listRunnerPolicies         U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  createRunnerPolicy         U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  updateRunnerPolicy         U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  deleteRunnerPolicy         U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
`;

export const runner = section(RunnerService, TABLE, {
  createRunner: { request: () => ({ name: "made", provider: RunnerProvider.LINUX_HOST }) },
  getRunner: { request: one },
  listRunners: { finds: ({ runnerId }) => runnerId },
  updateRunner: { request: one },
  deleteRunner: { request: one, fresh: ["runnerId"] },
  createRunnerToken: { request: one },
  createRunnerLogsToken: { request: one },
  // The runner of this test never answers.
  parseContextURL: { request: (world) => ({ ...one(world), contextUrl: "https://git.example.org/a/b" }) },
  searchRepositories: { request: one },
  listSCMOrganizations: { request: (world) => ({ ...one(world), scmHost: "github.com" }) },
  checkAuthenticationForHost: { request: (world) => ({ ...one(world), host: "github.com" }) },
  checkRepositoryAccess: { request: (world) => ({ ...one(world), repositoryUrl: "https://git.example.org/a/b" }) },
  listRunnerPolicies: { request: one, finds: ({ groupId }) => groupId },
  createRunnerPolicy: { request: policy, fresh: ["powerfulGroupId"] },
  updateRunnerPolicy: { request: shared, fresh: ["sharingGroupId"] },
  deleteRunnerPolicy: { request: shared, fresh: ["sharingGroupId"] },
});
