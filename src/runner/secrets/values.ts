import { Code, ConnectError } from "@connectrpc/connect";
import type { GetHostTokenRequest } from "../../../gen/berth/runner/v1/runner_control_pb.js";
import type { EnvironmentSpec_Secret } from "../../../gen/gitpod/v1/environment_pb.js";
import { RUNNER } from "../../domain/secret.ts";
import { type GitCredentials, gitCredentials, isScmId } from "../../scm/hosts.ts";
import type { ControlPlane } from "../control-plane.ts";

/** Most values that are asked for at once. */
const AT_ONCE = 100;

type Control = ControlPlane["control"];

/** Whose credential is wanted: that of an environment's creator, or of whoever a call is for. */
export type Purpose = GetHostTokenRequest["purpose"];

/** A credential for git at a host; undefined if there is none, or none any more. */
export async function hostCredentials(
  control: Control,
  purpose: Purpose,
  host: string,
  signal: AbortSignal,
): Promise<GitCredentials | undefined> {
  try {
    const { token, scmId } = await control.getHostToken({ purpose, host }, { signal });
    return gitCredentials(isScmId(scmId) ? scmId : "git", token);
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
    const purpose = { case: "environmentId" as const, value: environmentId };
    const found = mount.case && (await hostCredentials(control, purpose, String(mount.value), signal));
    if (found) values.set(id, `${found.username}:${found.password}`);
  }
  return values;
}
