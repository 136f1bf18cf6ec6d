import { createHash } from "node:crypto";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import type { IntrospectTokenResponse_Kind as Kind } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { TokenKind, tokenKind } from "../domain/tokens.ts";
import type { ControlPlane } from "./control-plane.ts";
import { gate } from "./supervisor/gate.ts";

const KEPT_MS = 30_000;
const REFUSAL_KEPT_MS = 5_000;
const MAX_KEPT = 5_000;
const PARALLEL = 32;
const WAITING = 256;

// The only kinds that a runner may see. Any other token belongs to somebody who was misled, and goes nowhere.
const INTROSPECTED: ReadonlySet<TokenKind> = new Set([
  TokenKind.ENVIRONMENT,
  TokenKind.ENVIRONMENT_ACCESS,
  TokenKind.PORT_ACCESS,
  TokenKind.LOGS,
]);

/** What a presented token opens. */
export interface Grant {
  kind: Kind;
  environmentId: string;
  /** The only port that it opens; 0 if it is not for one port. */
  port: number;
  /** Nonce that the port had then. */
  authNonce: bigint;
  /** Who asked for the token. */
  subjectId: string;
  /** Milliseconds since the epoch; undefined if it lives as long as what it was made for. */
  expiresAt: number | undefined;
}

/** `none`: no usable token; `other`: one for something else; `unknown`: the control plane could not be asked. */
export type Verdict = { grant: Grant } | "none" | "other" | "unknown";

/** The token of an `Authorization: Bearer` header; undefined without one. */
export const bearerToken = (header: string | null | undefined): string | undefined =>
  /^Bearer +(\S+) *$/i.exec(header ?? "")?.[1];

/** Has presented tokens checked by the control plane and keeps its answers for a short time. */
export class Access {
  readonly #controlPlane: ControlPlane;
  readonly #kept = new Map<string, { grant: Promise<Grant | undefined>; until: number }>();
  readonly #limit = gate(PARALLEL, WAITING);

  constructor(controlPlane: ControlPlane) {
    this.#controlPlane = controlPlane;
  }

  /** Whether a token is of one of the kinds and made for the environment. */
  async judge(token: string | undefined, environmentId: string, kinds: readonly Kind[]): Promise<Verdict> {
    let grant: Grant | undefined;
    try {
      grant = token === undefined ? undefined : await this.#introspect(token);
    } catch {
      return "unknown";
    }
    if (!grant || !kinds.includes(grant.kind) || isOver(grant)) return "none";
    return grant.environmentId === environmentId ? { grant } : "other";
  }

  /** A token that opened a stream has been withdrawn since; that its time is over does not end the stream. */
  async isWithdrawn(token: string, grant: Grant): Promise<boolean> {
    try {
      return (await this.#introspect(token)) === undefined && !isOver(grant);
    } catch {
      return false;
    }
  }

  /** The token that a browser is to have in place of one from an address; undefined if that is not to be exchanged. */
  async redeem(token: string): Promise<string | undefined> {
    if (tokenKind(token) !== TokenKind.PORT_ACCESS) return undefined;
    const { token: next } = await this.#limit(() => this.#controlPlane.control.redeemPortToken({ token }));
    return next || undefined;
  }

  async #introspect(token: string): Promise<Grant | undefined> {
    const kind = tokenKind(token);
    if (!kind || !INTROSPECTED.has(kind)) return undefined;
    const key = createHash("sha256").update(token).digest("base64");
    const now = Date.now();
    const known = this.#kept.get(key);
    if (known && known.until > now) return await known.grant;
    const entry = { grant: this.#limit(() => this.#ask(token)), until: now + KEPT_MS };
    this.#kept.delete(key);
    this.#kept.set(key, entry);
    this.#prune(now);
    try {
      const grant = await entry.grant;
      if (!grant) entry.until = Math.min(entry.until, now + REFUSAL_KEPT_MS);
      return grant;
    } catch (error) {
      if (this.#kept.get(key) === entry) this.#kept.delete(key);
      throw error;
    }
  }

  async #ask(token: string): Promise<Grant | undefined> {
    const { active, ...found } = await this.#controlPlane.control.introspectToken({ token });
    if (!active) return undefined;
    const { kind, environmentId, port, authNonce, subject, expiresAt } = found;
    const subjectId = subject?.id ?? "";
    return { kind, environmentId, port, authNonce, subjectId, expiresAt: expiresAt && timestampMs(expiresAt) };
  }

  #prune(now: number): void {
    for (const [key, { until }] of this.#kept) {
      if (until > now && this.#kept.size <= MAX_KEPT) return;
      this.#kept.delete(key);
    }
  }
}

const isOver = ({ expiresAt }: Grant) => expiresAt !== undefined && expiresAt <= Date.now();
