import type { MessageInitShape } from "@bufbuild/protobuf";
import { durationMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import type {
  CreatePersonalAccessTokenRequest,
  ListPersonalAccessTokensRequest,
  PersonalAccessTokenSchema,
  UserService,
} from "../../../gen/gitpod/v1/user_pb.js";
import { type App, actorOf, newTokenText, transact } from "../../app.ts";
import { denied, notFound, refuseProblems } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { descriptionProblems, TokenKind } from "../../domain/tokens.ts";
import { principal } from "../../rpc/authenticate.ts";
import {
  deleteIssuedToken,
  getIssuedToken,
  type IssuedToken,
  listIssuedTokens,
  type TokenScope,
} from "../../store/issued-tokens.ts";
import { issuePersonalAccessToken } from "../../store/personal-access-tokens.ts";
import { type Change, record } from "../../store/record.ts";
import { getUser, holdCaller } from "../../store/users.ts";

const kind = TokenKind.PERSONAL_ACCESS;

/** Tokens that the caller may see: its own, as an admin everybody's. */
const visibleTo = ({ organizationId, orgAdmin, id }: Caller): TokenScope => ({
  ...{ kind, organizationId },
  ...(!orgAdmin && { subjectIds: [id] }),
});

const message = (token: IssuedToken): MessageInitShape<typeof PersonalAccessTokenSchema> => ({
  id: token.id,
  userId: token.subjectId,
  description: token.description,
  creator: { id: token.subjectId, principal: Principal.USER },
  createdAt: timestampFromDate(token.createdAt),
  expiresAt: token.expiresAt && timestampFromDate(token.expiresAt),
  lastUsed: token.lastUsedAt && timestampFromDate(token.lastUsedAt),
  readOnly: token.readOnly,
});

function changeOf(
  app: App,
  caller: Caller,
  token: { id: string; subjectId: string },
  operation: ResourceOperation,
  action: string,
): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.PERSONAL_ACCESS_TOKEN,
    resourceId: token.id,
    operation,
    creatorId: token.subjectId,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}

async function createToken(app: App, caller: Caller, request: CreatePersonalAccessTokenRequest): Promise<string> {
  refuseProblems(descriptionProblems(request.description));
  const user = await getUser(app.db.point, caller, request.userId);
  if (user.id !== caller.id) throw denied("a personal access token can be made for oneself only");
  const text = newTokenText(app, kind);
  const { organizationId, id: userId } = caller;
  const { description, readOnly, validFor } = request;
  await transact(app, async (tx) => {
    await holdCaller(tx, caller);
    const token = { id: app.newId(), text, organizationId, userId, description, readOnly };
    const by = { actor: actorOf(caller), newId: app.newId, at: app.now(), most: app.limits.personalAccessTokens };
    await issuePersonalAccessToken(tx, { ...token, validForMs: (validFor && durationMs(validFor)) || undefined }, by);
  });
  return text;
}

async function listTokens(app: App, caller: Caller, request: ListPersonalAccessTokensRequest) {
  const page = openPage(request.pagination, ["personal access tokens", caller.id, request.filter]);
  const asked = request.filter?.userIds.length ? request.filter.userIds : [caller.id];
  const subjectIds = caller.orgAdmin ? asked : asked.filter((id) => id.toLowerCase() === caller.id);
  const scope = { kind, organizationId: caller.organizationId, subjectIds };
  const rows = await listIssuedTokens(app.db.list, scope, page, app.now());
  const { items, nextToken } = closePage(page, rows, (token) => token.id);
  return { personalAccessTokens: items.map(message), pagination: { nextToken } };
}

/** Tokens that act as a user; their texts are shown once. */
export function personalAccessTokens(app: App) {
  return {
    async createPersonalAccessToken(request, context) {
      return { token: await createToken(app, principal(context), request) };
    },
    async getPersonalAccessToken(request, context) {
      const scope = visibleTo(principal(context));
      return { pat: message(await getIssuedToken(app.db.point, scope, request.personalAccessTokenId, app.now())) };
    },
    listPersonalAccessTokens: (request, context) => listTokens(app, principal(context), request),
    async deletePersonalAccessToken(request, context) {
      const caller = principal(context);
      await transact(app, async (tx) => {
        const token = await getIssuedToken(tx, visibleTo(caller), request.personalAccessTokenId, app.now());
        if (!(await deleteIssuedToken(tx, token.id))) throw notFound("token", token.id);
        await record(tx, changeOf(app, caller, token, ResourceOperation.DELETE, "Personal access token revoked"));
      });
      return {};
    },
  } satisfies Partial<ServiceImpl<typeof UserService>>;
}
