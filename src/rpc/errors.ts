import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";
import { FieldPathSchema, ViolationsSchema } from "../../gen/buf/validate/validate_pb.js";
import { type ActionableErrorDetails, ActionableErrorDetailsSchema } from "../../gen/gitpod/v1/actionable_error_pb.js";
import { databaseRefusal, type FieldProblem, Refusal, type RefusalDetail, type RefusalKind } from "../domain/errors.ts";

const CODES: Record<RefusalKind, Code> = {
  invalid_argument: Code.InvalidArgument,
  unauthenticated: Code.Unauthenticated,
  permission_denied: Code.PermissionDenied,
  not_found: Code.NotFound,
  already_exists: Code.AlreadyExists,
  failed_precondition: Code.FailedPrecondition,
  resource_exhausted: Code.ResourceExhausted,
  aborted: Code.Aborted,
  unavailable: Code.Unavailable,
  deadline_exceeded: Code.DeadlineExceeded,
  unimplemented: Code.Unimplemented,
};

/** `spec.ports[0].port` or `file.tasks["a"].name` as the elements that validation errors carry; keys are without dots. */
function fieldPath(field: string) {
  const elements = field.split(".").map((part) => {
    const [, fieldName = part, index, key] = /^([^[]*)\[(?:(\d+)|"([^"]*)")\]$/.exec(part) ?? [];
    if (index !== undefined) return { fieldName, subscript: { case: "index" as const, value: BigInt(index) } };
    return { fieldName, subscript: key === undefined ? undefined : { case: "stringKey" as const, value: key } };
  });
  return create(FieldPathSchema, { elements });
}

function violations(problems: readonly FieldProblem[]) {
  return {
    desc: ViolationsSchema,
    value: {
      violations: problems.map(({ field, message }) => ({ field: fieldPath(field), ruleId: "berth", message })),
    },
  };
}

/** What can be done about it: for now, to read the operator's page about errors of this code. */
function withHelp(detail: RefusalDetail, docsUrl: string): RefusalDetail {
  if (detail.desc !== ActionableErrorDetailsSchema) return detail;
  const value = detail.value as Partial<ActionableErrorDetails>;
  const page = `${docsUrl}/errors#${value.errorCode?.toLowerCase()}`;
  const action = { actionId: "read_docs", label: "Read about it", target: { case: "externalUrl", value: page } };
  return { desc: detail.desc, value: { ...value, actions: [action] } };
}

export function toConnectError(refusal: Refusal, docsUrl?: string): ConnectError {
  const given = docsUrl ? refusal.details.map((detail) => withHelp(detail, docsUrl)) : refusal.details;
  const details = [...given, ...(refusal.problems.length ? [violations(refusal.problems)] : [])];
  return new ConnectError(refusal.message, CODES[refusal.kind], undefined, details, refusal);
}

function translate(error: unknown, docsUrl?: string): unknown {
  const refusal = error instanceof Refusal ? error : databaseRefusal(error);
  return refusal ? toConnectError(refusal, docsUrl) : error;
}

async function* translated<T>(messages: AsyncIterable<T>, docsUrl?: string): AsyncIterable<T> {
  try {
    yield* messages;
  } catch (error) {
    throw translate(error, docsUrl);
  }
}

/**
 * Turns refusals of rules and stores into status codes, for unary calls and inside streams. Links to help begin with
 * `docsUrl`; without it there are none.
 */
export const refusals =
  (docsUrl?: string): Interceptor =>
  (next) =>
  async (request) => {
    try {
      const response = await next(request);
      return response.stream ? { ...response, message: translated(response.message, docsUrl) } : response;
    } catch (error) {
      throw translate(error, docsUrl);
    }
  };

/** As `refusals`, for what is settled before the message is read. */
export const refusingGate =
  <T>(gate: (request: T) => Promise<void>, docsUrl?: string) =>
  (request: T): Promise<void> =>
    gate(request).catch((error: unknown) => {
      throw translate(error, docsUrl);
    });
