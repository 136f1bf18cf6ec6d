import type { EnvironmentSpec_Secret } from "../../../gen/gitpod/v1/environment_pb.js";
import { RUNNER } from "../../domain/secret.ts";
import type { Host } from "../host.ts";

/** Most values that are asked for at once. */
const AT_ONCE = 100;

/**
 * Values of entries, by their ids, over the authenticated channel to the control plane; those that are gone are left
 * out. They are kept in memory, and in the environment's own folder for secrets where a mount needs a file.
 */
export async function fetchValues(
  { controlPlane, hostCredentials }: Pick<Host, "controlPlane" | "hostCredentials">,
  environmentId: string,
  entries: readonly EnvironmentSpec_Secret[],
  signal: AbortSignal,
): Promise<Map<string, string>> {
  const values = new Map<string, string>();
  const stored = entries.filter(({ source }) => source !== RUNNER);
  for (let from = 0; from < stored.length; from += AT_ONCE) {
    const part = stored.slice(from, from + AT_ONCE);
    const request = { environmentId, secretIds: part.map(({ sourceRef }) => sourceRef) };
    const { secrets } = await controlPlane.control.getEnvironmentSecrets(request, { signal });
    const found = new Map(secrets.map(({ id, value }) => [id, value]));
    for (const { id, sourceRef } of part) {
      const value = found.get(sourceRef);
      if (value !== undefined) values.set(id, value);
    }
  }
  for (const { id, mount } of entries.filter(({ source }) => source === RUNNER)) {
    const purpose = { case: "environmentId" as const, value: environmentId };
    const found = mount.case && (await hostCredentials(purpose, String(mount.value), signal));
    if (found) values.set(id, `${found.username}:${found.password}`);
  }
  return values;
}
