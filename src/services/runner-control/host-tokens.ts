import { create } from "@bufbuild/protobuf";
import { timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type GetHostTokenRequest,
  type GetHostTokenResponse,
  GetHostTokenResponseSchema,
  type PutHostTokenRequest,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { type App, actorOf, transactSecrets } from "../../app.ts";
import { notFound, Refusal } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { normalizeHost } from "../../scm/hosts.ts";
import { findOpenCall } from "../../store/calls.ts";
import { seal, unseal } from "../../store/envelope.ts";
import { getEnvironment } from "../../store/environments.ts";
import {
  hostTokenContext,
  leaseRefresh,
  lockRunnersToken,
  noteTokenRead,
  type StoredHostToken,
  updateHostToken,
  usableHostToken,
} from "../../store/host-tokens.ts";
import { recordAccess } from "../../store/record.ts";
import { effectiveIntegrations } from "../../store/scm-integrations.ts";

/** How long before its end a token is renewed, and how long one caller alone may do so, in milliseconds. */
const RENEW_BEFORE_MS = 5 * 60_000;
const LEASE_MS = 60_000;

/** Whose credential, and who reads it: an environment, or the runner for one of its calls. */
async function readerOf(app: App, caller: Caller, { purpose }: GetHostTokenRequest) {
  if (purpose.case === "environmentId") {
    const { metadata, id } = await getEnvironment(app.db.point, caller, purpose.value);
    return { subjectId: metadata.creator?.id ?? "", readerId: id };
  }
  const callId = purpose.value ?? "";
  const call = await findOpenCall(app.db.point, caller.id, callId, app.now());
  if (!call) throw notFound("call", callId);
  return { subjectId: call.subject?.id ?? "", readerId: caller.id };
}

const opened = (app: App, { id }: StoredHostToken, part: "token" | "refresh", sealed: Uint8Array) =>
  Buffer.from(unseal(app.masterKey, hostTokenContext(id, part), sealed)).toString();

async function refreshOf(app: App, token: StoredHostToken) {
  const now = app.now();
  const { expiresAt, sealedRefreshToken } = token;
  const isDue = expiresAt && expiresAt.getTime() - now.getTime() <= RENEW_BEFORE_MS;
  if (!isDue || !sealedRefreshToken) return undefined;
  const until = new Date(now.getTime() + LEASE_MS);
  if (!(await leaseRefresh(app.db.write, token, now, until))) return undefined;
  return { refreshToken: opened(app, token, "refresh", sealedRefreshToken), leaseUntil: timestampFromDate(until) };
}

/** GetHostToken: a credential for a source control host, for the runner that works there for its subject. */
export async function hostToken(app: App, caller: Caller, request: GetHostTokenRequest): Promise<GetHostTokenResponse> {
  const { subjectId, readerId } = await readerOf(app, caller, request);
  const host = normalizeHost(request.host);
  const which = { runnerId: caller.id, host: host?.host ?? "", subjectId };
  const token = await usableHostToken(app.db.point, which, app.now());
  if (!host || !token) throw notFound("host authentication token for", request.host);
  const integration = (await effectiveIntegrations(app.db.point, caller.id, [host.host])).get(host.host);
  if (await noteTokenRead(app.db.write, readerId, token)) {
    await recordAccess(app.db.write, {
      ...{ id: app.newId(), organizationId: token.organizationId, actor: actorOf(caller), at: app.now() },
      ...{ subjectId: token.id, subjectType: ResourceType.HOST_AUTHENTICATION_TOKEN },
      action: "Host authentication token handed to the runner",
    });
  }
  return create(GetHostTokenResponseSchema, {
    ...{ tokenId: token.id, version: BigInt(token.version), source: token.source },
    token: opened(app, token, "token", token.sealedToken),
    expiresAt: token.expiresAt && timestampFromDate(token.expiresAt),
    refresh: await refreshOf(app, token),
    scmId: integration?.scmId ?? host.scmId,
  });
}

function renewed(app: App, token: StoredHostToken, { outcome }: PutHostTokenRequest): StoredHostToken {
  if (outcome.case !== "renewal") return { ...token, invalidReason: outcome.value };
  const { token: secret, refreshToken, expiresAt, scopes } = outcome.value;
  const sealed = (part: "token" | "refresh", text: string) =>
    seal(app.masterKey, hostTokenContext(token.id, part), Buffer.from(text), app.random);
  return {
    ...token,
    sealedToken: sealed("token", secret),
    sealedRefreshToken: refreshToken ? sealed("refresh", refreshToken) : token.sealedRefreshToken,
    expiresAt: expiresAt && timestampDate(expiresAt),
    scopes: scopes.length ? scopes : token.scopes,
    invalidReason: undefined,
  };
}

/** PutHostToken: what became of a credential that was handed out. */
export async function putHostToken(app: App, caller: Caller, request: PutHostTokenRequest): Promise<void> {
  const isRenewal = request.outcome.case === "renewal";
  const action = isRenewal ? "Host authentication token renewed" : "Host authentication token refused by its host";
  await transactSecrets(app, async (tx) => {
    const token = await lockRunnersToken(tx, caller.id, request.tokenId);
    if (!token) throw notFound("host authentication token", request.tokenId);
    if (token.version !== Number(request.expectedVersion))
      throw new Refusal("aborted", "the token has changed since it was handed out");
    const by = { actor: actorOf(caller), newId: app.newId, at: app.now(), action };
    await updateHostToken(tx, renewed(app, token, request), by);
  });
}
