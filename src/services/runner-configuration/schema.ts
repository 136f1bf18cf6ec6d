import { type RunnerConfigurationSchema, RunnerProvider } from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import type { App } from "../../app.ts";
import { linuxHostSchema, scmOnlySchema } from "../../domain/environment-class.ts";
import type { StoredRunner } from "../../store/runners.ts";

/** Where OAuth of source control hosts comes back to. */
export const callbackUrl = (app: App) => `${app.config.publicUrl}/oauth/scm/callback`;

/** What the runner published, or what is known of its kind before it has. */
export function publishedSchema(app: App, runner: StoredRunner): RunnerConfigurationSchema {
  if (runner.configurationSchema) return runner.configurationSchema;
  return runner.provider === RunnerProvider.LINUX_HOST
    ? linuxHostSchema(callbackUrl(app))
    : scmOnlySchema(callbackUrl(app));
}
