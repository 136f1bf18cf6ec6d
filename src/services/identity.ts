import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { type IdentityService, Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, newTokenText, runnerChange, transact } from "../app.ts";
import { type FieldProblem, invalid, Refusal, refuseProblems } from "../domain/errors.ts";
import { idTokenClaims } from "../domain/id-tokens.ts";
import type { Caller } from "../domain/principal.ts";
import { ACCESS_TOKEN_MS, acceptStatus } from "../domain/runner.ts";
import { TokenKind } from "../domain/tokens.ts";
import { principal } from "../rpc/authenticate.ts";
import { createSigner, type Signer } from "../signing.ts";
import type { Tx } from "../store/db.ts";
import { readIdTokenSubject } from "../store/id-tokens.ts";
import { record, recordAccess } from "../store/record.ts";
import { getOwnRunner, type StoredRunner, setRunnerStatus } from "../store/runners.ts";
import { insertToken, redeemExchangeToken } from "../store/tokens.ts";

// Every feature is on in a self-hosted installation.
const TIER = "enterprise";
const MAX_AUDIENCES = 16;
const MAX_AUDIENCE_LENGTH = 512;

/** CREATED means never signed up; the first exchange is the sign-up. */
async function signUp(app: App, tx: Tx, runner: StoredRunner, at: Date): Promise<void> {
  if (runner.phase !== RunnerPhase.CREATED) return;
  const status = acceptStatus(runner.status, RunnerPhase.INACTIVE, timestampFromDate(at));
  await setRunnerStatus(tx, { runnerId: runner.id, status, leaseMs: "keep", contact: false });
  await record(
    tx,
    runnerChange(
      app,
      runner,
      ResourceOperation.UPDATE_STATUS,
      { id: runner.id, principal: Principal.RUNNER, tokenId: null },
      "Runner signed up",
    ),
  );
}

async function exchange(app: App, exchangeToken: string): Promise<string> {
  const text = newTokenText(app, TokenKind.RUNNER_ACCESS);
  const at = app.now();
  await transact(app, async (tx, touched) => {
    const runnerId = await redeemExchangeToken(tx, exchangeToken, at);
    if (!runnerId) throw new Refusal("unauthenticated", "the exchange token is not valid");
    const runner = await getOwnRunner(tx, runnerId, true);
    const id = app.newId();
    await insertToken(tx, {
      id,
      text,
      kind: TokenKind.RUNNER_ACCESS,
      organizationId: runner.organizationId,
      subjectId: runner.id,
      subjectPrincipal: Principal.RUNNER,
      createdAt: at,
      expiresAt: new Date(at.getTime() + ACCESS_TOKEN_MS),
    });
    await signUp(app, tx, runner, at);
    await recordAccess(tx, {
      id: app.newId(),
      organizationId: runner.organizationId,
      actor: { id: runner.id, principal: Principal.RUNNER, tokenId: id },
      subjectId: runner.id,
      subjectType: ResourceType.RUNNER,
      action: "Runner access token issued",
      at,
    });
    touched(runner.id);
  });
  return text;
}

const SUBJECT_TYPES: Partial<Record<Principal, ResourceType>> = {
  [Principal.USER]: ResourceType.USER,
  [Principal.SERVICE_ACCOUNT]: ResourceType.SERVICE_ACCOUNT,
  [Principal.ENVIRONMENT]: ResourceType.ENVIRONMENT,
  [Principal.RUNNER]: ResourceType.RUNNER,
};

function audienceProblems(audience: readonly string[]): FieldProblem[] {
  if (audience.length > MAX_AUDIENCES) return [{ field: "audience", message: `must be at most ${MAX_AUDIENCES}` }];
  return audience.flatMap((each, index) =>
    each.length >= 1 && each.length <= MAX_AUDIENCE_LENGTH
      ? []
      : [{ field: `audience[${index}]`, message: `must have 1 to ${MAX_AUDIENCE_LENGTH} characters` }],
  );
}

/** A signed statement of who the caller is; that it was made goes to the audit log first. */
async function issueIdToken(app: App, signer: Signer, caller: Caller, audience: string[]): Promise<string> {
  refuseProblems(audienceProblems(audience));
  const { config, subject } = await readIdTokenSubject(app.db.point, caller);
  await recordAccess(app.db.write, {
    id: app.newId(),
    organizationId: caller.organizationId,
    actor: actorOf(caller),
    subjectId: caller.id,
    subjectType: SUBJECT_TYPES[caller.principal] ?? ResourceType.UNSPECIFIED,
    action: "ID token issued",
    at: app.now(),
  });
  return signer.sign({ ...idTokenClaims(config, subject), aud: audience });
}

/** IdentityService. */
export function identityService(app: App): ServiceImpl<typeof IdentityService> {
  const signer = createSigner(app);
  return {
    async getIDToken({ audience }, context) {
      return { token: await issueIdToken(app, signer, principal(context), audience) };
    },
    async exchangeToken(request) {
      if (!request.exchangeToken) throw invalid({ field: "exchange_token", message: "is required" });
      return { accessToken: await exchange(app, request.exchangeToken) };
    },
    async getAuthenticatedIdentity(_request, context) {
      const caller = principal(context);
      return {
        subject: { id: caller.id, principal: caller.principal },
        organizationId: caller.organizationId,
        organizationTier: TIER,
      };
    },
  };
}
