import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";

// What the operating system refuses, as the code a caller of the environment can act on.
const ERRNO_CODES: Readonly<Record<string, Code>> = {
  EACCES: Code.PermissionDenied,
  EPERM: Code.PermissionDenied,
  EROFS: Code.PermissionDenied,
  ENOENT: Code.NotFound,
  ENOTDIR: Code.NotFound,
  EEXIST: Code.AlreadyExists,
  EISDIR: Code.FailedPrecondition,
  ENXIO: Code.FailedPrecondition,
  ENODEV: Code.FailedPrecondition,
  EBUSY: Code.FailedPrecondition,
  ETXTBSY: Code.FailedPrecondition,
  EAGAIN: Code.ResourceExhausted,
  EMFILE: Code.ResourceExhausted,
  ENFILE: Code.ResourceExhausted,
  ENOMEM: Code.ResourceExhausted,
  ENOSPC: Code.ResourceExhausted,
  EDQUOT: Code.ResourceExhausted,
  EFBIG: Code.ResourceExhausted,
  ELOOP: Code.InvalidArgument,
  ENAMETOOLONG: Code.InvalidArgument,
  EINVAL: Code.InvalidArgument,
  E2BIG: Code.InvalidArgument,
  EIO: Code.Unavailable,
  ESTALE: Code.Unavailable,
};

/** The `code` of a system error, for example `ENOENT`. */
export function errnoOf(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}

export const invalidArgument = (message: string) => new ConnectError(message, Code.InvalidArgument);
export const failedPrecondition = (message: string) => new ConnectError(message, Code.FailedPrecondition);

/** System errors become status codes; anything unforeseen is reported and answered INTERNAL without its text. */
export function toOpsError(error: unknown, unforeseen: (error: unknown) => void): ConnectError {
  if (error instanceof ConnectError) return error;
  const errno = errnoOf(error);
  const code = errno === undefined ? undefined : ERRNO_CODES[errno];
  if (code !== undefined && error instanceof Error) return new ConnectError(error.message, code);
  unforeseen(error);
  return new ConnectError("internal error", Code.Internal);
}

export function opsErrors(unforeseen: (error: unknown) => void): Interceptor {
  async function* translated<T>(messages: AsyncIterable<T>): AsyncIterable<T> {
    try {
      yield* messages;
    } catch (error) {
      throw toOpsError(error, unforeseen);
    }
  }
  return (next) => async (request) => {
    try {
      const response = await next(request);
      return response.stream ? { ...response, message: translated(response.message) } : response;
    } catch (error) {
      throw toOpsError(error, unforeseen);
    }
  };
}

/** Answers DEADLINE_EXCEEDED after `ms`; what was begun is not undone. */
export async function withDeadline<T>(work: Promise<T>, ms: number, what: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new ConnectError(`${what} took longer than ${ms / 1000} s`, Code.DeadlineExceeded)),
      ms,
    );
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
