import { create } from "@bufbuild/protobuf";
import {
  type EnvironmentSpec_Secret,
  EnvironmentSpec_SecretSchema,
  EnvironmentSpec_Secret_Scope as Scope,
} from "../gen/gitpod/v1/environment_pb.js";
import type { App } from "./app.ts";
import { RUNNER, specSecrets } from "./domain/secret.ts";
import { initializerHosts } from "./scm/initializer.ts";
import type { Inputs } from "./store/creation.ts";
import type { Tx } from "./store/db.ts";
import type { StoredEnvironment } from "./store/environments.ts";
import { usableHostToken } from "./store/host-tokens.ts";
import { environmentSecrets } from "./store/secret-delivery.ts";

// What an environment gets as `spec.secrets`, at its start and whenever something of it changes while it runs.

type Subject = Pick<StoredEnvironment, "organizationId" | "metadata" | "spec">;

type HostTokens = Inputs["tokens"];

/** Hosts of the initializer for which the creator holds a credential on the runner, as entries of the specification. */
function gitCredentials(app: App, { spec }: Subject, hosts: readonly string[], tokens: HostTokens) {
  const known = new Map(spec.secrets.filter(({ source }) => source === RUNNER).map((each) => [each.sourceRef, each]));
  return [...new Set(hosts)].flatMap((host) => {
    const token = tokens.get(host);
    if (!token) return [];
    return create(EnvironmentSpec_SecretSchema, {
      id: known.get(host)?.id ?? app.newId(),
      ...{ name: host, source: RUNNER, sourceRef: host, scope: Scope.RUNNER },
      mount: { case: "gitCredentialHost", value: host },
      session: `${token.id}.${token.version}`,
    });
  });
}

async function tokensFor(app: App, tx: Tx, { metadata }: Subject, hosts: readonly string[]): Promise<HostTokens> {
  const subjectId = metadata.creator?.id ?? "";
  const tokens = new Map<string, { id: string; version: number }>();
  for (const host of hosts) {
    const token = await usableHostToken(tx, { runnerId: metadata.runnerId, host, subjectId }, app.now());
    if (token) tokens.set(host, token);
  }
  return tokens;
}

const withCredentials = (credentials: EnvironmentSpec_Secret[], entries: EnvironmentSpec_Secret[]) => [
  ...credentials,
  ...entries.filter(({ source }) => source !== RUNNER),
];

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
  const hosts = initializerHosts(environment.spec.content?.initializer).flat();
  const [entries, tokens] = await Promise.all([
    environmentSecrets(tx, environment, app.newId, hold),
    tokensFor(app, tx, environment, hosts),
  ]);
  return withCredentials(gitCredentials(app, environment, hosts, tokens), entries);
}

/** What an environment that is being made gets, of what was read for it. */
export function firstSecrets(app: App, environment: Subject, { secrets, tokens }: Inputs): EnvironmentSpec_Secret[] {
  const hosts = initializerHosts(environment.spec.content?.initializer).flat();
  const entries = specSecrets(secrets, environment.spec.secrets, app.newId);
  return withCredentials(gitCredentials(app, environment, hosts, tokens), entries);
}
