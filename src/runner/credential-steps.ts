import type { EnvironmentSpec } from "../../gen/gitpod/v1/environment_pb.js";
import { RUNNER } from "../domain/secret.ts";
import { describe } from "./control-plane.ts";
import type { EnvironmentSite } from "./site.ts";

// Credentials for hosts end while environments run. Asking for one shortly before has it renewed; as with any change of a
// credential, the specification then brings the new one into all environments that use it.

/** The control plane gives out what renewing takes from five minutes before the end on. */
const RENEW_BEFORE_MS = 5 * 60_000 - 5_000;
const RETRY_MS = 10_000;

/** When to ask for a credential again. */
const nextLook = (expiresAt: number | undefined) =>
  expiresAt === undefined ? Infinity : Math.max(Date.now() + RETRY_MS, expiresAt - RENEW_BEFORE_MS);

/** Asks for the credentials of an environment that runs once they are about to end. */
export async function keepCredentials(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  signal: AbortSignal,
): Promise<void> {
  for (const { id, session, source, mount } of spec.secrets) {
    if (source !== RUNNER || mount.case !== "gitCredentialHost") continue;
    const known = site.credentialLooks.get(id);
    if (known?.session === session && known.at > Date.now()) continue;
    let at = Date.now() + RETRY_MS;
    try {
      const purpose = { case: "environmentId" as const, value: site.id };
      at = nextLook((await site.host.hostCredentials(purpose, mount.value, signal))?.expiresAt);
    } catch (error) {
      signal.throwIfAborted();
      site.host.log.info({ environmentId: site.id, error: describe(error) }, "a credential is asked for later");
    }
    site.credentialLooks.set(id, { session, at });
  }
}
