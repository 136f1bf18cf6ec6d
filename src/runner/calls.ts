import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import {
  type Call,
  type CompleteCallRequest,
  CompleteCallRequestSchema,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { ScmError, type ScmErrorKind } from "../scm/errors.ts";
import { describe } from "./control-plane.ts";
import type { Host } from "./host.ts";

const ANSWER_KEPT_MS = 10 * 60_000;
const MAX_ANSWERS = 1000;
const MAX_RUNNING = 16;
const BUDGET_MS = 20_000;
const MESSAGE_CHARACTERS = 1000;

const SCM_CODES: Record<ScmErrorKind, Code> = {
  invalid_url: Code.InvalidArgument,
  blocked: Code.InvalidArgument,
  // Without a way to sign in, a repository that wants a sign-in looks like none.
  auth_required: Code.NotFound,
  not_found: Code.NotFound,
  forbidden: Code.PermissionDenied,
  rate_limited: Code.ResourceExhausted,
  unavailable: Code.Unavailable,
  timeout: Code.DeadlineExceeded,
  unsupported: Code.FailedPrecondition,
};

type Outcome = CompleteCallRequest["outcome"];

/** Answers questions of the control plane; asked again, it repeats the answer that it gave in the last ten minutes. */
export class Calls {
  readonly #host: Host;
  readonly #answers = new Map<string, { request: CompleteCallRequest; at: number }>();
  readonly #running = new Set<string>();

  constructor(host: Host) {
    this.#host = host;
  }

  /** Works on a call without making anybody wait; the control plane asks again if no answer arrives. */
  accept(call: Call, signal: AbortSignal): void {
    this.#prune();
    const { callId } = call;
    if (this.#running.has(callId)) return;
    const known = this.#answers.get(callId);
    if (!known && this.#running.size >= MAX_RUNNING) {
      this.#host.log.warn({ callId }, "too many calls at once; one was left to its deadline");
      return;
    }
    this.#running.add(callId);
    const answered = known ? this.#send(known.request, signal) : this.#answer(call, signal);
    answered
      .catch((error: unknown) => this.#host.log.warn({ callId, error: describe(error) }, "a call was not answered"))
      .finally(() => this.#running.delete(callId));
  }

  async #answer(call: Call, signal: AbortSignal): Promise<void> {
    const left = call.deadline ? timestampMs(call.deadline) - Date.now() : BUDGET_MS;
    if (left <= 0) return;
    const ends = AbortSignal.any([signal, AbortSignal.timeout(Math.min(left, BUDGET_MS))]);
    const request = create(CompleteCallRequestSchema, {
      callId: call.callId,
      outcome: await this.#outcome(call, ends),
    });
    this.#answers.set(call.callId, { request, at: Date.now() });
    await this.#send(request, signal);
  }

  async #send(request: CompleteCallRequest, signal: AbortSignal): Promise<void> {
    await this.#host.controlPlane.control.completeCall(request, { signal });
  }

  async #outcome({ callId, request }: Call, signal: AbortSignal): Promise<Outcome> {
    if (request.case !== "parseContext") return failure(Code.Unimplemented, "this runner does not know the call");
    const purpose = { case: "callId" as const, value: callId };
    try {
      const response = await this.#host.resolveContext(request.value.contextUrl, purpose, signal);
      return { case: "parseContext", value: { $typeName: "berth.runner.v1.ParseContextResult", response } };
    } catch (error) {
      if (error instanceof ScmError) return failure(SCM_CODES[error.kind], error.message);
      if (signal.aborted) return failure(Code.DeadlineExceeded, "the address could not be resolved in time");
      this.#host.log.error({ error: describe(error) }, "a context URL could not be resolved");
      return failure(Code.Unavailable, "the address could not be resolved");
    }
  }

  #prune(): void {
    const oldest = Date.now() - ANSWER_KEPT_MS;
    for (const [id, { at }] of this.#answers) {
      if (at >= oldest && this.#answers.size <= MAX_ANSWERS) return;
      this.#answers.delete(id);
    }
  }
}

function failure(code: Code, message: string): Outcome {
  const value: MessageInitShape<typeof CompleteCallRequestSchema> = {
    outcome: { case: "failure", value: { code, message: message.slice(0, MESSAGE_CHARACTERS) } },
  };
  return create(CompleteCallRequestSchema, value).outcome;
}
