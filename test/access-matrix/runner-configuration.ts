import { randomBytes } from "node:crypto";
import {
  HostAuthenticationTokenSource,
  RunnerConfigurationService,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const runner = ({ runnerId }: World) => ({ runnerId });
const environmentClass = ({ classId }: World) => ({ environmentClassId: classId });
const integration = ({ integrationId }: World) => ({ id: integrationId });
const hostToken = ({ hostTokenId }: World) => ({ id: hostTokenId });
const newHost = () => `${randomBytes(8).toString("hex")}.example.org`;
const configuration = [
  { key: "cpu", value: "1" },
  { key: "memory", value: "1024" },
];

const TABLE = `
                                            no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createHostAuthenticationToken             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  createHostAuthenticationToken integration U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  getHostAuthenticationToken                U  D  N  N  ✓  ✓  ✓  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listHostAuthenticationTokens              U  D  0  0  ✓  ✓  ✓  0  0  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateHostAuthenticationToken             U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteHostAuthenticationToken             U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getRunnerConfigurationSchema              U  D  N  N  ✓  ✓  ✓  N  N  ✓  N  ✓  N  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  createSCMIntegration                      U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  getSCMIntegration                         U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  listSCMIntegrations                       U  D  0  0  ✓  ✓  ✓  0  0  ✓  0  ✓  0  ✓  .  .  .  .  ✓  ✓  .  .  .  .  .  .  .  .
  updateSCMIntegration                      U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  deleteSCMIntegration                      U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  createEnvironmentClass                    U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  .  .  .  .  ✓  D  .  .  .  .  .  .  .  .
  getEnvironmentClass                       U  D  N  N  ✓  ✓  ✓  N  N  ✓  N  ✓  N  ✓  ✓  .  .  .  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .
  listEnvironmentClasses                    U  D  0  0  ✓  ✓  ✓  0  0  ✓  0  ✓  0  ✓  ✓  .  .  .  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .
  updateEnvironmentClass                    U  D  N  N  D  D  ✓  N  N  D  D  D  D  ✓  D  .  .  .  ✓  D  D  D  D  .  .  .  .  .
  validateRunnerConfiguration               U  D  i  i  D  i  i  i  i  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const runnerConfiguration = section(RunnerConfigurationService, TABLE, {
  createEnvironmentClass: {
    request: (world) => ({ ...runner(world), displayName: "Small", description: "For tests", configuration }),
  },
  getEnvironmentClass: { request: environmentClass },
  listEnvironmentClasses: { finds: ({ classId }) => classId },
  updateEnvironmentClass: { request: (world) => ({ ...environmentClass(world), description: "For all" }) },
  createHostAuthenticationToken: {
    request: (world) => ({ ...runner(world), host: newHost(), token: "x", source: HostAuthenticationTokenSource.PAT }),
  },
  "createHostAuthenticationToken integration": {
    request: (world) => ({
      ...{ ...runner(world), host: world.integrationHost, integrationId: world.integrationId, token: "x" },
      source: HostAuthenticationTokenSource.PAT,
    }),
    fresh: ["integrationId"],
  },
  getHostAuthenticationToken: { request: hostToken },
  listHostAuthenticationTokens: { finds: ({ hostTokenId }) => hostTokenId },
  updateHostAuthenticationToken: { request: (world) => ({ ...hostToken(world), token: "y" }) },
  deleteHostAuthenticationToken: { request: hostToken, fresh: ["hostTokenId"] },
  getRunnerConfigurationSchema: { request: runner },
  createSCMIntegration: { request: (world) => ({ ...runner(world), scmId: "github", host: newHost(), pat: true }) },
  getSCMIntegration: { request: integration },
  listSCMIntegrations: { finds: ({ integrationId }) => integrationId },
  updateSCMIntegration: { request: (world) => ({ ...integration(world), pat: true }) },
  deleteSCMIntegration: { request: integration, fresh: ["integrationId"] },
  validateRunnerConfiguration: { request: runner },
});
