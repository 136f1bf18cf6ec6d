import { create } from "@bufbuild/protobuf";
import {
  type EnvironmentSpec_Secret,
  EnvironmentSpec_SecretSchema,
  EnvironmentSpec_Secret_Scope as Scope,
} from "../gen/gitpod/v1/environment_pb.js";
import type { App } from "./app.ts";
import { RUNNER } from "./domain/secret.ts";
import { initializerHosts } from "./scm/initializer.ts";
import type { Tx } from "./store/db.ts";
import type { StoredEnvironment } from "./store/environments.ts";
import { usableHostToken } from "./store/host-tokens.ts";
import { environmentSecrets } from "./store/secret-delivery.ts";

// What an environment gets as `spec.secrets`, at its start and whenever something of it changes while it runs.

type Subject = Pick<StoredEnvironment, "organizationId" | "metadata" | "spec">;

/** Hosts of the initializer for which the creator holds a credential on the runner, as entries of the specification. */
async function gitCredentials(app: App, tx: Tx, { metadata, spec }: Subject): Promise<EnvironmentSpec_Secret[]> {
  const subjectId = metadata.creator?.id ?? "";
  const known = new Map(spec.secrets.filter(({ source }) => source === RUNNER).map((each) => [each.sourceRef, each]));
  const entries = new Map<string, EnvironmentSpec_Secret>();
  for (const host of initializerHosts(spec.content?.initializer).flat()) {
    const token = await usableHostToken(tx, { runnerId: metadata.runnerId, host, subjectId }, app.now());
    if (!token) continue;
    entries.set(
      host,
      create(EnvironmentSpec_SecretSchema, {
        id: known.get(host)?.id ?? app.newId(),
        ...{ name: host, source: RUNNER, sourceRef: host, scope: Scope.RUNNER },
        mount: { case: "gitCredentialHost", value: host },
        session: `${token.id}.${token.version}`,
      }),
    );
  }
  return [...entries.values()];
}

/**
 * What an environment gets at this moment: credentials for git, which its runner holds, and the secrets of its owners.
 * With `hold` none of them changes before the transaction ends, so that whoever changes one later finds the environment;
 * take this lock after all others.
 */
export async function currentSecrets(
  app: App,
  tx: Tx,
  environment: Subject,
  hold: boolean,
): Promise<EnvironmentSpec_Secret[]> {
  // Sent one after the other, so that both are read under the lock.
  const [entries, credentials] = await Promise.all([
    environmentSecrets(tx, environment, app.newId, hold),
    gitCredentials(app, tx, environment),
  ]);
  return [...credentials, ...entries.filter(({ source }) => source !== RUNNER)];
}
