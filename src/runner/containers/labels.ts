// Labels by which everything of the product is found in a container engine, and told from all that is somebody else's.

export const ENVIRONMENT_LABEL = "berth.environment";
const RUNNER_LABEL = "berth.runner";
const PURPOSE_LABEL = "berth.purpose";

/** What an engine is used for. */
export type Purpose = "devcontainer" | "automation";

/**
 * Labels of everything that an engine has of an environment for a purpose; without one, of all environments of the
 * runner, which is told by its data folder: another one on the same host has another.
 */
export const labelsOf = (purpose: Purpose, dataDir: string, environmentId?: string): Record<string, string> => ({
  [PURPOSE_LABEL]: purpose,
  [RUNNER_LABEL]: dataDir,
  ...(environmentId !== undefined && { [ENVIRONMENT_LABEL]: environmentId }),
});
