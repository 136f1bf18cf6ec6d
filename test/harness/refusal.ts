import { Code, ConnectError } from "@connectrpc/connect";
import { ViolationsSchema } from "../../gen/buf/validate/validate_pb.js";

/** The error with which a call ends; fails if it does not. */
export async function refusal(call: Promise<unknown>): Promise<ConnectError> {
  try {
    await call;
  } catch (error) {
    if (error instanceof ConnectError) return error;
    throw error;
  }
  throw new Error("the call was not refused");
}

/** Name of the code with which a call ends, for example `NotFound`. */
export const codeOf = async (call: Promise<unknown>): Promise<string> => Code[(await refusal(call)).code];

/** Fields that an error complains about, for example `spec.ports[0].port`. */
export function violatedFields(error: ConnectError): string[] {
  return error
    .findDetails(ViolationsSchema)
    .flatMap(({ violations }) =>
      violations.map(({ field }) =>
        (field?.elements ?? [])
          .map(({ fieldName, subscript }) =>
            subscript.case === undefined ? fieldName : `${fieldName}[${subscript.value}]`,
          )
          .join("."),
      ),
    );
}
