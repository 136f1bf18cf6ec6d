import { clone, create, equals } from "@bufbuild/protobuf";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import {
  type CreateSCMIntegrationRequest,
  type ListSCMIntegrationsRequest,
  RunnerKind,
  type SCMIntegration,
  SCMIntegrationOAuthConfigSchema,
  SCMIntegrationSchema,
  HostAuthenticationTokenSource as Source,
  type UpdateSCMIntegrationRequest,
} from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, transact, transactSecrets } from "../../app.ts";
import { denied, invalid, precondition, refuseProblems } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { type IntegrationParts, integrationProblems, secretProblem } from "../../domain/scm-integration.ts";
import { normalizeHost } from "../../scm/hosts.ts";
import { BOX_KEY_BYTES, newBoxKeys, sealTo } from "../../scm/sealed-box.ts";
import type { Tx } from "../../store/db.ts";
import { seal } from "../../store/envelope.ts";
import { endHostTokens } from "../../store/host-tokens.ts";
import type { Change } from "../../store/record.ts";
import { getRunner, keepBoxKeys, type StoredRunner } from "../../store/runners.ts";
import {
  deleteIntegration,
  getIntegration,
  insertIntegration,
  listIntegrations,
  type StoredIntegration,
  updateIntegration,
} from "../../store/scm-integrations.ts";
import { publishedSchema } from "./schema.ts";

/** What a reader without ADMIN does not see: the client secret, sealed as it is. */
function shown(caller: Caller, { message, administers }: StoredIntegration): SCMIntegration {
  // A runner can open it, and needs it to renew tokens.
  if (!message.oauth || administers || caller.principal === Principal.RUNNER) return message;
  return { ...message, oauth: { ...message.oauth, encryptedClientSecret: new Uint8Array() } };
}

function changeOf(
  app: App,
  caller: Caller,
  message: SCMIntegration,
  operation: ResourceOperation,
  action: string,
): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.RUNNER_SCM_INTEGRATION,
    resourceId: message.id,
    operation,
    runnerId: message.runnerId,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}

/** A runner whose integrations the caller may change. */
async function lockRunner(tx: Tx, caller: Caller, runnerId: string): Promise<StoredRunner> {
  const runner = await getRunner(tx, caller, runnerId, true);
  if (!runner.administers) throw denied("source control integrations need the role admin on their runner");
  if (runner.phase === RunnerPhase.DELETING) throw precondition("the runner is being deleted");
  return runner;
}

/** The key that secrets for a runner are sealed to. That of the local configuration runner is made when it is needed. */
async function boxKeyOf(app: App, tx: Tx, runner: StoredRunner): Promise<Uint8Array> {
  if (runner.publicKey?.length === BOX_KEY_BYTES) return runner.publicKey;
  // Known to clients by these words.
  if (runner.kind !== RunnerKind.LOCAL_CONFIGURATION) throw precondition("runner does not have a public key");
  const { publicKey, privateKey } = await newBoxKeys();
  const context = `runner ${runner.id} private key`;
  await keepBoxKeys(tx, runner.id, publicKey, seal(app.masterKey, context, privateKey, app.random));
  return publicKey;
}

function partsOf(message: SCMIntegration, hasSecret: boolean): IntegrationParts {
  const { scmId, pat, oauth, virtualDirectory = "" } = message;
  const { clientId = "", issuerUrl = "" } = oauth ?? {};
  return { scmId, pat, clientId, hasSecret, issuerUrl, virtualDirectory };
}

function hostOf(text: string): string {
  const isPlain = text !== "" && !text.includes("://") && !text.includes("@");
  const host = isPlain ? normalizeHost(text) : undefined;
  if (!host) throw invalid({ field: "host", message: "must be a host name without scheme, user and query" });
  return host.host;
}

/** CreateSCMIntegration: how a runner reaches and signs in to a host; its id. */
export async function createIntegration(
  app: App,
  caller: Caller,
  request: CreateSCMIntegrationRequest,
): Promise<string> {
  const { runnerId, scmId, pat, virtualDirectory, issuerUrl = "" } = request;
  const { oauthClientId: clientId = "", oauthPlaintextClientSecret: secret = "" } = request;
  return transact(app, async (tx) => {
    const runner = await lockRunner(tx, caller, runnerId);
    const host = hostOf(request.host);
    const product = publishedSchema(app, runner).scm.find((each) => each.scmId === scmId);
    const parts = {
      scmId,
      pat,
      clientId,
      hasSecret: secret !== "",
      issuerUrl,
      virtualDirectory: virtualDirectory ?? "",
    };
    refuseProblems([...integrationProblems(parts, product), ...secretProblem(secret)]);
    const message = create(SCMIntegrationSchema, { id: app.newId(), runnerId, scmId, host, pat });
    message.virtualDirectory = virtualDirectory || undefined;
    if (clientId) {
      const encryptedClientSecret = await sealTo(await boxKeyOf(app, tx, runner), Buffer.from(secret));
      message.oauth = create(SCMIntegrationOAuthConfigSchema, { clientId, issuerUrl, encryptedClientSecret });
    }
    const change = changeOf(app, caller, message, ResourceOperation.CREATE, "Source control integration created");
    await insertIntegration(tx, caller.organizationId, message, change);
    return message.id;
  });
}

