import { create, type DescService } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";
import type { Interceptor } from "@connectrpc/connect";
import { createValidateInterceptor } from "@connectrpc/validate";

// One per process: the rules of a message type are compiled at its first use, which takes far longer than any later one.
const validator = createValidator();

/** Checks request messages against the rules in the schema; INVALID_ARGUMENT with the violations. */
export const validation = (): Interceptor => createValidateInterceptor({ validator });

/** Compiles the rules of the request messages of services before the first caller has to wait for it. */
export function warmValidation(services: Iterable<DescService>): void {
  for (const { methods } of services) for (const { input } of methods) validator.validate(input, create(input));
}
