import { create, fromBinary } from "@bufbuild/protobuf";
import type { HandlerContext } from "@connectrpc/connect";
import {
  EnvironmentMetadataSchema,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
  type GetEnvironmentRequest,
  type GetEnvironmentResponse,
  GetEnvironmentResponseSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import type { App } from "../../app.ts";
import { encodedEnvironment, seesSecrets, withoutSecrets } from "../../domain/environment.ts";
import { isUuid } from "../../domain/ids.ts";
import { principal, readBeside } from "../../rpc/authenticate.ts";
import { encodedAnswer, takesEncoded } from "../../rpc/call.ts";
import type { Beside } from "../../store/credentials.ts";
import { encodedEnvironmentQuery, getEncodedEnvironment } from "../../store/environments.ts";
import { viewer } from "./view.ts";

/** What GetEnvironment reads along with the credential of its caller. */
export const besideGetEnvironment = ({ environmentId }: GetEnvironmentRequest): Beside | undefined =>
  isUuid(environmentId) ? { query: encodedEnvironmentQuery, values: [environmentId] } : undefined;

/** GetEnvironment: what is stored is what is sent, so that binary callers get it without its being looked into. */
export async function readEnvironment(
  app: App,
  { environmentId }: GetEnvironmentRequest,
  context: HandlerContext,
): Promise<GetEnvironmentResponse> {
  const caller = principal(context);
  const stored = await getEncodedEnvironment(app.db.point, caller, environmentId, readBeside(context));
  const spec = seesSecrets(viewer(caller, stored)) ? stored.spec : withoutSecrets(stored.spec);
  if (takesEncoded(context)) {
    const bytes = encodedEnvironment({ ...stored, spec }, GetEnvironmentResponseSchema.field.environment);
    return encodedAnswer(GetEnvironmentResponseSchema, bytes);
  }
  const environment = {
    id: stored.id,
    metadata: fromBinary(EnvironmentMetadataSchema, stored.metadata),
    spec: fromBinary(EnvironmentSpecSchema, spec),
    status: fromBinary(EnvironmentStatusSchema, stored.status),
  };
  return create(GetEnvironmentResponseSchema, { environment });
}
