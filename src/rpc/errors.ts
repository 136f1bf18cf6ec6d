import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";
import { FieldPathSchema, ViolationsSchema } from "../../gen/buf/validate/validate_pb.js";
import { databaseRefusal, type FieldProblem, Refusal, type RefusalKind } from "../domain/errors.ts";

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

/** `spec.ports[0].port` as the elements that validation errors carry. */
function fieldPath(field: string) {
  const elements = field.split(".").map((part) => {
    const [, fieldName = part, index] = /^([^[]*)\[(\d+)\]$/.exec(part) ?? [];
    return { fieldName, subscript: index === undefined ? undefined : { case: "index" as const, value: BigInt(index) } };
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

export function toConnectError(refusal: Refusal): ConnectError {
  const details = [...refusal.details, ...(refusal.problems.length ? [violations(refusal.problems)] : [])];
  return new ConnectError(refusal.message, CODES[refusal.kind], undefined, details, refusal);
}

function translate(error: unknown): unknown {
  const refusal = error instanceof Refusal ? error : databaseRefusal(error);
  return refusal ? toConnectError(refusal) : error;
}

async function* translated<T>(messages: AsyncIterable<T>): AsyncIterable<T> {
  try {
    yield* messages;
  } catch (error) {
    throw translate(error);
  }
}

/** Turns refusals of rules and stores into status codes, for unary calls and inside streams. */
export const refusals: Interceptor = (next) => async (request) => {
  try {
    const response = await next(request);
    return response.stream ? { ...response, message: translated(response.message) } : response;
  } catch (error) {
    throw translate(error);
  }
};
