import type { EnvironmentClass, RunnerConfigurationSchema } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { effectiveConfiguration } from "../domain/environment-class.ts";

/** What the class of an environment allows it to use; undefined is unlimited. */
export interface Limits {
  cpuCores: number | undefined;
  memoryMib: number | undefined;
}

/** A class as this host understands it; `problem` says why it cannot be realised here. */
export interface ClassSettings {
  limits: Limits;
  problem: string | undefined;
}

const positive = (text: string | undefined) => (Number(text) > 0 ? Number(text) : undefined);

export function classSettings(
  schema: RunnerConfigurationSchema,
  environmentClass: EnvironmentClass | undefined,
): ClassSettings {
  const values = effectiveConfiguration(schema, environmentClass?.configuration ?? []);
  const isolation = values.get("isolation") ?? "process";
  return {
    limits: { cpuCores: positive(values.get("cpu")), memoryMib: positive(values.get("memory")) },
    problem: isolation === "process" ? undefined : `isolation ${isolation} is not offered by this runner`,
  };
}
