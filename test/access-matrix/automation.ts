import { v7 as uuidv7 } from "uuid";
import { EnvironmentAutomationService } from "../../gen/gitpod/v1/environment_automation_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const service = ({ serviceId }: World) => ({ id: serviceId });
const task = ({ taskId }: World) => ({ id: taskId });
const execution = ({ executionId }: World) => ({ id: executionId });
const newItem = ({ environmentId }: World) => ({
  ...{ environmentId, metadata: { reference: uuidv7(), name: "x" }, spec: { command: "x" } },
});

const TABLE = `
                        no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createService         U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  getService            U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  listServices          U  D  0  0  ✓  ✓  ✓  0  0  D  D  ✓  0  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  updateService         U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  deleteService         U  D  N  N  D  ✓  ✓  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  startService          U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  stopService           U  D  N  N  D  ✓  ✓  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  upsertAutomationsFile U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  createTask            U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  getTask               U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  listTasks             U  D  0  0  ✓  ✓  ✓  0  0  D  D  ✓  0  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  updateTask            U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  deleteTask            U  D  N  N  D  ✓  ✓  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  D  D  .  .
  startTask             U  D  N  N  D  ✓  D  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
  listTaskExecutions    U  D  0  0  ✓  ✓  ✓  0  0  D  D  ✓  0  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  getTaskExecution      U  D  N  N  ✓  ✓  ✓  N  N  D  D  ✓  N  .  .  .  ✓  .  .  .  .  .  .  ✓  ✓  ✓  .  .
  stopTaskExecution     U  D  N  N  D  ✓  ✓  N  N  D  D  ✓  N  .  .  .  D  .  .  .  .  .  .  ✓  ✓  D  .  .
`;

export const automation = section(EnvironmentAutomationService, TABLE, {
  createService: { request: newItem },
  getService: { request: service },
  listServices: { finds: ({ serviceId }) => serviceId },
  updateService: { request: service },
  deleteService: { request: service, fresh: ["environmentId"] },
  startService: { request: service },
  stopService: { request: service },
  upsertAutomationsFile: {
    request: ({ environmentId }) => ({ environmentId, automationsFile: {} }),
    fresh: ["environmentId"],
  },
  createTask: { request: newItem },
  getTask: { request: task },
  listTasks: { finds: ({ taskId }) => taskId },
  updateTask: { request: task },
  deleteTask: { request: task, fresh: ["environmentId"] },
  startTask: { request: task },
  getTaskExecution: { request: execution },
  listTaskExecutions: { finds: ({ executionId }) => executionId },
  stopTaskExecution: { request: execution, fresh: ["environmentId"] },
});
