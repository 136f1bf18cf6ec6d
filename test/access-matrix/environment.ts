import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const one = ({ environmentId }: World) => ({ environmentId });
const port = ({ environmentId }: World) => ({ environmentId, port: 3000 });

const TABLE = `
                               no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  getEnvironment               U  D  N  N  ✓  ✓  ✓  N  N  ✓  N  ✓  N  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  listEnvironments             U  D  0  0  ✓  ✓  ✓  0  0  ✓  0  ✓  0  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  listEnvironmentClasses       U  D  0  0  ✓  ✓  ✓  0  0  ✓  0  ✓  0  ✓  ✓  .  .  .  ✓  ✓  ✓  ✓  ✓  .  .  .  .  .
  createEnvironment            U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  ✓  D  .  .  .  ✓  ✓  D  D  D  .  .  .  .  .
  createEnvironmentFromProject U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  D  .  .  .  .  .  D  D  D  .  .  .  .  .
  startEnvironment             U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  D  D  D  .  .
  stopEnvironment              U  D  N  N  D  ✓  ✓  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  updateEnvironment name       U  D  N  N  D  ✓  ✓  N  N  D  D  D  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  updateEnvironment            U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  updateEnvironment port       U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  updateEnvironment lockdown   U  D  N  N  D  D  ✓  N  N  D  D  D  N  .  .  .  D  .  .  .  .  .  .  D  D  D  .  .
  deleteEnvironment            U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  createEnvironmentLogsToken   U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  createEnvironmentAccessToken U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  createPortAccessToken        U  D  N  N  D  ✓  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  D  D  D  .  .
  allowPortAccess              U  D  N  N  D  ✓  0  N  N  D  D  D  D  .  .  .  0  .  .  .  .  .  .  0  0  0  .  .
  markEnvironmentActive        U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  unarchiveEnvironment         U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  archiveEnvironment           U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
`;

export const environment = section(EnvironmentService, TABLE, {
  getEnvironment: { request: one },
  listEnvironments: { finds: ({ environmentId }) => environmentId },
  listEnvironmentClasses: { finds: ({ classId }) => classId },
  createEnvironment: { request: ({ classId }) => ({ spec: { machine: { class: classId } } }) },
  createEnvironmentFromProject: {
    request: ({ projectId, classId }) => ({ projectId, spec: { machine: { class: classId } } }),
  },
  startEnvironment: { request: one },
  stopEnvironment: { request: one, fresh: ["environmentId"] },
  archiveEnvironment: { request: one, fresh: ["environmentId"] },
  unarchiveEnvironment: { request: one },
  deleteEnvironment: { request: one, fresh: ["environmentId"] },
  // Only a name: organization admins may give one, too.
  "updateEnvironment name": { request: (world) => ({ ...one(world), metadata: { name: "x" } }) },
  updateEnvironment: {
    request: (world) => ({ ...one(world), spec: { timeout: { disconnected: { seconds: 3600n } } } }),
  },
  "updateEnvironment port": {
    request: (world) => ({ ...one(world), spec: { ports: [{ port: 8080, name: "x", admission: 1 }] } }),
  },
  "updateEnvironment lockdown": {
    request: (world) => ({ ...one(world), metadata: { lockdownAt: { seconds: 4_000_000_000n } } }),
  },
  markEnvironmentActive: { request: one },
  createEnvironmentLogsToken: { request: one },
  createEnvironmentAccessToken: { request: one },
  createPortAccessToken: { request: port },
  // It answers whether the caller may.
  allowPortAccess: { request: port, finds: () => '"allowed":true' },
});
