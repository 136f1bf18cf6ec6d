import type { DescMessage, MessageInitShape } from "@bufbuild/protobuf";

/** What a caller can act on; one table in rpc/errors.ts turns it into status codes. */
export type RefusalKind =
  | "invalid_argument"
  | "unauthenticated"
  | "permission_denied"
  | "not_found"
  | "already_exists"
  | "failed_precondition"
  | "resource_exhausted"
  | "aborted"
  | "unavailable"
  | "deadline_exceeded"
  | "unimplemented";

/** A fault in one field; `field` is the proto path, for example `spec.ports[0].port`. */
export interface FieldProblem {
  field: string;
  message: string;
}

/** A protobuf message attached to an error, for clients that can read it. */
export interface RefusalDetail<D extends DescMessage = DescMessage> {
  desc: D;
  value: MessageInitShape<D>;
}

/** The one error that handlers, rules and stores throw when a request cannot be served as asked. */
export class Refusal extends Error {
  readonly kind: RefusalKind;
  readonly problems: readonly FieldProblem[];
  readonly details: readonly RefusalDetail[];

  constructor(kind: RefusalKind, message: string, more: { problems?: FieldProblem[]; details?: RefusalDetail[] } = {}) {
    super(message);
    this.name = "Refusal";
    this.kind = kind;
    this.problems = more.problems ?? [];
    this.details = more.details ?? [];
  }
}

export const notFound = (what: string, id: string) => new Refusal("not_found", `${what} ${id} not found`);
export const denied = (message: string) => new Refusal("permission_denied", message);
export const precondition = (message: string, details: RefusalDetail[] = []) =>
  new Refusal("failed_precondition", message, { details });

/** INVALID_ARGUMENT for one or more fields; the message names the first. */
export function invalid(...problems: [FieldProblem, ...FieldProblem[]]): Refusal {
  const [first] = problems;
  return new Refusal("invalid_argument", `${first.field}: ${first.message}`, { problems });
}

/** Throws INVALID_ARGUMENT if a check found anything. */
export function refuseProblems(problems: readonly FieldProblem[]): void {
  const [first, ...rest] = problems;
  if (first) throw invalid(first, ...rest);
}
