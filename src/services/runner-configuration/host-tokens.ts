import { timestampDate } from "@bufbuild/protobuf/wkt";
import { Principal, type Subject } from "../../../gen/gitpod/v1/identity_pb.js";
import {
  type CreateHostAuthenticationTokenRequest,
  type HostAuthenticationToken,
  type ListHostAuthenticationTokensRequest,
  RunnerKind,
  type SCMIntegration,
  HostAuthenticationTokenSource as Source,
  type UpdateHostAuthenticationTokenRequest,
} from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, transactSecrets } from "../../app.ts";
import { denied, type FieldProblem, invalid, notFound, precondition, refuseProblems } from "../../domain/errors.ts";
import { isUuid } from "../../domain/ids.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { normalizeHost } from "../../scm/hosts.ts";
import type { Tx } from "../../store/db.ts";
import { seal } from "../../store/envelope.ts";
import {
  type Described,
  deleteHostToken,
  getHostToken,
  hostTokenContext,
  hostTokenMessage,
  insertHostToken,
  listHostTokens,
  type StoredHostToken,
  subjectUsesRunner,
  updateHostToken,
} from "../../store/host-tokens.ts";
import { getRunner, type StoredRunner } from "../../store/runners.ts";
import { effectiveIntegrations } from "../../store/scm-integrations.ts";

const MAX_SCOPES = 100;
const SCOPE_LENGTH = 256;
const SECRET_LENGTH = 16_384;

const sealed = (app: App, id: string, part: "token" | "refresh", secret: string) =>
  seal(app.masterKey, hostTokenContext(id, part), Buffer.from(secret), app.random);

const attribution = (app: App, caller: Caller, action: string): Described => ({
  ...{ actor: actorOf(caller), newId: app.newId, at: app.now(), action },
});

/** Whose token it is to be: a person or service account that is named in one way or the other, else the caller. */
function subjectOf(caller: Caller, named: Subject | undefined, userId: string): { id: string; principal: Principal } {
  const subject = named?.id ? { id: named.id.toLowerCase(), principal: named.principal } : undefined;
  if (subject && userId && subject.id !== userId.toLowerCase())
    throw invalid({ field: "user_id", message: "differs from the subject" });
  const found = subject ?? (userId ? { id: userId.toLowerCase(), principal: Principal.USER } : undefined);
  if (!found) return { id: caller.id, principal: caller.principal };
  const isPerson = found.principal === Principal.USER || found.principal === Principal.SERVICE_ACCOUNT;
  if (!isPerson || !isUuid(found.id))
    throw invalid({ field: "subject", message: "must be a user or a service account" });
  return found;
}

interface Secrets {
  token?: string;
  refreshToken?: string;
  scopes: readonly string[];
  expiresAt?: Date;
}

function secretProblems({ token, refreshToken, scopes, expiresAt }: Secrets, now: Date): FieldProblem[] {
  const problems: FieldProblem[] = [];
  const check = (holds: boolean, field: string, message: string) => {
    if (!holds) problems.push({ field, message });
  };
  check((token?.length ?? 0) <= SECRET_LENGTH, "token", `must have at most ${SECRET_LENGTH} characters`);
  check((refreshToken?.length ?? 0) <= SECRET_LENGTH, "refresh_token", `must have at most ${SECRET_LENGTH} characters`);
  // A line break would become another line of what git reads.
  check(!/[\r\n\0]/.test(token ?? ""), "token", "must be a single line");
  check(scopes.length <= MAX_SCOPES, "scopes", `must have at most ${MAX_SCOPES} entries`);
  check(
    scopes.every((scope) => scope.length <= SCOPE_LENGTH),
    "scopes",
    `must have at most ${SCOPE_LENGTH} characters each`,
  );
  check(!expiresAt || expiresAt > now, "expires_at", "must not be in the past");
  return problems;
}

/** The integration that a token belongs to, if there is one: the one that is named, or the only one there is. */
function integrationFor(effective: SCMIntegration | undefined, named: string, source: Source): string | undefined {
  if (named && effective?.id !== named.toLowerCase()) throw notFound("source control integration", named);
  if (!effective) return undefined;
  const isOffered = source === Source.OAUTH ? effective.oauth !== undefined : effective.pat;
  if (!isOffered) throw precondition("the integration for this host does not offer this way to sign in");
  return effective.id;
}

async function checkRunner(tx: Tx, caller: Caller, runner: StoredRunner, subjectId: string): Promise<void> {
  if (runner.kind === RunnerKind.LOCAL_CONFIGURATION)
    throw precondition("the local configuration runner has no environments");
  const uses =
    subjectId === caller.id ? runner.uses : await subjectUsesRunner(tx, caller.organizationId, subjectId, runner.id);
  if (!uses) throw notFound("runner", runner.id);
  if (runner.phase === RunnerPhase.DELETING) throw precondition("the runner is being deleted");
}

