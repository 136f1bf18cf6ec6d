import type { ServiceImpl } from "@connectrpc/connect";
import { SecretService } from "../../gen/gitpod/v1/secret_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** SecretService, as far as it is built. */
export function secretService(_app: App): ServiceImpl<typeof SecretService> {
  return withPending(
    SecretService,
    ["createSecret", "updateSecretValue", "listSecrets", "deleteSecret", "getSecretValue"],
    {},
  );
}
