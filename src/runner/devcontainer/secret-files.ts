import type { ContainerEngine } from "../containers/engine.ts";
import { valueFile } from "../secrets/files.ts";
import type { PlacedSecrets } from "../secrets/plan.ts";
import { type EnvironmentSite, textOf, userOf } from "../site.ts";
import { linkArchive } from "./link-archive.ts";

// Secrets that are asked for at a path of the container's own are links there to where their values lie, which the
// container shares with the host: a new value is there at once, and one that goes leaves a link to nothing. The engine
// puts them in place as long as nothing runs in the container, and runs nothing of the image for that: whoever is root
// there could be root on the host.

/** Puts the links into a container that does not run. */
export async function placeSecretFiles(
  site: EnvironmentSite,
  engine: ContainerEngine,
  container: string,
  signal: AbortSignal,
): Promise<PlacedSecrets> {
  const placed: PlacedSecrets = { ids: [], warnings: [] };
  for (const { id, delivery } of site.record.secrets) {
    if (delivery.kind !== "file" || delivery.inContainer === undefined) continue;
    const { inContainer: path, variable } = delivery;
    try {
      const archive = linkArchive(path.slice(1), valueFile(site.paths, id), userOf(site));
      await engine.unpack(container, archive, signal);
      placed.ids.push(id);
    } catch (error) {
      signal.throwIfAborted();
      const warning = `a secret could not be put at ${path}, see $${variable}: ${textOf(error)}`;
      site.log.write(warning);
      placed.warnings.push(warning);
    }
  }
  return placed;
}
