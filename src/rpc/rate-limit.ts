import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { RetryInfoSchema } from "../../gen/google/rpc/error_details_pb.js";
import { actionable } from "../domain/errors.ts";
import { isPerson } from "../domain/principal.ts";
import { callerOf } from "./authenticate.ts";
import { callKey, type Entering } from "./call.ts";
import { ruleOf } from "./policy.ts";

const BURST = 4;
const PUBLIC_PER_SECOND = 30 / 60;
const PUBLIC_BURST = 30;
// A bucket that nobody has used for a while is full, which is what a new one is too.
const MAX_BUCKETS = 20_000;
const OPEN_SERVICES = /^grpc\./;

interface Bucket {
  left: number;
  at: number;
}

/** A token bucket per key: `perSecond` on average, `burst` at once. */
class Buckets {
  readonly #perSecond: number;
  readonly #burst: number;
  readonly #buckets = new Map<string, Bucket>();

  constructor(perSecond: number, burst: number) {
    this.#perSecond = perSecond;
    this.#burst = burst;
  }

  /** Takes one; milliseconds until there is one again if there is none. */
  take(key: string, now: number): number {
    const bucket = this.#buckets.get(key) ?? { left: this.#burst, at: now };
    bucket.left = Math.min(this.#burst, bucket.left + ((now - bucket.at) / 1000) * this.#perSecond);
    bucket.at = now;
    // Kept in the order of use, so that the first is the one to forget.
    this.#buckets.delete(key);
    this.#buckets.set(key, bucket);
    if (this.#buckets.size > MAX_BUCKETS) this.#buckets.delete(this.#buckets.keys().next().value ?? "");
    if (bucket.left < 1) return ((1 - bucket.left) / this.#perSecond) * 1000;
    bucket.left -= 1;
    return 0;
  }
}

/**
 * Limits what needs no credential to 30 a minute and address: tells how many milliseconds to wait, 0 if that is not
 * necessary.
 */
export function addressLimit(clock: () => number = () => performance.now()): (peer: string) => number {
  const addresses = new Buckets(PUBLIC_PER_SECOND, PUBLIC_BURST);
  return (peer) => addresses.take(peer, clock());
}

/**
 * Limits calls per user or service account to `perSecond` with four times that as burst, 0 for no limit, and calls that
 * need no credential by `addresses`. Runners and environments are exempt. RESOURCE_EXHAUSTED with RetryInfo.
 */
export function rateLimit(
  perSecond: number,
  clock: () => number = () => performance.now(),
  addresses = addressLimit(clock),
): (request: Entering) => void {
  const people = new Buckets(perSecond, perSecond * BURST);
  return (request) => {
    if (perSecond === 0 || OPEN_SERVICES.test(request.service.typeName)) return;
    const caller = callerOf(request.contextValues);
    const isPublic = ruleOf(request.service, request.method).public === true;
    let waitMs = 0;
    if (isPublic) waitMs = addresses(request.contextValues.get(callKey)?.peer ?? "");
    else if (caller && (isPerson(caller) || caller.principal === Principal.ACCOUNT))
      waitMs = people.take(caller.id, clock());
    if (waitMs === 0) return;
    const retry = { desc: RetryInfoSchema, value: { retryDelay: durationFromMs(Math.ceil(waitMs)) } };
    throw actionable("resource_exhausted", "PLATFORM_LIMIT_RATE", "too many calls, try again later", {}, [retry]);
  };
}
