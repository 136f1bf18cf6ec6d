import type { DescMessage, MessageInitShape } from "@bufbuild/protobuf";
import { ActionableErrorDetailsSchema } from "../../gen/gitpod/v1/actionable_error_pb.js";

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

  constructor(
    kind: RefusalKind,
    message: string,
    more: { problems?: FieldProblem[]; details?: RefusalDetail[]; cause?: unknown } = {},
  ) {
    super(message, more.cause === undefined ? undefined : { cause: more.cause });
    this.name = "Refusal";
    this.kind = kind;
    this.problems = more.problems ?? [];
    this.details = more.details ?? [];
  }
}

/** The program must not run in this state, and starting it again does not help. */
export class RefusedStart extends Error {}

export const notFound = (what: string, id: string) => new Refusal("not_found", `${what} ${id} not found`);
export const denied = (message: string) => new Refusal("permission_denied", message);
export const precondition = (message: string, details: RefusalDetail[] = []) =>
  new Refusal("failed_precondition", message, { details });

/**
 * A refusal that a person can do something about. Clients tell it by `errorCode`, COMPONENT_CATEGORY_SPECIFIC or the
 * field name of a policy; `message` is one sentence to show, `metadata` holds ids alone.
 */
export function actionable(
  kind: RefusalKind,
  errorCode: string,
  message: string,
  metadata: Record<string, string> = {},
  details: RefusalDetail[] = [],
): Refusal {
  const detail = { desc: ActionableErrorDetailsSchema, value: { errorCode, userMessage: message, metadata } };
  return new Refusal(kind, message, { details: [detail, ...details] });
}

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

const CONFLICTS = new Set(["40001", "40P01", "55P03"]);
// Too long, out of range, no such time, no such character, malformed.
const UNSTORABLE = new Set(["22001", "22003", "22007", "22008", "22021", "22P02", "22P03", "22P05"]);

// Raised by a trigger of the database.
const REPLACED_MASTER_KEY = "BK001";

const codeOf = (error: unknown): string => {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  return typeof code === "string" ? code : "";
};

/** A row with the same key exists already: which key is told by the name of its index. */
export const isDuplicate = (error: unknown, index: string) =>
  codeOf(error) === "23505" && error instanceof Error && "constraint_name" in error && error.constraint_name === index;

/** This process has another master key than the installation by now, so that it can neither read nor store secrets. */
export const otherMasterKey = (cause?: unknown) =>
  new Refusal("unavailable", "the master key has been replaced: this server must be started again with the new one", {
    cause,
  });

/** Two transactions got in each other's way; the same one, run again, may well succeed. */
export const isConflict = (error: unknown) => CONFLICTS.has(codeOf(error));

/**
 * What a failure of the database means to a caller, told by its SQLSTATE or the driver's code: ABORTED for a lost race,
 * INVALID_ARGUMENT for a value that it cannot hold, UNAVAILABLE when it is away or too busy. Undefined for all else.
 */
export function databaseRefusal(error: unknown): Refusal | undefined {
  const code = codeOf(error);
  if (isConflict(error))
    return new Refusal("aborted", "somebody else changed the same thing, try again", { cause: error });
  if (UNSTORABLE.has(code))
    return new Refusal("invalid_argument", "the request holds a value that cannot be stored", { cause: error });
  if (code === REPLACED_MASTER_KEY) return otherMasterKey(error);
  const away = /^(08|53|57)[0-9A-Z]{3}$|^25(006|P0[34])$|^CONNECT(ION)?_/.test(code);
  const unreachable = error instanceof Error && "syscall" in error && error.syscall === "connect";
  if (away || unreachable || /^(ECONNRESET|EPIPE|ETIMEDOUT)$/.test(code))
    return new Refusal("unavailable", "the database is not available, try again", { cause: error });
  return undefined;
}
