import type { ServiceImpl } from "@connectrpc/connect";
import type { EnvironmentAutomationService } from "../../gen/gitpod/v1/environment_automation_pb.js";
import type { App } from "../app.ts";
import { executions } from "./automation/executions.ts";
import { file } from "./automation/file.ts";
import { services } from "./automation/services.ts";
import { tasks } from "./automation/tasks.ts";

/** EnvironmentAutomationService: services, tasks and executions in environments. */
export function automationService(app: App): ServiceImpl<typeof EnvironmentAutomationService> {
  return { ...services(app), ...tasks(app), ...executions(app), ...file(app) };
}
