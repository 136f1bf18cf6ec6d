import { clone, create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import {
  type CreateSecretRequest,
  type ListSecretsRequest,
  type Secret,
  SecretSchema,
  type SecretService,
  type UpdateSecretValueRequest,
} from "../../gen/gitpod/v1/secret_pb.js";
import { type App, actorOf, transactSecrets } from "../app.ts";
import { actionable, denied, isDuplicate, notFound, precondition, Refusal, refuseProblems } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { refuseDeleting } from "../domain/project.ts";
import {
  CONTROL_PLANE,
  checkNewSecret,
  isElsewhere,
  isNamedByPolicy,
  type Owner,
  ownerOf,
  Scope,
  scopeMessage,
  valueProblems,
} from "../domain/secret.ts";
import { principal } from "../rpc/authenticate.ts";
import type { Tx } from "../store/db.ts";
import { getEnvironment } from "../store/environments.ts";
import { readValues } from "../store/secret-delivery.ts";
import {
  changeOf,
  countSecrets,
  deleteSecret,
  getSecret,
  holdPolicies,
  holdSecrets,
  insertSecret,
  listSecrets,
  ownerRights,
  replaceSecret,
  SECRET_NAME_INDEX,
  type StoredSecret,
  sealValue,
} from "../store/secrets.ts";

/** Holds an owner until the transaction ends; refuses a caller without the right to write, and an owner that is going. */
async function holdOwner(tx: Tx, caller: Caller, owner: Owner): Promise<void> {
  const { writes, isGone } = await ownerRights(tx, caller, owner, true);
  if (!writes) throw denied("you may not change the secrets of this owner");
  if (isGone && owner.scope === Scope.PROJECT) refuseDeleting({ id: owner.id, isDeleting: true });
  if (isGone) throw precondition("the owner of these secrets is deleted");
}

function newSecret(app: App, caller: Caller, request: CreateSecretRequest): Omit<StoredSecret, "writes"> {
  const owner = checkNewSecret(request);
  const at = timestampFromDate(app.now());
  const message = create(SecretSchema, {
    id: app.newId(),
    name: request.name,
    projectId: owner.scope === Scope.PROJECT ? owner.id : "",
    createdAt: at,
    updatedAt: at,
    creator: { id: caller.id, principal: caller.principal },
    mount: request.mount,
    scope: scopeMessage(owner),
    credentialProxy: request.credentialProxy,
    source: request.source,
  });
  return { message, organizationId: caller.organizationId, owner, session: app.newId() };
}

const audited = (app: App, caller: Caller, action: string) => ({ id: app.newId(), actor: actorOf(caller), action });

async function createSecret(app: App, caller: Caller, request: CreateSecretRequest): Promise<Secret> {
  const secret = newSecret(app, caller, request);
  const { message, owner, organizationId } = secret;
  const value = isElsewhere(request.source)
    ? undefined
    : sealValue({ id: message.id, organizationId }, request.value, app.masterKey, app.random);
  const most = app.limits.secrets;
  await transactSecrets(app, async (tx) => {
    await holdOwner(tx, caller, owner);
    await holdSecrets(tx, organizationId);
    if ((await countSecrets(tx, owner)) >= most) {
      throw actionable(
        "resource_exhausted",
        "PLATFORM_LIMIT_QUOTA",
        `there can be at most ${most} secrets in one scope`,
      );
    }
    const audit = audited(app, caller, "Secret created");
    await insertSecret(tx, secret, value, changeOf(secret, ResourceOperation.CREATE, app.now(), audit));
  }).catch((error: unknown) => {
    if (!isDuplicate(error, SECRET_NAME_INDEX)) throw error;
    throw new Refusal("already_exists", `there is a secret ${request.name} in this scope already`, { cause: error });
  });
  return message;
}

/** The secret with its owner, held until the transaction ends; PERMISSION_DENIED for a caller who may only see it. */
async function holdSecret(tx: Tx, caller: Caller, id: string): Promise<StoredSecret> {
  const found = await getSecret(tx, caller, id);
  if (!found.writes) throw denied("you may see this secret, but not change it");
  await holdOwner(tx, caller, found.owner);
  await holdSecrets(tx, found.organizationId);
  return await getSecret(tx, caller, id, true);
}

async function updateSecretValue(app: App, caller: Caller, request: UpdateSecretValueRequest): Promise<void> {
  await transactSecrets(app, async (tx) => {
    const stored = await holdSecret(tx, caller, request.secretId);
    if (isElsewhere(stored.message.source)) throw precondition("the value of this secret is not kept here");
    refuseProblems(valueProblems(stored.message.mount, request.value));
    const message = clone(SecretSchema, stored.message);
    message.updatedAt = timestampFromDate(app.now());
    const next = { ...stored, message, session: app.newId() };
    const audit = audited(app, caller, "Secret value changed");
    const change = changeOf(next, ResourceOperation.UPDATE, app.now(), audit);
    const { organizationId } = stored;
    const value = sealValue({ id: message.id, organizationId }, request.value, app.masterKey, app.random);
    await replaceSecret(tx, next, value, change);
  });
}

async function removeSecret(app: App, caller: Caller, id: string): Promise<void> {
  await transactSecrets(app, async (tx) => {
    const policies = await holdPolicies(tx, caller.organizationId);
    const stored = await holdSecret(tx, caller, id);
    if (stored.owner.scope === Scope.ORGANIZATION && isNamedByPolicy(policies, stored.message)) {
      const message = "a policy of the organization names this secret: change the policy first";
      throw actionable("failed_precondition", "SECRET_STATE_IN_USE", message, { secret_id: stored.message.id });
    }
    const audit = audited(app, caller, "Secret deleted");
    await deleteSecret(tx, stored, changeOf(stored, ResourceOperation.DELETE, app.now(), audit));
  });
}

async function list(app: App, caller: Caller, { filter, pagination }: ListSecretsRequest) {
  const owner = ownerOf(filter?.scope);
  const page = openPage(pagination, ["secrets", caller.id, owner]);
  if (owner && !(await ownerRights(app.db.list, caller, owner)).reads) throw denied("you may not list these secrets");
  const rows = await listSecrets(app.db.list, caller, owner, page);
  const { items, nextToken } = closePage(page, rows, (secret) => secret.id);
  return { secrets: items, pagination: { nextToken } };
}

/** A value for the environment that calls, if it has the secret. */
async function secretValue(app: App, caller: Caller, id: string): Promise<string> {
  const { spec } = await getEnvironment(app.db.point, caller, caller.id);
  const entry = spec.secrets.find(({ source, sourceRef }) => source === CONTROL_PLANE && sourceRef === id);
  if (!entry) throw notFound("secret", id);
  if (entry.credentialProxy) throw denied("only a proxy may use the value of this secret");
  if (spec.desiredPhase !== EnvironmentPhase.RUNNING) throw precondition("the environment is not to run any more");
  const { masterKey, newId } = app;
  const by = { masterKey, newId, at: app.now() };
  const [secret] = await readValues(app.db.write, actorOf(caller), caller.organizationId, [id], by);
  if (!secret) throw notFound("secret", id);
  if (secret.value === undefined) throw precondition("the value of this secret is not kept here");
  return secret.value;
}

/** SecretService. */
export function secretService(app: App): ServiceImpl<typeof SecretService> {
  return {
    async createSecret(request, context) {
      return { secret: await createSecret(app, principal(context), request) };
    },
    async updateSecretValue(request, context) {
      await updateSecretValue(app, principal(context), request);
      return {};
    },
    listSecrets: (request, context) => list(app, principal(context), request),
    async deleteSecret(request, context) {
      await removeSecret(app, principal(context), request.secretId);
      return {};
    },
    async getSecretValue(request, context) {
      const caller = principal(context);
      context.responseHeader.set("cache-control", "no-store");
      if (caller.principal === Principal.ENVIRONMENT)
        return { value: await secretValue(app, caller, request.secretId.toLowerCase()) };
      await getSecret(app.db.point, caller, request.secretId);
      throw denied("values of secrets are given to environments only");
    },
  };
}