/** The OAuth part that a request leads to; `secret` is given when it has to be sealed anew. */
function nextOAuth(message: SCMIntegration, request: UpdateSCMIntegrationRequest) {
  const { oauthClientId, oauthPlaintextClientSecret: secret, issuerUrl } = request;
  if (oauthClientId === "") return { oauth: undefined, secret: undefined };
  const before = message.oauth;
  if (!before && oauthClientId === undefined) {
    if (secret) throw invalid({ field: "oauth_plaintext_client_secret", message: "needs a client id, too" });
    return { oauth: undefined, secret: undefined };
  }
  const clientId = oauthClientId ?? before?.clientId ?? "";
  if (clientId !== before?.clientId && !secret)
    throw invalid({ field: "oauth_plaintext_client_secret", message: "must come with a new client id" });
  const oauth = create(SCMIntegrationOAuthConfigSchema, {
    clientId,
    issuerUrl: issuerUrl ?? before?.issuerUrl ?? "",
    encryptedClientSecret: before?.encryptedClientSecret,
  });
  return { oauth, secret: secret || undefined };
}

/** UpdateSCMIntegration: a way to sign in that is taken away takes the credentials along that came by it. */
export async function changeIntegration(app: App, caller: Caller, request: UpdateSCMIntegrationRequest): Promise<void> {
  await transactSecrets(app, async (tx) => {
    const seen = await getIntegration(tx, caller, request.id);
    // The runner first, as everywhere.
    const runner = await lockRunner(tx, caller, seen.message.runnerId);
    const { message } = await getIntegration(tx, caller, request.id, true);
    const next = clone(SCMIntegrationSchema, message);
    const { oauth, secret } = nextOAuth(message, request);
    next.oauth = oauth;
    next.pat = request.pat ?? message.pat;
    if (request.virtualDirectory !== undefined) next.virtualDirectory = request.virtualDirectory || undefined;
    const product = publishedSchema(app, runner).scm.find((each) => each.scmId === message.scmId);
    refuseProblems([...integrationProblems(partsOf(next, oauth !== undefined), product), ...secretProblem(secret)]);
    if (oauth && secret)
      oauth.encryptedClientSecret = await sealTo(await boxKeyOf(app, tx, runner), Buffer.from(secret));
    if (equals(SCMIntegrationSchema, next, message)) return;
    const action = "Source control integration changed";
    await updateIntegration(tx, next, changeOf(app, caller, next, ResourceOperation.UPDATE, action));
    const by = { actor: actorOf(caller), newId: app.newId, at: app.now(), action: "Host authentication token deleted" };
    const ended = [
      ...(message.oauth && !next.oauth ? [Source.OAUTH] : []),
      ...(message.pat && !next.pat ? [Source.PAT] : []),
    ];
    for (const source of ended) {
      await endHostTokens(tx, { integrationOf: message.runnerId, host: message.host, source }, by);
    }
  });
}

/** DeleteSCMIntegration: with every credential for its host. */
export async function removeIntegration(app: App, caller: Caller, id: string): Promise<void> {
  await transactSecrets(app, async (tx) => {
    const seen = await getIntegration(tx, caller, id);
    await lockRunner(tx, caller, seen.message.runnerId);
    const { message } = await getIntegration(tx, caller, id, true);
    const by = { actor: actorOf(caller), newId: app.newId, at: app.now(), action: "Host authentication token deleted" };
    await endHostTokens(tx, { integrationOf: message.runnerId, host: message.host }, by);
    const action = "Source control integration deleted";
    await deleteIntegration(tx, id, changeOf(app, caller, message, ResourceOperation.DELETE, action));
  });
}

/** GetSCMIntegration. */
export async function readIntegration(app: App, caller: Caller, id: string): Promise<SCMIntegration> {
  return shown(caller, await getIntegration(app.db.point, caller, id));
}

/** ListSCMIntegrations. */
export async function pageOfIntegrations(app: App, caller: Caller, request: ListSCMIntegrationsRequest) {
  const page = openPage(request.pagination, ["scm integrations", caller.id, request.filter]);
  const rows = await listIntegrations(app.db.list, caller, request.filter?.runnerIds ?? [], page);
  const { items, nextToken } = closePage(page, rows, ({ message }) => message.id);
  return { integrations: items.map((each) => shown(caller, each)), pagination: { nextToken } };
}
