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
  /** The dev container runs in a container of its own. */
  inContainer: boolean;
  problem: string | undefined;
}

const positive = (text: string | undefined) => (Number(text) > 0 ? Number(text) : undefined);

function isOffered(schema: RunnerConfigurationSchema, isolation: string): boolean {
  const field = schema.environmentClasses.find(({ id }) => id === "isolation");
  return field?.type.case === "enum" && field.type.value.values.includes(isolation);
}

export function classSettings(
  schema: RunnerConfigurationSchema,
  environmentClass: EnvironmentClass | undefined,
): ClassSettings {
  const values = effectiveConfiguration(schema, environmentClass?.configuration ?? []);
  const isolation = values.get("isolation") ?? "process";
  return {
    limits: { cpuCores: positive(values.get("cpu")), memoryMib: positive(values.get("memory")) },
    inContainer: isolation === "container",
    problem: isOffered(schema, isolation) ? undefined : `isolation ${isolation} is not offered by this runner`,
  };
}