/** Tokens are their subject's own; organization admins manage those of service accounts, whose tokens they can make anyway. */
const manages = (caller: Caller, subject: { id: string; principal: Principal }) =>
  subject.id === caller.id || (caller.orgAdmin && subject.principal === Principal.SERVICE_ACCOUNT);

/** CreateHostAuthenticationToken. */
export async function createHostToken(
  app: App,
  caller: Caller,
  request: CreateHostAuthenticationTokenRequest,
): Promise<HostAuthenticationToken> {
  const { source, scopes, token: secret, refreshToken } = request;
  const host = normalizeHost(request.host)?.host;
  if (!host) throw invalid({ field: "host", message: "is not a host name" });
  if (source === Source.UNSPECIFIED) throw invalid({ field: "source", message: "is required" });
  const subject = subjectOf(caller, request.subject, request.userId);
  const expiresAt = request.expiresAt && timestampDate(request.expiresAt);
  refuseProblems(secretProblems({ token: secret, refreshToken, scopes, expiresAt }, app.now()));
  return transactSecrets(app, async (tx) => {
    const runner = await getRunner(tx, caller, request.runnerId);
    if (!manages(caller, subject)) throw denied("a token for a host is made by whom it belongs to");
    await checkRunner(tx, caller, runner, subject.id);
    const effective = (await effectiveIntegrations(tx, runner.id, [host])).get(host);
    const id = app.newId();
    const token: StoredHostToken = {
      ...{ id, host, subject, source, scopes, expiresAt, version: 1 },
      organizationId: caller.organizationId,
      runnerId: runner.id,
      integrationId: integrationFor(effective, request.integrationId, source),
      sealedToken: sealed(app, id, "token", secret),
      sealedRefreshToken: refreshToken ? sealed(app, id, "refresh", refreshToken) : undefined,
    };
    await insertHostToken(tx, token, attribution(app, caller, "Host authentication token created"));
    return hostTokenMessage(token);
  });
}

/** GetHostAuthenticationToken. */
export async function readHostToken(app: App, caller: Caller, id: string): Promise<HostAuthenticationToken> {
  return hostTokenMessage(await getHostToken(app.db.point, caller, id));
}

/** ListHostAuthenticationTokens. */
export async function pageOfHostTokens(app: App, caller: Caller, request: ListHostAuthenticationTokensRequest) {
  const { runnerId, userId, subjectId } = request.filter ?? {};
  if (userId && subjectId && userId.toLowerCase() !== subjectId.toLowerCase())
    throw invalid({ field: "filter.user_id", message: "differs from the subject" });
  const page = openPage(request.pagination, ["host tokens", caller.id, request.filter]);
  const rows = await listHostTokens(app.db.list, caller, { runnerId, subjectId: subjectId ?? userId }, page);
  const { items, nextToken } = closePage(page, rows, (token) => token.id);
  return { tokens: items.map(hostTokenMessage), pagination: { nextToken } };
}

/** UpdateHostAuthenticationToken: of a new secret neither the end nor a fault is known. */
export async function changeHostToken(
  app: App,
  caller: Caller,
  request: UpdateHostAuthenticationTokenRequest,
): Promise<void> {
  const { id, token: secret, refreshToken, scopes } = request;
  const expiresAt = request.expiresAt && timestampDate(request.expiresAt);
  refuseProblems(secretProblems({ token: secret, refreshToken, scopes, expiresAt }, app.now()));
  await transactSecrets(app, async (tx) => {
    const stored = await getHostToken(tx, caller, id, true);
    if (!manages(caller, stored.subject)) throw denied("a token for a host is changed by whom it belongs to");
    if (secret === undefined && refreshToken === undefined && !expiresAt && !scopes.length) return;
    const next: StoredHostToken = {
      ...stored,
      scopes: scopes.length ? scopes : stored.scopes,
      expiresAt: expiresAt ?? (secret === undefined ? stored.expiresAt : undefined),
      invalidReason: secret === undefined ? stored.invalidReason : undefined,
      sealedToken: secret === undefined ? stored.sealedToken : sealed(app, id, "token", secret),
    };
    if (refreshToken !== undefined)
      next.sealedRefreshToken = refreshToken ? sealed(app, id, "refresh", refreshToken) : undefined;
    await updateHostToken(tx, next, attribution(app, caller, "Host authentication token changed"));
  });
}

/** DeleteHostAuthenticationToken: by its subject, and by organization admins as revocation. */
export async function removeHostToken(app: App, caller: Caller, id: string): Promise<void> {
  await transactSecrets(app, async (tx) => {
    const stored = await getHostToken(tx, caller, id, true);
    await deleteHostToken(tx, stored, attribution(app, caller, "Host authentication token deleted"));
  });
}
