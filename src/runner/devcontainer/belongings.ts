import type { ContainerEngine } from "../containers/engine.ts";
import { ENVIRONMENT_LABEL, labelsOf as labelsFor } from "../containers/labels.ts";
import type { SupervisorClient } from "../supervisor/client.ts";

// What a container engine has of an environment's dev container: how it is told from everything else, and taken away.

export const IMAGE_LABEL = "berth.image";

const STOP_SECONDS = 20;

/** A container on its way. */
export interface ContainerProgress {
  /** Why there is none; empty unless that is certain. */
  readonly failure: string;
  /** Empty as long as it does not run. */
  readonly containerId: string;
  /** Lets the next pass begin with it. */
  want(): void;
  /** The supervisor in it, as soon as it serves; rejects if it never will. */
  client(): Promise<SupervisorClient>;
  /** Does what can be done by now. */
  advance(signal: AbortSignal): Promise<void>;
  /** Ends what is under way; resolves when it has ended. */
  cancel(): Promise<void>;
  /** As `cancel`, and does not wait. */
  abandon(): void;
}

export const containerName = (environmentId: string) => `berth-${environmentId}`;

/** Labels of everything that an engine has of the dev container of an environment, or of all of them. */
export const labelsOf = (dataDir: string, environmentId?: string): Record<string, string> =>
  labelsFor("devcontainer", dataDir, environmentId);

/** Asks what runs in the container to end, then ends it. One that does not exist, or does not run, is fine. */
export async function stopContainer(engine: ContainerEngine, environmentId: string, isGraceful: boolean) {
  const name = containerName(environmentId);
  const found = await engine.inspect(name);
  if (found?.isRunning) await engine.stop(name, isGraceful ? STOP_SECONDS : 0);
}

/** Engines may say where they have looked for an image. */
const plainName = (image: string) => image.replace(/^localhost\//, "");

/** Removes images with these labels but those that are kept, and what these are made of. */
async function removeImages(engine: ContainerEngine, labels: Record<string, string>, kept: readonly string[]) {
  const isNamed = (image: string) => image.includes(":");
  for (const image of (await engine.images(labels)).filter(isNamed)) {
    if (!kept.includes(plainName(image))) await engine.removeImage(image);
  }
  // Left by builds that were cut off. What others are made of stays as long as they do.
  const rest = (await engine.images(labels)).filter((each) => !isNamed(each));
  for (const image of rest) await engine.removeImage(image).catch(() => undefined);
}

/** Removes the container of an environment and its images but one; what is not there is fine. */
export async function removeContainer(
  engine: ContainerEngine,
  environmentId: string,
  keptImage?: string,
): Promise<void> {
  await engine.remove(containerName(environmentId));
  // Labels are set one after the other, this one first: a build that was cut off may have left an image with no other.
  await removeImages(engine, { [ENVIRONMENT_LABEL]: environmentId }, keptImage === undefined ? [] : [keptImage]);
}

/** Removes containers and images of a runner that belong to none of these environments. */
export async function removeStrays(
  engine: ContainerEngine,
  dataDir: string,
  known: { environmentIds: ReadonlySet<string>; images: readonly string[] },
): Promise<void> {
  for (const { name, labels } of await engine.list(labelsOf(dataDir))) {
    if (!known.environmentIds.has(labels[ENVIRONMENT_LABEL] ?? "")) await engine.remove(name);
  }
  await removeImages(engine, labelsOf(dataDir), known.images);
}
