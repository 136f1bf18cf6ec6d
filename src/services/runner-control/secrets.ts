import { create } from "@bufbuild/protobuf";
import {
  type EnvironmentSecret,
  EnvironmentSecretSchema,
  type GetEnvironmentSecretsRequest,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentPhase, type EnvironmentSpec } from "../../../gen/gitpod/v1/environment_pb.js";
import { type App, actorOf } from "../../app.ts";
import { notFound, precondition } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { CONTROL_PLANE } from "../../domain/secret.ts";
import { secretsNamed } from "../../store/automation/secrets.ts";
import { getEnvironment } from "../../store/environments.ts";
import { type OpenSecret, readValues } from "../../store/secret-delivery.ts";

/** Ids of the secrets whose values the runner of an environment may have. */
const secretIdsOf = ({ secrets }: EnvironmentSpec): ReadonlySet<string> =>
  new Set(secrets.filter(({ source }) => source === CONTROL_PLANE).map(({ sourceRef }) => sourceRef));

const delivered = ({ message, session, value }: OpenSecret): EnvironmentSecret =>
  create(EnvironmentSecretSchema, {
    id: message.id,
    version: session,
    value,
    credentialProxy: message.credentialProxy,
    sourceDetails: message.source,
  });

/** GetEnvironmentSecrets: values for the runner that realises an environment. */
export async function environmentSecrets(
  app: App,
  caller: Caller,
  request: GetEnvironmentSecretsRequest,
): Promise<EnvironmentSecret[]> {
  const environment = await getEnvironment(app.db.point, caller, request.environmentId);
  const { spec, organizationId } = environment;
  if (spec.desiredPhase !== EnvironmentPhase.RUNNING) throw precondition("the environment is not to run");
  const ids = request.secretIds.map((id) => id.toLowerCase());
  const known = secretIdsOf(spec);
  const others = ids.filter((id) => !known.has(id));
  const named = others.length > 0 ? await secretsNamed(app.db.point, environment, others) : new Map<string, boolean>();
  const stranger = others.find((id) => !named.has(id));
  if (stranger) throw notFound("secret", stranger);
  const usable = ids.filter((id) => known.has(id) || named.get(id));
  const { masterKey, newId } = app;
  const by = { masterKey, newId, at: app.now() };
  const secrets = await readValues(app.db.write, actorOf(caller), organizationId, usable, by);
  return secrets.map(delivered);
}
