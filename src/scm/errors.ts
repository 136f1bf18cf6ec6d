/**
 * What went wrong between us and a source-control host.
 * - `invalid_url`: malformed, wrong scheme, credentials inside, or no repository in it
 * - `blocked`: an address or scheme that the guard refuses
 * - `auth_required`: the host wants a sign-in, or refused the one it got (`credentialsRejected`)
 * - `not_found`: repository, revision or host name do not exist, or must look that way
 * - `forbidden`: signed in, but not allowed
 * - `rate_limited`, `unavailable` (refused, TLS, 5xx, slow, foreign redirect), `timeout` (the caller's budget is used up)
 * - `unsupported`: a capability is missing here
 */
export type ScmErrorKind =
  | "invalid_url"
  | "blocked"
  | "auth_required"
  | "not_found"
  | "forbidden"
  | "rate_limited"
  | "unavailable"
  | "timeout"
  | "unsupported";

/** The message is fit for users: it holds no secrets and nothing that a remote host wrote. */
export class ScmError extends Error {
  readonly kind: ScmErrorKind;
  /** The host answered 401 although it was given credentials: they are no longer usable. */
  readonly credentialsRejected: boolean;

  constructor(kind: ScmErrorKind, message: string, { credentialsRejected = false } = {}) {
    super(message);
    this.name = "ScmError";
    this.kind = kind;
    this.credentialsRejected = credentialsRejected;
  }
}
