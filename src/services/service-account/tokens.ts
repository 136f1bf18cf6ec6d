import type { MessageInitShape } from "@bufbuild/protobuf";
import { durationMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import type {
  CreateServiceAccountTokenRequest,
  ListServiceAccountTokensRequest,
  ServiceAccountService,
  ServiceAccountTokenSchema,
} from "../../../gen/gitpod/v1/service_account_pb.js";
import { type App, actorOf, newTokenText, transact } from "../../app.ts";
import { actionable, denied, notFound, precondition, Refusal, refuseProblems } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { descriptionProblems, SERVICE_ACCOUNT_ACCESS_MS, SERVICE_ACCOUNT_MS, TokenKind } from "../../domain/tokens.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  countUnexpired,
  deleteIssuedToken,
  getIssuedToken,
  type IssuedToken,
  listIssuedTokens,
  type TokenScope,
} from "../../store/issued-tokens.ts";
import { type Change, record, recordAccess } from "../../store/record.ts";
import { getServiceAccount, type StoredServiceAccount } from "../../store/service-accounts.ts";
import { insertToken } from "../../store/tokens.ts";

const kind = TokenKind.SERVICE_ACCOUNT;
const subjectPrincipal = Principal.SERVICE_ACCOUNT;

/** Tokens of the calling service account. */
const ownTokens = ({ organizationId, id }: Caller): TokenScope => ({ kind, organizationId, subjectIds: [id] });

/** Tokens that the caller may see: its own, as an admin those of every service account. */
const visibleTo = (caller: Caller): TokenScope =>
  caller.orgAdmin ? { kind, organizationId: caller.organizationId } : ownTokens(caller);

/** The person behind a token; one that nobody had issued stands for itself. */
const creatorOf = ({ issuerId, subjectId }: IssuedToken) =>
  issuerId ? { id: issuerId, principal: Principal.USER } : { id: subjectId, principal: subjectPrincipal };

const message = (token: IssuedToken): MessageInitShape<typeof ServiceAccountTokenSchema> => ({
  id: token.id,
  serviceAccountId: token.subjectId,
  description: token.description,
  creator: creatorOf(token),
  createdAt: timestampFromDate(token.createdAt),
  expiresAt: token.expiresAt && timestampFromDate(token.expiresAt),
  lastUsed: token.lastUsedAt && timestampFromDate(token.lastUsedAt),
});

function changeOf(app: App, caller: Caller, token: IssuedToken, operation: ResourceOperation, action: string): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.SERVICE_ACCOUNT_TOKEN,
    resourceId: token.id,
    operation,
    creatorId: token.subjectId,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}

/** When a token ends that is to last so long: with its service account at the latest. */
const endOf = ({ validUntil }: StoredServiceAccount, at: Date, lifetimeMs: number): Date =>
  new Date(Math.min(at.getTime() + lifetimeMs, validUntil?.getTime() ?? Number.POSITIVE_INFINITY));

const isOver = ({ suspended, validUntil }: StoredServiceAccount, at: Date) =>
  suspended || (validUntil !== undefined && validUntil <= at);

/** A short-lived token for a person who wants to act as a service account, or manage its tokens. */
async function createAccessToken(app: App, caller: Caller, id: string): Promise<string> {
  const text = newTokenText(app, TokenKind.SERVICE_ACCOUNT_ACCESS);
  await transact(app, async (tx) => {
    const account = await getServiceAccount(tx, caller, id, true);
    if (!account.administers) throw denied("acting as a service account needs the role admin on it");
    const at = app.now();
    if (isOver(account, at)) throw precondition("the service account is deleted or has expired");
    const { organizationId } = account;
    await insertToken(tx, {
      ...{ id: app.newId(), text, kind: TokenKind.SERVICE_ACCOUNT_ACCESS, organizationId, createdAt: at },
      ...{ subjectId: account.id, subjectPrincipal, issuerId: caller.id },
      expiresAt: endOf(account, at, SERVICE_ACCOUNT_ACCESS_MS),
    });
    await recordAccess(tx, {
      ...{ id: app.newId(), organizationId, actor: actorOf(caller), at },
      ...{ subjectId: account.id, subjectType: ResourceType.SERVICE_ACCOUNT },
      action: "Service account access token issued",
    });
  });
  return text;
}

async function createToken(app: App, caller: Caller, request: CreateServiceAccountTokenRequest) {
  refuseProblems(descriptionProblems(request.description));
  const text = newTokenText(app, kind);
  const lifetimeMs = (request.validFor && durationMs(request.validFor)) || SERVICE_ACCOUNT_MS;
  const token = await transact(app, async (tx): Promise<IssuedToken> => {
    const account = await getServiceAccount(tx, caller, caller.id, true);
    const at = app.now();
    if (isOver(account, at)) throw new Refusal("unauthenticated", "the token is no longer valid");
    const most = app.limits.serviceAccountTokens;
    if ((await countUnexpired(tx, { kind, subjectId: account.id }, at)) >= most)
      throw actionable(
        ...(["resource_exhausted", "PLATFORM_LIMIT_QUOTA", `there can be at most ${most} unexpired tokens`] as const),
      );
    const issued = {
      ...{ id: app.newId(), subjectId: account.id, issuerId: caller.issuerId, createdAt: at, readOnly: false },
      ...{ description: request.description, expiresAt: endOf(account, at, lifetimeMs) },
    };
    await insertToken(tx, { ...issued, text, kind, organizationId: account.organizationId, subjectPrincipal });
    await record(tx, changeOf(app, caller, issued, ResourceOperation.CREATE, "Service account token created"));
    return issued;
  });
  return { token: text, serviceAccountToken: message(token) };
}

async function listTokens(app: App, caller: Caller, request: ListServiceAccountTokensRequest) {
  const page = openPage(request.pagination, ["service account tokens", caller.id]);
  const rows = await listIssuedTokens(app.db.list, ownTokens(caller), page, app.now());
  const { items, nextToken } = closePage(page, rows, (token) => token.id);
  return { tokens: items.map(message), pagination: { nextToken } };
}

/** Tokens that act as a service account; their texts are shown once. */
export function serviceAccountTokens(app: App) {
  return {
    async createServiceAccountAccessToken(request, context) {
      return { token: await createAccessToken(app, principal(context), request.serviceAccountId) };
    },
    createServiceAccountToken: (request, context) => createToken(app, principal(context), request),
    listServiceAccountTokens: (request, context) => listTokens(app, principal(context), request),
    async getServiceAccountToken(request, context) {
      const scope = visibleTo(principal(context));
      return { token: message(await getIssuedToken(app.db.point, scope, request.serviceAccountTokenId, app.now())) };
    },
    async deleteServiceAccountToken(request, context) {
      const caller = principal(context);
      await transact(app, async (tx) => {
        const token = await getIssuedToken(tx, visibleTo(caller), request.serviceAccountTokenId, app.now());
        if (!(await deleteIssuedToken(tx, token.id))) throw notFound("token", token.id);
        await record(tx, changeOf(app, caller, token, ResourceOperation.DELETE, "Service account token revoked"));
      });
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof ServiceAccountService>>;
}
