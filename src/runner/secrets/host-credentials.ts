import { setTimeout as delay } from "node:timers/promises";
import { timestampFromMs, timestampMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import type {
  GetHostTokenRequest,
  GetHostTokenResponse,
  PutHostTokenRequest,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import type { SCMIntegration } from "../../../gen/gitpod/v1/runner_configuration_pb.js";
import { ScmError } from "../../scm/errors.ts";
import type { Guard } from "../../scm/guard.ts";
import { type GitCredentials, gitCredentials, isScmId } from "../../scm/hosts.ts";
import { renewToken } from "../../scm/oauth.ts";
import { type ControlPlane, codeOf } from "../control-plane.ts";

/** How long a token that has ended is waited for while somebody else renews it. */
const WAIT_MS = 10_000;
const STEP_MS = 500;

/** Whose credential is wanted: that of an environment's creator, or of whoever a call is for. */
export type Purpose = GetHostTokenRequest["purpose"];

/** A credential for git at a host. */
export interface HostCredentials extends GitCredentials {
  /** When it ends, milliseconds since the epoch; absent when that is not known. */
  expiresAt?: number;
}

/** What renewing tokens takes. */
export interface Renewing {
  guard: Guard;
  integrations(): Promise<SCMIntegration[]>;
  /** Opens what was sealed for this runner; rejects if it was sealed for another key. */
  open(sealed: Uint8Array): Promise<Uint8Array>;
}

type Token = Pick<GetHostTokenResponse, "token" | "scmId" | "version" | "expiresAt">;

const isOver = ({ expiresAt }: Token) => expiresAt !== undefined && timestampMs(expiresAt) <= Date.now();

async function getToken({ control }: ControlPlane, purpose: Purpose, host: string, signal: AbortSignal) {
  try {
    return await control.getHostToken({ purpose, host }, { signal });
  } catch (error) {
    if (ConnectError.from(error).code === Code.NotFound) return undefined;
    throw error;
  }
}

/**
 * A renewed token, put back for everybody; undefined if its host takes it no more. As it was where it cannot be renewed
 * now: no integration of its own tells the runner how, the host does not answer, or the token is another one meanwhile.
 */
async function renew(
  controlPlane: ControlPlane,
  { guard, integrations, open }: Renewing,
  host: string,
  token: GetHostTokenResponse,
  signal: AbortSignal,
): Promise<Token | undefined> {
  const integration = (await integrations()).find((each) => each.host === host);
  const { clientId = "", issuerUrl = "", encryptedClientSecret } = integration?.oauth ?? {};
  const sealed = encryptedClientSecret?.length ? encryptedClientSecret : undefined;
  const secret = sealed && (await open(sealed).catch(() => undefined));
  if (!integration || !secret) return token;
  const put = (outcome: PutHostTokenRequest["outcome"]) =>
    controlPlane.control.putHostToken({ tokenId: token.tokenId, expectedVersion: token.version, outcome }, { signal });
  try {
    const clientSecret = Buffer.from(secret).toString();
    const client = { scmId: integration.scmId, host, clientId, clientSecret, issuerUrl };
    const answer = await renewToken(guard, client, token.refresh?.refreshToken ?? "", signal);
    if (answer === "refused") {
      await put({ case: "invalidReason", value: "the host does not renew it any more" });
      return isOver(token) ? undefined : token;
    }
    const { expiresInMs, refreshToken = "", scopes } = answer;
    const expiresAt = expiresInMs === undefined ? undefined : timestampFromMs(Date.now() + expiresInMs);
    const value = { $typeName: "berth.runner.v1.PutHostTokenRequest.Renewal" as const, refreshToken, scopes };
    await put({ case: "renewal", value: { ...value, token: answer.token, expiresAt } });
    return { ...token, token: answer.token, expiresAt };
  } catch (error) {
    if (error instanceof ScmError || codeOf(error) === Code.Aborted) return token;
    throw error;
  }
}

/**
 * A credential for a host; undefined if there is none, or none any more. One that is about to end is renewed, by one of
 * all who ask at the same time; the others have the old one, or wait a moment where it has ended.
 */
export async function hostCredentials(
  controlPlane: ControlPlane,
  renewing: Renewing,
  purpose: Purpose,
  host: string,
  signal: AbortSignal,
): Promise<HostCredentials | undefined> {
  // Whoever is given what renewing takes has to do it: nobody else is for a minute.
  const current = async (): Promise<Token | undefined> => {
    const token = await getToken(controlPlane, purpose, host, signal);
    return token?.refresh ? renew(controlPlane, renewing, host, token, signal) : token;
  };
  let found = await current();
  for (const end = Date.now() + WAIT_MS; found && isOver(found) && Date.now() < end; ) {
    await delay(STEP_MS, undefined, { signal });
    found = await current();
  }
  if (!found) return undefined;
  const { token, scmId, expiresAt } = found;
  return { ...gitCredentials(isScmId(scmId) ? scmId : "git", token), expiresAt: expiresAt && timestampMs(expiresAt) };
}
