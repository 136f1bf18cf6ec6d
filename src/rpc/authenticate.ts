import type { DescMethod, Message } from "@bufbuild/protobuf";
import { Code, ConnectError, type ContextValues, createContextKey } from "@connectrpc/connect";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { cookieValue, isSameOrigin } from "../domain/browser.ts";
import { actionable, databaseRefusal, denied } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import type { Beside, Credential } from "../store/credentials.ts";
import { callKey, type Entering } from "./call.ts";
import { type Rule, ruleOf } from "./policy.ts";

const callerKey = createContextKey<Caller | undefined>(undefined, { description: "caller" });

/** The caller of this request; only public RPCs have none. */
export function principal(context: { values: ContextValues }): Caller {
  const caller = context.values.get(callerKey);
  if (!caller) throw new ConnectError("this call needs a credential", Code.Unauthenticated);
  return caller;
}

const besideKey = createContextKey<object | undefined>(undefined, { description: "beside" });

/** The row that was read along with the credential of this call, as its RPC has asked for; undefined if none was. */
export const readBeside = (context: { values: ContextValues }): object | undefined => context.values.get(besideKey);

/** As `principal`, for code that also runs for public RPCs. */
export const callerOf = (values: ContextValues): Caller | undefined => values.get(callerKey);

function bearer(header: string | null): string {
  const match = /^\s*bearer\s+(\S+)\s*$/i.exec(header ?? "");
  return match?.[1] ?? "";
}

const unauthenticated = (message: string) => new ConnectError(message, Code.Unauthenticated);

function refuseKind(rule: Rule, caller: Caller): void {
  if (!rule.principals.includes(caller.principal)) {
    const kind = Principal[caller.principal].toLowerCase().replaceAll("_", " ");
    throw new ConnectError(`a ${kind} may not call this`, Code.PermissionDenied);
  }
  if (rule.kinds && !rule.kinds.includes(caller.tokenKind)) {
    throw new ConnectError("this kind of token may not call this", Code.PermissionDenied);
  }
  if (caller.readOnly && !rule.read) {
    throw actionable("permission_denied", "AUTH_TOKEN_READ_ONLY", "this token may only read");
  }
}

/** Where credentials are looked up. */
export interface Credentials {
  /** A bearer token; `wanted` tells what to read along with it. */
  find(text: string, wanted: () => Promise<Beside | undefined>): Promise<Credential>;
  /** The cookie of a browser. */
  findSession(text: string): Promise<Credential>;
  touch(tokenId: string): void;
  /** Name of that cookie. */
  cookie: string;
  /** What RPCs want to be read along with credentials, by their request; undefined for requests that are not valid. */
  besides: ReadonlyMap<DescMethod, (request: Message) => Beside | undefined>;
}

async function besideFor({ besides }: Credentials, { method, peek }: Entering): Promise<Beside | undefined> {
  const beside = besides.get(method);
  const message = beside && (await peek?.());
  return message && beside(message);
}

/**
 * Looks at what a call brings. A header takes precedence over a cookie and is never combined with one. Pages of other
 * servers can make a browser send its cookie, but not read the answer: they must not write.
 */
async function lookUp(deps: Credentials, request: Entering, rule: Rule): Promise<Credential> {
  const { header, contextValues } = request;
  const authorization = header.get("authorization");
  const session = authorization === null ? cookieValue(header.get("cookie"), deps.cookie) : undefined;
  if (session === undefined) {
    const text = bearer(authorization);
    if (!text) throw unauthenticated("a bearer token is missing");
    return deps.find(text, () => besideFor(deps, request));
  }
  const credential = await deps.findSession(session);
  const [origin, fetchSite] = [header.get("origin"), header.get("sec-fetch-site")];
  const host = contextValues.get(callKey)?.host;
  if (credential.state === "ok" && !rule.read && !isSameOrigin({ origin, fetchSite, host })) {
    throw denied("a browser may only write from pages of this server");
  }
  return credential;
}

/**
 * Establishes who calls and whether this kind of caller may use the RPC at all, before its message is read.
 * Finer rights need the resource and are decided in the handlers.
 */
export function authentication(deps: Credentials): (request: Entering) => Promise<void> {
  return async (request) => {
    const rule = ruleOf(request.service, request.method);
    if (rule.public) return;
    const credential = await lookUp(deps, request, rule).catch((error: unknown) => {
      throw databaseRefusal(error) ?? error;
    });
    if (credential.state === "expired") {
      throw actionable("unauthenticated", "AUTH_TOKEN_EXPIRED", "the token has expired");
    }
    if (credential.state !== "ok") throw unauthenticated("the token is not valid");
    if (credential.stale) deps.touch(credential.caller.tokenId);
    refuseKind(rule, credential.caller);
    request.contextValues.set(callerKey, credential.caller).set(besideKey, credential.beside);
  };
}
