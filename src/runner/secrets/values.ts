import { Code, ConnectError } from "@connectrpc/connect";
import type { EnvironmentSpec_Secret } from "../../../gen/gitpod/v1/environment_pb.js";
import { RUNNER } from "../../domain/secret.ts";
import { gitCredentials, isScmId } from "../../scm/hosts.ts";
import type { ControlPlane } from "../control-plane.ts";

/** Most values that are asked for at once. */
const AT_ONCE = 100;

type Control = ControlPlane["control"];

/** A credential for git in the form of a secret, `user:password`; undefined if there is none any more. */
async function hostCredential(
  control: Control,
  environmentId: string,
  host: string,
  signal: AbortSignal,
): Promise<string | undefined> {
  const purpose = { case: "environmentId" as const, value: environmentId };
  try {
    const { token, scmId } = await control.getHostToken({ purpose, host }, { signal });
    const { username, password } = gitCredentials(isScmId(scmId) ? scmId : "git", token);
    return `${username}:${password}`;
  } catch (error) {
    if (ConnectError.from(error).code === Code.NotFound) return undefined;
    throw error;
  }
}

/**
 * Values of entries, by their ids, over the authenticated channel to the control plane; those that are gone are left
 * out. They are kept in memory, and in the environment's own folder for secrets where a mount needs a file.
 */
export async function fetchValues(
  control: Control,
  environmentId: string,
  entries: readonly EnvironmentSpec_Secret[],
  signal: AbortSignal,
): Promise<Map<string, string>> {
  const values = new Map<string, string>();
  const stored = entries.filter(({ source }) => source !== RUNNER);
  for (let from = 0; from < stored.length; from += AT_ONCE) {
    const part = stored.slice(from, from + AT_ONCE);
    const request = { environmentId, secretIds: part.map(({ sourceRef }) => sourceRef) };
    const { secrets } = await control.getEnvironmentSecrets(request, { signal });
    const found = new Map(secrets.map(({ id, value }) => [id, value]));
    for (const { id, sourceRef } of part) {
      const value = found.get(sourceRef);
      if (value !== undefined) values.set(id, value);
    }
  }
  for (const { id, mount } of entries.filter(({ source }) => source === RUNNER)) {
    const value = mount.case && (await hostCredential(control, environmentId, String(mount.value), signal));
    if (value !== undefined) values.set(id, value);
  }
  return values;
}
